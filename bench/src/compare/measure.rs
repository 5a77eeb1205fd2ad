//! One measurement of one contender: a fresh process, warmed up, loaded, ended.

use std::path::Path;
use std::time::{Duration, Instant};

use super::CompareError;
use super::certificate::Certificate;
use super::client::Clients;
use super::contender::{Contender, Running};
use super::origin::Origin;
use super::process::{Core, core_busy_us};
use super::report::{ClosedRun, OpenRun};
use super::scenario::{Scenario, Wire};
use crate::load::{IdleConnections, Load, LoadOptions, Pace, Tls, Until};

/// Requests that fill pools and caches before anything is counted; large replies need fewer.
const WARM_UP_REQUESTS: u64 = 2_000;
const WARM_UP_LARGE_REQUESTS: u64 = 200;
const LARGE_REPLY_BYTES: u64 = 100 << 10;
/// How often the upstream is switched in the switching scenario, in milliseconds.
const SWITCH_EVERY_MS: u64 = 1_000;

/// How often memory is looked at until it stays as it is, and how many times at most.
const SETTLE_LOOK_EVERY_MS: u64 = 2_000;
const MAX_SETTLE_LOOKS: u32 = 5;

/// What every measurement of a comparison shares.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) clients: Clients,
    pub(super) origin: Origin,
    pub(super) core: Core,
    pub(super) certificate: Certificate,
    pub(super) scratch: &'a Path,
}

