//! The table of this process, and what there is to say of its upstreams.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use peregrine_routing::{
    Change, DrainTime, Due, Generation, HoldCounts, PerClass, ServiceSpec, TableError, TableWriter, Tally,
    TrafficClass, Upstream,
};
use tokio::time::Instant;

use super::place::{Disk, Place};
use crate::saved::{self, SavedError, SavedTable};
use crate::wire::{self, Attach, KeptService, WireDomain};

/// Saves that are begun and have not ended: a disk that hangs must not use up every thread that may block, nor the memory: each
/// has a copy of the table. What comes while there are so many is saved after them.
const MAX_SAVES_UNDER_WAY: usize = 16;

/// A service that changed so recently is looked at with each report; the others less often.
const HOT_MS: u64 = 600_000;

/// A save that was begun: whether the table is on the disk.
pub(super) type Saving = BoxFuture<'static, Result<bool, SavedError>>;

/// The table, and who is asked for news.
pub(super) struct EdgeTable {
    writer: TableWriter,
    folder: PathBuf,
    epoch: u64,
    services: BTreeMap<Arc<str>, Known>,
    /// Retired upstreams that somebody is inside of, or whose last word the engine has not taken in.
    retired: HashMap<Generation, Retired>,
    /// What the engine has been told last.
    told: HashMap<Generation, Tally>,
    /// What the engine has been told last of services that were held.
    holds: BTreeMap<Arc<str>, HoldCounts>,
    /// Saves that were wanted so far; each has its number.
    saves: u64,
    progress: Arc<Progress>,
    disk: Arc<Disk>,
    /// There is something that was used and not saved, because the disk is another process's, or hangs.
    unsaved: bool,
}

/// What became of saves, for whoever cannot wait for them.
#[derive(Default)]
struct Progress {
    under_way: AtomicUsize,
    /// Number of the newest that is on the disk.
    on_disk: AtomicU64,
}

struct Known {
    upstreams: Vec<Arc<Upstream>>,
    changed: Instant,
}

struct Retired {
    upstream: Arc<Upstream>,
    /// Number of the report with its last word.
    last_word: Option<u64>,
}

/// What there is to say.
#[derive(Default)]
pub(super) struct News {
    pub(super) tallies: Vec<(Generation, Tally)>,
    pub(super) ended: Vec<Generation>,
}

impl EdgeTable {
    pub(super) fn new(writer: TableWriter, folder: PathBuf, epoch: u64, disk: Arc<Disk>) -> Self {
        Self {
            writer,
            folder,
            epoch,
            services: BTreeMap::new(),
            retired: HashMap::new(),
            told: HashMap::new(),
            holds: BTreeMap::new(),
            saves: 0,
            progress: Arc::default(),
            disk,
            unsaved: false,
        }
    }

