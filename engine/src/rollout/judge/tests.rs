//! Shifts simulated from seeds: equal copies are hardly ever stopped, worse ones soon. A figure that a test
//! asserts is printed (`--nocapture`), so that it can be quoted.

use std::sync::Arc;

use peregrine_routing as routing;

use super::*;

/// Between two looks of a simulated shift.
const LOOK_MS: u64 = 25;

/// SplitMix64: a failing seed can be looked at.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to 1.
    fn unit(&mut self) -> f64 {
        (self.roll() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll() as usize % of.len()]
    }

    /// Failures of `n` requests.
    fn failures(&mut self, n: u64, p: f64) -> u64 {
        if p <= 0.0 {
            return 0;
        }
        // Gaps between failures are geometric: a draw for each failure, not for each request.
        let (mut at, mut failed) = (0.0, 0);
        loop {
            at += (1.0 - self.unit()).ln() / (1.0 - p).ln();
            if at >= n as f64 {
                return failed;
            }
            (at, failed) = (at.floor() + 1.0, failed + 1);
        }
    }
}

fn plain(answered: u64, failed: u64) -> OutcomeCounts {
    OutcomeCounts { responses: [0, answered - failed, 0, 0, failed], ..OutcomeCounts::default() }
}

fn reading(new: (u64, u64), old: (u64, u64)) -> Reading {
    Reading { new: plain(new.0, new.1), old: plain(old.0, old.1) }
}

fn terms(guards: &Guards) -> Terms<'_> {
    Terms { guards, min_samples: 20, side_by_side: true }
}

/// How a simulated stretch at one weight came out.
#[derive(Debug, PartialEq)]
enum End {
    Failed { requests: u64, new_requests: u64 },
    Held,
    Passed,
}

/// `requests` at `share`, looked at in blocks of `per_look`; errors only.
fn at_one_weight(dice: &mut Dice, share: f64, rates: (f64, f64), requests: u64, per_look: u64) -> End {
    let guards = Guards::default();
    let mut judge = Judge::default();
    let (mut new, mut old) = ((0, 0), (0, 0));
    judge.begin_step(0, Reading::default());
    let mut at_ms = 0;
    while new.0 + old.0 < requests {
        at_ms += LOOK_MS;
        let of_new = (0..per_look).filter(|_| dice.chance(share)).count() as u64;
        new = (new.0 + of_new, new.1 + dice.failures(of_new, rates.0));
        let of_old = per_look - of_new;
        old = (old.0 + of_old, old.1 + dice.failures(of_old, rates.1));
        let now = reading(new, old);
        judge.look(at_ms, &now, &guards);
        if let Verdict::Fail(_) = judge.verdict(&now, terms(&guards)) {
            return End::Failed { requests: new.0 + old.0, new_requests: new.0 };
        }
    }
    match judge.verdict(&reading(new, old), terms(&guards)) {
        Verdict::Pass => End::Passed,
        _ => End::Held,
    }
}

#[test]
fn of_ten_thousand_long_looks_at_equal_copies_at_most_one_in_twenty_is_stopped() {
    const SHIFTS: u64 = 10_000;
    let mut stopped = 0;
    for seed in 0..SHIFTS {
        let mut dice = Dice::new(seed);
        let rate = dice.pick(&[0.0005, 0.002, 0.01, 0.05, 0.3]);
        let share = dice.pick(&[0.01, 0.05, 0.1, 0.5]);
        let end = at_one_weight(&mut dice, share, (rate, rate), 20_000, 400);
        stopped += u64::from(matches!(end, End::Failed { .. }));
    }
    println!("errors: {stopped} of {SHIFTS} shifts of equal copies stopped");
    assert!(
        stopped * 50 <= SHIFTS,
        "{stopped} of {SHIFTS} shifts of equal copies were stopped; 2 % are granted"
    );
}

