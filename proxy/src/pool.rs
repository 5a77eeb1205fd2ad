//! Connections to upstreams, one pool per core, keyed by upstream generation.
//!
//! An HTTP/1.1 connection has no task of its own: the request that has it drives it, and while it is idle
//! nobody does. The timekeeper looks after idle connections, and whoever takes one out looks whether it is
//! still open before a byte is written. One of HTTP/2 has a task, which sees its end at once; but what the upstream
//! closes at this very moment nobody can see. So a request that must not be sent twice takes none that has been idle for
//! longer than the upstream is trusted to keep it, whatever the protocol.
//!
//! Connections can be opened ahead of the first request. They stand behind those that have been used, and are
//! counted at their upstream until they are used or closed.
//!
//! Retiring a generation drops its key: a connection to a retired upstream cannot be found any more.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use peregrine_routing::{Address, Generation, ServicePolicy, Upstream, UpstreamProtocol};
use tokio::net::TcpStream;

use crate::body::ForwardBody;
use crate::core::{Core, LocalExecutor};
use crate::http1::Http1Conn;

/// Streams that one core has on one HTTP/2 connection before it opens another; the upstream's own
/// limit counts too.
const MAX_STREAMS_PER_CONNECTION: usize = 100;

/// Idle HTTP/2 connections beside which one core opens another without closing one of them. One would do for all
/// requests; the others grow old enough to tell how long the upstream keeps them.
const MAX_IDLE_HTTP2_CONNECTIONS: usize = 4;

/// How long a connection to an upstream that has a name is used: where the name leads may have changed since, and
/// while connections are at hand nobody asks.
const NAMED_MAX_AGE_MS: u64 = 30_000;

/// Connections that one core opens ahead to one upstream at a time.
const MAX_DIALS_AHEAD: usize = 8;

/// Connections that were opened ahead, as their upstream counts them until they are used or closed.
struct Ahead {
    upstream: Arc<Upstream>,
    count: i64,
}

impl Ahead {
    fn new(upstream: &Arc<Upstream>, count: u16) -> Self {
        upstream.note_ready(count.into());
        Self { upstream: Arc::clone(upstream), count: count.into() }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.upstream.note_ready(-self.count);
    }
}

/// One HTTP/2 connection to an upstream; its task runs beside the requests.
struct Http2Conn {
    sender: http2::SendRequest<ForwardBody>,
    usage: Rc<Http2Use>,
    opened_ms: u64,
    ahead: Cell<Option<Ahead>>,
}

/// How an HTTP/2 connection is used: what the pool, its task and its tickets share.
struct Http2Use {
    /// Streams that the upstream allows at a time.
    max_streams: Cell<usize>,
    streams: Cell<usize>,
    /// When the last stream ended; of meaning while there is none.
    idle_since_ms: Cell<u64>,
}

impl Http2Use {
    /// How long it has been idle; `None` while a stream is in flight.
    fn idle_ms(&self, now_ms: u64) -> Option<u64> {
        (self.streams.get() == 0).then(|| now_ms.saturating_sub(self.idle_since_ms.get()))
    }
}

/// A place on an HTTP/2 connection.
pub(crate) struct Http2Ticket {
    pub(crate) sender: http2::SendRequest<ForwardBody>,
    usage: Rc<Http2Use>,
    /// How long the connection had been idle before; `None` if it was not.
    idle_ms: Option<u64>,
    clock_ms: Rc<Cell<u64>>,
}

impl Drop for Http2Ticket {
    fn drop(&mut self) {
        self.usage.streams.set(self.usage.streams.get() - 1);
        self.usage.idle_since_ms.set(self.clock_ms.get());
    }
}

/// The connections of one core to one generation.
pub(crate) struct UpstreamPool {
    upstream: Arc<Upstream>,
    #[expect(
        clippy::vec_box,
        reason = "connections go in and out with every request: a pointer moves, not 500 bytes"
    )]
    idle: RefCell<Vec<Box<Http1Conn>>>,
    ahead: RefCell<Vec<(Box<Http1Conn>, Ahead)>>,
    /// Connections are being opened ahead.
    opening: Cell<bool>,
    http2: RefCell<Vec<Http2Conn>>,
    retired: Cell<bool>,
    max_idle: usize,
    max_age_ms: Option<u64>,
    idle_timeout_ms: u64,
    connect_timeout_ms: u32,
    clock_ms: Rc<Cell<u64>>,
}

