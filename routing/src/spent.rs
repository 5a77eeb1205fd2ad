//! Generations that were retired and forgotten. They are given out in order, so ranges hold them all in
//! the memory of a few.

use std::collections::BTreeMap;

use crate::upstream::Generation;

/// A set of numbers as ranges: first to last, both in it.
#[derive(Debug, Default)]
pub(crate) struct Spent(BTreeMap<u64, u64>);

impl Spent {
    pub(crate) fn contains(&self, Generation(number): Generation) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, last)| *last >= number)
    }

    pub(crate) fn add(&mut self, generation: Generation) {
        if self.contains(generation) {
            return;
        }
        let Generation(number) = generation;
        let after = number.checked_add(1).and_then(|next| self.0.remove(&next));
        let last = after.unwrap_or(number);
        match self.0.range_mut(..number).next_back().filter(|(_, end)| **end + 1 == number) {
            Some((_, end)) => *end = last,
            None => {
                self.0.insert(number, last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_given_out_in_order_are_one_range() {
        let mut spent = Spent::default();
        // Not quite in order: every second one is let go of first.
        (0..10_000).step_by(2).chain((1..10_000).step_by(2)).for_each(|g| spent.add(Generation(g)));
        assert_eq!(spent.0.len(), 1);
        assert!(!spent.contains(Generation(10_000)));
    }

    proptest! {
        #[test]
        fn it_is_a_set(added in prop::collection::vec(prop_oneof![0_u64..50, Just(u64::MAX)], 0..80)) {
            let (mut spent, mut model) = (Spent::default(), BTreeSet::new());
            for number in added {
                spent.add(Generation(number));
                model.insert(number);
            }
            for number in (0..50).chain([u64::MAX]) {
                prop_assert_eq!(spent.contains(Generation(number)), model.contains(&number));
            }
        }
    }
}
