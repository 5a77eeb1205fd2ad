//! The servers that are compared: how each is configured, started, and told to use another upstream.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::certificate::{Certificate, write_secret};
use super::origin::{ECHO_PORT, ORIGIN_PORTS, get, loopback, wait_until_answering};
use super::process::{Core, Process, find_program};
use super::{CompareError, switch};

const NGINX_CONFIG: &str = include_str!("../../conf/nginx/nginx.conf");
const HAPROXY_CONFIG: &str = include_str!("../../conf/haproxy/haproxy.cfg");
const PEREGRINE_CONFIG: &str = include_str!("../../conf/peregrine/peregrine.toml");
const NGINX_TLS_CONFIG: &str = include_str!("../../conf/nginx/tls.conf");
const HAPROXY_TLS_CONFIG: &str = include_str!("../../conf/haproxy/tls.cfg");
const PEREGRINE_TLS_CONFIG: &str = include_str!("../../conf/peregrine/tls.toml");
const CADDY_CONFIG: &str = include_str!("../../conf/caddy/Caddyfile");
/// Where `cargo build --release` in `bench/peers` puts it.
const PINGORA_PROGRAM: &str = "bench/peers/target/release/peregrine-peer-pingora";

/// Where every contender listens for HTTP/1.1.
const H1_PORT: u16 = 19180;
/// Where nginx and HAProxy listen for HTTP/2, which they cannot tell from HTTP/1.1 on one clear-text port.
const H2_PORT: u16 = 19182;
/// Where every contender listens for TLS.
const TLS_PORT: u16 = 19143;

/// How long a switch of the upstream may take to show, in milliseconds.
const SWITCH_TIMEOUT_MS: u64 = 5_000;

