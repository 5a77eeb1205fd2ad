//! SSH to a machine, then its engine's socket: one session is kept, every HTTP connection is a channel in it
//! (`direct-streamlocal@openssh.com`, OpenSSH's PROTOCOL file, section 2.4).
//!
//! The machine's host key is pinned. There is no first use on trust and no list of known hosts: a key that is
//! not the pinned one ends the connection before anything of ours is sent, and the error shows what was found.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use russh::client::{self, Handle, Msg};
use russh::keys::PublicKeyOrCertificate;
use russh::keys::ssh_key::{Algorithm, PublicKey};
use russh::keys::{HashAlg, PrivateKeyWithHashAlg, load_secret_key};
use russh::{ChannelStream, Preferred};

use super::connect::tcp;

/// Time without a word from the machine after which it is asked.
const KEEPALIVE_INTERVAL_MS: u64 = 10_000;
/// Questions without an answer after which the session is given up.
const KEEPALIVE_MAX: usize = 3;
/// A channel in a session that is alive opens within this time; else the session is given up.
const OPEN_TIMEOUT_MS: u64 = 5_000;

/// A session that is made when it is first needed, kept, and made anew when it broke.
pub(super) struct Session {
    host: String,
    port: u16,
    user: String,
    key: PathBuf,
    host_key: PublicKey,
    socket: String,
    handle: tokio::sync::Mutex<Option<Arc<Handle<Pin>>>>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ssh://{}@{}:{}{}", self.user, self.host, self.port, self.socket)
    }
}

impl Session {
    /// A session that is not made yet.
    ///
    /// # Errors
    ///
    /// The pinned key or the socket's path is not one.
    pub(super) fn new(
        host: &str,
        port: u16,
        user: &str,
        key: &Path,
        host_key: &str,
        socket: &Path,
    ) -> Result<Self, String> {
        let host_key = PublicKey::from_openssh(host_key.trim()).map_err(|error| {
            format!(
                "the pinned host key is not in OpenSSH's form (`ssh-ed25519 AAAA…`): {error}; \
                 `ssh-keyscan -p {port} {host}` shows the machine's keys, compare them there"
            )
        })?;
        let socket = socket
            .to_str()
            .ok_or_else(|| format!("the socket's path {} is not text", socket.display()))?
            .to_owned();
        Ok(Self {
            host: host.to_owned(),
            port,
            user: user.to_owned(),
            key: key.to_owned(),
            host_key,
            socket,
            handle: tokio::sync::Mutex::new(None),
        })
    }

    /// Opens a connection to the engine's socket.
    ///
    /// # Errors
    ///
    /// The machine cannot be reached, is not the pinned one, does not let us in, or has no such socket.
    pub(super) async fn open(&self) -> io::Result<ChannelStream<Msg>> {
        if let Some(handle) = self.kept().await {
            // Nothing of the request has been sent yet: a session that turns out broken is just made anew.
            match self.channel(&handle).await {
                Ok(stream) => return Ok(stream),
                Err(Refusal::Socket(error)) => return Err(error),
                Err(Refusal::Session(error)) => {
                    tracing::info!(host = self.host, %error, "SSH session broke and is made anew");
                    self.forget(&handle).await;
                }
            }
        }
        let handle = self.session().await?;
        self.channel(&handle).await.map_err(|refusal| match refusal {
            Refusal::Socket(error) | Refusal::Session(error) => error,
        })
    }

    async fn kept(&self) -> Option<Arc<Handle<Pin>>> {
        let mut kept = self.handle.lock().await;
        if kept.as_ref().is_some_and(|handle| handle.is_closed()) {
            *kept = None;
        }
        kept.clone()
    }

    async fn forget(&self, broken: &Arc<Handle<Pin>>) {
        let mut kept = self.handle.lock().await;
        if kept.as_ref().is_some_and(|handle| Arc::ptr_eq(handle, broken)) {
            *kept = None;
        }
    }

    /// The session: the one that somebody else has made meanwhile, or a new one.
    async fn session(&self) -> io::Result<Arc<Handle<Pin>>> {
        let mut kept = self.handle.lock().await;
        if let Some(handle) = kept.as_ref().filter(|handle| !handle.is_closed()) {
            return Ok(Arc::clone(handle));
        }
        let handle = Arc::new(self.log_in().await?);
        *kept = Some(Arc::clone(&handle));
        Ok(handle)
    }

