//! The reference file and the examples say what the code does.

use std::collections::BTreeSet;
use std::path::PathBuf;

use peregrine_engine::model::{DockerEndpoint, MachineKind, MirrorSettings};

use super::*;

const REFERENCE: &str = include_str!("../peregrine.toml");

fn source(text: impl Into<String>) -> Source {
    Source::new("peregrine.toml", "/etc/peregrine", text)
}

/// Takes the `#` off every setting of the reference.
fn with_every_setting() -> String {
    let setting = |line: &str| {
        line.starts_with('#') && line[1..].starts_with(|c: char| c == '[' || c.is_ascii_lowercase())
    };
    REFERENCE
        .lines()
        .map(|line| if setting(line) { &line[1..] } else { line })
        .fold(String::new(), |text, line| text + line + "\n")
}

fn server(text: impl Into<String>) -> ServerConfig {
    ServerConfig::parse(&source(text)).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// Every key in a table, with `*` for names that the operator chooses.
fn mentioned(table: &toml::Table, pattern: &str, keys: &mut BTreeSet<String>) {
    for (key, value) in table {
        let by_name = ["machine", "service"].contains(&pattern)
            || pattern.ends_with(".env")
            || pattern.ends_with(".labels");
        let name = if by_name { "*" } else { key };
        let path = if pattern.is_empty() { name.to_owned() } else { format!("{pattern}.{name}") };
        match value {
            toml::Value::Table(inner) => mentioned(inner, &path, keys),
            toml::Value::Array(items) => {
                items
                    .iter()
                    .filter_map(toml::Value::as_table)
                    .for_each(|inner| mentioned(inner, &path, keys));
            }
            _ => {}
        }
        keys.insert(path);
    }
}

#[test]
fn the_reference_as_it_is_changes_nothing() {
    assert_eq!(server(REFERENCE), ServerConfig::default());
}

#[test]
fn the_reference_shows_every_default() {
    let full = server(with_every_setting());
    let log = full.edge.access_log.clone().expect("the reference shows the access log");
    assert_eq!(log.format, peregrine_proxy::AccessLogFormat::default());
    let edge = peregrine_proxy::Config { access_log: None, ..full.edge.clone() };
    assert_eq!(edge, ServerConfig::default().edge);
    assert_eq!(full.api, ApiSettings::default());
    assert_eq!(full.link, Some(LinkSettings::default()));

    let plain = server(
        "[machine.a]\ndocker = \"unix:///var/run/docker.sock\"\n[service.web]\nimage = \"shop:1.4\"\nport = 3000\n",
    );
    let (plain, web) = (&plain.services[0].spec, find(&full, "web"));
    assert_eq!(web.resources, plain.resources);
    assert_eq!(web.replicas, plain.replicas);
    // Nothing is mirrored unless it is asked for; the reference shows how.
    let mut without_mirror = web.move_settings.clone();
    assert_eq!(without_mirror.warm.mirror.take(), Some(MirrorSettings::default()));
    assert_eq!(without_mirror, plain.move_settings);
    let traffic = peregrine_engine::model::TrafficPolicy { sticky_cookie: None, ..web.traffic.clone() };
    assert_eq!(traffic, plain.traffic);
    let health =
        peregrine_engine::model::HealthSpec { kind: plain.health.kind.clone(), ..web.health.clone() };
    assert_eq!(health, plain.health);
    assert_eq!(full.machines[0].address, "127.0.0.1".parse::<std::net::IpAddr>().unwrap());
}

#[test]
fn a_mirror_is_off_on_or_a_table() {
    let mirror = |line: &str| {
        let text = format!(
            "[service.web]\nhosts = [\"a.test\"]\ncommand = [\"a\"]\n[service.web.move.warm]\n{line}\n"
        );
        let read = Manifest::parse(&source(text)).ok();
        read.map(|manifest| manifest.services[0].spec.move_settings.warm.mirror.clone())
    };
    assert_eq!(mirror(""), Some(None));
    assert_eq!(mirror("mirror = false"), Some(None));
    assert_eq!(mirror("mirror = true"), Some(Some(MirrorSettings::default())));
    let some = MirrorSettings {
        sample_permille: 5,
        differing_ratio: 0.02,
        max_ms: 30_000,
        with_credentials: true,
        ..MirrorSettings::default()
    };
    let table = r#"mirror = { sample = "0.5%", differing = "2%", max = "30s", with_credentials = true }"#;
    assert_eq!(mirror(table), Some(Some(some)));
    for wrong in ["{ sample = \"0%\" }", "{ sample = 2.0 }", "{ max = \"0s\" }", "{ simple = 1 }", "3"] {
        assert_eq!(mirror(&format!("mirror = {wrong}")), None, "{wrong}");
    }
}

fn find<'c>(config: &'c ServerConfig, name: &str) -> &'c peregrine_engine::model::ServiceSpec {
    &config.services.iter().find(|service| service.spec.name == name).unwrap().spec
}

