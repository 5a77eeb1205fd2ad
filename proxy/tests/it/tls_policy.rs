//! What domains want of requests: authority, redirects, HSTS, challenges.

use std::sync::Arc;

use peregrine_routing::{
    ChallengeAnswer, ChallengeSpec, Change, ClientAuth, DomainPolicy, HostPattern, Hsts, RouteSpec,
};

use crate::support::{Origin, TestEdge, config, service, upstream};
use crate::tls_support::{self as tls, Authority, domain, domain_with};

const HTTP11: &[&[u8]] = &[b"http/1.1"];

fn edge(origin: &Origin, ca: &Arc<Authority>, changes: &[Change]) -> TestEdge {
    tls::edge(config(), vec![service(vec![upstream(origin.addr)])], ca, changes)
}

fn get(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

#[test]
fn a_request_for_another_domain_on_a_connection_that_was_not_made_for_it_gets_421() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), domain(&ca, "b.test")]);
    for foreign in ["b.test", "nobody.test", "b.test:443", "B.TEST."] {
        let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
        assert_eq!(client.send(get("A.test:443", "/")).answer().status, 200);
        let answer = client.send(get(foreign, "/")).answer();
        assert_eq!((answer.status, answer.reason()), (421, "misdirected"), "{foreign}");
        assert!(client.is_closed(), "{foreign}");
    }
    assert_eq!(origin.seen().len(), 4, "none of them went on");
}

#[test]
fn http2_may_ask_for_every_name_that_has_the_same_certificate_and_for_no_other() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let shared = ca.issue(&["a.test", "b.test"]);
    let with = |name: &str| tls::put(name, Some(shared), DomainPolicy::default());
    let edge = edge(&origin, &ca, &[with("a.test"), with("b.test"), domain(&ca, "c.test")]);
    let uris = ["https://a.test/", "https://b.test/", "https://c.test/", "https://a.test/"];
    let statuses = tls::h2_get(edge.https(), "a.test", tls::client(&ca, &[b"h2"]), &uris);
    assert_eq!(statuses, [200, 200, 421, 200]);
}

#[test]
fn names_that_are_nobodys_get_the_default_certificate_and_a_clear_404() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let mut web = service(vec![upstream(origin.addr)]);
    web.routes = vec![RouteSpec { host: HostPattern::parse("a.test").unwrap(), path_prefix: "/".into() }];
    let changes = [domain(&ca, "a.test"), domain(&ca, "*")];
    let edge = tls::edge(config(), vec![web], &ca, &changes);
    // The default certificate is for this name, so that the client takes it.
    let mut client = tls::connect(edge.https(), "fallback.test", tls::client(&ca, HTTP11));
    let answer = client.send(get("fallback.test", "/")).answer();
    assert_eq!((answer.status, answer.reason()), (404, "no_route"));
    let answer = client.send(get("a.test", "/")).answer();
    assert_eq!((answer.status, answer.reason()), (421, "misdirected"), "who has a domain of his own");
}

#[test]
fn clear_text_is_redirected_but_for_challenges_and_hosts_without_tls() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let redirects = DomainPolicy { redirect_to_https: true, ..DomainPolicy::default() };
    let challenge = Change::PutChallenge(ChallengeSpec {
        name: "a.test".into(),
        answer: ChallengeAnswer::Http01 { token: "tok".into(), key_authorization: "tok.thumb".into() },
    });
    let edge = edge(&origin, &ca, &[domain_with(&ca, "a.test", redirects), domain(&ca, "b.test"), challenge]);
    let mut client = edge.client();
    for _ in 0..2 {
        let answer = client.send(get("A.test:80", "/x?y=1")).answer();
        assert_eq!((answer.status, answer.field("location")), (308, Some("https://a.test/x?y=1")));
    }
    assert_eq!(client.send(get("plain.test", "/")).answer().text(), "ok", "a host without a domain");
    assert_eq!(client.send(get("b.test", "/")).answer().text(), "ok", "a domain that does not redirect");
    let answer = client.send(get("a.test", "/.well-known/acme-challenge/tok")).answer();
    assert_eq!((answer.status, answer.text()), (200, "tok.thumb"));
    let answer = client.send(get("a.test", "/.well-known/acme-challenge/other")).answer();
    assert_eq!(answer.text(), "ok", "another token is the service's own matter");
    let answer = client.send(get("b.test", "/.well-known/acme-challenge/tok")).answer();
    assert_eq!(answer.text(), "ok", "and so is one for another name");
}

#[test]
fn a_redirect_names_the_port_that_clients_reach_if_it_is_not_443() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let redirects = DomainPolicy { redirect_to_https: true, ..DomainPolicy::default() };
    let mut config = config();
    config.https_port = 8443;
    let services = vec![service(vec![upstream(origin.addr)])];
    let edge = tls::edge(config, services, &ca, &[domain_with(&ca, "a.test", redirects)]);
    let answer =
        edge.client().send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 2\r\n\r\nab").answer();
    assert_eq!((answer.status, answer.field("location")), (308, Some("https://a.test:8443/")));
}

#[test]
fn hsts_is_said_over_tls_only_and_on_pages_of_the_edge_too() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let hsts = Hsts { max_age_seconds: 300, include_subdomains: true, preload: false };
    let policy = DomainPolicy { hsts: Some(hsts), ..DomainPolicy::default() };
    let mut web = service(vec![upstream(origin.addr)]);
    web.routes[0].path_prefix = "/there".into();
    let changes = [domain_with(&ca, "a.test", policy), domain(&ca, "b.test")];
    let edge = tls::edge(config(), vec![web], &ca, &changes);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    for (path, status) in [("/there", 200), ("/nowhere", 404), ("/there", 200)] {
        let answer = client.send(get("a.test", path)).answer();
        let said = answer.field("strict-transport-security");
        assert_eq!((answer.status, said), (status, Some("max-age=300; includeSubDomains")));
    }
    let clear = edge.client().send(get("a.test", "/there")).answer();
    assert_eq!((clear.status, clear.field("strict-transport-security")), (200, None));
    let mut other = tls::connect(edge.https(), "b.test", tls::client(&ca, HTTP11));
    assert_eq!(other.send(get("b.test", "/there")).answer().field("strict-transport-security"), None);
}

