//! What the manager is given.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::acme::{CaConfig, ChallengeKind};
use crate::ask::AskConfig;
use crate::dns::DnsProvider;
use crate::limits::Limits;

/// Configuration of a [`crate::Manager`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this manager: no other one that uses the same vault has it. After a restart it may be the same.
    pub holder: String,
    /// Authorities, in the order in which they are asked.
    pub authorities: Vec<CaConfig>,
    /// How names are validated, in the order in which it is tried. DNS-01 needs a provider, too.
    pub challenges: Vec<ChallengeKind>,
    /// DNS.
    pub dns: DnsConfig,
    /// Names that nobody added.
    pub on_demand: OnDemand,
    /// Limits.
    pub limits: Limits,
}

/// DNS.
#[derive(Clone, Default)]
pub struct DnsConfig {
    /// Resolvers; the system's if there are none.
    pub resolvers: Vec<SocketAddr>,
    /// Where names have to lead. Neither these nor [`DnsConfig::expected_aliases`]: names are not checked.
    pub expected_addresses: Vec<IpAddr>,
    /// A CNAME to one of these will do.
    pub expected_aliases: Vec<String>,
    /// Who writes records for DNS-01: the zone (which may be empty, for all) and its provider. The longest zone is asked.
    pub providers: Vec<(String, Arc<dyn DnsProvider>)>,
}

impl fmt::Debug for DnsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DnsConfig")
            .field("resolvers", &self.resolvers)
            .field("expected_addresses", &self.expected_addresses)
            .field("expected_aliases", &self.expected_aliases)
            .field("zones", &self.providers.iter().map(|(zone, _)| zone).collect::<Vec<_>>())
            .finish()
    }
}

impl DnsConfig {
    /// Who writes records for `name`.
    pub(crate) fn provider(&self, name: &str) -> Option<&Arc<dyn DnsProvider>> {
        let within = |zone: &str| {
            zone.is_empty() || name == zone || name.strip_suffix(zone).is_some_and(|rest| rest.ends_with('.'))
        };
        let zones = self.providers.iter().filter(|(zone, _)| within(zone));
        zones.max_by_key(|(zone, _)| zone.len()).map(|(_, provider)| provider)
    }
}

/// Who decides on a name.
pub type Owned = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Certificates for names that nobody added.
#[derive(Clone, Default)]
pub struct OnDemand {
    /// Whether a service owns the name.
    pub owned: Option<Owned>,
    /// Whom to ask otherwise.
    pub ask: Option<AskConfig>,
}

impl fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnDemand").field("owned", &self.owned.is_some()).field("ask", &self.ask).finish()
    }
}

/// What the manager takes from outside, so that tests can hand it in.
#[derive(Clone)]
pub struct Outside {
    /// Unix time in milliseconds.
    pub now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Random bits, for times only; keys come from the system's generator.
    pub random: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl Outside {
    /// The machine's clock and random bits.
    #[must_use]
    pub fn system() -> Self {
        Self {
            now_ms: Arc::new(|| {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
            }),
            random: Arc::new(|| {
                let mut bits = [0; 8];
                // Without random bits there is no jitter; that is no reason to stop.
                let _ = aws_lc_rs::rand::fill(&mut bits);
                u64::from_le_bytes(bits)
            }),
        }
    }
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Outside")
    }
}
