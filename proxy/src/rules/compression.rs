//! Answers are compressed on their way, where the client takes it and it is worth it.
//!
//! What an origin has encoded, asked not to change, or sends in parts goes on as it is, and so do streams of events and calls.
//! An answer that is compressed is another representation: its length goes, its strong `ETag` becomes a weak one (RFC 9110
//! §8.8.1), and it says that it depends on `Accept-Encoding`. What an origin sends slowly is passed on as it comes.

use std::cell::Cell;
use std::io::{self, Write};
use std::rc::Rc;

use bytes::Bytes;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, ETAG, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use peregrine_routing::{Coding, Compression};

use crate::headers::has_token;

/// Answers that one core compresses at a time; each needs up to 2 MiB. More go on as they are.
const MAX_AT_A_TIME: u32 = 64;
const ZSTD_LEVEL: i32 = 3;
const BROTLI_LEVEL: u32 = 4;
const GZIP_LEVEL: u32 = 5;
/// 256 KiB of window, for the edge and for the client; less for an answer that is known to be shorter.
const MAX_WINDOW_LOG: u32 = 18;
const MIN_WINDOW_LOG: u32 = 14;
const BROTLI_BUFFER_BYTES: usize = 4 * 1024;
/// Pieces that are taken in a row without anything coming out. Then it is the others' turn.
pub(crate) const MAX_PIECES_IN_A_ROW: u32 = 8;

/// Fields that bear a digest of the content as it was (RFC 9530).
const DIGESTS: [HeaderName; 3] = [
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-md5"),
];

/// What an answer is to the decision.
pub(crate) struct Asked<'a> {
    pub(crate) method: &'a Method,
    pub(crate) status: StatusCode,
    /// The length of its body, if it is known.
    pub(crate) length: Option<u64>,
    /// What the client takes.
    pub(crate) coding: Option<Coding>,
    /// Answers of this core that are being compressed.
    pub(crate) running: &'a Rc<Cell<u32>>,
}

/// The coding that a client likes best of those that there are (RFC 9110 §12.5.3): by its weights, then in our order.
pub(super) fn choose(compression: &Compression, headers: &HeaderMap) -> Option<Coding> {
    let (mut identity, mut any) = (0, 0);
    let mut weights = [None; Coding::ALL.len()];
    let parts = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    for part in parts.flat_map(|value| value.split(',')) {
        let mut words = part.split(';').map(str::trim);
        let name = words.next().unwrap_or_default();
        let weight = words.next().map_or(Some(1_000), weight_of);
        // What cannot be read is not asked for.
        let Some(weight) = weight else { continue };
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        if is("*") {
            any = weight;
        } else if is("identity") {
            identity = weight;
        } else if let Some(at) = [is("zstd"), is("br"), is("gzip") || is("x-gzip")].iter().position(|is| *is)
        {
            weights[at] = Some(weight);
        }
    }
    let weight = |coding: Coding| weights[coding as usize].unwrap_or(any);
    // Of those that weigh most, `max_by_key` gives the last.
    let best = compression.codings.iter().copied().rev().max_by_key(|coding| weight(*coding))?;
    (weight(best) > 0 && weight(best) >= identity).then_some(best)
}

/// `q=0.5` in thousandths (RFC 9110 §12.4.2).
fn weight_of(text: &str) -> Option<u32> {
    let value = text.strip_prefix("q=").or_else(|| text.strip_prefix("Q="))?;
    let weight = value.parse::<f32>().ok().filter(|weight| (0.0..=1.0).contains(weight))?;
    Some((weight * 1_000.0) as u32)
}

/// Decides, and changes the head of an answer that is compressed. That of an answer to HEAD, too, whose body nobody sends.
pub(super) fn begin(
    compression: &Compression,
    asked: &Asked<'_>,
    headers: &mut HeaderMap,
) -> Option<Box<Compressing>> {
    if !is_worth_it(compression, asked, headers) {
        return None;
    }
    // Caches have to know, whoever asks.
    if !has_token(headers, &VARY, "accept-encoding") && !has_token(headers, &VARY, "*") {
        headers.append(VARY, HeaderValue::from_static("accept-encoding"));
    }
    let coding = asked.coding.filter(|_| asked.running.get() < MAX_AT_A_TIME)?;
    let is_head = *asked.method == Method::HEAD;
    let encoder = if is_head { None } else { Some(Encoder::new(coding, asked.length).ok()?) };
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.as_str()));
    headers.remove(CONTENT_LENGTH);
    headers.remove(ACCEPT_RANGES);
    if let Some(strong) = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\"")) {
        let weak = HeaderValue::from_bytes(&[b"W/", strong.as_bytes()].concat());
        headers.remove(ETAG);
        headers.extend(weak.ok().map(|weak| (ETAG, weak)));
    }
    let encoder = encoder?;
    asked.running.set(asked.running.get() + 1);
    let running = Rc::clone(asked.running);
    Some(Box::new(Compressing { encoder, unflushed: false, trailers: None, ended: false, running }))
}

