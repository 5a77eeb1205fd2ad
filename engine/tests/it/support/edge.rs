//! A small edge: it looks up the table for every request, enters the upstream, sends and records.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use peregrine_routing::{
    Address, Enter, Failure, HoldVerdict, Joined, Mirror, MirrorOutcome, Outcome, Passive, RoutingTable,
    TableReader, TrafficClass,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

static START: OnceLock<Instant> = OnceLock::new();

pub(crate) fn now_ms() -> u64 {
    1_000 + u64::try_from(START.get_or_init(Instant::now).elapsed().as_millis()).expect("a short test")
}

fn now_us() -> u64 {
    let elapsed = START.get_or_init(Instant::now).elapsed();
    1_000_000 + u64::try_from(elapsed.as_micros()).expect("a short test")
}

/// Counts of what clients got.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ok: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) first_failure: Mutex<Option<String>>,
}

pub(crate) struct Edge {
    reader: TableReader,
    stop: Arc<AtomicBool>,
    pub(crate) tally: Arc<Tally>,
    workers: Mutex<Vec<tokio::task::JoinHandle<()>>>,
    next_id: Arc<AtomicU64>,
    ahead: Arc<Ahead>,
}

/// What the table has asked to be opened ahead of requests.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Nothing is opened.
    pub(crate) refuses: AtomicBool,
    /// Generations with how many connections.
    pub(crate) asked: Mutex<Vec<(u64, u16)>>,
}

impl Ahead {
    fn follow(&self, table: &RoutingTable) {
        for (upstream, count) in table.ready_services().flat_map(|service| service.ready_upstreams()) {
            self.asked.lock().expect("not poisoned").push((upstream.generation().0, count));
            let missing = i64::from(count) - i64::try_from(upstream.ready_connections()).expect("a few");
            if !self.refuses.load(Ordering::SeqCst) {
                upstream.note_ready(missing);
            }
        }
    }
}

