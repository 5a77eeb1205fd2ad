//! `peregrine engine --standby`: waiting for the lead. Nothing is read or written before it is taken; probes are told so.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use peregrine_api::probes::Probes;
use peregrine_api::types::{Readiness, ReadinessCheck};
use peregrine_engine::store::SqliteStore;
use serde_json::json;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::serve::{LEAD_PATIENCE_MS, Signals, internal, store_failure};

/// Waits until this process leads; `None` when it is to end before.
pub(crate) async fn stand_by(
    api: SocketAddr,
    data: &Path,
    signals: &mut Signals,
) -> Result<Option<SqliteStore>> {
    let probes = probes(api).await?;
    tracing::info!(data = %data.display(), "standing by");
    let stop = Arc::new(AtomicBool::new(false));
    let (folder, stopped) = (data.to_owned(), Arc::clone(&stop));
    let patience = Duration::from_millis(LEAD_PATIENCE_MS);
    let mut waiting = tokio::task::spawn_blocking(move || {
        SqliteStore::stand_by(&folder, patience, || stopped.load(Ordering::Relaxed))
    });
    let waited = tokio::select! {
        waited = &mut waiting => waited,
        () = signals.stop() => {
            stop.store(true, Ordering::Relaxed);
            return Ok(None);
        }
    };
    let store = waited
        .map_err(|error| internal("engine.standby", &error.into()))?
        .map_err(|error| store_failure(data, &error))?;
    if let Some(store) = &store {
        tracing::info!(epoch = store.epoch(), "this engine leads now");
    }
    probes.end().await;
    Ok(store)
}

/// Answers probes at the address of the API, which takes its place when this process leads.
async fn probes(api: SocketAddr) -> Result<Probes> {
    let check = ReadinessCheck {
        name: "lead".to_owned(),
        ok: false,
        detail: "another engine leads; this one stands by".to_owned(),
    };
    let report = json!(Readiness { ready: false, checks: vec![check] });
    Probes::bind(api, Arc::new(move || (false, report.clone())), None).await.map_err(|error| {
        Failure::new(Exit::Failed, "api.bind", format!("cannot listen on {api}: {error}"))
            .hint("the engine that leads has an address of its own: give this one another with [api] listen")
    })
}
