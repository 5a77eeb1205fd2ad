//! Addresses of Docker engines: `unix:///var/run/docker.sock`, `tcp://10.0.0.7:2376`, `ssh://deploy@10.0.0.7`.

use peregrine_api::types::{DockerEndpoint, TlsFiles};

/// Port of SSH.
const SSH_PORT: u16 = 22;
/// Port of a Docker engine with TLS.
const DOCKER_TLS_PORT: u16 = 2376;
/// Socket of a Docker engine.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";

const EXAMPLES: &str = "write unix:///var/run/docker.sock, tcp://10.0.0.7:2376 or ssh://user@10.0.0.7";

/// Where an engine is, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EngineUrl {
    /// A unix socket of the server's machine.
    Unix(String),
    /// Host and port.
    Tcp(String, u16),
    /// User, host, port and socket there.
    Ssh {
        /// User.
        user: String,
        /// Host.
        host: String,
        /// Port.
        port: u16,
        /// Socket there.
        socket: String,
    },
}

/// What must be given beside the address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    /// Private key file.
    pub(crate) ssh_key: Option<String>,
    /// Public key of the host.
    pub(crate) host_key: Option<String>,
    /// Files of mutual TLS.
    pub(crate) tls: Option<TlsFiles>,
    /// Clear text was said to be fine.
    pub(crate) insecure: bool,
}

impl std::str::FromStr for EngineUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| format!("it has no scheme: {EXAMPLES}"))?;
        match scheme {
            "unix" if rest.starts_with('/') => Ok(Self::Unix(rest.to_owned())),
            "unix" => Err(format!("a socket needs an absolute path: {EXAMPLES}")),
            "tcp" => {
                let (host, port) = host_and_port(rest.trim_end_matches('/'), DOCKER_TLS_PORT)?;
                Ok(Self::Tcp(host, port))
            }
            "ssh" => ssh(rest),
            other => Err(format!("`{other}` is not a way to an engine: {EXAMPLES}")),
        }
    }
}

fn ssh(rest: &str) -> Result<EngineUrl, String> {
    let (place, socket) = match rest.split_once('/') {
        Some((place, path)) if !path.is_empty() => (place, format!("/{path}")),
        Some((place, _)) => (place, DOCKER_SOCKET.to_owned()),
        None => (rest, DOCKER_SOCKET.to_owned()),
    };
    let (user, place) = place.split_once('@').ok_or_else(|| format!("it names no user: {EXAMPLES}"))?;
    if user.is_empty() || user.contains(':') {
        return Err(format!("`{user}` is not a user name (a password cannot be given): {EXAMPLES}"));
    }
    let (host, port) = host_and_port(place, SSH_PORT)?;
    Ok(EngineUrl::Ssh { user: user.to_owned(), host, port, socket })
}

/// `host`, `host:port`, `[::1]`, `[::1]:port`.
fn host_and_port(text: &str, default_port: u16) -> Result<(String, u16), String> {
    let bad_port = || format!("`{text}` has a bad port");
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) =
                rest.split_once(']').ok_or_else(|| format!("`{text}` has no closing bracket"))?;
            (host, if after.is_empty() { None } else { Some(after.strip_prefix(':').ok_or_else(bad_port)?) })
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err(format!("write an IPv6 address as [{text}]"));
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() || host.contains(['/', '@', ' ']) {
        return Err(format!("`{text}` names no host: {EXAMPLES}"));
    }
    let port = port.map_or(Ok(default_port), |port| port.parse().map_err(|_| bad_port()))?;
    Ok((host.to_owned(), port))
}

