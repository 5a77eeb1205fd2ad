//! Choosing an upstream for a request: what the choice depends on, and what to do when everything that
//! this table knows was retired in the meantime.

use std::rc::Rc;

use http::HeaderMap;
use peregrine_routing::{
    Balance, Enter, Generation, HashKey, Lease, NoUpstream, Service, TrafficClass, stable_hash,
};

use crate::core::{Core, ServiceEntry};
use crate::error::Reason;
use crate::forward::find_service;
use crate::headers::{self, Wishes};
use crate::inflight::Flight;
use crate::route;
use crate::rules;

/// Looks at a newer table when everything in this one was retired under our hands.
const MAX_TABLE_LOADS: u8 = 3;

/// What the choice of an upstream depends on besides the table.
pub(crate) struct Choice {
    hash: Option<u64>,
    pub(crate) prefer: Option<u64>,
    class: TrafficClass,
    pub(crate) tried: Vec<Generation>,
}

impl Choice {
    pub(crate) fn of(service: &Service, headers: &HeaderMap, flight: &Flight, wishes: Wishes) -> Self {
        let hash = match service.balance() {
            Balance::ConsistentHash(HashKey::Header(name)) => {
                headers.get(&**name).map(|value| stable_hash(value.as_bytes()))
            }
            Balance::ConsistentHash(HashKey::Cookie(name)) => headers::cookie(headers, name).map(stable_hash),
            Balance::ConsistentHash(HashKey::ClientAddress) => {
                Some(stable_hash(flight.client.to_string().as_bytes()))
            }
            _ => None,
        };
        let sticky = service.policy().sticky.as_ref();
        let prefer = sticky.and_then(|sticky| sticky_value(headers::cookie(headers, &sticky.cookie)?));
        let class = if wishes.upgrade { TrafficClass::WebSocket } else { TrafficClass::Request };
        Self { hash, prefer, class, tried: Vec::new() }
    }

    /// Enters an upstream of the current table. An instance that was not tried comes first. `None`: the service is
    /// held by now, and the request has to ask there first.
    pub(crate) fn enter(
        &mut self,
        core: &Core,
        entry: &mut Rc<ServiceEntry>,
        flight: &Flight,
    ) -> Result<Option<Lease>, Reason> {
        for _ in 0..MAX_TABLE_LOADS {
            let ask = Enter {
                now_ms: core.coarse_now_ms(),
                random: core.random.next(),
                hash: self.hash,
                prefer: self.prefer,
                tried: &self.tried,
                class: self.class,
            };
            match entry.service.enter(ask) {
                Ok(lease) => return Ok(Some(lease)),
                Err(NoUpstream::Empty) => return Err(Reason::NoUpstream),
                Err(NoUpstream::Exhausted) if !self.tried.is_empty() => self.tried.clear(),
                Err(NoUpstream::Exhausted) => *entry = reload(core, flight)?,
            }
            if entry.service.hold().is_some_and(|queue| queue.is_held()) {
                return Ok(None);
            }
        }
        Err(Reason::NoUpstream)
    }
}

/// The table has changed since it was read: the request asks again for its service, as if it had just come.
///
/// # Errors
/// There is none any more, or one that would have asked other things of the request.
pub(crate) fn reload(core: &Core, flight: &Flight) -> Result<Rc<ServiceEntry>, Reason> {
    let entry = find_again(core, flight)?;
    let before = flight.service.replace(Some(Rc::clone(&entry)));
    if before.is_some_and(|before| !rules::still_hold(&before, &entry)) {
        return Err(Reason::RulesChanged);
    }
    Ok(entry)
}

fn find_again(core: &Core, flight: &Flight) -> Result<Rc<ServiceEntry>, Reason> {
    let host = flight.host.borrow().clone();
    let path = flight.path.clone().ok_or(Reason::NoRoute)?;
    find_service(core, &route::Target { host, path, other_reading: None })
}

/// The service of a request as it is now; as the request found it if its route leads elsewhere by now.
pub(crate) fn service_of_now(flight: &Flight) -> Option<Rc<ServiceEntry>> {
    let known = flight.service.borrow().clone()?;
    let now = find_again(&flight.core, flight).ok();
    Some(now.filter(|now| now.service.name() == known.service.name()).unwrap_or(known))
}

fn sticky_value(cookie: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(cookie).ok().filter(|text| text.len() == 16)?;
    u64::from_str_radix(text, 16).ok()
}
