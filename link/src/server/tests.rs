//! What is written down of edges while several things happen to them at once.

use std::sync::Barrier;

use tempfile::TempDir;

use super::*;
use crate::authority::fresh_key;
use crate::wire::{self, Attach};

/// So often two things happen at the same moment. One of some rounds shows what is wrong.
const ROUNDS: u64 = 40;
const EDGE: &str = "edge-1";

fn opened() -> (TempDir, Shared) {
    let folder = tempfile::tempdir().expect("a folder");
    let shared = opened_at(folder.path(), 1);
    (folder, shared)
}

/// As an engine of that epoch finds it.
fn opened_at(folder: &Path, epoch: u64) -> Shared {
    let config = LinkConfig::new(([127, 0, 0, 1], 0).into(), epoch, Arc::new(|| 1_000));
    let registry = Registry::open(folder, epoch).expect("a registry");
    let known = registry.edges().expect("a list").into_iter();
    let edges = known.map(|(name, record)| (name, Edge::new(record))).collect();
    Shared {
        config,
        authority: Authority::open(folder).expect("an authority"),
        registry,
        reader: peregrine_routing::table().1,
        edges: Mutex::new(edges),
        kept: OnceLock::new(),
        secrets: OnceLock::new(),
        writing: Mutex::default(),
    }
}

/// Lets an edge in; the fingerprint of its certificate.
fn admit(shared: &Shared) -> String {
    let invite = shared.registry.invite(&shared.authority, EDGE, 60_000).expect("a token");
    shared.admit(&invite.token.secret, fresh_key().expect("a key").1).expect("it is let in");
    shared.edges()[EDGE].record.fingerprint.clone()
}

fn attach(shared: &Shared, print: &str, incarnation: u64) -> bool {
    attach_beside(shared, print, incarnation, &[], false)
}

fn attach_beside(shared: &Shared, print: &str, incarnation: u64, beside: &[u64], handed_over: bool) -> bool {
    let beside = beside.to_vec();
    let attach = Attach { version: wire::VERSION, incarnation, cores: 1, epoch: 1, beside, handed_over };
    shared.attach(EDGE, print, ([127, 0, 0, 1], 1).into(), &attach).is_some()
}

/// Both at the same moment.
fn at_once(one: impl FnOnce() + Send, other: impl FnOnce()) {
    let together = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            together.wait();
            one();
        });
        together.wait();
        other();
    });
}

#[test]
fn an_edge_that_is_removed_while_it_attaches_does_not_come_back_with_the_next_start() {
    let (_folder, shared) = opened();
    let handle = LinkHandle { shared: Arc::new(shared) };
    for round in 0..ROUNDS {
        let print = admit(&handle.shared);
        let comes = || {
            attach(&handle.shared, &print, round);
        };
        at_once(comes, || handle.remove(EDGE).expect("it is there"));
        assert_eq!(handle.shared.registry.edges().expect("a list"), [], "round {round}");
        assert!(handle.edges().is_empty());
    }
}

#[test]
fn what_is_written_down_of_an_edge_is_what_is_known_of_it_whoever_was_first() {
    let (_folder, mut shared) = opened();
    shared.config.lease_ms = 0;
    let print = admit(&shared);
    for round in 0..ROUNDS {
        assert!(attach(&shared, &print, round));
        let comes_back = || {
            attach(&shared, &print, round);
        };
        at_once(comes_back, || shared.look_at_leases(Duration::ZERO));
        let known = shared.edges()[EDGE].record.clone();
        assert_eq!(shared.registry.edges().expect("a list"), [(EDGE.to_owned(), known)], "round {round}");
    }
}

#[test]
fn an_edge_whose_name_was_given_to_another_one_meanwhile_does_not_get_its_place() {
    let (_folder, shared) = opened();
    let first = admit(&shared);
    assert!(attach(&shared, &first, 1));
    let second = admit(&shared);
    assert!(!attach(&shared, &first, 1), "its certificate is of before");
    assert!(attach(&shared, &second, 2));
    assert_eq!(shared.edges()[EDGE].record.incarnation, Some(2));
}

#[test]
fn an_engine_that_was_replaced_takes_nobody_in_and_uses_up_no_token() {
    let (folder, first) = opened();
    let print = admit(&first);
    let invite = first.registry.invite(&first.authority, "edge-2", 60_000).expect("a token");
    let second = opened_at(folder.path(), 2);
    assert!(!attach(&first, &print, 1), "it is the other one's");
    let key = || fresh_key().expect("a key").1;
    let late = first.admit(&invite.token.secret, key());
    assert!(matches!(late, Err(RegistryError::Replaced { ours: 1, theirs: 2 })), "{late:?}");
    assert!(attach(&second, &print, 1));
    second.admit(&invite.token.secret, key()).expect("it is still good");
}

/// Its processes, the last one last, as they are known and as they are written down.
fn processes(shared: &Shared) -> Vec<u64> {
    let known: Vec<u64> =
        shared.edges()[EDGE].processes.iter().map(|process| process.remote.id().0).collect();
    let record = shared.registry.edges().expect("a list").swap_remove(0).1;
    let kept = record.beside.iter().map(|(incarnation, _)| *incarnation).chain(record.incarnation);
    assert_eq!(kept.collect::<Vec<_>>(), known);
    known
}

#[test]
fn a_process_that_comes_takes_the_place_of_those_that_do_not_live_beside_it() {
    let (_folder, shared) = opened();
    let print = admit(&shared);
    assert!(attach(&shared, &print, 1));
    assert!(attach_beside(&shared, &print, 2, &[1], false));
    assert_eq!(processes(&shared), [1, 2]);
    // They come back in any order, and nothing changes.
    assert!(attach_beside(&shared, &print, 1, &[], true) && attach_beside(&shared, &print, 2, &[1], false));
    assert_eq!(processes(&shared), [1, 2]);
    assert!(attach_beside(&shared, &print, 3, &[1, 2], false));
    assert_eq!(processes(&shared), [1, 2, 3]);
    // Started anew after a crash: it knows of nobody.
    assert!(attach(&shared, &print, 4));
    assert_eq!(processes(&shared), [4]);
    // One that was given up, and has handed over long ago, comes back: it is not the edge.
    assert!(attach_beside(&shared, &print, 2, &[1], true));
    assert_eq!(processes(&shared), [2, 4]);
}