#[test]
fn two_percent_more_errors_at_five_percent_weight_are_stopped_within_three_thousand_answers_of_the_new_copies()
 {
    const SHIFTS: u64 = 400;
    for base in [0.0, 0.001, 0.005, 0.01, 0.02] {
        let (mut stopped, mut needed) = (0, Vec::new());
        for seed in 0..SHIFTS {
            let mut dice = Dice::new(seed);
            // Until the new copies have answered 3,000 of them.
            if let End::Failed { new_requests, .. } =
                at_one_weight(&mut dice, 0.05, (base + 0.02, base), 60_000, 200)
            {
                stopped += u64::from(new_requests <= 3_000);
                needed.push(new_requests);
            }
        }
        needed.sort_unstable();
        let (half, most) = (needed[needed.len() / 2], needed[needed.len() * 19 / 20]);
        println!(
            "+2 % on {:.1} %: {stopped} of {SHIFTS} stopped; after {half} answers of the new copies in half, \
             {most} in 95 % of them",
            base * 100.0
        );
        assert!(stopped * 100 >= SHIFTS * 95, "base {base}: only {stopped} of {SHIFTS} were stopped");
    }
}

/// Of 3,000 requests in all, 150 reach the new copies and 3 of them fail. In 5 % of the cases none does, and in
/// 15 % one: no test can call that proven. What is not proven is held, not passed.
#[test]
fn two_percent_more_errors_at_five_percent_weight_are_not_passed_within_three_thousand_requests_in_all() {
    const SHIFTS: u64 = 4_000;
    let (mut failed, mut passed) = (0_u64, 0_u64);
    for seed in 0..SHIFTS {
        match at_one_weight(&mut Dice::new(seed), 0.05, (0.02, 0.0), 3_000, 25) {
            End::Failed { requests, .. } => {
                assert!(requests <= 3_000);
                failed += 1;
            }
            End::Held => {}
            End::Passed => passed += 1,
        }
    }
    println!(
        "+2 % on 0 %, 3,000 requests in all: {failed} of {SHIFTS} sent back, {passed} passed, the rest held"
    );
    assert!(failed * 100 >= SHIFTS * 70, "only {failed} of {SHIFTS} were sent back");
    assert!(passed * 100 <= SHIFTS * 7, "{passed} of {SHIFTS} were passed");
}

/// Two copies with a whole edge's counters, on a machine that stalls.
struct Sides {
    new: Arc<routing::Upstream>,
    old: Arc<routing::Upstream>,
    _writer: routing::TableWriter,
}

impl Sides {
    fn new() -> Self {
        let (mut writer, _reader) = routing::table();
        let upstream = |generation: u64| routing::UpstreamSpec {
            generation: routing::Generation(generation),
            name: "copy".into(),
            address: routing::Address::Socket(([127, 0, 0, 1], 1).into()),
            protocol: routing::UpstreamProtocol::Http1,
            weight: 1,
            ready_connections: 0,
        };
        let pool = routing::PoolSpec {
            name: "pool".into(),
            weight: 1,
            standby: false,
            upstreams: vec![upstream(1), upstream(2)],
        };
        writer
            .apply(&[routing::Change::Put(routing::ServiceSpec {
                name: "shop".into(),
                routes: Vec::new(),
                pools: vec![pool],
                balance: routing::Balance::default(),
                policy: routing::ServicePolicy::default(),
            })])
            .expect("the table takes it");
        let of =
            |generation| Arc::clone(writer.upstream(routing::Generation(generation)).expect("it is there"));
        Self { new: of(1), old: of(2), _writer: writer }
    }

    fn reading(&self) -> Reading {
        Reading { new: self.new.outcomes(), old: self.old.outcomes() }
    }
}

/// How a copy answers.
#[derive(Clone, Copy)]
struct Manner {
    base_us: u64,
    error_rate: f64,
    /// Chance that a stall begins at a look: everything that is answered in it takes longer.
    stalls: f64,
    stall_us: u64,
}

fn answer(dice: &mut Dice, copy: &routing::Upstream, manner: Manner, stalled: bool, error_rate: f64) {
    let mut latency_us = manner.base_us + dice.roll() % manner.base_us;
    if dice.chance(0.03) {
        latency_us += dice.roll() % 60_000; // a heavy tail
    }
    if stalled {
        latency_us += manner.stall_us / 2 + dice.roll() % manner.stall_us;
    }
    let status = if dice.chance(error_rate) { 500 } else { 200 };
    copy.record(routing::Outcome::Response { status, latency_us }, &routing::Passive::default(), 1);
}

