//! Hosts and paths are matched like the naive model matches them, whatever is in the table.

use std::collections::{HashMap, HashSet};

use peregrine_routing::{Change, HostPattern, RoutingTable, ServiceSpec, TableWriter, table};
use proptest::prelude::*;

use super::support::{named, pool};

/// The table as a list that is searched from end to end.
#[derive(Clone, Default)]
struct Model {
    /// By service: its pairs of host pattern and prefix without a trailing slash.
    services: HashMap<String, HashSet<(String, String)>>,
}

impl Model {
    fn lookup(&self, host: &str, path: &str) -> Option<(&str, &str)> {
        let all =
            self.services.iter().flat_map(|(name, routes)| routes.iter().map(move |route| (name, route)));
        all.filter(|(_, (pattern, prefix))| fits_host(pattern, host) && fits_path(prefix, path))
            .max_by_key(|(_, (pattern, prefix))| (rank(pattern, host), prefix.len()))
            .map(|(name, (_, prefix))| (name.as_str(), if prefix.is_empty() { "/" } else { prefix }))
    }

    fn put(&mut self, spec: &ServiceSpec) -> bool {
        let routes: HashSet<_> =
            spec.routes.iter().map(|r| (r.host.to_string(), merged(&r.path_prefix))).collect();
        let mut others = self.services.iter().filter(|(name, _)| **name != *spec.name);
        let is_free = others.all(|(_, theirs)| theirs.is_disjoint(&routes));
        if is_free {
            self.services.insert(spec.name.to_string(), routes);
        }
        is_free
    }
}

fn fits_host(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => host == pattern,
    }
}

fn rank(pattern: &str, host: &str) -> usize {
    if pattern == host { usize::MAX } else { pattern.len() }
}

/// Prefixes are matched with single slashes, and without one at their end.
fn merged(prefix: &str) -> String {
    prefix.split('/').filter(|part| !part.is_empty()).map(|part| format!("/{part}")).collect()
}

fn fits_path(prefix: &str, path: &str) -> bool {
    prefix.is_empty() || path == prefix || path.starts_with(&format!("{prefix}/"))
}

fn assert_same(table: &RoutingTable, model: &Model, host: &str, path: &str) -> Result<(), TestCaseError> {
    let found = table.lookup(host, path).map(|found| (&**found.service.name(), &**found.path_prefix));
    prop_assert_eq!(found, model.lookup(host, path), "{} {}", host, path);
    // What may be remembered for the host is true of every path.
    if table.lookup(host, path).is_some_and(|found| found.any_path) {
        for other in ["/", "*", "/a", "/b/a", "/a/b/-", "/ab/x"] {
            let there = table.lookup(host, other).map(|found| &**found.service.name());
            prop_assert_eq!(there, found.map(|(name, _)| name), "{} {} and {}", host, path, other);
        }
    }
    Ok(())
}

/// Names over few labels, one longer than what an entry holds in place.
fn host() -> impl Strategy<Value = String> {
    let label = prop_oneof![
        8 => "[ab]",
        1 => Just("quite-long-label-of-a-customers-own-domain".to_owned()),
    ];
    prop::collection::vec(label, 1..5).prop_map(|labels| labels.join("."))
}

fn pattern() -> impl Strategy<Value = String> {
    prop_oneof![4 => host(), 3 => host().prop_map(|host| format!("*.{host}")), 1 => Just("*".to_owned())]
}

fn path() -> impl Strategy<Value = String> {
    "(/[ab\\-]{0,2}){1,3}"
}

#[test]
fn a_host_with_one_route_for_everything_may_be_remembered_and_one_with_more_may_not() {
    let (mut writer, reader) = table();
    let web = named("web", &["one.example/", "two.example/", "*.below.example/"], vec![]);
    let api = named("api", &["two.example/api", "x.below.example/api"], vec![]);
    writer.apply(&[Change::Put(web), Change::Put(api)]).expect("applied");
    let table = reader.load();
    let any_path = |host| table.lookup(host, "/").map(|found| found.any_path);
    assert_eq!(any_path("one.example"), Some(true));
    assert_eq!(any_path("two.example"), Some(false));
    assert_eq!(any_path("y.below.example"), Some(true));
    assert_eq!(any_path("x.below.example"), Some(false), "its own route comes before the wildcard's");
    assert_eq!(any_path("none.example"), None);
}