impl Bench<'_> {
    /// As fast as it goes for `seconds`.
    pub(super) async fn closed(
        &self,
        contender: &Contender,
        scenario: &Scenario,
        round: u64,
        seconds: u64,
    ) -> Result<ClosedRun, CompareError> {
        let mut running = self.start(contender, scenario).await?;
        let target = address(&running, scenario);
        let memory_before_kib = running.process.memory_kib();
        let idle = self.hold_idle(&running, scenario).await?;
        let idle_kib = self.settled_memory_kib(&running, scenario).await.saturating_sub(memory_before_kib);
        let seen_before = self.origin.seen().await?;
        let (cpu_before, busy_before) = (running.process.cpu_us(), core_busy_us(self.core));
        let started = Instant::now();
        let loading = self.clients.run(scenario, (target, self.tls(scenario)), seconds);
        let (served, switches) = while_switching(&mut running, scenario, loading).await?;
        let (took, cpu_us) = (started.elapsed(), running.process.cpu_us() - cpu_before);
        let busy_us = core_busy_us(self.core).unwrap_or(0).saturating_sub(busy_before.unwrap_or(0));
        let seen = self.origin.seen().await?;
        let memory_kib = running.process.memory_kib();
        let idle_closed = idle.as_ref().map_or(0, IdleConnections::closed_by_peer);
        drop(idle);
        running.stop().await;
        Ok(ClosedRun {
            contender: contender.kind.name().to_owned(),
            round,
            requests: served.requests,
            failed: served.failed,
            requests_per_second: served.requests as f64 / seconds as f64,
            cpu_us_per_request: cpu_us as f64 / served.requests as f64,
            core_use: cpu_us as f64 / took.as_micros() as f64,
            others_use: busy_us.saturating_sub(cpu_us) as f64 / took.as_micros() as f64,
            memory_kib,
            // The question itself came over a connection of its own.
            upstream_connections: seen.connections - seen_before.connections - 1,
            upstream_requests: seen.requests - seen_before.requests - 1,
            switches,
            idle_closed,
            bytes_per_idle_connection: bytes_for_each(idle_kib, scenario.idle_connections as u64),
        })
    }

    /// At `per_second` for `duration_ms`.
    pub(super) async fn open(
        &self,
        contender: &Contender,
        scenario: &Scenario,
        round: u64,
        (per_second, duration_ms): (u32, u64),
    ) -> Result<OpenRun, CompareError> {
        let mut running = self.start(contender, scenario).await?;
        let target = address(&running, scenario);
        let idle = self.hold_idle(&running, scenario).await?;
        let cpu_before = running.process.cpu_us();
        let options = scenario.open_loop(target, self.tls(scenario), per_second, duration_ms);
        let loading = async { Ok(Load::run(options).await?) };
        let (summary, _) = while_switching(&mut running, scenario, loading).await?;
        let cpu_us = running.process.cpu_us() - cpu_before;
        drop(idle);
        running.stop().await;
        Ok(OpenRun {
            contender: contender.kind.name().to_owned(),
            round,
            requests: summary.sent,
            failed: summary.failed.total(),
            first_failure: summary
                .failures
                .first()
                .map(|failure| format!("{}: {}", failure.kind, failure.detail)),
            p50_us: summary.latency_us.p50,
            p99_us: summary.latency_us.p99,
            max_us: summary.latency_us.max,
            cpu_us_per_request: cpu_us as f64 / summary.sent.max(1) as f64,
            connections_closed_by_peer: summary.connections_closed_by_peer,
        })
    }

    /// Whether the contender can be told to switch its upstream and does: to the other one and back.
    pub(super) async fn try_switching(
        &self,
        contender: &Contender,
        scenario: &Scenario,
    ) -> Result<(), CompareError> {
        let mut running = self.start(contender, scenario).await?;
        for _ in 0..2 {
            running.switch_upstream().await?;
            running.wait_until_switched().await?;
        }
        running.stop().await;
        Ok(())
    }

    async fn start(&self, contender: &Contender, scenario: &Scenario) -> Result<Running, CompareError> {
        let folder = self.scratch.join(contender.kind.name());
        let cleared = || -> std::io::Result<()> {
            if folder.exists() {
                std::fs::remove_dir_all(&folder)?;
            }
            std::fs::create_dir(&folder)
        };
        cleared().map_err(|error| CompareError::start(&folder, error))?;
        let certificate = scenario.tls.then_some(&self.certificate);
        let running = contender.start(self.core, &folder, certificate).await?;
        let requests =
            if scenario.reply_bytes > LARGE_REPLY_BYTES { WARM_UP_LARGE_REQUESTS } else { WARM_UP_REQUESTS };
        let warm_up = LoadOptions {
            pace: Pace::Closed,
            until: Until::Count(requests),
            ..scenario.open_loop(address(&running, scenario), self.tls(scenario), 1, 1)
        };
        let warmed = Load::run(warm_up).await?;
        match warmed.failures.first() {
            None => Ok(running),
            Some(failure) => Err(CompareError::NotServing(format!(
                "{} failed in the warm-up of {}: {}: {}",
                contender.kind.name(),
                scenario.name,
                failure.kind,
                failure.detail
            ))),
        }
    }

    /// What a contender keeps for clients that stay silent: some let go of things when they have been so for a moment.
    async fn settled_memory_kib(&self, running: &Running, scenario: &Scenario) -> u64 {
        let mut memory_kib = running.process.memory_kib();
        if scenario.idle_connections == 0 {
            return memory_kib;
        }
        for _ in 0..MAX_SETTLE_LOOKS {
            tokio::time::sleep(Duration::from_millis(SETTLE_LOOK_EVERY_MS)).await;
            let before_kib = std::mem::replace(&mut memory_kib, running.process.memory_kib());
            if before_kib.abs_diff(memory_kib) < before_kib / 100 {
                break;
            }
        }
        memory_kib
    }

    fn tls(&self, scenario: &Scenario) -> Option<Tls> {
        scenario.tls.then(|| self.certificate.tls())
    }

    async fn hold_idle(
        &self,
        running: &Running,
        scenario: &Scenario,
    ) -> Result<Option<IdleConnections>, CompareError> {
        if scenario.idle_connections == 0 {
            return Ok(None);
        }
        let options = scenario.idle(address(running, scenario), self.tls(scenario));
        let idle = IdleConnections::open(options).await?;
        match idle.failures().first() {
            None => Ok(Some(idle)),
            Some(why) => Err(CompareError::NotServing(format!("an idle connection failed: {why}"))),
        }
    }
}

/// What so much more memory is for each of so many connections. Without connections it is not theirs: a contender's
/// memory moves by itself, too.
fn bytes_for_each(kib: u64, connections: u64) -> u64 {
    (kib * 1024).checked_div(connections).unwrap_or(0)
}

fn address(running: &Running, scenario: &Scenario) -> std::net::SocketAddr {
    match scenario.wire {
        _ if scenario.tls => running.tls(),
        Wire::H1 => running.h1(),
        Wire::H2 => running.h2(),
    }
}

/// Runs `loading`; in the switching scenario, switches the upstream every second meanwhile and counts how often.
async fn while_switching<T>(
    running: &mut Running,
    scenario: &Scenario,
    loading: impl Future<Output = Result<T, CompareError>>,
) -> Result<(T, u64), CompareError> {
    let mut loading = std::pin::pin!(loading);
    let mut switches = 0;
    let every = Duration::from_millis(SWITCH_EVERY_MS);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    loop {
        tokio::select! {
            loaded = &mut loading => return Ok((loaded?, switches)),
            _ = ticks.tick(), if scenario.switching => {
                running.switch_upstream().await?;
                switches += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_grew_without_idle_connections_is_none_of_theirs() {
        assert_eq!(bytes_for_each(2_000, 1_000), 2_048);
        assert_eq!(bytes_for_each(2_000, 0), 0);
    }
}
