//! A load generator that counts every failure.
//!
//! Each request has its own id (`<run>-<number>` in `x-req-id`), is sent once, and ends as exactly one of: a complete
//! 2xx answer, or one [`FailureKind`]. Nothing is retried: a keep-alive connection that the peer closes under a request
//! is a failure, whatever a forgiving client would make of it. A connection that the peer closed *between* requests is
//! replaced and counted in [`Summary::connections_closed_by_peer`].
//!
//! In the open loop ([`Pace::Open`]) request n is due at start + n / rate and its latency counts from then, so a stalled
//! peer cannot hide its stall by slowing the load down.

mod connection;
mod driver;
mod echo;
mod idle;
mod options;
mod pacer;
mod tally;
mod tls;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::driver::Shared;
pub use self::echo::{EchoOptions, Echoed, echo};
pub use self::idle::IdleConnections;
pub use self::options::{Expect, LoadError, LoadOptions, Pace, Protocol, Tls, Until};
pub use self::tally::{Failure, FailureKind, Failures, Latency, Sample, Summary};

/// Starts load runs.
#[derive(Debug)]
pub struct Load;

impl Load {
    /// Starts a run on the current tokio runtime.
    ///
    /// # Errors
    /// The options contradict themselves; nothing was sent.
    pub fn start(options: LoadOptions) -> Result<LoadHandle, LoadError> {
        let shared = Arc::new(Shared::new(options)?);
        let running = tokio::spawn(driver::run(shared.clone()));
        Ok(LoadHandle { shared, running })
    }

    /// Runs to the end of [`LoadOptions::until`].
    ///
    /// # Errors
    /// The options contradict themselves; nothing was sent.
    pub async fn run(options: LoadOptions) -> Result<Summary, LoadError> {
        let mut handle = Self::start(options)?;
        handle.ended().await;
        Ok(handle.stop().await)
    }
}

/// A run that goes on. Dropping it cuts the run; [`LoadHandle::stop`] lets the requests in flight finish.
#[derive(Debug)]
pub struct LoadHandle {
    shared: Arc<Shared>,
    running: JoinHandle<()>,
}

impl LoadHandle {
    /// The run's name, the first part of its ids.
    #[must_use]
    pub fn run_name(&self) -> &str {
        &self.shared.options.run
    }

    /// The counters from the start of the run until now.
    #[must_use]
    pub fn live(&self) -> Sample {
        self.shared.tally().total_sample(self.shared.elapsed_ms())
    }

    /// The counters of each [`LoadOptions::sample_ms`], newest last; a slow reader misses some.
    #[must_use]
    pub fn samples(&self) -> watch::Receiver<Sample> {
        self.shared.samples.subscribe()
    }

    /// Returns once the run has come to its end by itself.
    pub async fn ended(&mut self) {
        if !self.running.is_finished() {
            let mut ended = self.shared.ended.subscribe();
            // The sender lives in `shared`, so the wait cannot fail.
            drop(ended.wait_for(|ended| *ended).await);
        }
    }

    /// Sends nothing new, waits for the answers in flight (bounded by the request time-out) and tells the result.
    pub async fn stop(mut self) -> Summary {
        self.shared.stop();
        if let Err(error) = (&mut self.running).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
        self.shared.summary()
    }
}

impl Drop for LoadHandle {
    fn drop(&mut self) {
        self.running.abort();
    }
}
