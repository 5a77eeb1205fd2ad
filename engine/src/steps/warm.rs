//! Warm: the new copies have to show that they work, and that they are about as fast as the old ones, before
//! they get traffic. If the plan says so, they are then shown copies of requests (`mirroring.rs`). At last they are
//! connected to before their first request.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use peregrine_routing::Upstream;
use tokio::time::Instant;

use super::pace::{self, Pace};
use super::{Done, Problem, StepContext, mirroring};
use crate::error::{OUT_OF_MEMORY_CODE, OUT_OF_MEMORY_HINT};
use crate::model::{Finding, Instance, InstanceId, InstanceState};
use crate::probe::Probe;
use crate::render;
use crate::runtime::{InstanceStatus, LogOptions, Runtime};

/// Between probes while the copy is not up yet.
const KNOCK_INTERVAL_MS: u64 = 50;
/// Longest time that the runtime may take to say whether the copy runs.
const INSPECT_TIMEOUT_MS: u64 = 2_000;
/// Longest time that the shift is held up for connections that are opened ahead.
const CONNECTIONS_WAIT_MS: u64 = 1_000;
/// Lines of output that a failure quotes.
const QUOTED_LINES: usize = 20;
/// Longest time to fetch them.
const QUOTE_TIMEOUT_MS: u64 = 1_000;

pub(super) async fn forward(context: &StepContext) -> Result<Done, Problem> {
    let mut copies = tokio::task::JoinSet::new();
    for id in context.new_ids() {
        let context = context.clone();
        copies.spawn(async move { warm_one(&context, &id).await });
    }
    let count = copies.len();
    context
        .waiting_for(Some(format!(
            "{} good probes in a row of each new copy",
            context.plan.settings.warm.probes
        )))
        .await;
    let mut paces = Vec::new();
    while let Some(done) = copies.join_next().await {
        match done {
            Ok(pace) => paces.extend(pace?.map(|pace| pace.to_string())),
            Err(error) => {
                return Err(Problem::Failed(Finding {
                    code: "engine.defect".to_owned(),
                    message: format!("warming met a defect: {error}"),
                    hint: "Please report it with the log of the engine.".to_owned(),
                }));
            }
        }
    }
    let paces = if paces.is_empty() { "nothing to compare with".to_owned() } else { paces.join("; ") };
    let mut done = Done::new(format!("{count} copies are warm: {paces}"));
    mirroring::mirror(context, &mut done).await?;
    open_connections(context).await?;
    Ok(done)
}

/// Has the edges open connections to the copies that have proved themselves, so that no first request waits for
/// a handshake. A help and no condition: what is not there in time is opened by the requests.
async fn open_connections(context: &StepContext) -> Result<(), Problem> {
    let table = &context.core.table;
    let (count, edges) = (context.core.config.ready_connections, table.edges());
    if count == 0 || edges == 0 {
        return Ok(());
    }
    let copies: Vec<_> = context.new_ids().iter().filter_map(|id| subject(context, id).ok()).collect();
    let mut asked = Vec::new();
    for (instance, probe) in copies {
        if instance.state == InstanceState::Started && probe.keeps_connections().await {
            table.ask_for_connections(instance.generation, count);
            asked.extend(table.upstream(instance.generation));
        }
    }
    if asked.is_empty() {
        return Ok(());
    }
    context.publish_unawaited()?;
    let wanted = u64::from(count) * edges as u64;
    let opened = join_all(asked.iter().map(|upstream| has_connections(upstream, wanted)));
    if tokio::time::timeout(Duration::from_millis(CONNECTIONS_WAIT_MS), opened).await.is_err() {
        tracing::debug!(rollout = %context.id(), wanted, "not all connections were opened ahead");
    }
    Ok(())
}

async fn has_connections(upstream: &Upstream, wanted: u64) {
    loop {
        let turn = upstream.listen();
        if upstream.ready_connections() >= wanted {
            return;
        }
        turn.await;
    }
}

