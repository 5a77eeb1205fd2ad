//! Follows the framing of a client's HTTP/1.1 bytes beside the parser, and refuses what the parser lets pass although
//! another reader may take it differently (RFC 9112):
//!
//! * a head with `Content-Length` as well as `Transfer-Encoding` (§6.1): hyper takes the former out before anybody
//!   sees it, and goes on; whoever sends both hopes that two parsers disagree;
//! * a line of the head that ends in a bare LF (§2.2), and a fragment in the target (§3.2), which the parser drops;
//! * in a chunked body (§7.1): whitespace behind a size, extensions above [`MAX_EXTENSION_BYTES`] in one line or with
//!   control characters in them, a bare CR or LF.
//!
//! The follower keeps the bytes of a head only until the parser has accepted it, and skips bodies by the same rules
//! as the parser. It never decides where a body ends: if it loses its way, the worst case is a refused request.

use crate::error::Reason;

/// Most bytes of extensions behind the size of one chunk. Nobody uses them; the parser bounds those of a whole body.
const MAX_EXTENSION_BYTES: u16 = 1024;

/// How the body of a request is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// By length; 0 is no body.
    Length(u64),
    /// By chunks.
    Chunked,
}

#[derive(Debug)]
pub(crate) struct Follower {
    at: At,
    /// Bytes that were read and belong to no known head or body yet.
    pending: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Head,
    Body(u64),
    Chunks(Chunk),
    /// A fault was found; the connection ends.
    Broken,
    /// HTTP/2 or a tunnel: nothing to follow.
    Off,
}

/// Where in a chunked body (RFC 9112 §7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// In the digits of a size; true when there is one already.
    Size(u64, bool),
    /// In the extensions behind a size, with how many bytes of them may follow.
    Extension(u64, u16),
    /// Behind the CR of a size's line.
    SizeEnd(u64),
    Data(u64),
    /// Behind the data of a chunk; true behind the CR.
    DataEnd(bool),
    /// In the trailer section; true at the start of a line.
    Trailer(bool),
    /// Behind a CR in the trailer section; true if the line is empty.
    TrailerEnd(bool),
}

/// What no chunked body has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadChunk;

impl Follower {
    pub(crate) const fn new() -> Self {
        Self { at: At::Head, pending: Vec::new() }
    }

    pub(crate) fn turn_off(&mut self) {
        self.at = At::Off;
        self.pending = Vec::new();
    }

    /// Whether a part of a head has been read, but not all of it.
    pub(crate) const fn has_partial_head(&self) -> bool {
        matches!(self.at, At::Head) && !self.pending.is_empty()
    }

    /// Whether the last request has come to its end.
    pub(crate) const fn is_at_head(&self) -> bool {
        matches!(self.at, At::Head)
    }

    /// Whether a request has ended and nothing of a next one has come.
    pub(crate) const fn is_between_requests(&self) -> bool {
        matches!(self.at, At::Head) && self.pending.is_empty()
    }

    /// Lets go of room for a head.
    pub(crate) fn shrink(&mut self) {
        self.pending.shrink_to_fit();
    }

    /// Takes note of bytes that were read.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> Result<(), BadChunk> {
        while !bytes.is_empty() {
            match &mut self.at {
                At::Off => return Ok(()),
                At::Broken => return Err(BadChunk),
                At::Head => {
                    self.pending.extend_from_slice(bytes);
                    return Ok(());
                }
                At::Body(left) => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= here as u64;
                    if *left == 0 {
                        self.at = At::Head;
                    }
                    bytes = &bytes[here..];
                }
                At::Chunks(chunk) => {
                    let Ok((next, used)) = skip_chunks(*chunk, bytes) else {
                        self.at = At::Broken;
                        return Err(BadChunk);
                    };
                    self.at = next.map_or(At::Head, At::Chunks);
                    bytes = &bytes[used..];
                }
            }
        }
        Ok(())
    }

    /// The parser has accepted a head with this framing.
    ///
    /// # Errors
    /// The fault that the parser does not see, in the head or in what came of the body with it.
    pub(crate) fn head(&mut self, framing: Framing) -> Result<(), Reason> {
        if self.at != At::Head {
            return Ok(());
        }
        let Some(head) = Shape::of(&self.pending) else {
            self.pending.clear();
            return if framing == Framing::Chunked { Err(Reason::ConflictingLength) } else { Ok(()) };
        };
        let verdict = if head.has_bare_lf {
            Err(Reason::BadRequestHead)
        } else if head.has_fragment {
            Err(Reason::BadTarget)
        } else if framing == Framing::Chunked && has_content_length(&self.pending[..head.end]) {
            Err(Reason::ConflictingLength)
        } else {
            Ok(())
        };
        self.at = match framing {
            Framing::Length(0) => At::Head,
            Framing::Length(length) => At::Body(length),
            Framing::Chunked => At::Chunks(Chunk::Size(0, false)),
        };
        if head.end == self.pending.len() {
            self.pending.clear();
            return verdict;
        }
        let rest = self.pending.split_off(head.end);
        self.pending.clear();
        let body = self.read(&rest).map_err(|BadChunk| Reason::BadRequestBody);
        verdict.and(body)
    }
}