/// A kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nginx,
    Haproxy,
    Caddy,
    Pingora,
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
    pub(super) const ALL: [Self; 5] =
        [Self::Nginx, Self::Haproxy, Self::Caddy, Self::Pingora, Self::Peregrine];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
            Self::Pingora => "pingora",
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
            (Kind::Pingora, _) => Path::new(PINGORA_PROGRAM).canonicalize().map_err(|_| {
                format!(
                    "no binary at {PINGORA_PROGRAM}; build it with `cargo build --release` in bench/peers"
                )
            })?,
            (kind, _) => find_program(kind.name())
                .ok_or_else(|| format!("not installed; `apt-get install {}`", kind.name()))?,
        };
        Ok(Self { kind, program, access_log })
    }

    /// The first line that the program prints about its version.
    pub(super) fn version(&self) -> String {
        let flag = match self.kind {
            Kind::Peregrine | Kind::Pingora => "--version",
            Kind::Caddy => "version",
            Kind::Nginx | Kind::Haproxy => "-v",
        };
        version_of(&self.program, flag)
    }

    /// Starts it in `folder`, which must be empty, and waits until it forwards.
    ///
    /// With a certificate it serves TLS too.
    pub(super) async fn start(
        &self,
        core: Core,
        folder: &Path,
        certificate: Option<&Certificate>,
    ) -> Result<Running, CompareError> {
        self.configure(folder, certificate).map_err(|error| CompareError::start(&self.program, error))?;
        let arguments = self.arguments(folder, certificate.is_some());
        let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        let environment: &[_] = match self.kind {
            Kind::Haproxy if self.access_log => &[("ACCESS_LOG", "1")],
            Kind::Caddy => {
                &[("GOMAXPROCS", "1"), ("HOME", "."), ("XDG_CONFIG_HOME", "."), ("XDG_DATA_HOME", ".")]
            }
            _ => &[],
        };
        let mut process = Process::start(core, folder, &self.program, &arguments, environment)?;
        wait_until_answering(&mut process, folder, loopback(H1_PORT), "/100b").await?;
        Ok(Running { kind: self.kind, process, folder: folder.to_owned(), upstream: 0 })
    }

    fn configure(&self, folder: &Path, certificate: Option<&Certificate>) -> io::Result<()> {
        if let Some(certificate) = certificate {
            certificate.write(folder)?;
            let Certificate { chain_pem, key_pem, .. } = certificate;
            write_secret(&folder.join("both.pem"), &format!("{chain_pem}{key_pem}"))?;
        }
        let tls = certificate.is_some();
        match self.kind {
            Kind::Nginx => {
                let access_log = if self.access_log {
                    "access_log access.log combined buffer=64k flush=1s;\n"
                } else {
                    "access_log off;\n"
                };
                fs::write(folder.join("access_log.conf"), access_log)?;
                switch::write_nginx_upstream(folder, 0)?;
                fs::write(folder.join("nginx.conf"), if tls { NGINX_TLS_CONFIG } else { NGINX_CONFIG })
            }
            Kind::Haproxy => {
                fs::write(folder.join("haproxy.cfg"), if tls { HAPROXY_TLS_CONFIG } else { HAPROXY_CONFIG })
            }
            Kind::Caddy => {
                let access_log = if self.access_log { "log {\n\toutput file access.log\n}\n" } else { "\n" };
                fs::write(folder.join("access_log.caddy"), access_log)?;
                // Without a certificate, what names it goes.
                let plain = CADDY_CONFIG.split("https://").next().unwrap_or(CADDY_CONFIG);
                fs::write(folder.join("Caddyfile"), if tls { CADDY_CONFIG } else { plain })
            }
            Kind::Pingora => Ok(()),
            Kind::Peregrine => {
                fs::create_dir(folder.join("data"))?;
                let access_log = if self.access_log {
                    format!("\n[edge.access_log]\nto = \"{}\"\n", folder.join("access.log").display())
                } else {
                    String::new()
                };
                let config = if tls { PEREGRINE_TLS_CONFIG } else { PEREGRINE_CONFIG };
                fs::write(folder.join("peregrine.toml"), format!("{config}{access_log}"))
            }
        }
    }

    fn arguments(&self, folder: &Path, tls: bool) -> Vec<OsString> {
        match self.kind {
            Kind::Nginx => vec!["-p".into(), folder.into(), "-c".into(), "nginx.conf".into()],
            Kind::Haproxy => ["-f", "haproxy.cfg", "-db"].map(OsString::from).into(),
            Kind::Caddy => {
                ["run", "--config", "Caddyfile", "--adapter", "caddyfile"].map(OsString::from).into()
            }
            Kind::Pingora => {
                let [origin, echo, plain] =
                    [ORIGIN_PORTS[0], ECHO_PORT, H1_PORT].map(|port| loopback(port).to_string());
                let mut arguments = vec![origin, echo, plain];
                if tls {
                    arguments.extend([
                        loopback(TLS_PORT).to_string(),
                        "bench.pem".into(),
                        "bench.key".into(),
                    ]);
                }
                arguments.into_iter().map(OsString::from).collect()
            }
            Kind::Peregrine => {
                ["serve", "--config", "peregrine.toml", "--data", "data"].map(OsString::from).into()
            }
        }
    }
}

/// Peregrine takes no key that others can read.
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
            Kind::Caddy | Kind::Pingora | Kind::Peregrine => self.h1(),
        }
    }

    /// Of HTTP/1.1 and HTTP/2.
    pub(super) fn tls(&self) -> SocketAddr {
        loopback(TLS_PORT)
    }

    /// Sends new requests to the other upstream from now on.
    pub(super) async fn switch_upstream(&mut self) -> Result<(), CompareError> {
        self.upstream = 1 - self.upstream;
        let switched = match self.kind {
            Kind::Nginx => switch::nginx(&self.process, &self.folder, self.upstream),
            Kind::Haproxy => switch::haproxy(&self.folder, self.upstream).await,
            Kind::Peregrine => switch::peregrine(&self.folder, self.upstream).await,
            Kind::Caddy | Kind::Pingora => Err(io::Error::other("it is not told here")),
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