impl Edge {
    pub(crate) fn new(reader: TableReader) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledger = reader.register();
        let (own, over) = (reader.clone(), Arc::clone(&stop));
        let ahead = Arc::new(Ahead::default());
        let opening = Arc::clone(&ahead);
        let acknowledging = tokio::spawn(async move {
            let mut version = 0;
            while !over.load(Ordering::SeqCst) {
                let table = own.load();
                acknowledger.acknowledge(table.version());
                opening.follow(&table);
                drop(table);
                version = own.newer_than(version).await;
            }
        });
        let (held, over) = (reader.clone(), Arc::clone(&stop));
        let keeping = tokio::spawn(async move {
            while !over.load(Ordering::SeqCst) {
                for service in held.load().held_services() {
                    service.hold().map(|queue| queue.turn(now_us()));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        Self {
            reader,
            stop,
            tally: Arc::default(),
            workers: Mutex::new(vec![acknowledging, keeping]),
            next_id: Arc::new(AtomicU64::new(1)),
            ahead,
        }
    }

    pub(crate) fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    pub(crate) fn reader(&self) -> &TableReader {
        &self.reader
    }

    /// Clients that ask one after the other, with a short pause.
    pub(crate) fn load(&self, clients: usize) {
        for client in 0..clients {
            let (reader, stop, tally) =
                (self.reader.clone(), Arc::clone(&self.stop), Arc::clone(&self.tally));
            let next_id = Arc::clone(&self.next_id);
            let worker = tokio::spawn(async move {
                let mut random = 0x9e37_79b9 + client as u64;
                while !stop.load(Ordering::SeqCst) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let id = next_id.fetch_add(1, Ordering::SeqCst);
                    match request(&reader, "/", &format!("r{id}"), random).await {
                        Ok(status) if status < 500 => tally.ok.fetch_add(1, Ordering::SeqCst),
                        other => {
                            tally
                                .first_failure
                                .lock()
                                .expect("not poisoned")
                                .get_or_insert(format!("{other:?}"));
                            tally.failed.fetch_add(1, Ordering::SeqCst)
                        }
                    };
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            self.workers.lock().expect("not poisoned").push(worker);
        }
    }

    /// One request, as a client would send it.
    pub(crate) async fn get(&self, path: &str) -> Result<u16, String> {
        let id = self.next_id.fetch_add(1, Ordering::SeqCst);
        request(&self.reader, path, &format!("r{id}"), id).await
    }

    pub(crate) fn get_later(&self, path: &'static str) -> tokio::task::JoinHandle<Result<u16, String>> {
        let (reader, id) = (self.reader.clone(), self.next_id.fetch_add(1, Ordering::SeqCst));
        tokio::spawn(async move { request(&reader, path, &format!("r{id}"), id).await })
    }

    /// Waits until the clients have got so many answers more.
    pub(crate) async fn answers(&self, more: u64) {
        let answered = || self.tally.ok.load(Ordering::SeqCst) + self.tally.failed.load(Ordering::SeqCst);
        let enough = answered() + more;
        super::until("answers", || (answered() >= enough).then_some(())).await;
    }

    /// Stops the clients and waits for their last answers.
    pub(crate) async fn quiet(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let workers: Vec<_> = self.workers.lock().expect("not poisoned").drain(..).skip(2).collect();
        for worker in workers {
            worker.await.expect("a client does not panic");
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.lock().expect("not poisoned").drain(..) {
            worker.abort();
        }
    }

    pub(crate) fn assert_lossless(&self, at_least: u64) {
        let (ok, failed) = (self.tally.ok.load(Ordering::SeqCst), self.tally.failed.load(Ordering::SeqCst));
        let first = self.tally.first_failure.lock().expect("not poisoned").clone();
        assert_eq!(failed, 0, "of {} requests; the first: {first:?}", ok + failed);
        assert!(ok >= at_least, "only {ok} requests");
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn request(reader: &TableReader, path: &str, id: &str, random: u64) -> Result<u16, String> {
    let mirror = reader.load().lookup(super::HOST, path).and_then(|found| found.service.mirror().cloned());
    let begun = Instant::now();
    let status = request_of_client(reader, path, id, random).await?;
    if let Some(mirror) = mirror {
        copy(&mirror, path, id, (status, us(begun))).await;
    }
    Ok(status)
}

/// As the real edge: a copy of a request that was answered, if the table still wants one.
async fn copy(mirror: &Arc<Mirror>, path: &str, id: &str, client: (u16, u64)) {
    if !mirror.is_on(now_ms()) {
        return;
    }
    let (Some(target), Some(_slot)) = (mirror.next_target(), mirror.admit()) else { return };
    let Address::Socket(address) = *target.address() else { return };
    let outcome = match TcpStream::connect(address).await {
        Err(_) => MirrorOutcome::Failed { client_status: client.0 },
        Ok(stream) => {
            target.note_mirrored();
            let begun = Instant::now();
            match exchange(stream, address, path, &format!("{id}\r\nperegrine-mirror: 1")).await {
                Ok(status) => MirrorOutcome::Compared { client, mirror: (status, us(begun)) },
                Err(_) => MirrorOutcome::Failed { client_status: client.0 },
            }
        }
    };
    target.record_mirrored(outcome);
}

fn us(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

async fn request_of_client(reader: &TableReader, path: &str, id: &str, random: u64) -> Result<u16, String> {
    let mut tried = Vec::new();
    // A dial that fails was not sent: another copy is asked. What was sent is not sent twice.
    for _ in 0..4 {
        held(reader, path).await?;
        let lease = {
            let table = reader.load();
            let found = table.lookup(super::HOST, path).ok_or("no route")?;
            found.service.enter(Enter {
                now_ms: now_ms(),
                random,
                hash: None,
                prefer: None,
                tried: &tried,
                class: TrafficClass::Request,
            })
        };
        let mut lease = match lease {
            Ok(lease) => lease,
            Err(_) if !tried.is_empty() => return Err("every copy was tried".to_owned()),
            Err(_) => {
                tokio::task::yield_now().await; // retired since the table was loaded: look again
                continue;
            }
        };
        let upstream = Arc::clone(lease.upstream());
        let Address::Socket(address) = *upstream.address() else { return Err("a name".to_owned()) };
        let begun = Instant::now();
        match TcpStream::connect(address).await {
            Err(_) => {
                upstream.strike(&Passive::default(), now_ms());
                tried.push(upstream.generation());
            }
            Ok(stream) => {
                lease.mark_sent();
                let answer = exchange(stream, address, path, id).await;
                let outcome = match answer {
                    Ok(status) => Outcome::Response { status, latency_us: us(begun) },
                    Err(_) => Outcome::Failed(Failure::Reset),
                };
                upstream.record(outcome, &Passive::default(), now_ms());
                return answer;
            }
        }
    }
    Err("no copy could be entered".to_owned())
}

/// Waits while the service is held.
async fn held(reader: &TableReader, path: &str) -> Result<(), String> {
    let joined = {
        let table = reader.load();
        let found = table.lookup(super::HOST, path).ok_or("no route")?;
        match found.service.hold().filter(|queue| queue.is_closed()) {
            Some(queue) => queue.join(100, now_us()),
            None => return Ok(()),
        }
    };
    match joined {
        Joined::Pass => Ok(()),
        Joined::Full => Err("the queue is full".to_owned()),
        Joined::Wait(mut ticket) => match std::future::poll_fn(|cx| ticket.poll_verdict(cx)).await {
            HoldVerdict::Go => Ok(()),
            HoldVerdict::TooOld => Err("held for too long".to_owned()),
        },
    }
}

async fn exchange(mut stream: TcpStream, address: SocketAddr, path: &str, id: &str) -> Result<u16, String> {
    let host = super::HOST;
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n");
    let broken = |error: std::io::Error| format!("{address}: {error}");
    stream.write_all(request.as_bytes()).await.map_err(broken)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.map_err(broken)?;
    let text = String::from_utf8_lossy(&answer);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.filter(|_| text.ends_with("fine")).ok_or_else(|| format!("{address}: a cut answer {text:?}"))
}
