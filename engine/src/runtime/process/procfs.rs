//! Reading `/proc`: who is alive, and who belongs to whom.
//!
//! A pid alone names nobody: the kernel gives it out again. A process is named here by its pid *and* its
//! start time ([`ProcessKey`]), and a zombie counts as dead.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Names one process for as long as the machine is up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::runtime) struct ProcessKey {
    /// Process id.
    pub(in crate::runtime) pid: i32,
    /// Start time in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub(in crate::runtime) start_ticks: u64,
    /// Start times begin anew with every boot.
    pub(in crate::runtime) boot_id: String,
}

/// The fields of `/proc/PID/stat` that are needed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::runtime) struct ProcessStat {
    pub(in crate::runtime) pid: i32,
    pub(in crate::runtime) state: char,
    pub(in crate::runtime) group: i32,
    pub(in crate::runtime) cpu_ticks: u64,
    pub(in crate::runtime) threads: u64,
    pub(in crate::runtime) start_ticks: u64,
    pub(in crate::runtime) resident_pages: u64,
}

impl ProcessStat {
    /// A zombie has ended; only its parent has not asked yet.
    pub(in crate::runtime) const fn alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// This boot's id; empty where the kernel does not tell it.
pub(in crate::runtime) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// What the kernel says of a process; `None` if there is none with this pid.
pub(in crate::runtime) fn stat(pid: i32) -> Option<ProcessStat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Every process that can be seen.
pub(in crate::runtime) fn all() -> Vec<ProcessStat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(stat)
        .collect()
}

/// The name of a running process, if it is one.
pub(in crate::runtime) fn key(pid: i32) -> Option<ProcessKey> {
    let stat = stat(pid)?;
    Some(ProcessKey { pid, start_ticks: stat.start_ticks, boot_id: boot_id() })
}

/// The process that `key` names, if it is there and has not ended.
pub(in crate::runtime) fn find(key: &ProcessKey) -> Option<ProcessStat> {
    let stat = stat(key.pid)?;
    (stat.start_ticks == key.start_ticks && stat.alive() && key.boot_id == boot_id()).then_some(stat)
}

/// Whether the process was started with `entry` (`NAME=value`) in its environment.
pub(in crate::runtime) fn environment_has(pid: i32, entry: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|item| item == entry.as_bytes()))
}

/// Whether something listens at `address`, alone or as part of the unspecified address. Reads the kernel's
/// table, so that nobody gets a connection that says nothing.
pub(in crate::runtime) fn listens(address: SocketAddr) -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .any(|table| table.lines().skip(1).filter_map(parse_listener).any(|found| covers(found, address)))
}

/// Clock ticks in a second, as `/proc` counts them.
pub(in crate::runtime) fn ticks_per_second() -> u64 {
    rustix::param::clock_ticks_per_second()
}

/// Bytes in a page.
pub(in crate::runtime) fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

fn covers(listener: SocketAddr, wanted: SocketAddr) -> bool {
    listener.port() == wanted.port()
        && (listener.ip() == wanted.ip()
            || (listener.ip().is_unspecified() && (listener.is_ipv6() || wanted.is_ipv4())))
}

fn parse_stat(text: &str) -> Option<ProcessStat> {
    // The name is in parentheses and may itself contain parentheses and blanks: fields begin after the last one.
    let (head, tail) = text.rsplit_once(')')?;
    let pid = head.split_once(' ')?.0.parse().ok()?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok(); // numbered as in proc(5); `tail` begins with 3
    Some(ProcessStat {
        pid,
        state: fields.first()?.chars().next()?,
        group: fields.get(2)?.parse().ok()?,
        cpu_ticks: number(14)? + number(15)?,
        threads: number(20)?,
        start_ticks: number(22)?,
        resident_pages: number(24)?,
    })
}

/// A line of `/proc/net/tcp` or `tcp6` in state LISTEN (0A).
fn parse_listener(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    if fields.nth(1)? != "0A" {
        return None;
    }
    let port = u16::from_str_radix(port, 16).ok()?;
    // The kernel prints each 32-bit word of the address as a number of this machine's own byte order.
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_name_has_parentheses_and_blanks_is_read() {
        let line = "4242 (a b) (c)) S 1 4240 4240 0 -1 4194304 100 0 0 0 7 5 0 0 20 0 3 0 987654 1000000 250 \
                    18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0";
        let stat = parse_stat(line).unwrap();
        assert_eq!(
            stat,
            ProcessStat {
                pid: 4242,
                state: 'S',
                group: 4240,
                cpu_ticks: 12,
                threads: 3,
                start_ticks: 987_654,
                resident_pages: 250
            }
        );
    }

    #[test]
    fn our_own_process_is_found_by_its_key_and_not_by_another_start_time() {
        let own = key(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(find(&own).is_some());
        assert!(find(&ProcessKey { start_ticks: own.start_ticks + 1, ..own.clone() }).is_none());
        assert!(find(&ProcessKey { boot_id: "another boot".to_owned(), ..own }).is_none());
    }

    #[test]
    fn a_listener_is_seen_at_its_address_and_at_no_other_port() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        assert!(listens(address));
        drop(socket);
        assert!(!listens(address));
    }

    #[test]
    fn a_listener_on_every_address_counts_for_one_of_them() {
        let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(listens(SocketAddr::from(([127, 0, 0, 9], port))));
    }
}
