//! The second account of every lease: kept beside the upstreams' own, so that a receipt can be checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use peregrine_engine::model::InstanceId;
use peregrine_routing::{Lease, PerClass, TrafficClass, Upstream};

use crate::world::World;

/// The account of one table: of the process that the engine and its edge share, or of one edge.
#[derive(Clone)]
pub(crate) struct Book {
    world: World,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    accounts: BTreeMap<u64, Account>,
    /// Generations that are out of the table, and that a core has said it has let go of.
    closed: BTreeSet<u64>,
}

struct Account {
    upstream: Arc<Upstream>,
    started: u64,
    completed: PerClass<u64>,
    soft_closed: PerClass<u64>,
    cut: Vec<String>,
    inside: PerClass<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Completed,
    SoftClosed,
    Cut,
}

/// A lease with its entry in the book. Both end together.
pub(crate) struct Booked {
    lease: Option<Lease>,
    book: Book,
    sent: bool,
    end: End,
}

impl Book {
    pub(crate) fn new(world: &World) -> Self {
        Self { world: world.clone(), inner: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics with the book in hand")
    }

    /// Enters a lease that was just taken.
    pub(crate) fn enter(&self, lease: Lease) -> Booked {
        let upstream = Arc::clone(lease.upstream());
        let generation = upstream.generation().0;
        let mut inner = self.lock();
        if inner.closed.contains(&generation) {
            self.world.violated(format_args!("a lease on g{generation} after its acknowledgement"));
        }
        let account = inner.accounts.entry(generation).or_insert_with(|| Account {
            upstream,
            started: 0,
            completed: PerClass::default(),
            soft_closed: PerClass::default(),
            cut: Vec::new(),
            inside: PerClass::default(),
        });
        account.inside[lease.class()] += 1;
        drop(inner);
        Booked { lease: Some(lease), book: self.clone(), sent: false, end: End::Completed }
    }

    /// A core uses a table with these generations alone, and has told so.
    pub(crate) fn close_all_but(&self, named: &BTreeSet<u64>) {
        let mut inner = self.lock();
        let gone: Vec<u64> = inner.accounts.keys().filter(|g| !named.contains(g)).copied().collect();
        inner.closed.extend(gone);
    }

    /// Generations that somebody is still inside of.
    pub(crate) fn inhabited(&self) -> BTreeSet<u64> {
        let inner = self.lock();
        let inhabited = inner.accounts.iter().filter(|(_, account)| account.inside.total() > 0);
        inhabited.map(|(generation, _)| *generation).collect()
    }

    /// Requests that were sent to a copy, over all of its generations.
    pub(crate) fn started(&self, id: &InstanceId) -> u64 {
        let inner = self.lock();
        let own = inner.accounts.values().filter(|account| **account.upstream.name() == *id.as_str());
        own.map(|account| account.started).sum()
    }

    /// Compares with the receipts that the upstreams write themselves.
    pub(crate) fn check(&self) {
        let inner = self.lock();
        for (generation, account) in &inner.accounts {
            let receipt = account.upstream.receipt();
            let same = receipt.started == account.started
                && receipt.completed == account.completed
                && receipt.soft_closed == account.soft_closed
                && receipt.hard_cut == account.cut
                && receipt.in_flight == account.inside
                && receipt.empty == (account.upstream.is_retired() && account.inside.total() == 0);
            if !same {
                self.world.violated(format_args!(
                    "the receipt of g{generation} is {receipt:?}; its leases were {} started, {:?} completed, {:?} closed, {:?} cut, {:?} inside",
                    account.started, account.completed, account.soft_closed, account.cut, account.inside
                ));
            }
        }
    }
}

impl Booked {
    fn lease(&self) -> &Lease {
        self.lease.as_ref().expect("it is taken out by drop alone")
    }

    pub(crate) fn upstream(&self) -> &Arc<Upstream> {
        self.lease().upstream()
    }

    pub(crate) fn class(&self) -> TrafficClass {
        self.lease().class()
    }

    fn change(&mut self, lease: impl FnOnce(&mut Lease), account: impl FnOnce(&mut Account, TrafficClass)) {
        let generation = self.upstream().generation().0;
        let class = self.class();
        let book = self.book.clone();
        let mut inner = book.lock();
        if let Some(lease_now) = &mut self.lease {
            lease(lease_now);
        }
        account(inner.accounts.get_mut(&generation).expect("it was entered"), class);
    }

    pub(crate) fn mark_sent(&mut self) {
        if !self.sent {
            self.sent = true;
            self.change(Lease::mark_sent, |account, _| account.started += 1);
        }
    }

    pub(crate) fn reclassify(&mut self, next: TrafficClass) {
        self.change(
            |lease| lease.reclassify(next),
            |account, class| {
                account.inside[class] -= 1;
                account.inside[next] += 1;
            },
        );
    }

    pub(crate) fn soft_close(&mut self) {
        self.end = End::SoftClosed;
        self.change(Lease::soft_close, |_, _| {});
    }

    pub(crate) fn cut(&mut self, request_id: &str) {
        self.end = End::Cut;
        self.change(|lease| lease.cut(request_id), |account, _| account.cut.push(request_id.to_owned()));
    }
}

impl Drop for Booked {
    fn drop(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        let (generation, class) = (lease.upstream().generation().0, lease.class());
        let mut inner = self.book.lock();
        if let Some(account) = inner.accounts.get_mut(&generation) {
            account.inside[class] -= 1;
            match self.end {
                End::Completed if self.sent => account.completed[class] += 1,
                End::SoftClosed if self.sent => account.soft_closed[class] += 1,
                _ => {}
            }
        }
        drop(lease);
    }
}
