//! What two processes of an edge say to each other: frames of a length and a JSON text, and descriptors beside them.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Form of what is said. A process refuses another one, and the one that is there goes on. Fields may be added without a
/// new form: those that are not known are passed over.
pub(super) const FORM: u16 = 1;
/// Longest frame.
const MAX_FRAME_BYTES: u32 = 256 << 10;
/// Most descriptors in one message; the system's limit is 253.
const MAX_DESCRIPTORS: usize = 128;
/// Most descriptors in all: 64 addresses on a thousand cores.
const MAX_ALL_DESCRIPTORS: usize = 1 << 16;

/// What the new process is given. The descriptors follow, in the order of the fields.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// [`FORM`].
    pub(super) form: u16,
    /// The old process and those before it that may live, as engines know them.
    pub(super) incarnations: Vec<u64>,
    /// The old one is connected to an engine.
    pub(super) connected: bool,
    // Descriptors: the lock of the data folder, then
    /// Listening sockets, by address.
    pub(super) groups: Vec<WireGroup>,
    /// The socket for probes, by the address that it was asked for.
    pub(super) admin: Option<SocketAddr>,
    /// Whether there is the socket at which an upgrade is asked for.
    pub(super) control: bool,
    /// How many processes before the old one may live. The descriptors are the old one's ends of their pairs: each of them
    /// waits for the end of whoever serves, and that is the new one then.
    #[serde(default)]
    pub(super) elders: usize,
}

/// Sockets of one address.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireGroup {
    pub(super) asked: SocketAddr,
    pub(super) address: SocketAddr,
    pub(super) count: usize,
}

/// What is said afterwards.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Word {
    /// The new process accepts on every socket.
    Ready {
        /// Its version, for people.
        version: String,
        /// Addresses of which it has taken the sockets over; `None` is all of them. Those of others are closed.
        #[serde(default)]
        taken: Option<Vec<SocketAddr>>,
    },
    /// It cannot take over.
    Failed {
        /// Why.
        why: String,
    },
    /// The old process accepts no more and writes no more.
    Yours,
    /// The new process was told to stop, and with it the edge.
    Stopping,
}

impl Hello {
    /// How many descriptors follow.
    pub(super) fn descriptors(&self) -> io::Result<usize> {
        let sockets = self.groups.iter().try_fold(0_usize, |sum, group| sum.checked_add(group.count));
        let all = sockets.and_then(|sockets| {
            let others = 1 + usize::from(self.admin.is_some()) + usize::from(self.control);
            sockets.checked_add(others)?.checked_add(self.elders)
        });
        all.filter(|all| *all <= MAX_ALL_DESCRIPTORS)
            .ok_or_else(|| io::Error::other("there are too many sockets"))
    }
}

/// Sends descriptors, a byte with each message of them. Blocks until the other side has room, which it always has: the
/// messages are few.
pub(super) fn send_descriptors(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    for part in descriptors.chunks(MAX_DESCRIPTORS) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !beside.push(SendAncillaryMessage::ScmRights(part)) {
            return Err(io::Error::other("there is no room for descriptors"));
        }
        sendmsg(stream, &[IoSlice::new(&[0])], &mut beside, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Receives so many descriptors. They end with this process, and no program that it starts has them.
pub(super) fn receive_descriptors(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut received = Vec::with_capacity(count);
    while received.len() < count {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let message =
            recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
        let before = received.len();
        for part in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                received.extend(descriptors);
            }
        }
        if message.bytes == 0 || received.len() == before {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "not all sockets were handed over"));
        }
    }
    Ok(received)
}

fn framed(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(message)?;
    let bytes = u32::try_from(text.len()).unwrap_or(u32::MAX);
    if bytes > MAX_FRAME_BYTES {
        return Err(io::Error::other("that is too long"));
    }
    Ok([&bytes.to_be_bytes()[..], &text].concat())
}

fn length(head: [u8; 4]) -> io::Result<usize> {
    let bytes = u32::from_be_bytes(head);
    if bytes > MAX_FRAME_BYTES {
        return Err(io::Error::other(format!("a frame of {bytes} bytes, the limit is {MAX_FRAME_BYTES}")));
    }
    Ok(bytes as usize)
}

/// Writes a frame.
pub(super) fn say_blocking(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&framed(message)?)
}

