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
        line.starts_with('#')
            && line[1..].starts_with(|c: char| c == '[' || c.is_ascii_lowercase() || c.is_ascii_digit())
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
        let by_name = ["domain", "machine", "service"].contains(&pattern)
            || [".env", ".set", ".add", ".users", ".error_pages"].iter().any(|end| pattern.ends_with(end))
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
    assert_eq!(web.traffic.send_proxy_protocol, Some(peregrine_engine::model::ProxyProtocol::V2));
    let mut traffic = peregrine_engine::model::TrafficPolicy {
        sticky_cookie: None,
        send_proxy_protocol: None,
        ..web.traffic.clone()
    };
    // No rate is limited unless it is asked for; the reference shows how.
    let limit = traffic.rules.rate_limit.take().expect("the reference shows it");
    assert_eq!((limit.requests, limit.per_ms, limit.burst), (100, 60_000, 20));
    // Nor is anything changed on the way.
    let rules = std::mem::take(&mut traffic.rules);
    assert_eq!((rules.redirects[0].status, rules.headers.request.remove.len()), (308, 1));
    assert!(rules.allow.is_empty() && rules.deny.is_empty() && rules.max_in_flight == 0);
    assert_eq!(traffic, plain.traffic);
    let health =
        peregrine_engine::model::HealthSpec { kind: plain.health.kind.clone(), ..web.health.clone() };
    assert_eq!(health, plain.health);
    assert_eq!(full.machines[0].address, "127.0.0.1".parse::<std::net::IpAddr>().unwrap());
}

