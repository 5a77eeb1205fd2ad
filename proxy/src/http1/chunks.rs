//! The chunked coding (RFC 9112 §7.1): sizes on the way out, a decoder on the way in.
//!
//! The decoder takes what the grammar says and nothing else. Extensions and trailers are bounded, because
//! nothing else about a chunked body is.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::Http1Error;

/// Bytes of chunk extensions in one body; they are read over.
const MAX_EXTENSION_BYTES: usize = 16 * 1024;
/// Largest trailer section, and the most fields in it.
const MAX_TRAILER_BYTES: usize = 16 * 1024;
const MAX_TRAILERS: usize = 64;
/// Digits of a chunk's size: 2^60 bytes are enough for anybody.
const MAX_SIZE_DIGITS: u8 = 15;

/// Writes the line before a chunk. It ends the chunk before it as well.
pub(super) fn write_size(out: &mut Vec<u8>, length: usize) {
    let digits = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    for at in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(length >> (4 * at)) & 15]);
    }
    out.extend_from_slice(b"\r\n");
}

/// Decodes a chunked body.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    at: At,
    extension_bytes: usize,
    trailers: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Start,
    Size(u64, u8),
    Extension(u64),
    SizeEnd(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// In the trailer section, after so many bytes of the line.
    Trailer(usize),
    TrailerLf(usize),
    End,
}

/// What the next bytes are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// So many of them are data, and the caller takes them.
    Data(usize),
    /// Framing, which has been read.
    More,
    /// The body is over.
    End,
}

impl Chunks {
    /// Reads on. Says how many bytes were framing, and what comes after them.
    pub(super) fn step(&mut self, bytes: &[u8]) -> Result<(usize, Step), Http1Error> {
        if let At::Data(left) = self.at {
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            self.at = if here as u64 == left { At::DataCr } else { At::Data(left - here as u64) };
            return Ok((0, Step::Data(here)));
        }
        for (used, byte) in bytes.iter().enumerate() {
            self.at = self.next(*byte)?;
            match self.at {
                At::Data(_) => return Ok((used + 1, Step::More)),
                At::End => return Ok((used + 1, Step::End)),
                _ => {}
            }
        }
        Ok((bytes.len(), Step::More))
    }

    fn next(&mut self, byte: u8) -> Result<At, Http1Error> {
        let bad = Err(Http1Error::Malformed("a chunk"));
        let digit = (byte as char).to_digit(16).map(u64::from);
        Ok(match (self.at, byte) {
            (At::Start, _) => match digit {
                Some(digit) => At::Size(digit, 1),
                None => return bad,
            },
            (At::Size(size, _), b'\r') => At::SizeEnd(size),
            (At::Size(size, _), b';' | b' ' | b'\t') => At::Extension(size),
            (At::Size(size, digits), _) => match digit {
                Some(digit) if digits < MAX_SIZE_DIGITS => At::Size(size << 4 | digit, digits + 1),
                _ => return bad,
            },
            (At::Extension(size), b'\r') => At::SizeEnd(size),
            (At::Extension(_), b'\n') => return bad,
            (At::Extension(size), _) => {
                self.extension_bytes += 1;
                if self.extension_bytes > MAX_EXTENSION_BYTES {
                    return Err(Http1Error::Malformed("too many chunk extensions"));
                }
                At::Extension(size)
            }
            (At::SizeEnd(0), b'\n') => At::Trailer(0),
            (At::SizeEnd(size), b'\n') => At::Data(size),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Start,
            (At::Trailer(line), b'\r') => At::TrailerLf(line),
            (At::Trailer(_), b'\n') => return bad,
            (At::Trailer(line), byte) => {
                self.keep(byte)?;
                At::Trailer(line + 1)
            }
            (At::TrailerLf(0), b'\n') => At::End,
            (At::TrailerLf(_), b'\n') => {
                self.keep(b'\r')?;
                self.keep(b'\n')?;
                At::Trailer(0)
            }
            _ => return bad,
        })
    }

