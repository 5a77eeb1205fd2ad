//! What the server knows is kept: backups, a restoration, the audit, and a disk that is full, read-only or damaged.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::server::{Peregrine, http_get, signal};
use crate::support::shop::{Shop, TWO_HOSTS};
use crate::support::wait_for;

const QUICK: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "50ms"
step_max = "100ms"
warm = { probes = 1, interval = "20ms" }
"#;

/// A move that is warming its new copy for some seconds, so that a backup falls into it.
const LONG_WARM: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "50ms"
step_max = "100ms"
warm = { probes = 150, interval = "20ms" }
"#;

#[test]
fn a_backup_made_during_a_move_is_restored_elsewhere_and_a_server_goes_on_from_it() {
    let mut shop = Shop::open(LONG_WARM);
    let file = shop.server.dir().join("peregrine.backup");
    let file = file.to_str().expect("UTF-8").to_owned();
    let id = shop.begin_move("host-b");
    wait_for("the warming", || {
        let now = shop.the_move(&id);
        (now["state"] == "running" && now["phase"] == "warm").then_some(())
    });
    let made = shop.server.ok(&["server", "backup", &file]);
    assert!(made["entries"].as_u64().expect("a number") > 5, "{made:#}");
    let sums = std::fs::read_to_string(format!("{file}.sha256")).expect("the checksum is beside it");
    assert!(sums.starts_with(made["sha256"].as_str().expect("text")), "{sums}");
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "succeeded", "{ended:#}");

    let again = shop.server.run(&["server", "backup", &file]);
    assert_eq!((again.code, again.error()["code"].as_str()), (5, Some("backup.exists")));
    let onto = shop.server.run(&["server", "restore", &file, "--force"]);
    assert_eq!((onto.code, onto.error()["code"].as_str()), (5, Some("store.locked")), "it runs");

    let moves = shop.server.ok(&["moves", "list"]);
    let copies: Vec<_> = ["from", "to"].map(|side| shop.instance_of(&id, side)).into();
    shop.server.stop();
    let refused = shop.server.run(&["server", "restore", &file]);
    assert_eq!((refused.code, refused.error()["code"].as_str()), (5, Some("restore.not_empty")));
    // Everything but the file is lost, with the machine: nothing runs on the next one.
    lose_processes(&shop.server, &copies);
    std::fs::rename(shop.server.data(), shop.server.dir().join("lost")).expect("it can be moved");
    let restored = shop.server.ok(&["server", "restore", &file]);
    assert_eq!(restored["sha256"], made["sha256"]);
    shop.server.start_again();
    wait_for("the shop to serve", || {
        http_get(shop.server.edge(), "/").filter(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    let known = shop.server.ok(&["services", "show", "shop"]);
    assert_eq!(known["service"]["version"], 1, "{known:#}");
    // The move was under way at the backup: it comes to its end once more, and is the last one here, too.
    let ids = |moves: &Value| -> Vec<String> {
        let items = moves["items"].as_array().expect("a list");
        items.iter().map(|item| item["id"].as_str().expect("an id").to_owned()).collect()
    };
    assert_eq!(ids(&shop.server.ok(&["moves", "list"])), ids(&moves));
    let again = shop.ended(&id);
    assert_eq!(again["state"], "succeeded", "{again:#}");
    assert_ne!(again["ended_at"], ended["ended_at"], "the backup is of before the end");
    assert_eq!(shop.places(), ["host-b"]);
    assert_eq!(shop.server.ok(&["audit", "verify"])["verified"], true);
    let audit = shop.server.ok(&["audit", "list"]);
    let acts = audit["items"].as_array().expect("a list").iter();
    assert!(acts.filter(|entry| entry["act"] == "store_restored").count() == 1, "{audit:#}");
}

/// Ends every process of a server, and takes away the control groups of these instances.
fn lose_processes(server: &Peregrine, instances: &[String]) {
    server.pids_of("").into_iter().for_each(|pid| signal(pid, "KILL"));
    wait_for("the end of all processes", || server.pids_of("").is_empty().then_some(()));
    for instance in instances {
        let name = format!("peregrine-{instance}-*");
        let found = Command::new("find")
            .args(["/sys/fs/cgroup", "-depth", "-type", "d", "-name", &name, "-exec", "rmdir", "{}", ";"])
            .output();
        assert!(found.is_ok(), "find cannot be run: {found:?}");
    }
}

#[test]
fn a_byte_of_the_audit_that_is_changed_behind_the_servers_back_is_named_and_the_exit_code_says_so() {
    let mut shop = Shop::open(QUICK);
    shop.move_to("host-b");
    let whole = shop.server.ok(&["audit", "verify"]);
    assert_eq!((&whole["verified"], &whole["first"]), (&Value::Bool(true), &Value::from(1)));
    shop.server.stop();
    // The second entry of the audit, "machine added: host-b": its last letter is changed.
    let file = shop.server.data().join("store.db");
    let mut bytes = std::fs::read(&file).expect("the store is one file");
    let entry = b"\"act\":{\"type\":\"machine_added\",\"machine\":\"host-b\"}";
    let places: Vec<usize> =
        (0..bytes.len() - entry.len()).filter(|at| bytes[*at..].starts_with(entry)).collect();
    assert!(!places.is_empty(), "the entry is in the file");
    for at in places {
        bytes[at + entry.len() - 3] ^= 0x02; // in the table and in the log of commits
    }
    std::fs::write(&file, bytes).expect("it can be written");
    shop.server.start_again();
    let said = shop.server.run(&["audit", "verify"]);
    assert_eq!((said.code, said.error()["code"].as_str()), (9, Some("audit.broken")), "{said:#?}");
    assert_eq!(said.error()["message"], "the audit was changed: entry 2", "{said:#?}");
    // It stops nothing.
    shop.move_to("host-a");
    assert_eq!(shop.places(), ["host-a"]);
    assert_eq!(shop.server.run(&["audit", "verify"]).code, 9, "what came after does not heal it");
}

#[test]
fn a_damaged_record_is_an_alarm_in_the_status_and_for_the_doctor_and_everything_else_goes_on() {
    let mut shop = Shop::open(QUICK);
    assert_eq!(shop.server.ok(&["status"])["alarms"], serde_json::json!([]));
    shop.server.stop();
    let file = shop.server.data().join("store.db");
    let mut bytes = std::fs::read(&file).expect("the store is one file");
    // In the plan of the deploy, which is over: nothing else has these words.
    let record = b"\"format\":1";
    let places: Vec<usize> =
        (0..bytes.len() - record.len()).filter(|at| bytes[*at..].starts_with(record)).collect();
    assert!(!places.is_empty(), "the record of the deploy is in the file");
    for at in places {
        bytes[at + record.len() - 1] ^= 0x02;
    }
    std::fs::write(&file, bytes).expect("it can be written");
    shop.server.start_again();
    let alarms = shop.server.ok(&["status"])["alarms"].clone();
    assert_eq!(alarms[0]["code"], "store.record_aside", "{alarms:#}");
    assert!(alarms[0]["message"].as_str().expect("text").contains("rollouts/"), "{alarms:#}");
    let doctor = shop.server.run(&["doctor"]);
    assert_eq!(doctor.code, 9, "{doctor:#?}");
    assert!(doctor.error().to_string().contains("store.record_aside"), "{doctor:#?}");
    wait_for("the number of alarms", || shop.server.metrics().contains("peregrine_alarms 1").then_some(()));
    assert!(http_get(shop.server.edge(), "/").expect("an answer").starts_with("HTTP/1.1 200"));
}

/// A small file system at a place; gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where mounting is not allowed.
    fn mount(at: &Path) -> Option<Self> {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }

    fn read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).status();
        assert!(status.is_ok_and(|status| status.success()), "nothing has a file open for writing");
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.filler()).expect("there is room for a name");
        for size in [4_096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

/// The shop, with its data folder on a disk of 1 MB. The server is stopped.
fn shop_on_a_small_disk() -> Option<(Shop, SmallDisk)> {
    let mut shop = Shop::open(QUICK);
    shop.server.stop();
    let (data, aside) = (shop.server.data(), shop.server.dir().join("aside"));
    std::fs::rename(&data, &aside).expect("it can be moved");
    std::fs::create_dir(&data).expect("it can be made");
    let Some(disk) = SmallDisk::mount(&data) else {
        eprintln!("skipped: no file system can be mounted here");
        return None;
    };
    let copied = Command::new("cp").arg("-a").arg(aside.join(".")).arg(&data).status();
    assert!(copied.is_ok_and(|status| status.success()), "it fits into 1 MB");
    Some((shop, disk))
}

#[test]
fn a_full_disk_is_told_loses_nothing_acknowledged_leaves_the_edge_serving_and_is_over_when_there_is_room() {
    let Some((mut shop, disk)) = shop_on_a_small_disk() else { return };
    shop.server.start_again();
    disk.fill();
    let mut acknowledged = Vec::new();
    let refused = loop {
        let name = format!("spare-{}", acknowledged.len());
        let said = shop.server.run(&["machines", "add", &name, "--process", "--address", "127.0.0.3"]);
        if said.code != 0 {
            break said;
        }
        acknowledged.push(name);
        assert!(acknowledged.len() < 500, "1 MB is full");
    };
    assert_eq!((refused.code, refused.error()["code"].as_str()), (9, Some("store.full")), "{refused:#?}");
    assert!(refused.error()["message"].as_str().expect("text").contains("full"), "{refused:#?}");
    let ready = http_get(shop.server.api(), "/readyz").expect("an answer");
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("disk"), "{ready}");
    assert!(shop.server.log_text().contains("nothing new can be stored"), "the log tells it");
    for _ in 0..20 {
        let answer = http_get(shop.server.edge(), "/").expect("the edge answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    std::fs::remove_file(disk.filler()).expect("it is there");
    wait_for("the server to be ready again", || {
        http_get(shop.server.api(), "/readyz").filter(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    shop.move_to("host-b");
    shop.server.kill();
    shop.server.start_again();
    let machines = shop.server.ok(&["machines", "list"]).to_string();
    for name in &acknowledged {
        assert!(machines.contains(name.as_str()), "{name} was acknowledged");
    }
    assert_eq!(shop.places(), ["host-b"]);
    shop.server.stop();
}

fn serve(server: &Peregrine) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args(["serve", "--json", "--config"])
        .arg(server.dir().join("server.toml"))
        .arg("--data")
        .arg(server.data())
        .stdin(Stdio::null())
        .output()
        .expect("peregrine runs")
}

#[test]
fn a_server_on_a_read_only_disk_or_a_damaged_store_says_so_and_ends_with_its_exit_code() {
    let Some((mut shop, disk)) = shop_on_a_small_disk() else { return };
    disk.read_only();
    let ended = serve(&shop.server);
    let told = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!(ended.status.code(), Some(9), "{ended:?}");
    assert!(told.contains("store.open") && told.contains("can be written by this user"), "{told}");
    drop(disk);

    // Back on the large disk, with the first page overwritten.
    let (data, aside) = (shop.server.data(), shop.server.dir().join("aside"));
    std::fs::remove_dir(&data).expect("nothing is mounted there");
    std::fs::rename(&aside, &data).expect("it can be moved");
    let file = data.join("store.db");
    let whole = std::fs::read(&file).expect("it can be read");
    let mut damaged = whole.clone();
    damaged[4_096..6_000].fill(0xA5);
    std::fs::write(&file, damaged).expect("it can be written");
    let ended = serve(&shop.server);
    let told = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!(ended.status.code(), Some(9), "{ended:?}");
    assert!(told.contains("the store is damaged") && told.contains("backup"), "{told}");
    // Nothing was made worse.
    std::fs::write(&file, whole).expect("it can be written");
    shop.server.start_again();
    wait_for("the shop to serve", || {
        http_get(shop.server.edge(), "/").filter(|answer| answer.starts_with("HTTP/1.1 200"))
    });
}

#[test]
fn without_a_server_or_a_store_a_backup_says_what_to_name() {
    let server = Peregrine::start(TWO_HOSTS);
    let nowhere = server.dir().join("nowhere");
    let output = Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args(["--json", "--data"])
        .arg(&nowhere)
        .args(["server", "backup", "x.backup"])
        .output()
        .expect("peregrine runs");
    assert_eq!(output.status.code(), Some(4));
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("backup.no_store") && told.contains("--data"), "{told}");
}
