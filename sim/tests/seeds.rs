//! Ten thousand seeds, every seed that ever failed, and the proof that a seed is a recording.

use peregrine_sim::{SINGLE_WRITER_FROM, run, sweep, trace};

/// Seeds of one test run. Each is some ten seconds of virtual time, drawn so that they fit into a minute of two cores.
const SEEDS: u64 = 10_000;
/// Of these, worlds with a single writer besides.
const SINGLE_WRITER_SEEDS: u64 = 2_000;

/// Seeds that failed once, with what they had found.
const FAILED: &str = include_str!("failed-seeds.txt");

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[test]
fn whatever_breaks_in_ten_thousand_worlds_the_invariants_hold() {
    let summary = sweep(0..SEEDS, threads());
    println!("{summary}");
    let failed: Vec<_> = summary.failed.iter().map(|report| (report.seed, &report.violations)).collect();
    assert!(failed.is_empty(), "replay with `cargo run -p peregrine-sim -- --seed N`: {failed:#?}");
}

#[test]
fn of_a_single_writer_never_two_copies_run_and_its_clients_wait() {
    let summary = sweep(SINGLE_WRITER_FROM..SINGLE_WRITER_FROM + SINGLE_WRITER_SEEDS, threads());
    println!("{summary}");
    let failed: Vec<_> = summary.failed.iter().map(|report| (report.seed, &report.violations)).collect();
    assert!(failed.is_empty(), "replay with `cargo run -p peregrine-sim -- --seed N`: {failed:#?}");
    assert!(summary.held() > SINGLE_WRITER_SEEDS, "somebody is held in most of the worlds");
}

#[test]
fn the_same_seed_gives_the_same_run_event_by_event() {
    for seed in (0..200).chain(SINGLE_WRITER_FROM..SINGLE_WRITER_FROM + 50) {
        let (first, lines) = trace(seed);
        let (second, again) = trace(seed);
        let differs = lines.iter().zip(&again).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first, second, "seed {seed}");
        assert_eq!(first.trace_hash, run(seed).trace_hash, "seed {seed}: writing the trace down changes it");
    }
}

#[test]
fn another_seed_gives_another_run() {
    assert_ne!(run(1).trace_hash, run(2).trace_hash);
}

#[test]
fn every_seed_that_ever_failed_passes() {
    let seeds: Vec<u64> = FAILED
        .lines()
        .filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty())
        .map(|line| line.split_whitespace().next().unwrap_or_default().parse().expect("a seed comes first"))
        .collect();
    assert!(!seeds.is_empty(), "the list is there to be read");
    for seed in seeds {
        let report = run(seed);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
    }
}
