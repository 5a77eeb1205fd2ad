//! The raw runs as JSON, and the table that a person reads.

use std::fmt::Write;

use serde::Serialize;

use super::Absent;

/// Everything that one comparison measured. It names no path and no user of the machine.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// When it began (RFC 3339, UTC).
    pub started: String,
    /// What it ran on.
    pub machine: Machine,
    /// First line of each program's version.
    pub versions: Vec<(String, String)>,
    /// Seconds of each closed loop.
    pub seconds: u64,
    /// Interleaved rounds.
    pub rounds: u64,
    /// Whether access logs were on.
    pub access_log: bool,
    /// Contenders that did not take part, each with the reason.
    pub skipped: Vec<Absent>,
    /// Results in the order of measurement.
    pub scenarios: Vec<ScenarioReport>,
}

/// The machine of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Cores that the kernel shows.
    pub cores: usize,
    /// The processor's own name.
    pub processor: String,
    /// Kernel release.
    pub kernel: String,
    /// Load average of the last minute before the start: above 0.5, others were using the machine.
    pub load_average: String,
}

/// The runs of one scenario.
#[derive(Debug, Clone, Serialize)]
pub struct ScenarioReport {
    /// Short name.
    pub name: String,
    /// What is measured.
    pub title: String,
    /// The open loop's rate, the same for all: 70 % of what the slowest contender could do; requests per second.
    pub open_loop_rate: u32,
    /// Closed loops.
    pub closed: Vec<ClosedRun>,
    /// Open loops.
    pub open: Vec<OpenRun>,
    /// Contenders that this scenario could not measure, each with the reason.
    pub not_measured: Vec<Absent>,
}

/// One closed loop: as fast as it goes.
#[derive(Debug, Clone, Serialize)]
pub struct ClosedRun {
    /// Who served.
    pub contender: String,
    /// Counted from 1.
    pub round: u64,
    /// Answered requests.
    pub requests: u64,
    /// Failed requests.
    pub failed: u64,
    /// Answered requests per second.
    pub requests_per_second: f64,
    /// Processor time of the contender per answered request, in microseconds.
    pub cpu_us_per_request: f64,
    /// Share of the contender's core that it used; clearly below 1, load and origin were the limit, not the contender.
    pub core_use: f64,
    /// Share of the contender's core that others used: above a few percent, this run says little.
    pub others_use: f64,
    /// Memory (PSS) at the end of the run, in KiB.
    pub memory_kib: u64,
    /// Connections that the origin accepted.
    pub upstream_connections: u64,
    /// Requests that the origin served.
    pub upstream_requests: u64,
    /// Switches of the upstream.
    pub switches: u64,
    /// Idle connections that the contender closed.
    pub idle_closed: u64,
    /// What the idle connections added to its memory (PSS), in bytes for each; 0 where there were none.
    pub bytes_per_idle_connection: u64,
}

impl ClosedRun {
    /// Share of upstream requests that went over a connection that was there already.
    #[must_use]
    pub fn reuse(&self) -> f64 {
        1.0 - self.upstream_connections as f64 / self.upstream_requests.max(1) as f64
    }
}

/// One open loop: at a fixed rate, latency from the moment that each request was due.
#[derive(Debug, Clone, Serialize)]
pub struct OpenRun {
    /// Who served.
    pub contender: String,
    /// Counted from 1.
    pub round: u64,
    /// Requests.
    pub requests: u64,
    /// Failed requests.
    pub failed: u64,
    /// What the first failure was.
    pub first_failure: Option<String>,
    /// Median latency in microseconds.
    pub p50_us: u64,
    /// 99th percentile in microseconds.
    pub p99_us: u64,
    /// The longest in microseconds.
    pub max_us: u64,
    /// Processor time of the contender per request, in microseconds.
    pub cpu_us_per_request: f64,
    /// Client connections that the contender closed.
    pub connections_closed_by_peer: u64,
}

/// Below this share of its core the contender was not the limit.
const BUSY_CORE: f64 = 0.9;
/// Above this share of the contender's core in the hands of others, the reader is warned.
const DISTURBED: f64 = 0.05;
/// The contenders that the others are held against.
const BASELINE: [&str; 2] = ["nginx", "haproxy"];

