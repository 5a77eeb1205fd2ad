//! Answer bodies: whole, patterned, timed, with trailers. Each carries the request's in-flight count to its last frame.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};

use super::{Gauge, Shared};

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(super) type AnswerBody = UnsyncBoxBody<Bytes, BoxError>;

const ALPHABET_LEN: usize = 26;
/// One frame of `/bytes/N`, in bytes: whole alphabets, so that every frame starts at `a`.
const PATTERN_FRAME_BYTES: usize = 2520 * ALPHABET_LEN;

static PATTERN: LazyLock<Bytes> =
    LazyLock::new(|| (b'a'..=b'z').cycle().take(PATTERN_FRAME_BYTES).collect::<Vec<u8>>().into());

/// Whether `bytes`, found at `offset` of a `/bytes/N` answer, are the ones that belong there.
pub(crate) fn pattern_matches(offset: u64, bytes: &[u8]) -> bool {
    let start = usize::try_from(offset % ALPHABET_LEN as u64).expect("below 26");
    // The first stretch brings the offset to the start of the pattern, so that the rest compares as whole slices.
    let (first, rest) = bytes.split_at(bytes.len().min(ALPHABET_LEN - start));
    first == &PATTERN[start..start + first.len()]
        && rest.chunks(PATTERN_FRAME_BYTES).all(|chunk| chunk == &PATTERN[..chunk.len()])
}

pub(super) fn empty() -> AnswerBody {
    Empty::new().map_err(never).boxed_unsync()
}

pub(super) fn full(bytes: impl Into<Bytes>) -> AnswerBody {
    Full::new(bytes.into()).map_err(never).boxed_unsync()
}

/// `len` bytes of the alphabet over and over.
pub(super) fn pattern(len: u64) -> AnswerBody {
    if len <= PATTERN_FRAME_BYTES as u64 {
        return full(PATTERN.slice(..usize::try_from(len).expect("at most one frame")));
    }
    Pattern { left: len }.map_err(never).boxed_unsync()
}

/// `chunks` lines with a wait before each.
pub(super) fn timed_chunks(chunks: u64, wait: Duration) -> AnswerBody {
    let lines = stream::unfold(1..=chunks, move |mut numbers| async move {
        let number = numbers.next()?;
        tokio::time::sleep(wait).await;
        Some((Ok(Frame::data(Bytes::from(format!("chunk {number} of {chunks}\n")))), numbers))
    });
    StreamBody::new(lines).boxed_unsync()
}

/// Events numbered from `first`, with a wait before each; ends after `last` or, cleanly, when the origin stops.
pub(super) fn events(shared: Arc<Shared>, first: u64, last: u64, wait: Duration) -> AnswerBody {
    let events = stream::unfold((first..=last, shared), move |(mut numbers, shared)| async move {
        let number = numbers.next()?;
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.stopped() => return None,
        }
        let event = format!("id: {number}\ndata: {}\n\n", shared.instance);
        Some((Ok(Frame::data(Bytes::from(event))), (numbers, shared)))
    });
    StreamBody::new(events).boxed_unsync()
}

/// A gRPC message: one byte "not compressed", four bytes length, then the text.
pub(super) fn message(text: &str) -> Bytes {
    let mut message = BytesMut::with_capacity(5 + text.len());
    message.put_u8(0);
    message.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
    message.put_slice(text.as_bytes());
    message.freeze()
}

/// gRPC messages that name the instance, without an end.
pub(super) fn messages(shared: Arc<Shared>, wait: Duration) -> AnswerBody {
    let messages = stream::unfold(shared, move |shared| async move {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.stopped() => return None,
        }
        Some((Ok(Frame::data(message(&shared.instance))), shared))
    });
    StreamBody::new(messages).boxed_unsync()
}

/// `message`, then `trailers`.
pub(super) fn with_trailers(message: Bytes, trailers: &[(&'static str, &'static str)]) -> AnswerBody {
    let fields: HeaderMap = trailers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect();
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(fields))];
    StreamBody::new(stream::iter(frames)).boxed_unsync()
}

/// `body`, which keeps the request counted as in flight until it has ended or was dropped.
pub(super) fn counted(body: AnswerBody, gauge: Option<Gauge>) -> AnswerBody {
    Counted { body, _gauge: gauge }.boxed_unsync()
}

fn never(never: Infallible) -> BoxError {
    match never {}
}

struct Pattern {
    left: u64,
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let len = self.left.min(PATTERN_FRAME_BYTES as u64);
        self.left -= len;
        let frame = PATTERN.slice(..usize::try_from(len).expect("at most one frame"));
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

struct Counted {
    body: AnswerBody,
    _gauge: Option<Gauge>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_pattern_is_whole_and_every_piece_of_it_is_recognised() {
        let len = 3 * PATTERN_FRAME_BYTES as u64 + 17;
        let body = pattern(len);
        assert_eq!(body.size_hint().exact(), Some(len));
        let bytes = body.collect().await.expect("a body").to_bytes();
        assert_eq!(bytes.len() as u64, len);
        for (offset, piece) in [(0, &bytes[..]), (25, &bytes[25..]), (70_001, &bytes[70_001..70_003])] {
            assert!(pattern_matches(offset, piece), "at {offset}");
            assert!(!pattern_matches(offset + 1, piece), "one off at {offset}");
        }
    }
}
