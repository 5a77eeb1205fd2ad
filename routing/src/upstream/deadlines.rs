//! Which classes of traffic have used up their time in a retired upstream. It only ever becomes more.

use std::sync::atomic::{
    AtomicU8,
    Ordering::{AcqRel, Acquire},
};

use crate::class::TrafficClass;

/// One bit per class, at its [`TrafficClass::index`].
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    closing: AtomicU8,
    cut: AtomicU8,
}

const _: () = assert!(TrafficClass::COUNT <= u8::BITS as usize, "a class has no bit");

const fn bit(class: TrafficClass) -> u8 {
    1 << class.index()
}

impl Deadlines {
    pub(super) fn close(&self, class: TrafficClass) {
        self.closing.fetch_or(bit(class), AcqRel);
    }

    /// What is cut is closing too: whoever asks for the milder of the two is not told "no".
    pub(super) fn cut(&self, class: TrafficClass) {
        self.close(class);
        self.cut.fetch_or(bit(class), AcqRel);
    }

    pub(super) fn is_closing(&self, class: TrafficClass) -> bool {
        self.closing.load(Acquire) & bit(class) != 0
    }

    pub(super) fn is_cut(&self, class: TrafficClass) -> bool {
        self.cut.load(Acquire) & bit(class) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_has_deadlines_of_its_own() {
        for class in TrafficClass::ALL {
            let deadlines = Deadlines::default();
            deadlines.close(class);
            let closing: Vec<_> =
                TrafficClass::ALL.into_iter().filter(|other| deadlines.is_closing(*other)).collect();
            assert_eq!(closing, [class]);
            assert!(TrafficClass::ALL.into_iter().all(|other| !deadlines.is_cut(other)));
            deadlines.cut(class);
            let cut: Vec<_> =
                TrafficClass::ALL.into_iter().filter(|other| deadlines.is_cut(*other)).collect();
            assert_eq!(cut, [class]);
        }
    }

    #[test]
    fn what_is_cut_is_closing_too() {
        let deadlines = Deadlines::default();
        deadlines.cut(TrafficClass::Sse);
        assert!(deadlines.is_closing(TrafficClass::Sse) && !deadlines.is_closing(TrafficClass::Request));
    }
}
