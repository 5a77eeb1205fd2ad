//! The servers that are compared: how each is configured, started, and told to use another upstream.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::origin::{ORIGIN_PORTS, get, loopback, wait_until_answering};
use super::process::{Core, Process, find_program};
use super::{CompareError, switch};

const NGINX_CONFIG: &str = include_str!("../../conf/nginx/nginx.conf");
const HAPROXY_CONFIG: &str = include_str!("../../conf/haproxy/haproxy.cfg");
const PEREGRINE_CONFIG: &str = include_str!("../../conf/peregrine/peregrine.toml");

/// Where every contender listens for HTTP/1.1.
const H1_PORT: u16 = 19180;
/// Where nginx and HAProxy listen for HTTP/2, which they cannot tell from HTTP/1.1 on one clear-text port.
const H2_PORT: u16 = 19182;

/// How long a switch of the upstream may take to show, in milliseconds.
const SWITCH_TIMEOUT_MS: u64 = 5_000;

/// A kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nginx,
    Haproxy,
    Peregrine,
}

/// An installed server that takes part.
#[derive(Debug, Clone)]
pub(super) struct Contender {
    pub(super) kind: Kind,
    program: PathBuf,
    access_log: bool,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Nginx, Self::Haproxy, Self::Peregrine];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Peregrine => "peregrine",
        }
    }
}

impl Contender {
    /// The contender of this kind; `Err` says in one line why it does not take part.
    pub(super) fn find(kind: Kind, peregrine: Option<&Path>, access_log: bool) -> Result<Self, String> {
        let program = match (kind, peregrine) {
            (Kind::Peregrine, Some(path)) if !path.is_file() => {
                return Err(format!(
                    "no binary at {}; build it with `cargo build --release`",
                    path.display()
                ));
            }
            // The server runs in a folder of its own, where a relative path means something else.
            (Kind::Peregrine, Some(path)) => path.canonicalize().map_err(|error| error.to_string())?,
            (Kind::Peregrine, None) => return Err("no --peregrine PATH given".to_owned()),
            (kind, _) => find_program(kind.name())
                .ok_or_else(|| format!("not installed; `apt-get install {}`", kind.name()))?,
        };
        Ok(Self { kind, program, access_log })
    }

    /// The first line that the program prints about its version.
    pub(super) fn version(&self) -> String {
        let flag = if self.kind == Kind::Peregrine { "--version" } else { "-v" };
        version_of(&self.program, flag)
    }

    /// Starts it in `folder`, which must be empty, and waits until it forwards.
    pub(super) async fn start(&self, core: Core, folder: &Path) -> Result<Running, CompareError> {
        self.configure(folder).map_err(|error| CompareError::start(&self.program, error))?;
        let arguments = self.arguments(folder);
        let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        let log = [("ACCESS_LOG", "1")];
        let environment: &[_] = if self.kind == Kind::Haproxy && self.access_log { &log } else { &[] };
        let mut process = Process::start(core, folder, &self.program, &arguments, environment)?;
        wait_until_answering(&mut process, folder, loopback(H1_PORT), "/100b").await?;
        Ok(Running { kind: self.kind, process, folder: folder.to_owned(), upstream: 0 })
    }

    fn configure(&self, folder: &Path) -> io::Result<()> {
        match self.kind {
            Kind::Nginx => {
                let access_log = if self.access_log {
                    "access_log access.log combined buffer=64k flush=1s;\n"
                } else {
                    "access_log off;\n"
                };
                fs::write(folder.join("access_log.conf"), access_log)?;
                switch::write_nginx_upstream(folder, 0)?;
                fs::write(folder.join("nginx.conf"), NGINX_CONFIG)
            }
            Kind::Haproxy => fs::write(folder.join("haproxy.cfg"), HAPROXY_CONFIG),
            Kind::Peregrine => {
                fs::create_dir(folder.join("data"))?;
                let access_log = if self.access_log {
                    format!("\n[edge.access_log]\nto = \"{}\"\n", folder.join("access.log").display())
                } else {
                    String::new()
                };
                fs::write(folder.join("peregrine.toml"), format!("{PEREGRINE_CONFIG}{access_log}"))
            }
        }
    }

    fn arguments(&self, folder: &Path) -> Vec<OsString> {
        match self.kind {
            Kind::Nginx => vec!["-p".into(), folder.into(), "-c".into(), "nginx.conf".into()],
            Kind::Haproxy => ["-f", "haproxy.cfg", "-db"].map(OsString::from).into(),
            Kind::Peregrine => {
                ["serve", "--config", "peregrine.toml", "--data", "data"].map(OsString::from).into()
            }
        }
    }
}

/// A contender that serves.
#[derive(Debug)]
pub(super) struct Running {
    kind: Kind,
    pub(super) process: Process,
    folder: PathBuf,
    upstream: usize,
}

impl Running {
    pub(super) fn h1(&self) -> SocketAddr {
        loopback(H1_PORT)
    }

    pub(super) fn h2(&self) -> SocketAddr {
        match self.kind {
            Kind::Nginx | Kind::Haproxy => loopback(H2_PORT),
            Kind::Peregrine => self.h1(),
        }
    }

    /// Sends new requests to the other upstream from now on.
    pub(super) async fn switch_upstream(&mut self) -> Result<(), CompareError> {
        self.upstream = 1 - self.upstream;
        let switched = match self.kind {
            Kind::Nginx => switch::nginx(&self.process, &self.folder, self.upstream),
            Kind::Haproxy => switch::haproxy(&self.folder, self.upstream).await,
            Kind::Peregrine => switch::peregrine(&self.folder, self.upstream).await,
        };
        switched.map_err(|error| CompareError::Switch(self.kind.name(), error))
    }

    /// Waits until a request through the contender is answered by the upstream of the last switch.
    pub(super) async fn wait_until_switched(&self) -> Result<(), CompareError> {
        let expected = ORIGIN_PORTS[self.upstream].to_string();
        let deadline = Instant::now() + Duration::from_millis(SWITCH_TIMEOUT_MS);
        while !get(self.h1(), "/which").await.is_ok_and(|answer| answer.ends_with(&expected)) {
            if Instant::now() > deadline {
                let error = io::Error::other("it was told, and requests still go to the old one");
                return Err(CompareError::Switch(self.kind.name(), error));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    pub(super) async fn stop(self) {
        self.process.stop().await;
    }
}

/// The first line that `program flag` prints, on whichever stream.
pub(super) fn version_of(program: &Path, flag: &str) -> String {
    let Ok(output) = std::process::Command::new(program).arg(flag).output() else {
        return "unknown".to_owned();
    };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or("unknown").trim().to_owned()
}