/// Nobody gets in unknown.
fn for_known(ca: &Authority) -> DomainPolicy {
    let auth = ClientAuth { authorities: vec![Arc::from(ca.der().as_ref())], required: true };
    DomainPolicy { client_auth: Some(Arc::new(auth)), ..DomainPolicy::default() }
}

#[test]
fn one_more_label_does_not_get_past_a_wildcard_that_is_for_known_clients_only() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let mut web = service(vec![upstream(origin.addr)]);
    web.routes =
        vec![RouteSpec { host: HostPattern::parse("*.example.test").unwrap(), path_prefix: "/".into() }];
    let redirects = DomainPolicy { redirect_to_https: true, ..DomainPolicy::default() };
    let changes = [
        domain_with(&ca, "*.example.test", for_known(&ca)),
        domain(&ca, "open.example.test"),
        domain_with(&ca, "*.deep.example.test", redirects),
        domain(&ca, "*"),
    ];
    let edge = tls::edge(config(), vec![web], &ca, &changes);
    let guarded = ["a.example.test", "a.b.example.test", "a.b.c.example.test", "y.x.deep.example.test"];
    for host in guarded {
        let answer = edge.client().send(get(host, "/")).answer();
        let there = format!("https://{host}/");
        assert_eq!((answer.status, answer.field("location")), (308, Some(&*there)));
        let mut stranger = tls::connect(edge.https(), "fallback.test", tls::client(&ca, HTTP11));
        assert_eq!(stranger.send(get(host, "/")).answer().status, 421, "{host}");
    }
    // The certificate of the default domain is not for it: a client that believes everybody comes to the same end.
    let mut blind = tls::connect(edge.https(), "a.b.example.test", tls::blind_client());
    assert_eq!(blind.send(get("a.b.example.test", "/")).answer().status, 421);
    assert!(origin.seen().is_empty());
    // A name with a domain of its own is another matter, and so is a redirect where there is TLS already.
    assert_eq!(edge.client().send(get("open.example.test", "/")).answer().status, 200);
}

#[test]
fn over_tls_names_deep_below_a_wildcard_that_only_redirects_are_served_by_the_default_domain() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let redirects = DomainPolicy { redirect_to_https: true, ..DomainPolicy::default() };
    let changes = [domain_with(&ca, "*.example.test", redirects), domain(&ca, "*")];
    let edge = edge(&origin, &ca, &changes);
    assert_eq!(edge.client().send(get("a.b.example.test", "/")).answer().status, 308);
    let mut client = tls::connect(edge.https(), "a.b.example.test", tls::blind_client());
    assert_eq!(client.send(get("a.b.example.test", "/")).answer().status, 200);
}

#[test]
fn a_request_without_a_host_does_not_get_past_the_default_domain() {
    const NO_HOST: &str = "GET / HTTP/1.0\r\n\r\n";
    let (origin, ca) = (Origin::ok(), Authority::new());
    let redirects = DomainPolicy { redirect_to_https: true, ..DomainPolicy::default() };
    for policy in [for_known(&ca), redirects] {
        let edge = edge(&origin, &ca, &[domain_with(&ca, "*", policy), domain(&ca, "a.test")]);
        assert_eq!(edge.client().send(NO_HOST).answer().status, 421);
        let mut neighbour = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
        assert_eq!(neighbour.send(NO_HOST).answer().status, 421);
        assert!(origin.seen().is_empty());
    }
    let (chain, key) = ca.issue_client("ada");
    let known = tls::builder(&ca).with_client_auth_cert(chain, key).expect("is a pair");
    let edge = edge(&origin, &ca, &[domain_with(&ca, "*", for_known(&ca))]);
    let mut known = tls::connect(edge.https(), "fallback.test", known);
    assert_eq!(known.send(NO_HOST).answer().status, 200);
    // Where no domain is for everybody, there is nothing to get past.
    let edge = self::edge(&origin, &ca, &[domain(&ca, "a.test")]);
    assert_eq!(edge.client().send(NO_HOST).answer().status, 200);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_eq!(client.send(NO_HOST).answer().status, 200);
}

#[test]
fn what_looks_like_a_challenge_and_is_none_does_not_get_past_client_certificates() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let challenge = Change::PutChallenge(ChallengeSpec {
        name: "m.test".into(),
        answer: ChallengeAnswer::Http01 { token: "tok".into(), key_authorization: "tok.thumb".into() },
    });
    let changes =
        [domain_with(&ca, "m.test", for_known(&ca)), domain_with(&ca, "*.m.test", for_known(&ca)), challenge];
    let edge = edge(&origin, &ca, &changes);
    let mut client = edge.client();
    for host in ["m.test", "a.m.test", "a.b.m.test"] {
        let answer = client.send(get(host, "/.well-known/acme-challenge/../acme-challenge/other")).answer();
        assert_eq!(answer.status, 308, "{host}");
    }
    assert!(origin.seen().is_empty());
    let answer = client.send(get("m.test", "/.well-known/acme-challenge/tok")).answer();
    assert_eq!((answer.status, answer.text()), (200, "tok.thumb"));
}
