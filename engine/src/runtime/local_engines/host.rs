//! What is needed of this machine: commands, processes, mounts and networks.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::LocalEnginesError;
use crate::runtime::process::procfs;

/// A process, by more than its number.
pub(super) type ProcessName = procfs::ProcessKey;

/// Where programs are, beside `PATH`: a user's path often lacks the system's folders.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/bin"];
/// Networks of four addresses are chosen below 10.224.0.0/11.
const NETWORKS: u32 = 1 << 19;
const FIRST_NETWORK: u32 = u32::from_be_bytes([10, 224, 0, 0]);
/// Networks that are tried.
const MAX_TRIES: usize = 64;

/// Where a program is.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Runs `ip`.
pub(super) fn ip(arguments: &[&str]) -> Result<(), LocalEnginesError> {
    let what = format!("ip {}", arguments.join(" "));
    let program = find_program("ip").unwrap_or_else(|| PathBuf::from("ip"));
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| LocalEnginesError::Command { what: what.clone(), detail: error.to_string() })?;
    if output.status.success() {
        return Ok(());
    }
    let detail = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LocalEnginesError::Command { what, detail })
}

/// Whether this machine has a network interface of this name.
pub(super) fn link_exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// The two addresses of a network of four that no route of this machine touches.
pub(super) fn free_pair() -> Option<[Ipv4Addr; 2]> {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let routes: Vec<(u32, u32)> = routes.lines().skip(1).filter_map(parse_route).collect();
    (0..MAX_TRIES).find_map(|_| {
        let random = uuid::Uuid::new_v4().as_u128() as u32; // the low bits are random ones
        let network = FIRST_NETWORK + (random % NETWORKS) * 4;
        let free = routes.iter().all(|(route, mask)| (network ^ route) & mask & !3 != 0 || *mask == 0);
        free.then(|| [Ipv4Addr::from(network + 1), Ipv4Addr::from(network + 2)])
    })
}

/// The name of a running process.
pub(super) fn name_of(pid: u32) -> Option<ProcessName> {
    procfs::key(i32::try_from(pid).ok()?)
}

/// Whether `process` has this number.
pub(super) fn is_pid(pid: u32, process: &ProcessName) -> bool {
    i32::try_from(pid).is_ok_and(|pid| pid == process.pid)
}

/// Whether it has not ended.
pub(super) fn is_alive(process: &ProcessName) -> bool {
    procfs::find(process).is_some()
}

/// Signals exactly this process.
pub(super) fn signal(process: &ProcessName, signal: Signal) {
    let Some(descriptor) = open(process) else { return };
    if let Err(error) = pidfd_send_signal(&descriptor, signal) {
        tracing::debug!(%error, "it has just ended");
    }
}

/// Waits until it has ended; says whether it has.
pub(super) fn wait_for_end(process: &ProcessName, timeout_ms: u64) -> bool {
    let Some(descriptor) = open(process) else { return true };
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout_ms / 1_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(timeout_ms % 1_000).unwrap_or(0) * 1_000_000,
    };
    let mut waiting = [PollFd::new(&descriptor, PollFlags::IN)];
    loop {
        match poll(&mut waiting, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            _ => return !is_alive(process),
        }
    }
}

/// Every process in the network namespace, and every one in a control group of one of the containers.
pub(super) fn processes_of(namespace: &Path, containers: &[String]) -> Vec<ProcessName> {
    let inode = fs::metadata(namespace).map(|metadata| metadata.ino()).ok();
    procfs::all()
        .into_iter()
        .filter(|process| {
            let folder = PathBuf::from(format!("/proc/{}", process.pid));
            let own = fs::metadata(folder.join("ns/net")).map(|metadata| metadata.ino()).ok();
            let groups = fs::read_to_string(folder.join("cgroup")).unwrap_or_default();
            (own.is_some() && own == inode) || containers.iter().any(|id| groups.contains(id.as_str()))
        })
        .filter_map(|process| procfs::key(process.pid))
        .collect()
}

/// Takes away every mount below the folders, the deepest first.
pub(super) fn unmount_below(folders: &[&Path]) -> Result<(), LocalEnginesError> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut points: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| folders.iter().any(|folder| point.starts_with(folder)))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in points {
        match unmount(&point, UnmountFlags::DETACH) {
            // Not mounted (any more): a mount below it took it along.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(LocalEnginesError::File { path: point, error: error.into() }),
        }
    }
    Ok(())
}

/// Removes a folder with all that is in it.
pub(super) fn remove_folder(path: &Path) -> Result<(), LocalEnginesError> {
    absent(path, fs::remove_dir_all(path))
}

/// Removes a file.
pub(super) fn remove_file(path: &Path) -> Result<(), LocalEnginesError> {
    absent(path, fs::remove_file(path))
}

fn absent(path: &Path, removed: io::Result<()>) -> Result<(), LocalEnginesError> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LocalEnginesError::File { path: path.to_owned(), error })
        }
        _ => Ok(()),
    }
}

fn open(process: &ProcessName) -> Option<rustix::fd::OwnedFd> {
    let descriptor = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    is_alive(process).then_some(descriptor) // looked at after opening: the number cannot have changed hands since
}

/// Destination and mask of a line of `/proc/net/route`, in this machine's own sense of numbers.
fn parse_route(line: &str) -> Option<(u32, u32)> {
    let mut fields = line.split_ascii_whitespace();
    let number = |field: Option<&str>| u32::from_str_radix(field?, 16).ok().map(u32::from_be);
    let destination = number(fields.nth(1))?;
    Some((destination, number(fields.nth(5))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_of_addresses_is_of_one_network_and_in_our_range() {
        for _ in 0..100 {
            let [near, far] = free_pair().unwrap();
            assert_eq!(u32::from(near) + 1, u32::from(far));
            assert_eq!(u32::from(near) & !3, u32::from(far) & !3);
            assert!(near.octets()[0] == 10 && near.octets()[1] >= 224, "{near}");
        }
    }

    #[test]
    fn a_route_is_read_in_the_right_order_of_bytes() {
        let line = "eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
        let (destination, mask) = parse_route(line).unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(Ipv4Addr::from(destination), Ipv4Addr::new(192, 168, 0, 0));
            assert_eq!(Ipv4Addr::from(mask), Ipv4Addr::new(255, 255, 255, 0));
        }
    }
}
