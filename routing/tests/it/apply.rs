//! A batch of changes is one change: all of it or nothing, in any order.

use peregrine_routing::{Address, Change, Generation, PathError, TableError, UpstreamProtocol, table};

use super::support::{World, named, pool, service, upstream};

fn holder_of(world: &World, host: &str) -> Option<String> {
    world.reader.load().lookup(host, "/").map(|found| found.service.name().to_string())
}

#[test]
fn a_route_passes_from_one_service_to_another_in_one_batch_in_any_order() {
    for turn in [false, true] {
        let mut world = World::of(named("a", &["a.test", "shared.test"], vec![pool("main", 1, &[1])]));
        world.put(named("b", &["b.test"], vec![pool("main", 1, &[2])]));
        let mut batch = vec![
            Change::Put(named("b", &["b.test", "shared.test"], vec![pool("main", 1, &[2])])),
            Change::Put(named("a", &["a.test"], vec![pool("main", 1, &[1])])),
        ];
        if turn {
            batch.reverse();
        }
        let applied = world.writer.apply(&batch).expect("is one change");
        assert!(applied.retired.is_empty());
        assert_eq!(holder_of(&world, "shared.test").as_deref(), Some("b"));
        assert_eq!(holder_of(&world, "a.test").as_deref(), Some("a"));
    }
}

#[test]
fn two_services_swap_their_routes_in_one_batch() {
    let mut world = World::of(named("a", &["one.test"], Vec::new()));
    world.put(named("b", &["two.test"], Vec::new()));
    let swap = [
        Change::Put(named("a", &["two.test"], Vec::new())),
        Change::Put(named("b", &["one.test"], Vec::new())),
    ];
    world.writer.apply(&swap).expect("is one change");
    assert_eq!(holder_of(&world, "one.test").as_deref(), Some("b"));
    assert_eq!(holder_of(&world, "two.test").as_deref(), Some("a"));
}

#[test]
fn a_route_of_a_removed_service_is_free_in_the_same_batch() {
    let mut world = World::of(named("a", &["a.test"], vec![pool("main", 1, &[1])]));
    let batch = [
        Change::Put(named("b", &["a.test"], vec![pool("main", 1, &[2])])),
        Change::Remove("a".into()),
        Change::Remove("nobody".into()),
    ];
    let applied = world.writer.apply(&batch).expect("is one change");
    assert_eq!(applied.retired.iter().map(|u| u.generation()).collect::<Vec<_>>(), [Generation(1)]);
    assert_eq!(holder_of(&world, "a.test").as_deref(), Some("b"));
}

#[test]
fn a_refused_batch_leaves_nothing_behind() {
    let mut world = World::of(named("a", &["a.test"], vec![pool("main", 1, &[1])]));
    let version = world.writer.version();
    let refused = [
        Change::Put(named("new", &["new.test"], vec![pool("main", 1, &[7])])),
        Change::Remove("a".into()),
        Change::Put(named("bad", &["new.test"], Vec::new())),
    ];
    assert!(matches!(world.writer.apply(&refused), Err(TableError::RouteTaken { .. })));
    assert_eq!(world.writer.version(), version);
    assert_eq!(holder_of(&world, "a.test").as_deref(), Some("a"));
    assert_eq!(holder_of(&world, "new.test"), None);
    assert!(world.writer.service("new").is_none());
    assert!(world.writer.upstream(Generation(7)).is_none(), "it was never in service");
    assert!(!world.upstream(1).is_retired());
    // What was not refused is then as free as before, the generation too.
    world.writer.apply(&refused[..2]).expect("is accepted");
    assert_eq!(holder_of(&world, "new.test").as_deref(), Some("new"));
}

#[test]
fn a_taken_route_is_refused_with_its_holder() {
    let mut world = World::of(named("a", &["*.test/api/"], Vec::new()));
    let taken = |holder: &str| TableError::RouteTaken {
        host: "*.test".into(),
        path: "/api".into(),
        holder: holder.into(),
    };
    let b = Change::Put(named("b", &["*.test/api"], Vec::new()));
    assert_eq!(world.writer.apply(std::slice::from_ref(&b)).err(), Some(taken("a")));
    // The holder being part of the batch does not help as long as it keeps the route.
    let batch = [b.clone(), Change::Put(named("a", &["*.test/api", "more.test"], Vec::new()))];
    assert_eq!(world.writer.apply(&batch).err(), Some(taken("a")));
    let (mut writer, _) = table();
    let both = [b, Change::Put(named("c", &["*.test/api"], Vec::new()))];
    assert_eq!(writer.apply(&both).err(), Some(taken("b")));
}

#[test]
fn a_malformed_prefix_is_refused_with_what_is_wrong() {
    let (mut writer, reader) = table();
    let mut spec = service(Vec::new());
    spec.routes[0].path_prefix = "/a b".into();
    let error = writer.apply(&[Change::Put(spec)]).expect_err("is refused");
    assert_eq!(
        error,
        TableError::BadPath { service: "web".into(), path: "/a b".into(), source: PathError::BadCharacter }
    );
    assert_eq!(reader.load().version(), 0);
}