    async fn log_in(&self) -> io::Result<Handle<Pin>> {
        let key = load_secret_key(&self.key, None).map_err(|error| {
            let advice = match error {
                russh::keys::Error::KeyIsEncrypted => {
                    "; give Peregrine a key of its own, without a passphrase"
                }
                _ => "",
            };
            self.say(format_args!("private key {}: {error}{advice}", self.key.display()))
        })?;
        let found = Arc::new(std::sync::Mutex::new(None));
        let pin = Pin { expected: self.host_key.clone(), found: Arc::clone(&found) };
        let stream = tcp(&self.host, self.port).await?;
        let connected = client::connect_stream(Arc::new(self.config()), stream, pin).await;
        let mut handle = connected.map_err(|error| {
            let found = found.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.say(match found {
                Some(fingerprint) => format!(
                    "the machine shows the host key {fingerprint}, but {} is pinned: it was set up anew, or \
                     somebody is in between; if it was set up anew, change the pinned key",
                    fingerprint_of(&self.host_key)
                ),
                None => error.to_string(),
            })
        })?;
        let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
        let result = handle
            .authenticate_publickey(&self.user, key)
            .await
            .map_err(|error| self.say(format_args!("log-in: {error}")))?;
        if !result.success() {
            return Err(self.say(format_args!(
                "the key {} is not accepted for user {}; is its public half in authorized_keys there?",
                self.key.display(),
                self.user
            )));
        }
        Ok(handle)
    }

    fn config(&self) -> client::Config {
        // The pinned kind of key first: a machine that has it must show it, and one that has not shows another,
        // which is then named in the error.
        let mut kinds: Vec<Algorithm> = Preferred::DEFAULT.key.to_vec();
        let pinned = self.host_key.algorithm();
        kinds.sort_by_key(|kind| *kind != pinned);
        client::Config {
            preferred: Preferred { key: Cow::Owned(kinds), ..Preferred::DEFAULT },
            keepalive_interval: Some(Duration::from_millis(KEEPALIVE_INTERVAL_MS)),
            keepalive_max: KEEPALIVE_MAX,
            inactivity_timeout: None,
            nodelay: true,
            ..client::Config::default()
        }
    }

    async fn channel(&self, handle: &Handle<Pin>) -> Result<ChannelStream<Msg>, Refusal> {
        let open = handle.channel_open_direct_streamlocal(self.socket.as_str());
        match tokio::time::timeout(Duration::from_millis(OPEN_TIMEOUT_MS), open).await {
            Ok(Ok(channel)) => Ok(channel.into_stream()),
            Ok(Err(russh::Error::ChannelOpenFailure(reason))) => Err(Refusal::Socket(self.say(format_args!(
                "sshd does not open {} ({reason:?}); does the engine run there, may {} use its socket, and is \
                 AllowStreamLocalForwarding on?",
                self.socket, self.user
            )))),
            Ok(Err(error)) => Err(Refusal::Session(self.say(error))),
            Err(_) => Err(Refusal::Session(self.say("no answer to the opening of a channel"))),
        }
    }

    fn say(&self, what: impl std::fmt::Display) -> io::Error {
        io::Error::other(format!("ssh://{}@{}:{}: {what}", self.user, self.host, self.port))
    }
}

enum Refusal {
    /// The session is fine, the socket is not.
    Socket(io::Error),
    /// The session is broken.
    Session(io::Error),
}

/// Lets the pinned host key pass and nothing else.
struct Pin {
    expected: PublicKey,
    found: Arc<std::sync::Mutex<Option<String>>>,
}

impl client::Handler for Pin {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = shown else {
            return Ok(false); // certificates are not asked for
        };
        let same = key.key_data() == self.expected.key_data();
        if !same {
            *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(fingerprint_of(key));
        }
        Ok(same)
    }
}

fn fingerprint_of(key: &PublicKey) -> String {
    format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_key_that_is_none_is_refused_with_what_to_do() {
        let error = Session::new("h", 22, "u", Path::new("k"), "ssh-ed25519 nonsense", Path::new("/s"));
        assert!(error.unwrap_err().contains("ssh-keyscan -p 22 h"));
    }
}
