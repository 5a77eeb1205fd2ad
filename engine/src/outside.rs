//! What the engine takes from the world besides its store, its machines and its edges: the time of day, fresh
//! ids, and connections to copies. All three are handed in, so that the same engine runs in a simulation, in
//! which they follow from a seed.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::model::UnixMs;

/// The time of day in Unix milliseconds. It may jump; nothing but records and deadlines in the store is
/// reckoned in it.
pub type WallClock = Arc<dyn Fn() -> UnixMs + Send + Sync>;

/// Fresh ids, each later than the one before.
pub type Ids = Arc<dyn Fn() -> Uuid + Send + Sync>;

/// A connection to a copy.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A connection to a copy, or why there is none.
pub type Dialled = io::Result<Box<dyn Connection>>;

/// How probes connect to a copy.
#[derive(Clone)]
pub struct Dial(Arc<dyn Fn(SocketAddr) -> BoxFuture<'static, Dialled> + Send + Sync>);

impl Dial {
    /// Connects by calling `dial`.
    pub fn new(dial: impl Fn(SocketAddr) -> BoxFuture<'static, Dialled> + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Dialled {
        (self.0)(address).await
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dial")
    }
}

/// The time of day, ids and connections. [`Outside::default`] takes the real ones.
#[derive(Clone)]
pub struct Outside {
    /// The time of day.
    pub wall_clock: WallClock,
    /// Ids of rollouts and copies.
    pub ids: Ids,
    /// Connections of probes.
    pub dial: Dial,
}

impl Default for Outside {
    fn default() -> Self {
        Self {
            wall_clock: Arc::new(|| u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)),
            ids: Arc::new(Uuid::now_v7),
            dial: Dial::new(|address| {
                Box::pin(async move {
                    TcpStream::connect(address).await.map(|stream| Box::new(stream) as Box<dyn Connection>)
                })
            }),
        }
    }
}