/// Reads a frame.
pub(super) fn hear_blocking<T: DeserializeOwned>(mut stream: &UnixStream) -> io::Result<T> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let mut text = vec![0; length(head)?];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Writes a frame.
pub(super) async fn say(stream: &mut tokio::net::UnixStream, message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&framed(message)?).await
}

/// Reads a frame. Not to be dropped before it ends, if another one is to be read.
pub(super) async fn hear<T: DeserializeOwned>(stream: &mut tokio::net::UnixStream) -> io::Result<T> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let mut text = vec![0; length(head)?];
    stream.read_exact(&mut text).await?;
    Ok(serde_json::from_slice(&text)?)
}

/// Frames as they come. Whoever waits for the next one may stop to, and wait again later.
#[derive(Default)]
pub(super) struct Inbox {
    read: Vec<u8>,
}

impl Inbox {
    /// Waits for the next frame.
    pub(super) async fn next(&mut self, stream: &tokio::net::UnixStream) -> io::Result<Vec<u8>> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(frame);
            }
            stream.readable().await?;
            match stream.try_read_buf(&mut self.read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some((head, rest)) = self.read.split_first_chunk::<4>() else { return Ok(None) };
        let bytes = length(*head)?;
        let Some(frame) = rest.get(..bytes).map(<[u8]>::to_vec) else { return Ok(None) };
        self.read.drain(..head.len() + bytes);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn more_descriptors_than_fit_into_a_message_arrive_in_their_order() {
        let (one, other) = UnixStream::pair().expect("a pair");
        let files: Vec<_> =
            (0..MAX_DESCRIPTORS * 2 + 3).map(|_| tempfile::tempfile().expect("a file")).collect();
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).expect("a file").st_ino;
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send_descriptors(&one, &descriptors).expect("sent");
        say_blocking(&one, &Word::Yours).expect("said");
        let received = receive_descriptors(&other, files.len()).expect("received");
        let (sent, got): (Vec<_>, Vec<_>) = (
            descriptors.into_iter().map(inode).collect(),
            received.iter().map(|fd| inode(fd.as_fd())).collect(),
        );
        assert_eq!(sent, got);
        assert_eq!(hear_blocking::<Word>(&other).expect("heard"), Word::Yours);
        let flags = rustix::io::fcntl_getfd(&received[0]).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "no other program gets it");
    }

    #[test]
    fn a_side_that_ends_before_it_has_handed_everything_over_is_an_error() {
        let (one, other) = UnixStream::pair().expect("a pair");
        let file = tempfile::tempfile().expect("a file");
        send_descriptors(&one, &[file.as_fd()]).expect("sent");
        drop(one);
        let error = receive_descriptors(&other, 2).expect_err("one is missing");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_frame_that_comes_in_pieces_is_whole_also_for_one_who_did_not_wait_all_the_time() {
        use futures_util::FutureExt as _;
        let (one, other) = UnixStream::pair().expect("a pair");
        other.set_nonblocking(true).expect("it does not wait");
        let other = tokio::net::UnixStream::from_std(other).expect("a stream");
        let (mut inbox, frame) = (Inbox::default(), framed(&Word::Yours).expect("a frame"));
        for piece in frame.chunks(3) {
            assert!(inbox.next(&other).now_or_never().is_none(), "it is not whole");
            (&one).write_all(piece).expect("sent");
            other.readable().await.expect("it has come");
            // Takes it, and stops to wait unless it was the last one.
            if let Some(whole) = inbox.next(&other).now_or_never() {
                assert_eq!(whole.expect("heard"), frame[4..]);
                return;
            }
        }
        panic!("it was lost");
    }

    #[test]
    fn a_process_that_does_not_say_what_it_has_taken_over_has_taken_everything() {
        let word = serde_json::from_str::<Word>(r#"{"ready":{"version":"1","later":7}}"#).expect("a word");
        assert_eq!(word, Word::Ready { version: "1".to_owned(), taken: None });
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused_before_it_is_read() {
        let (one, other) = UnixStream::pair().expect("a pair");
        (&one).write_all(&u32::MAX.to_be_bytes()).expect("sent");
        let error = hear_blocking::<Word>(&other).expect_err("too long").to_string();
        assert!(error.contains("the limit is"), "{error}");
    }
}
