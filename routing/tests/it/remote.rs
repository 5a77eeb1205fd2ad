//! Edges in other processes: who is waited for, who may be inside, and what is told of those that were lost.

use std::sync::Arc;

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
    let world = World::of(serving(&[1]));
    let edge = joined(&world, 7);
    edge.report(Generation(1), Tally { started: 100, ..Tally::default() }, true);
    edge.report(Generation(1), Tally { started: 103, ..Tally::default() }, false);
    assert_eq!(world.upstream(1).receipt().started, 3);
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
