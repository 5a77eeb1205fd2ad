//! What the server says of itself: log and metrics. Set up once, before anything can log.

use std::io::IsTerminal;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::cli::args::LogFormat;

/// Levels unless `RUST_LOG` says otherwise. What rustls warns of is what strangers send; the edge counts their handshakes.
const DEFAULT_LEVELS: &str = "info,rustls=error";
/// Levels of the demo, which tells its own story: only what goes wrong is logged, unless `RUST_LOG` asks for more.
const QUIET_LEVELS: &str = "error";
/// The crate that speaks with Docker. Below "info" it prints the bodies of its requests, and with them the
/// environments of containers.
const PRINTS_BODIES: &str = "bollard";
/// Upper bounds of the duration histograms in seconds: from what a loopback takes to what a time-out allows.
const DURATION_BUCKETS_S: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Tells how many tasks the runtime of the caller has: everything of this process but the edge's cores, which tell their own.
#[expect(clippy::cast_precision_loss, reason = "a gauge")]
pub(crate) fn tell_tasks() {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        metrics::gauge!("peregrine_tasks").set(runtime.metrics().num_alive_tasks() as f64);
    }
}

/// Says what [`tell_tasks`] tells.
pub(crate) fn describe() {
    metrics::describe_gauge!("peregrine_tasks", "Tasks of the process, without those of the edge's cores");
}

/// Starts the log on standard error. A second call (tests, the demo) keeps the first one's choice.
pub(crate) fn log(format: Option<LogFormat>) {
    let terminal = std::io::stderr().is_terminal();
    start(DEFAULT_LEVELS, format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json }));
}

/// Starts the log of the demo.
pub(crate) fn quiet_log() {
    start(QUIET_LEVELS, LogFormat::Text);
}

fn start(levels: &str, format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(levels));
    let log = without_secrets(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let _already_started = match format {
        LogFormat::Text => log.with(lines.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => log.with(lines.json()).try_init(),
    };
}

/// What passes `filter`, less what may bear secrets. No directive gets round it: `bollard::docker=trace` is more
/// special than any that could be added to the filter itself, so this is a filter of its own.
fn without_secrets(
    filter: EnvFilter,
) -> impl Subscriber + for<'span> LookupSpan<'span> + Send + Sync + 'static {
    registry().with(filter).with(filter_fn(|line| !may_bear_secrets(line)))
}

fn may_bear_secrets(line: &Metadata<'_>) -> bool {
    let from_there = line.target().strip_prefix(PRINTS_BODIES).is_some_and(|rest| !rest.starts_with('_'));
    from_there && *line.level() > Level::INFO
}

/// Between two times that what histograms were given is summed up. Until then each value is kept, so that without this a
/// server that nobody scrapes would grow with every request.
const UPKEEP_INTERVAL_MS: u64 = 5_000;

/// Starts the metrics and returns what renders them as Prometheus text. Needs a runtime, and keeps them up for as long as
/// that lives.
pub(crate) fn metrics() -> anyhow::Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), DURATION_BUCKETS_S)?;
    let handle = builder.install_recorder()?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_millis(UPKEEP_INTERVAL_MS));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("a lock").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged_with(levels: &str) -> String {
        let written = Written::default();
        let to = written.clone();
        let log = without_secrets(EnvFilter::new(levels)).with(fmt::layer().with_writer(move || to.clone()));
        tracing::subscriber::with_default(log, || {
            tracing::debug!(target: "bollard::docker", "the body: TOKEN=hunter2");
            tracing::trace!(target: "bollard::docker", "the body: TOKEN=hunter2");
            tracing::debug!(target: "bollard", "the body: TOKEN=hunter2");
            tracing::info!(target: "bollard::docker", "connected");
            tracing::debug!(target: "peregrine_engine::steps", "a step begins");
        });
        let bytes = written.0.lock().expect("a lock").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn no_levels_that_are_asked_for_print_the_environments_of_containers() {
        for levels in ["debug", "trace", "bollard=trace", "info,bollard::docker=trace"] {
            let log = logged_with(levels);
            assert!(!log.contains("hunter2"), "{levels}: {log}");
            assert!(log.contains("connected"), "{levels}: {log}");
        }
    }

    #[test]
    fn our_own_lines_are_as_the_levels_say() {
        assert!(logged_with("debug").contains("a step begins"));
        assert!(!logged_with("info").contains("a step begins"));
    }
}
