//! What a service manager is told: sd_notify's datagrams. Nothing is told where nobody asks for it (`NOTIFY_SOCKET`).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Serving. With the process that is the service's main one from now on: after a hand-over it is another.
pub(crate) fn ready() {
    tell(&format!("READY=1\nMAINPID={}\nSTATUS=serving", std::process::id()));
}

/// Another process takes over. Told when it begins: from now on the end of this process is not that of the service.
pub(crate) fn handing_over(to: u32) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now_us = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
    tell(&format!("RELOADING=1\nMONOTONIC_USEC={now_us}\nMAINPID={to}\nSTATUS=process {to} takes over"));
}

/// This process serves on, or again.
pub(crate) fn kept(why: &str) {
    let why = why.replace('\n', " ");
    tell(&format!("READY=1\nMAINPID={}\nSTATUS=serving; not upgraded: {why}", std::process::id()));
}

/// The service ends.
pub(crate) fn stopping() {
    tell("STOPPING=1\nSTATUS=finishing requests in flight");
}

fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    // "@" stands for the zero byte before a name that is no file.
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager cannot be told how this process stands");
    }
}
