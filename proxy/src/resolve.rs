//! Names of upstreams. A name is looked up once when it is first needed and again in the background
//! before its answer is too old, so a request waits for DNS at most once. When a name cannot be looked
//! up any more, its last addresses stay in use: an outage of DNS is no outage of the site.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_resolver::TokioResolver;
use peregrine_routing::Address;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use crate::clock::now_ms;

/// An answer is never used for a shorter or a longer time than this, whatever its TTL.
const MIN_TTL: Duration = Duration::from_secs(1);
const MAX_TTL: Duration = Duration::from_secs(30);
/// How long an address is waited for before the next one is tried beside it (RFC 8305 §8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// A name that nobody has asked for in this time is forgotten.
const FORGET_AFTER_MS: u64 = 600_000;
/// How often names are looked at.
const ROUND: Duration = Duration::from_secs(1);

/// A name without an address.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot resolve {name}: {cause}")]
pub(crate) struct ResolveError {
    name: Arc<str>,
    cause: String,
}

type Answer = Result<Arc<Known>, ResolveError>;

#[derive(Debug)]
struct Known {
    addresses: Vec<IpAddr>,
    until: Instant,
    used_ms: AtomicU64,
}

type Names = HashMap<Arc<str>, Arc<Known>>;

/// An edge's view of DNS. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Resolver {
    names: Arc<ArcSwap<Names>>,
    asks: mpsc::UnboundedSender<(Arc<str>, oneshot::Sender<Answer>)>,
}

/// The other end, to be run on the control side.
pub(crate) struct Lookups {
    names: Arc<ArcSwap<Names>>,
    asks: mpsc::UnboundedReceiver<(Arc<str>, oneshot::Sender<Answer>)>,
}

pub(crate) fn resolver() -> (Resolver, Lookups) {
    let names = Arc::new(ArcSwap::from_pointee(Names::new()));
    let (sender, receiver) = mpsc::unbounded_channel();
    (Resolver { names: Arc::clone(&names), asks: sender }, Lookups { names, asks: receiver })
}

/// Why an upstream cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Name(#[from] ResolveError),
    #[error("cannot connect: {0}")]
    Connect(#[from] io::Error),
}

impl Resolver {
    /// Connects to an upstream. Every address of a name is tried, from a random one on: the next when one
    /// fails, or has not answered within [`ATTEMPT_DELAY`] (RFC 8305 §5), and the first that answers wins.
    pub(crate) async fn dial(&self, address: &Address, random: u64) -> Result<TcpStream, DialError> {
        let (host, port) = match address {
            Address::Socket(address) => return Ok(TcpStream::connect(*address).await?),
            Address::Name { host, port } => (host, *port),
        };
        if let Ok(literal) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(TcpStream::connect((literal, port)).await?);
        }
        let known = self.known(host).await?;
        let (addresses, count) = (&known.addresses, known.addresses.len());
        let first = (random % count as u64) as usize;
        let mut attempts = FuturesUnordered::new();
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for at in 0..count {
            attempts.push(TcpStream::connect((addresses[(first + at) % count], port)));
            let is_last = at + 1 == count;
            loop {
                let ended = if is_last {
                    attempts.next().await
                } else {
                    // Silence starts the next one beside this one.
                    let Ok(ended) = tokio::time::timeout(ATTEMPT_DELAY, attempts.next()).await else { break };
                    ended
                };
                match ended {
                    Some(Ok(socket)) => return Ok(socket),
                    Some(Err(error)) => failure = error,
                    None => break,
                }
                if !is_last {
                    break;
                }
            }
        }
        Err(failure.into())
    }

    /// What is known of a name. Ready at once if it was asked for before.
    async fn known(&self, name: &Arc<str>) -> Answer {
        if let Some(known) = self.names.load().get(name) {
            known.used_ms.store(now_ms(), Relaxed);
            return Ok(Arc::clone(known));
        }
        let gone = || ResolveError { name: Arc::clone(name), cause: "the edge is shutting down".into() };
        let (sender, receiver) = oneshot::channel();
        self.asks.send((Arc::clone(name), sender)).map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }
}

