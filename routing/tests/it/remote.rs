//! Edges in other processes: who is waited for, who may be inside, and what is told of those that were lost.

use std::sync::Arc;
use std::task::{Context, Waker};

use peregrine_routing::{
    Change, EdgeId, Generation, Health, PerClass, Publication, RemoteEdge, Tally, TrafficClass,
};

use super::drain::block_on;
use super::support::{World, pool, service};

fn joined(world: &World, id: u64) -> RemoteEdge {
    world.reader.join(EdgeId(id), &Arc::from("edge-1"), 2)
}

fn serving(generations: &[u64]) -> peregrine_routing::ServiceSpec {
    service(vec![pool("serving", 1, generations)])
}

fn inside(count: u64) -> Tally {
    let mut in_flight = PerClass::default();
    in_flight[TrafficClass::Request] = count;
    Tally { started: 3, in_flight, health: Health::Unhealthy, ..Tally::default() }
}

#[test]
fn an_edge_elsewhere_is_inside_of_what_it_was_told_until_it_lets_go() {
    let mut world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    assert_eq!(world.writer.edges(), 2, "cores count");
    let one = Arc::clone(world.upstream(1));
    world.put(serving(&[2]));
    assert!(one.is_retired() && !one.is_empty(), "it may have sent something");
    edge.report(Generation(1), inside(2), false);
    assert_eq!((one.in_flight(), one.receipt().started, one.health()), (2, 3, Health::Unhealthy));
    assert_eq!(one.health_here(), Health::Unknown, "an edge here decides for itself");
    edge.acknowledge(world.writer.version(), &[Generation(1)]);
    assert!(!one.is_empty(), "it says that it is inside");
    edge.report(Generation(1), Tally { in_flight: PerClass::default(), ..inside(0) }, false);
    edge.let_go(Generation(1));
    assert!(one.is_empty() && one.receipt().empty);
    edge.report(Generation(1), inside(9), false);
    assert!(one.is_empty() && one.in_flight() == 0, "its last word was the last");
}

#[test]
fn an_acknowledgement_says_nothing_of_what_was_retired_after_it() {
    let mut world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    let before = world.writer.version();
    let one = Arc::clone(world.upstream(1));
    world.put(serving(&[2]));
    edge.acknowledge(before, &[]);
    assert!(!one.is_empty(), "that edge still uses it");
    edge.acknowledge(world.writer.version(), &[]);
    assert!(one.is_empty());
}

#[test]
fn an_edge_that_is_given_up_is_told_as_lost_and_not_waited_for() {
    let mut world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    edge.report(Generation(1), inside(2), false);
    let one = Arc::clone(world.upstream(1));
    let version = world.writer.apply(&[Change::Put(serving(&[2]))]).expect("is accepted").version;
    drop(edge);
    block_on(world.writer.acknowledged(version));
    let receipt = one.receipt();
    assert!(receipt.empty && receipt.in_flight.total() == 0);
    assert_eq!((receipt.lost.len(), receipt.lost[0].in_flight, receipt.started), (1, 2, 3));
    let back = joined(&world, 7);
    assert_eq!(world.upstream(2).receipt().lost, []);
    back.leave();
    drop(back);
    assert_eq!(world.upstream(2).receipt().lost, [], "it ended in order");
}

#[test]
fn what_an_edge_had_counted_before_it_joined_is_told_off() {
    let world = World::of(serving(&[1, 2]));
    let edge = joined(&world, 7);
    edge.report(Generation(1), Tally { started: 100, retried: 7, ..Tally::default() }, true);
    edge.report(Generation(1), Tally { started: 103, retried: 9, ..Tally::default() }, false);
    let receipt = world.upstream(1).receipt();
    assert_eq!((receipt.started, receipt.retried), (3, 2));
    world.upstream(2).note_retried();
    assert_eq!(world.upstream(2).tally().retried, 1, "so an edge says it");
    edge.report(Generation(1), Tally { started: 104, ..Tally::default() }, true);
    assert_eq!(world.upstream(1).receipt().started, 4, "a new connection is no new beginning");
}

#[test]
fn what_it_is_told_begins_whole_and_goes_on_in_order_without_a_gap() {
    let mut world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    let turn = edge.start_over();
    world.put(serving(&[1, 2]));
    let Publication::Whole(table) = block_on(edge.next(turn)) else { panic!("the first is whole") };
    assert_eq!(table.version(), world.writer.version());
    for generation in 3..2_000 {
        world.put(serving(&[1, generation]));
        if generation < 1_000 {
            let Publication::Changes(version, changes) = block_on(edge.next(turn)) else {
                panic!("differences")
            };
            assert_eq!((version, changes.len()), (world.writer.version(), 1));
        }
    }
    let next = block_on(edge.next(turn));
    assert!(matches!(next, Publication::Changes(..) | Publication::Whole(_)));
    let again = edge.start_over();
    assert!(
        matches!(block_on(edge.next(again)), Publication::Whole(table) if table.version() == world.writer.version())
    );
}

