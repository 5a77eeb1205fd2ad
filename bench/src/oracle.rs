//! The exactly-once oracle: what clients were promised against what origins executed.
//!
//! An id that got a complete 2xx answer was *acknowledged* and must have been executed once, by one origin, whatever was
//! switched meanwhile. An id that failed may have been executed once (the answer was lost) or never, but not twice.
//! This module only compares; it never talks to a network.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::origin::Record;

/// How many offending ids a [`Report`] names; the counts are always complete.
pub const MAX_NAMED_IDS: usize = 20;

/// The ids of one load run that got a complete 2xx answer, as ranges of numbers: a million ids cost a few bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcknowledgedIds {
    /// The run's name: ids are `<run>-<number>`.
    pub run: String,
    /// Inclusive ranges of numbers, ascending and apart.
    pub ranges: Vec<(u64, u64)>,
}

impl AcknowledgedIds {
    /// How many ids were acknowledged.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(first, last)| last - first + 1).sum()
    }

    /// Whether nothing was acknowledged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Every acknowledged id as it was sent.
    pub fn iter(&self) -> impl Iterator<Item = String> {
        self.numbers().map(|number| format!("{}-{number}", self.run))
    }

    fn numbers(&self) -> impl Iterator<Item = u64> {
        self.ranges.iter().flat_map(|&(first, last)| first..=last)
    }
}

/// Collects acknowledged numbers at one bit each while a load runs.
#[derive(Debug, Default)]
pub(crate) struct AcknowledgedBits {
    words: Vec<u64>,
}

impl AcknowledgedBits {
    pub(crate) fn insert(&mut self, number: u64) {
        let word = usize::try_from(number / 64).expect("request numbers fit the address space");
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (number % 64);
    }

    pub(crate) fn into_ids(self, run: &str) -> AcknowledgedIds {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (at, word) in (0u64..).zip(&self.words) {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let number = at * 64 + bit;
                match ranges.last_mut() {
                    Some((_, last)) if *last + 1 == number => *last = number,
                    _ => ranges.push((number, number)),
                }
            }
        }
        AcknowledgedIds { run: run.to_owned(), ranges }
    }
}

/// The verdict of [`check_exactly_once`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Ids that clients hold a complete 2xx answer for.
    pub acknowledged: u64,
    /// Of those, ids that exactly one origin executed exactly once.
    pub executed_once: u64,
    /// Acknowledged ids that no origin has a record of: somebody else answered.
    pub missing: u64,
    /// Ids of this run, acknowledged or not, that were executed more than once.
    pub duplicated: u64,
    /// Ids of this run that were executed although the client has no 2xx answer. Allowed, but each is a request whose
    /// answer was lost.
    pub executed_unacknowledged: u64,
    /// Records of other runs, which this verdict left out.
    pub foreign: u64,
    /// The first [`MAX_NAMED_IDS`] missing ids.
    pub missing_ids: Vec<String>,
    /// The first [`MAX_NAMED_IDS`] duplicated ids with their number of executions.
    pub duplicated_ids: Vec<(String, u64)>,
}

impl Report {
    /// Whether every acknowledged id was executed exactly once and no id of the run twice.
    #[must_use]
    pub const fn is_exactly_once(&self) -> bool {
        self.missing == 0 && self.duplicated == 0 && self.executed_once == self.acknowledged
    }
}

/// Holds `acknowledged` against the `records` of all origins of the run (chain them together: an id executed by two
/// different origins is a duplicate like any other).
pub fn check_exactly_once<'a>(
    acknowledged: &AcknowledgedIds,
    records: impl IntoIterator<Item = &'a Record>,
) -> Report {
    let mut executions: HashMap<u64, u64> = HashMap::new();
    let mut foreign = 0;
    for record in records {
        match number_in_run(&record.id, &acknowledged.run) {
            Some(number) => *executions.entry(number).or_default() += 1,
            None => foreign += 1,
        }
    }
    let mut report = Report { acknowledged: acknowledged.len(), foreign, ..Report::default() };
    let mut acknowledged_and_executed = 0;
    for number in acknowledged.numbers() {
        match executions.get(&number) {
            Some(times) => {
                acknowledged_and_executed += 1;
                report.executed_once += u64::from(*times == 1);
            }
            None => {
                report.missing += 1;
                if report.missing_ids.len() < MAX_NAMED_IDS {
                    report.missing_ids.push(format!("{}-{number}", acknowledged.run));
                }
            }
        }
    }
    report.executed_unacknowledged = executions.len() as u64 - acknowledged_and_executed;
    name_duplicates(&mut report, &acknowledged.run, &executions);
    report
}

