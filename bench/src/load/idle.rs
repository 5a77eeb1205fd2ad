//! Connections that exist and say nothing: what a proxy mostly holds in real life.

use std::sync::Arc;

use http::HeaderValue;
use tokio::task::JoinSet;

use super::connection::Connection;
use super::driver::Shared;
use super::options::{LoadError, LoadOptions};
use super::tally::Outcome;

/// How many connections are being opened at once.
const OPENING_AT_ONCE: usize = 32;

/// Idle connections, each past one successful request. Dropping it closes them.
#[derive(Debug)]
pub struct IdleConnections {
    shared: Arc<Shared>,
    held: Vec<Connection>,
    failures: Vec<String>,
}

impl IdleConnections {
    /// Opens `options.idle_connections` connections to the target and sends one request over each.
    ///
    /// # Errors
    /// The options contradict themselves. Connections that fail are counted in [`IdleConnections::failures`].
    pub async fn open(options: LoadOptions) -> Result<Self, LoadError> {
        Ok(Self::open_for(&Arc::new(Shared::new(options)?)).await)
    }

    pub(super) async fn open_for(shared: &Arc<Shared>) -> Self {
        let mut idle = Self { shared: shared.clone(), held: Vec::new(), failures: Vec::new() };
        let mut opening = JoinSet::new();
        let mut begun = 0;
        while begun < shared.options.idle_connections || !opening.is_empty() {
            if begun < shared.options.idle_connections && opening.len() < OPENING_AT_ONCE {
                opening.spawn(open_one(shared.clone(), begun));
                begun += 1;
                continue;
            }
            match opening.join_next().await {
                Some(Ok(Ok(connection))) => idle.held.push(connection),
                Some(Ok(Err(why))) => {
                    shared.tally().idle_failed += 1;
                    idle.failures.push(why);
                }
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => {}
            }
        }
        idle
    }

    /// How many could be opened.
    #[must_use]
    pub const fn opened(&self) -> usize {
        self.held.len()
    }

    /// Why the others could not.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// How many of this run's connections the peer has closed by now.
    #[must_use]
    pub fn closed_by_peer(&self) -> u64 {
        self.shared.tally().connections_closed_by_peer
    }
}

async fn open_one(shared: Arc<Shared>, number: usize) -> Result<Connection, String> {
    let mut connection = Connection::open(&shared).await?;
    let id =
        HeaderValue::from_str(&format!("{}-idle-{number}", shared.options.run)).map_err(|e| e.to_string())?;
    let request = shared.request(0, id.clone());
    match connection.exchange(&shared, id, request).await {
        Outcome::Ok { .. } => Ok(connection),
        Outcome::Failed { kind, detail } => Err(format!("{kind}: {detail}")),
    }
}
