//! A mirror as it travels down with the table, and its counts as they come up.

use peregrine_routing::{LatencyBuckets, MIRROR_CLASSES, MirrorCounts, MirrorSpec};
use serde::{Deserialize, Serialize};

/// A [`MirrorSpec`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireMirror {
    pool: String,
    sample_permille: u16,
    max_requests_per_s: u32,
    max_concurrent: u32,
    timeout_ms: u32,
    max_body_bytes: u64,
    with_credentials: bool,
    lasts_ms: u32,
}

impl From<&MirrorSpec> for WireMirror {
    fn from(spec: &MirrorSpec) -> Self {
        let MirrorSpec {
            pool,
            sample_permille,
            max_requests_per_s,
            max_concurrent,
            timeout_ms,
            max_body_bytes,
            with_credentials,
            lasts_ms,
        } = spec;
        Self {
            pool: pool.to_string(),
            sample_permille: *sample_permille,
            max_requests_per_s: *max_requests_per_s,
            max_concurrent: *max_concurrent,
            timeout_ms: *timeout_ms,
            max_body_bytes: *max_body_bytes,
            with_credentials: *with_credentials,
            lasts_ms: *lasts_ms,
        }
    }
}

impl From<WireMirror> for MirrorSpec {
    fn from(mirror: WireMirror) -> Self {
        Self {
            pool: mirror.pool.into(),
            sample_permille: mirror.sample_permille,
            max_requests_per_s: mirror.max_requests_per_s,
            max_concurrent: mirror.max_concurrent,
            timeout_ms: mirror.timeout_ms,
            max_body_bytes: mirror.max_body_bytes,
            with_credentials: mirror.with_credentials,
            lasts_ms: mirror.lasts_ms,
        }
    }
}

/// [`MirrorCounts`] on their way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireMirrored {
    sent: u64,
    pairs: [[u64; MIRROR_CLASSES]; 5],
    unequal: u64,
    unfinished: u64,
    skipped: u64,
    left_out: u64,
    client_latency: Vec<(u16, u64)>,
    mirror_latency: Vec<(u16, u64)>,
}

impl From<&MirrorCounts> for WireMirrored {
    fn from(counts: &MirrorCounts) -> Self {
        let MirrorCounts {
            sent,
            pairs,
            unequal,
            unfinished,
            skipped,
            left_out,
            client_latency,
            mirror_latency,
        } = counts;
        Self {
            sent: *sent,
            pairs: *pairs,
            unequal: *unequal,
            unfinished: *unfinished,
            skipped: *skipped,
            left_out: *left_out,
            client_latency: client_latency.filled().collect(),
            mirror_latency: mirror_latency.filled().collect(),
        }
    }
}

impl From<WireMirrored> for MirrorCounts {
    fn from(counts: WireMirrored) -> Self {
        Self {
            sent: counts.sent,
            pairs: counts.pairs,
            unequal: counts.unequal,
            unfinished: counts.unfinished,
            skipped: counts.skipped,
            left_out: counts.left_out,
            client_latency: LatencyBuckets::from_filled(counts.client_latency),
            mirror_latency: LatencyBuckets::from_filled(counts.mirror_latency),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spec() -> MirrorSpec {
        MirrorSpec {
            pool: "new".into(),
            sample_permille: 1,
            max_requests_per_s: 2,
            max_concurrent: 3,
            timeout_ms: 4,
            max_body_bytes: 5,
            with_credentials: true,
            lasts_ms: 6,
        }
    }

    #[test]
    fn counts_of_a_mirror_arrive_as_they_were_sent() {
        let mut counts = MirrorCounts { sent: 1, unequal: 2, unfinished: 3, ..MirrorCounts::default() };
        counts.pairs[1][5] = 4;
        (counts.skipped, counts.left_out) = (5, 6);
        counts.client_latency = LatencyBuckets::from_filled([(3, 9)]);
        counts.mirror_latency = LatencyBuckets::from_filled([(4, 8)]);
        assert_eq!(MirrorCounts::from(WireMirrored::from(&counts)), counts);
    }
}