/// A shift with the default steps, with a hold that ends after ten seconds of simulated time.
fn shift(dice: &mut Dice, rate_per_s: u64, new: Manner, old: Manner) -> End {
    const HELD_FOR_MS: u64 = 10_000;
    let settings = crate::model::MoveSettings::default();
    let sides = Sides::new();
    let mut judge = Judge::default();
    let (mut at_ms, mut requests) = (0, 0_u64);
    let (mut new_stalled, mut old_stalled, mut shared) = (0_u32, 0_u32, 0_u32);
    for percent in &settings.steps {
        judge.begin_step(at_ms, sides.reading());
        let begun = at_ms;
        loop {
            at_ms += LOOK_MS;
            let stall = |left: &mut u32, dice: &mut Dice, p: f64| {
                *left = if *left > 0 {
                    *left - 1
                } else {
                    u32::from(dice.chance(p)) * (1 + dice.roll() as u32 % 6)
                };
                *left > 0
            };
            let new_stalls = stall(&mut new_stalled, dice, new.stalls);
            let old_stalls = stall(&mut old_stalled, dice, old.stalls);
            // Now and then something behind both of them fails.
            let trouble = if stall(&mut shared, dice, 0.01) { 0.2 } else { 0.0 };
            for _ in 0..rate_per_s * LOOK_MS / 1_000 {
                requests += 1;
                if dice.chance(f64::from(*percent) / 100.0) {
                    answer(dice, &sides.new, new, new_stalls, new.error_rate + trouble);
                } else {
                    answer(dice, &sides.old, old, old_stalls, old.error_rate + trouble);
                }
            }
            let now = sides.reading();
            judge.look(at_ms, &now, &settings.guards);
            let terms = Terms {
                guards: &settings.guards,
                min_samples: u64::from(settings.step_min_samples),
                side_by_side: *percent < 100,
            };
            let held_ms = at_ms - begun;
            match judge.verdict(&now, terms) {
                Verdict::Fail(_) => {
                    return End::Failed { requests, new_requests: now.new.samples() };
                }
                Verdict::Pass if held_ms >= u64::from(settings.step_hold_ms) => break,
                Verdict::TooFew if held_ms >= u64::from(settings.step_max_ms) => break,
                Verdict::Suspicion(_) if held_ms >= HELD_FOR_MS => return End::Held,
                _ => {}
            }
        }
    }
    End::Passed
}

const WELL: Manner = Manner { base_us: 1_000, error_rate: 0.0, stalls: 0.0, stall_us: 1 };

#[test]
fn of_ten_thousand_shifts_of_equal_copies_on_a_busy_machine_at_most_one_in_twenty_is_stopped() {
    const SHIFTS: u64 = 10_000;
    let (mut stopped, mut held) = (0, 0);
    for seed in 0..SHIFTS {
        let mut dice = Dice::new(seed);
        let rate_per_s = dice.pick(&[40, 200, 400, 1_000]);
        let manner = Manner {
            base_us: dice.pick(&[500, 2_000, 20_000]),
            error_rate: dice.pick(&[0.0, 0.001, 0.01, 0.03]),
            stalls: dice.pick(&[0.0, 0.01, 0.03]),
            stall_us: dice.pick(&[20_000, 100_000, 400_000]),
        };
        match shift(&mut dice, rate_per_s, manner, manner) {
            End::Failed { .. } => stopped += 1,
            End::Held => held += 1,
            End::Passed => {}
        }
    }
    println!("busy machine: {stopped} of {SHIFTS} shifts of equal copies stopped, {held} held for 10 s");
    assert!(
        stopped * 20 <= SHIFTS,
        "{stopped} of {SHIFTS} shifts of equal copies were stopped; 5 % are granted"
    );
    assert!(held * 20 <= SHIFTS, "{held} of {SHIFTS} shifts of equal copies were still held after 10 s");
}

#[test]
fn a_copy_that_answers_five_times_more_slowly_is_stopped_and_hardly_ever_gets_half_of_the_traffic() {
    const SHIFTS: u64 = 200;
    let mut stopped = 0;
    let mut most = 0;
    for seed in 0..SHIFTS {
        let mut dice = Dice::new(seed);
        let slow = Manner { base_us: 50_000, ..WELL };
        let old = Manner { base_us: 10_000, stalls: 0.01, stall_us: 50_000, ..WELL };
        if let End::Failed { requests, new_requests } = shift(&mut dice, 1_000, slow, old) {
            stopped += 1;
            most = most.max(new_requests * 100 / requests);
        }
    }
    println!("five times slower: {stopped} of {SHIFTS} stopped, with at most {most} % of the requests");
    assert!(stopped * 100 >= SHIFTS * 95, "only {stopped} of {SHIFTS} were stopped");
    assert!(most < 50, "{most} % of the requests were slow");
}

