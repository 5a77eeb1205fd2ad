//! Which protocol a client speaks, by its first bytes. Nothing is eaten: what looked like HTTP/2 and
//! then was not goes to the HTTP/1.1 parser, which refuses it aloud.

/// The connection preface (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detected {
    /// Too few bytes.
    Unclear,
    Http1,
    Http2,
}

pub(crate) fn detect(first: &[u8]) -> Detected {
    let common = first.iter().zip(PREFACE).take_while(|(a, b)| a == b).count();
    if common == PREFACE.len() {
        Detected::Http2
    } else if common == first.len() {
        Detected::Unclear
    } else {
        Detected::Http1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preface_is_http2_and_everything_else_is_not() {
        for cut in 0..PREFACE.len() {
            assert_eq!(detect(&PREFACE[..cut]), Detected::Unclear);
            let mut wrong = PREFACE[..cut].to_vec();
            wrong.push(b'x');
            assert_eq!(detect(&wrong), Detected::Http1, "{}", String::from_utf8_lossy(&wrong));
        }
        assert_eq!(detect(PREFACE), Detected::Http2);
        assert_eq!(detect(b"PUT / HTTP/1.1\r\n"), Detected::Http1);
        assert_eq!(detect(&[PREFACE, b"\0\0\0"].concat()), Detected::Http2);
    }
}
