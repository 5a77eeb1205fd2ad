//! Ports for servers that are started with a fixed address.
//!
//! One that the kernel picks for port 0 is of its ephemeral range: between that answer and the moment when the server listens, any
//! connection that goes out may take it, and thousands do here. Those below the range nobody takes unasked. They are given out in
//! blocks, each held by one process with a lock, as several test programs run beside each other.

use std::fs::{File, TryLockError};
use std::net::TcpListener;
use std::ops::Range;
use std::sync::Mutex;

/// Below what the kernel gives to connections that go out (32,768 on), and below what the process runtime gives to instances (20,000 on).
const PORTS: Range<u16> = 10_000..20_000;
const PORTS_PER_BLOCK: u16 = 100;

/// The blocks of this process; their locks end with it.
static OURS: Mutex<Blocks> = Mutex::new(Blocks { locks: Vec::new(), left: 0..0 });

struct Blocks {
    locks: Vec<File>,
    left: Range<u16>,
}

/// A port of 127.0.0.1 that nobody listens on, and that no other test is given.
pub(crate) fn free_port() -> u16 {
    let mut ours = OURS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    loop {
        match ours.left.next() {
            Some(port) if TcpListener::bind(("127.0.0.1", port)).is_ok() => return port,
            Some(_) => {}
            None => ours.claim(),
        }
    }
}

impl Blocks {
    fn claim(&mut self) {
        let dir = std::env::temp_dir().join("peregrine-test-ports");
        std::fs::create_dir_all(&dir).expect("a folder for the locks of ports");
        for first in PORTS.step_by(usize::from(PORTS_PER_BLOCK)) {
            let lock = File::create(dir.join(first.to_string())).expect("a lock of ports");
            match lock.try_lock() {
                Ok(()) => {
                    self.locks.push(lock);
                    self.left = first..first + PORTS_PER_BLOCK;
                    return;
                }
                // Another process has it, or we have used it up.
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => panic!("a lock of ports: {error}"),
            }
        }
        panic!("no block of ports {PORTS:?} is free");
    }
}
