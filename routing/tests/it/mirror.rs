//! A mirror: when it is on, how much it lets through, and that it is over for whoever holds an old table too.

use std::sync::Arc;

use peregrine_routing::{
    Change, Generation, Mirror, MirrorCounts, MirrorOutcome, MirrorSpec, ServiceSpec, TableError, table,
};

use super::support::{NOW_MS, pool, service, standby};

fn spec() -> MirrorSpec {
    MirrorSpec {
        pool: "new".into(),
        sample_permille: 250,
        max_requests_per_s: 50,
        max_concurrent: 3,
        timeout_ms: 1_000,
        max_body_bytes: 1 << 20,
        with_credentials: false,
        lasts_ms: 10_000,
    }
}

fn mirrored(spec: MirrorSpec) -> ServiceSpec {
    let mut web = service(vec![pool("old", 1, &[1]), pool("new", 0, &[2, 3])]);
    web.policy.mirror = Some(Box::new(spec));
    web
}

fn mirror_of(reader: &peregrine_routing::TableReader) -> Option<Arc<Mirror>> {
    let table = reader.load();
    table.lookup("web.test", "/").expect("it is there").service.mirror().cloned()
}

#[test]
fn a_mirror_is_the_same_while_the_table_says_the_same_of_it_and_over_as_soon_as_it_does_not() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let first = mirror_of(&reader).expect("it is there");
    let mut web = mirrored(spec());
    web.policy.connect_timeout_ms = 7;
    writer.apply(&[Change::Put(web)]).expect("it is taken");
    assert!(Arc::ptr_eq(&first, &mirror_of(&reader).expect("still")) && first.is_on(NOW_MS));

    let other = MirrorSpec { sample_permille: 1, ..spec() };
    writer.apply(&[Change::Put(mirrored(other))]).expect("it is taken");
    let second = mirror_of(&reader).expect("another");
    assert!(!first.is_on(NOW_MS) && second.is_on(NOW_MS));

    let mut fewer = mirrored(second.spec().clone());
    drop(fewer.pools[1].upstreams.pop());
    writer.apply(&[Change::Put(fewer)]).expect("it is taken");
    let third = mirror_of(&reader).expect("with fewer targets");
    assert!(!second.is_on(NOW_MS) && third.is_on(NOW_MS));

    writer.apply(&[Change::Remove("web".into())]).expect("it is gone");
    assert!(!third.is_on(NOW_MS), "with its service");
}

#[test]
fn a_mirror_to_what_serves_clients_or_may_come_to_is_refused() {
    let (mut writer, _reader) = table();
    for pools in [
        vec![pool("old", 1, &[1])],
        vec![pool("old", 1, &[1]), pool("new", 1, &[2])],
        vec![pool("old", 1, &[1]), standby("new", &[2])],
    ] {
        let mut web = service(pools);
        web.policy.mirror = Some(Box::new(spec()));
        let refused = writer.apply(&[Change::Put(web)]).expect_err("it is refused");
        assert_eq!(refused, TableError::BadMirror { service: "web".into(), pool: "new".into() });
    }
}

#[test]
fn no_more_are_admitted_at_a_time_than_the_cap_says_and_the_targets_take_turns() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let mirror = mirror_of(&reader).expect("it is there");
    let slots: Vec<_> = std::iter::from_fn(|| mirror.admit()).collect();
    assert_eq!(slots.len(), 3);
    let targets = (0..4).filter_map(|_| mirror.next_target()).map(|target| target.generation().0);
    assert_eq!(targets.collect::<Vec<_>>(), [2, 3, 2, 3]);
    drop(slots);
    assert!(mirror.admit().is_some(), "there is room again");
    assert!(mirror.targets().iter().all(|target| target.in_flight() == 0), "nobody holds a lease");
}

