//! The audit: who asked for what, how it ended (with the receipt), and which late writes were refused.
//!
//! Entries are numbered from 1 and never changed. Each is one line of JSON that ends with its own hash:
//!
//! ```text
//!   {"number":7,"at":…,"service":…,"rollout":…,"act":{…},"previous":"HASH OF 6","hash":"SHA-256 of all before ,"hash""}
//! ```
//!
//! The hash is over the very bytes that are stored, which hold the hash of the entry before: nobody can change a
//! byte of one without changing all that follow, and the newest hash is kept beside them. Nothing is encoded
//! anew to verify it, so entries of earlier versions stay what they are.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::model::{Control, Receipt, RolloutId, RolloutKind, RolloutState, UnixMs};

/// Entries that are kept: some thousand rollouts, about 20 MB. The chain then begins at a later number.
pub const MAX_AUDIT_ENTRIES: u64 = 20_000;

/// `previous` of the first entry.
const NOTHING_BEFORE: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// What stands before the hash at the end of an entry.
const HASH_KEY: &str = r#","hash":""#;
/// What stands after it.
const END: &str = r#""}"#;

/// One entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// 1, 2, 3, …
    pub number: u64,
    /// When.
    pub at: UnixMs,
    /// Service, if it is about one.
    pub service: Option<String>,
    /// Rollout, if it is about one.
    pub rollout: Option<RolloutId>,
    /// What was done.
    pub act: AuditAct,
    /// Hash of the entry before, in hex.
    pub previous: String,
    /// SHA-256 of this entry without this field, in hex.
    pub hash: String,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AuditAct {
    /// A rollout was asked for and accepted.
    Asked {
        /// Kind.
        kind: RolloutKind,
        /// Who asked, and why, in the asker's words.
        reason: String,
        /// Hash of the plan.
        plan: String,
    },
    /// A running rollout was steered.
    Steered {
        /// Which way.
        control: Control,
    },
    /// A rollout ended.
    Ended {
        /// How.
        state: RolloutState,
        /// Code of the reason, unless it succeeded.
        problem: Option<String>,
        /// What it amounted to.
        receipt: Option<Box<Receipt>>,
    },
    /// What an ended rollout had left was cleaned up.
    CleanedUp {
        /// How much is still left.
        left: usize,
    },
    /// Something was not done, because somebody with a higher epoch was there before.
    Refused {
        /// What, by whom.
        what: String,
    },
    /// A service's settings were changed without a rollout.
    SettingsChanged {},
    /// A machine was added or changed.
    MachineAdded {
        /// Machine.
        machine: String,
    },
    /// A machine was removed.
    MachineRemoved {
        /// Machine.
        machine: String,
    },
    /// The store was restored from a backup.
    StoreRestored {
        /// Revision of the backup.
        revision: u64,
    },
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Entries that were looked at.
    pub entries: u64,
    /// Oldest number; 0 without entries.
    pub first: u64,
    /// Newest number; 0 without entries.
    pub last: u64,
    /// Hash of the newest entry: whoever notes it elsewhere can tell later that nothing before it was changed.
    pub hash: String,
    /// What is wrong; empty is what "verified" means.
    pub broken: Vec<AuditBreak>,
}

/// An entry that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditBreak {
    /// Its number.
    pub entry: u64,
    /// What is wrong with it.
    pub what: String,
}

/// Where the chain stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    /// Newest number; 0 before the first.
    pub number: u64,
    /// Its hash.
    pub hash: String,
}

impl Default for AuditHead {
    fn default() -> Self {
        Self { number: 0, hash: NOTHING_BEFORE.to_owned() }
    }
}

