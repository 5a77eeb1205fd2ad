//! The load generator against a sound origin, and against peers that fail in each known way.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use peregrine_bench::load::{Expect, FailureKind, Failures, Load, LoadOptions, Pace, Protocol, Until};
use peregrine_bench::oracle::check_exactly_once;
use peregrine_bench::origin::{Fault, FaultChange, Origin, OriginOptions};

fn options(target: SocketAddr, count: u64) -> LoadOptions {
    LoadOptions { connections: 4, until: Until::Count(count), ..LoadOptions::new(target) }
}

/// A peer that lets `behave` answer each connection; it lives as long as the test process.
fn peer(behave: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let addr = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let behave = behave.clone();
            std::thread::spawn(move || behave(stream));
        }
    });
    addr
}

/// Reads one request head; false at the end of the connection.
fn read_head(stream: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return false,
        }
    }
    true
}

async fn failures_against(behave: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> Failures {
    let mut options = options(peer(behave), 3);
    options.connections = 1;
    options.request_timeout_ms = 300;
    let summary = Load::run(options).await.expect("sound options");
    assert_eq!((summary.sent, summary.ok), (3, 0), "{summary:?}");
    assert!(summary.acknowledged.is_empty());
    assert_eq!(summary.failures.len(), 3);
    summary.failed
}

#[tokio::test]
async fn each_request_is_sent_once_and_each_answer_counted() {
    for protocol in [Protocol::Http1, Protocol::H2c] {
        let origin = Origin::bind(OriginOptions::named("alpha")).await.expect("bound");
        let mut options = options(origin.addr(), 5000);
        options.protocol = protocol;
        options.post_percent = 10;
        options.path = "/bytes/1000".to_owned();
        options.expect = Expect::Pattern(1000);
        let summary = Load::run(options).await.expect("sound options");
        assert_eq!((summary.sent, summary.ok, summary.failed.total()), (5000, 5000, 0), "{summary:?}");
        assert_eq!(summary.per_instance["alpha"], 5000);
        assert_eq!(summary.body_bytes, 5_000_000);
        assert_eq!((summary.connections_opened, summary.connections_closed_by_peer), (4, 0));
        let records = origin.records();
        let report = check_exactly_once(&summary.acknowledged, &records);
        assert!(report.is_exactly_once(), "{report:?}");
        assert_eq!(report.acknowledged, 5000);
        assert_eq!(records.iter().filter(|record| record.method == "POST").count(), 500);
    }
}

#[tokio::test]
async fn a_duplicate_behind_the_clients_back_is_found() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut first = options(origin.addr(), 10);
    first.run = "twice".to_owned();
    let summary = Load::run(first.clone()).await.expect("sound options");
    assert!(check_exactly_once(&summary.acknowledged, &origin.records()).is_exactly_once());
    Load::run(LoadOptions { until: Until::Count(1), ..first }).await.expect("sound options");
    let report = check_exactly_once(&summary.acknowledged, &origin.records());
    assert_eq!((report.duplicated, report.is_exactly_once()), (1, false));
}

#[tokio::test]
async fn an_open_loop_keeps_its_rate_and_sends_every_request_of_its_time() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut options = options(origin.addr(), 0);
    options.pace = Pace::Open { per_second: 2000 };
    options.until = Until::DurationMs(500);
    let summary = Load::run(options).await.expect("sound options");
    assert_eq!((summary.sent, summary.failed.total()), (1000, 0), "{summary:?}");
    assert!(summary.duration_ms >= 499, "{} ms", summary.duration_ms);
}

#[tokio::test]
async fn a_stall_shows_in_the_latency_of_every_request_that_was_due_in_it() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut options = options(origin.addr(), 0);
    options.pace = Pace::Open { per_second: 1000 };
    options.until = Until::DurationMs(1000);
    let handle = Load::start(options).expect("sound options");
    while handle.live().ok == 0 {
        tokio::task::yield_now().await;
    }
    let hang = |hang| FaultChange { hang: Some(hang), ..FaultChange::default() };
    origin.change_fault(hang(true));
    let stalled_at = origin.stats().requests;
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(origin.stats().requests <= stalled_at + 4, "four connections hold four requests");
    origin.change_fault(hang(false));
    let mut handle = handle;
    handle.ended().await;
    let summary = handle.stop().await;
    assert_eq!((summary.sent, summary.failed.total()), (1000, 0), "{summary:?}");
    // 400 of 1,000 requests were due while nothing was answered; half of those waited 200 ms and more.
    assert!(summary.latency_us.p90 >= 200_000, "{:?}", summary.latency_us);
    assert!(summary.latency_us.max >= 390_000, "{:?}", summary.latency_us);
}

