//! Follows the framing of a client's HTTP/1.1 bytes beside the parser, for one question that the parsed
//! head cannot answer any more: did it carry `Content-Length` as well as `Transfer-Encoding`?
//!
//! hyper takes `Content-Length` out of such a head before anybody sees it, and goes on. RFC 9112 §6.1
//! lets a server refuse it, and an edge must: whoever sends both hopes that two parsers disagree.
//!
//! The follower keeps the bytes of a head only until the parser has accepted it, looks into them only
//! if the head has `Transfer-Encoding`, and skips bodies by the same rules as the parser. It never
//! decides where a body ends: if it loses its way, the worst case is a refused request.

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
    /// HTTP/2 or a tunnel: nothing to follow.
    Off,
}

/// Where in a chunked body (RFC 9112 §7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size(u64),
    Extension(u64),
    Data(u64),
    DataEnd,
    /// In the trailer section; true at the start of a line.
    Trailer(bool),
}

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

    /// Takes note of bytes that were read.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.at {
                At::Off => return,
                At::Head => {
                    self.pending.extend_from_slice(bytes);
                    return;
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
                    let (next, used) = skip_chunks(*chunk, bytes);
                    self.at = next.map_or(At::Head, At::Chunks);
                    bytes = &bytes[used..];
                }
            }
        }
    }

    /// The parser has accepted a head with this framing. True if it carried both framings.
    pub(crate) fn head(&mut self, framing: Framing) -> bool {
        if self.at != At::Head {
            return false;
        }
        let Some(end) = head_end(&self.pending) else {
            self.pending.clear();
            return framing == Framing::Chunked;
        };
        let conflict = framing == Framing::Chunked && has_content_length(&self.pending[..end]);
        self.at = match framing {
            Framing::Length(0) => At::Head,
            Framing::Length(length) => At::Body(length),
            Framing::Chunked => At::Chunks(Chunk::Size(0)),
        };
        if end == self.pending.len() {
            self.pending.clear();
        } else {
            let rest = self.pending.split_off(end);
            self.pending.clear();
            self.read(&rest);
        }
        conflict
    }
}

/// Position after the empty line that ends the first head, with the leading empty lines that
/// RFC 9112 §2.2 allows. The parser takes a bare LF for a line end too.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'))?;
    memchr::memchr_iter(b'\n', &bytes[start..]).map(|at| start + at + 1).find_map(|line| {
        match bytes[line..] {
            [b'\n', ..] => Some(line + 1),
            [b'\r', b'\n', ..] => Some(line + 2),
            _ => None,
        }
    })
}

fn has_content_length(head: &[u8]) -> bool {
    const NAME: &[u8] = b"content-length";
    head.split(|b| *b == b'\n').skip(1).any(|line| {
        line.get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME))
            && matches!(line.get(NAME.len()), Some(b':' | b' ' | b'\t'))
    })
}

/// Skips as much of a chunked body as is there. `None` when its end was found.
fn skip_chunks(mut chunk: Chunk, bytes: &[u8]) -> (Option<Chunk>, usize) {
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        at += 1;
        chunk = match (chunk, *byte) {
            (Chunk::Size(size) | Chunk::Extension(size), b'\n') => {
                if size == 0 {
                    Chunk::Trailer(true)
                } else {
                    Chunk::Data(size)
                }
            }
            (Chunk::Size(size), digit) if digit.is_ascii_hexdigit() => {
                let digit = (digit as char).to_digit(16).unwrap_or(0);
                Chunk::Size(size.saturating_mul(16).saturating_add(u64::from(digit)))
            }
            (Chunk::Size(size), b'\r') => Chunk::Size(size),
            (Chunk::Size(size) | Chunk::Extension(size), _) => Chunk::Extension(size),
            (Chunk::Data(left), _) => {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at + 1);
                at += here - 1;
                if here as u64 == left { Chunk::DataEnd } else { Chunk::Data(left - here as u64) }
            }
            (Chunk::DataEnd, b'\n') => Chunk::Size(0),
            (Chunk::DataEnd, _) => Chunk::DataEnd,
            (Chunk::Trailer(true), b'\n') => return (None, at),
            (Chunk::Trailer(start), b'\r') => Chunk::Trailer(start),
            (Chunk::Trailer(_), byte) => Chunk::Trailer(byte == b'\n'),
        };
    }
    (Some(chunk), at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `bytes` in pieces of `step` and says of each head whether it conflicted.
    fn follow(pieces: &[(&str, Framing)], step: usize) -> Vec<bool> {
        let mut follower = Follower::new();
        let mut found = Vec::new();
        let all: String = pieces.iter().map(|(text, _)| *text).collect();
        let mut fed = 0;
        let mut wanted = 0;
        for (text, framing) in pieces {
            let head = head_end(text.as_bytes()).expect("has a head");
            wanted += head;
            while fed < wanted {
                let next = (fed + step).min(all.len());
                follower.read(&all.as_bytes()[fed..next]);
                fed = next;
            }
            found.push(follower.head(*framing));
            wanted += text.len() - head;
            while fed < wanted {
                let next = (fed + step).min(all.len());
                follower.read(&all.as_bytes()[fed..next]);
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
            let expected = [false, false, false, false, true, false, false];
            assert_eq!(follow(&pieces, step), expected, "step {step}");
        }
    }

    #[test]
    fn a_body_that_speaks_of_content_length_is_no_conflict() {
        let body = (
            "PUT / HTTP/1.1\nTransfer-Encoding: chunked\n\n10\r\nContent-Length: \r\n0\r\n\r\n",
            Framing::Chunked,
        );
        assert_eq!(follow(&[body, GET], 4), [false, false]);
    }
}
