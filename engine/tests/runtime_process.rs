//! The process runtime, with real processes: this test binary plays the programs itself (`instance_main`,
//! `controller_main`).

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use peregrine_engine::model::{InstanceId, MachineKind, MachineSpec, Resources};
use peregrine_engine::runtime::{InstanceSpec, LogOptions, ProcessRuntime, Run, Runtime, RuntimeError};

const DEADLINE: Duration = Duration::from_secs(20);
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1));

fn machine() -> MachineSpec {
    MachineSpec {
        name: "host-a".to_owned(),
        kind: MachineKind::Process,
        address: ADDRESS,
        labels: BTreeMap::new(),
    }
}

fn runtime(data: &Path) -> ProcessRuntime {
    ProcessRuntime::new(&machine(), data)
}

fn spec(command: &[&str]) -> InstanceSpec {
    InstanceSpec {
        install: "test".to_owned(),
        id: InstanceId::generate(),
        service: "shop".to_owned(),
        version: 1,
        epoch: 1,
        run: Run::Process { command: command.iter().map(|&word| word.to_owned()).collect(), directory: None },
        env: BTreeMap::new(),
        resources: Resources::default(),
        publish: ADDRESS,
    }
}

fn own_role(role: &str) -> Vec<String> {
    let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    [&own, role, "--exact", "--ignored", "--nocapture"].map(str::to_owned).to_vec()
}

/// An instance that listens and answers each connection with its pid and its environment.
fn listening() -> InstanceSpec {
    let mut spec = spec(&[]);
    spec.run = Run::Process { command: own_role("instance_main"), directory: None };
    spec
}

#[test]
#[ignore = "played as a program by the tests"]
fn instance_main() {
    let (Ok(host), Ok(port)) = (std::env::var("HOST"), std::env::var("PORT")) else { return };
    let socket = std::net::TcpListener::bind((host.as_str(), port.parse().unwrap())).unwrap();
    println!("listening");
    for connection in socket.incoming() {
        let mut connection = connection.unwrap();
        writeln!(connection, "{}", std::process::id()).unwrap();
        for (name, value) in std::env::vars() {
            writeln!(connection, "{name}={value}").unwrap();
        }
    }
}

#[test]
#[ignore = "played as a program by the tests"]
fn controller_main() {
    let Some(data) = std::env::var_os("CONTROLLER_DATA") else { return };
    let work = async {
        let runtime = runtime(Path::new(&data));
        let spec = listening();
        let address = runtime.ensure(&spec).await.unwrap();
        println!("STARTED {} {address}", spec.id);
        std::future::pending::<()>().await;
    };
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(work);
}

fn ask(address: SocketAddr) -> Option<(u32, BTreeMap<String, String>)> {
    let mut answer = String::new();
    let mut connection = std::net::TcpStream::connect(address).ok()?;
    connection.set_read_timeout(Some(DEADLINE)).unwrap();
    connection.read_to_string(&mut answer).ok()?;
    let mut lines = answer.lines();
    let pid = lines.next()?.parse().ok()?;
    let pairs = lines.filter_map(|line| line.split_once('='));
    Some((pid, pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()))
}

fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.trim_start().starts_with('Z'))
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

async fn eventually<F: Future<Output = bool>>(what: &str, state: impl Fn() -> F) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Processes that were started by instance `id`, by its variable in their environment.
fn processes_of(id: &InstanceId) -> Vec<u32> {
    let wanted = format!("PEREGRINE_INSTANCE={id}");
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|item| item == wanted.as_bytes())
        })
        .filter(|pid| alive(*pid))
        .collect()
}

#[tokio::test]
async fn an_instance_listens_where_it_was_told_and_is_gone_after_its_removal() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = listening();
    let address = runtime.ensure(&spec).await.unwrap();
    assert_eq!(address.ip(), ADDRESS);
    eventually("it answers", || async { ask(address).is_some() }).await;
    let (pid, _) = ask(address).unwrap();
    let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert!(status.running);
    assert_eq!((status.address, status.restarts, status.epoch), (Some(address), 0, 1));
    assert_eq!(runtime.list("test").await.unwrap(), [status]);
    assert!(runtime.list("another installation").await.unwrap().is_empty());
    let stats = runtime.stats(&spec.id).await.unwrap();
    assert!(stats.memory_bytes > 100_000 && stats.pids >= 1, "{stats:?}");

    runtime.remove(&spec.id, 10_000).await.unwrap();
    assert!(!alive(pid));
    assert!(ask(address).is_none());
    assert!(runtime.inspect(&spec.id).await.unwrap().is_none());
    runtime.remove(&spec.id, 0).await.unwrap();
    let left = std::fs::read_dir(data.path().join("processes/host-a")).unwrap().count();
    assert_eq!(left, 0, "the folder is gone too");
}