impl Lookups {
    /// Answers what is asked, and keeps known names fresh.
    pub(crate) async fn run(mut self) {
        let dns = match TokioResolver::builder_tokio().and_then(hickory_resolver::ResolverBuilder::build) {
            Ok(dns) => Ok(Rc::new(dns)),
            Err(error) => {
                tracing::warn!(%error, "no DNS configuration on this machine; upstreams need addresses");
                Err(error.to_string())
            }
        };
        let (done, mut answers) = mpsc::unbounded_channel();
        let mut waiting: HashMap<Arc<str>, Vec<oneshot::Sender<Answer>>> = HashMap::new();
        let mut round = tokio::time::interval(ROUND);
        loop {
            tokio::select! {
                ask = self.asks.recv() => {
                    let Some((name, sender)) = ask else { return };
                    let first = !waiting.contains_key(&name);
                    waiting.entry(Arc::clone(&name)).or_default().push(sender);
                    if first {
                        start_lookup(dns.clone(), name, done.clone());
                    }
                }
                Some((name, answer)) = answers.recv() => {
                    let answer = self.learn(&name, answer);
                    for sender in waiting.remove(&name).into_iter().flatten() {
                        // Whoever has left needs no answer.
                        drop(sender.send(answer.clone()));
                    }
                }
                _ = round.tick() => {
                    for name in self.due() {
                        if !waiting.contains_key(&name) {
                            waiting.insert(Arc::clone(&name), Vec::new());
                            start_lookup(dns.clone(), name, done.clone());
                        }
                    }
                }
            }
        }
    }

    fn learn(&self, name: &Arc<str>, answer: Result<(Vec<IpAddr>, Instant), String>) -> Answer {
        let before = self.names.load().get(name).cloned();
        let (addresses, until) = match (answer, &before) {
            (Ok(answer), _) => answer,
            (Err(cause), Some(before)) => {
                tracing::warn!(%name, %cause, "a name of an upstream cannot be looked up; its last addresses are used");
                (before.addresses.clone(), Instant::now() + MIN_TTL)
            }
            (Err(cause), None) => return Err(ResolveError { name: Arc::clone(name), cause }),
        };
        let used_ms = before.map_or_else(now_ms, |before| before.used_ms.load(Relaxed));
        let known = Arc::new(Known { addresses, until, used_ms: AtomicU64::new(used_ms) });
        let mut names = Names::clone(&self.names.load());
        names.insert(Arc::clone(name), Arc::clone(&known));
        self.names.store(Arc::new(names));
        Ok(known)
    }

    /// Names whose answers run out, after those that nobody uses were forgotten.
    fn due(&self) -> Vec<Arc<str>> {
        let forgotten = now_ms().saturating_sub(FORGET_AFTER_MS);
        let names = self.names.load();
        if names.values().any(|known| known.used_ms.load(Relaxed) < forgotten) {
            let mut kept = Names::clone(&names);
            kept.retain(|_, known| known.used_ms.load(Relaxed) >= forgotten);
            self.names.store(Arc::new(kept));
        }
        let soon = Instant::now() + ROUND;
        let due = names.iter().filter(|(_, known)| known.until <= soon);
        due.map(|(name, _)| Arc::clone(name)).collect()
    }
}

type Done = mpsc::UnboundedSender<(Arc<str>, Result<(Vec<IpAddr>, Instant), String>)>;

fn start_lookup(dns: Result<Rc<TokioResolver>, String>, name: Arc<str>, done: Done) {
    tokio::task::spawn_local(async move {
        let answer = match dns {
            Ok(dns) => look_up(&dns, &name).await,
            Err(cause) => Err(cause),
        };
        // The receiver lives as long as the runtime that this task is on.
        drop(done.send((name, answer)));
    });
}

async fn look_up(dns: &TokioResolver, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
    let found = dns.lookup_ip(name).await.map_err(|error| error.to_string())?;
    let addresses: Vec<IpAddr> = found.iter().collect();
    if addresses.is_empty() {
        return Err("it has no address".into());
    }
    let now = Instant::now();
    Ok((addresses, found.valid_until().clamp(now + MIN_TTL, now + MAX_TTL)))
}
