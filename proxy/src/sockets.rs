//! Listening sockets: one for each core and address (SO_REUSEPORT), bound in this process or taken over from the one
//! before it.
//!
//! ```text
//!   bound (by whoever may) ─► listening ─► an edge's cores ─┐
//!        ▲                        │ the same sockets        ├─ while both run, each connection goes to whoever accepts it
//!        └── configuration        └─► the next process ─────┘
//! ```
//!
//! A socket that is handed over stays the same socket: what waits in its queue is accepted by whoever comes after. Another
//! socket on the same address would have a queue of its own, and what waits in the first one would be lost with it. So
//! no socket is ever left with nobody who accepts: with more sockets than cores, a core has several; with fewer, cores share.

use std::io;
use std::net::{SocketAddr, TcpListener};

use rustix::net::listen;
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{Config, ConfigError};
use crate::edge::BindError;
use crate::listen::Speaks;

/// Connections that the kernel holds until they are accepted; it is cut to `net.core.somaxconn`.
const BACKLOG: i32 = 4_096;
/// What the kernel takes for a client beyond what the network does. Without a bound it takes megabytes for each slow
/// client, and for minutes nobody can tell a slow client from one that has stopped.
pub(crate) const MAX_UNSENT_BYTES: u32 = 128 * 1024;
/// How long the kernel waits for the first byte before it hands a connection over without.
const SPEAKS_WITHIN_S: i32 = 1;

/// The sockets of one address.
#[derive(Debug)]
pub struct Group {
    /// What its clients speak. A socket does not know: whoever takes it over goes by his own configuration.
    pub speaks: Speaks,
    /// The address as it was asked for; its port may be 0.
    pub asked: SocketAddr,
    /// The address that the system has given.
    pub address: SocketAddr,
    /// One for each core of whoever has bound them.
    pub sockets: Vec<TcpListener>,
}

/// The sockets of an edge.
#[derive(Debug)]
pub struct Sockets {
    groups: Vec<Group>,
}

impl Sockets {
    /// Binds the addresses of a configuration. Nobody is listened to before [`Sockets::listen`]: whoever connects
    /// is refused, as if nothing were bound.
    ///
    /// # Errors
    /// [`BindError`] says which address, and what to do.
    pub fn bind(config: &Config) -> Result<Self, BindError> {
        Self::take_over(config, Vec::new())
    }

    /// The sockets of a configuration: those of `before` for its addresses, and new ones for the others. What is left
    /// of `before` is closed here, and lives on where it came from.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn take_over(config: &Config, mut before: Vec<Group>) -> Result<Self, BindError> {
        config.check()?;
        let http = config.http.iter().map(|address| (*address, Speaks::Http));
        let wanted: Vec<_> =
            http.chain(config.https.iter().map(|address| (*address, Speaks::Https))).collect();
        if wanted.is_empty() {
            return Err(ConfigError::NoAddress.into());
        }
        // Those that were asked for in the same words first: of two ports 0 each finds its own.
        let mut take = |fits: &dyn Fn(&Group) -> bool| {
            let found = before.iter().position(fits)?;
            Some(before.remove(found))
        };
        let mut found: Vec<Option<Group>> =
            wanted.iter().map(|(address, _)| take(&|group: &Group| group.asked == *address)).collect();
        for ((address, _), found) in wanted.iter().zip(&mut found) {
            *found = found.take().or_else(|| take(&|group: &Group| group.address == *address));
        }
        let groups = wanted.into_iter().zip(found).map(|((asked, speaks), found)| match found {
            Some(group) => Ok(Group { speaks, asked, ..group }),
            None => Group::bind(asked, speaks, config.core_count()),
        });
        Ok(Self { groups: groups.collect::<Result<_, _>>()? })
    }

    /// Listens on each of them. Those that listen already go on.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn listen(&self) -> Result<(), BindError> {
        for group in &self.groups {
            for socket in &group.sockets {
                listen(socket, BACKLOG).map_err(|error| group.failed(error.into()))?;
            }
        }
        Ok(())
    }

    /// The same sockets once more.
    ///
    /// # Errors
    /// There are no file descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let groups = self.groups.iter().map(|group| {
            let sockets = group.sockets.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?;
            Ok(Group { speaks: group.speaks, asked: group.asked, address: group.address, sockets })
        });
        Ok(Self { groups: groups.collect::<io::Result<_>>()? })
    }

    /// By address.
    #[must_use]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The same, to be shared out anew.
    #[must_use]
    pub fn into_groups(self) -> Vec<Group> {
        self.groups
    }

    /// Closes those of all other addresses; these.
    pub fn keep(&mut self, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        let closed = self.groups.extract_if(.., |group| !addresses.contains(&group.address));
        closed.map(|group| group.address).collect()
    }

    /// The addresses of those who speak so, as the system has given them.
    #[must_use]
    pub fn addrs(&self, speaks: Speaks) -> Vec<SocketAddr> {
        self.groups.iter().filter(|group| group.speaks == speaks).map(|group| group.address).collect()
    }

    /// The listeners of each of so many cores. Every socket has a core, and every core has one of each address.
    pub(crate) fn by_core(self, cores: usize) -> Result<Vec<Vec<(TcpListener, Speaks)>>, BindError> {
        let mut by_core: Vec<Vec<(TcpListener, Speaks)>> = (0..cores).map(|_| Vec::new()).collect();
        for group in self.groups {
            for turn in 0..cores.max(group.sockets.len()) {
                let socket = &group.sockets[turn % group.sockets.len()];
                let clone = socket.try_clone().map_err(|error| group.failed(error))?;
                by_core[turn % cores].push((clone, group.speaks));
            }
        }
        Ok(by_core)
    }
}