#[tokio::test]
async fn an_instance_that_runs_is_left_alone_by_a_second_ensure() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = listening();
    let (first, second) = tokio::join!(runtime.ensure(&spec), runtime.ensure(&spec));
    let address = first.unwrap();
    assert_eq!(second.unwrap(), address);
    eventually("it answers", || async { ask(address).is_some() }).await;
    let (pid, _) = ask(address).unwrap();
    assert_eq!(runtime.ensure(&spec).await.unwrap(), address);
    assert_eq!(ask(address).unwrap().0, pid);
    assert_eq!(processes_of(&spec.id), [pid]);
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn an_instance_inherits_nothing_from_our_environment() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let mut spec = listening();
    spec.env.insert("GREETING".to_owned(), "s3cret".to_owned());
    let address = runtime.ensure(&spec).await.unwrap();
    eventually("it answers", || async { ask(address).is_some() }).await;
    let (_, mut environment) = ask(address).unwrap();
    assert_eq!(environment.remove("GREETING").as_deref(), Some("s3cret"));
    assert_eq!(environment.remove("PORT").unwrap(), address.port().to_string());
    assert_eq!(environment.remove("HOST").unwrap(), address.ip().to_string());
    let names: Vec<String> = environment.into_keys().collect();
    assert_eq!(names, ["HOME", "PATH", "PEREGRINE_INSTANCE", "PEREGRINE_INSTANCE_MARK"]);
    // Values are not written down.
    let folder = data.path().join("processes/host-a").join(spec.id.as_str());
    for file in std::fs::read_dir(folder).unwrap().flatten().filter(|file| file.path().is_file()) {
        assert!(!std::fs::read_to_string(file.path()).unwrap().contains("s3cret"), "{file:?}");
    }
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn an_instance_that_ends_at_once_is_reported_with_its_last_output() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = spec(&["sh", "-c", "echo port {port} is taken; echo no luck >&2; exit 3"]);
    let Err(RuntimeError::Exited { code, out_of_memory: false, last_output }) = runtime.ensure(&spec).await
    else {
        panic!()
    };
    assert_eq!(code, Some(3));
    assert!(last_output.contains("is taken") && last_output.contains("no luck"), "{last_output}");
    assert!(!last_output.contains("{port}"));
    let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert_eq!((status.running, status.exit_code, status.address), (false, Some(3), None));
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn a_command_that_is_not_there_is_refused_with_what_to_do() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let no_program = spec(&["no-such-program-anywhere"]);
    let error = runtime.ensure(&no_program).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("no-such-program-anywhere"), "{error}");
    let mut no_directory = spec(&["true"]);
    no_directory.run =
        Run::Process { command: vec!["true".to_owned()], directory: Some("/no/such/folder".into()) };
    let error = runtime.ensure(&no_directory).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    let mut elsewhere = spec(&["true"]);
    elsewhere.publish = IpAddr::from([192, 0, 2, 1]);
    let error = runtime.ensure(&elsewhere).await.unwrap_err();
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
    let mut image = spec(&[]);
    image.run =
        Run::Container { image: "sha256:0".to_owned(), command: None, port: 80, capabilities: Vec::new() };
    assert!(matches!(runtime.ensure(&image).await, Err(RuntimeError::Unsupported(_))));
    for spec in [no_program, no_directory, elsewhere, image] {
        runtime.remove(&spec.id, 0).await.unwrap();
    }
}

