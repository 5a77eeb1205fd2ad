//! Counts as they travel. Clocks do not: what is meant until a moment travels as how long it still lasts.

use peregrine_routing::{Health, LatencyBuckets, OutcomeCounts, PerClass, Tally, TrafficClass};
use serde::{Deserialize, Serialize};

use super::mirror::WireMirrored;

type Classes = [u64; TrafficClass::COUNT];

/// A [`Tally`] on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireTally {
    started: u64,
    completed: Classes,
    soft_closed: Classes,
    in_flight: Classes,
    bytes_to_upstream: u64,
    bytes_to_client: u64,
    retried: u64,
    /// Index of the class, and id.
    hard_cut: Vec<(u8, String)>,
    responses: [u64; 5],
    failed: u64,
    client_gone: u64,
    latency: Vec<(u16, u64)>,
    ready_connections: u64,
    /// 0 unknown, 1 healthy, 2 unhealthy.
    health: u8,
    ejected_for_ms: u64,
    probe_latency_us: u64,
    mirrored: Option<Box<WireMirrored>>,
}

impl WireTally {
    /// For the way; `now_ms` is the time of the clock that the tally is of.
    #[must_use]
    pub fn new(tally: Tally, now_ms: u64) -> Self {
        Self {
            started: tally.started,
            completed: tally.completed.0,
            soft_closed: tally.soft_closed.0,
            in_flight: tally.in_flight.0,
            bytes_to_upstream: tally.bytes_to_upstream,
            bytes_to_client: tally.bytes_to_client,
            retried: tally.retried,
            hard_cut: tally.hard_cut.into_iter().map(|(class, id)| (class.index() as u8, id)).collect(),
            responses: tally.outcomes.responses,
            failed: tally.outcomes.failed,
            client_gone: tally.outcomes.client_gone,
            latency: tally.outcomes.latency.filled().collect(),
            ready_connections: tally.ready_connections,
            health: match tally.health {
                Health::Unknown => 0,
                Health::Healthy => 1,
                Health::Unhealthy => 2,
            },
            ejected_for_ms: tally.ejected_until_ms.saturating_sub(now_ms),
            probe_latency_us: tally.probe_latency_us,
            mirrored: tally.mirrored.map(|counts| Box::new((&*counts).into())),
        }
    }

    /// As it is meant here, where the clock shows `now_ms`.
    #[must_use]
    pub fn tally(self, now_ms: u64) -> Tally {
        let ejected = self.ejected_for_ms > 0;
        Tally {
            started: self.started,
            completed: PerClass(self.completed),
            soft_closed: PerClass(self.soft_closed),
            in_flight: PerClass(self.in_flight),
            bytes_to_upstream: self.bytes_to_upstream,
            bytes_to_client: self.bytes_to_client,
            retried: self.retried,
            hard_cut: self.hard_cut.into_iter().map(|(class, id)| (class_at(class), id)).collect(),
            outcomes: OutcomeCounts {
                responses: self.responses,
                failed: self.failed,
                client_gone: self.client_gone,
                latency: LatencyBuckets::from_filled(self.latency),
            },
            ready_connections: self.ready_connections,
            health: match self.health {
                1 => Health::Healthy,
                2 => Health::Unhealthy,
                _ => Health::Unknown,
            },
            ejected_until_ms: if ejected { now_ms.saturating_add(self.ejected_for_ms) } else { 0 },
            probe_latency_us: self.probe_latency_us,
            mirrored: self.mirrored.map(|counts| Box::new((*counts).into())),
        }
    }
}

/// A class that is not known here is a request: that it was cut counts, whatever it was.
fn class_at(index: u8) -> TrafficClass {
    TrafficClass::ALL.get(usize::from(index)).copied().unwrap_or(TrafficClass::Request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_arrive_as_they_were_sent_and_moments_by_the_clock_of_the_reader() {
        let sent = Tally {
            started: 3,
            retried: 4,
            completed: PerClass([1, 2, 3, 4, 5, 6]),
            in_flight: PerClass([6, 5, 4, 3, 2, 1]),
            hard_cut: vec![(TrafficClass::Request, "a".into()), (TrafficClass::Sse, "b".into())],
            outcomes: OutcomeCounts {
                responses: [1, 2, 3, 4, 5],
                latency: LatencyBuckets::from_filled([(0, 7), (199, 8)]),
                ..OutcomeCounts::default()
            },
            health: Health::Unhealthy,
            ejected_until_ms: 10_500,
            mirrored: Some(Box::new(peregrine_routing::MirrorCounts {
                sent: 3,
                ..peregrine_routing::MirrorCounts::default()
            })),
            ..Tally::default()
        };
        let arrived = WireTally::new(sent.clone(), 10_000).tally(77_000);
        assert_eq!(arrived, Tally { ejected_until_ms: 77_500, ..sent.clone() });
        assert_eq!(WireTally::new(sent, 20_000).tally(77_000).ejected_until_ms, 0, "it is over");
    }
}