/// A head as it lies in the bytes.
struct Shape {
    /// Behind the empty line that ends it.
    end: usize,
    has_bare_lf: bool,
    has_fragment: bool,
}

impl Shape {
    /// The first head, with the leading empty lines that RFC 9112 §2.2 allows. The parser takes a bare LF for a line
    /// end too.
    fn of(bytes: &[u8]) -> Option<Self> {
        let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'))?;
        let mut has_bare_lf = start > 0 && bytes[..start].chunks(2).any(|line| line != b"\r\n");
        let mut has_fragment = None;
        for at in memchr::memchr_iter(b'\n', &bytes[start..]).map(|at| start + at) {
            has_bare_lf |= bytes[at - 1] != b'\r';
            let has_fragment =
                *has_fragment.get_or_insert_with(|| memchr::memchr(b'#', &bytes[start..at]).is_some());
            match bytes[at + 1..] {
                [b'\n', ..] => return Some(Self { end: at + 2, has_bare_lf: true, has_fragment }),
                [b'\r', b'\n', ..] => return Some(Self { end: at + 3, has_bare_lf, has_fragment }),
                _ => {}
            }
        }
        None
    }
}

fn has_content_length(head: &[u8]) -> bool {
    const NAME: &[u8] = b"content-length";
    head.split(|b| *b == b'\n').skip(1).any(|line| {
        line.get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME))
            && matches!(line.get(NAME.len()), Some(b':' | b' ' | b'\t'))
    })
}