#[tokio::test]
async fn a_crashed_instance_is_started_again() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = listening();
    let address = runtime.ensure(&spec).await.unwrap();
    eventually("it answers", || async { ask(address).is_some() }).await;
    let (pid, _) = ask(address).unwrap();
    kill(pid);
    eventually("the crash is seen, with its code", || async {
        let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
        !status.running && status.exit_code == Some(128 + 9)
    })
    .await;
    let again = runtime.ensure(&spec).await.unwrap();
    eventually("it answers again", || async { ask(again).is_some() }).await;
    let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert_eq!((status.running, status.restarts, status.exit_code), (true, 1, None));
    assert_eq!(processes_of(&spec.id).len(), 1);
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn children_that_leave_the_process_group_or_ignore_sigterm_are_removed_as_well() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let script = "trap '' TERM; setsid sleep 1000 & sleep 1000 & while true; do sleep 1000; done";
    let spec = spec(&["sh", "-c", script]);
    runtime.ensure(&spec).await.unwrap();
    eventually("all of it runs", || async { processes_of(&spec.id).len() == 4 }).await;
    let started = Instant::now();
    runtime.remove(&spec.id, 300).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(300), "SIGTERM comes first");
    assert_eq!(processes_of(&spec.id), [] as [u32; 0]);
}

#[tokio::test]
async fn a_process_that_ends_on_sigterm_does_not_wait_for_the_grace_to_pass() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = spec(&["sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done"]);
    runtime.ensure(&spec).await.unwrap();
    let started = Instant::now();
    runtime.remove(&spec.id, 60_000).await.unwrap();
    assert!(started.elapsed() < DEADLINE);
}

#[tokio::test]
async fn a_pid_that_was_given_out_again_is_not_signalled() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let spec = spec(&["sh", "-c", "sleep 1000"]);
    runtime.ensure(&spec).await.unwrap();
    let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let file = data.path().join("processes/host-a").join(spec.id.as_str()).join("process.json");
    let mut key: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let pid = key["pid"].as_u64().unwrap();
    key["pid"] = stranger.id().into(); // and its start time stays that of another
    std::fs::write(&file, key.to_string()).unwrap();
    let seen = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert!(!seen.running);
    runtime.remove(&spec.id, 0).await.unwrap();
    assert!(alive(stranger.id()), "a stranger was killed");
    assert!(!alive(u32::try_from(pid).unwrap()), "the instance is found by its mark");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn an_instance_survives_the_kill_of_its_controller_and_is_found_again() {
    let data = tempfile::tempdir().unwrap();
    let mut role = own_role("controller_main");
    let mut controller = std::process::Command::new(role.remove(0))
        .args(role)
        .env("CONTROLLER_DATA", data.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let line = BufReader::new(controller.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .find_map(|line| line.split_once("STARTED ").map(|(_, said)| said.to_owned()))
        .unwrap();
    let (id, address) = line.split_once(' ').unwrap();
    let (id, address) = (InstanceId(id.to_owned()), address.parse::<SocketAddr>().unwrap());
    let (pid, _) = ask(address).unwrap();
    controller.kill().unwrap();
    controller.wait().unwrap();

    let runtime = runtime(data.path());
    let listed = runtime.list("test").await.unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].running && listed[0].id == id && listed[0].address == Some(address), "{listed:?}");
    assert_eq!(ask(address).unwrap().0, pid);
    let same = InstanceSpec { id: id.clone(), ..listening() };
    assert_eq!(runtime.ensure(&same).await.unwrap(), address);
    assert_eq!(ask(address).unwrap().0, pid, "it was not started a second time");
    runtime.remove(&id, 10_000).await.unwrap();
    assert!(!alive(pid));
}

#[tokio::test]
async fn a_controller_killed_between_start_and_record_does_not_start_a_second_copy() {
    let data = tempfile::tempdir().unwrap();
    let spec = listening();
    let address = runtime(data.path()).ensure(&spec).await.unwrap();
    let file = data.path().join("processes/host-a").join(spec.id.as_str()).join("process.json");
    std::fs::remove_file(&file).unwrap(); // as if we had been killed before writing it
    let runtime = runtime(data.path());
    assert_eq!(runtime.ensure(&spec).await.unwrap(), address);
    assert_eq!(processes_of(&spec.id).len(), 1);
    assert!(file.exists());
    runtime.remove(&spec.id, 1_000).await.unwrap();
    assert_eq!(processes_of(&spec.id).len(), 0);
}

