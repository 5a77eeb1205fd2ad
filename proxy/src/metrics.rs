//! Edge metrics. A core counts in plain cells and hands the sums to the `metrics` facade ten times a
//! second: a request costs a few additions, and no cache line is fought over between cores.
//!
//! Labels are bounded: services are known by name up to a limit and are `other` beyond it, reasons and
//! classes are closed sets, hosts and paths are never labels.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use peregrine_routing::RetryClass;

use crate::core::ServiceEntry;
use crate::error::Reason;

/// Services that have labels of their own.
const MAX_SERVICE_LABELS: usize = 1_000;
/// Status classes: 1xx to 5xx, and requests without an answer.
const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];
/// Latencies are collected in steps of a quarter of a power of two, up to 2^27 µs (134 s).
const STEPS: usize = 4 * 28;

/// Says what each metric means. Call it once, after the recorder was installed.
pub fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!("peregrine_edge_requests_total", "Requests by service and class of status code");
    describe_histogram!(
        "peregrine_edge_request_duration_seconds",
        Unit::Seconds,
        "Time from the request head to the last byte handed over"
    );
    describe_gauge!("peregrine_edge_requests_in_flight", "Requests in flight");
    describe_gauge!("peregrine_edge_connections", "Client connections");
    describe_gauge!(
        "peregrine_edge_connections_at_rest",
        "Client connections of HTTP/1.1 that were silent for a moment and have nothing in memory but socket and session"
    );
    describe_gauge!(
        "peregrine_edge_tasks",
        "Tasks of the cores: those of connections, and some that are always there"
    );
    describe_counter!("peregrine_edge_retries_total", "Requests sent again, by retry class");
    describe_counter!(
        "peregrine_edge_upstream_connections_total",
        "Requests to upstreams by whether their connection was opened for them or reused"
    );
    describe_counter!("peregrine_edge_errors_total", "Requests that the edge answered itself, by reason");
    describe_counter!(
        "peregrine_edge_mirrored_total",
        "Copies of requests to upstreams that serve nobody yet, by class of the client's answer and of the copy's"
    );
    describe_histogram!(
        "peregrine_edge_mirror_head_seconds",
        Unit::Seconds,
        "Time to the head of the answer, of the client's request and of its copy"
    );
    describe_counter!(
        "peregrine_edge_log_lines_dropped_total",
        "Access log lines that the writer had no room for"
    );
    describe_counter!(
        "peregrine_edge_refused_connections_total",
        "Connections that were closed, by reason: source (its network has too many), proxy_protocol (no header of it came \
         from where one has to), flood (an HTTP/2 client sent too much of no use)"
    );
    describe_gauge!("peregrine_edge_sheds_load", "1 while requests are refused because of max_memory");
    crate::hold::describe();
    crate::tls::describe();
}

/// One core's counters.
pub(crate) struct CoreMetrics {
    services: RefCell<HashMap<Arc<str>, Rc<ServiceMetrics>>>,
    unrouted: Rc<ServiceMetrics>,
    errors: Vec<Count>,
    retries: [Count; 3],
    opened: Count,
    reused: Count,
    log_dropped: Count,
    in_flight: Level,
    connections: Level,
    at_rest: Level,
    tasks: Level,
}

/// A counter that is summed up here first.
pub(crate) struct Count {
    here: Cell<u64>,
    there: Counter,
}

impl Count {
    pub(crate) const fn new(there: Counter) -> Self {
        Self { here: Cell::new(0), there }
    }

    pub(crate) fn add(&self, more: u64) {
        self.here.set(self.here.get() + more);
    }

    pub(crate) fn flush(&self) {
        let sum = self.here.replace(0);
        if sum > 0 {
            self.there.increment(sum);
        }
    }
}

/// A gauge to which every core adds its part.
pub(crate) struct Level {
    told: Cell<usize>,
    there: Gauge,
}

impl Level {
    pub(crate) const fn new(there: Gauge) -> Self {
        Self { told: Cell::new(0), there }
    }

    pub(crate) fn tell(&self, now: usize) {
        let before = self.told.replace(now);
        #[expect(clippy::cast_precision_loss)]
        if now > before {
            self.there.increment((now - before) as f64);
        } else if before > now {
            self.there.decrement((before - now) as f64);
        }
    }
}

/// One core's counters of one service.
pub(crate) struct ServiceMetrics {
    classes: [Count; CLASSES.len()],
    steps: RefCell<[u32; STEPS]>,
    touched: Cell<bool>,
    duration: Histogram,
}

impl ServiceMetrics {
    fn new(label: &str) -> Rc<Self> {
        let label = label.to_owned();
        let class = |class: &'static str| {
            Count::new(
                counter!("peregrine_edge_requests_total", "service" => label.clone(), "code_class" => class),
            )
        };
        Rc::new(Self {
            classes: CLASSES.map(class),
            steps: RefCell::new([0; STEPS]),
            touched: Cell::new(false),
            duration: histogram!("peregrine_edge_request_duration_seconds", "service" => label),
        })
    }

    fn record(&self, status: u16, total_us: u64) {
        let class = match status {
            100..=599 if status != 499 => usize::from(status / 100) - 1,
            _ => CLASSES.len() - 1,
        };
        self.classes[class].add(1);
        self.steps.borrow_mut()[step_of(total_us)] += 1;
        self.touched.set(true);
    }

    fn flush(&self) {
        if !self.touched.replace(false) {
            return;
        }
        self.classes.iter().for_each(Count::flush);
        let steps = self.steps.replace([0; STEPS]);
        for (step, count) in steps.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            self.duration.record_many(middle_s(step), count as usize);
        }
    }
}

