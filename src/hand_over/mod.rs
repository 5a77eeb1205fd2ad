//! One process of an edge takes over from another, without a gap.
//!
//! ```text
//!   old                                        new
//!   starts it; a socket pair is its standard input
//!   sockets, lock ───────────────────────────► takes them; opens the table; meets the engine
//!   (accepts)                                  accepts on the same sockets ──► ready
//!   stops accepting, writes no more ─► yours ► writes the table
//!   ends what it has, class by class           serves
//!   ends ────────────────────────────────────► alone
//! ```
//!
//! Told to stop, the new process has the old one stop too, if it is still there.
//!
//! At every moment one of them accepts on every socket, and each sees the other's end by the end of the socket pair. When
//! the new one ends before the old one has, the old one accepts again; when the old one ends, the new one has what it
//! needs. What is said is the same in every version: see [`channel::FORM`].
//!
//! An address that the new process has no use for is closed by the old one: nobody is to wait there for an accept that does
//! not come. Should the old one have to serve again, it binds that address again.
//!
//! There may be more than two, each of them ending what it has. Whoever serves has an end of the pair with every one of
//! them, because it is handed on with the sockets:
//!
//! ```text
//!   first ◄── pair ──┐
//!   second ◄─ pair ──┴─ third, which serves       an end is open for as long as one of those after it lives
//! ```
//!
//! So when the second ends, or is killed, the first sees nothing of it; when all after it have ended, it accepts again.

mod channel;
mod control;
mod heir;
mod predecessor;

pub(crate) use control::{Asked, Control, ask};
pub(crate) use heir::{Ends, Heir, Offer, Ready, begin, program};
pub(crate) use predecessor::{Inherited, Predecessor, Watch, inherited};

/// Says to a process that it takes over, and that its standard input is where it is told what.
const VARIABLE: &str = "PEREGRINE_HAND_OVER";
