//! The API as a client sees it: a real engine on SQLite and real processes behind a real socket.

mod access;
mod contract;
mod events;
mod idempotency;
mod lists;
mod logs;
mod moves;
mod services;
mod shutdown;
mod support;
