//! Handshakes whose certificate is on its way: the first ones for a name that gets it on demand. They wait for it, instead of
//! being refused and coming again.
//!
//! ```text
//!   hello ─► no certificate ─► the source says no, or has said so a moment ago ─► refused
//!                                └─ not decided yet, or it comes ─► waits ─► the table names it: the handshake goes on
//!                                                                     └─ no, too late, or one too many: refused
//! ```
//!
//! Who waits takes none of the places in which handshakes are worked on, and has none of its work done. How many wait is
//! bounded for a core, for a network, and in all; so is how long. One that leaves is seen, and waits no more.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use peregrine_routing::{DomainSpec, TlsMode};
use tokio::net::TcpStream;

use super::accept::{Fault, domain_of};
use super::hello::{self, Hello};
use super::places::Network;
use super::wanted::Answer;
use crate::config::Limits;
use crate::conn::ConnState;
use crate::core::Core;

#[derive(Default)]
struct Inner {
    all: u32,
    networks: HashMap<Network, u32>,
}

/// Those who wait at an edge. Only handshakes without a certificate ever take its lock.
pub(crate) struct Waits {
    max: u32,
    max_per_core: u32,
    max_per_network: u32,
    inner: Mutex<Inner>,
}

/// Somebody who may wait; no more once it is dropped.
struct Wait {
    waits: Arc<Waits>,
    own: Rc<Cell<u32>>,
    network: Network,
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.own.set(self.own.get() - 1);
        let mut inner = self.waits.lock();
        inner.all -= 1;
        if let Some(count) = inner.networks.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                inner.networks.remove(&self.network);
            }
        }
    }
}

impl Waits {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            max: limits.max_certificate_waits,
            max_per_core: limits.max_certificate_waits_per_core,
            max_per_network: limits.max_certificate_waits_per_network,
            inner: Mutex::default(),
        })
    }

    /// `own` is how many of the caller's core wait.
    fn enter(self: &Arc<Self>, own: &Rc<Cell<u32>>, network: Network) -> Option<Wait> {
        let mut inner = self.lock();
        let of_network = inner.networks.get(&network).copied().unwrap_or(0);
        if own.get() >= self.max_per_core || inner.all >= self.max || of_network >= self.max_per_network {
            return None;
        }
        own.set(own.get() + 1);
        inner.all += 1;
        *inner.networks.entry(network).or_default() += 1;
        drop(inner);
        Some(Wait { waits: Arc::clone(self), own: Rc::clone(own), network })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the table has what a handshake for `name` needs. `None`: it is refused, now or after all.
///
/// # Errors
/// The client has left, or sends what no client would before it has an answer.
pub(crate) async fn wait(
    core: &Core,
    state: &ConnState,
    socket: &mut TcpStream,
    hello: &mut Hello,
    name: &str,
) -> Result<Option<Arc<DomainSpec>>, Fault> {
    let network = Network::of(state.peer.ip());
    let answer = core.tls.shared.certificates.want(name, network);
    // Nobody waits at an edge that is about to end: the next one has all its time.
    let Some(answer) = answer.filter(|answer| !core.draining.get() && !is_no(answer)) else {
        return Ok(None);
    };
    let Some(_wait) = core.tls.shared.waits.enter(&core.tls.waiting, network) else { return Ok(None) };
    let limit = Duration::from_millis(u64::from(core.config.limits.certificate_wait_ms));
    // The hello is whole: what bounds one that stalls does not bound this.
    state.awaits_certificate.set(true);
    let waited = tokio::select! {
        biased;
        found = tokio::time::timeout(limit, named(core, name, answer)) => Ok(found.ok().flatten()),
        fault = hello::until_gone(socket, hello) => Err(fault),
    };
    // From here on it is a handshake like any other, with the time of one.
    state.head_since_ms.set(core.coarse_now_ms());
    state.awaits_certificate.set(false);
    waited
}

/// Whether the answer is there, and is no.
fn is_no(answer: &Answer) -> bool {
    answer.clone().now_or_never() == Some(false)
}

/// The domain of the name as soon as the table names a certificate for it; `None` if none comes.
async fn named(core: &Core, name: &str, mut answer: Answer) -> Option<Arc<DomainSpec>> {
    let mut comes = None;
    loop {
        let version = core.reader.borrow_mut().load().version();
        let domain = domain_of(core, Some(name)).filter(|domain| !lacks_certificate(domain));
        if domain.is_some() || comes == Some(false) {
            return domain;
        }
        tokio::select! {
            biased;
            _ = core.tls.table.newer_than(version) => {}
            said = &mut answer, if comes.is_none() => comes = Some(said),
        }
    }
}

/// Whether this edge is to shake hands for it, and cannot.
pub(crate) fn lacks_certificate(domain: &DomainSpec) -> bool {
    domain.policy.mode == TlsMode::Terminate && domain.certificate.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(number: u8) -> Network {
        Network::of([10, 0, number, 1].into())
    }

    #[test]
    fn so_many_wait_of_a_network_at_a_core_and_in_all_and_who_leaves_makes_room() {
        let limits = Limits {
            max_certificate_waits: 4,
            max_certificate_waits_per_core: 3,
            max_certificate_waits_per_network: 2,
            ..Limits::default()
        };
        let waits = Waits::new(&limits);
        let (one, other) = (Rc::<Cell<u32>>::default(), Rc::<Cell<u32>>::default());
        let first = waits.enter(&one, network(1)).expect("there is room");
        let second = waits.enter(&one, network(1)).expect("there is room");
        assert!(waits.enter(&one, network(1)).is_none(), "of one network");
        assert!(waits.enter(&other, network(1)).is_none(), "at whichever core");
        let third = waits.enter(&one, network(2)).expect("another network");
        assert!(waits.enter(&one, network(3)).is_none(), "at one core");
        let fourth = waits.enter(&other, network(3)).expect("another core");
        assert!(waits.enter(&other, network(4)).is_none(), "in all");
        drop(first);
        assert!(waits.enter(&other, network(1)).is_some(), "it made room");
        drop((second, third, fourth));
        let inner = waits.lock();
        assert!(inner.all == 0 && inner.networks.is_empty() && one.get() == 0 && other.get() == 0);
    }
}