#[test]
fn rules_are_read_with_their_mistakes() {
    use peregrine_engine::model::{HashBy, RateLimitSpec};
    let read = |line: &str| {
        let text =
            format!("[service.web]\nhosts = [\"a.test\"]\ncommand = [\"a\"]\n[service.web.rules]\n{line}\n");
        let read = Manifest::parse(&source(text)).ok();
        read.map(|manifest| manifest.services[0].spec.traffic.rules.clone())
    };
    let limit = |line: &str| read(&format!("rate_limit = {line}")).and_then(|rules| rules.rate_limit);
    let of = |requests, per_ms, burst, by| Some(RateLimitSpec { requests, per_ms, burst, by });
    assert_eq!(limit("{ requests = 5 }"), of(5, 1_000, 5, HashBy::ClientAddress));
    let by_header = "{ requests = 5, per = \"1m\", burst = 2, by = { header = \"x-api-key\" } }";
    assert_eq!(limit(by_header), of(5, 60_000, 2, HashBy::Header("x-api-key".into())));
    assert_eq!(
        limit("{ requests = 1, by = { cookie = \"s\" } }"),
        of(1, 1_000, 1, HashBy::Cookie("s".into()))
    );
    let rules = read("allow = [\"10.0.0.0/8\", \"::1\"]\ndeny = [\"10.1.0.0/16\"]\nmax_in_flight = 7")
        .expect("is read");
    assert_eq!(rules.allow, ["10.0.0.0/8", "::1/128"]);
    assert_eq!(rules.deny, ["10.1.0.0/16"]);
    assert_eq!(rules.max_in_flight, 7);
    for wrong in [
        "rate_limit = {}",
        "rate_limit = { requests = 0 }",
        "rate_limit = { requests = 5, per = \"0s\" }",
        "rate_limit = { requests = 5, by = \"moon\" }",
        "rate_limit = { requests = 5, by = {} }",
        "rate_limit = { requests = 5, by = { header = \"a\", cookie = \"b\" } }",
        "rate_limit = 5",
        "allow = [\"10.0.0.0/33\"]",
        "deny = \"all\"",
        "max_in_flight = -1",
        "redirects = [{ from = \"/old\" }]",
        "redirects = [{ from = \"old\", to = \"/new\" }]",
        "redirects = [{ from = \"/old\", to = \"/new\", status = 303 }]",
        "redirects = [{ from = \"/old\", to = \"/new\", state = 301 }]",
        "redirects = [{ from = \"/old/*\", to = \"/old/x\" }]",
        "redirects = \"/old\"",
        "rewrite = {}",
        "rewrite = { strip_prefix = \"/api/\" }",
        "rewrite = { add_prefix = \"v2\" }",
        "headers = { request = { set = { host = \"x\" } } }",
        "headers = { request = { set = { x-a = 5 } } }",
        "headers = { response = { remove = [\"content-length\"] } }",
        "headers = { response = { remove = \"server\" } }",
        "headers = { answer = {} }",
        "basic_auth = {}",
        "basic_auth = { realm = \"Staff\" }",
        "basic_auth = { realm = \"Staff\", users = {} }",
        "basic_auth = { realm = \"Staff\", users = { alice = \"hunter2\" } }",
        "forward_auth = {}",
        "forward_auth = { url = \"https://auth.test/\" }",
        "forward_auth = { url = \"http://a:1/\", timeout = \"2m\" }",
        "forward_auth = { url = \"http://a:1/\", copy_headers = [\"host\"] }",
        "compression = true",
        "compression = { codings = [] }",
        "compression = { codings = [\"deflate\"] }",
        "compression = { types = [\"*/*\"] }",
        "compression = { min_size = 5 }",
        "error_pages = { 200 = \"x\" }",
        "error_pages = { 503 = \"\" }",
        "error_pages = { 503 = 5 }",
        "maximum = 1",
    ] {
        assert_eq!(read(wrong), None, "{wrong}");
    }
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

#[test]
fn an_authority_is_asked_for_nothing_before_somebody_agreed_to_its_terms() {
    let read = |text: &str| ServerConfig::parse(&source(text)).map(|config| config.acme);
    assert_eq!(read("").unwrap(), None);
    let acme = read("[acme]\nagree_to_terms = true\ncontact = [\"mailto:a@b.test\"]\n").unwrap().unwrap();
    let first = AcmeAuthority { contacts: vec!["a@b.test".into()], ..AcmeAuthority::default() };
    let expected = AcmeSettings { agree_to_terms: true, authorities: vec![first], ..AcmeSettings::default() };
    assert_eq!(acme, expected);
    for (wrong, told) in [
        ("", "agree_to_terms = true"),
        ("agree_to_terms = false", "agree_to_terms = true"),
        ("agree_to_terms = true\ndirectory = \"http://ca.test/\"", "no URL that begins with https://"),
        ("agree_to_terms = true\ncontact = [\"nobody\"]", "is no address of a person"),
        ("agree_to_terms = true\naliases = [\"*.a.test\"]", "is no name that a CNAME can lead to"),
        ("agree_to_terms = true\nchallenges = [\"dns-02\"]", "challenges"),
        ("agree_to_terms = true\naddresses = [\"a.test\"]", "addresses"),
        ("agree_to_terms = true\nmail = \"x\"", "mail"),
        ("agree_to_terms = true\nchallenges = []", "validated somehow"),
        ("agree_to_terms = true\nchallenges = [\"dns-01\"]", "add [[acme.dns]]"),
        ("agree_to_terms = true\non_demand = \"own\"", "write one of: owned, never"),
        ("agree_to_terms = true\nexternal_account = { key_id = \"a\" }", "hmac_key_file"),
        ("agree_to_terms = true\n[[acme.authority]]\nname = \"b\"", "an authority has no directory"),
        (
            "agree_to_terms = true\n[[acme.authority]]\ndirectory = \"https://b.test/\"",
            "an authority has no name",
        ),
        (
            "agree_to_terms = true\n[[acme.authority]]\nname = \"acme\"\ndirectory = \"https://b.test/\"",
            "is another authority's name",
        ),
        (
            "agree_to_terms = true\n[[acme.dns]]\nzone = \"a.test\"",
            "write zone, server, key_name and secret_file",
        ),
        (
            "agree_to_terms = true\n[[acme.dns]]\nzone = \"*.a.test\"\nserver = \"127.0.0.1:53\"\nkey_name = \"a\"\nsecret_file = \"a\"",
            "is no name in DNS",
        ),
        (
            "agree_to_terms = true\n[[acme.dns]]\nzone = \"a.test\"\nserver = \"ns.test\"\nkey_name = \"a\"\nsecret_file = \"a\"",
            "is no IP address with a port",
        ),
    ] {
        let mistakes = read(&format!("[acme]\n{wrong}\n")).unwrap_err().to_string();
        assert!(mistakes.contains(told), "{wrong}: {mistakes}");
    }
}

#[test]
fn several_authorities_are_asked_in_order_and_names_are_validated_by_dns_where_a_server_takes_records() {
    let text = r#"
[acme]
agree_to_terms = true
contact = ["ops@example.com"]
on_demand = "owned"

[[acme.authority]]
name = "second"
directory = "https://ca.test/dir"
external_account = { key_id = "kid-1", hmac_key_file = "hmac.key" }

[[acme.authority]]
name = "third"
directory = "https://acme-staging-v02.api.letsencrypt.org/directory"
contact = []

[[acme.dns]]
zone = "Example.com."
server = "192.0.2.53:53"
key_name = "acme"
algorithm = "hmac-sha512"
secret_file = "tsig.key"
"#;
    let acme = server(text).acme.expect("it is there");
    let [first, second, third] = &acme.authorities[..] else { panic!("{acme:?}") };
    assert_eq!((first.name.as_str(), &first.caa[..]), ("acme", &["letsencrypt.org".to_owned()][..]));
    assert_eq!((second.name.as_str(), &second.contacts, second.caa.len()), ("second", &first.contacts, 0));
    let external = second.external_account.as_ref().expect("it is there");
    assert_eq!(
        (external.key_id.as_str(), &*external.hmac_key),
        ("kid-1", Path::new("/etc/peregrine/hmac.key"))
    );
    assert_eq!((third.contacts.len(), &third.caa), (0, &first.caa));
    assert!(acme.owned_on_demand);
    let usual = [AcmeChallenge::Http01, AcmeChallenge::TlsAlpn01, AcmeChallenge::Dns01];
    assert_eq!(acme.challenges, usual);
    let dns = &acme.dns[0];
    assert_eq!((dns.zone.as_str(), dns.key_name.as_str()), ("example.com", "acme"));
    assert_eq!(
        (dns.algorithm, &*dns.secret),
        (TsigAlgorithm::HmacSha512, Path::new("/etc/peregrine/tsig.key"))
    );
}
