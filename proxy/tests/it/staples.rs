//! What is stapled to certificates.

use std::sync::Arc;

use peregrine_proxy::{Staple, now_ms, staple_id};
use peregrine_routing::{CertificateId, Change, DomainPolicy, DomainSpec, HostPattern};

use crate::support::{Origin, TestEdge, config, service, until, upstream};
use crate::tls_support::{self as tls, Authority};

const NAME: &str = "a.test";
const HOUR_MS: u64 = 3_600_000;

/// The domain with this certificate, and this stapled to it.
fn put(id: CertificateId, staple: Option<&Staple>) -> Change {
    Change::PutDomain(DomainSpec {
        name: HostPattern::parse(NAME).expect("pattern"),
        certificate: Some(id),
        staple: staple.map(|staple| staple_id(&staple.response)),
        policy: DomainPolicy::default(),
    })
}

fn staple(text: &str, until_ms: u64) -> Staple {
    Staple { response: text.as_bytes().to_vec(), until_ms }
}

fn edge(ca: &Arc<Authority>, origin: &Origin, id: CertificateId, staple: Option<&Staple>) -> TestEdge {
    tls::edge(config(), vec![service(vec![upstream(origin.addr)])], ca, &[put(id, staple)])
}

fn stapled(edge: &TestEdge) -> String {
    String::from_utf8(tls::stapled(edge.https(), NAME)).expect("text")
}

#[test]
fn what_the_table_names_is_stapled_and_a_newer_one_is_fetched_while_nobody_waits() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let id = ca.issue(&[NAME]);
    let (first, second) = (staple("first", now_ms() + HOUR_MS), staple("second", now_ms() + HOUR_MS));
    ca.staple(id, Some(first.clone()));
    let mut edge = edge(&ca, &origin, id, Some(&first));
    assert_eq!((stapled(&edge), stapled(&edge)), ("first".into(), "first".into()));
    assert_eq!(ca.loads(), 1);
    ca.staple(id, Some(second.clone()));
    edge.writer.apply(&[put(id, Some(&second))]).expect("is accepted");
    until("the second one is stapled", || {
        let now = stapled(&edge);
        assert!(now == "first" || now == "second", "there is always one: {now:?}");
        now == "second"
    });
    assert_eq!(ca.loads(), 2);
    edge.writer.apply(&[put(id, None)]).expect("is accepted");
    until("nothing is stapled", || stapled(&edge).is_empty());
    edge.writer.apply(&[put(id, Some(&second))]).expect("is accepted");
    until("it is stapled again", || stapled(&edge) == "second");
    assert_eq!(ca.loads(), 2, "it was at hand");
}

#[test]
fn what_is_over_is_stapled_no_more_whatever_the_table_says() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let id = ca.issue(&[NAME]);
    let short = staple("short", now_ms() + 4_000);
    ca.staple(id, Some(short.clone()));
    let edge = edge(&ca, &origin, id, Some(&short));
    assert_eq!(stapled(&edge), "short");
    until("it is over", || now_ms() >= short.until_ms);
    assert_eq!(stapled(&edge), "");
}

#[test]
fn a_certificate_is_presented_without_a_staple_that_its_source_does_not_have_and_is_not_asked_for_all_the_time()
 {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let id = ca.issue(&[NAME]);
    let missing = staple("missing", now_ms() + HOUR_MS);
    let edge = edge(&ca, &origin, id, Some(&missing));
    for _ in 0..20 {
        assert_eq!(stapled(&edge), "");
    }
    assert!(ca.loads() <= 2, "{}", ca.loads());
    assert!(ca.forget(id).is_some());
    assert_eq!(stapled(&edge), "", "what is at hand is presented");
}