fn name_duplicates(report: &mut Report, run: &str, executions: &HashMap<u64, u64>) {
    let mut duplicates: Vec<(u64, u64)> =
        executions.iter().filter(|(_, times)| **times > 1).map(|(number, times)| (*number, *times)).collect();
    duplicates.sort_unstable();
    report.duplicated = duplicates.len() as u64;
    report.duplicated_ids = duplicates
        .into_iter()
        .take(MAX_NAMED_IDS)
        .map(|(number, times)| (format!("{run}-{number}"), times))
        .collect();
}

fn number_in_run(id: &str, run: &str) -> Option<u64> {
    id.strip_prefix(run)?.strip_prefix('-')?.parse().ok()
}

/// Reads a record file that one or several origins wrote.
///
/// # Errors
/// The file cannot be read, or a line is not a record (`InvalidData`, naming the line): a torn record would make every
/// count below a guess.
pub fn read_records(path: &Path) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    for (at, line) in BufReader::new(File::open(path)?).lines().enumerate() {
        let line = line?;
        let record = line.parse().map_err(|why| {
            let place = format!("{} line {}: {why}", path.display(), at + 1);
            io::Error::new(io::ErrorKind::InvalidData, place)
        })?;
        records.push(record);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        format!("1 {id} GET h1 1 200").parse().expect("a record line")
    }

    fn acknowledged(numbers: &[u64]) -> AcknowledgedIds {
        let mut bits = AcknowledgedBits::default();
        for number in numbers {
            bits.insert(*number);
        }
        bits.into_ids("run")
    }

    #[test]
    fn acknowledged_numbers_become_the_same_numbers_as_ranges() {
        let ids = acknowledged(&[0, 1, 2, 63, 64, 65, 200]);
        assert_eq!(ids.ranges, [(0, 2), (63, 65), (200, 200)]);
        assert_eq!(ids.len(), 7);
        assert_eq!(ids.iter().last().as_deref(), Some("run-200"));
        assert!(acknowledged(&[]).is_empty());
    }

    #[test]
    fn a_run_whose_ids_were_each_executed_once_passes() {
        let records: Vec<Record> = ["run-0", "run-1", "other-1"].map(record).into();
        let report = check_exactly_once(&acknowledged(&[0, 1]), &records);
        assert!(report.is_exactly_once(), "{report:?}");
        assert_eq!((report.executed_once, report.foreign), (2, 1));
    }

    #[test]
    fn an_acknowledged_id_that_nobody_executed_is_missing() {
        let report = check_exactly_once(&acknowledged(&[0, 1]), &[record("run-0")]);
        assert!(!report.is_exactly_once());
        assert_eq!(report.missing_ids, ["run-1"]);
    }

    #[test]
    fn an_id_executed_twice_is_a_duplicate_even_when_its_client_got_no_answer() {
        let records: Vec<Record> = ["run-0", "run-7", "run-7"].map(record).into();
        let report = check_exactly_once(&acknowledged(&[0]), &records);
        assert!(!report.is_exactly_once());
        assert_eq!(report.duplicated_ids, [("run-7".to_owned(), 2)]);
        assert_eq!(report.executed_unacknowledged, 1);
    }

    #[test]
    fn a_run_is_not_confused_with_one_whose_name_begins_alike() {
        let report = check_exactly_once(&acknowledged(&[1]), &[record("run2-1"), record("run-1")]);
        assert!(report.is_exactly_once());
        assert_eq!(report.foreign, 1);
    }

    #[test]
    fn a_torn_record_line_is_an_error_that_names_its_place() {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let path = dir.path().join("records");
        std::fs::write(&path, "1 run-0 GET h1 1 200\n17 run-1 GE\n").expect("writing");
        let error = read_records(&path).expect_err("a torn line");
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
