//! `[link]`: where edges in other processes connect.

use std::net::{Ipv4Addr, SocketAddr};

use crate::names;
use crate::raw::Node;

/// Where edges connect unless told otherwise.
const DEFAULT_PORT: u16 = 7071;
/// How long an edge that is not heard of is waited for: longer than a network takes to find another way, short enough
/// that a move does not stand still for it.
const DEFAULT_LEASE_MS: u32 = 15_000;
/// Below it a busy machine looks like a dead one.
const MIN_LEASE_MS: u64 = 1_000;
const HOUR_MS: u64 = 3_600_000;

/// What the link to edges in other processes has to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// Address. Loopback, so that nothing is open that nobody opened.
    pub listen: SocketAddr,
    /// How long an edge that is not heard of is waited for before its copies are stopped without it.
    pub lease_ms: u32,
}

impl Default for LinkSettings {
    fn default() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT));
        Self { listen, lease_ms: DEFAULT_LEASE_MS }
    }
}

pub(crate) fn link(node: &Node<'_>) -> LinkSettings {
    let mut settings = LinkSettings::default();
    let Some(mut fields) = node.fields() else { return settings };
    fields.set_duration("lease", &mut settings.lease_ms, MIN_LEASE_MS..=HOUR_MS);
    fields.set("listen", &mut settings.listen, |node| names::listen_address(node, "0.0.0.0:7071"));
    settings
}
