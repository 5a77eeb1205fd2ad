//! The edge from outside: real sockets, scripted clients and scripted origins.

mod apart;
mod bodies;
mod closing;
mod drain;
mod forwarding;
mod frames;
mod goaway;
mod grpc;
mod health;
mod large;
mod limits;
mod malformed;
mod mirror;
mod names;
mod observe;
mod outage;
mod ready;
mod retries;
mod scripted;
mod shutdown;
mod stale;
mod support;
mod tunnels;
mod websockets;
