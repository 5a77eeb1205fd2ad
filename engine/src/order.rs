//! The order of a rollout: which step may follow which, where the traffic is, how a step is undone, and which way
//! to go when a copy dies. One table and two pure functions; the executor follows them, and so does the exhaustive
//! model in `sim/tests/model.rs`, so that what was checked there is what runs here.

use crate::model::{Phase, Step};

/// A kind of step. The order is the order in which a plan has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are those of `Step`")]
pub enum Kind {
    Claim,
    Prepare,
    Hold,
    Stop,
    Start,
    Warm,
    Shift,
    Drain,
    Soak,
    Switch,
    Release,
}

/// Which copies have the traffic once a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// The old ones alone.
    Old,
    /// Both, by weight.
    Both,
    /// The new ones alone.
    New,
}

/// How a step is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Undo {
    /// There is nothing to undo.
    Nothing,
    /// The copy that it started is removed.
    Remove,
    /// The copy that it stopped is started again. No copy that was started since runs any more.
    Restart,
    /// Requests that are held are released to the old copies.
    Release,
    /// The old copies get all of the traffic back, then the new ones are drained. Once for all such steps.
    Traffic,
}

/// What holds of a kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The kind.
    pub kind: Kind,
    /// The phase that people see.
    pub phase: Phase,
    /// There may be several in a row.
    pub repeats: bool,
    /// Where the traffic is when it is done.
    pub traffic: Traffic,
    /// How it is undone.
    pub undo: Undo,
    /// While it is done, the health of both sides decides which way to go.
    pub by_health: bool,
    /// There is a way back from it inside the rollout.
    pub returns: bool,
}

const fn row(kind: Kind, phase: Phase, traffic: Traffic, undo: Undo) -> Row {
    let repeats = matches!(kind, Kind::Prepare | Kind::Stop | Kind::Start | Kind::Shift | Kind::Release);
    let by_health = matches!(kind, Kind::Shift | Kind::Drain | Kind::Soak | Kind::Release);
    Row {
        kind,
        phase,
        repeats,
        traffic,
        undo,
        by_health,
        returns: !matches!(kind, Kind::Switch | Kind::Release),
    }
}

/// Every kind, in order.
pub const TABLE: [Row; 11] = [
    row(Kind::Claim, Phase::Plan, Traffic::Old, Undo::Nothing), // the claim goes with the rollout's end
    row(Kind::Prepare, Phase::Prepare, Traffic::Old, Undo::Nothing), // others may share the image; it costs nothing
    row(Kind::Hold, Phase::Drain, Traffic::Old, Undo::Release),
    row(Kind::Stop, Phase::Drain, Traffic::Old, Undo::Restart),
    row(Kind::Start, Phase::Start, Traffic::Old, Undo::Remove),
    row(Kind::Warm, Phase::Warm, Traffic::Old, Undo::Nothing),
    row(Kind::Shift, Phase::Shift, Traffic::Both, Undo::Traffic),
    row(Kind::Drain, Phase::Drain, Traffic::New, Undo::Traffic),
    row(Kind::Soak, Phase::Soak, Traffic::New, Undo::Traffic),
    row(Kind::Switch, Phase::Shift, Traffic::New, Undo::Nothing), // the old copy is stopped: there is none to go back to
    row(Kind::Release, Phase::Release, Traffic::New, Undo::Nothing),
];

impl Kind {
    /// Its row.
    #[must_use]
    pub const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// Whether somebody may notice that a step of this kind was done, so that its undo is a way back and not merely
    /// a failure.
    #[must_use]
    pub const fn is_noticed(self) -> bool {
        !matches!(self.row().traffic, Traffic::Old)
            || matches!(self.row().undo, Undo::Release | Undo::Restart)
    }

    /// Whether a step of kind `next` may come after one of this kind.
    #[must_use]
    pub fn may_precede(self, next: Self) -> bool {
        self < next || (self == next && self.row().repeats)
    }
}

impl Step {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Claim => Kind::Claim,
            Self::Prepare { .. } => Kind::Prepare,
            Self::Hold => Kind::Hold,
            Self::Stop { .. } => Kind::Stop,
            Self::Start { .. } => Kind::Start,
            Self::Warm => Kind::Warm,
            Self::Shift { .. } => Kind::Shift,
            Self::Drain => Kind::Drain,
            Self::Soak => Kind::Soak,
            Self::Switch => Kind::Switch,
            Self::Release { .. } => Kind::Release,
        }
    }
}

/// The steps to undo, by index, the latest first, of a plan of which those that pass `begun` were begun, settled or
/// not. Steps that one deed undoes together come once.
#[must_use]
pub fn to_undo(steps: &[Kind], begun: impl Fn(usize) -> bool) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..steps.len()).filter(|index| begun(*index)).rev().collect();
    let mut traffic_undone = false;
    indices.retain(|index| match steps[*index].row().undo {
        Undo::Traffic => !std::mem::replace(&mut traffic_undone, true),
        Undo::Nothing | Undo::Remove | Undo::Restart | Undo::Release => true,
    });
    indices
}

/// How a copy, or a side, is. The order is the order of badness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vital {
    /// It runs, and nothing speaks against it.
    #[default]
    Good,
    /// It runs and does badly.
    Unwell,
    /// It does not run.
    Dead,
}

/// Whether the health of both sides sends a rollout back in a step of this kind: the new side does badly, and the
/// old one no worse. Of two alike, the one that is known is kept. Once a step was begun from which nothing
/// [returns](Row::returns), nobody asks any more.
#[must_use]
pub fn turns_back(kind: Kind, old: Option<Vital>, new: Option<Vital>) -> bool {
    let new = new.unwrap_or_default();
    kind.row().by_health && new != Vital::Good && old.is_none_or(|old| old <= new)
}

/// Whether going (further) back would bring the traffic to dead copies while the new ones are well.
#[must_use]
pub fn is_stranded(old: Option<Vital>, new: Option<Vital>) -> bool {
    old == Some(Vital::Dead) && new == Some(Vital::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_row() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!((row.kind as usize, row.kind.row()), (index, row));
        }
    }

    #[test]
    fn traffic_never_goes_back_on_the_way_forward() {
        let rank = |row: &Row| row.traffic as u8;
        assert!(TABLE.windows(2).all(|pair| rank(&pair[0]) <= rank(&pair[1])));
    }

    #[test]
    fn whatever_moves_traffic_is_undone_by_moving_it_back_until_there_is_no_way_back() {
        for row in TABLE.iter().filter(|row| row.returns) {
            assert_eq!(row.traffic != Traffic::Old, row.undo == Undo::Traffic, "{row:?}");
        }
    }

    #[test]
    fn steps_are_undone_the_latest_first_and_the_traffic_once() {
        let steps = [Kind::Claim, Kind::Start, Kind::Warm, Kind::Shift, Kind::Shift, Kind::Drain];
        assert_eq!(to_undo(&steps, |index| index < 5), [4, 2, 1, 0]);
        assert_eq!(to_undo(&steps, |index| index < 2), [1, 0]);
    }
}
