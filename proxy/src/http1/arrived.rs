//! Whether bytes have come to the other end of a connection, as the kernel knows it.
//!
//! An upstream that closes an idle connection while a request is on its way is the oldest race of HTTP/1.1, and
//! a read that says "closed" looks the same as when the upstream has read the request and died over it. TCP tells
//! the two apart: every segment acknowledges what its sender has received by then. If the end of the upstream's
//! stream came, and nothing of the request is acknowledged, the upstream had closed before the request was there
//! (RFC 9293 §3.6; nobody answers a request on a connection that is closed in his direction). After a reset, which
//! overtakes acknowledgements, nothing can be said.

use std::os::fd::AsRawFd;

use tokio::net::TcpStream;

/// `struct tcp_info` of Linux as far as it is read.
#[cfg(target_os = "linux")]
const TCP_INFO_BYTES: usize = 128;
/// Where `tcpi_bytes_acked` is in it: a 64-bit count of all bytes of the connection, with the SYN.
#[cfg(target_os = "linux")]
const BYTES_ACKED_AT: usize = 120;

/// Whether the peer has acknowledged more than the first `written` bytes of a connection that we have opened.
/// True if that is not known.
#[cfg(target_os = "linux")]
pub(super) fn beyond(socket: &TcpStream, written: u64) -> bool {
    let mut info = [0_u8; TCP_INFO_BYTES];
    let read = uapi::getsockopt(socket.as_raw_fd(), uapi::c::IPPROTO_TCP, uapi::c::TCP_INFO, &mut info);
    let (Ok(TCP_INFO_BYTES), Some(acked)) = (read, info[BYTES_ACKED_AT..].first_chunk()) else { return true };
    u64::from_ne_bytes(*acked) > written + 1
}

/// Whether the peer has acknowledged more than the first `written` bytes; nobody can say here.
#[cfg(not(target_os = "linux"))]
pub(super) fn beyond(_socket: &TcpStream, _written: u64) -> bool {
    true
}
