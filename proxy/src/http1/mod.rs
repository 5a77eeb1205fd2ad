//! The edge's HTTP/1.1 connection to an upstream (RFC 9112, the client's side).
//!
//! Everything else that speaks HTTP here is hyper. This side is ours because it is what every request pays
//! for: hyper's client hands a request through a channel to a task of its own, keeps headers in a map on the
//! way out, and does not say whether a byte was written, which decides if a request may be sent again. Here
//! the request that has the connection drives it, its head goes from the map straight to bytes, and
//! [`Http1Conn::wrote`] is a fact.
//!
//! It never waits by itself and never retries. Whatever is ambiguous in an answer's framing is an error: an
//! answer that two readers may cut differently is not passed on.

mod arrived;
mod chunks;
mod head;

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;
use tokio_util::io::poll_read_buf;

use self::chunks::{Chunks, Step};
pub(crate) use self::head::{HeadLimits, clean_interim, write_field, write_request_line};
use crate::body::ForwardBody;
use crate::error::Reason;
use crate::framing::Framing;
use crate::splice::{InPipe, MIN_SPLICED_BYTES, Splicer};

/// First size of a read.
const READ_BYTES: usize = 16 * 1024;
/// Largest read, for answers that fill the smaller ones.
const MAX_READ_BYTES: usize = 256 * 1024;
/// Largest size that the first read for an answer has.
const MAX_FIRST_READ_BYTES: usize = 16 * 1024;
/// Read buffers that a core keeps for the next answers.
const MAX_SPARE_BUFFERS: usize = 8;
/// Up to this size, what is to be written is collected; larger pieces of a body are written from where
/// they are.
const COLLECTED_BYTES: usize = 16 * 1024;

/// What a body says when it is asked for its next frame.
pub(crate) type PolledFrame<E> = Poll<Option<Result<Frame<Bytes>, E>>>;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Http1Error {
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the upstream closed the connection")]
    Closed,
    #[error("the upstream's answer is malformed: {0}")]
    Malformed(&'static str),
    #[error("the request body ended early: {}", .0.as_str())]
    Body(Reason),
}

/// The head of an answer, without what is meant for this connection only.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
}

/// A core's read buffers that nobody uses now. An idle connection and one that waits for its answer have none:
/// the last one that was used, which is still in the processor's cache, is for whoever reads next.
#[derive(Clone, Default)]
pub(crate) struct SpareBuffers(Rc<RefCell<Vec<BytesMut>>>);

impl SpareBuffers {
    fn take(&self) -> BytesMut {
        self.0.borrow_mut().pop().unwrap_or_default()
    }

    /// What was cut off the buffer may still be in use: whoever takes it next sees whether its room is free.
    fn give(&self, buffer: BytesMut) {
        let mut spare = self.0.borrow_mut();
        if spare.len() < MAX_SPARE_BUFFERS {
            spare.push(buffer);
        }
    }
}

/// One HTTP/1.1 connection to an upstream.
pub(crate) struct Http1Conn {
    reader: Reader,
    writer: Writer,
    /// The answer's body.
    decode: Decode,
    /// The connection may serve another request after this one.
    keep_alive: bool,
    /// A byte of the answer has come.
    answered: bool,
    /// The body goes past us, and is not at its end.
    spliced: bool,
    /// The upstream has ended the connection in its direction.
    ended: bool,
    /// Bytes that had been written before this request.
    written_before: u64,
    /// How long the upstream says that it keeps the connection when it is idle.
    announced_ms: Option<u32>,
    pub(crate) idle_since_ms: u64,
    /// When its pool first saw it; 0 is not yet.
    pub(crate) opened_ms: u64,
    /// It has served a request before.
    pub(crate) reused: bool,
    /// The upstream was told for whom it is: it serves nobody after that.
    pub(crate) is_introduced: bool,
}

struct Reader {
    half: OwnedReadHalf,
    /// What came with the head and belongs to the body.
    early: Bytes,
    /// Without room of its own while nothing is to be read.
    input: BytesMut,
    read_bytes: usize,
    spares: SpareBuffers,
}