/// Warms one copy; how fast it is beside an old one, if that could be told.
async fn warm_one(context: &StepContext, id: &InstanceId) -> Result<Option<Pace>, Problem> {
    let (instance, probe) = subject(context, id)?;
    let runtime = context.runtime(&instance.machine)?;
    let settings = &context.plan.settings;
    let deadline = Instant::now() + Duration::from_millis(u64::from(settings.start_timeout_ms));
    let mut last_pace = None;
    let pace = loop {
        get_healthy(context, &*runtime, &instance, &probe, deadline).await?;
        for path in &settings.warm.paths {
            warm_path(&probe, &instance, path).await?;
        }
        let (Some(increase), Some(old)) = (settings.guards.p95_increase, old_probe(context)) else {
            break None;
        };
        match pace::measure(&probe, &old, &settings.warm.paths, deadline).await {
            Ok(Some(pace)) if pace.is_slower(increase) => {
                context.waiting_for(Some(format!("{id} to get as fast as the old copies: {pace}"))).await;
                last_pace = Some(pace);
            }
            Ok(pace) => break pace,
            Err(why) => tracing::debug!(instance = %id, why, "a copy that was healthy is probed anew"),
        }
        if Instant::now() >= deadline {
            return Err(never_fast(&instance, settings.start_timeout_ms, last_pace, increase));
        }
        tokio::time::sleep(Duration::from_millis(u64::from(settings.warm.probe_interval_ms))).await;
    };
    // It may have answered its last probe while it died.
    fail_if_exited(&*runtime, &instance).await?;
    Ok(pace)
}

/// Asks every new copy as often as it was asked before its first request; how many good answers there were, or
/// what was wrong with one.
pub(super) async fn probe_new_copies(context: &StepContext) -> Result<u32, String> {
    let (probes, mut good) = (context.plan.settings.warm.probes.max(1), 0);
    for id in context.new_ids() {
        let state = context.core.state();
        let found = state.instances.get(&id).and_then(|instance| probe_of(context, instance));
        let Some(probe) = found else { return Err(format!("copy {id} is not there")) };
        for _ in 0..probes {
            probe
                .once()
                .await
                .map_err(|why| format!("too few requests, and a probe of {id} was bad: {why}"))?;
            good += 1;
        }
    }
    Ok(good)
}

/// Waits for good probes in a row.
async fn get_healthy(
    context: &StepContext,
    runtime: &dyn Runtime,
    instance: &Instance,
    probe: &Probe,
    deadline: Instant,
) -> Result<(), Problem> {
    let settings = &context.plan.settings;
    let mut good = 0;
    let mut last = String::from("it was not probed");
    while good < settings.warm.probes {
        match probe.once().await {
            Ok(_) => good += 1,
            Err(why) => {
                good = 0;
                last = why;
                fail_if_exited(runtime, instance).await?;
            }
        }
        if good >= settings.warm.probes {
            break;
        }
        if Instant::now() >= deadline {
            return Err(never_healthy(runtime, instance, settings.start_timeout_ms, &last).await);
        }
        let interval = if good == 0 { KNOCK_INTERVAL_MS } else { u64::from(settings.warm.probe_interval_ms) };
        tokio::time::sleep(Duration::from_millis(interval)).await;
    }
    Ok(())
}

/// An old copy that serves: the measure of the new ones.
fn old_probe(context: &StepContext) -> Option<Probe> {
    let state = context.core.state();
    let old = context.plan.retire.iter().chain(&context.plan.keep);
    let serving = old.filter_map(|id| state.instances.get(id)).find(|i| i.state == InstanceState::Serving)?;
    let spec = &state.services.get(&serving.service)?.spec;
    Some(Probe {
        address: serving.address?,
        protocol: spec.traffic.protocol,
        send_proxy_protocol: spec.traffic.send_proxy_protocol,
        host: render::probe_host(spec),
        health: state.version(&serving.service, serving.version)?.health.clone(),
        dial: context.core.config.outside.dial.clone(),
    })
}

async fn warm_path(probe: &Probe, instance: &Instance, path: &str) -> Result<(), Problem> {
    let why = match probe.warm_up(path).await {
        Ok(answer) if answer.status < 500 => return Ok(()),
        Ok(answer) => format!("{path} answers {}", answer.status),
        Err(why) => why,
    };
    Err(Problem::Failed(Finding {
        code: "warm.path_failed".to_owned(),
        message: format!("{} on {}: warm-up {why}", instance.service, instance.machine),
        hint: "Correct the version or take the path out of move.warm.paths.".to_owned(),
    }))
}

