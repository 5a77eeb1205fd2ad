//! What the server says of itself: log and metrics. Set up once, before anything can log.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::cli::args::LogFormat;

/// Levels unless `RUST_LOG` says otherwise.
const DEFAULT_LEVELS: &str = "info";
/// Upper bounds of the duration histograms in seconds: from what a loopback takes to what a time-out allows.
const DURATION_BUCKETS_S: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Starts the log on standard error. A second call (tests, the demo) keeps the first one's choice.
pub(crate) fn log(format: Option<LogFormat>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LEVELS));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let _already_started = match format {
        LogFormat::Text => builder.with_ansi(terminal).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Starts the metrics and returns what renders them as Prometheus text.
pub(crate) fn metrics() -> anyhow::Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), DURATION_BUCKETS_S)?;
    Ok(builder.install_recorder()?)
}

/// The demo tells its own story: only what goes wrong is logged, unless `RUST_LOG` asks for more.
pub(crate) fn quiet_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _already_started = builder.try_init();
}