/// The request on its way out.
enum Writer {
    Here(Upload),
    /// A task of its own sends the rest, and gives the writer back when it is through.
    Away(oneshot::Receiver<Option<Upload>>),
    /// Never to be written to again.
    Broken,
}

struct Upload {
    half: OwnedWriteHalf,
    /// Collected bytes, written as far as `sent`.
    output: Vec<u8>,
    sent: usize,
    /// A piece of the body that was too large to collect; it comes after `output`.
    piece: Bytes,
    /// What has to follow `piece`.
    after_piece: &'static [u8],
    body: Option<(ForwardBody, Left)>,
    wrote: bool,
    /// Bytes that were written to the connection since it was opened.
    written: u64,
}

/// What of a request body is left.
enum Left {
    Bytes(u64),
    Chunks,
}

/// How an answer's body ends (RFC 9112 §6.3).
enum Decode {
    Done,
    Length(u64),
    Chunked(Box<Chunks>),
    /// By the end of the connection.
    ToClose,
}

impl Http1Conn {
    pub(crate) fn new(socket: TcpStream, spares: SpareBuffers) -> Box<Self> {
        let (read, write) = socket.into_split();
        let upload = Upload {
            half: write,
            output: Vec::new(),
            sent: 0,
            piece: Bytes::new(),
            after_piece: b"",
            body: None,
            wrote: false,
            written: 0,
        };
        Box::new(Self {
            reader: Reader {
                half: read,
                early: Bytes::new(),
                input: BytesMut::new(),
                read_bytes: READ_BYTES,
                spares,
            },
            writer: Writer::Here(upload),
            decode: Decode::Done,
            keep_alive: true,
            answered: false,
            spliced: false,
            ended: false,
            written_before: 0,
            announced_ms: None,
            idle_since_ms: 0,
            opened_ms: 0,
            reused: false,
            is_introduced: false,
        })
    }

    // --- the request --------------------------------------------------------------------------------

    /// Begins a request: `write_head` writes its head, up to and with the empty line.
    pub(crate) fn begin(
        &mut self,
        body: ForwardBody,
        framing: Option<Framing>,
        write_head: impl FnOnce(&mut Vec<u8>),
    ) {
        let Writer::Here(upload) = &mut self.writer else { return };
        (self.answered, self.spliced) = (false, false);
        upload.output.clear();
        upload.sent = 0;
        upload.wrote = false;
        self.written_before = upload.written;
        write_head(&mut upload.output);
        upload.body = framing.map(|framing| match framing {
            Framing::Length(length) => (body, Left::Bytes(length)),
            Framing::Chunked => (body, Left::Chunks),
        });
    }

    /// Whether a byte of the request may have reached the upstream.
    pub(crate) const fn wrote(&self) -> bool {
        match &self.writer {
            Writer::Here(upload) => upload.wrote,
            Writer::Away(_) | Writer::Broken => true,
        }
    }

    /// Whether a byte of an answer has come.
    pub(crate) const fn answered(&self) -> bool {
        self.answered
    }

    /// Whether the upstream had closed the connection before a byte of the request came to it: then it has not
    /// processed any of it, whatever it is.
    pub(crate) fn has_missed(&self) -> bool {
        let here = matches!(self.writer, Writer::Here(_) | Writer::Broken);
        here && self.ended
            && !self.answered
            && !arrived::beyond(self.reader.half.as_ref(), self.written_before)
    }

    /// How long the upstream says that it keeps this connection when it is idle.
    pub(crate) const fn take_announced_ms(&mut self) -> Option<u32> {
        self.announced_ms.take()
    }

