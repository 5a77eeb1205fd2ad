//! Connections that edges open ahead: who is asked for them, and how they are counted.

use std::sync::Arc;
use std::thread;

use peregrine_routing::{Change, Generation, ServiceSpec, TrafficClass};

use super::drain::block_on;
use super::support::{World, named, pool, service};

/// A web whose copy 2 is to have so many connections, in a pool of this weight.
fn warming(weight: u32, count: u16) -> ServiceSpec {
    let mut spec = service(vec![pool("old", 1, &[1]), pool("new", weight, &[2, 3])]);
    spec.pools[1].upstreams[0].ready_connections = count;
    spec
}

fn asked(world: &World) -> Vec<(u64, u16)> {
    let table = world.reader.load();
    let services = table.ready_services().flat_map(|service| service.ready_upstreams());
    services.map(|(upstream, count)| (upstream.generation().0, count)).collect()
}

#[test]
fn the_table_names_exactly_the_upstreams_that_connections_are_opened_to() {
    let mut world = World::of(service(vec![pool("old", 1, &[1])]));
    assert_eq!(asked(&world), []);
    world.put(warming(0, 4));
    assert_eq!(asked(&world), [(2, 4)]);
    world.put(named("other", &["other.test"], Vec::new()));
    assert_eq!(asked(&world), [(2, 4)], "another service changes nothing");
    world.put(warming(1, 0));
    assert_eq!(asked(&world), []);
    world.put(warming(1, 9));
    world.writer.apply(&[Change::Remove("web".into())]).expect("is accepted");
    assert_eq!(asked(&world), []);
}

#[test]
fn the_number_changes_under_one_generation_and_keeps_its_live_state() {
    let mut world = World::of(warming(0, 4));
    let upstream = Arc::clone(world.upstream(2));
    let lease = upstream.enter(TrafficClass::Request).expect("is open");
    upstream.note_ready(3);
    assert_eq!(world.put(warming(1, 0)).len(), 0, "nobody is retired");
    assert!(Arc::ptr_eq(&upstream, world.upstream(2)));
    assert_eq!((upstream.ready_connections(), upstream.in_flight()), (3, 1));
    drop(lease);
    assert_eq!(world.writer.upstream(Generation(3)).map(|other| other.ready_connections()), Some(0));
}

#[test]
fn connections_are_added_up_over_cores_and_whoever_waits_for_them_is_told() {
    let world = World::of(warming(0, 2));
    let upstream = Arc::clone(world.upstream(2));
    let waiting = {
        let upstream = Arc::clone(&upstream);
        thread::spawn(move || {
            loop {
                let turn = upstream.listen();
                if upstream.ready_connections() >= 4 {
                    return;
                }
                block_on(turn);
            }
        })
    };
    let cores: Vec<_> = (0..2)
        .map(|_| {
            let upstream = Arc::clone(&upstream);
            thread::spawn(move || (0..2).for_each(|_| upstream.note_ready(1)))
        })
        .collect();
    cores.into_iter().for_each(|core| core.join().expect("no panic"));
    waiting.join().expect("no panic");
    upstream.note_ready(-1);
    assert_eq!(upstream.ready_connections(), 3);
}