impl Report {
    /// The whole report as Markdown.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        let mut out = String::new();
        let Machine { cores, processor, kernel, load_average } = &self.machine;
        line(&mut out, format_args!("# Side by side, {}\n", self.started));
        line(
            &mut out,
            format_args!(
                "{processor}, {cores} cores, Linux {kernel}, load average before the start {load_average}. \
                 {} interleaved rounds of {} s; access logs {}. Median (lowest–highest).\n",
                self.rounds,
                self.seconds,
                if self.access_log { "on" } else { "off" }
            ),
        );
        for (program, version) in &self.versions {
            line(&mut out, format_args!("- {program}: {version}"));
        }
        for (contender, why) in &self.skipped {
            line(&mut out, format_args!("- **{contender} did not take part**: {why}"));
        }
        for scenario in &self.scenarios {
            scenario.write_markdown(&mut out);
        }
        out
    }
}

impl ScenarioReport {
    fn write_markdown(&self, out: &mut String) {
        line(out, format_args!("\n## {} (`{}`)\n", self.title, self.name));
        line(
            out,
            format_args!(
                "| | requests/s | CPU µs/request | ratio | p50 µs at {rate}/s | p99 µs at {rate}/s | memory MiB | reuse | failed |",
                rate = self.open_loop_rate
            ),
        );
        line(out, format_args!("|---|---:|---:|---:|---:|---:|---:|---:|---:|"));
        for contender in self.contenders() {
            self.write_row(out, contender);
        }
        let disturbed = self.closed.iter().filter(|run| run.others_use > DISTURBED).count();
        if disturbed > 0 {
            let of = self.closed.len();
            line(
                out,
                format_args!(
                    "\n{disturbed} of {of} runs shared the contender's core with others: repeat them on a quiet machine."
                ),
            );
        }
        for contender in self
            .contenders()
            .into_iter()
            .filter(|_| self.closed.iter().any(|run| run.bytes_per_idle_connection > 0))
        {
            let runs = self.closed.iter().filter(|run| run.contender == contender);
            let bytes = Spread::of(runs.map(|run| run.bytes_per_idle_connection as f64));
            line(out, format_args!("\n{contender}: {} bytes for each idle connection", bytes.show(0)));
        }
        for (contender, why) in &self.not_measured {
            line(out, format_args!("\n**{contender}: not measured** ({why})"));
        }
    }

    fn write_row(&self, out: &mut String, contender: &str) {
        let closed: Vec<&ClosedRun> = self.closed.iter().filter(|run| run.contender == contender).collect();
        let open: Vec<&OpenRun> = self.open.iter().filter(|run| run.contender == contender).collect();
        let cpu = Spread::of(closed.iter().map(|run| run.cpu_us_per_request));
        let busy = Spread::of(closed.iter().map(|run| run.core_use)).median >= BUSY_CORE;
        let ratio = match self.baseline_cpu_us() {
            Some(baseline) => format!("{:.2}", cpu.median / baseline),
            None => "–".to_owned(),
        };
        let failed: u64 =
            closed.iter().map(|run| run.failed).sum::<u64>() + open.iter().map(|run| run.failed).sum::<u64>();
        line(
            out,
            format_args!(
                "| {contender} | {}{} | {} | {ratio} | {} | {} | {:.1} | {:.2} % | {failed} |",
                if busy { "" } else { "≥ " },
                Spread::of(closed.iter().map(|run| run.requests_per_second)).show(0),
                cpu.show(1),
                Spread::of(open.iter().map(|run| run.p50_us as f64)).show(0),
                Spread::of(open.iter().map(|run| run.p99_us as f64)).show(0),
                Spread::of(closed.iter().map(|run| run.memory_kib as f64 / 1024.0)).median,
                Spread::of(closed.iter().map(|run| run.reuse() * 100.0)).median,
            ),
        );
    }

    fn contenders(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for run in &self.closed {
            if !names.contains(&run.contender.as_str()) {
                names.push(&run.contender);
            }
        }
        names
    }

    /// CPU per request of the better of nginx and HAProxy, in microseconds.
    #[must_use]
    pub fn baseline_cpu_us(&self) -> Option<f64> {
        BASELINE.iter().filter_map(|name| self.median_cpu_us(name)).min_by(f64::total_cmp)
    }