impl Group {
    fn bind(asked: SocketAddr, speaks: Speaks, cores: usize) -> Result<Self, BindError> {
        let failed = |source| BindError::Listen { address: asked, source };
        let (mut address, mut sockets) = (asked, Vec::with_capacity(cores));
        for _ in 0..cores {
            let socket = bind(address).map_err(failed)?;
            // Port 0 is chosen once; the other cores join it.
            address = socket.local_addr().map_err(failed)?;
            sockets.push(socket);
        }
        Ok(Self { speaks, asked, address, sockets })
    }

    /// A socket that was made elsewhere, for all cores.
    pub(crate) fn of(socket: TcpListener) -> Result<Self, BindError> {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let address = socket.local_addr().unwrap_or(unknown);
        socket.set_nonblocking(true).map_err(|source| BindError::Listen { address, source })?;
        Ok(Self { speaks: Speaks::Http, asked: address, address, sockets: vec![socket] })
    }

    fn failed(&self, source: io::Error) -> BindError {
        BindError::Listen { address: self.address, source }
    }
}

impl From<Vec<Group>> for Sockets {
    fn from(groups: Vec<Group>) -> Self {
        Self { groups }
    }
}

/// Binds one socket of a group that shares an address.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it: one system call for all of them instead of one for each.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES)?;
    socket.bind(&address.into())?;
    // A client of HTTP speaks first: the kernel hands over connections with their first bytes, and keeps back those of
    // whom nothing comes.
    use std::os::fd::AsRawFd;
    uapi::setsockopt(socket.as_raw_fd(), uapi::c::IPPROTO_TCP, uapi::c::TCP_DEFER_ACCEPT, &SPEAKS_WITHIN_S)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cores: usize, http: &[&str]) -> Config {
        let http = http.iter().map(|address| address.parse().expect("an address")).collect();
        Config { cores, http, ..Config::default() }
    }

    fn bound(cores: usize, http: &[&str]) -> Sockets {
        let sockets = Sockets::bind(&config(cores, http)).expect("bound");
        sockets.listen().expect("it listens");
        sockets
    }

    fn inode(socket: &TcpListener) -> u64 {
        rustix::fs::fstat(socket).expect("a socket").st_ino
    }

    #[test]
    fn an_accepted_connection_sends_at_once_and_keeps_little_in_the_kernel() {
        let sockets = bound(1, &["127.0.0.1:0"]);
        let listener = &sockets.groups[0].sockets[0];
        listener.set_nonblocking(false).unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.nodelay().unwrap());
        let accepted = Socket::from(accepted);
        assert_eq!(accepted.tcp_notsent_lowat().unwrap(), MAX_UNSENT_BYTES);
    }

    #[test]
    fn what_is_bound_and_does_not_listen_yet_refuses() {
        let sockets = Sockets::bind(&config(1, &["127.0.0.1:0"])).expect("bound");
        assert!(std::net::TcpStream::connect(sockets.addrs(Speaks::Http)[0]).is_err());
        sockets.listen().expect("it listens");
        assert!(std::net::TcpStream::connect(sockets.addrs(Speaks::Http)[0]).is_ok());
    }

    #[test]
    fn every_socket_has_a_core_and_every_core_a_socket_of_each_address() {
        for sockets in 1..=5 {
            for cores in 1..=5 {
                let before = bound(sockets, &["127.0.0.1:0", "[::1]:0"]);
                let mut all: Vec<u64> = before.groups.iter().flat_map(|g| &g.sockets).map(inode).collect();
                let by_core = before.by_core(cores).expect("shared out");
                assert_eq!(by_core.len(), cores);
                for core in &by_core {
                    let v6 = core.iter().filter(|(s, _)| s.local_addr().expect("bound").is_ipv6()).count();
                    assert!(v6 > 0 && v6 < core.len(), "{sockets} sockets for {cores} cores");
                }
                let mut served: Vec<u64> =
                    by_core.iter().flatten().map(|(socket, _)| inode(socket)).collect();
                served.sort_unstable();
                served.dedup();
                all.sort_unstable();
                assert_eq!(served, all, "{sockets} sockets for {cores} cores");
            }
        }
    }

    #[test]
    fn the_sockets_of_before_are_taken_and_others_are_bound_for_new_addresses() {
        let before = bound(2, &["127.0.0.1:0", "127.0.0.1:0"]);
        let (addrs, inodes): (Vec<_>, Vec<_>) =
            before.groups.iter().map(|group| (group.address, inode(&group.sockets[1]))).unzip();
        // In the words of before, and by the address that came of them.
        let words = ["127.0.0.1:0".to_owned(), addrs[1].to_string(), "[::1]:0".to_owned()];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let after = Sockets::take_over(&config(1, &words), before.groups).expect("taken over");
        assert_eq!(after.addrs(Speaks::Http)[..2], addrs);
        assert_eq!(after.groups.iter().map(|group| group.sockets.len()).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!(after.groups[..2].iter().map(|g| inode(&g.sockets[1])).collect::<Vec<_>>(), inodes);
    }

    #[test]
    fn the_sockets_of_addresses_that_nobody_wants_any_more_are_closed() {
        let mut sockets = bound(2, &["127.0.0.1:0", "127.0.0.1:0"]);
        let addresses = sockets.addrs(Speaks::Http);
        assert_eq!(sockets.keep(&addresses[..1]), [addresses[1]]);
        assert_eq!(sockets.addrs(Speaks::Http), [addresses[0]]);
        assert!(std::net::TcpStream::connect(addresses[0]).is_ok());
        assert!(std::net::TcpStream::connect(addresses[1]).is_err(), "nobody waits there in vain");
    }

    #[test]
    fn a_connection_that_waits_in_the_queue_is_accepted_by_whoever_takes_the_socket_over() {
        let before = bound(1, &["127.0.0.1:0"]);
        let mut client =
            std::net::TcpStream::connect(before.addrs(Speaks::Http)[0]).expect("it is in the queue");
        io::Write::write_all(&mut client, b"x").expect("sent");
        let handed = before.try_clone().expect("a descriptor");
        drop(before);
        let after = Sockets::take_over(&config(1, &["127.0.0.1:0"]), handed.groups).expect("taken over");
        let listener = &after.groups[0].sockets[0];
        listener.set_nonblocking(false).expect("it blocks");
        assert_eq!(listener.accept().expect("it is there").1, client.local_addr().expect("an address"));
    }
}