fn is_worth_it(compression: &Compression, asked: &Asked<'_>, headers: &HeaderMap) -> bool {
    let status = asked.status;
    let whole =
        ![StatusCode::NO_CONTENT, StatusCode::PARTIAL_CONTENT, StatusCode::NOT_MODIFIED].contains(&status);
    // The body of an answer to HEAD would have had this length.
    let said = || headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok();
    let length = if *asked.method == Method::HEAD { said() } else { asked.length };
    let small = length.is_some_and(|length| length < compression.min_bytes.max(1));
    let fixed = headers.contains_key(CONTENT_ENCODING)
        || headers.contains_key(CONTENT_RANGE)
        || DIGESTS.iter().any(|name| headers.contains_key(name))
        || has_token(headers, &CACHE_CONTROL, "no-transform");
    whole && !small && !fixed && is_of(&compression.types, headers)
}

fn is_of(types: &[std::sync::Arc<str>], headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let value = value.as_bytes().split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    let begins =
        |start: &[u8]| value.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start));
    // Where their events and messages end has to be seen when they are drained.
    if begins(b"text/event-stream") || begins(b"application/grpc") {
        return false;
    }
    types.iter().map(|known| known.as_bytes()).any(|known| match known.strip_suffix(b"*") {
        Some(start) => begins(start),
        None => value.eq_ignore_ascii_case(known),
    })
}

enum Encoder {
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
    /// `None` when it has ended.
    Brotli(Option<Box<brotli::CompressorWriter<Vec<u8>>>>),
    Gzip(GzEncoder<Vec<u8>>),
}

impl Encoder {
    fn new(coding: Coding, length: Option<u64>) -> io::Result<Self> {
        let fits = length.map_or(MAX_WINDOW_LOG, |length| u64::BITS - length.leading_zeros());
        let window_log = fits.clamp(MIN_WINDOW_LOG, MAX_WINDOW_LOG);
        Ok(match coding {
            Coding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                encoder.window_log(window_log)?;
                Self::Zstd(encoder)
            }
            Coding::Brotli => Self::Brotli(Some(Box::new(brotli::CompressorWriter::new(
                Vec::new(),
                BROTLI_BUFFER_BYTES,
                BROTLI_LEVEL,
                window_log,
            )))),
            Coding::Gzip => Self::Gzip(GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL))),
        })
    }

    fn writer(&mut self) -> Option<&mut dyn Write> {
        match self {
            Self::Zstd(encoder) => Some(encoder),
            Self::Brotli(encoder) => encoder.as_mut().map(|encoder| encoder as &mut dyn Write),
            Self::Gzip(encoder) => Some(encoder),
        }
    }

    fn written(&mut self) -> Vec<u8> {
        match self {
            Self::Zstd(encoder) => std::mem::take(encoder.get_mut()),
            Self::Brotli(encoder) => {
                encoder.as_mut().map(|encoder| std::mem::take(encoder.get_mut())).unwrap_or_default()
            }
            Self::Gzip(encoder) => std::mem::take(encoder.get_mut()),
        }
    }
}

/// An answer that is being compressed.
pub(crate) struct Compressing {
    encoder: Encoder,
    /// Something has been taken in of which not all may have come out.
    unflushed: bool,
    /// They come after the last of the body.
    pub(crate) trailers: Option<HeaderMap>,
    /// The last of the body has come out.
    pub(crate) ended: bool,
    running: Rc<Cell<u32>>,
}

impl Compressing {
    /// Takes a piece in, and gives what has come of it and those before, if that is anything.
    pub(crate) fn pass(&mut self, data: &[u8]) -> io::Result<Option<Bytes>> {
        self.unflushed = true;
        self.encoder.writer().map_or(Ok(()), |writer| writer.write_all(data))?;
        Ok(some(self.encoder.written()))
    }

