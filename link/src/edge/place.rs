//! The place of a process among those of the same edge: while one takes over from another, both live, and what is the
//! edge's has to be of one of them at any moment.
//!
//! ```text
//!   before   takes over, the disk is not its own ─► the disk is its own ─► the next one comes ─► handed over ─► ends
//! ```

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Processes of one edge that may live at a time, as far as an engine is told. Those that are more have handed over long ago.
const MAX_BESIDE: usize = 16;

/// What a process knows of its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Processes of this edge that live beside this one.
    pub(crate) beside: Vec<u64>,
    /// Another one has taken over.
    pub(crate) handed_over: bool,
}

/// The edge's files on the disk: written by one process at a time.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Held while something is written.
    writing: Mutex<Writing>,
    /// Told to whoever has something to save.
    ours: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Writing {
    /// Number of the save that is on the disk.
    last_saved: u64,
}

/// The right to write, for as long as it is held.
pub(crate) struct Turn<'d>(MutexGuard<'d, Writing>);

impl std::ops::Deref for Turn<'_> {
    type Target = u64;
    fn deref(&self) -> &u64 {
        &self.0.last_saved
    }
}

impl std::ops::DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut u64 {
        &mut self.0.last_saved
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new(true)
    }
}

impl Disk {
    pub(crate) fn new(ours: bool) -> Self {
        Self { writing: Mutex::default(), ours: watch::Sender::new(ours) }
    }

    pub(crate) fn is_ours(&self) -> bool {
        *self.ours.borrow()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.ours.subscribe()
    }

    /// The right to write; `None` if it is another process's.
    pub(crate) fn ours(&self) -> Option<Turn<'_>> {
        let turn = Turn(self.writing.lock().unwrap_or_else(PoisonError::into_inner));
        self.is_ours().then_some(turn)
    }

    /// When this returns, nothing is being written that should not be.
    fn set(&self, ours: bool) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.ours.send_replace(ours);
    }
}

/// What one process of an edge hands to the next.
#[derive(Debug)]
pub struct Before {
    /// The lock of the data folder, which is held by both from then on.
    pub lock: File,
    /// It, and those that were beside it.
    pub incarnations: Vec<u64>,
}

/// The place of this process, for whoever hands it over or takes it over.
#[derive(Clone, Debug)]
pub struct PlaceHandle {
    pub(super) incarnation: u64,
    pub(super) place: Arc<Mutex<Place>>,
    pub(super) disk: Arc<Disk>,
    pub(super) lock: Arc<File>,
}

impl PlaceHandle {
    /// What the next process of this edge begins with.
    ///
    /// # Errors
    /// There are no file descriptors left.
    pub fn hand_on(&self) -> io::Result<Before> {
        let lock = self.lock.try_clone()?;
        let mut incarnations = self.place().beside.clone();
        incarnations.push(self.incarnation);
        let most = incarnations.len().saturating_sub(MAX_BESIDE);
        Ok(Before { lock, incarnations: incarnations.split_off(most) })
    }

    /// Whether the files of the edge are this process's to remove.
    #[must_use]
    pub fn owns_disk(&self) -> bool {
        self.disk.is_ours()
    }

    /// This process, as engines know it.
    #[must_use]
    pub const fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Another process has taken over, or has not after all: engines are told when they are met again. The disk is the
    /// other one's from now on: when this returns, nothing is being written here. It may block for as long as a write takes.
    pub fn set_handed_over(&self, handed_over: bool) {
        self.place().handed_over = handed_over;
        self.disk.set(!handed_over);
    }

    /// The process before this one writes no more: this one does.
    pub fn take_disk(&self) {
        self.disk.set(true);
    }

    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
