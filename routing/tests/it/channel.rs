//! Publication and acknowledgement.

use std::task::{Context, Poll, Waker};
use std::thread;

use peregrine_routing::{Acknowledger, Change, TableWriter, table};

use super::drain::block_on;
use super::support::named;

fn publish(writer: &mut TableWriter, turn: usize) -> u64 {
    let host = format!("h{turn}.test");
    writer.apply(&[Change::Put(named("web", &[&host], Vec::new()))]).expect("is accepted").version
}

fn is_acknowledged(writer: &TableWriter, version: u64) -> bool {
    let mut future = std::pin::pin!(writer.acknowledged(version));
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
}

#[test]
fn a_publication_waits_for_every_registered_core() {
    let (mut writer, reader) = table();
    assert!(is_acknowledged(&writer, 0), "nobody is registered");
    let [one, two] = [reader.register(), reader.register()];
    let version = publish(&mut writer, 0);
    assert!(!is_acknowledged(&writer, version));
    one.acknowledge(version);
    assert!(!is_acknowledged(&writer, version));
    two.acknowledge(version - 1);
    assert!(!is_acknowledged(&writer, version));
    two.acknowledge(version);
    assert!(is_acknowledged(&writer, version));
    two.acknowledge(version - 1);
    assert!(is_acknowledged(&writer, version), "an acknowledgement is not taken back");
}

#[test]
fn the_writer_knows_how_many_cores_are_there() {
    let (writer, reader) = table();
    assert_eq!(writer.edges(), 0);
    let [one, _two] = [reader.register(), reader.register()];
    assert_eq!(writer.edges(), 2);
    drop(one);
    assert_eq!(writer.edges(), 1);
}

#[test]
fn a_core_that_goes_away_is_not_waited_for() {
    let (mut writer, reader) = table();
    let [one, two] = [reader.register(), reader.register()];
    let version = publish(&mut writer, 0);
    one.acknowledge(version);
    let waiting = {
        let acknowledged = writer.acknowledged(version);
        thread::spawn(move || block_on(acknowledged))
    };
    drop(two);
    waiting.join().expect("no panic");
}

#[test]
fn a_new_core_has_nothing_to_acknowledge_of_what_was_before_it() {
    let (mut writer, reader) = table();
    let version = publish(&mut writer, 0);
    let core = reader.register();
    assert!(is_acknowledged(&writer, version));
    let version = publish(&mut writer, 1);
    assert!(!is_acknowledged(&writer, version));
    core.acknowledge(version);
    assert!(is_acknowledged(&writer, version));
}

#[test]
fn a_cached_reader_sees_each_publication_at_once_and_a_kept_snapshot_none() {
    let (mut writer, reader) = table();
    let mut cached = reader.cached();
    for turn in 0..100 {
        let kept = reader.load();
        publish(&mut writer, turn);
        let (now, before) = (format!("h{turn}.test"), format!("h{}.test", turn.wrapping_sub(1)));
        assert!(cached.load().lookup(&now, "/").is_some());
        assert!(cached.load().lookup(&before, "/").is_none());
        assert!(kept.lookup(&now, "/").is_none());
        assert_eq!(kept.lookup(&before, "/").is_some(), turn > 0);
    }
}

/// An edge core: uses each version that it hears of, says so, and ends with the last.
fn follow(reader: &peregrine_routing::TableReader, core: &Acknowledger, last: u64) {
    let mut version = 0;
    while version < last {
        version = block_on(reader.newer_than(version));
        assert!(reader.load().version() >= version);
        core.acknowledge(version);
    }
}

#[test]
fn no_wake_up_is_lost_between_publishing_and_acknowledging() {
    const VERSIONS: u64 = 3_000;
    let (mut writer, reader) = table();
    thread::scope(|scope| {
        for _ in 0..3 {
            let (reader, core) = (reader.clone(), reader.register());
            scope.spawn(move || follow(&reader, &core, VERSIONS));
        }
        for turn in 1..=VERSIONS {
            let version = publish(&mut writer, turn as usize);
            assert_eq!(version, turn);
            block_on(writer.acknowledged(version));
        }
    });
}

#[test]
fn a_version_is_announced_only_when_what_it_retires_is_retired() {
    const VERSIONS: usize = 2_000;
    let (mut writer, reader) = table();
    let put = |generation: u64| {
        let mut service = named("web", &["a.test"], Vec::new());
        service.pools = vec![peregrine_routing::PoolSpec {
            name: "main".into(),
            weight: 1,
            standby: false,
            upstreams: vec![peregrine_routing::UpstreamSpec {
                generation: peregrine_routing::Generation(generation),
                name: "copy".into(),
                address: peregrine_routing::Address::Socket(([127, 0, 0, 1], 80).into()),
                protocol: peregrine_routing::UpstreamProtocol::Http1,
                weight: 1,
                ready_connections: 0,
            }],
        }];
        Change::Put(service)
    };
    writer.apply(&[put(1)]).expect("is accepted");
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut version, mut before) = (1, reader.load());
            while version < VERSIONS as u64 {
                version = block_on(reader.newer_than(version));
                let old = before.lookup("a.test", "/").expect("is there").service;
                let gone = old.upstreams().all(|(_, upstream)| upstream.is_retired());
                assert!(gone || before.version() >= version, "version {version} was announced too early");
                before = reader.load();
            }
        });
        for generation in 2..=VERSIONS as u64 {
            writer.apply(&[put(generation)]).expect("is accepted");
        }
    });
}