    /// Gives everything that was taken in: nothing more is there at the moment, and somebody waits for it.
    pub(crate) fn flush(&mut self) -> io::Result<Option<Bytes>> {
        if !std::mem::take(&mut self.unflushed) {
            return Ok(None);
        }
        self.encoder.writer().map_or(Ok(()), Write::flush)?;
        Ok(some(self.encoder.written()))
    }

    /// Gives the last of the body.
    pub(crate) fn finish(&mut self) -> io::Result<Option<Bytes>> {
        (self.unflushed, self.ended) = (false, true);
        match &mut self.encoder {
            Encoder::Zstd(encoder) => encoder.do_finish()?,
            Encoder::Gzip(encoder) => encoder.try_finish()?,
            Encoder::Brotli(encoder) => {
                let rest = encoder.take().map(|encoder| encoder.into_inner()).unwrap_or_default();
                return Ok(some(rest));
            }
        }
        Ok(some(self.encoder.written()))
    }
}

impl Drop for Compressing {
    fn drop(&mut self) {
        self.running.set(self.running.get() - 1);
    }
}

fn some(bytes: Vec<u8>) -> Option<Bytes> {
    (!bytes.is_empty()).then(|| bytes.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn compression(min_bytes: u64) -> Compression {
        Compression {
            codings: Coding::ALL.to_vec(),
            types: vec!["text/*".into(), "application/json".into()],
            min_bytes,
        }
    }

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        fields.iter().map(pair).collect()
    }

    #[test]
    fn a_client_gets_what_it_likes_best_of_what_there_is() {
        use Coding::{Brotli, Gzip, Zstd};
        for (accepts, expected) in [
            ("gzip, deflate, br, zstd", Some(Zstd)),
            ("gzip, deflate, br", Some(Brotli)),
            ("gzip", Some(Gzip)),
            ("x-gzip", Some(Gzip)),
            ("GZIP;q=0.5, br;q=0.4", Some(Gzip)),
            ("zstd;q=0, *", Some(Brotli)),
            ("*;q=0.1", Some(Zstd)),
            ("identity, gzip;q=0.5", None),
            ("identity;q=0.5, gzip;q=0.5", Some(Gzip)),
            ("gzip;q=0", None),
            ("gzip;q=2", None),
            ("gzip;q=x", None),
            ("gzip;level=9", None),
            ("deflate", None),
            ("", None),
            (",,;,", None),
        ] {
            assert_eq!(choose(&compression(0), &map(&[("accept-encoding", accepts)])), expected, "{accepts}");
        }
        assert_eq!(choose(&compression(0), &HeaderMap::new()), None);
        let gzip_first = Compression { codings: vec![Gzip, Zstd], ..compression(0) };
        assert_eq!(choose(&gzip_first, &map(&[("accept-encoding", "zstd, gzip")])), Some(Gzip));
        assert_eq!(choose(&gzip_first, &map(&[("accept-encoding", "br")])), None);
    }

    fn begun(method: &Method, status: u16, length: Option<u64>, headers: &mut HeaderMap) -> bool {
        let running = Rc::default();
        let status = StatusCode::from_u16(status).expect("a status");
        let asked = Asked { method, status, length, coding: Some(Coding::Gzip), running: &running };
        begin(&compression(100), &asked, headers).is_some()
    }

    #[test]
    fn what_is_encoded_small_in_parts_or_not_to_be_changed_goes_on_as_it_is() {
        let text = ("content-type", "Text/HTML; charset=utf-8");
        let mut plain =
            map(&[text, ("etag", "\"a\""), ("content-length", "5000"), ("accept-ranges", "bytes")]);
        assert!(begun(&Method::GET, 200, Some(5_000), &mut plain));
        assert_eq!(
            plain,
            map(&[
                ("content-type", "Text/HTML; charset=utf-8"),
                ("vary", "accept-encoding"),
                ("content-encoding", "gzip"),
                ("etag", "W/\"a\""),
            ])
        );
        assert!(begun(&Method::POST, 500, None, &mut map(&[text])));
        for (status, length, fields) in [
            (200, Some(99), vec![text]),
            (200, Some(0), vec![text]),
            (204, None, vec![text]),
            (206, Some(5_000), vec![text]),
            (304, None, vec![text]),
            (200, None, vec![text, ("content-encoding", "identity")]),
            (200, None, vec![text, ("content-range", "bytes 0-1/2")]),
            (200, None, vec![text, ("cache-control", "max-age=1, No-Transform")]),
            (200, None, vec![text, ("content-digest", "sha-256=:x:")]),
            (200, None, vec![("content-type", "image/png")]),
            (200, None, vec![("content-type", "text/event-stream; charset=utf-8")]),
            (200, None, vec![("content-type", "application/grpc+proto")]),
            (200, None, vec![]),
        ] {
            let mut headers = map(&fields);
            assert!(!begun(&Method::GET, status, length, &mut headers), "{fields:?}");
            assert_eq!(headers, map(&fields), "nothing is changed");
        }
    }

    #[test]
    fn the_head_of_an_answer_without_its_body_is_that_of_the_whole_answer() {
        let fields = [("content-type", "text/css"), ("content-length", "5000"), ("vary", "Origin")];
        let mut headers = map(&fields);
        assert!(!begun(&Method::HEAD, 200, Some(0), &mut headers));
        assert_eq!(headers["content-encoding"], "gzip");
        assert!(!headers.contains_key("content-length") && headers.get_all("vary").iter().count() == 2);
        let mut small = map(&[("content-type", "text/css"), ("content-length", "99")]);
        assert!(!begun(&Method::HEAD, 200, Some(0), &mut small));
        assert_eq!(small["content-length"], "99");
    }

    #[test]
    fn so_many_at_a_time_are_compressed_and_those_that_end_make_room() {
        let running = Rc::default();
        let begin_one = || {
            let asked = Asked {
                method: &Method::GET,
                status: StatusCode::OK,
                length: None,
                coding: Some(Coding::Gzip),
                running: &running,
            };
            let mut headers = map(&[("content-type", "text/css")]);
            let begun = begin(&compression(0), &asked, &mut headers);
            assert_eq!(begun.is_some(), headers.contains_key("content-encoding"));
            assert_eq!(headers["vary"], "accept-encoding", "caches have to know all the same");
            begun
        };
        let mut all: Vec<_> = (0..MAX_AT_A_TIME).map(|_| begin_one().expect("there is room")).collect();
        assert!(begin_one().is_none());
        all.pop();
        assert!(begin_one().is_some());
        drop(all);
        assert_eq!(running.get(), 0);
    }

    fn plain(coding: Coding, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        match coding {
            Coding::Zstd => out = zstd::stream::decode_all(bytes).expect("zstd"),
            Coding::Brotli => {
                brotli::Decompressor::new(bytes, 4_096).read_to_end(&mut out).map(drop).expect("br")
            }
            Coding::Gzip => {
                flate2::read::GzDecoder::new(bytes).read_to_end(&mut out).map(drop).expect("gzip")
            }
        }
        out
    }

    #[test]
    fn what_goes_in_comes_out_in_every_coding_and_at_every_flush_all_of_it() {
        let text: Vec<u8> =
            (0..40_000_u32).flat_map(|n| format!("{} line\n", n % 977).into_bytes()).collect();
        for coding in Coding::ALL {
            for length in [None, Some(text.len() as u64)] {
                let encoder = Encoder::new(coding, length).expect("an encoder");
                let running = Rc::new(Cell::new(1));
                let mut one =
                    Compressing { encoder, unflushed: false, trailers: None, ended: false, running };
                let mut whole = Vec::new();
                let mut so_far = |bytes: Option<Bytes>| {
                    whole.extend_from_slice(&bytes.unwrap_or_default());
                    whole.len()
                };
                assert_eq!(one.flush().expect("nothing"), None);
                let mut flushed = 0;
                for (n, piece) in text.chunks(7_001).enumerate() {
                    so_far(one.pass(piece).expect("it is taken"));
                    if n % 5 == 0 {
                        let more = so_far(one.flush().expect("it is given"));
                        assert!(more > flushed, "{coding:?}: a flush gives something");
                        flushed = more;
                        assert_eq!(one.flush().expect("nothing"), None);
                    }
                }
                so_far(one.finish().expect("it ends"));
                assert!(plain(coding, &whole) == text, "{coding:?}");
                assert!(whole.len() < text.len() / 4, "{coding:?}: {}", whole.len());
            }
        }
    }
}
