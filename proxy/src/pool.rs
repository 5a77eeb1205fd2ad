//! Connections to upstreams, one pool per core, keyed by upstream generation.
//!
//! An HTTP/1.1 connection has no task of its own while it is used: the request that has it also drives
//! it, and while it is idle nobody does. That saves two task switches and two channel hops per request.
//! The timekeeper looks after idle connections; whoever takes one out polls it before the first byte is
//! written, so a connection that the upstream has closed gives the request back unsent.
//!
//! Retiring a generation drops its key: a connection to a retired upstream cannot be found any more.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use peregrine_routing::{Generation, ServicePolicy, Upstream};
use tokio::net::TcpStream;

use crate::body::ForwardBody;
use crate::core::LocalExecutor;
use crate::link::{Link, UpstreamStream};

/// How long a connection that has sent its answer may take to become idle.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);
/// Streams that one core has on one HTTP/2 connection before it opens another; the upstream's own
/// limit counts too.
const MAX_STREAMS_PER_CONNECTION: usize = 100;

type Http1Io = TokioIo<UpstreamStream>;

/// One HTTP/1.1 connection to an upstream.
pub(crate) struct Http1Conn {
    pub(crate) sender: http1::SendRequest<ForwardBody>,
    conn: Option<http1::Connection<Http1Io, ForwardBody>>,
    pub(crate) link: Rc<Link>,
    ended: bool,
    idle_since_ms: u64,
    /// It has served a request before.
    pub(crate) reused: bool,
}

impl Http1Conn {
    /// Moves bytes both ways. Ready when the connection has ended or was upgraded.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        let Some(conn) = self.conn.as_mut().filter(|_| !self.ended) else {
            return Poll::Ready(Ok(()));
        };
        let polled = Pin::new(conn).poll(cx);
        self.ended = polled.is_ready();
        polled
    }

    /// Takes the socket back after an upgrade, with what was read beyond the head.
    pub(crate) fn into_socket(self) -> Option<(TcpStream, bytes::Bytes)> {
        let parts = self.conn?.into_parts();
        Some((parts.io.into_inner().into_socket()?, parts.read_buf))
    }

    /// Drops the connection proper. That hands a request which was still queued in it back to its sender.
    pub(crate) fn discard(&mut self) {
        self.ended = true;
        self.conn = None;
    }

    fn is_idle(&self) -> bool {
        !self.ended && self.sender.is_ready()
    }
}

/// One HTTP/2 connection to an upstream; its task runs beside the requests.
struct Http2Conn {
    sender: http2::SendRequest<ForwardBody>,
    /// Streams that the upstream allows at a time.
    max_streams: Rc<Cell<usize>>,
    streams: Rc<Cell<usize>>,
    idle_since_ms: Rc<Cell<u64>>,
}

/// A place on an HTTP/2 connection.
pub(crate) struct Http2Ticket {
    pub(crate) sender: http2::SendRequest<ForwardBody>,
    streams: Rc<Cell<usize>>,
    idle_since_ms: Rc<Cell<u64>>,
    clock_ms: Rc<Cell<u64>>,
}

impl Drop for Http2Ticket {
    fn drop(&mut self) {
        self.streams.set(self.streams.get() - 1);
        self.idle_since_ms.set(self.clock_ms.get());
    }
}

/// The connections of one core to one generation.
pub(crate) struct UpstreamPool {
    #[expect(
        clippy::vec_box,
        reason = "connections go in and out with every request: a pointer moves, not 500 bytes"
    )]
    idle: RefCell<Vec<Box<Http1Conn>>>,
    http2: RefCell<Vec<Http2Conn>>,
    retired: Cell<bool>,
    max_idle: usize,
    idle_timeout_ms: u64,
    clock_ms: Rc<Cell<u64>>,
}

impl UpstreamPool {
    fn new(policy: &ServicePolicy, retired: bool, clock_ms: Rc<Cell<u64>>) -> Rc<Self> {
        Rc::new(Self {
            idle: RefCell::new(Vec::new()),
            http2: RefCell::new(Vec::new()),
            retired: Cell::new(retired),
            max_idle: policy.max_idle_connections_per_upstream as usize,
            idle_timeout_ms: u64::from(policy.upstream_idle_timeout_ms),
            clock_ms,
        })
    }

    /// The connection that was used last, if it is fit. A request that must not be sent twice gets none
    /// that has been idle for half of its time: the upstream may be about to close it.
    pub(crate) fn checkout(&self, replayable: bool) -> Option<Box<Http1Conn>> {
        let now_ms = self.clock_ms.get();
        let max_age_ms = if replayable { self.idle_timeout_ms } else { self.idle_timeout_ms / 2 };
        let mut idle = self.idle.borrow_mut();
        loop {
            let age_ms = now_ms.saturating_sub(idle.last()?.idle_since_ms);
            if age_ms >= max_age_ms && age_ms < self.idle_timeout_ms {
                return None;
            }
            let conn = idle.pop()?;
            if age_ms < max_age_ms && conn.is_idle() {
                return Some(conn);
            }
        }
    }

    /// Takes a connection back whose request is over. One that is not idle yet gets a moment to be.
    pub(crate) fn give_back(self: &Rc<Self>, mut conn: Box<Http1Conn>) {
        if self.retired.get() || conn.ended {
            return;
        }
        if !conn.is_idle() {
            let mut cx = Context::from_waker(Waker::noop());
            if conn.poll(&mut cx).is_ready() {
                return;
            }
            if !conn.sender.is_ready() {
                self.settle(conn);
                return;
            }
        }
        self.keep(conn);
    }

