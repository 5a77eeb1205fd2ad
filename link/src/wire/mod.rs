//! What is said over the link: frames of a length and a message. Bounded before it is read, versioned at the greeting.
//!
//! ```text
//!   edge                                                   engine
//!   Greeting::Join { secret, key }                   ─►    Reply::Joined { certificate } | Reply::Refused
//!
//!   Greeting::Attach { version, incarnation, epoch } ─►    Reply::Attached { epoch, lease } | Reply::Refused
//!   Up::Known*, Up::Ready                            ─►
//!                                                    ◄─    Down::Begin { whole }, Down::Change*, Down::Keep*, Down::Publish
//!   Up::Acknowledged { version, open }               ─►
//!   Up::Held, Up::Report { tallies, ended }          ─►    Down::Received
//!                                                    ◄─    Down::Deadlines, Down::Beat
//!   Up::Certificate, Up::Wanted                      ─►    Down::Certificate, Down::Wanted
//!                                                    ◄─    Down::TicketKeys
//!   Up::Leaving                                      ─►
//! ```

mod domain;
mod hold;
mod mirror;
mod rules;
mod secret;
mod spec;
mod tally;

pub(crate) use domain::DomainOfForm4;
#[cfg(test)]
pub(crate) use domain::tests as domain_tests;
pub use domain::{WireChallenge, WireChallengeId, WireDomain};
pub use hold::WireHoldCounts;
#[cfg(test)]
pub(crate) use mirror::tests as mirror_tests;
#[cfg(test)]
pub(crate) use rules::tests as rules_tests;
pub(crate) use rules::{RulesOfForm3, WireRules};
pub use secret::{Given, KeyedCertificate, MAX_CERTIFICATE_BYTES, Secret, Staple};
pub(crate) use spec::WireProxyProtocol;
#[cfg(test)]
pub(crate) use spec::tests as spec_tests;
pub use spec::{BadHost, KeptService, WireChange, WireService};
pub use tally::WireTally;

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Version of everything below. Both sides have to speak the same one: an installation is one version, and an edge
/// serves from its last table while it is being brought up to the engine's.
pub const VERSION: u16 = 7;
/// Longest frame: four times the largest record that the engine's store takes.
pub const MAX_FRAME_BYTES: u32 = 16 << 20;
/// Longest first frame of somebody who has not said who he is.
pub const MAX_GREETING_BYTES: u32 = 4 << 10;

/// The first thing that an edge says.
#[derive(Clone, Serialize, Deserialize)]
pub enum Greeting {
    /// It has a token, and wants a certificate.
    Join {
        /// [`VERSION`].
        version: u16,
        /// The secret of the token.
        secret: Vec<u8>,
        /// Its public key.
        public_key: Vec<u8>,
    },
    /// It has a certificate, and wants the table.
    Attach(Attach),
}

/// An edge that comes (again).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    /// [`VERSION`].
    pub version: u16,
    /// Random, chosen when its process started.
    pub incarnation: u64,
    /// Cores that serve.
    pub cores: u32,
    /// Highest epoch of an engine that it has heard.
    pub epoch: u64,
    /// Processes of the same edge that live beside this one: the one that it takes over from, and those before that one
    /// that still end what they have. What they have under way is theirs, and not lost.
    pub beside: Vec<u64>,
    /// Another process of this edge has taken over; this one ends what it has.
    pub handed_over: bool,
}

impl std::fmt::Debug for Greeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Join { version, .. } => {
                f.debug_struct("Join").field("version", version).finish_non_exhaustive()
            }
            Self::Attach(attach) => attach.fmt(f),
        }
    }
}

/// The answer to a [`Greeting`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Welcome to the installation.
    Joined {
        /// The name that the edge was given.
        name: String,
        /// Its certificate.
        certificate: Vec<u8>,
        /// The authority's.
        authority: Vec<u8>,
    },
    /// Welcome back.
    Attached {
        /// Epoch of the engine.
        epoch: u64,
        /// How long the engine waits for an edge that it does not hear, in milliseconds.
        lease_ms: u32,
    },
    /// No.
    Refused {
        /// A stable code.
        code: String,
        /// What and why.
        message: String,
    },
}

/// What the engine says after [`Reply::Attached`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Down {
    /// The changes of one publication follow. `whole`: they are all that there is.
    Begin {
        /// What is not named goes away.
        whole: bool,
    },
    /// One change of the publication.
    Change(Box<WireChange>),
    /// The publication is complete: use it.
    Publish {
        /// Its version.
        version: u64,
    },
    /// Which classes of a retired upstream have used up their time; one bit each, in the order of the classes.
    Deadlines {
        /// Generation of the upstream.
        generation: u64,
        /// Classes that are to end politely.
        closing: u8,
        /// Classes that are to be cut.
        cut: u8,
    },
    /// Reports up to this one were taken in.
    Received {
        /// Number of the report.
        report: u64,
    },
    /// Nothing new; the engine is there.
    Beat,
    /// In a whole publication: a service of which the engine cannot read what it is to be. It stays as the edge has it.
    Keep {
        /// Its name.
        service: String,
    },
    /// The answer to [`Up::Certificate`].
    Certificate {
        /// SHA-256 of the certificate.
        id: [u8; 32],
        /// What there is.
        given: Given,
    },
    /// The keys that session tickets are made and opened with from now on, at every edge of the installation.
    TicketKeys(Secret),
    /// The answer to [`Up::Wanted`], as soon as it is known.
    Wanted {
        /// The name, as it was asked for.
        name: String,
        /// The table has a certificate for it. False: it has none soon.
        has: bool,
    },
}