/// Seals the entry after `head`: its bytes, and the new head.
pub(crate) fn seal(
    head: &AuditHead,
    at: UnixMs,
    service: Option<&str>,
    rollout: Option<&RolloutId>,
    act: AuditAct,
) -> (Bytes, AuditHead) {
    #[derive(Serialize)]
    struct Unsealed<'a> {
        number: u64,
        at: UnixMs,
        service: Option<&'a str>,
        rollout: Option<&'a RolloutId>,
        act: AuditAct,
        previous: &'a str,
    }
    let number = head.number + 1;
    let unsealed = Unsealed { number, at, service, rollout, act, previous: &head.hash };
    // Acts are maps with string keys and whole numbers, which JSON can always write.
    let mut text = serde_json::to_string(&unsealed).expect("entries can be written as JSON");
    text.pop(); // the closing brace
    let hash = hex(text.as_bytes());
    text.push_str(HASH_KEY);
    text.push_str(&hash);
    text.push_str(END);
    (Bytes::from(text), AuditHead { number, hash })
}

/// The entry, if its hash is that of its bytes.
///
/// # Errors
/// What is wrong with it, in words.
pub fn open(value: &[u8]) -> Result<AuditEntry, String> {
    let (text, hash) = parts(value).ok_or("it does not end with a hash")?;
    if hex(text).as_bytes() != hash {
        return Err("its hash is not that of its bytes".to_owned());
    }
    serde_json::from_slice(value).map_err(|error| format!("it cannot be read: {error}"))
}

/// The hash that the next entry has to name: of the bytes as they are, whatever they say of themselves.
pub(crate) fn fingerprint(value: &[u8]) -> String {
    hex(parts(value).map_or(value, |(text, _)| text))
}

