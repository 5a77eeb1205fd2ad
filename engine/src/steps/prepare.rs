//! Prepare: the image is on the machine, by digest. Found there, else pulled, else streamed from another
//! machine of ours, without a copy on the control plane's disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Done, Problem, StepContext};
use crate::model::{EventBody, Finding, MachineKind, Workload};
use crate::runtime::{ImageInfo, Runtime, transfer_image};

/// Longest time for one image to reach one machine.
pub(super) const TRANSFER_LIMIT_MS: u64 = 3_600_000;
/// Between two events on progress.
const PROGRESS_INTERVAL_MS: u64 = 500;
/// Longest time that a machine is asked whether it has the image.
const LOOK_LIMIT_MS: u64 = 10_000;

pub(super) async fn forward(context: &StepContext, machine: &str) -> Result<Done, Problem> {
    let service = &context.plan.service;
    let state = context.core.state();
    let Some(version) = state.version(service, context.plan.to_version).cloned() else {
        return Err(failed(
            "version.unknown",
            format!("service {service} has no version {}", context.plan.to_version),
        ));
    };
    drop(state);
    let Workload::Image { image, .. } = &version.workload else { return Ok(Done::new("needs no image")) };
    let wanted = version.digest.clone().unwrap_or_else(|| image.clone());
    let target = context.runtime(machine)?;
    if let Some(found) = target.image(&wanted).await? {
        return keep(context, &found, 0, "it was there").await;
    }
    let source = find(context, machine, &wanted).await;
    let limit = Duration::from_millis(TRANSFER_LIMIT_MS);
    let brought = tokio::time::timeout(limit, bring(context, machine, &*target, source, &wanted)).await;
    let (found, bytes) = brought.unwrap_or_else(|_| {
        Err(failed(
            "image.too_slow",
            format!("image {image} did not reach {machine} within {} s", limit.as_secs()),
        ))
    })?;
    if let Some(digest) = version.digest.as_ref().filter(|digest| **digest != found.id) {
        return Err(failed(
            "image.differs",
            format!("{machine} got image {} where {digest} was wanted", found.id),
        ));
    }
    keep(context, &found, bytes, "brought").await
}

struct Source {
    runtime: Arc<dyn Runtime>,
    machine: String,
    image: ImageInfo,
}

/// Another machine of ours that has the image.
async fn find(context: &StepContext, target: &str, wanted: &str) -> Option<Source> {
    let state = context.core.state();
    let docker = |kind: &MachineKind| matches!(kind, MachineKind::Docker { .. });
    let others: Vec<String> = state
        .machines
        .iter()
        .filter(|(name, m)| *name != target && docker(&m.spec.kind))
        .map(|(n, _)| n.clone())
        .collect();
    drop(state);
    for machine in others {
        let Some(runtime) = context.core.runtime(&machine) else { continue };
        let look = tokio::time::timeout(Duration::from_millis(LOOK_LIMIT_MS), runtime.image(wanted)).await;
        if let Ok(Ok(Some(image))) = look {
            return Some(Source { runtime, machine, image });
        }
    }
    None
}

async fn bring(
    context: &StepContext,
    machine: &str,
    target: &dyn Runtime,
    source: Option<Source>,
    wanted: &str,
) -> Result<(ImageInfo, u64), Problem> {
    let report = Report::new(context, machine);
    let progress = |done: u64, total: Option<u64>| report.progress(done, total);
    let from = source.as_ref().map_or_else(|| "its registry".to_owned(), |source| source.machine.clone());
    context.waiting_for(Some(format!("the image to come to {machine} from {from}"))).await;
    let (from, digests) = match &source {
        Some(source) => (Some(&*source.runtime), &source.image.repo_digests[..]),
        None => (None, &[][..]),
    };
    let found = transfer_image(from, target, wanted, digests, &progress).await?;
    Ok((found, report.bytes()))
}

/// The digest becomes part of the version with the first machine that has the image.
async fn keep(context: &StepContext, image: &ImageInfo, bytes: u64, how: &str) -> Result<Done, Problem> {
    let (service, number, id) = (context.plan.service.clone(), context.plan.to_version, image.id.clone());
    context
        .commit(move |draft, rollout| {
            if let Some(version) =
                draft.state().version(&service, number).filter(|version| version.digest.is_none())
            {
                let mut version = version.clone();
                version.digest = Some(id);
                draft.put_version(&version);
            }
            if bytes > 0 {
                let mut rollout = rollout.clone();
                rollout.transferred_bytes += bytes;
                draft.put_rollout(&rollout);
            }
            Ok(())
        })
        .await?;
    Ok(Done::new(format!("image {}: {how}", image.id)))
}

/// Progress on its way to the events, thinned out.
struct Report {
    done: Arc<AtomicU64>,
    tell: tokio::sync::mpsc::Sender<(u64, Option<u64>)>,
    last_ms: AtomicU64,
    begun: tokio::time::Instant,
}

impl Report {
    fn new(context: &StepContext, machine: &str) -> Self {
        let (tell, mut told) = tokio::sync::mpsc::channel::<(u64, Option<u64>)>(1);
        let (context, machine) = (context.clone(), machine.to_owned());
        // Ends with the sender.
        tokio::spawn(async move {
            while let Some((bytes_done, bytes_total)) = told.recv().await {
                let message = format!("image to {machine}");
                let body = EventBody::Progress { message, bytes_done: Some(bytes_done), bytes_total };
                if let Err(error) =
                    context.core.tell(Some(&context.plan.service), Some(context.id()), body).await
                {
                    tracing::debug!(%error, "progress cannot be stored");
                }
            }
        });
        Self { done: Arc::default(), tell, last_ms: AtomicU64::new(0), begun: tokio::time::Instant::now() }
    }

    fn progress(&self, done: u64, total: Option<u64>) {
        self.done.fetch_max(done, Ordering::Relaxed);
        let at = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        if at < self.last_ms.load(Ordering::Relaxed) + PROGRESS_INTERVAL_MS && total != Some(done) {
            return;
        }
        self.last_ms.store(at, Ordering::Relaxed);
        let _ = self.tell.try_send((done, total)); // full: the next one says more
    }

    fn bytes(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

fn failed(code: &str, message: String) -> Problem {
    let hint = "Deploy the service again with an image that is on a machine or in a registry.".to_owned();
    Problem::Failed(Finding { code: code.to_owned(), message, hint })
}
