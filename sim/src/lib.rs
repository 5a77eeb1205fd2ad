//! The simulator: the real table, upstreams, balancing and retry classes, and the real engine, in a world in which
//! time, chance and every fault follow from one number.
//!
//! ```text
//!   seed ─► world: machines with copies, clock, chance ◄── faults
//!             ▲ runtime        ▲ dial, execute
//!           engine ── table, link (lost, doubled, late) ──► edges ◄── clients
//!             ▼ store that outlives it
//! ```
//!
//! A run is single-threaded on a paused clock, so that the same seed gives the same run, event by event: a seed
//! that failed is its own recording. Nothing of Peregrine depends on this crate.

mod book;
mod edge;
mod engine;
mod faults;
#[expect(dead_code, reason = "shared with the engine's own tests, which also end lives at steps")]
#[path = "../../engine/tests/it/support/life.rs"]
mod life;
mod link;
#[path = "../../engine/tests/it/support/memory.rs"]
mod memory;
mod report;
mod runtime;
mod scenario;
mod store;
mod world;

pub use report::{Report, Summary};

/// From this seed on the service of a world is a single writer: at most one copy of it may run at any moment, and its
/// clients are held while one takes over from the other. (Apart, so that what a seed below it stands for stays.)
pub const SINGLE_WRITER_FROM: u64 = 1 << 32;

/// Runs one seed.
///
/// # Panics
/// No runtime can be made: the process is out of resources.
#[must_use]
pub fn run(seed: u64) -> Report {
    on_paused_clock(scenario::run(seed, false)).0
}

/// Runs one seed and returns every event as a line.
///
/// # Panics
/// As [`run`].
#[must_use]
pub fn trace(seed: u64) -> (Report, Vec<String>) {
    on_paused_clock(scenario::run(seed, true))
}

/// Runs seeds on so many threads. Each seed is one run on one thread, so their number changes nothing.
///
/// # Panics
/// As [`run`], and if a thread cannot be started.
#[must_use]
pub fn sweep(seeds: std::ops::Range<u64>, threads: usize) -> Summary {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let mut sum = Summary::default();
    std::thread::scope(|scope| {
        let work = || {
            let mut sum = Summary::default();
            loop {
                let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if seed >= seeds.end {
                    return sum;
                }
                sum.add(run(seed));
            }
        };
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            sum.merge(worker.join().expect("a seed does not panic"));
        }
    });
    sum
}

fn on_paused_clock<T>(run: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without threads can be made");
    runtime.block_on(run)
}