impl UpstreamPool {
    pub(crate) fn new(
        upstream: &Arc<Upstream>,
        policy: &ServicePolicy,
        retired: bool,
        clock_ms: Rc<Cell<u64>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            upstream: Arc::clone(upstream),
            idle: RefCell::new(Vec::new()),
            ahead: RefCell::new(Vec::new()),
            opening: Cell::new(false),
            http2: RefCell::new(Vec::new()),
            retired: Cell::new(retired),
            max_idle: policy.max_idle_connections_per_upstream as usize,
            max_age_ms: matches!(upstream.address(), Address::Name { .. }).then_some(NAMED_MAX_AGE_MS),
            idle_timeout_ms: u64::from(policy.upstream_idle_timeout_ms),
            connect_timeout_ms: policy.connect_timeout_ms,
            clock_ms,
        })
    }

    /// The connection that was used last, if it is fit, or else one that was opened ahead. A request that
    /// must not be sent twice gets none that has been idle for half of the time that the upstream is known to keep
    /// connections, nor for half of ours: the upstream may be about to close it.
    pub(crate) fn checkout(&self, replayable: bool) -> Option<Box<Http1Conn>> {
        let used = self.take_fit(&mut self.idle.borrow_mut(), replayable, |conn| conn);
        used.or_else(|| {
            // Whoever takes it uses it: it is ahead of nobody any more.
            self.take_fit(&mut self.ahead.borrow_mut(), replayable, |(conn, _)| conn).map(|(conn, _)| conn)
        })
    }

    fn take_fit<T>(
        &self,
        from: &mut Vec<T>,
        replayable: bool,
        conn: impl Fn(&mut T) -> &mut Box<Http1Conn>,
    ) -> Option<T> {
        let now_ms = self.clock_ms.get();
        let max_age_ms = self.max_age_ms_for(replayable);
        loop {
            let age_ms = now_ms.saturating_sub(conn(from.last_mut()?).idle_since_ms);
            if age_ms >= max_age_ms && age_ms < self.idle_timeout_ms {
                return None;
            }
            let mut taken = from.pop()?;
            if age_ms < max_age_ms {
                if conn(&mut taken).is_open() {
                    return Some(taken);
                }
                self.upstream.note_idle_closed(age_ms, now_ms);
            }
        }
    }

    /// Idle time from which on a connection is not for this request.
    fn max_age_ms_for(&self, replayable: bool) -> u64 {
        if replayable {
            return self.idle_timeout_ms;
        }
        self.upstream.trusted_idle_ms(self.clock_ms.get()).min(self.idle_timeout_ms / 2)
    }

    /// Takes a connection back whose answer is over. If its request is still going up, it comes back when
    /// that is through.
    pub(crate) fn give_back(self: &Rc<Self>, mut conn: Box<Http1Conn>) {
        if !conn.is_away() {
            if conn.is_reusable() {
                self.keep(conn);
            }
            return;
        }
        let pool = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            if let Some(conn) = conn.recycle().await
                && let Some(pool) = pool.upgrade()
            {
                pool.keep(conn);
            }
        });
    }

    /// Learns from a connection that the upstream had closed before the request came to it.
    pub(crate) fn note_missed(&self, conn: &Http1Conn) {
        let now_ms = self.clock_ms.get();
        self.upstream.note_idle_closed(now_ms.saturating_sub(conn.idle_since_ms), now_ms);
    }

    fn keep(&self, mut conn: Box<Http1Conn>) {
        if conn.is_introduced {
            return;
        }
        if let Some(announced_ms) = conn.take_announced_ms() {
            self.upstream.note_idle_announced(announced_ms);
        }
        if conn.opened_ms == 0 {
            conn.opened_ms = self.clock_ms.get();
        }
        let mut idle = self.idle.borrow_mut();
        if self.retired.get() || idle.len() >= self.max_idle || self.is_old(conn.opened_ms) {
            return;
        }
        conn.reused = true;
        conn.idle_since_ms = self.clock_ms.get();
        idle.push(conn);
    }

    /// Whether a connection that was opened then is to be used no more.
    fn is_old(&self, opened_ms: u64) -> bool {
        self.max_age_ms.is_some_and(|max_age_ms| self.clock_ms.get().saturating_sub(opened_ms) >= max_age_ms)
    }

    /// A place on an HTTP/2 connection that is open. One that is too old goes when its streams have. One with a stream in
    /// flight is in use, and the upstream does not close it as idle; for one without, the rules of [`Self::checkout`] hold.
    pub(crate) fn join_http2(&self, replayable: bool) -> Option<Http2Ticket> {
        let (now_ms, max_idle_ms) = (self.clock_ms.get(), self.max_age_ms_for(replayable));
        let mut conns = self.http2.borrow_mut();
        conns.retain(|conn| !conn.sender.is_closed() && !self.is_old(conn.opened_ms));
        let fits = |conn: &&Http2Conn| {
            let limit = conn.usage.max_streams.get().clamp(1, MAX_STREAMS_PER_CONNECTION);
            let is_fresh = conn.usage.idle_ms(now_ms).is_none_or(|idle_ms| idle_ms < max_idle_ms);
            is_fresh && conn.usage.streams.get() < limit
        };
        let order = |conn: &&Http2Conn| (conn.usage.streams.get(), Reverse(conn.usage.idle_since_ms.get()));
        let conn = conns.iter().filter(fits).min_by_key(order)?;
        Some(self.ticket(conn))
    }

    fn ticket(&self, conn: &Http2Conn) -> Http2Ticket {
        drop(conn.ahead.take());
        let idle_ms = conn.usage.idle_ms(self.clock_ms.get());
        conn.usage.streams.set(conn.usage.streams.get() + 1);
        Http2Ticket {
            sender: conn.sender.clone(),
            usage: Rc::clone(&conn.usage),
            idle_ms,
            clock_ms: Rc::clone(&self.clock_ms),
        }
    }

    /// Learns from an HTTP/2 connection that was leaving before the request came to it.
    pub(crate) fn note_missed_http2(&self, ticket: &Http2Ticket) {
        if let Some(idle_ms) = ticket.idle_ms {
            self.upstream.note_idle_closed(idle_ms, self.clock_ms.get());
        }
    }

    /// Makes an HTTP/2 connection of a socket and takes a place on it.
    pub(crate) async fn open_http2(
        self: &Rc<Self>,
        builder: &http2::Builder<LocalExecutor>,
        socket: TcpStream,
    ) -> hyper::Result<Http2Ticket> {
        let conn = self.handshake(builder, socket).await?;
        let ticket = self.ticket(&conn);
        if !self.retired.get() {
            self.make_room();
            self.http2.borrow_mut().push(conn);
        }
        Ok(ticket)
    }

    /// Closes an idle HTTP/2 connection if there are too many: the one that was used last, because only those that are left
    /// alone show how long the upstream keeps them.
    fn make_room(&self) {
        let mut conns = self.http2.borrow_mut();
        let is_idle = |conn: &&Http2Conn| conn.usage.streams.get() == 0;
        if conns.iter().filter(is_idle).count() < MAX_IDLE_HTTP2_CONNECTIONS {
            return;
        }
        let last = conns.iter().filter(is_idle).max_by_key(|conn| conn.usage.idle_since_ms.get());
        if let Some(last) = last.map(|conn| Rc::clone(&conn.usage)) {
            conns.retain(|conn| !Rc::ptr_eq(&conn.usage, &last));
        }
    }

    async fn handshake(
        &self,
        builder: &http2::Builder<LocalExecutor>,
        socket: TcpStream,
    ) -> hyper::Result<Http2Conn> {
        let (sender, mut conn) = builder.handshake(TokioIo::new(socket)).await?;
        let usage = Rc::new(Http2Use {
            max_streams: Cell::new(MAX_STREAMS_PER_CONNECTION),
            streams: Cell::new(0),
            idle_since_ms: Cell::new(self.clock_ms.get()),
        });
        // What the pool has let go of is not kept alive, and ends because of us.
        let watched = Rc::downgrade(&usage);
        let (upstream, clock_ms) = (Arc::clone(&self.upstream), Rc::clone(&self.clock_ms));
        tokio::task::spawn_local(async move {
            let ended = std::future::poll_fn(|cx| {
                let polled = Pin::new(&mut conn).poll(cx);
                if let Some(usage) = watched.upgrade() {
                    usage.max_streams.set(conn.current_max_send_streams());
                }
                polled
            });
            if let Err(error) = ended.await {
                tracing::debug!(%error, "HTTP/2 connection to an upstream ended");
            }
            let now_ms = clock_ms.get();
            if let Some(idle_ms) = watched.upgrade().and_then(|usage| usage.idle_ms(now_ms)) {
                upstream.note_idle_closed(idle_ms, now_ms);
            }
        });
        Ok(Http2Conn { sender, usage, opened_ms: self.clock_ms.get(), ahead: Cell::new(None) })
    }

    /// A connection that has failed a request takes no further one, unless only the stream was reset.
    pub(crate) fn leave_http2(&self, ticket: &Http2Ticket, only_stream: bool) {
        if !only_stream {
            self.http2.borrow_mut().retain(|conn| !Rc::ptr_eq(&conn.usage, &ticket.usage));
        }
    }

    // --- ahead of the first request -----------------------------------------------------------------

    /// Opens connections until there are `count` idle ones (HTTP/1.1), or one (HTTP/2). What fails is not
    /// tried again before the next time that the table asks: a request opens its own.
    pub(crate) async fn open_ahead(self: Rc<Self>, core: Rc<Core>, upstream: Arc<Upstream>, count: u16) {
        if self.opening.replace(true) {
            return;
        }
        match upstream.protocol() {
            UpstreamProtocol::Http1 => self.open_http1_ahead(&core, &upstream, count).await,
            UpstreamProtocol::H2c => self.open_http2_ahead(&core, &upstream, count).await,
        }
        self.opening.set(false);
    }

    async fn open_http1_ahead(&self, core: &Core, upstream: &Arc<Upstream>, count: u16) {
        let wanted = usize::from(count).min(self.max_idle);
        loop {
            let here = self.idle.borrow().len() + self.ahead.borrow().len();
            let missing = wanted.saturating_sub(here).min(MAX_DIALS_AHEAD);
            let dialled = join_all((0..missing).map(|_| self.dial_ahead(core, upstream))).await;
            if self.retired.get() {
                return;
            }
            let sockets: Vec<TcpStream> = dialled.into_iter().flatten().collect();
            let failed = sockets.len() < missing;
            for socket in sockets {
                let mut conn = Http1Conn::new(socket, core.spares.clone());
                // The upstream may close it at any time, as one that has served: that is nobody's fault.
                conn.reused = true;
                conn.idle_since_ms = self.clock_ms.get();
                self.ahead.borrow_mut().push((conn, Ahead::new(upstream, 1)));
            }
            if failed || missing == 0 {
                return;
            }
        }
    }

    async fn open_http2_ahead(&self, core: &Core, upstream: &Arc<Upstream>, count: u16) {
        if !self.http2.borrow().is_empty() || self.max_idle == 0 {
            return;
        }
        let Some(socket) = self.dial_ahead(core, upstream).await else { return };
        match self.handshake(&core.http2, socket).await {
            Ok(conn) if !self.retired.get() => {
                conn.ahead.set(Some(Ahead::new(upstream, count)));
                self.http2.borrow_mut().push(conn);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(upstream = %upstream.name(), %error, "no connection ahead"),
        }
    }

    async fn dial_ahead(&self, core: &Core, upstream: &Upstream) -> Option<TcpStream> {
        let limit = Duration::from_millis(u64::from(self.connect_timeout_ms));
        let dialling = core.resolver.dial(upstream.address(), core.random.next());
        let socket = match tokio::time::timeout(limit, dialling).await.ok()? {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(upstream = %upstream.name(), %error, "no connection ahead");
                return None;
            }
        };
        socket.set_nodelay(true).is_ok().then_some(socket)
    }

    pub(crate) fn retire(&self) {
        self.retired.set(true);
        let idle = self.idle.take();
        let ahead = self.ahead.take();
        let http2 = self.http2.take();
        drop((idle, ahead, http2));
    }

    /// Closes what the upstream has closed, and what was idle for too long.
    pub(crate) fn sweep(&self) {
        let now_ms = self.clock_ms.get();
        let mut longest_ms = 0;
        let mut keeps = |conn: &mut Http1Conn| {
            let idle_ms = now_ms.saturating_sub(conn.idle_since_ms);
            let is_open = conn.is_open();
            if is_open {
                longest_ms = longest_ms.max(idle_ms);
            } else {
                self.upstream.note_idle_closed(idle_ms, now_ms);
            }
            is_open && idle_ms < self.idle_timeout_ms
        };
        self.idle.borrow_mut().retain_mut(|conn| keeps(conn));
        self.ahead.borrow_mut().retain_mut(|(conn, _)| keeps(conn));
        self.http2.borrow_mut().retain(|conn| {
            // Its task has told already how it was found closed.
            let is_open = !conn.sender.is_closed();
            let Some(idle_ms) = conn.usage.idle_ms(now_ms) else { return is_open };
            if is_open {
                longest_ms = longest_ms.max(idle_ms);
            }
            is_open && idle_ms < self.idle_timeout_ms
        });
        if longest_ms > 0 {
            self.upstream.note_idle_open(longest_ms);
        }
    }

    fn is_unused(&self) -> bool {
        self.idle.borrow().is_empty() && self.ahead.borrow().is_empty() && self.http2.borrow().is_empty()
    }
}

