//! One copy under watch: is it alive, and is it well? Asked of the runtime, of the copy, and of the edge.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peregrine_routing::{Health, Upstream};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::core::Core;
use crate::model::{InstanceId, InstanceState};
use crate::order::Vital;
use crate::probe::Probe;
use crate::render;
use crate::runtime::Runtime;

/// Between two looks at a copy that nobody suspects.
const LOOK_INTERVAL_MS: u64 = 500;
/// Between two looks at one that is suspected.
const SUSPECT_INTERVAL_MS: u64 = 100;
/// How often the edge's own view is read; it costs two atomic loads.
const EDGE_VIEW_INTERVAL_MS: u64 = 50;
/// Longest time that a runtime may take to say whether a copy runs.
const INSPECT_TIMEOUT_MS: u64 = 2_000;

/// What is known of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) vital: Vital,
    pub(super) why: String,
    /// It was looked at, whatever came of it; before that it is believed to be well.
    pub(super) looked: bool,
}

/// A copy under watch. The watching ends when this is dropped.
pub(super) struct Watched {
    known: Arc<Mutex<Known>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watched {
    pub(super) fn begin(core: &Arc<Core>, id: &InstanceId, changed: Arc<Notify>) -> Self {
        let known = Arc::new(Mutex::new(Known::default()));
        let watcher = Watcher {
            core: Arc::clone(core),
            id: id.clone(),
            known: Arc::clone(&known),
            changed,
            bad_probes: 0,
            restarts: None,
        };
        Self { known, task: tokio::spawn(watcher.watch()) }
    }

    pub(super) fn known(&self) -> Known {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Watcher {
    core: Arc<Core>,
    id: InstanceId,
    known: Arc<Mutex<Known>>,
    changed: Arc<Notify>,
    bad_probes: u32,
    restarts: Option<u64>,
}

/// What a look needs.
struct Subject {
    runtime: Arc<dyn Runtime>,
    probe: Probe,
    upstream: Option<Arc<Upstream>>,
    /// Whether it is to be probed already.
    probed: bool,
}

impl Watcher {
    async fn watch(mut self) {
        loop {
            let suspect = self.look().await;
            let interval = if suspect { SUSPECT_INTERVAL_MS } else { LOOK_INTERVAL_MS };
            self.rest(Duration::from_millis(interval)).await;
        }
    }

    /// Looks once; says whether it should be looked at again soon.
    async fn look(&mut self) -> bool {
        let Some(Subject { runtime, probe, upstream, probed }) = self.subject() else { return false };
        let inspect =
            tokio::time::timeout(Duration::from_millis(INSPECT_TIMEOUT_MS), runtime.inspect(&self.id));
        let (status, probe) =
            tokio::join!(inspect, async { if probed { probe.once().await } else { Ok(Duration::ZERO) } });
        let threshold = probe_threshold(&self.core, &self.id);
        self.bad_probes = if probe.is_ok() { 0 } else { self.bad_probes.saturating_add(1) };
        let reachable = matches!(status, Ok(Ok(_)));
        let known = match status {
            Ok(Ok(None)) => dead("it is not there any more"),
            Ok(Ok(Some(status))) if !status.running => dead(&format!("it exited with {}", status.ending())),
            Ok(Ok(Some(status))) if self.restarts.is_some_and(|before| status.restarts > before) => {
                dead("it died and was restarted")
            }
            Ok(Ok(Some(status))) => {
                self.restarts.get_or_insert(status.restarts);
                self.living(upstream.as_deref(), probe.err(), threshold, reachable)
            }
            Ok(Err(_)) | Err(_) => self.living(upstream.as_deref(), probe.err(), threshold, reachable),
        };
        let suspect = self.bad_probes > 0 || known.vital != Vital::Good;
        self.say(known);
        suspect
    }

    fn living(
        &self,
        upstream: Option<&Upstream>,
        probe: Option<String>,
        threshold: u32,
        reachable: bool,
    ) -> Known {
        if self.bad_probes >= threshold {
            let vital = if reachable { Vital::Unwell } else { Vital::Dead };
            let why = probe.unwrap_or_default();
            let machine = if reachable { "" } else { ", and its machine does not answer" };
            return Known {
                vital,
                why: format!("{} probes in a row were bad: {why}{machine}", self.bad_probes),
                looked: true,
            };
        }
        match upstream {
            Some(upstream) if upstream.health() == Health::Unhealthy => {
                Known { vital: Vital::Unwell, why: "the edge's probes are bad".to_owned(), looked: true }
            }
            Some(upstream) if upstream.ejected_until_ms() > self.core.edge_now_ms() => Known {
                vital: Vital::Unwell,
                why: "the edge has ejected it: requests in a row failed".to_owned(),
                looked: true,
            },
            _ => Known { looked: true, ..Known::default() },
        }
    }

    fn subject(&self) -> Option<Subject> {
        let state = self.core.state();
        let instance = state.instances.get(&self.id)?;
        let spec = &state.services.get(&instance.service)?.spec;
        let probe = Probe {
            address: instance.address?,
            protocol: spec.traffic.protocol,
            send_proxy_protocol: spec.traffic.send_proxy_protocol,
            host: render::probe_host(spec),
            health: state.version(&instance.service, instance.version)?.health.clone(),
            dial: self.core.config.outside.dial.clone(),
        };
        let runtime = self.core.runtime(&instance.machine)?;
        // Before it has shown that it works, a bad probe is not news.
        let probed = instance.state != InstanceState::Started;
        let upstream =
            (instance.generation > 0).then(|| self.core.table.upstream(instance.generation)).flatten();
        Some(Subject { runtime, probe, upstream, probed })
    }

    /// Waits for the next look, or until the edge finds something.
    async fn rest(&self, interval: Duration) {
        let end = Instant::now() + interval;
        let was_usable = self.edge_finds_it_usable();
        while Instant::now() < end {
            let next = (Instant::now() + Duration::from_millis(EDGE_VIEW_INTERVAL_MS)).min(end);
            tokio::time::sleep_until(next).await;
            if was_usable && !self.edge_finds_it_usable() {
                return;
            }
        }
    }

    fn edge_finds_it_usable(&self) -> bool {
        let generation = self.core.state().instances.get(&self.id).map_or(0, |instance| instance.generation);
        self.core.table.upstream(generation).is_none_or(|upstream| {
            upstream.is_retired()
                || (upstream.health() != Health::Unhealthy
                    && upstream.ejected_until_ms() <= self.core.edge_now_ms())
        })
    }

    fn say(&self, next: Known) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != next {
            *known = next;
            self.changed.notify_one();
        }
    }
}

fn probe_threshold(core: &Core, id: &InstanceId) -> u32 {
    let state = core.state();
    let health = state
        .instances
        .get(id)
        .and_then(|i| state.version(&i.service, i.version))
        .map(|v| v.health.unhealthy);
    health.unwrap_or(3).max(1)
}

fn dead(why: &str) -> Known {
    Known { vital: Vital::Dead, why: why.to_owned(), looked: true }
}
