//! What tests share: a DNS server, edges, an authority, and a manager between them.

pub(crate) mod badca;
pub(crate) mod dns;
pub(crate) mod front;
pub(crate) mod knot;
#[path = "../../../../tests/support/ocsp.rs"]
pub(crate) mod ocsp;
pub(crate) mod pebble;
#[path = "../../../../tests/support/ports.rs"]
pub(crate) mod ports;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use peregrine_certs::{
    CaConfig, ChallengeKind, Config, DnsConfig, DomainView, Limits, Manager, OnDemand, Outside, SealKey,
    Vault,
};
use tokio::task::JoinHandle;

use self::dns::Dns;
use self::front::TestFront;
use self::pebble::{Pebble, PebbleOptions};

/// However busy the machine is: what takes longer does not happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

/// Everything around a manager.
pub(crate) struct World {
    pub(crate) dns: Dns,
    pub(crate) front: TestFront,
    pub(crate) pebble: Pebble,
    /// Milliseconds that the manager's clock is before the machine's.
    pub(crate) ahead_ms: Arc<AtomicI64>,
}

impl World {
    /// `None` if there is no pebble.
    pub(crate) async fn start(options: PebbleOptions) -> Option<Self> {
        let program = pebble::find("pebble")?;
        let dns = Dns::start().await;
        let front = TestFront::start().await;
        let pebble = Pebble::start(&program, dns.address, front.http, front.tls, &options);
        Some(Self { dns, front, pebble, ahead_ms: Arc::default() })
    }

    pub(crate) fn ca(&self) -> CaConfig {
        pebble::ca("pebble", self.pebble.directory(), &self.pebble.root_pem)
    }

    pub(crate) fn config(&self) -> Config {
        config(&self.dns, vec![self.ca()])
    }

    pub(crate) fn outside(&self) -> Outside {
        outside(&self.ahead_ms)
    }

    pub(crate) async fn manager(&self, config: Config, vault: Arc<dyn Vault>) -> Running {
        self.manager_with(config, vault, SealKey::ephemeral().unwrap()).await
    }

    pub(crate) async fn manager_with(&self, config: Config, vault: Arc<dyn Vault>, seal: SealKey) -> Running {
        Running::start(config, vault, self.front.clone(), seal, self.outside()).await
    }
}

/// A manager's configuration with short pauses.
pub(crate) fn config(dns: &Dns, authorities: Vec<CaConfig>) -> Config {
    Config {
        holder: "one".to_owned(),
        authorities,
        challenges: vec![ChallengeKind::Http01],
        dns: DnsConfig {
            resolvers: vec![dns.address],
            expected_addresses: vec!["127.0.0.1".parse().unwrap()],
            expected_aliases: Vec::new(),
            providers: Vec::new(),
        },
        on_demand: OnDemand::default(),
        limits: Limits {
            retry_ms: 200,
            retry_max_ms: 1_000,
            dns_retry_ms: 100,
            dns_retry_max_ms: 300,
            order_retry_ms: 100,
            order_retry_max_ms: 500,
            ca_pause_ms: 100,
            ca_pause_max_ms: 500,
            order_patience_ms: 2_000,
            ..Limits::default()
        },
    }
}

pub(crate) fn outside(ahead_ms: &Arc<AtomicI64>) -> Outside {
    let real = Outside::system();
    let ahead_ms = Arc::clone(ahead_ms);
    let now = Arc::clone(&real.now_ms);
    Outside {
        now_ms: Arc::new(move || now().saturating_add_signed(ahead_ms.load(Ordering::Relaxed))),
        random: real.random,
    }
}

/// A manager that runs until it is dropped.
pub(crate) struct Running {
    pub(crate) manager: Manager,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    pub(crate) async fn start(
        config: Config,
        vault: Arc<dyn Vault>,
        front: TestFront,
        seal: SealKey,
        outside: Outside,
    ) -> Self {
        let manager = Manager::open(config, vault, Arc::new(front), seal, outside).await.expect("a manager");
        let run = manager.clone();
        let task = tokio::spawn(async move { run.run().await });
        Self { manager, task }
    }

    /// Ends it as a crash would: in the middle of whatever it does.
    pub(crate) async fn kill(mut self) {
        self.task.abort();
        let _cancelled = (&mut self.task).await;
    }

    /// Waits until the domain is as wanted.
    pub(crate) async fn until(&self, name: &str, wanted: impl Fn(&DomainView) -> bool) -> DomainView {
        let mut events = self.manager.events();
        let found = tokio::time::timeout(DEADLINE, async {
            loop {
                if let Some(view) = self.manager.get(name).filter(&wanted) {
                    return view;
                }
                // Not every change is of the state: look now and then, too.
                let _either = tokio::time::timeout(Duration::from_millis(50), events.recv()).await;
            }
        });
        match found.await {
            Ok(view) => view,
            Err(_) => panic!("{name} did not become as wanted: {:?}", self.manager.get(name)),
        }
    }

    pub(crate) async fn until_valid(&self, name: &str) -> DomainView {
        self.until(name, |view| view.certificate.is_some()).await
    }
}

/// Polls until something holds.
pub(crate) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