#[tokio::test]
async fn an_older_controller_starts_nothing_for_a_service_that_a_newer_one_has() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let mut newer = spec(&["sleep", "1000"]);
    newer.epoch = 5;
    runtime.ensure(&newer).await.unwrap();
    let mut older = spec(&["sleep", "1000"]);
    older.epoch = 4;
    let error = runtime.ensure(&older).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Fenced { ours: 4, theirs: 5, .. }), "{error}");
    assert!(runtime.inspect(&older.id).await.unwrap().is_none());
    older.service = "another".to_owned();
    runtime.ensure(&older).await.unwrap();
    for id in [newer.id, older.id] {
        runtime.remove(&id, 1_000).await.unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_a_start_that_can_be_gone_on_with() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    for wait_us in [0, 50, 200, 1_000, 3_000] {
        let spec = listening();
        let given_up = tokio::time::timeout(Duration::from_micros(wait_us), runtime.ensure(&spec)).await;
        let address = runtime.ensure(&spec).await.unwrap();
        if let Ok(Ok(first)) = given_up {
            assert_eq!(first, address);
        }
        eventually("it answers", || async { ask(address).is_some() }).await;
        assert_eq!(processes_of(&spec.id).len(), 1);
        runtime.remove(&spec.id, 1_000).await.unwrap();
        assert_eq!(processes_of(&spec.id).len(), 0);
    }
}

#[tokio::test]
async fn output_is_followed_to_the_end_of_the_instance() {
    let data = tempfile::tempdir().unwrap();
    let runtime = Arc::new(runtime(data.path()));
    let spec = spec(&[
        "sh",
        "-c",
        "echo one; echo two >&2; trap 'echo last; exit 0' TERM; while :; do sleep 0.02; done",
    ]);
    runtime.ensure(&spec).await.unwrap();
    let mut lines = runtime.logs(&spec.id, LogOptions { follow: true, ..LogOptions::default() });
    let mut seen = Vec::new();
    for _ in 0..2 {
        let line = tokio::time::timeout(DEADLINE, lines.next()).await.unwrap().unwrap().unwrap();
        assert!(line.at > 1_600_000_000_000);
        seen.push((line.text, line.stderr));
    }
    seen.sort();
    assert_eq!(seen, [("one".to_owned(), false), ("two".to_owned(), true)]);
    let pid = processes_of(&spec.id).into_iter().min().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let rest: Vec<String> =
        tokio::time::timeout(DEADLINE, lines.map(|line| line.unwrap().text).collect()).await.unwrap();
    assert_eq!(rest, ["last"]);
    let options = LogOptions { tail: Some(1), ..LogOptions::default() };
    let tail: Vec<_> = runtime.logs(&spec.id, options).map(|line| line.unwrap().text).collect().await;
    assert_eq!(tail, ["last"]);
    runtime.remove(&spec.id, 0).await.unwrap();
}

/// Control groups of an instance, anywhere.
fn groups_of(id: &InstanceId) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().contains(id.as_str()) {
                    found.push(entry.path());
                }
                folders.push(entry.path());
            }
        }
    }
    found
}

/// Whether a kind of limit holds by control groups here, which is not so everywhere.
async fn holds(runtime: &ProcessRuntime, kind: &str) -> bool {
    let said = runtime.info().await.unwrap().version;
    let by_groups = said.split(';').find(|part| part.contains("by cgroups"));
    let holds = by_groups.is_some_and(|part| part.contains(kind));
    if !holds {
        let text = format!("SKIPPED: no control group for {kind} can be made here: {said}\n");
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    holds
}

#[tokio::test]
async fn a_process_that_takes_too_much_memory_is_ended_and_that_is_said() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    if !holds(&runtime, "memory").await {
        return;
    }
    // The shell holds what it reads in memory; a child does the reading, so that both are limited.
    let mut greedy =
        spec(&["sh", "-c", "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}; sleep 1000"]);
    greedy.resources = Resources { memory_bytes: 24 << 20, cpu_millis: 0, pids: 0 };
    let said = match runtime.ensure(&greedy).await {
        Err(error) => error.to_string(),
        Ok(_) => {
            eventually("it is ended", || async {
                !runtime.inspect(&greedy.id).await.unwrap().unwrap().running
            })
            .await;
            runtime.inspect(&greedy.id).await.unwrap().unwrap().ending()
        }
    };
    assert!(said.contains("137") && said.contains("more memory than its limit"), "{said}");
    let status = runtime.inspect(&greedy.id).await.unwrap().unwrap();
    assert!(status.out_of_memory && !status.running);
    // Another start begins with a clean slate.
    greedy.run = Run::Process { command: own_role("instance_main"), directory: None };
    greedy.resources.memory_bytes = 512 << 20;
    runtime.ensure(&greedy).await.unwrap();
    assert!(!runtime.inspect(&greedy.id).await.unwrap().unwrap().out_of_memory);
    assert!(!groups_of(&greedy.id).is_empty());
    runtime.remove(&greedy.id, 1_000).await.unwrap();
    assert_eq!(groups_of(&greedy.id), [] as [std::path::PathBuf; 0]);
}

