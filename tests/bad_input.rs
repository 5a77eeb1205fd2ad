//! Bad input: a clear error with what to do next, and the service untouched.

use crate::support::server::{Peregrine, Said, http_get};
use crate::support::shop::Shop;
use crate::support::{origin_program, wait_for};

const QUICK: &str = r#"
[service.shop.move]
steps = [100]
step_hold = "1s"
step_max = "1s"
start_timeout = "2s"
warm = { probes = 1, interval = "20ms" }
"#;

/// The exit code, and an error that says what is wrong and what to do next.
#[track_caller]
pub(crate) fn teaches(said: &Said, code: i32) -> String {
    assert_eq!(said.code, code, "{said:#?}");
    let error = said.error();
    for field in ["code", "message", "hint"] {
        assert!(error[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {error:#}");
    }
    error.to_string()
}

/// The shop is where it was, and serves.
#[track_caller]
pub(crate) fn untouched(shop: &Shop, place: &str) {
    assert_eq!(shop.places(), [place], "{:#?}", shop.instances());
    assert!(http_get(shop.server.edge(), "/").expect("an answer").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_broken_manifest_tells_every_mistake_with_its_place() {
    let shop = Shop::open(QUICK);
    let manifest =
        shop.server.file("broken.toml", "[service.shop]\nhostz = [\"*\"]\ncommand = [\"x\"]\nreplicas = 0\n");
    let text = teaches(&shop.server.run(&["deploy", "-f", &manifest]), 2);
    assert!(
        text.contains("hosts") && text.contains("broken.toml") && text.contains('2') && text.contains('4'),
        "{text}"
    );
    untouched(&shop, "host-a");
}

#[test]
fn an_engine_that_cannot_be_reached_blocks_the_plan_and_is_named() {
    let shop = Shop::open(QUICK);
    shop.server.ok(&["machines", "add", "far", "--docker", "tcp://127.0.0.1:1", "--address", "127.0.0.3"]);
    let checked = shop.server.run(&["machines", "check", "far"]);
    assert_ne!(checked.code, 0, "{checked:?}");
    let manifest = shop
        .server
        .file("image.toml", "[service.other]\nhosts = [\"other.test\"]\nimage = \"nothing:1\"\nport = 80\n");
    let said = shop.server.run(&["deploy", "-f", &manifest, "--machine", "far"]);
    let text = teaches(&said, 8);
    assert!(text.contains("far"), "{text}");
    untouched(&shop, "host-a");
}

#[test]
fn a_machine_that_is_not_known_is_not_found() {
    let shop = Shop::open(QUICK);
    let said = shop.server.run(&["move", "shop", "--to", "nowhere"]);
    assert!(matches!(said.code, 4 | 8), "{said:#?}");
    teaches(&said, said.code);
    let text = teaches(&shop.server.run(&["move", "nothing", "--to", "host-b"]), 4);
    assert!(text.contains("nothing"), "{text}");
    untouched(&shop, "host-a");
}

#[test]
fn a_copy_that_listens_on_the_wrong_port_is_given_up_and_the_old_one_serves() {
    let shop = Shop::open(QUICK);
    let manifest = shop.server.file(
        "wrong-port.toml",
        &format!(
            "[service.shop]\nhosts = [\"*\"]\ncommand = [\"{}\", \"origin\", \"--listen\", \"{{host}}:0\"]\nhealth = {{ path = \"/healthz\" }}\n{QUICK}",
            origin_program().display()
        ),
    );
    let text = teaches(&shop.server.run(&["deploy", "-f", &manifest]), 9);
    assert!(text.contains("port") || text.contains("connect") || text.contains("listen"), "{text}");
    untouched(&shop, "host-a");
}

#[test]
fn a_copy_that_never_gets_healthy_is_given_up_and_the_last_probe_is_told() {
    let shop = Shop::open(QUICK);
    let manifest = shop.manifest(&[("ORIGIN_HEALTHY", "false")], QUICK);
    let text = teaches(&shop.server.run(&["deploy", "-f", &manifest]), 9);
    assert!(text.contains("503"), "{text}");
    untouched(&shop, "host-a");
}

#[test]
fn a_copy_that_exits_at_once_is_told_with_its_last_words() {
    let shop = Shop::open(QUICK);
    let manifest = shop.server.file(
        "exits.toml",
        &format!("[service.shop]\nhosts = [\"*\"]\ncommand = [\"/bin/sh\", \"-c\", \"echo out of luck >&2; exit 3\"]\n{QUICK}"),
    );
    let text = teaches(&shop.server.run(&["deploy", "-f", &manifest]), 9);
    assert!(text.contains("out of luck") && text.contains('3'), "{text}");
    untouched(&shop, "host-a");
}

#[test]
fn a_second_move_of_the_same_service_is_refused_with_the_id_of_the_running_one() {
    let shop = Shop::open(QUICK);
    let id = shop.begin_move("host-b");
    let text = teaches(&shop.server.run(&["move", "shop", "--to", "host-b"]), 5);
    assert!(text.contains(&id), "{text}");
    let (status, problem) = crate::commands::api(
        &shop.server,
        "POST",
        "/api/v1/moves",
        Some(&serde_json::json!({"service": "shop", "to": "host-b"})),
    );
    assert_eq!(status, 409, "{problem:#}");
    assert_eq!(problem["move"], id.as_str(), "{problem:#}");
    wait_for("the first one to end", || (shop.the_move(&id)["state"] == "succeeded").then_some(()));
    untouched(&shop, "host-b");
}

#[test]
fn a_wrong_token_and_a_server_that_is_not_there_have_their_own_exit_codes() {
    let mut server = Peregrine::start("");
    let said = server.run(&["status", "--token", "pgn_wrong"]);
    teaches(&said, 3);
    assert!(!said.error().to_string().contains("pgn_wrong"), "a credential is never shown");
    server.stop();
    teaches(&server.run(&["status"]), 6);
}

#[test]
fn a_data_folder_in_use_is_refused_and_the_first_server_goes_on() {
    let server = Peregrine::start("");
    let config =
        server.file("second.toml", "[edge]\nhttp = [\"127.0.0.1:0\"]\n[api]\nlisten = \"127.0.0.1:0\"\n");
    let said = server.run(&["serve", "--config", &config]);
    teaches(&said, 5);
    assert!(http_get(server.api(), "/readyz").expect("an answer").starts_with("HTTP/1.1 200"));
}