fn subject(context: &StepContext, id: &InstanceId) -> Result<(Instance, Probe), Problem> {
    let state = context.core.state();
    let found = || {
        let instance = state.instances.get(id)?;
        Some((instance.clone(), probe_of(context, instance)?))
    };
    found().ok_or_else(|| {
        Problem::Failed(Finding {
            code: "instance.unknown".to_owned(),
            message: format!("there is no running copy {id}"),
            hint: "Start the rollout again.".to_owned(),
        })
    })
}

/// How a new copy is asked.
fn probe_of(context: &StepContext, instance: &Instance) -> Option<Probe> {
    let state = context.core.state();
    let change = state.changes.get(context.id()).and_then(|change| change.after.as_deref());
    let spec = change.or_else(|| state.services.get(&instance.service).map(|service| &service.spec))?;
    Some(Probe {
        address: instance.address?,
        protocol: spec.traffic.protocol,
        send_proxy_protocol: spec.traffic.send_proxy_protocol,
        host: render::probe_host(spec),
        health: state.version(&instance.service, instance.version)?.health.clone(),
        dial: context.core.config.outside.dial.clone(),
    })
}

/// A copy that has ended is not waited for.
async fn fail_if_exited(runtime: &dyn Runtime, instance: &Instance) -> Result<(), Problem> {
    let limit = Duration::from_millis(INSPECT_TIMEOUT_MS);
    let status = match tokio::time::timeout(limit, runtime.inspect(&instance.id)).await {
        Ok(Ok(status)) if status.as_ref().is_none_or(|status| !status.running) => status,
        _ => return Ok(()),
    };
    let ending = status.as_ref().map_or_else(|| "an unknown code".to_owned(), InstanceStatus::ending);
    let output = last_output(runtime, &instance.id).await;
    let (code, hint) = if status.is_some_and(|status| status.out_of_memory) {
        (OUT_OF_MEMORY_CODE, OUT_OF_MEMORY_HINT)
    } else {
        ("instance.exited", "Read its last output; check command, environment and port.")
    };
    Err(Problem::Failed(Finding {
        code: code.to_owned(),
        message: format!(
            "{} on {} exited with {ending} before it was healthy: {output}",
            instance.service, instance.machine
        ),
        hint: hint.to_owned(),
    }))
}

async fn never_healthy(runtime: &dyn Runtime, instance: &Instance, limit_ms: u32, last: &str) -> Problem {
    let output = last_output(runtime, &instance.id).await;
    Problem::Failed(Finding {
        code: "instance.never_healthy".to_owned(),
        message: format!(
            "{} on {} was not healthy within {limit_ms} ms: {last}; its last output: {output}",
            instance.service, instance.machine
        ),
        hint: "Check the port and the health path in the manifest, or raise move.start_timeout_ms."
            .to_owned(),
    })
}

fn never_fast(instance: &Instance, limit_ms: u32, pace: Option<Pace>, increase: f64) -> Problem {
    let pace = pace.map_or_else(|| "it could not be measured".to_owned(), |pace| pace.judged(increase));
    Problem::Failed(Finding {
        code: "warm.too_slow".to_owned(),
        message: format!(
            "{} on {} did not get as fast as the old copies within {limit_ms} ms: {pace}",
            instance.service, instance.machine
        ),
        hint: "Give it longer (move.start_timeout_ms), name warm-up paths that fill its caches \
               (move.warm.paths), or allow more (move.guards.p95_increase; off: nothing is compared)."
            .to_owned(),
    })
}

async fn last_output(runtime: &dyn Runtime, id: &InstanceId) -> String {
    let options = LogOptions { follow: false, tail: Some(QUOTED_LINES), since: None };
    let mut lines = VecDeque::new();
    let mut stream = runtime.logs(id, options);
    let read = async {
        while let Some(Ok(line)) = stream.next().await {
            lines.push_back(line.text);
            if lines.len() > QUOTED_LINES {
                lines.pop_front();
            }
        }
    };
    // What came until then is quoted.
    let _ = tokio::time::timeout(Duration::from_millis(QUOTE_TIMEOUT_MS), read).await;
    if lines.is_empty() { "(none)".to_owned() } else { Vec::from(lines).join(" | ") }
}
