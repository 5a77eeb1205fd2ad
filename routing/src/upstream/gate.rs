//! The gate of an upstream: may anybody still come in, and is anybody inside?
//!
//! One word holds both answers, so that entering and retiring have one order that every core agrees on.
//! A refused caller leaves no trace in it, not even for a moment: a gate that was seen empty stays so,
//! and the receipt that is written then cannot be contradicted by a late comer.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire},
};

const RETIRED: u64 = 1 << 63;

/// The atomic word of a gate. Its second implementation is the one of the `loom` model below.
pub(super) trait Word {
    fn read(&self) -> u64;
    fn swap_if(&self, now: u64, next: u64) -> Result<u64, u64>;
    fn set(&self, bits: u64) -> u64;
    fn decrement(&self) -> u64;
}

macro_rules! impl_word {
    ($atomic:ty) => {
        impl Word for $atomic {
            fn read(&self) -> u64 {
                self.load(Acquire)
            }
            fn swap_if(&self, now: u64, next: u64) -> Result<u64, u64> {
                self.compare_exchange_weak(now, next, AcqRel, Acquire)
            }
            fn set(&self, bits: u64) -> u64 {
                self.fetch_or(bits, AcqRel)
            }
            fn decrement(&self) -> u64 {
                self.fetch_sub(1, AcqRel)
            }
        }
    };
}

impl_word!(AtomicU64);

/// Bit 63: retired. The rest: how many are inside.
#[derive(Debug, Default)]
pub(super) struct Gate<W = AtomicU64>(W);

/// A gate at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GateState {
    pub(super) retired: bool,
    pub(super) inside: u64,
}

impl GateState {
    pub(super) const fn is_drained(self) -> bool {
        self.retired && self.inside == 0
    }
}

impl<W: Word> Gate<W> {
    /// Goes in; false once the gate is retired. Lock-free.
    pub(super) fn enter(&self) -> bool {
        let mut now = self.0.read();
        while now & RETIRED == 0 {
            match self.0.swap_if(now, now + 1) {
                Ok(_) => return true,
                Err(other) => now = other,
            }
        }
        false
    }

    /// Goes out; true for the one who leaves a retired gate empty.
    pub(super) fn leave(&self) -> bool {
        self.0.decrement() == RETIRED | 1
    }

    /// Closes the gate for good; true if nobody was inside.
    pub(super) fn retire(&self) -> bool {
        self.0.set(RETIRED) & !RETIRED == 0
    }

    /// Whoever sees the gate drained sees everything that was written before the others left.
    pub(super) fn state(&self) -> GateState {
        let word = self.0.read();
        GateState { retired: word & RETIRED != 0, inside: word & !RETIRED }
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64 as LoomU64, Ordering::Relaxed};
    use loom::thread;

    use super::*;

    impl_word!(LoomU64);

    #[derive(Default)]
    struct Visit {
        entered: bool,
        told_empty: bool,
    }

    /// `completed` is what a lease counts before it leaves, with no ordering of its own.
    fn visit(gate: &Gate<LoomU64>, completed: &LoomU64) -> Visit {
        if !gate.enter() {
            return Visit::default();
        }
        completed.fetch_add(1, Relaxed);
        Visit { entered: true, told_empty: gate.leave() }
    }

    fn retiring_is_final_and_a_drained_gate_shows_every_count<const VISITORS: usize>() {
        let model = Arc::new((Gate(LoomU64::new(0)), LoomU64::new(0)));
        let visitors = [(); VISITORS].map(|()| {
            let model = Arc::clone(&model);
            thread::spawn(move || visit(&model.0, &model.1))
        });
        let (gate, completed) = (&model.0, &model.1);
        let was_empty = gate.retire();
        assert!(!gate.enter(), "nobody enters after retire has returned");
        let seen = gate.state().is_drained().then(|| completed.load(Relaxed));
        let visits = visitors.map(|thread| thread.join().expect("no panic"));
        let entered = visits.iter().filter(|visit| visit.entered).count() as u64;
        assert!(gate.state().is_drained(), "everybody has left");
        assert_eq!(completed.load(Relaxed), entered);
        assert!(seen.is_none_or(|count| count == entered), "a drained gate hid a count");
        // Whoever waits is woken exactly once: by the retiring one, or by the last to leave.
        let told = visits.iter().filter(|visit| visit.told_empty).count() + usize::from(was_empty);
        assert_eq!(told, 1);
    }

    #[test]
    fn in_every_interleaving_with_one_visitor_retiring_is_final_and_hides_no_count() {
        loom::model(retiring_is_final_and_a_drained_gate_shows_every_count::<1>);
    }

    #[test]
    fn in_every_interleaving_of_three_preemptions_two_visitors_and_retiring_agree() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3); // without a bound it takes 15 s and finds no more
        model.check(retiring_is_final_and_a_drained_gate_shows_every_count::<2>);
    }

    #[test]
    fn in_every_interleaving_a_drained_gate_stays_drained_while_others_are_refused() {
        loom::model(|| {
            let gate = Arc::new(Gate(LoomU64::new(0)));
            gate.retire();
            let late = [(); 2].map(|()| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || {
                    assert!(!gate.enter());
                    assert!(gate.state().is_drained(), "a refused caller was seen inside");
                })
            });
            late.into_iter().for_each(|thread| thread.join().expect("no panic"));
        });
    }
}
