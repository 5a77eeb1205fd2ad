//! What black-box tests, the demo and the benchmarks measure Peregrine with.
//!
//! - [`origin`]: a server that records every request id, so that "executed exactly once" is a count and not a belief;
//! - [`load`]: a client that counts every failure and never retries;
//! - [`collector`]: gathers the records of origins in containers, whose files are gone when they are;
//! - [`image`]: packs a program into a container image;
//! - [`oracle`]: the comparison of the two;
//! - [`compare`]: Peregrine beside nginx and HAProxy on one core each, with raw runs kept.
//!
//! Nothing here knows Peregrine's own crates: the proxy is judged from the outside, by its sockets.

pub mod collector;
pub mod compare;
pub mod image;
pub mod load;
pub mod oracle;
pub mod origin;
