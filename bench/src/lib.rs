//! What black-box tests, the demo and the benchmarks measure Peregrine with.
//!
//! - [`origin`]: a server that records every request id, so that "executed exactly once" is a count and not a belief;
//! - [`load`]: a client that counts every failure and never retries;
//! - [`collector`]: gathers the records of origins in containers, whose files are gone when they are;
//! - [`oracle`]: the comparison of the two.
//!
//! Nothing here knows Peregrine's own crates: the proxy is judged from the outside, by its sockets.

pub mod collector;
pub mod load;
pub mod oracle;
pub mod origin;
