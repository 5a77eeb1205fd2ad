//! Mirroring: before a new copy gets traffic, it gets copies of safe requests, and is judged by its answers.
//!
//! ```text
//!   on (published, acknowledged) ─► counts come up ─► verdict, or time ─► off (published, acknowledged) ─► told
//! ```
//!
//! That it is on is nowhere durable: a table that is rendered anew without this step says nothing of it, so that no
//! crash leaves it on, and edges end it by themselves when its time is over. A step that is given up takes it out of
//! the table on its way. It fails the warm-up, or says what it saw; it never delays or fails a client's request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::{MirrorCounts, MirrorSpec, Upstream};
use tokio::time::Instant;

use super::{Done, Problem, StepContext};
use crate::core::Core;
use crate::model::{EventBody, Finding, MirrorReport, MirrorSettings};
use crate::render::NEW_POOL;
use crate::rollout::{MirrorJudge, Verdict};

/// How often the counts are looked at.
const LOOK_INTERVAL_MS: u64 = 25;
/// An edge ends it by itself so long after the engine should have.
const OVERTIME_MS: u32 = 5_000;
/// So much of an answer's body is read.
const MAX_BODY_BYTES: u64 = 1 << 20;
/// Answers without which a 95th percentile says nothing.
const MIN_P95_SAMPLES: u64 = 20;
/// Below this difference nobody feels a slower answer.
const MIN_P95_DIFFERENCE_US: u64 = 5_000;

/// How long a warm-up may take longer for it, in milliseconds.
pub(super) fn longest_ms(settings: &MirrorSettings) -> u64 {
    u64::from(settings.max_ms) + u64::from(OVERTIME_MS)
}

/// Mirrors if the plan says so; what was seen is told with the step's settlement.
pub(super) async fn mirror(context: &StepContext, done: &mut Done) -> Result<(), Problem> {
    let plan = &context.plan;
    let Some(settings) = &plan.settings.warm.mirror else { return Ok(()) };
    let has_old = !(plan.retire.is_empty() && plan.keep.is_empty());
    let targets = targets(context);
    if !has_old || targets.is_empty() || context.core.table.edges() == 0 {
        return Ok(());
    }
    let before = counts(&targets);
    let on = MirrorOn::new(context, settings);
    context.publish().await?;
    context
        .waiting_for(Some(format!(
            "{} answers to copies of requests, for {} ms at most",
            settings.min_samples, settings.max_ms
        )))
        .await;
    let verdict = watch(context, settings, &targets, &before).await;
    on.end();
    context.publish().await?;
    let report = report(context, settings, verdict, &counts(&targets).since(&before));
    tell(context, report, done).await
}

/// Looks until there is a verdict, or no more time for one.
async fn watch(
    context: &StepContext,
    settings: &MirrorSettings,
    targets: &[Arc<Upstream>],
    before: &MirrorCounts,
) -> Verdict {
    let begun_ms = context.run.elapsed_ms();
    let mut judge = MirrorJudge::begin(begun_ms, settings.differing_ratio, u64::from(settings.min_samples));
    let deadline = Instant::now() + Duration::from_millis(u64::from(settings.max_ms));
    loop {
        let verdict = judge.look(context.run.elapsed_ms(), &counts(targets).since(before));
        if matches!(verdict, Verdict::Pass | Verdict::Fail(_)) || Instant::now() >= deadline {
            return verdict;
        }
        let next = Instant::now() + Duration::from_millis(LOOK_INTERVAL_MS);
        tokio::time::sleep_until(next.min(deadline)).await;
    }
}

/// The report is durable before the step is settled; one that speaks against the new copies fails the step.
async fn tell(context: &StepContext, report: MirrorReport, done: &mut Done) -> Result<(), Problem> {
    let (service, told) = (context.plan.service.clone(), report.clone());
    let failed = report.verdict == "fail";
    let event = EventBody::Guard { verdict: report.verdict, message: report.message.clone() };
    let with_it = failed.then(|| event.clone());
    context
        .commit(move |draft, rollout| {
            let mut rollout = rollout.clone();
            rollout.mirror = Some(told);
            draft.put_rollout(&rollout);
            if let Some(event) = with_it {
                draft.event(Some(&service), Some(&rollout.id), event);
            }
            Ok(())
        })
        .await?;
    if failed {
        return Err(Problem::Failed(Finding {
            code: "warm.mirror_differs".to_owned(),
            message: format!(
                "{}: the new copies answer copies of requests worse than clients were answered: {}",
                context.plan.service, report.message
            ),
            hint: "No client has met them. Read the new version's output; if the difference is meant, allow more \
                   (move.warm.mirror.differing) or leave mirroring out."
                .to_owned(),
        }));
    }
    done.output = format!("{}; {}", done.output, report.message);
    done.events.push(event);
    Ok(())
}

