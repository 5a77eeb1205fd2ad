//! The table of this process, and what there is to say of its upstreams.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peregrine_routing::{
    Change, DrainTime, Due, Generation, PerClass, ServiceSpec, TableError, TableWriter, Tally, TrafficClass,
    Upstream,
};
use tokio::time::Instant;

use crate::saved::{self, SavedError, SavedTable};
use crate::wire::{self, Attach, WireService};

/// A service that changed so recently is looked at with each report; the others less often.
const HOT_MS: u64 = 600_000;

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
    saves: u64,
    /// Number of the save that is on the disk.
    last_saved: Arc<Mutex<u64>>,
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
    pub(super) fn new(writer: TableWriter, folder: PathBuf, epoch: u64) -> Self {
        Self {
            writer,
            folder,
            epoch,
            services: BTreeMap::new(),
            retired: HashMap::new(),
            told: HashMap::new(),
            saves: 0,
            last_saved: Arc::default(),
        }
    }

    pub(super) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) const fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
    }

    pub(super) const fn attach(&self, incarnation: u64, cores: u32) -> Attach {
        Attach { version: wire::VERSION, incarnation, cores, epoch: self.epoch }
    }

    /// Fills the empty table from the disk.
    pub(super) fn restore(&mut self, saved: SavedTable) -> Result<(), TableError> {
        self.epoch = self.epoch.max(saved.epoch);
        let changes: Vec<_> = saved.services.into_iter().map(Change::Put).collect();
        self.apply(&changes).map(drop)
    }

    /// What has to change for the table to be `services` and nothing else. What is the same is left alone.
    pub(super) fn differences(&self, services: Vec<Change>) -> Vec<Change> {
        let named: HashSet<Arc<str>> = services.iter().map(|change| Arc::clone(name_of(change))).collect();
        let gone = self.services.keys().filter(|name| !named.contains(*name));
        let mut changes: Vec<Change> = gone.map(|name| Change::Remove(Arc::clone(name))).collect();
        changes.extend(services.into_iter().filter(|change| match change {
            Change::Put(spec) => self.writer.service(&spec.name) != Some(spec),
            Change::Remove(_) => false,
        }));
        changes
    }

    /// Applies changes; the own version that has to be acknowledged by every core.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<u64, TableError> {
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
                    self.services.insert(Arc::clone(&spec.name), Known { upstreams, changed });
                }
                Change::Remove(name) => {
                    self.services.remove(name);
                }
            }
        }
        Ok(applied.version)
    }

    /// How long traffic may stay with each upstream that these changes may retire.
    fn drain_times(&self, changes: &[Change]) -> HashMap<Generation, PerClass<DrainTime>> {
        let mut times = HashMap::new();
        for change in changes {
            let name = name_of(change);
            let spec = match change {
                Change::Put(spec) => Some(spec),
                Change::Remove(name) => self.writer.service(name),
            };
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

    /// Puts the table on the disk, beside everything else. It is begun at once, and ended also if nobody waits for it.
    pub(super) fn save(&mut self) -> impl Future<Output = Result<(), SavedError>> + Send + use<> {
        let specs = self.services.keys().filter_map(|name| self.writer.service(name));
        let services: Vec<WireService> = specs.map(WireService::from).collect();
        let (folder, epoch) = (self.folder.clone(), self.epoch);
        self.saves += 1;
        let (number, last) = (self.saves, Arc::clone(&self.last_saved));
        let saving = tokio::task::spawn_blocking(move || {
            // One at a time, and never an older table in the place of a newer one.
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            if number > *last {
                saved::save(&folder, epoch, services)?;
                *last = number;
            }
            Ok(())
        });
        async move {
            match saving.await {
                Ok(saved) => saved,
                Err(stopped) => Err(SavedError::Io {
                    path: PathBuf::new(),
                    source: std::io::Error::other(stopped.to_string()),
                }),
            }
        }
    }

    // --- counts

    /// Everything that an engine that knows nothing has to be told first.
    pub(super) fn known(&mut self) -> Vec<(Generation, Tally)> {
        self.told.clear();
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

const fn name_of(change: &Change) -> &Arc<str> {
    match change {
        Change::Put(spec) => &spec.name,
        Change::Remove(name) => name,
    }
}