#[tokio::test]
async fn a_process_cannot_start_more_processes_than_its_limit() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    if !holds(&runtime, "pids").await {
        return;
    }
    let mut spec = spec(&["sh", "-c", "sleep 0.1; for i in $(seq 20); do sleep 1000 & done; echo all; wait"]);
    spec.resources = Resources { memory_bytes: 0, cpu_millis: 0, pids: 8 };
    // A shell that cannot fork gives up: it may have ended before anybody looks.
    drop(runtime.ensure(&spec).await);
    let full = |group: &std::path::PathBuf| {
        std::fs::read_to_string(group.join("pids.events")).is_ok_and(|text| text.trim() != "max 0")
    };
    eventually("the kernel refuses one", || async { groups_of(&spec.id).iter().any(full) }).await;
    assert!(processes_of(&spec.id).len() <= 8);
    runtime.remove(&spec.id, 0).await.unwrap();
    assert_eq!(processes_of(&spec.id), [] as [u32; 0]);
    assert_eq!(groups_of(&spec.id), [] as [std::path::PathBuf; 0]);
}

#[tokio::test]
async fn a_process_gets_no_more_cpu_than_its_limit() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    if !holds(&runtime, "CPU").await {
        return;
    }
    let mut spec = spec(&["sh", "-c", "while :; do :; done"]);
    spec.resources = Resources { memory_bytes: 0, cpu_millis: 100, pids: 0 };
    runtime.ensure(&spec).await.unwrap();
    let throttled = |group: &std::path::PathBuf| {
        let stat = std::fs::read_to_string(group.join("cpu.stat")).unwrap_or_default();
        stat.lines().any(|line| line.strip_prefix("nr_throttled ").is_some_and(|times| times != "0"))
    };
    eventually("it is held back", || async { groups_of(&spec.id).iter().any(throttled) }).await;
    runtime.remove(&spec.id, 0).await.unwrap();
    assert_eq!(groups_of(&spec.id), [] as [std::path::PathBuf; 0]);
}

#[tokio::test]
async fn a_process_that_hides_from_its_instance_is_found_by_its_control_group() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    if !holds(&runtime, "pids").await {
        return;
    }
    let script = "sleep 0.1; env -i setsid sh -c 'echo $$ > hidden; exec sleep 1000' & sleep 1000";
    let spec = spec(&["sh", "-c", script]);
    runtime.ensure(&spec).await.unwrap();
    let file = data.path().join("processes/host-a").join(spec.id.as_str()).join("work/hidden");
    let pid = || std::fs::read_to_string(&file).ok()?.trim().parse::<u32>().ok();
    eventually("it hides", || async { pid().is_some() }).await;
    let hidden = pid().unwrap();
    assert!(alive(hidden) && !processes_of(&spec.id).contains(&hidden));
    runtime.remove(&spec.id, 1_000).await.unwrap();
    assert!(!alive(hidden));
}

#[tokio::test]
async fn logs_of_an_instance_that_is_not_there_are_an_error() {
    let data = tempfile::tempdir().unwrap();
    let runtime = runtime(data.path());
    let mut lines = runtime.logs(&InstanceId::generate(), LogOptions::default());
    assert!(lines.next().await.unwrap().is_err());
}
