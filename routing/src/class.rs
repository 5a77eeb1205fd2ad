//! Traffic classes: how long a piece of traffic may keep a retired upstream.

/// What a lease is used for. A drain treats each class by its own deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrafficClass {
    /// One request and its answer, the usual case (also unary gRPC).
    Request,
    /// An upload or download that goes on for longer than a request should, while bytes flow.
    Transfer,
    /// Server-sent events (`text/event-stream`).
    Sse,
    /// A streaming gRPC call.
    GrpcStream,
    /// An upgraded connection: WebSocket or another tunnel.
    WebSocket,
    /// A request that is held at the edge and has not been sent.
    Held,
}

impl TrafficClass {
    /// How many classes there are.
    pub const COUNT: usize = 6;
    /// Every class, in the order of [`TrafficClass::index`].
    pub const ALL: [Self; Self::COUNT] =
        [Self::Request, Self::Transfer, Self::Sse, Self::GrpcStream, Self::WebSocket, Self::Held];

    /// Position in [`TrafficClass::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name used in receipts, metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Transfer => "transfer",
            Self::Sse => "sse",
            Self::GrpcStream => "grpc_stream",
            Self::WebSocket => "websocket",
            Self::Held => "held",
        }
    }
}

/// One value for each [`TrafficClass`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerClass<T>(pub [T; TrafficClass::COUNT]);

impl<T> std::ops::Index<TrafficClass> for PerClass<T> {
    type Output = T;
    fn index(&self, class: TrafficClass) -> &T {
        &self.0[class.index()]
    }
}

impl<T> std::ops::IndexMut<TrafficClass> for PerClass<T> {
    fn index_mut(&mut self, class: TrafficClass) -> &mut T {
        &mut self.0[class.index()]
    }
}

impl PerClass<u64> {
    /// The sum over all classes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Adds another account to this one, class by class.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}
