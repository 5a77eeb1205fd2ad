//! A service of which one copy may run is moved while it is asked: its clients wait, and nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::moves::moved;
use crate::support::shop::Shop;
use crate::support::traffic::{Traffic, assert_nothing_lost};

const SETTINGS: &str = r#"
[service.shop.move]
single_writer = true
stop_grace = "2s"
warm = { probes = 2, interval = "20ms" }
"#;
/// Between two looks at the processes of this machine.
const LOOK: Duration = Duration::from_millis(5);

/// Looks all the time how many copies run.
struct Watch {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicUsize>,
    looks: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn begin(collector_port: u16) -> Self {
        let (stop, most, looks): (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
        let (over, seen, count) = (Arc::clone(&stop), Arc::clone(&most), Arc::clone(&looks));
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::SeqCst) {
                seen.fetch_max(copies(collector_port), Ordering::SeqCst);
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::park_timeout(LOOK);
            }
        });
        Self { stop, most, looks, thread }
    }

    /// Most copies that were seen at one look, and the number of looks.
    fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("it does not panic");
        (self.most.load(Ordering::SeqCst), self.looks.load(Ordering::SeqCst))
    }
}

/// Processes that deliver to this collector: the copies of this test's shop.
fn copies(collector_port: u16) -> usize {
    let mark = format!("ORIGIN_RECORD=tcp://127.0.0.1:{collector_port}\0");
    let is_copy = |entry: &std::fs::DirEntry| {
        let of = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let command = of("cmdline");
        command.split(|byte| *byte == 0).nth(1) == Some(b"origin")
            && String::from_utf8_lossy(&of("environ")).contains(&mark)
    };
    let entries = std::fs::read_dir("/proc").expect("processes");
    entries.filter_map(Result::ok).filter(is_copy).count()
}

#[test]
fn a_single_writer_that_is_moved_under_load_loses_nothing_and_never_runs_twice() {
    let shop = Shop::open(SETTINGS);
    let watch = Watch::begin(shop.collector_port());
    let traffic = Traffic::start(shop.server.edge(), 300);
    for to in ["host-b", "host-a", "host-b"] {
        let ended = shop.move_to(to);
        assert_eq!(moved(&ended)["state"], "succeeded", "{ended:#}");
        let id = moved(&ended)["id"].as_str().expect("an id");
        let receipt = shop.server.ok(&["moves", "receipt", id]);
        println!(
            "to {to}: pause {} ms, {} held, longest extra wait {} ms",
            receipt["pause_ms"], receipt["held"], receipt["longest_extra_wait_ms"]
        );
        assert_eq!(receipt["failed"], 0, "{receipt:#}");
        assert!(receipt["held"].as_u64() > Some(0) && receipt["pause_ms"].as_u64() > Some(0), "{receipt:#}");
    }
    let summaries = traffic.stop();
    let (most, looks) = watch.end();
    assert_nothing_lost(&summaries, &shop.records());
    assert_eq!(shop.places(), ["host-b"]);
    assert!(looks > 20, "{looks} looks");
    assert_eq!(most, 1, "copies at one moment, in {looks} looks");
    assert_eq!(shop.assert_one_copy_at_a_time(), 4, "one copy before, and one for each move");
}