#[test]
fn the_reference_mentions_every_key_and_no_other() {
    let text = with_every_setting();
    let mut keys = BTreeSet::new();
    mentioned(&text.parse().unwrap(), "", &mut keys);
    let (_, asked) = read_server(&source(text));
    assert!(asked.len() > 90, "{asked:?}");
    assert_eq!(asked.difference(&keys).collect::<Vec<_>>(), Vec::<&String>::new(), "not in the reference");
    assert_eq!(keys.difference(&asked).collect::<Vec<_>>(), Vec::<&String>::new(), "not known");
    assert!(REFERENCE.contains("{ hash_header = \"x-tenant\" } or { hash_cookie = \"session\" }"));
}

#[test]
fn a_manifest_has_the_same_services() {
    let text = with_every_setting();
    let services = &text[text.find("[service.legacy]").unwrap()..];
    let manifest = Manifest::parse(&source(services)).unwrap();
    assert_eq!(manifest.services, server(text).services);
}

#[test]
fn every_example_is_sound() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut names = Vec::new();
    for file in folder.read_dir().unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "manifest.toml" {
            Manifest::load(&path).unwrap_or_else(|mistakes| panic!("{mistakes}"));
        } else {
            ServerConfig::load(&path).unwrap_or_else(|mistakes| panic!("{mistakes}"));
        }
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["manifest.toml", "reverse-proxy.toml", "ssh-host.toml", "two-docker-hosts.toml"]);
}

#[test]
fn paths_are_relative_to_the_file() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples");
    let config = ServerConfig::load(&folder.join("ssh-host.toml")).unwrap();
    let MachineKind::Docker { endpoint: DockerEndpoint::Ssh { key, port, user, host, socket, .. } } =
        &config.machines[0].kind
    else {
        panic!("{:?}", config.machines[0])
    };
    assert_eq!(key, &folder.join("keys/id_ed25519"));
    assert_eq!((*port, user.as_str(), host.as_str()), (2222, "deploy", "rack.example.com"));
    assert_eq!(socket, Path::new("/var/run/docker.sock"));
    // A service without a machine goes to the only one that can run it.
    let machines: Vec<_> = config.services.iter().map(|service| service.machine.as_deref()).collect();
    assert_eq!(machines, [Some("rack"), Some("local")]);
}

#[test]
fn a_container_gets_the_capabilities_that_its_service_names_and_no_other() {
    let read = |more: &str| {
        let text = format!("[service.web]\nimage = \"a\"\nport = 1\n{more}\n");
        match Manifest::parse(&source(text)).unwrap().services.remove(0).spec.workload {
            Workload::Image { capabilities, .. } => capabilities,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read(""), BTreeSet::new());
    let named = ["SETGID", "SETUID"].map(str::to_owned);
    assert_eq!(read("capabilities = [\"SETUID\", \"SETGID\"]"), BTreeSet::from(named));
}

#[test]
fn environments_are_never_shown() {
    let text = "[service.web]\nimage = \"a\"\nport = 1\nenv = { TOKEN = \"hunter2\" }\n";
    let manifest = Manifest::parse(&source(text)).unwrap();
    let shown = format!("{manifest:?} {:?}", source(text));
    assert!(shown.contains("\"TOKEN\": …"), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
}