/// What an edge says after [`Reply::Attached`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Up {
    /// Upstreams that it knew before.
    Known(Vec<(u64, WireTally)>),
    /// That was all of them: the table may come.
    Ready,
    /// Every core uses this version.
    Acknowledged {
        /// Version.
        version: u64,
        /// Retired upstreams that it is still inside of.
        open: Vec<u64>,
        /// The table is on its disk.
        saved: bool,
    },
    /// News of upstreams; without any it is a sign of life.
    Report {
        /// Number of the report, rising.
        number: u64,
        /// Generations with what there is to say of them.
        tallies: Vec<(u64, WireTally)>,
        /// Retired generations that it has let go of: what it says of them here is its last word.
        ended: Vec<u64>,
    },
    /// What became of requests that were held.
    Held {
        /// By service, since this edge first knew it.
        services: Vec<(String, WireHoldCounts)>,
        /// It happened before this conversation.
        from_before: bool,
    },
    /// It could not use a publication, and keeps the table that it has. Differences are of no use to it either, up to
    /// the next whole one.
    Unusable {
        /// Version.
        version: u64,
        /// Why.
        why: String,
    },
    /// It has finished everything and ends.
    Leaving,
    /// It is to present a certificate that it does not have.
    Certificate {
        /// SHA-256 of the certificate.
        id: [u8; 32],
        /// The domain that the table names it for.
        domain: String,
    },
    /// Somebody shakes hands for a name that has no certificate. Who may have one gets it with the table.
    Wanted {
        /// The name, as the client said it.
        name: String,
    },
}

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream broke, or ended in the middle of a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A frame beyond the limit.
    #[error("a frame of {bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// Its length.
        bytes: u32,
        /// The limit.
        limit_bytes: u32,
    },
    /// What is in it is no message of this version.
    #[error("a frame that cannot be read: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Reads one frame.
///
/// # Errors
/// [`FrameError`]; the stream cannot be used after it.
pub async fn read<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    limit_bytes: u32,
) -> Result<T, FrameError> {
    let bytes = stream.read_u32().await?;
    if bytes > limit_bytes {
        return Err(FrameError::TooLong { bytes, limit_bytes });
    }
    // Read as it comes: who claims a long frame and sends a short one has not made us set the memory aside.
    let mut frame = Vec::new();
    stream.take(u64::from(bytes)).read_to_end(&mut frame).await?;
    if frame.len() < bytes as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(postcard::from_bytes(&frame)?)
}

/// A message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn frame<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let frame = postcard::to_extend(message, vec![0; 4])?;
    let bytes = u32::try_from(frame.len() - 4).unwrap_or(u32::MAX);
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { bytes, limit_bytes: MAX_FRAME_BYTES });
    }
    let mut frame = frame;
    frame[..4].copy_from_slice(&bytes.to_be_bytes());
    Ok(frame)
}

/// Writes one frame and flushes it.
///
/// # Errors
/// [`FrameError`]; the stream cannot be used after it.
pub async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), FrameError> {
    stream.write_all(&frame(message)?).await?;
    stream.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_is_read_as_it_was_written() {
        let said = Up::Acknowledged { version: 7, open: vec![1, 2], saved: true };
        let frame = frame(&said).expect("a frame");
        let heard: Up = read(&mut &frame[..], MAX_FRAME_BYTES).await.expect("the same");
        assert_eq!(heard, said);
    }

    #[tokio::test]
    async fn a_frame_beyond_the_limit_is_refused_before_it_is_read() {
        let claimed = u32::MAX.to_be_bytes();
        let read = read::<Up>(&mut &claimed[..], MAX_FRAME_BYTES).await;
        assert!(matches!(read, Err(FrameError::TooLong { .. })), "{read:?}");
    }

    #[tokio::test]
    async fn a_frame_that_breaks_off_anywhere_is_an_error() {
        let said = Up::Unusable { version: 7, why: "a long enough reason".into() };
        let frame = frame(&said).expect("a frame");
        for length in 0..frame.len() {
            assert!(read::<Up>(&mut &frame[..length], MAX_FRAME_BYTES).await.is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let join = Greeting::Join { version: 1, secret: vec![171; 32], public_key: vec![1] };
        assert!(!format!("{join:?}").contains("171"));
    }
}