/// Skips as much of a chunked body as is there. `None` when its end was found.
fn skip_chunks(mut chunk: Chunk, bytes: &[u8]) -> Result<(Option<Chunk>, usize), BadChunk> {
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        at += 1;
        chunk = match (chunk, *byte) {
            (Chunk::Size(size, _), digit) if digit.is_ascii_hexdigit() => {
                let digit = (digit as char).to_digit(16).unwrap_or(0);
                let size = size.checked_mul(16).and_then(|size| size.checked_add(u64::from(digit)));
                Chunk::Size(size.ok_or(BadChunk)?, true)
            }
            (Chunk::Size(size, true), b';') => Chunk::Extension(size, MAX_EXTENSION_BYTES),
            (Chunk::Size(size, true) | Chunk::Extension(size, _), b'\r') => Chunk::SizeEnd(size),
            (Chunk::Extension(size, left), b' '..=b'~' | b'\t' | 0x80..) => {
                Chunk::Extension(size, left.checked_sub(1).ok_or(BadChunk)?)
            }
            (Chunk::SizeEnd(0), b'\n') => Chunk::Trailer(true),
            (Chunk::SizeEnd(size), b'\n') => Chunk::Data(size),
            (Chunk::Data(left), _) => {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at + 1);
                at += here - 1;
                if here as u64 == left { Chunk::DataEnd(false) } else { Chunk::Data(left - here as u64) }
            }
            (Chunk::DataEnd(false), b'\r') => Chunk::DataEnd(true),
            (Chunk::DataEnd(true), b'\n') => Chunk::Size(0, false),
            (Chunk::Trailer(is_empty), b'\r') => Chunk::TrailerEnd(is_empty),
            (Chunk::Trailer(_), byte) if byte != b'\n' => Chunk::Trailer(false),
            (Chunk::TrailerEnd(true), b'\n') => return Ok((None, at)),
            (Chunk::TrailerEnd(false), b'\n') => Chunk::Trailer(true),
            _ => return Err(BadChunk),
        };
    }
    Ok((Some(chunk), at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Result<(), Reason> = Err(Reason::ConflictingLength);

    /// Feeds the pieces, cut every `step` bytes, and tells the verdict on each head.
    fn follow(pieces: &[(&str, Framing)], step: usize) -> Vec<Result<(), Reason>> {
        let mut follower = Follower::new();
        let mut found = Vec::new();
        let all: String = pieces.iter().map(|(text, _)| *text).collect();
        let mut fed = 0;
        let mut wanted = 0;
        for (text, framing) in pieces {
            let head = Shape::of(text.as_bytes()).expect("has a head").end;
            wanted += head;
            while fed < wanted {
                let next = (fed + step).min(all.len());
                follower.read(&all.as_bytes()[fed..next]).expect("no fault in the chunks");
                fed = next;
            }
            found.push(follower.head(*framing));
            wanted += text.len() - head;
            while fed < wanted {
                let next = (fed + step).min(all.len());
                follower.read(&all.as_bytes()[fed..next]).expect("no fault in the chunks");
                fed = next;
            }
        }
        assert!(!follower.has_partial_head(), "something is left over");
        found
    }

    const GET: (&str, Framing) = ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0));
    const POST: (&str, Framing) =
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe\r\n\n", Framing::Length(5));
    const CHUNKED: (&str, Framing) = (
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n\r\n\r\n1\r\n1\r\na\r\n0\r\nT: Content-Length\r\n\r\n",
        Framing::Chunked,
    );
    const BOTH: (&str, Framing) = (
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\ncOntent-length: 3\r\n\r\n0\r\n\r\n",
        Framing::Chunked,
    );

    #[test]
    fn both_framings_are_seen_wherever_the_request_stands_and_however_it_is_cut() {
        for step in [1, 2, 3, 7, 10_000] {
            let pieces = [GET, POST, CHUNKED, GET, BOTH, POST, CHUNKED];
            let expected = [Ok(()), Ok(()), Ok(()), Ok(()), BAD, Ok(()), Ok(())];
            assert_eq!(follow(&pieces, step), expected, "step {step}");
        }
    }

    #[test]
    fn a_body_that_speaks_of_content_length_is_no_conflict() {
        let body = (
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nContent-Length: \r\n0\r\n\r\n",
            Framing::Chunked,
        );
        assert_eq!(follow(&[body, GET], 4), [Ok(()), Ok(())]);
    }

    #[test]
    fn a_head_with_a_bare_line_feed_or_a_fragment_is_refused() {
        for (head, reason) in [
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", Reason::BadRequestHead),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", Reason::BadRequestHead),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", Reason::BadRequestHead),
            ("GET / HTTP/1.1\nHost: a\n\n", Reason::BadRequestHead),
            ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Reason::BadRequestHead),
            ("\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Reason::BadRequestHead),
            ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", Reason::BadTarget),
        ] {
            for step in [1, 5, 1_000] {
                let verdicts = follow(&[(head, Framing::Length(0)), GET], step);
                assert_eq!(verdicts, [Err(reason), Ok(())], "{head:?}");
            }
        }
        let fine = "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nX: #\r\n\r\n";
        assert_eq!(follow(&[(fine, Framing::Length(0))], 7), [Ok(())]);
    }

    #[test]
    fn a_chunk_that_two_readers_may_take_differently_is_a_fault() {
        let head = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        let long = format!("5;{}\r\nhello\r\n", "x".repeat(1025));
        let fits = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1024));
        for (body, fine) in [
            ("5\r\nhello\r\n0\r\n\r\n", true),
            ("5;a=\"b\";c\r\nhello\r\n000;x\r\nT: v\r\n\r\n", true),
            (&fits, true),
            (&long, false),
            ("5 \r\nhello\r\n", false),
            ("5\t;a\r\nhello\r\n", false),
            (" 5\r\nhello\r\n", false),
            ("5\nhello\r\n", false),
            ("5;a\nhello\r\n", false),
            ("5\rX", false),
            ("5;a\rX", false),
            ("5;a\0\r\n", false),
            ("5\r\nhello\n", false),
            ("5\r\nhello\rX", false),
            ("5\r\nhelloX", false),
            (";a\r\n", false),
            ("\r\n", false),
            ("10000000000000000\r\n", false),
            ("0\r\n\n", false),
            ("0\r\nT: v\n\r\n", false),
            ("0\r\nT: v\rX", false),
        ] {
            for step in [1, 3, 5_000] {
                let mut follower = Follower::new();
                follower.read(head.as_bytes()).expect("a head is no chunk");
                follower.head(Framing::Chunked).expect("is fine");
                let read = body.as_bytes().chunks(step).try_for_each(|piece| follower.read(piece));
                assert_eq!(read.is_ok(), fine, "{body:?} in pieces of {step}");
                assert_eq!(follower.is_at_head(), fine, "{body:?}");
            }
            let mut follower = Follower::new();
            follower.read(format!("{head}{body}").as_bytes()).expect("waits for the verdict on the head");
            let expected = if fine { Ok(()) } else { Err(Reason::BadRequestBody) };
            assert_eq!(follower.head(Framing::Chunked), expected, "{body:?} with its head");
        }
    }
}
