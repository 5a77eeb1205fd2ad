//! The origin behind every contender: nginx with almost nothing to do, and its own count of connections.

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::CompareError;
use super::process::{Core, Process, find_program};

/// The two addresses of `conf/origin/nginx.conf`; the second is what an upstream is switched to.
pub(super) const ORIGIN_PORTS: [u16; 2] = [19101, 19102];
/// Where WebSockets are echoed, by this crate's own origin.
pub(super) const ECHO_PORT: u16 = 19103;
/// How long a server may take until it answers, in milliseconds.
const START_TIMEOUT_MS: u64 = 10_000;

const CONFIG: &str = include_str!("../../conf/origin/nginx.conf");

/// The running origin.
#[derive(Debug)]
pub(super) struct Origin {
    process: Process,
}

/// What the origin saw so far (`stub_status`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) connections: u64,
    pub(super) requests: u64,
}

impl Origin {
    pub(super) async fn start(core: Core, folder: &Path) -> Result<Self, CompareError> {
        let nginx = find_program("nginx").ok_or(CompareError::Missing("nginx", "nginx-light"))?;
        let written = || -> std::io::Result<()> {
            fs::create_dir_all(folder.join("files"))?;
            fs::write(folder.join("files/10k"), vec![b'x'; 10 << 10])?;
            fs::write(folder.join("files/1m"), vec![b'x'; 1 << 20])?;
            fs::write(folder.join("nginx.conf"), CONFIG)
        };
        written().map_err(|error| CompareError::start(&nginx, error))?;
        let prefix = folder.as_os_str();
        let arguments = [OsStr::new("-p"), prefix, OsStr::new("-c"), OsStr::new("nginx.conf")];
        let mut process = Process::start(core, folder, &nginx, &arguments, &[])?;
        wait_until_answering(&mut process, folder, loopback(ORIGIN_PORTS[0]), "/100b").await?;
        Ok(Self { process })
    }

    pub(super) async fn seen(&self) -> Result<Seen, CompareError> {
        let addr = loopback(ORIGIN_PORTS[0]);
        let page =
            get(addr, "/stub_status").await.map_err(|error| CompareError::Origin(error.to_string()))?;
        parse_stub_status(&page).ok_or_else(|| CompareError::Origin(format!("unknown stub_status: {page}")))
    }

    pub(super) async fn stop(self) {
        self.process.stop().await;
    }
}

fn parse_stub_status(page: &str) -> Option<Seen> {
    let mut numbers = page.split_once("requests")?.1.split_ascii_whitespace().map(str::parse);
    let (Some(Ok(connections)), Some(Ok(_handled)), Some(Ok(requests))) =
        (numbers.next(), numbers.next(), numbers.next())
    else {
        return None;
    };
    Some(Seen { connections, requests })
}

pub(super) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Waits until `addr` answers 200 on `path`; tells what the server said if it ends or never does.
pub(super) async fn wait_until_answering(
    process: &mut Process,
    folder: &Path,
    addr: SocketAddr,
    path: &str,
) -> Result<(), CompareError> {
    let deadline = Instant::now() + Duration::from_millis(START_TIMEOUT_MS);
    loop {
        let answered = get(addr, path).await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"));
        let ended = process.has_ended();
        if answered && !ended {
            return Ok(());
        }
        if ended || Instant::now() > deadline {
            let said = fs::read_to_string(folder.join("output.log")).unwrap_or_default();
            let logged = fs::read_to_string(folder.join("error.log")).unwrap_or_default();
            let what = if ended { "ended at once" } else { "did not answer 200 in time" };
            return Err(CompareError::NotServing(format!("{what} at {addr}{path}: {said}{logged}")));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One GET on a connection of its own; the whole answer as text.
pub(super) async fn get(addr: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stub_status_is_read() {
        let page = "Active connections: 1 \nserver accepts handled requests\n 245 245 431515 \nReading: 0";
        let seen = parse_stub_status(page).expect("a status");
        assert_eq!((seen.connections, seen.requests), (245, 431_515));
        assert!(parse_stub_status("404").is_none());
    }
}
