//! What the stories stand on: the built binary with a data folder of its own, traffic, and the oracle.

pub(crate) mod apart;
pub(crate) mod bad_disk;
pub(crate) mod docker;
pub(crate) mod knot;
pub(crate) mod ocsp;
pub(crate) mod pebble;
pub(crate) mod ports;
pub(crate) mod server;
pub(crate) mod shop;
pub(crate) mod stayers;
pub(crate) mod tls;
pub(crate) mod traffic;
pub(crate) mod wires;

use std::time::{Duration, Instant};

/// Longest wait for a state that is bound to come.
pub(crate) const STATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two looks at a state.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until `look` finds something, and fails the test with `what` if it does not in time.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < STATE_TIMEOUT, "waited {STATE_TIMEOUT:?} for {what}");
        std::thread::park_timeout(LOOK_EVERY);
    }
}

/// The origin: what the services of the tests run. Built by `scripts/run-tests` beside the binary.
pub(crate) fn origin_program() -> std::path::PathBuf {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_peregrine")).with_file_name("peregrine-bench");
    assert!(program.exists(), "{} is missing: cargo build --workspace --bins", program.display());
    program
}
