//! A chunked body beside the parser: cut anywhere it is followed alike, and as by a reader that has all of it and knows
//! one form only (RFC 9112 §7.1). The first byte says how it is cut.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_proxy::fuzzing::Front;

const HEAD: &[u8] = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
const MAX_EXTENSION_BYTES: usize = 1024;

/// What there is of a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Ends(usize),
    Goes,
    Breaks,
}

fuzz_target!(|data: &[u8]| {
    let Some((step, body)) = data.split_first() else { return };
    let expected = read(body);
    let sent = if let Body::Ends(length) = expected { &body[..length] } else { body };

    let mut front = Front::default();
    assert!(front.read(HEAD) && front.head(None).is_ok());
    let pieces = usize::from(*step).max(1);
    let is_fine = sent.chunks(pieces).all(|piece| front.read(piece));
    assert_eq!(is_fine, expected != Body::Breaks, "in pieces of {pieces}");
    if is_fine {
        assert_eq!(front.is_at_head(), matches!(expected, Body::Ends(_)));
    }
    // What came with the head is judged with it.
    let mut front = Front::default();
    assert!(front.read(&[HEAD, sent].concat()));
    assert_eq!(front.head(None).is_ok(), is_fine);
});

fn read(body: &[u8]) -> Body {
    let mut at = 0;
    loop {
        let line = match line(&body[at..]) {
            Line::Whole(line) => line,
            Line::Begun([]) => return Body::Goes,
            Line::Begun(begun) | Line::Ending(begun) => {
                return if size(begun).is_some() { Body::Goes } else { Body::Breaks };
            }
            Line::Bad => return Body::Breaks,
        };
        let Some(size) = size(line) else { return Body::Breaks };
        at += line.len() + 2;
        if size == 0 {
            return trailers(body, at);
        }
        let Some(end) = usize::try_from(size).ok().and_then(|size| at.checked_add(size)) else {
            return Body::Goes;
        };
        match body.get(end..) {
            None | Some([] | [b'\r']) => return Body::Goes,
            Some([b'\r', b'\n', ..]) => at = end + 2,
            Some(_) => return Body::Breaks,
        }
    }
}

fn trailers(body: &[u8], mut at: usize) -> Body {
    loop {
        match line(&body[at..]) {
            Line::Whole([]) => return Body::Ends(at + 2),
            Line::Whole(line) => at += line.len() + 2,
            Line::Begun(_) | Line::Ending(_) => return Body::Goes,
            Line::Bad => return Body::Breaks,
        }
    }
}

enum Line<'a> {
    Whole(&'a [u8]),
    Begun(&'a [u8]),
    /// Up to its CR, and nothing behind it.
    Ending(&'a [u8]),
    Bad,
}

/// A line up to CR LF; a CR or LF for itself is none.
fn line(bytes: &[u8]) -> Line<'_> {
    match bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')) {
        None => Line::Begun(bytes),
        Some(end) => match bytes[end..] {
            [b'\r', b'\n', ..] => Line::Whole(&bytes[..end]),
            [b'\r'] => Line::Ending(&bytes[..end]),
            _ => Line::Bad,
        },
    }
}

fn size(line: &[u8]) -> Option<u64> {
    let end = line.iter().position(|byte| *byte == b';').unwrap_or(line.len());
    let (digits, extensions) = line.split_at(end);
    let fine = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
    let is_fine = !digits.is_empty()
        && digits.iter().all(u8::is_ascii_hexdigit)
        && extensions.len() <= MAX_EXTENSION_BYTES + 1
        && extensions.iter().all(fine);
    if !is_fine {
        return None;
    }
    digits.iter().try_fold(0_u64, |size, digit| {
        size.checked_mul(16)?.checked_add(u64::from((*digit as char).to_digit(16)?))
    })
}