impl EngineUrl {
    /// The endpoint for the server.
    ///
    /// # Errors
    /// An option that is missing, or that does not belong to this way.
    pub(crate) fn endpoint(self, keys: Keys) -> Result<DockerEndpoint, String> {
        let ssh_keys = keys.ssh_key.is_some() || keys.host_key.is_some();
        let tls = keys.tls.is_some() || keys.insecure;
        match self {
            Self::Unix(_) if ssh_keys || tls => Err("a unix socket needs no keys: leave them out".to_owned()),
            Self::Tcp(..) if ssh_keys => Err("--ssh-key and --host-key belong to ssh://".to_owned()),
            Self::Ssh { .. } if tls => Err("--tls-… and --insecure belong to tcp://".to_owned()),
            Self::Unix(path) => Ok(DockerEndpoint::Unix { path }),
            Self::Tcp(host, port) => {
                Ok(DockerEndpoint::Tcp { host, port, tls: keys.tls, insecure: keys.insecure })
            }
            Self::Ssh { user, host, port, socket } => {
                let key = keys
                    .ssh_key
                    .ok_or("ssh:// needs --ssh-key FILE (a private key on the server's machine)")?;
                let host_key = keys.host_key.ok_or_else(|| {
                    format!("ssh:// needs --host-key 'ssh-ed25519 AAAA…': `ssh-keyscan -p {port} {host}` shows it; compare it on the host")
                })?;
                Ok(DockerEndpoint::Ssh { host, port, user, key, host_key, socket })
            }
        }
    }
}

/// An endpoint as it is written.
pub(crate) fn text(endpoint: &DockerEndpoint) -> String {
    let bracketed = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    match endpoint {
        DockerEndpoint::Unix { path } => format!("unix://{path}"),
        DockerEndpoint::Tcp { host, port, tls, .. } => {
            format!(
                "tcp://{}:{port}{}",
                bracketed(host),
                if tls.is_some() { " (TLS)" } else { " (clear text)" }
            )
        }
        DockerEndpoint::Ssh { host, port, user, socket, .. } => {
            format!("ssh://{user}@{}:{port}{socket}", bracketed(host))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> EngineUrl {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_way_to_an_engine_is_understood() {
        assert_eq!(parsed("unix:///run/docker.sock"), EngineUrl::Unix("/run/docker.sock".into()));
        assert_eq!(parsed("tcp://10.0.0.7"), EngineUrl::Tcp("10.0.0.7".into(), 2376));
        assert_eq!(parsed("tcp://[::1]:2375/"), EngineUrl::Tcp("::1".into(), 2375));
        let ssh = |port, socket: &str| EngineUrl::Ssh {
            user: "ana".into(),
            host: "h".into(),
            port,
            socket: socket.into(),
        };
        assert_eq!(parsed("ssh://ana@h"), ssh(22, "/var/run/docker.sock"));
        assert_eq!(parsed("ssh://ana@h:2222/run/user/1/docker.sock"), ssh(2222, "/run/user/1/docker.sock"));
    }

    #[test]
    fn a_wrong_address_shows_a_right_one() {
        for bad in [
            "/var/run/docker.sock",
            "unix://docker.sock",
            "http://h",
            "ssh://h",
            "ssh://a:b@h",
            "tcp://",
            "tcp://h:x",
        ] {
            let error = bad.parse::<EngineUrl>().unwrap_err();
            assert!(error.contains("ssh://user@") || error.contains("port"), "{bad}: {error}");
        }
        assert!("tcp://::1".parse::<EngineUrl>().unwrap_err().contains("[::1]"));
    }

    #[test]
    fn ssh_needs_its_keys_and_a_socket_takes_none() {
        let keys =
            Keys { ssh_key: Some("/k".into()), host_key: Some("ssh-ed25519 AAAA".into()), ..Keys::default() };
        assert!(parsed("ssh://a@h").endpoint(Keys::default()).unwrap_err().contains("--ssh-key"));
        let no_pin = Keys { host_key: None, ..keys.clone() };
        assert!(parsed("ssh://a@h").endpoint(no_pin).unwrap_err().contains("ssh-keyscan"));
        assert!(parsed("unix:///s").endpoint(keys.clone()).is_err());
        assert!(parsed("tcp://h").endpoint(keys.clone()).is_err());
        let endpoint = parsed("ssh://a@h").endpoint(keys).unwrap();
        assert_eq!(text(&endpoint), "ssh://a@h:22/var/run/docker.sock");
    }
}