    /// Median CPU per request of one contender in the closed loops, in microseconds.
    #[must_use]
    pub fn median_cpu_us(&self, contender: &str) -> Option<f64> {
        let mut runs = self.closed.iter().filter(|run| run.contender == contender).peekable();
        runs.peek()?;
        Some(Spread::of(runs.map(|run| run.cpu_us_per_request)).median)
    }
}

/// Median and extremes of some rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) lowest: f64,
    pub(super) median: f64,
    pub(super) highest: f64,
}

impl Spread {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (Some(&lowest), Some(&highest)) = (values.first(), values.last()) else {
            return Self { lowest: f64::NAN, median: f64::NAN, highest: f64::NAN };
        };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Self { lowest, median, highest }
    }

    fn show(self, digits: usize) -> String {
        if self.median.is_nan() {
            return "–".to_owned();
        }
        if self.lowest == self.highest {
            return format!("{:.digits$}", self.median);
        }
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.lowest, self.highest)
    }
}

fn line(out: &mut String, line: std::fmt::Arguments<'_>) {
    out.write_fmt(line).expect("a string takes everything");
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(contender: &str, cpu_us_per_request: f64) -> ClosedRun {
        ClosedRun {
            contender: contender.to_owned(),
            round: 1,
            requests: 1000,
            failed: 0,
            requests_per_second: 500.0,
            cpu_us_per_request,
            core_use: 0.5,
            others_use: 0.0,
            memory_kib: 2048,
            upstream_connections: 10,
            upstream_requests: 1000,
            switches: 0,
            idle_closed: 0,
            bytes_per_idle_connection: 0,
        }
    }

    fn report(closed: Vec<ClosedRun>) -> ScenarioReport {
        ScenarioReport {
            name: "n".to_owned(),
            title: "T".to_owned(),
            open_loop_rate: 350,
            closed,
            open: Vec::new(),
            not_measured: vec![("peregrine".to_owned(), "no hook".to_owned())],
        }
    }

    #[test]
    fn a_median_is_the_middle_and_its_extremes_stay_visible() {
        let odd = Spread::of([3.0, 1.0, 2.0].into_iter());
        assert_eq!((odd.lowest, odd.median, odd.highest), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of([1.0, 4.0].into_iter()).median, 2.5);
        assert_eq!(odd.show(1), "2.0 (1.0–3.0)");
        assert_eq!(Spread::of(std::iter::empty()).show(1), "–");
    }

    #[test]
    fn contenders_are_held_against_the_better_of_nginx_and_haproxy() {
        let report = report(vec![run("nginx", 20.0), run("haproxy", 25.0), run("peregrine", 18.0)]);
        assert_eq!(report.baseline_cpu_us(), Some(20.0));
        let mut out = String::new();
        report.write_markdown(&mut out);
        assert!(out.contains("| peregrine | ≥ 500 | 18.0 | 0.90 |"), "{out}");
        assert!(out.contains("99.00 %"), "{out}");
        assert!(out.contains("peregrine: not measured"), "{out}");
        assert!(!out.contains("shared the contender's core"), "{out}");
        assert!(!out.contains("idle connection"), "{out}");
    }

    #[test]
    fn what_an_idle_connection_takes_is_told_where_there_were_some() {
        let mut out = String::new();
        report(vec![ClosedRun { bytes_per_idle_connection: 2_048, ..run("nginx", 20.0) }])
            .write_markdown(&mut out);
        assert!(out.contains("nginx: 2048 bytes for each idle connection"), "{out}");
    }

    #[test]
    fn runs_that_others_disturbed_are_told() {
        let mut out = String::new();
        report(vec![run("nginx", 20.0), ClosedRun { others_use: 0.2, ..run("haproxy", 25.0) }])
            .write_markdown(&mut out);
        assert!(out.contains("1 of 2 runs shared the contender's core"), "{out}");
    }

    #[test]
    fn without_a_baseline_there_is_no_ratio() {
        assert_eq!(report(vec![run("peregrine", 18.0)]).baseline_cpu_us(), None);
    }
}