#[test]
fn the_pace_holds_over_any_stretch_of_time() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let mirror = mirror_of(&reader).expect("it is there");
    // Asked for every millisecond over four seconds; a tenth of a second may come at once.
    let admitted = (0..4_000_u64).filter(|ms| mirror.is_due((NOW_MS + ms) * 1_000)).count();
    assert!((200..=205).contains(&admitted), "{admitted}");
    assert!(mirror.is_due((NOW_MS + 60_000) * 1_000), "after a pause");
    let at_once = (0..100).filter(|_| mirror.is_due((NOW_MS + 60_000) * 1_000)).count();
    assert!(at_once <= 5, "{at_once}: a pause is not saved up");
}

#[test]
fn the_sample_is_the_share_that_was_asked_for() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let mirror = mirror_of(&reader).expect("it is there");
    let even = |i: u64| i * (u64::MAX / 10_000);
    let sampled = (0..10_000).filter(|i| mirror.samples(even(*i))).count();
    assert!((2_499..=2_501).contains(&sampled), "{sampled}");
}

#[test]
fn a_mirror_that_nobody_ends_is_over_when_its_time_is() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let mirror = mirror_of(&reader).expect("it is there");
    assert!(mirror.is_on(NOW_MS), "its time begins");
    assert!(mirror.is_on(NOW_MS + 9_999) && !mirror.is_on(NOW_MS + 10_000));
}

#[test]
fn what_was_mirrored_is_counted_beside_everything_that_decides_on_health_and_receipts() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let target = Arc::clone(&mirror_of(&reader).expect("it is there").targets()[0]);
    assert_eq!(target.mirrored(), MirrorCounts::default());
    let pair = |client, mirror| MirrorOutcome::Compared { client: (client, 100), mirror: (mirror, 3_000) };
    for _ in 0..5 {
        target.note_mirrored();
    }
    let outcomes =
        [pair(200, 200), pair(200, 503), pair(404, 403), MirrorOutcome::Failed { client_status: 200 }];
    outcomes.into_iter().for_each(|outcome| target.record_mirrored(outcome));
    for outcome in [MirrorOutcome::Unfinished, MirrorOutcome::Skipped, MirrorOutcome::LeftOut] {
        target.record_mirrored(outcome);
    }
    let counts = target.mirrored();
    assert_eq!((counts.sent, counts.compared(), counts.failed(), counts.judged()), (5, 3, 1, 4));
    assert_eq!((counts.unequal, counts.unfinished, counts.skipped, counts.left_out), (2, 1, 1, 1));
    assert_eq!(counts.pairs_where(|client, mirror| client != mirror), 2);
    assert_eq!(counts.pairs_where(|client, mirror| client == 2 && mirror >= 5), 2);
    assert_eq!((counts.client_latency.count(), counts.mirror_latency.count()), (3, 3));
    assert_eq!(counts.since(&counts).judged(), 0);

    let receipt = target.receipt();
    assert_eq!((receipt.started, receipt.completed.total(), target.outcomes().samples()), (0, 0, 0));
    assert!(target.is_usable(NOW_MS), "failures of copies are nobody's");
    let retired = writer.apply(&[Change::Remove("web".into())]).expect("it is gone").retired;
    assert!(retired.iter().all(|upstream| upstream.is_empty()), "nobody waits for a copy");
}

#[test]
fn what_other_edges_have_mirrored_is_counted_too_and_only_what_is_new() {
    let (mut writer, reader) = table();
    writer.apply(&[Change::Put(mirrored(spec()))]).expect("it is taken");
    let target = Arc::clone(&mirror_of(&reader).expect("it is there").targets()[0]);
    let edge = reader.join(peregrine_routing::EdgeId(7), &"far".into(), 2);
    let said = |sent: u64| {
        let mut pairs = [[0; peregrine_routing::MIRROR_CLASSES]; 5];
        pairs[1][1] = sent;
        let mirrored = Some(Box::new(MirrorCounts { sent, pairs, ..MirrorCounts::default() }));
        peregrine_routing::Tally { mirrored, ..peregrine_routing::Tally::default() }
    };
    edge.report(Generation(2), said(10), true);
    assert_eq!(target.mirrored().sent, 0, "it was before we knew the edge");
    edge.report(Generation(2), said(14), false);
    target.note_mirrored();
    assert_eq!((target.mirrored().sent, target.mirrored().compared()), (5, 4));
}