#[test]
fn the_last_word_on_a_service_counts_and_live_state_survives_it() {
    let mut world = World::of(service(vec![pool("main", 1, &[1])]));
    let lease = world.web().enter(world.ask()).expect("an upstream");
    let batch = [Change::Remove("web".into()), Change::Put(service(vec![pool("main", 1, &[1, 2])]))];
    assert!(world.writer.apply(&batch).expect("is accepted").retired.is_empty());
    assert_eq!(world.upstream(1).in_flight(), 1);
    drop(lease);
    assert_eq!(world.upstream(1).in_flight(), 0);
}

#[test]
fn a_generation_never_serves_twice() {
    let reused = |generation| Some(TableError::GenerationReused(Generation(generation)));
    let put = |world: &mut World, spec| world.writer.apply(&[Change::Put(spec)]).err();
    let mut world = World::of(service(vec![pool("main", 1, &[1])]));
    assert_eq!(put(&mut world, service(vec![pool("main", 1, &[2])])), None);
    assert_eq!(put(&mut world, service(vec![pool("main", 1, &[1])])), reused(1), "retired");
    world.writer.forget(Generation(1));
    assert!(world.writer.upstream(Generation(1)).is_none());
    assert_eq!(put(&mut world, service(vec![pool("main", 1, &[1])])), reused(1), "retired and forgotten");
    world.writer.forget(Generation(2));
    assert!(world.writer.upstream(Generation(2)).is_some(), "what serves is not forgotten");
    let other = |generations: &[u64]| named("other", &["other.test"], vec![pool("main", 1, generations)]);
    assert_eq!(put(&mut world, other(&[2])), reused(2), "in another service");
    assert_eq!(put(&mut world, other(&[3, 3])), reused(3), "twice in one");
    let both = [Change::Put(other(&[4])), Change::Put(service(vec![pool("main", 1, &[2, 4])]))];
    assert_eq!(world.writer.apply(&both).err(), reused(4), "twice in one batch");
    let moved = [Change::Put(other(&[2])), Change::Put(service(vec![pool("main", 1, &[5])]))];
    assert_eq!(world.writer.apply(&moved).err(), reused(2), "passed from one service to another");
}

#[test]
fn a_generation_in_service_keeps_its_name_address_and_protocol() {
    let mut world = World::of(service(vec![pool("main", 1, &[1])]));
    let known = upstream(1);
    for changed in [
        peregrine_routing::UpstreamSpec { name: "other".into(), ..known.clone() },
        peregrine_routing::UpstreamSpec { protocol: UpstreamProtocol::H2c, ..known.clone() },
        peregrine_routing::UpstreamSpec { address: Address::Name { host: "db".into(), port: 1 }, ..known },
    ] {
        let mut pool = pool("main", 1, &[]);
        pool.upstreams.push(changed);
        let error = world.writer.apply(&[Change::Put(service(vec![pool]))]).err();
        assert_eq!(error, Some(TableError::GenerationChanged(Generation(1))));
    }
}

#[test]
fn slots_of_removed_services_are_used_again_and_never_mixed_up() {
    let (mut writer, reader) = table();
    let name = |i: usize| format!("s{i}");
    let put = |i: usize| Change::Put(named(&name(i), &[&format!("h{i}.test")], Vec::new()));
    writer.apply(&(0..300).map(put).collect::<Vec<_>>()).expect("is accepted");
    let gone: Vec<Change> = (0..300).step_by(3).map(|i| Change::Remove(name(i).into())).collect();
    writer.apply(&gone).expect("is accepted");
    writer.apply(&(300..420).map(put).collect::<Vec<_>>()).expect("is accepted");
    let table = reader.load();
    for i in 0..420 {
        let found = table.lookup(&format!("h{i}.test"), "/").map(|found| found.service.name().to_string());
        let expected = (i >= 300 || i % 3 != 0).then(|| name(i));
        assert_eq!(found, expected, "h{i}.test");
    }
    let mut count = 0;
    table.for_each_service(|_| count += 1);
    assert_eq!(count, 320);
}

#[test]
fn a_service_of_many_hosts_is_changed_in_no_more_than_linear_time() {
    // Compared pair by pair this would be 4 · 10^10 steps.
    let hosts: Vec<String> = (0..100_000).map(|i| format!("h{i}.test")).collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let mut world = World::of(named("many", &hosts, vec![pool("main", 1, &[1])]));
    world.put(named("many", &hosts[1..], vec![pool("main", 1, &[1])]));
    assert_eq!(holder_of(&world, "h0.test"), None);
    assert_eq!(holder_of(&world, "h99999.test").as_deref(), Some("many"));
    // And many prefixes of one host.
    let prefixes: Vec<String> = (0..100_000).map(|i| format!("one.test/p{i}")).collect();
    let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    world.put(named("paths", &prefixes, Vec::new()));
    let table = world.reader.load();
    let found = table.lookup("one.test", "/p4711/x").expect("is there");
    assert_eq!(&**found.path_prefix, "/p4711");
}