    fn keep(&self, mut conn: Box<Http1Conn>) {
        let mut idle = self.idle.borrow_mut();
        if self.retired.get() || idle.len() >= self.max_idle {
            return;
        }
        conn.reused = true;
        conn.idle_since_ms = self.clock_ms.get();
        idle.push(conn);
    }

    fn settle(self: &Rc<Self>, conn: Box<Http1Conn>) {
        let pool = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            if let Ok(Some(conn)) = tokio::time::timeout(SETTLE_TIMEOUT, until_idle(conn)).await
                && let Some(pool) = pool.upgrade()
            {
                pool.keep(conn);
            }
        });
    }

    /// Gives a connection a task of its own: its request is still going up while the answer comes down,
    /// and a client that takes nothing must not hold up what it sends.
    pub(crate) fn detach(self: &Rc<Self>, conn: Box<Http1Conn>) {
        let pool = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            if let Some(conn) = until_idle(conn).await
                && let Some(pool) = pool.upgrade()
            {
                pool.keep(conn);
            }
        });
    }

    /// Makes an HTTP/1.1 connection of a socket.
    pub(crate) async fn open_http1(
        builder: &http1::Builder,
        socket: TcpStream,
    ) -> hyper::Result<Box<Http1Conn>> {
        let link = Rc::<Link>::default();
        let stream = UpstreamStream::new(socket, Rc::clone(&link));
        let (sender, conn) = builder.handshake(TokioIo::new(stream)).await?;
        Ok(Box::new(Http1Conn {
            sender,
            conn: Some(conn),
            link,
            ended: false,
            idle_since_ms: 0,
            reused: false,
        }))
    }

    /// A place on an HTTP/2 connection that is open.
    pub(crate) fn join_http2(&self) -> Option<Http2Ticket> {
        let mut conns = self.http2.borrow_mut();
        conns.retain(|conn| !conn.sender.is_closed());
        let limit = |conn: &Http2Conn| conn.max_streams.get().clamp(1, MAX_STREAMS_PER_CONNECTION);
        let conn =
            conns.iter().filter(|conn| conn.streams.get() < limit(conn)).min_by_key(|c| c.streams.get())?;
        Some(self.ticket(conn))
    }

    fn ticket(&self, conn: &Http2Conn) -> Http2Ticket {
        conn.streams.set(conn.streams.get() + 1);
        Http2Ticket {
            sender: conn.sender.clone(),
            streams: Rc::clone(&conn.streams),
            idle_since_ms: Rc::clone(&conn.idle_since_ms),
            clock_ms: Rc::clone(&self.clock_ms),
        }
    }

    /// Makes an HTTP/2 connection of a socket and takes a place on it.
    pub(crate) async fn open_http2(
        self: &Rc<Self>,
        builder: &http2::Builder<LocalExecutor>,
        socket: TcpStream,
    ) -> hyper::Result<Http2Ticket> {
        let (sender, mut conn) = builder.handshake(TokioIo::new(socket)).await?;
        let max_streams = Rc::new(Cell::new(MAX_STREAMS_PER_CONNECTION));
        let limit = Rc::clone(&max_streams);
        tokio::task::spawn_local(async move {
            let ended = std::future::poll_fn(|cx| {
                let polled = Pin::new(&mut conn).poll(cx);
                limit.set(conn.current_max_send_streams());
                polled
            });
            if let Err(error) = ended.await {
                tracing::debug!(%error, "HTTP/2 connection to an upstream ended");
            }
        });
        let conn = Http2Conn {
            sender,
            max_streams,
            streams: Rc::new(Cell::new(0)),
            idle_since_ms: Rc::new(Cell::new(self.clock_ms.get())),
        };
        let ticket = self.ticket(&conn);
        if !self.retired.get() {
            self.http2.borrow_mut().push(conn);
        }
        Ok(ticket)
    }

    /// A connection that has failed a request takes no further one, unless only the stream was reset.
    pub(crate) fn leave_http2(&self, ticket: &Http2Ticket, only_stream: bool) {
        if !only_stream {
            self.http2.borrow_mut().retain(|conn| !Rc::ptr_eq(&conn.streams, &ticket.streams));
        }
    }

    fn retire(&self) {
        self.retired.set(true);
        let idle = self.idle.take();
        let http2 = self.http2.take();
        drop((idle, http2));
    }

    /// Closes what the upstream has closed, and what was idle for too long.
    fn sweep(&self) {
        let now_ms = self.clock_ms.get();
        let mut cx = Context::from_waker(Waker::noop());
        let mut idle = self.idle.take();
        idle.retain_mut(|conn| {
            now_ms.saturating_sub(conn.idle_since_ms) < self.idle_timeout_ms
                && conn.poll(&mut cx).is_pending()
        });
        *self.idle.borrow_mut() = idle;
        self.http2.borrow_mut().retain(|conn| {
            let idle_ms = now_ms.saturating_sub(conn.idle_since_ms.get());
            !conn.sender.is_closed() && (conn.streams.get() > 0 || idle_ms < self.idle_timeout_ms)
        });
    }

    fn is_unused(&self) -> bool {
        self.idle.borrow().is_empty() && self.http2.borrow().is_empty()
    }
}

async fn until_idle(mut conn: Box<Http1Conn>) -> Option<Box<Http1Conn>> {
    let idle = std::future::poll_fn(|cx| match conn.poll(cx) {
        Poll::Ready(_) => Poll::Ready(false),
        Poll::Pending => conn.sender.poll_ready(cx).map(|ready| ready.is_ok()),
    });
    idle.await.then_some(conn)
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
        let pool = UpstreamPool::new(policy, retired, Rc::clone(&self.clock_ms));
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
