//! A free port for an instance on its machine's address.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use tokio::net::TcpSocket;

/// Lowest port that is given out.
const FIRST_PORT: u16 = 20_000;
/// With fewer ports than this below the ephemeral range, the kernel is asked instead.
const MIN_PORTS: u16 = 1_000;

/// Whether an instance could listen at `address` now, even one that does not set `SO_REUSEADDR`.
pub(super) fn is_free(address: SocketAddr) -> bool {
    bind(address).is_ok()
}

/// A port of `ip` that nobody listens on and that is not in `taken`.
///
/// It lies below the kernel's ephemeral range where there is room, because an outgoing connection could take
/// an ephemeral one between now and the moment when the instance binds it.
///
/// # Errors
///
/// The address is not this machine's, or every port is taken.
pub(super) fn choose(ip: IpAddr, taken: &BTreeSet<u16>) -> io::Result<u16> {
    let Some(range) = below_ephemeral() else { return bind(SocketAddr::new(ip, 0)) };
    let size = u32::from(range.end - range.start);
    let random = uuid::Uuid::new_v4().as_u128() as u32; // the low bits are random ones
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for step in 0..size {
        let offset = (random % size + step) % size;
        let port = range.start + u16::try_from(offset).unwrap_or(0);
        if taken.contains(&port) {
            continue;
        }
        match bind(SocketAddr::new(ip, port)) {
            Ok(port) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn below_ephemeral() -> Option<Range<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let end: u16 = text.split_ascii_whitespace().next()?.parse().ok()?;
    (end.saturating_sub(FIRST_PORT) >= MIN_PORTS).then_some(FIRST_PORT..end)
}

fn bind(address: SocketAddr) -> io::Result<u16> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(address)?;
    Ok(socket.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_is_chosen_is_free_and_not_one_that_is_taken() {
        let ip = IpAddr::from([127, 0, 0, 1]);
        let mut taken = BTreeSet::new();
        for _ in 0..50 {
            let port = choose(ip, &taken).unwrap();
            assert!(taken.insert(port), "port {port} was given out twice");
        }
        let port = *taken.first().unwrap();
        let listener = std::net::TcpListener::bind((ip, port)).unwrap();
        assert!(!is_free(SocketAddr::new(ip, port)));
        drop(listener);
        assert!(is_free(SocketAddr::new(ip, port)));
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_refused() {
        let error = choose(IpAddr::from([192, 0, 2, 1]), &BTreeSet::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