#[tokio::test]
async fn an_error_answer_is_a_failure_that_tells_who_gave_it() {
    let fault = Fault { error_percent: 10, ..Fault::default() };
    let options_of_origin = OriginOptions { fault, ..OriginOptions::named("broken") };
    let origin = Origin::bind(options_of_origin).await.expect("bound");
    let summary = Load::run(options(origin.addr(), 100)).await.expect("sound options");
    assert_eq!((summary.ok, summary.failed), (90, Failures { non_2xx: 10, ..Failures::default() }));
    assert!(summary.failures[0].detail.contains("500") && summary.failures[0].detail.contains("broken"));
    let report = check_exactly_once(&summary.acknowledged, &origin.records());
    assert!(report.is_exactly_once());
    assert_eq!(report.executed_unacknowledged, 10);
}

#[tokio::test]
async fn a_connection_closed_before_the_answer_is_a_reset() {
    let failed = failures_against(|mut stream| {
        read_head(&mut stream);
    })
    .await;
    assert_eq!(failed, Failures { reset: 3, ..Failures::default() });
}

#[tokio::test]
async fn a_body_that_ends_early_is_truncated() {
    for head in ["content-length: 100\r\n\r\nonly this", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"] {
        let failed = failures_against(move |mut stream| {
            if read_head(&mut stream) {
                write!(stream, "HTTP/1.1 200 OK\r\n{head}").expect("sent");
            }
        })
        .await;
        assert_eq!(failed, Failures { truncated: 3, ..Failures::default() });
    }
}

#[tokio::test]
async fn silence_is_a_timeout() {
    let failed = failures_against(|mut stream| while read_head(&mut stream) {}).await;
    assert_eq!(failed, Failures { timeout: 3, ..Failures::default() });
}

#[tokio::test]
async fn an_answer_to_another_request_or_no_http_at_all_is_malformed() {
    for answer in
        ["HTTP/1.1 200 OK\r\nx-req-id: other-1\r\ncontent-length: 0\r\n\r\n", "SSH-2.0-OpenSSH\r\n\r\n"]
    {
        let failed = failures_against(move |mut stream| {
            if read_head(&mut stream) {
                stream.write_all(answer.as_bytes()).expect("sent");
                // The client ends a connection that makes no sense to it; ending it here first could look like a reset.
                while read_head(&mut stream) {}
            }
        })
        .await;
        assert_eq!(failed, Failures { malformed: 3, ..Failures::default() }, "{answer:?}");
    }
}

#[tokio::test]
async fn a_body_of_the_wrong_length_is_malformed() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut options = options(origin.addr(), 3);
    options.path = "/bytes/99".to_owned();
    options.expect = Expect::Length(100);
    let summary = Load::run(options).await.expect("sound options");
    assert_eq!(summary.failed, Failures { malformed: 3, ..Failures::default() });
}

#[tokio::test]
async fn a_refused_connection_is_a_connect_failure() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let addr = listener.local_addr().expect("an address");
    drop(listener);
    let summary = Load::run(options(addr, 5)).await.expect("sound options");
    assert_eq!(summary.failed, Failures { connect: 5, ..Failures::default() });
    assert!(matches!(summary.failures[0].kind, FailureKind::Connect));
}

#[tokio::test]
async fn a_connection_closed_between_requests_is_replaced_and_counted_apart() {
    let addr = peer(|mut stream| {
        if read_head(&mut stream) {
            write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
                .expect("sent");
        }
    });
    let mut options = options(addr, 10);
    options.connections = 1;
    let summary = Load::run(options).await.expect("sound options");
    assert_eq!((summary.ok, summary.failed.total()), (10, 0), "{summary:?}");
    assert_eq!(summary.close_announced, 10);
    assert_eq!(summary.connections_opened, 10);
    assert!(summary.connections_closed_by_peer >= 9, "{summary:?}");
}