#[test]
fn a_copy_that_fails_every_request_is_found_out_within_a_few() {
    let guards = Guards::default();
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    let now = reading((4, 4), (400, 0));
    judge.look(BLOCK_IS_OVER_MS, &now, &guards);
    assert!(matches!(judge.verdict(&now, terms(&guards)), Verdict::Fail(_)));
}

/// Long enough for any block.
const BLOCK_IS_OVER_MS: u64 = 1_000;

#[test]
fn one_failed_request_is_a_suspicion_that_good_ones_clear() {
    let guards = Guards::default();
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    let now = reading((20, 1), (400, 0));
    judge.look(BLOCK_IS_OVER_MS, &now, &guards);
    let Verdict::Suspicion(why) = judge.verdict(&now, terms(&guards)) else { panic!("it is held") };
    assert!(why.starts_with("1 of 20 requests failed on the new copies, 0 of 400 on the old ones"), "{why}");
    let now = reading((300, 1), (6_000, 0));
    judge.look(2 * BLOCK_IS_OVER_MS, &now, &guards);
    assert_eq!(judge.verdict(&now, terms(&guards)), Verdict::Pass);
}

#[test]
fn both_sides_failing_alike_is_not_the_new_copys_fault() {
    let guards = Guards::default();
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    let now = reading((200, 100), (1_000, 500));
    judge.look(BLOCK_IS_OVER_MS, &now, &guards);
    assert_eq!(judge.verdict(&now, terms(&guards)), Verdict::Pass);
}

#[test]
fn a_difference_that_is_allowed_is_never_a_failure_however_sure_it_is() {
    let guards = Guards { error_ratio_increase: 0.05, ..Guards::default() };
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    let now = reading((10_000, 400), (10_000, 0));
    judge.look(BLOCK_IS_OVER_MS, &now, &guards);
    assert!(!matches!(judge.verdict(&now, terms(&guards)), Verdict::Fail(_)));
}

#[test]
fn without_any_request_there_is_neither_pass_nor_fail() {
    let guards = Guards::default();
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    for look in 1..=100 {
        judge.look(look * BLOCK_IS_OVER_MS, &Reading::default(), &guards);
        assert_eq!(judge.verdict(&Reading::default(), terms(&guards)), Verdict::TooFew);
    }
}

#[test]
fn without_an_old_side_at_the_same_time_what_it_did_before_is_the_measure() {
    let guards = Guards::default();
    let alone = Terms { guards: &guards, min_samples: 20, side_by_side: false };
    for (new, fails) in [((200, 4), false), ((200, 20), true), ((20, 20), true), ((3, 1), false)] {
        let mut judge = Judge::default();
        judge.begin_step(0, reading((50, 0), (2_000, 10)));
        let now = reading((50 + new.0, new.1), (2_000, 10));
        judge.look(BLOCK_IS_OVER_MS, &now, &guards);
        assert_eq!(matches!(judge.verdict(&now, alone), Verdict::Fail(_)), fails, "{new:?}");
    }
}

#[test]
fn a_copy_that_goes_bad_after_a_long_good_time_is_found_out_too() {
    let guards = Guards::default();
    let mut judge = Judge::default();
    judge.begin_step(0, Reading::default());
    let mut dice = Dice::new(7);
    let (mut new, mut old) = ((0, 0), (0, 0));
    let mut at_ms = 0;
    let mut go = |rate: f64, looks: u64, judge: &mut Judge| {
        for look in 0..looks {
            at_ms += 100;
            new = (new.0 + 10, new.1 + dice.failures(10, rate));
            old = (old.0 + 90, old.1 + dice.failures(90, 0.01));
            let now = reading(new, old);
            judge.look(at_ms, &now, &guards);
            if let Verdict::Fail(why) = judge.verdict(&now, terms(&guards)) {
                return Some((look, why));
            }
        }
        None
    };
    assert_eq!(go(0.01, 6_000, &mut judge), None, "ten minutes of equal copies");
    let found = go(0.2, 1_200, &mut judge).expect("two minutes of a bad one");
    println!("found after {} ms: {}", found.0 * 100, found.1);
}