    pub(super) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) const fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
    }

    pub(super) fn attach(&self, incarnation: u64, cores: u32, place: &Place) -> Attach {
        let (beside, handed_over) = (place.beside.clone(), place.handed_over);
        Attach { version: wire::VERSION, incarnation, cores, epoch: self.epoch, beside, handed_over }
    }

    /// Fills the empty table from the disk.
    pub(super) fn restore(&mut self, saved: SavedTable) -> Result<(), TableError> {
        self.epoch = self.epoch.max(saved.epoch);
        let domains = saved.domains.into_iter().map(Change::PutDomain);
        let changes: Vec<_> = saved.services.into_iter().map(Change::Put).chain(domains).collect();
        self.apply(&changes).map(drop)
    }

    /// A service as this edge has it.
    pub(super) fn known_service(&self, name: &str) -> Option<Change> {
        self.writer.service(name).cloned().map(Change::Put)
    }

    /// What has to change for the table to be `whole` and nothing else. What is the same is left alone.
    pub(super) fn differences(&self, whole: Vec<Change>) -> Vec<Change> {
        let services: HashSet<Arc<str>> = whole.iter().filter_map(Change::service).cloned().collect();
        let gone = self.services.keys().filter(|name| !services.contains(*name));
        let mut changes: Vec<Change> = gone.map(|name| Change::Remove(Arc::clone(name))).collect();
        self.add_gone_domains(&whole, &mut changes);
        let whole = whole.into_iter().map(|change| self.with_known_hold(change));
        let domains = self.writer.domains();
        changes.extend(whole.filter(|change| match change {
            Change::Put(spec) => self.writer.service(&spec.name) != Some(spec),
            Change::PutDomain(spec) => domains.of(&spec.name).is_none_or(|known| **known != *spec),
            Change::PutChallenge(spec) => domains.challenges().all(|known| **known != *spec),
            Change::Remove(_) | Change::RemoveDomain(_) | Change::RemoveChallenge(_) => false,
        }));
        changes
    }

    fn add_gone_domains(&self, whole: &[Change], changes: &mut Vec<Change>) {
        let (mut domains, mut challenges) = (HashSet::new(), HashSet::new());
        for change in whole {
            match change {
                Change::PutDomain(spec) => drop(domains.insert(&spec.name)),
                Change::PutChallenge(spec) => drop(challenges.insert(spec.id())),
                _ => {}
            }
        }
        let known = self.writer.domains();
        known.for_each(|domain| {
            if !domains.contains(&domain.name) {
                changes.push(Change::RemoveDomain(domain.name.clone()));
            }
        });
        let over = known.challenges().map(|challenge| challenge.id()).filter(|id| !challenges.contains(id));
        changes.extend(over.map(Change::RemoveChallenge));
    }

    /// When the hold of a change is known already and was to end earlier: that moment. Told again, it does not last longer:
    /// what it still lasts was reckoned when it was sent, and may have been under way for long.
    fn known_end_ms(&self, change: &Change) -> Option<u64> {
        let Change::Put(spec) = change else { return None };
        let hold = spec.policy.hold.as_ref()?;
        let known = self.writer.service(&spec.name)?.policy.hold.as_ref()?;
        (known.id == hold.id && known.until_ms < hold.until_ms).then_some(known.until_ms)
    }

    fn with_known_hold(&self, mut change: Change) -> Change {
        let known_ms = self.known_end_ms(&change);
        if let (Change::Put(spec), Some(until_ms)) = (&mut change, known_ms)
            && let Some(hold) = &mut spec.policy.hold
        {
            hold.until_ms = until_ms;
        }
        change
    }

    /// Applies changes; the own version that has to be acknowledged by every core.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<u64, TableError> {
        if changes.iter().any(|change| self.known_end_ms(change).is_some()) {
            let changes: Vec<Change> = changes.iter().cloned().map(|c| self.with_known_hold(c)).collect();
            return self.apply_as_it_is(&changes);
        }
        self.apply_as_it_is(changes)
    }

    fn apply_as_it_is(&mut self, changes: &[Change]) -> Result<u64, TableError> {
        if changes.is_empty() {
            return Ok(self.writer.version());
        }
        let times = self.drain_times(changes);
        let applied = self.writer.apply(changes)?;
        for upstream in applied.retired {
            let times = times.get(&upstream.generation()).copied().unwrap_or_default();
            tokio::spawn(drain(Arc::clone(&upstream), times));
            self.retired.insert(upstream.generation(), Retired { upstream, last_word: None });
        }
        let changed = Instant::now();
        for change in changes {
            match change {
                Change::Put(spec) => {
                    let upstreams = self.live(spec);
                    if spec.policy.hold.is_some() {
                        self.holds.entry(Arc::clone(&spec.name)).or_default();
                    }
                    self.services.insert(Arc::clone(&spec.name), Known { upstreams, changed });
                }
                Change::Remove(name) => {
                    self.services.remove(name);
                    self.holds.remove(name);
                }
                Change::PutDomain(_)
                | Change::RemoveDomain(_)
                | Change::PutChallenge(_)
                | Change::RemoveChallenge(_) => {}
            }
        }
        Ok(applied.version)
    }

    /// How long traffic may stay with each upstream that these changes may retire.
    fn drain_times(&self, changes: &[Change]) -> HashMap<Generation, PerClass<DrainTime>> {
        let mut times = HashMap::new();
        for change in changes {
            let Some(name) = change.service() else { continue };
            let spec = change.put().or_else(|| self.writer.service(name));
            let (Some(spec), Some(known)) = (spec, self.services.get(name)) else { continue };
            times.extend(known.upstreams.iter().map(|upstream| (upstream.generation(), spec.policy.drain)));
        }
        times
    }

    fn live(&self, spec: &ServiceSpec) -> Vec<Arc<Upstream>> {
        let specs = spec.pools.iter().flat_map(|pool| &pool.upstreams);
        specs.filter_map(|spec| self.writer.upstream(spec.generation).cloned()).collect()
    }

    /// Waits until every core uses a version.
    pub(super) fn acknowledged(&self, version: u64) -> impl Future<Output = ()> + Send + use<> {
        self.writer.acknowledged(version)
    }

    /// Whether something is to be saved that was not when it was used, and can be now.
    pub(super) fn is_unsaved(&self) -> bool {
        self.unsaved && self.disk.is_ours() && self.has_room()
    }

    /// Whether the table in use is on the disk, as far as it was to be saved.
    pub(super) fn is_on_disk(&self) -> bool {
        !self.unsaved && self.progress.on_disk.load(Ordering::Acquire) >= self.saves
    }

    fn has_room(&self) -> bool {
        self.progress.under_way.load(Ordering::Acquire) < MAX_SAVES_UNDER_WAY
    }

    /// Puts the table on the disk, beside everything else; false if the disk is another process's now, or has too much to
    /// do. It is begun at once, and ended also if nobody waits for it.
    pub(super) fn save(&mut self) -> Saving {
        self.saves += 1;
        self.unsaved = !(self.disk.is_ours() && self.has_room());
        if !self.has_room() {
            return Box::pin(std::future::ready(Ok(false)));
        }
        let specs = self.services.keys().filter_map(|name| self.writer.service(name));
        let services: Vec<KeptService> = specs.map(KeptService::from).collect();
        let mut domains = Vec::new();
        self.writer.domains().for_each(|domain| domains.push(WireDomain::from(&**domain)));
        let (folder, epoch, number) = (self.folder.clone(), self.epoch, self.saves);
        let (disk, progress) = (Arc::clone(&self.disk), Arc::clone(&self.progress));
        progress.under_way.fetch_add(1, Ordering::AcqRel);
        let saving = tokio::task::spawn_blocking(move || {
            let saved = save_in_turn(&disk, number, || saved::save(&folder, epoch, services, domains));
            if let Ok(true) = saved {
                progress.on_disk.fetch_max(number, Ordering::AcqRel);
            }
            progress.under_way.fetch_sub(1, Ordering::AcqRel);
            saved
        });
        Box::pin(async move {
            match saving.await {
                Ok(saved) => saved,
                Err(stopped) => Err(SavedError::Io {
                    path: PathBuf::new(),
                    source: std::io::Error::other(stopped.to_string()),
                }),
            }
        })
    }

    // --- counts

    /// Everything that an engine that knows nothing has to be told first.
    pub(super) fn known(&mut self) -> Vec<(Generation, Tally)> {
        self.told.clear();
        self.holds.values_mut().for_each(|told| *told = HoldCounts::default());
        let live = self.services.values().flat_map(|known| &known.upstreams);
        let retired = self.retired.values().map(|retired| &retired.upstream);
        let known: Vec<_> = live.chain(retired).map(|u| (u.generation(), u.tally())).collect();
        self.told.extend(known.iter().cloned());
        for retired in self.retired.values_mut() {
            retired.last_word = None; // the engine that it was said to may be another one
        }
        known
    }

    /// What has changed since it was last told. Without `all`, services that have long been the same are passed over.
    pub(super) fn news(&mut self, report: u64, all: bool) -> News {
        let mut news = News::default();
        let hot = |known: &&Known| all || known.changed.elapsed() < Duration::from_millis(HOT_MS);
        let live: Vec<_> = self.services.values().filter(hot).flat_map(|k| &k.upstreams).cloned().collect();
        for upstream in live {
            self.tell(&upstream, &mut news);
        }
        let silent = self.retired.values_mut().filter(|retired| retired.last_word.is_none());
        let mut retired = Vec::new();
        for one in silent {
            // Empty first: what is counted after that is all that there will be.
            if one.upstream.is_empty() {
                one.last_word = Some(report);
                news.ended.push(one.upstream.generation());
            }
            retired.push(Arc::clone(&one.upstream));
        }
        for upstream in retired {
            self.tell(&upstream, &mut news);
        }
        news
    }

    /// What has changed of services that are or were held since it was last told.
    pub(super) fn hold_news(&mut self) -> Vec<(Arc<str>, HoldCounts)> {
        let mut news = Vec::new();
        for (name, told) in &mut self.holds {
            let now = self.writer.hold_counts(name);
            if *told != now {
                *told = now;
                news.push((Arc::clone(name), now));
            }
        }
        news
    }

    fn tell(&mut self, upstream: &Arc<Upstream>, news: &mut News) {
        let (generation, tally) = (upstream.generation(), upstream.tally());
        if self.told.get(&generation) != Some(&tally) {
            self.told.insert(generation, tally.clone());
            news.tallies.push((generation, tally));
        }
    }

    /// Retired upstreams that somebody is still inside of.
    pub(super) fn open(&self) -> Vec<Generation> {
        let open = self.retired.iter().filter(|(_, retired)| retired.last_word.is_none());
        open.map(|(generation, _)| *generation).collect()
    }

    /// The engine has taken in every report up to this one.
    pub(super) fn received(&mut self, report: u64) {
        let done = |retired: &Retired| retired.last_word.is_some_and(|last| last <= report);
        let gone: Vec<_> = self.retired.iter().filter(|(_, r)| done(r)).map(|(g, _)| *g).collect();
        for generation in gone {
            self.retired.remove(&generation);
            self.told.remove(&generation);
            self.writer.forget(generation);
        }
    }

    /// The classes of a retired upstream that have used up their time.
    pub(super) fn deadlines(&self, generation: Generation, closing: u8, cut: u8) {
        let Some(retired) = self.retired.get(&generation) else { return };
        for class in TrafficClass::ALL {
            let has = |bits: u8| bits & 1 << class.index() != 0;
            if has(closing) {
                Due::Close.tell(&retired.upstream, class);
            }
            if has(cut) {
                Due::Cut.tell(&retired.upstream, class);
            }
        }
    }
}