fn step_of(us: u64) -> usize {
    let us = us.max(4);
    let octave = us.ilog2();
    let quarter = (us >> (octave - 2)) & 3;
    ((octave as usize - 2) * 4 + quarter as usize).min(STEPS - 1)
}

fn middle_s(step: usize) -> f64 {
    let octave = step / 4 + 2;
    #[expect(clippy::cast_precision_loss)]
    let base = (1_u64 << octave) as f64;
    #[expect(clippy::cast_precision_loss)]
    let within = (step % 4) as f64 / 4.0 + 0.125;
    base * (1.0 + within) / 1e6
}

impl CoreMetrics {
    pub(crate) fn new() -> Self {
        let error = |reason: &Reason| {
            Count::new(counter!("peregrine_edge_errors_total", "reason" => reason.as_str()))
        };
        let retry =
            |class: &'static str| Count::new(counter!("peregrine_edge_retries_total", "class" => class));
        let upstream = |outcome: &'static str| {
            Count::new(counter!("peregrine_edge_upstream_connections_total", "outcome" => outcome))
        };
        Self {
            services: RefCell::default(),
            unrouted: ServiceMetrics::new("none"),
            errors: Reason::ALL.iter().map(error).collect(),
            retries: [retry("a"), retry("b"), retry("c")],
            opened: upstream("opened"),
            reused: upstream("reused"),
            log_dropped: Count::new(counter!("peregrine_edge_log_lines_dropped_total")),
            in_flight: Level::new(gauge!("peregrine_edge_requests_in_flight")),
            connections: Level::new(gauge!("peregrine_edge_connections")),
            at_rest: Level::new(gauge!("peregrine_edge_connections_at_rest")),
            tasks: Level::new(gauge!("peregrine_edge_tasks")),
        }
    }

    /// The counters of a service, made at its first request.
    pub(crate) fn service(&self, name: &Arc<str>) -> Rc<ServiceMetrics> {
        let mut services = self.services.borrow_mut();
        if let Some(known) = services.get(name) {
            return Rc::clone(known);
        }
        let name: Arc<str> =
            if services.len() < MAX_SERVICE_LABELS { Arc::clone(name) } else { "other".into() };
        Rc::clone(services.entry(name).or_insert_with_key(|name| ServiceMetrics::new(name)))
    }

    /// The label of a service that has had a request.
    pub(crate) fn label(&self, name: &Arc<str>) -> Arc<str> {
        if self.services.borrow().contains_key(name) { Arc::clone(name) } else { "other".into() }
    }

    pub(crate) fn request(&self, service: Option<&ServiceEntry>, status: u16, total_us: u64) {
        service.map_or(&*self.unrouted, |entry| &entry.metrics).record(status, total_us);
    }

    pub(crate) fn error(&self, reason: Reason) {
        self.errors[reason as usize].add(1);
    }

    pub(crate) fn retry(&self, class: RetryClass) {
        let at = match class {
            RetryClass::A => 0,
            RetryClass::B => 1,
            // Class D is never retried.
            RetryClass::C | RetryClass::D => 2,
        };
        self.retries[at].add(1);
    }

    pub(crate) fn upstream_connection(&self, reused: bool) {
        if reused { self.reused.add(1) } else { self.opened.add(1) }
    }

    pub(crate) fn log_dropped(&self, lines: u64) {
        self.log_dropped.add(lines);
    }

    /// Hands everything to the facade.
    pub(crate) fn flush(&self, in_flight: usize, (connections, at_rest): (usize, usize), tasks: usize) {
        self.in_flight.tell(in_flight);
        self.connections.tell(connections);
        self.at_rest.tell(at_rest);
        self.tasks.tell(tasks);
        self.unrouted.flush();
        self.services.borrow().values().for_each(|service| service.flush());
        self.errors.iter().chain(&self.retries).for_each(Count::flush);
        [&self.opened, &self.reused, &self.log_dropped].into_iter().for_each(Count::flush);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_told_within_an_eighth() {
        for us in (4..100_000_u64).chain([1 << 20, (1 << 26) + 999]) {
            #[expect(clippy::cast_precision_loss)]
            let exact = us as f64 / 1e6;
            let told = middle_s(step_of(us));
            assert!((told - exact).abs() <= exact / 7.9, "{us} µs is told as {told} s");
        }
    }

    #[test]
    fn a_reason_counts_under_its_own_name() {
        let metrics = CoreMetrics::new();
        for reason in Reason::ALL {
            metrics.error(*reason);
        }
        assert!(metrics.errors.iter().all(|count| count.here.get() == 1));
    }
}