#[derive(Clone, Debug)]
enum Step {
    Put { name: u8, routes: Vec<(String, String)> },
    Remove { name: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let routes = prop::collection::vec((pattern(), path()), 0..20);
    prop_oneof![
        4 => (0_u8..6, routes).prop_map(|(name, routes)| Step::Put { name, routes }),
        1 => (0_u8..6).prop_map(|name| Step::Remove { name }),
    ]
}

fn take(writer: &mut TableWriter, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    match step {
        Step::Put { name, routes } => {
            let routes: Vec<String> = routes.iter().map(|(host, path)| format!("{host}{path}")).collect();
            let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
            let spec = named(&format!("s{name}"), &routes, vec![pool("main", 1, &[u64::from(*name)])]);
            let is_free = model.put(&spec);
            // A generation that was retired with its service may not come back, so it has none then.
            let known = writer.upstream(peregrine_routing::Generation(u64::from(*name)));
            let spec = if known.is_some_and(|u| u.is_retired()) {
                ServiceSpec { pools: Vec::new(), ..spec }
            } else {
                spec
            };
            prop_assert_eq!(writer.apply(&[Change::Put(spec)]).is_ok(), is_free);
        }
        Step::Remove { name } => {
            let name = format!("s{name}");
            prop_assert!(writer.apply(&[Change::Remove(name.as_str().into())]).is_ok());
            model.services.remove(&name);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn every_look_up_agrees_with_the_naive_model_and_older_snapshots_stay_as_they_were(
        steps in prop::collection::vec(step(), 1..14),
        lookups in prop::collection::vec((host(), path()), 1..60),
        keep_after in 0_usize..14,
    ) {
        let (mut writer, reader) = table();
        let mut model = Model::default();
        let mut kept = (reader.load(), model.clone());
        for (i, step) in steps.iter().enumerate() {
            take(&mut writer, &mut model, step)?;
            if i == keep_after {
                kept = (reader.load(), model.clone());
            }
        }
        let now = reader.load();
        for (host, path) in &lookups {
            assert_same(&now, &model, host, path)?;
            assert_same(&kept.0, &kept.1, host, path)?;
        }
        // And where there is something to find: every route, itself and a little beside.
        for (pattern, prefix) in model.services.values().flatten() {
            let host = pattern.replace("*.", "x.").replace('*', "any.test");
            for path in [format!("{prefix}/x"), prefix.clone(), format!("{prefix}x")] {
                assert_same(&now, &model, &host, &path)?;
            }
        }
    }
}

fn found(routes: &[(&str, &[&str])], host: &str, path: &str) -> Option<String> {
    let (mut writer, reader) = table();
    for (name, routes) in routes {
        writer.apply(&[Change::Put(named(name, routes, Vec::new()))]).expect("is accepted");
    }
    reader.load().lookup(host, path).map(|found| found.service.name().to_string())
}

#[test]
fn exact_hosts_come_before_longer_wildcards_before_shorter_before_the_catch_all() {
    let routes: [(&str, &[&str]); 4] = [
        ("exact", &["shop.example.com"]),
        ("near", &["*.eu.example.com"]),
        ("far", &["*.example.com"]),
        ("any", &["*"]),
    ];
    for (host, service) in [
        ("shop.example.com", "exact"),
        ("a.eu.example.com", "near"),
        ("a.b.eu.example.com", "near"),
        ("eu.example.com", "far"),
        ("example.com", "any"),
        ("notexample.com", "any"),
        ("10.0.0.1", "any"),
    ] {
        assert_eq!(found(&routes, host, "/").as_deref(), Some(service), "{host}");
    }
}

#[test]
fn a_host_whose_prefixes_do_not_fit_lets_the_next_pattern_try() {
    let routes: [(&str, &[&str]); 3] =
        [("exact", &["a.test/api"]), ("wild", &["*.test/img"]), ("any", &["*/"])];
    assert_eq!(found(&routes, "a.test", "/api/x").as_deref(), Some("exact"));
    assert_eq!(found(&routes, "a.test", "/img").as_deref(), Some("wild"));
    assert_eq!(found(&routes, "a.test", "/other").as_deref(), Some("any"));
    assert_eq!(found(&routes[..2], "a.test", "/other"), None);
}

#[test]
fn a_host_of_most_labels_is_found_below_its_wildcard_and_an_endless_one_is_not() {
    let routes: [(&str, &[&str]); 1] = [("wild", &["*.a"])];
    let longest = vec!["a"; 127].join(".");
    assert_eq!(longest.len(), peregrine_routing::MAX_HOST_BYTES);
    assert_eq!(found(&routes, &longest, "/").as_deref(), Some("wild"));
    assert_eq!(found(&routes, &format!("a.{longest}"), "/"), None);
}

#[test]
fn a_pattern_that_was_made_without_parsing_does_no_harm() {
    let (mut writer, reader) = table();
    let mut spec = named("odd", &[], Vec::new());
    for host in ["", ".", "UPPER", &".".repeat(500), &"x".repeat(5_000)] {
        for host in [HostPattern::Exact(host.into()), HostPattern::Wildcard(host.into())] {
            spec.routes.push(peregrine_routing::RouteSpec { host, path_prefix: "/".into() });
        }
    }
    writer.apply(&[Change::Put(spec)]).expect("is accepted");
    assert!(reader.load().lookup("a.test", "/").is_none());
    writer.apply(&[Change::Remove("odd".into())]).expect("is accepted");
    assert!(reader.load().lookup("UPPER", "/").is_none());
}
