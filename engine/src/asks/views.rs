//! Live pictures: instances with what the edge knows of them, and their output.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use peregrine_routing::{Health, Upstream};

use super::observe::ANSWER_LIMIT_MS;
use crate::core::Core;
use crate::error::{EngineError, ErrorKind};
use crate::handle::InstanceView;
use crate::model::{Instance, InstanceId};
use crate::runtime::{InstanceStats, LogLine, LogOptions};

pub(crate) async fn instances(
    core: &Arc<Core>,
    service: Option<&str>,
    with_stats: bool,
) -> Result<Vec<InstanceView>, EngineError> {
    let state = core.state();
    if let Some(service) = service.filter(|service| !state.services.contains_key(*service)) {
        return Err(EngineError::new(
            ErrorKind::NotFound,
            "service.unknown",
            format!("there is no service {service}"),
            "See the services: peregrine services.",
        ));
    }
    let chosen =
        state.instances.values().filter(|instance| service.is_none_or(|service| instance.service == service));
    let mut views: Vec<InstanceView> = chosen.map(|instance| view(core, instance)).collect();
    drop(state);
    if with_stats {
        add_stats(core, &mut views).await;
    }
    Ok(views)
}

fn view(core: &Core, instance: &Instance) -> InstanceView {
    let upstream = core.table.upstream(instance.generation);
    let outcomes = upstream.as_ref().map(|upstream| upstream.outcomes()).unwrap_or_default();
    let receipt = upstream.as_ref().map(|upstream| upstream.receipt());
    InstanceView {
        weight_percent: core.table.share_percent(&instance.service, instance.generation),
        health: upstream.as_ref().map_or("unknown", |upstream| health(upstream, core.edge_now_ms())),
        in_flight: receipt.as_ref().map_or(0, |receipt| receipt.in_flight.total()),
        requests: receipt.as_ref().map_or(0, |receipt| receipt.started),
        errors: outcomes.errors(),
        p50_us: outcomes.latency.quantile_us(0.5),
        p95_us: outcomes.latency.quantile_us(0.95),
        probe_latency_us: upstream.map(|upstream| upstream.probe_latency_us()).filter(|us| *us > 0),
        stats: None,
        instance: instance.clone(),
    }
}

fn health(upstream: &Upstream, now_ms: u64) -> &'static str {
    if upstream.is_retired() {
        return "retired";
    }
    if upstream.ejected_until_ms() > now_ms {
        return "ejected";
    }
    match upstream.health() {
        Health::Healthy => "healthy",
        Health::Unhealthy => "unhealthy",
        Health::Unknown => "unknown",
    }
}

async fn add_stats(core: &Arc<Core>, views: &mut [InstanceView]) {
    let mut asked = tokio::task::JoinSet::new();
    for (index, view) in views.iter().enumerate() {
        let Some(runtime) = core.runtime(&view.instance.machine) else { continue };
        let id = view.instance.id.clone();
        asked.spawn(async move {
            let limit = Duration::from_millis(ANSWER_LIMIT_MS);
            let stats: Option<InstanceStats> =
                tokio::time::timeout(limit, runtime.stats(&id)).await.ok().and_then(Result::ok);
            (index, stats)
        });
    }
    while let Some(Ok((index, stats))) = asked.join_next().await {
        views[index].stats = stats;
    }
}

pub(crate) fn logs(
    core: &Arc<Core>,
    id: &InstanceId,
    options: LogOptions,
) -> Result<BoxStream<'static, Result<LogLine, EngineError>>, EngineError> {
    let unknown = || {
        EngineError::new(
            ErrorKind::NotFound,
            "instance.unknown",
            format!("there is no instance {id}"),
            "See the instances: peregrine status.",
        )
    };
    let machine =
        core.state().instances.get(id).map(|instance| instance.machine.clone()).ok_or_else(unknown)?;
    let runtime = core.runtime(&machine).ok_or_else(unknown)?;
    Ok(runtime.logs(id, options).map(|line| line.map_err(EngineError::from)).boxed())
}