fn report(
    context: &StepContext,
    settings: &MirrorSettings,
    verdict: Verdict,
    counts: &MirrorCounts,
) -> MirrorReport {
    let p95 = |latency: &peregrine_routing::LatencyBuckets| latency.quantile_us(0.95);
    let mut report = MirrorReport {
        sent: counts.sent,
        compared: counts.compared(),
        failed: counts.failed(),
        differed: differed(counts),
        unequal: counts.unequal,
        unfinished: counts.unfinished,
        skipped: counts.skipped,
        left_out: counts.left_out,
        client_p95_us: p95(&counts.client_latency),
        mirror_p95_us: p95(&counts.mirror_latency),
        ..MirrorReport::default()
    };
    let (word, why) = match verdict {
        Verdict::Pass => ("pass", "nothing speaks against the new copies".to_owned()),
        Verdict::Fail(why) => ("fail", why),
        Verdict::Suspicion(why) => ("inconclusive", why),
        Verdict::TooFew => {
            let wanted = settings.min_samples;
            let found = counts.judged();
            ("inconclusive", format!("{found} of {wanted} answers in {} ms", settings.max_ms))
        }
    };
    word.clone_into(&mut report.verdict);
    report.message = format!("mirrored: {}: {why}", numbers(&report));
    if let Some(warning) = slower(&report, context.plan.settings.guards.p95_increase) {
        report.message = format!("{}; warning: {warning}", report.message);
    }
    if report.left_out > 0 && report.verdict == "inconclusive" {
        report.message = format!(
            "{}; {} requests carried credentials and were left out (move.warm.mirror.with_credentials)",
            report.message, report.left_out
        );
    }
    report
}

fn differed(counts: &MirrorCounts) -> BTreeMap<String, u64> {
    let mut differed = BTreeMap::new();
    for (client, mirror) in (1..=5).flat_map(|client| (1..=5).map(move |mirror| (client, mirror))) {
        let count = counts.pairs_where(|c, m| (c, m) == (client, mirror));
        if client != mirror && count > 0 {
            differed.insert(format!("{client}xx>{mirror}xx"), count);
        }
    }
    differed
}

fn numbers(report: &MirrorReport) -> String {
    let differed: u64 = report.differed.values().sum();
    format!("{} compared, {differed} of another class, {} not answered", report.compared, report.failed)
}

/// That they are slower is told and no more: copies of requests meet cold caches, and the shift judges by p95.
fn slower(report: &MirrorReport, increase: Option<f64>) -> Option<String> {
    let (Some(client_us), Some(mirror_us), Some(increase)) =
        (report.client_p95_us, report.mirror_p95_us, increase)
    else {
        return None;
    };
    #[expect(clippy::cast_precision_loss, reason = "microseconds of one answer")]
    let (client, mirror) = (client_us as f64, mirror_us as f64);
    let is_slower = mirror > client * (1.0 + increase) && mirror_us > client_us + MIN_P95_DIFFERENCE_US;
    (is_slower && report.compared >= MIN_P95_SAMPLES).then(|| {
        format!("p95 of the copies {:.1} ms, of the clients' answers {:.1} ms", mirror / 1e3, client / 1e3)
    })
}

fn targets(context: &StepContext) -> Vec<Arc<Upstream>> {
    let state = context.core.state();
    let new = context.new_ids();
    let generations = new.iter().filter_map(|id| state.instances.get(id)).map(|instance| instance.generation);
    generations.filter_map(|generation| context.core.table.upstream(generation)).collect()
}

fn counts(targets: &[Arc<Upstream>]) -> MirrorCounts {
    let mut sum = MirrorCounts::default();
    targets.iter().for_each(|target| sum.add(&target.mirrored()));
    sum
}

/// The mirror is in the table from the next publication on. If it is dropped before its end it takes itself out.
struct MirrorOn {
    core: Arc<Core>,
    service: String,
    /// Whose it is: that of an attempt that began later stays.
    attempt: u64,
    ended: bool,
}

impl MirrorOn {
    fn new(context: &StepContext, settings: &MirrorSettings) -> Self {
        let spec = MirrorSpec {
            pool: NEW_POOL.into(),
            sample_permille: settings.sample_permille,
            max_requests_per_s: settings.max_requests_per_s,
            max_concurrent: settings.max_concurrent,
            timeout_ms: settings.timeout_ms,
            max_body_bytes: MAX_BODY_BYTES,
            with_credentials: settings.with_credentials,
            lasts_ms: settings.max_ms.saturating_add(OVERTIME_MS),
        };
        let (core, service) = (Arc::clone(&context.core), context.plan.service.clone());
        core.table.mirror(&service, context.intent, spec);
        Self { core, service, attempt: context.intent, ended: false }
    }

    fn end(mut self) {
        self.core.table.end_mirror(&self.service, self.attempt);
        self.ended = true;
    }
}

impl Drop for MirrorOn {
    fn drop(&mut self) {
        if self.ended || !self.core.table.end_mirror(&self.service, self.attempt) {
            return;
        }
        if let Err(error) = self.core.table.publish(&self.core, &self.service) {
            tracing::warn!(service = %self.service, %error, "a mirror is left to end by itself");
        }
    }
}