#[test]
fn an_edge_that_comes_back_while_a_drain_goes_on_is_waited_for_again() {
    let mut world = World::of(serving(&[1]));
    let (cut, other) = (joined(&world, 7), joined(&world, 8));
    cut.report(Generation(1), inside(2), false);
    other.report(Generation(1), inside(1), false);
    let one = Arc::clone(world.upstream(1));
    world.put(serving(&[2]));
    other.acknowledge(world.writer.version(), &[Generation(1)]);
    drop(cut);
    assert_eq!(one.receipt().lost.len(), 1);
    let back = joined(&world, 7);
    other.let_go(Generation(1));
    assert!(!one.is_empty(), "it is back, and has said nothing yet");
    assert_eq!((one.receipt().lost, one.in_flight()), (vec![], 2), "as it was last heard of");
    back.report(Generation(1), Tally { started: 4, ..inside(2) }, true);
    assert_eq!((one.in_flight(), one.receipt().started), (2, 4 + 3), "counted on from before it was lost");
    back.acknowledge(world.writer.version(), &[Generation(1)]);
    assert!(!one.is_empty(), "it says that it is inside");
    assert_eq!(back.draining().len(), 1, "it is told of the deadlines");
    back.let_go(Generation(1));
    assert!(one.is_empty() && one.receipt().lost.is_empty());
}

#[test]
fn a_retired_upstream_waits_for_an_edge_that_names_it_unless_that_has_let_go_or_it_is_forgotten() {
    let mut world = World::of(serving(&[1]));
    let one = Arc::clone(world.upstream(1));
    world.put(serving(&[2]));
    assert!(one.is_empty());
    // Of this edge the writer has never heard: its own process is younger.
    let edge = joined(&world, 7);
    assert!(one.is_empty(), "an edge that is new was not inside");
    edge.report(Generation(1), Tally { started: 9, ..inside(2) }, true);
    assert_eq!((one.is_empty(), one.in_flight(), one.receipt().started), (false, 2, 0));
    edge.let_go(Generation(1));
    edge.report(Generation(1), inside(2), true);
    assert!(one.is_empty(), "its last word was the last");
    world.writer.forget(Generation(1));
    joined(&world, 8).report(Generation(1), inside(2), true);
    assert!(one.is_empty());
}

#[test]
fn edges_that_are_gone_for_good_are_one_sum_and_every_loss_has_a_number() {
    let world = World::of(serving(&[1]));
    let one = Arc::clone(world.upstream(1));
    for id in 0..100 {
        let edge = joined(&world, id);
        edge.report(Generation(1), inside(2), false);
        drop(edge);
        let left = joined(&world, 1_000 + id);
        left.report(Generation(1), inside(0), false);
        left.leave();
    }
    let receipt = one.receipt();
    assert_eq!((receipt.started, receipt.in_flight.total()), (100 * 3 + 100 * 3, 0));
    assert_eq!(receipt.lost.iter().map(|lost| lost.in_flight).sum::<u64>(), 200);
    assert_eq!(receipt.lost.iter().map(|lost| lost.number).max(), Some(100));
    assert!(receipt.lost.len() < 20, "those of long ago are one: {}", receipt.lost.len());
    // One of the last may be cut off only.
    let back = joined(&world, 99);
    back.report(Generation(1), Tally { started: 5, ..inside(1) }, true);
    assert_eq!((one.receipt().started, one.in_flight()), (100 * 3 + 100 * 3 + 2, 1));
    // One of the first is told anew, and nothing of it twice.
    let late = joined(&world, 0);
    late.report(Generation(1), Tally { started: 5, ..inside(1) }, true);
    late.report(Generation(1), Tally { started: 6, ..inside(1) }, false);
    assert_eq!((one.receipt().started, one.in_flight()), (100 * 3 + 100 * 3 + 2 + 1, 2));
}

#[test]
fn an_edge_that_was_given_up_because_it_used_nothing_is_waited_for_when_it_uses_the_newest_table() {
    let mut world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    edge.report(Generation(1), inside(2), false);
    let one = Arc::clone(world.upstream(1));
    world.put(serving(&[2]));
    drop(edge);
    let back = world.reader.join_unawaited(EdgeId(7), &Arc::from("edge-1"), 2);
    back.report(Generation(1), inside(1), true);
    back.report(Generation(2), inside(1), true);
    assert!(one.is_empty() && one.receipt().lost.len() == 1 && world.upstream(2).in_flight() == 0);
    let turn = back.start_over();
    assert!(matches!(block_on(back.next(turn)), Publication::Whole(_)), "it is told");
    let told = world.writer.version();
    world.put(serving(&[2, 3]));
    let version = world.writer.version();
    assert!(matches!(block_on(back.next(turn)), Publication::Changes(next, _) if next == version));
    back.acknowledge(told, &[Generation(1)]);
    assert!(!back.is_waited() && one.is_empty(), "it is behind");
    block_on(world.writer.acknowledged(version));
    back.acknowledge(version, &[Generation(1)]);
    assert!(back.is_waited() && !one.is_empty(), "it says that it is inside");
    assert_eq!((back.acknowledged(), one.receipt().lost), (version, vec![]));
    back.let_go(Generation(1));
    assert!(one.is_empty());
    let two = Arc::clone(world.upstream(2));
    world.put(serving(&[3]));
    assert!(!two.is_empty(), "as every other edge");
    let mut waits = std::pin::pin!(world.writer.acknowledged(world.writer.version()));
    let mut is_over = || waits.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
    assert!(!is_over());
    back.acknowledge(world.writer.version(), &[]);
    assert!(two.is_empty() && is_over());
}