    fn keep(&mut self, byte: u8) -> Result<(), Http1Error> {
        if self.trailers.len() >= MAX_TRAILER_BYTES {
            return Err(Http1Error::Malformed("the trailer section is too large"));
        }
        self.trailers.push(byte);
        Ok(())
    }

    /// The trailer section, when the body is over.
    pub(super) fn trailers(&mut self) -> Result<Option<HeaderMap>, Http1Error> {
        if self.trailers.is_empty() {
            return Ok(None);
        }
        let bad = Http1Error::Malformed("the trailer section");
        self.trailers.extend_from_slice(b"\r\n");
        let mut fields = [httparse::EMPTY_HEADER; MAX_TRAILERS];
        let Ok(httparse::Status::Complete((_, fields))) =
            httparse::parse_headers(&self.trailers, &mut fields)
        else {
            return Err(bad);
        };
        let mut trailers = HeaderMap::with_capacity(fields.len());
        for field in fields {
            let name = HeaderName::from_bytes(field.name.as_bytes());
            let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(field.value)) else { return Err(bad) };
            trailers.append(name, value);
        }
        Ok(Some(trailers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `text`, fed in pieces of `piece` bytes: the data, the trailers, and what is left over.
    fn decode(text: &str, piece: usize) -> Result<(String, Vec<String>, usize), Http1Error> {
        let (mut chunks, mut data, mut left) = (Chunks::default(), String::new(), text.as_bytes());
        while !left.is_empty() {
            let (used, step) = chunks.step(&left[..piece.min(left.len())])?;
            left = &left[used..];
            match step {
                Step::Data(length) => {
                    data.push_str(std::str::from_utf8(&left[..length]).expect("text"));
                    left = &left[length..];
                }
                Step::More => {}
                Step::End => {
                    let trailers = chunks.trailers()?.unwrap_or_default();
                    let shown = |(name, value): (&HeaderName, &HeaderValue)| {
                        format!("{name}={}", value.to_str().expect("text"))
                    };
                    return Ok((data, trailers.iter().map(shown).collect(), left.len()));
                }
            }
        }
        Err(Http1Error::Closed)
    }

    #[test]
    fn a_body_is_put_together_however_it_is_cut() {
        let text = "5\r\nhello\r\n00A;x=\"y\" ;z\r\n, world...\r\n0\r\nSum: 1\r\nSum: 2\r\nB: \r\n\r\nHTTP";
        for piece in [1, 2, 3, 7, 1000] {
            let (data, trailers, left) = decode(text, piece).expect("well formed");
            assert_eq!((data.as_str(), left), ("hello, world...", 4), "pieces of {piece}");
            assert_eq!(trailers, ["sum=1", "sum=2", "b="]);
        }
        assert_eq!(decode("0\r\n\r\n", 100).expect("empty").0, "");
    }

    #[test]
    fn what_is_not_in_the_grammar_is_refused() {
        for bad in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "1000000000000000\r\n",
            "5;a\nb\r\nhello\r\n0\r\n\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\nA: b\n\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
        ] {
            let error = decode(bad, 3).expect_err(bad);
            assert!(matches!(error, Http1Error::Malformed(_)), "{bad:?}: {error}");
        }
    }

    #[test]
    fn extensions_and_trailers_are_bounded() {
        let extension = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(MAX_EXTENSION_BYTES + 1));
        let trailer = format!("0\r\nA: {}\r\n\r\n", "x".repeat(MAX_TRAILER_BYTES));
        let many = format!("0\r\n{}\r\n", "A: b\r\n".repeat(MAX_TRAILERS + 1));
        for text in [extension, trailer, many] {
            assert!(matches!(decode(&text, 4096), Err(Http1Error::Malformed(_))));
        }
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for length in [1, 15, 16, 255, 256, 65_535, 1 << 20, 0xdead_beef] {
            let mut out = Vec::new();
            write_size(&mut out, length);
            assert_eq!(out, format!("{length:x}\r\n").into_bytes());
        }
    }
}
