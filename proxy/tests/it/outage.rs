//! When upstreams fail: what is sent to them stays within a fifth more than what came, and nothing that must not
//! be sent twice is.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::support::{Client, Origin, TestEdge, service, upstream};

/// Requests of each stretch.
const REQUESTS: usize = 1_500;

/// Answers while it is well; reads and hangs up while it is not.
fn origin(is_well: &Arc<AtomicBool>) -> Origin {
    let is_well = Arc::clone(is_well);
    Origin::scripted(move |conn| {
        while conn.request().is_some() && is_well.load(Ordering::SeqCst) {
            conn.answer("ok");
        }
    })
}

fn ask(client: &mut Client, id: usize) -> u16 {
    let head = |method: &str| format!("{method} /{id} HTTP/1.1\r\nHost: a.test\r\nX-Request-Id: id-{id}\r\n");
    let request = if id.is_multiple_of(2) {
        format!("{}\r\n", head("GET"))
    } else {
        format!("{}Content-Length: 4\r\n\r\nbody", head("POST"))
    };
    client.send(request).answer().status
}

#[test]
fn an_outage_is_not_made_worse_and_ends_with_its_cause() {
    let well: Vec<Arc<AtomicBool>> = (0..4).map(|_| Arc::new(AtomicBool::new(true))).collect();
    let origins: Vec<Origin> = well.iter().map(origin).collect();
    let edge = TestEdge::start(service(origins.iter().map(|origin| upstream(origin.addr)).collect()));
    let sent = || origins.iter().map(|origin| origin.seen().len()).sum::<usize>();
    let mut client = edge.client();
    let mut stretch = |ids: std::ops::Range<usize>, allowed: usize| {
        let (before, begun, received) = (sent(), Instant::now(), ids.len());
        let failed = ids.filter(|id| ask(&mut client, *id) != 200).count();
        let sent = sent() - before;
        // A fifth, what had been saved at most, and ten a second.
        let saved = 100 + 10 * usize::try_from(begun.elapsed().as_secs() + 1).expect("short");
        assert!(sent <= received * 6 / 5 + saved, "{sent} sent for {received}");
        assert!(failed <= allowed, "{failed} of {received} failed");
    };
    stretch(0..REQUESTS, 0);
    well[..2].iter().for_each(|origin| origin.store(false, Ordering::SeqCst));
    // Each of the two fails POSTs until it is ejected, and again when its time is over.
    stretch(REQUESTS..2 * REQUESTS, REQUESTS / 10);
    well[2..].iter().for_each(|origin| origin.store(false, Ordering::SeqCst));
    stretch(2 * REQUESTS..3 * REQUESTS, REQUESTS);
    assert!(sent() <= 3 * REQUESTS * 6 / 5, "{} sent for {} over the whole outage", sent(), 3 * REQUESTS);

    well.iter().for_each(|origin| origin.store(true, Ordering::SeqCst));
    let (back, mut id, mut in_a_row) = (Instant::now(), 3 * REQUESTS, 0);
    while in_a_row < 50 {
        assert!(back.elapsed() < Duration::from_secs(5), "not back after {:?}", back.elapsed());
        in_a_row = if ask(&mut client, id) == 200 { in_a_row + 1 } else { 0 };
        id += 1;
    }

    let mut times = HashMap::<String, usize>::new();
    for seen in origins.iter().flat_map(Origin::seen).filter(|seen| seen.line().starts_with("POST")) {
        *times.entry(seen.line().to_owned()).or_default() += 1;
    }
    let twice: Vec<_> = times.into_iter().filter(|(_, times)| *times > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

/// Answers while it is well; takes requests and says nothing while it is not.
fn silent_origin(is_well: &Arc<AtomicBool>) -> Origin {
    let is_well = Arc::clone(is_well);
    Origin::scripted(move |conn| {
        while conn.request().is_some() {
            if is_well.load(Ordering::SeqCst) {
                conn.answer("ok");
            }
        }
    })
}

#[test]
fn upstreams_that_fall_silent_are_asked_no_more_than_once_for_each_request_and_are_back_within_five_seconds()
{
    let well: Vec<Arc<AtomicBool>> = (0..2).map(|_| Arc::new(AtomicBool::new(true))).collect();
    let origins: Vec<Origin> = well.iter().map(silent_origin).collect();
    let mut web = service(origins.iter().map(|origin| upstream(origin.addr)).collect());
    web.policy.response_head_timeout_ms = 100;
    web.policy.body_idle_timeout_ms = 100;
    let edge = TestEdge::start(web);
    let sent = || origins.iter().map(|origin| origin.seen().len()).sum::<usize>();
    let mut client = edge.client();
    let mut asked = 0;
    let mut ask_some = |count: usize| {
        let mut well = 0;
        for _ in 0..count {
            well += usize::from(ask(&mut client, asked) == 200);
            asked += 1;
        }
        well
    };
    assert_eq!(ask_some(100), 100);
    well[0].store(false, Ordering::SeqCst);
    let answered = ask_some(200);
    // The silent one is ejected after five in a row, and asked again when its time is over.
    assert!(answered >= 180, "{answered} of 200 with one of two");
    well[1].store(false, Ordering::SeqCst);
    assert_eq!(ask_some(30), 0);
    assert_eq!(sent(), 330, "a request that was not answered in time is not sent again");
    well.iter().for_each(|origin| origin.store(true, Ordering::SeqCst));
    let (back, mut in_a_row) = (Instant::now(), 0);
    while in_a_row < 50 {
        assert!(back.elapsed() < Duration::from_secs(5), "not back after {:?}", back.elapsed());
        in_a_row = if ask_some(1) == 1 { in_a_row + 1 } else { 0 };
    }
    let lines: Vec<String> =
        origins.iter().flat_map(Origin::seen).map(|seen| seen.line().to_owned()).collect();
    let different: std::collections::HashSet<_> = lines.iter().collect();
    assert_eq!(different.len(), lines.len(), "each came once");
}