/// The pools of a core.
pub(crate) struct Pools {
    by_generation: RefCell<HashMap<Generation, Keyed, BuildHasherDefault<GenerationHasher>>>,
    clock_ms: Rc<Cell<u64>>,
}

struct Keyed {
    upstream: Arc<Upstream>,
    pool: Rc<UpstreamPool>,
}

impl Pools {
    pub(crate) fn new(clock_ms: Rc<Cell<u64>>) -> Self {
        Self { by_generation: RefCell::default(), clock_ms }
    }

    /// The pool of an upstream. That of a retired one keeps nothing.
    pub(crate) fn of(&self, upstream: &Arc<Upstream>, policy: &ServicePolicy) -> Rc<UpstreamPool> {
        if let Some(keyed) = self.by_generation.borrow().get(&upstream.generation()) {
            return Rc::clone(&keyed.pool);
        }
        let retired = upstream.is_retired();
        let pool = UpstreamPool::new(upstream, policy, retired, Rc::clone(&self.clock_ms));
        if !retired {
            let keyed = Keyed { upstream: Arc::clone(upstream), pool: Rc::clone(&pool) };
            self.by_generation.borrow_mut().insert(upstream.generation(), keyed);
        }
        pool
    }

    /// Drops the keys of retired generations with all their idle connections.
    pub(crate) fn drop_retired(&self) {
        self.by_generation.borrow_mut().retain(|_, keyed| {
            let retired = keyed.upstream.is_retired();
            if retired {
                keyed.pool.retire();
            }
            !retired
        });
    }