/// One at a time, and never an older table in the place of a newer one.
fn save_in_turn(
    disk: &Disk,
    number: u64,
    save: impl FnOnce() -> Result<(), SavedError>,
) -> Result<bool, SavedError> {
    let Some(mut last) = disk.ours() else { return Ok(false) };
    if number > *last {
        save()?;
        *last = number;
    }
    Ok(true)
}

/// Ends what is inside of a retired upstream at the deadlines of its classes. The engine says the same when it is there;
/// a drain that it has begun ends without it.
async fn drain(upstream: Arc<Upstream>, times: PerClass<DrainTime>) {
    let begun = Instant::now();
    let mut drained = std::pin::pin!(upstream.drained());
    for (due_ms, due, class) in times.timetable() {
        // The time that is left, and not a point in time: a deadline of centuries is no overflow.
        let left = Duration::from_millis(due_ms).saturating_sub(begun.elapsed());
        tokio::select! {
            biased;
            () = &mut drained => return,
            () = tokio::time::sleep(left) => {}
        }
        due.tell(&upstream, class);
    }
}

#[cfg(test)]
mod tests {
    use peregrine_routing::{Balance, HoldSpec, ServicePolicy, table};

    use super::*;
    use crate::wire::spec_tests::service;

    fn held(hold: u64, until_ms: u64) -> Change {
        let hold =
            HoldSpec { id: hold, until_ms, max_requests: 1, max_bytes: 2, max_age_ms: 3, release_per_s: 4 };
        let policy = ServicePolicy { hold: Some(Box::new(hold)), ..ServicePolicy::default() };
        Change::Put(service("shop", Balance::default(), policy))
    }

    fn until_ms(table: &EdgeTable) -> Option<u64> {
        table.writer.service("shop")?.policy.hold.as_ref().map(|hold| hold.until_ms)
    }

    #[test]
    fn a_hold_that_is_told_again_does_not_last_longer_in_a_difference_or_in_a_whole_table() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut edge = EdgeTable::new(table().0, folder.path().to_owned(), 1, Arc::default());
        edge.apply(&[held(1, 5_000)]).expect("accepted");
        // The link stood still for three seconds.
        edge.apply(&[held(1, 8_000)]).expect("accepted");
        assert_eq!(until_ms(&edge), Some(5_000));
        let changes = edge.differences(vec![held(1, 9_000)]);
        assert_eq!(changes, [], "nothing has changed");
        edge.apply(&[held(1, 4_990)]).expect("accepted");
        assert_eq!(until_ms(&edge), Some(4_990), "the earliest end that was told");
        edge.apply(&[held(2, 9_000)]).expect("accepted");
        assert_eq!(until_ms(&edge), Some(9_000), "another hold has an end of its own");
    }
}