fn parts(value: &[u8]) -> Option<(&[u8], &[u8])> {
    let sealed = value.strip_suffix(END.as_bytes())?;
    let (rest, hash) = sealed.split_at_checked(sealed.len().checked_sub(NOTHING_BEFORE.len())?)?;
    Some((rest.strip_suffix(HASH_KEY.as_bytes())?, hash))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = Sha256::digest(bytes);
    let mut text = String::with_capacity(2 * digest.len());
    for byte in digest {
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Looks at every entry, in order of their numbers, and at the head.
///
/// `entries`: number → bytes, or why they cannot be read. `receipts`: what the rollouts' own records say.
pub(crate) fn verify(
    entries: &BTreeMap<u64, Result<Bytes, String>>,
    head: &AuditHead,
    receipts: impl Fn(&RolloutId) -> Option<Receipt>,
) -> AuditReport {
    let first = entries.keys().next().copied().unwrap_or(0);
    let last = entries.keys().next_back().copied().unwrap_or(0);
    let mut report = AuditReport {
        entries: entries.len() as u64,
        first,
        last,
        hash: head.hash.clone(),
        broken: Vec::new(),
    };
    let mut broken = |entry: u64, what: String| report.broken.push(AuditBreak { entry, what });
    let newest = last.max(head.number);
    // Older ones are given up only when there are as many newer ones. Of a forged number nothing is certain, not even that
    // there is one after it.
    let oldest = newest.saturating_add(1).saturating_sub(MAX_AUDIT_ENTRIES).max(1);
    let mut before: Option<String> = (oldest == 1).then(|| NOTHING_BEFORE.to_owned());
    for number in oldest..=newest {
        let Some(value) = entries.get(&number) else {
            broken(number, "it is missing".to_owned());
            before = None;
            continue;
        };
        let opened = value.as_ref().map_err(Clone::clone).and_then(|value| open(value));
        match opened {
            Err(what) => {
                broken(number, what);
                before = None;
            }
            Ok(entry) => {
                if entry.number != number {
                    broken(number, format!("it says that it is entry {}", entry.number));
                } else if before.as_ref().is_some_and(|before| *before != entry.previous) {
                    let changed = number.saturating_sub(1).max(1);
                    broken(changed, format!("entry {number} was sealed over another one in its place"));
                } else if let Some(what) = differs(&entry, &receipts) {
                    broken(number, what);
                }
                before = Some(entry.hash);
            }
        }
    }
    if before.is_some_and(|before| before != head.hash) && newest > 0 {
        broken(newest, "the head of the chain names another one in its place".to_owned());
    }
    report
}

/// The receipt is also in the rollout's record, where people read it.
fn differs(entry: &AuditEntry, receipts: &impl Fn(&RolloutId) -> Option<Receipt>) -> Option<String> {
    let (Some(rollout), AuditAct::Ended { receipt: Some(sealed), .. }) = (&entry.rollout, &entry.act) else {
        return None;
    };
    let told = receipts(rollout)?;
    (told != **sealed).then(|| format!("the receipt of {rollout} is not the one that was sealed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(count: u64) -> (BTreeMap<u64, Result<Bytes, String>>, AuditHead) {
        let mut head = AuditHead::default();
        let mut entries = BTreeMap::new();
        for number in 1..=count {
            let act = AuditAct::MachineAdded { machine: format!("host-{number}") };
            let (value, next) = seal(&head, 1_000 + number, Some("shop"), None, act);
            entries.insert(number, Ok(value));
            head = next;
        }
        (entries, head)
    }

    fn look(entries: &BTreeMap<u64, Result<Bytes, String>>, head: &AuditHead) -> Vec<u64> {
        verify(entries, head, |_| None).broken.into_iter().map(|broken| broken.entry).collect()
    }

    #[test]
    fn a_chain_that_nobody_touched_is_whole() {
        for count in [0, 1, 5] {
            let (entries, head) = chain(count);
            let report = verify(&entries, &head, |_| None);
            assert_eq!((report.broken, report.entries, report.last), (Vec::new(), count, count));
        }
    }

    #[test]
    fn whichever_byte_of_whichever_entry_is_changed_that_entry_is_named() {
        let (whole, head) = chain(4);
        for number in 1..=4 {
            let value = whole[&number].clone().expect("it is there");
            for at in 0..value.len() {
                for bit in [0x01, 0x20] {
                    let mut changed = value.to_vec();
                    changed[at] ^= bit;
                    let mut entries = whole.clone();
                    entries.insert(number, Ok(changed.into()));
                    assert_eq!(look(&entries, &head), [number], "byte {at} of entry {number}");
                }
            }
        }
    }

    #[test]
    fn an_entry_that_was_sealed_anew_is_named_by_the_one_after_it() {
        let (mut entries, head) = chain(4);
        for number in [2, 4] {
            let before = AuditHead {
                number: number - 1,
                hash: open(&entries[&(number - 1)].clone().unwrap()).unwrap().hash,
            };
            let act = AuditAct::MachineAdded { machine: "forged".to_owned() };
            let kept = entries.insert(number, Ok(seal(&before, 1, None, None, act).0)).unwrap();
            assert_eq!(look(&entries, &head), [number]);
            entries.insert(number, kept);
        }
    }

    #[test]
    fn entries_that_are_gone_are_named_at_either_end_and_in_the_middle() {
        for number in 1..=4 {
            let (mut entries, head) = chain(4);
            entries.remove(&number);
            assert_eq!(look(&entries, &head), [number]);
        }
    }

    #[test]
    fn an_entry_under_the_highest_number_that_there_is_ends_no_verification() {
        let (mut entries, head) = chain(4);
        let forged = entries[&4].clone();
        entries.insert(u64::MAX, forged);
        let broken = look(&entries, &head);
        assert!(broken.contains(&u64::MAX), "it says that it is entry 4");
        assert!(broken.contains(&(u64::MAX - 1)), "nothing is before it");
    }

    #[test]
    fn what_a_later_version_wrote_is_still_part_of_the_chain() {
        let text = r#"{"number":1,"at":1,"service":null,"rollout":null,"act":{"type":"new","x":1},"previous":"0000000000000000000000000000000000000000000000000000000000000000""#;
        let hash = hex(text.as_bytes());
        let value = Bytes::from(format!("{text}{HASH_KEY}{hash}{END}"));
        assert_eq!(open(&value).unwrap().act, AuditAct::Unknown);
        let entries = BTreeMap::from([(1, Ok(value))]);
        assert_eq!(look(&entries, &AuditHead { number: 1, hash }), [] as [u64; 0]);
    }
}