    /// Closes idle connections whose time is over, and forgets pools that hold none.
    pub(crate) fn sweep(&self) {
        self.by_generation.borrow_mut().retain(|_, keyed| {
            keyed.pool.sweep();
            !(keyed.pool.is_unused() && Rc::strong_count(&keyed.pool) == 1)
        });
    }
}

/// Generations are numbers that are given out in turn: spreading them is all that a hash has to do.
#[derive(Default)]
pub(crate) struct GenerationHasher(u64);

impl Hasher for GenerationHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }
}

#[cfg(test)]
mod tests {
    use peregrine_routing::{Balance, Change, PoolSpec, ServiceSpec, UpstreamSpec};

    use super::*;
    use crate::http1::SpareBuffers;

    /// How many connections a pool holds after one was given back at once, taken out, and given back again later.
    async fn kept(address: Address, later_ms: u64) -> usize {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let copy = UpstreamSpec {
            generation: Generation(1),
            name: "copy".into(),
            address,
            protocol: UpstreamProtocol::Http1,
            weight: 1,
            ready_connections: 0,
        };
        let pool = PoolSpec { name: "main".into(), weight: 1, standby: false, upstreams: vec![copy] };
        let service = ServiceSpec {
            name: "web".into(),
            routes: Vec::new(),
            pools: vec![pool],
            balance: Balance::default(),
            policy: ServicePolicy::default(),
        };
        let (mut writer, _reader) = peregrine_routing::table();
        writer.apply(&[Change::Put(service)]).unwrap();
        let upstream = writer.upstream(Generation(1)).unwrap();
        let clock_ms = Rc::new(Cell::new(1));
        let pool = UpstreamPool::new(upstream, &ServicePolicy::default(), false, Rc::clone(&clock_ms));
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        pool.keep(Http1Conn::new(socket, SpareBuffers::default()));
        let conn = pool.checkout(true).expect("it is kept");
        clock_ms.set(1 + later_ms);
        pool.keep(conn);
        pool.idle.borrow().len()
    }

    #[tokio::test]
    async fn a_connection_to_a_name_is_used_for_a_while_only_and_one_to_an_address_for_ever() {
        let name = || Address::Name { host: "backend.test".into(), port: 80 };
        assert_eq!(kept(name(), NAMED_MAX_AGE_MS - 1).await, 1);
        assert_eq!(kept(name(), NAMED_MAX_AGE_MS).await, 0);
        assert_eq!(kept(Address::Socket(([127, 0, 0, 1], 80).into()), 10 * NAMED_MAX_AGE_MS).await, 1);
    }
}