#[tokio::test]
async fn a_connection_per_request_opens_as_many_and_blames_nobody_for_the_ends() {
    for protocol in [Protocol::Http1, Protocol::H2c] {
        let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
        let mut options = options(origin.addr(), 100);
        options.protocol = protocol;
        options.streams_per_connection = 1;
        options.connection_per_request = true;
        let summary = Load::run(options).await.expect("sound options");
        assert_eq!((summary.ok, summary.failed.total()), (100, 0), "{summary:?}");
        assert_eq!((summary.connections_opened, summary.connections_closed_by_peer), (100, 0));
        assert_eq!(origin.stats().connections, 100);
    }
}

#[tokio::test]
async fn idle_connections_are_held_and_missed_when_the_peer_ends_them() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut options = LoadOptions::new(origin.addr());
    options.idle_connections = 50;
    let idle = peregrine_bench::load::IdleConnections::open(options).await.expect("sound options");
    assert_eq!((idle.opened(), idle.failures().len(), idle.closed_by_peer()), (50, 0, 0));
    assert_eq!(origin.stats().open_connections, 50);
    origin.shutdown().await;
    let deadline = Instant::now() + Duration::from_secs(5);
    while idle.closed_by_peer() < 50 {
        assert!(Instant::now() < deadline, "{} of 50 ends were seen", idle.closed_by_peer());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_idle_connection_that_cannot_be_had_spoils_the_run() {
    let addr = peer(|mut stream| {
        read_head(&mut stream);
    });
    let mut options = options(addr, 0);
    options.idle_connections = 3;
    let summary = Load::run(options).await.expect("sound options");
    assert_eq!((summary.sent, summary.idle_connections_failed, summary.is_clean()), (0, 3, false));
}

#[tokio::test]
async fn samples_add_up_to_the_summary() {
    let origin = Origin::bind(OriginOptions::named("alpha")).await.expect("bound");
    let mut options = options(origin.addr(), 0);
    options.pace = Pace::Open { per_second: 1000 };
    options.until = Until::Stopped;
    options.sample_ms = 50;
    let handle = Load::start(options).expect("sound options");
    let mut samples = handle.samples();
    let mut seen = 0;
    for _ in 0..4 {
        samples.changed().await.expect("the run goes on");
        let sample = samples.borrow_and_update();
        assert_eq!(sample.per_instance.values().sum::<u64>(), sample.ok);
        seen += sample.ok;
    }
    let summary = handle.stop().await;
    samples.changed().await.expect("the last stretch is published too");
    seen += samples.borrow_and_update().ok;
    assert_eq!(seen, summary.ok);
    assert_eq!(summary.failed.total(), 0);
}

#[tokio::test]
async fn contradictory_options_are_refused_by_name() {
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let refused = |change: fn(&mut LoadOptions)| {
        let mut options = LoadOptions::new(target);
        change(&mut options);
        Load::start(options).expect_err("contradictory").to_string()
    };
    assert!(refused(|options| options.path = "no-slash".to_owned()).contains("path"));
    assert!(refused(|options| options.run = "two words".to_owned()).contains("run"));
    assert!(refused(|options| options.connections = 0).contains("connections"));
    assert!(refused(|options| options.pace = Pace::Open { per_second: 0 }).contains("pace"));
    assert!(refused(|options| options.host = "a b".to_owned()).contains("host"));
}

#[tokio::test]
async fn a_grpc_call_that_ends_with_another_status_or_none_is_a_failure() {
    let origin = Origin::bind(OriginOptions::named("a")).await.expect("an origin");
    for (path, ok) in [("/trailers", 5), ("/bytes/10", 0)] {
        let calls = LoadOptions {
            path: path.to_owned(),
            protocol: Protocol::H2c,
            expect: Expect::Call,
            ..options(origin.addr(), 5)
        };
        let summary = Load::run(calls).await.expect("options are fine");
        assert_eq!((summary.ok, summary.failed.malformed), (ok, 5 - ok), "{path}: {:?}", summary.failures);
    }
}