    /// Sends the request and waits for the head of its answer, with `headers` as the map to put it into.
    /// Interim responses go to `interim`.
    pub(crate) fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        request: (&Method, &mut HeaderMap),
        limits: HeadLimits,
        mut interim: impl FnMut(StatusCode, &[u8]),
    ) -> Poll<Result<Head, Http1Error>> {
        let (method, headers) = request;
        let mut failed = None;
        if let Writer::Here(upload) = &mut self.writer
            && let Poll::Ready(Err(error)) = upload.poll(cx)
        {
            if !upload.wrote || matches!(error, Http1Error::Body(_)) {
                return Poll::Ready(Err(error));
            }
            // The upstream takes no more, but it may have said why before it closed.
            failed = Some(error);
            self.writer = Writer::Broken;
        }
        loop {
            while let Some(parsed) = head::take(&mut self.reader.input, limits, headers)? {
                if parsed.is_interim() {
                    interim(parsed.status, &parsed.raw);
                    continue;
                }
                return Poll::Ready(self.begin_answer(method, parsed));
            }
            match self.reader.poll_fill(cx) {
                Poll::Pending if failed.is_none() && !matches!(self.writer, Writer::Broken) => {
                    return Poll::Pending;
                }
                Poll::Pending => return failed.map_or(Poll::Pending, |error| Poll::Ready(Err(error))),
                Poll::Ready(Ok(0)) => {
                    self.ended = true;
                    return Poll::Ready(Err(failed.unwrap_or(Http1Error::Closed)));
                }
                Poll::Ready(Ok(_)) => self.answered = true,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(failed.unwrap_or(error))),
            }
        }
    }

    fn begin_answer(&mut self, method: &Method, parsed: head::Parsed) -> Result<Head, Http1Error> {
        self.keep_alive = parsed.keep_alive;
        self.announced_ms = parsed.announced_ms;
        self.reader.early = parsed.rest;
        let none = *method == Method::HEAD
            || parsed.status == StatusCode::NO_CONTENT
            || parsed.status == StatusCode::NOT_MODIFIED
            || parsed.status.is_informational();
        self.decode = match parsed.framing {
            _ if none => Decode::Done,
            Some(Framing::Length(0)) => Decode::Done,
            Some(Framing::Length(length)) => Decode::Length(length),
            Some(Framing::Chunked) => Decode::Chunked(Box::default()),
            None => Decode::ToClose,
        };
        if matches!(self.decode, Decode::ToClose) {
            self.keep_alive = false;
        }
        Ok(Head { status: parsed.status, headers: parsed.headers })
    }

    /// Whether all of the request has been written.
    pub(crate) const fn is_sent(&self) -> bool {
        matches!(&self.writer, Writer::Here(upload) if upload.is_done())
    }

    /// The rest of the request will not be sent: the connection ends with the answer.
    pub(crate) fn give_up_request(&mut self) {
        self.keep_alive = false;
    }

    /// Gives the rest of the request a task of its own: the answer comes down while the request is still
    /// going up, and a client that takes nothing must not hold up what it sends.
    pub(crate) fn detach_request(&mut self) {
        let Writer::Here(mut upload) = std::mem::replace(&mut self.writer, Writer::Broken) else { return };
        let (mut back, away) = oneshot::channel();
        self.writer = Writer::Away(away);
        tokio::task::spawn_local(async move {
            let sent = std::future::poll_fn(|cx| {
                // Nobody waits for the answer any more.
                if back.poll_closed(cx).is_ready() {
                    return Poll::Ready(false);
                }
                upload.poll(cx).map(|sent| sent.is_ok())
            });
            let sent = sent.await;
            drop(back.send(sent.then_some(upload)));
        });
    }

    // --- the answer's body --------------------------------------------------------------------------

    /// Whether the body has been read to its end.
    pub(crate) const fn is_end(&self) -> bool {
        matches!(self.decode, Decode::Done)
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        match &self.decode {
            Decode::Done => SizeHint::with_exact(0),
            Decode::Length(left) => SizeHint::with_exact(*left),
            Decode::Chunked(_) | Decode::ToClose => SizeHint::default(),
        }
    }

    /// The next frame of the answer's body; `None` at its end.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> PolledFrame<Http1Error> {
        loop {
            match self.decode.next(&mut self.reader) {
                Ok(Next::Frame(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(Next::End) => return Poll::Ready(None),
                Ok(Next::More) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(self.reader.poll_fill(cx)) {
                Ok(0) if matches!(self.decode, Decode::ToClose) => self.decode = Decode::Done,
                Ok(0) => return Poll::Ready(Some(Err(Http1Error::Closed))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// The next piece of a large body of known length, past us: its marker. `None` if it is to be read.
    pub(crate) fn poll_spliced(
        &mut self,
        cx: &mut Context<'_>,
        splicer: &Splicer,
        into: &InPipe,
    ) -> Option<PolledFrame<Http1Error>> {
        let Decode::Length(left) = self.decode else { return None };
        if (left < MIN_SPLICED_BYTES && !self.spliced) || !self.reader.peek().is_empty() {
            return None;
        }
        let marker = match splicer.poll_fill(cx, self.reader.half.as_ref(), into, left)? {
            Poll::Pending => return Some(Poll::Pending),
            Poll::Ready(Ok(marker)) if marker.is_empty() => Err(Http1Error::Closed),
            Poll::Ready(marker) => marker.map_err(Into::into),
        };
        if let Ok(marker) = &marker {
            let left = left - marker.len() as u64;
            self.spliced = left > 0;
            self.decode = if left > 0 { Decode::Length(left) } else { Decode::Done };
        }
        Some(Poll::Ready(Some(marker.map(Frame::data))))
    }

    // --- between two requests -----------------------------------------------------------------------

    /// Makes the connection ready for another request, if it can serve one. Waits for the rest of a request
    /// that is still going up.
    pub(crate) async fn recycle(mut self: Box<Self>) -> Option<Box<Self>> {
        if let Writer::Away(away) = &mut self.writer {
            self.writer = away.await.ok().flatten().map_or(Writer::Broken, Writer::Here);
        }
        self.is_reusable().then_some(self)
    }

    /// Whether the connection can serve another request now.
    pub(crate) fn is_reusable(&mut self) -> bool {
        let whole = self.keep_alive && self.is_end() && self.is_sent();
        // What nobody asked for is no answer to what is asked next.
        if !whole || !self.reader.early.is_empty() || !self.reader.input.is_empty() {
            return false;
        }
        self.reader.early = Bytes::new();
        // What the last answer needed, the next one will.
        self.reader.read_bytes = self.reader.read_bytes.min(MAX_FIRST_READ_BYTES);
        self.reader.put_buffer_back();
        true
    }

    /// Whether a request is still going up in a task of its own.
    pub(crate) const fn is_away(&self) -> bool {
        matches!(self.writer, Writer::Away(_))
    }

    /// Whether an idle connection is still open. Costs a system call only if something has come.
    pub(crate) fn is_open(&mut self) -> bool {
        self.reader.poll_fill(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Takes the socket after a switch of protocols, with what was read beyond the head.
    pub(crate) fn into_socket(self) -> Option<(TcpStream, Bytes)> {
        let Writer::Here(upload) = self.writer else { return None };
        if !upload.is_done() {
            return None;
        }
        let socket = self.reader.half.reunite(upload.half).ok()?;
        let (early, input) = (self.reader.early, self.reader.input);
        let rest = if input.is_empty() { early } else { [&early[..], &input[..]].concat().into() };
        Some((socket, rest))
    }
}

impl Reader {
    /// Reads more. Ready with 0 at the end of the connection.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Http1Error>> {
        if self.input.is_empty() {
            // While there is nothing to read, the buffer is another's.
            ready!(self.half.as_ref().poll_read_ready(cx))?;
            if self.input.capacity() == 0 {
                self.input = self.spares.take();
            }
        }
        let room = self.input.capacity() - self.input.len();
        if room < self.read_bytes / 2 {
            self.input.reserve(self.read_bytes);
        }
        let room = self.input.capacity() - self.input.len();
        let Poll::Ready(read) = poll_read_buf(Pin::new(&mut self.half), cx, &mut self.input)? else {
            self.put_buffer_back();
            return Poll::Pending;
        };
        if read >= room {
            self.read_bytes = (self.read_bytes * 2).min(MAX_READ_BYTES);
        }
        Poll::Ready(Ok(read))
    }

    fn put_buffer_back(&mut self) {
        if self.input.is_empty() {
            self.spares.give(std::mem::take(&mut self.input));
        }
    }

    fn peek(&self) -> &[u8] {
        if self.early.is_empty() { &self.input } else { &self.early }
    }

    fn take(&mut self, length: usize) -> Bytes {
        if self.early.is_empty() { self.input.split_to(length).freeze() } else { self.early.split_to(length) }
    }

    fn skip(&mut self, length: usize) {
        if self.early.is_empty() {
            self.input.advance(length);
        } else {
            self.early.advance(length);
        }
    }
}

/// What a body has next, of what was read.
enum Next {
    Frame(Frame<Bytes>),
    End,
    More,
}

impl Decode {
    fn next(&mut self, reader: &mut Reader) -> Result<Next, Http1Error> {
        let here = reader.peek().len();
        match self {
            Self::Done => return Ok(Next::End),
            _ if here == 0 => return Ok(Next::More),
            Self::ToClose => return Ok(Next::Frame(Frame::data(reader.take(here)))),
            Self::Length(left) => {
                let length = usize::try_from(*left).unwrap_or(usize::MAX).min(here);
                *left -= length as u64;
                if *left == 0 {
                    *self = Self::Done;
                }
                return Ok(Next::Frame(Frame::data(reader.take(length))));
            }
            Self::Chunked(_) => {}
        }
        self.next_chunk(reader)
    }

    fn next_chunk(&mut self, reader: &mut Reader) -> Result<Next, Http1Error> {
        let Self::Chunked(chunks) = self else { return Ok(Next::End) };
        loop {
            let (used, step) = chunks.step(reader.peek())?;
            match step {
                Step::Data(length) => return Ok(Next::Frame(Frame::data(reader.take(length)))),
                Step::More => {
                    reader.skip(used);
                    if reader.peek().is_empty() {
                        return Ok(Next::More);
                    }
                }
                Step::End => {
                    reader.skip(used);
                    let trailers = chunks.trailers()?;
                    *self = Self::Done;
                    return Ok(trailers.map_or(Next::End, |trailers| Next::Frame(Frame::trailers(trailers))));
                }
            }
        }
    }
}

impl Upload {
    const fn is_done(&self) -> bool {
        self.body.is_none() && self.sent == self.output.len() && self.piece.is_empty()
    }

    /// Sends what there is. Ready when the request has been written to its end.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        loop {
            let collected = self.output.len() >= COLLECTED_BYTES || !self.piece.is_empty();
            let waits = if collected { false } else { self.poll_collect(cx)?.is_pending() };
            ready!(self.poll_write(cx))?;
            if waits {
                return Poll::Pending;
            }
            if self.is_done() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Takes what the body has. Ready when there is enough to write, or no more to come.
    fn poll_collect(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        while let Some((body, left)) = &mut self.body {
            let Some(frame) = ready!(Pin::new(body).poll_frame(cx)) else {
                match left {
                    Left::Bytes(0) => {}
                    Left::Bytes(_) => return Poll::Ready(Err(Http1Error::Body(Reason::ClientClosed))),
                    Left::Chunks => self.output.extend_from_slice(b"0\r\n\r\n"),
                }
                self.body = None;
                break;
            };
            match frame.map_err(|broken| Http1Error::Body(broken.0))?.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => {
                    self.add(data)?;
                    if self.output.len() >= COLLECTED_BYTES || !self.piece.is_empty() {
                        break;
                    }
                }
                Err(frame) => {
                    if let (Ok(trailers), Left::Chunks) = (frame.into_trailers(), left) {
                        self.output.extend_from_slice(b"0\r\n");
                        trailers.iter().for_each(|(name, value)| write_field(&mut self.output, name, value));
                        self.output.extend_from_slice(b"\r\n");
                        self.body = None;
                    }
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn add(&mut self, data: Bytes) -> Result<(), Http1Error> {
        match self.body.as_mut().map(|(_, left)| left) {
            Some(Left::Bytes(left)) => {
                // More than was announced would be the beginning of another request.
                *left =
                    left.checked_sub(data.len() as u64).ok_or(Http1Error::Body(Reason::BadRequestBody))?;
                self.add_piece(data, b"");
            }
            _ => {
                chunks::write_size(&mut self.output, data.len());
                self.add_piece(data, b"\r\n");
            }
        }
        Ok(())
    }

    fn add_piece(&mut self, data: Bytes, end: &'static [u8]) {
        if data.len() < COLLECTED_BYTES / 2 {
            self.output.extend_from_slice(&data);
            self.output.extend_from_slice(end);
        } else {
            self.piece = data;
            self.after_piece = end;
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        while self.sent < self.output.len() || !self.piece.is_empty() {
            let head = &self.output[self.sent..];
            let written = if self.piece.is_empty() {
                ready!(Pin::new(&mut self.half).poll_write(cx, head))?
            } else {
                let slices = [std::io::IoSlice::new(head), std::io::IoSlice::new(&self.piece)];
                ready!(Pin::new(&mut self.half).poll_write_vectored(cx, &slices))?
            };
            if written == 0 {
                return Poll::Ready(Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into()));
            }
            self.wrote = true;
            self.written += written as u64;
            let of_head = written.min(head.len());
            self.sent += of_head;
            self.piece.advance(written - of_head);
        }
        self.output.clear();
        self.sent = 0;
        self.output.extend_from_slice(std::mem::take(&mut self.after_piece));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 8192, fields: 64 };

    async fn exchange(conn: &mut Http1Conn) -> Result<Head, Http1Error> {
        conn.begin(ForwardBody::Empty, None, |out| {
            out.extend_from_slice(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
        });
        let (method, mut headers) = (Method::POST, HeaderMap::new());
        std::future::poll_fn(|cx| conn.poll_head(cx, (&method, &mut headers), LIMITS, |_, _| {})).await
    }

    /// Whether a connection to such a peer says, behind `before` good exchanges, that the peer has missed the next.
    /// What it does when a request is there (`reads`) is its own matter.
    fn missed(before: usize, reads: bool, resets: bool) -> bool {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("address");
        let (closed, wait) = std::sync::mpsc::channel();
        let peer = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("accepts");
            let mut chunk = [0; 1024];
            for _ in 0..before {
                assert!(socket.read(&mut chunk).expect("a request") > 0);
                socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("is taken");
            }
            if reads {
                closed.send(()).expect("somebody waits");
                assert!(socket.read(&mut chunk).expect("a request") > 0);
            }
            if resets {
                socket2::SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO)).expect("linger");
            }
            drop(socket);
            // Nobody waits for it a second time.
            let _ = closed.send(());
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let missed = runtime.block_on(async {
            let mut conn =
                Http1Conn::new(TcpStream::connect(address).await.expect("connects"), SpareBuffers::default());
            for _ in 0..before {
                exchange(&mut conn).await.expect("an answer");
            }
            // Without a look at the socket: as if the end came while the request is being written.
            wait.recv().expect("the peer goes on");
            exchange(&mut conn).await.expect_err("there is no answer");
            conn.has_missed()
        });
        peer.join().expect("no panic");
        missed
    }

    #[test]
    fn a_peer_that_had_closed_before_the_request_came_has_missed_it() {
        assert!(missed(0, false, false), "a new connection");
        assert!(missed(3, false, false), "one that has served");
    }

    #[test]
    fn a_peer_that_may_have_read_the_request_has_not_missed_it() {
        assert!(!missed(0, true, false) && !missed(3, true, false), "read, and closed");
        assert!(!missed(0, true, true) && !missed(3, true, true), "read, and reset");
    }
}
