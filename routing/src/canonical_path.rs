//! The one form of a path that decides on the route and goes on to the origin (RFC 3986 §6.2.2), and the paths that
//! have no such form because origins read them in two ways.
//!
//! ```text
//!   /%61pi/./v1/..  ──► /api/            what means the same becomes the same, and goes on so
//!   /a\b  /%00  /%zz  /..  ──► refused   what no reader can be sure of
//!   /x/..%2fapi  /x/..;/api ──► refused  a step up that only some readers see
//!   //api  /api;v=1  /%61pi%2fv1 ──► as they are, and beside them the other reading: /api, /api, /api/v1.
//!                                        Whoever routes compares where both lead.
//! ```
//!
//! An origin that merges slashes, decodes `%2F` or drops path parameters is right in its own way. So the edge
//! does not do that for everybody; it only sees to it that none of it leads past a route.

use std::borrow::Cow;

use crate::path::PathError;

/// Times that an escaped escape (`%252F`) is followed in the other reading.
const MAX_ESCAPE_DEPTH: usize = 3;

/// A path in its canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CanonicalPath<'a> {
    /// What is routed and goes on.
    pub path: Cow<'a, str>,
    /// How the most generous origin would read it (`%2F`, `%5C` and escaped escapes decoded, path parameters off,
    /// slashes merged), if that is something else.
    pub other_reading: Option<Box<str>>,
}

/// Brings a path (without query) into its canonical form: escapes in upper case, those of unreserved characters decoded,
/// bytes that have to be escaped escaped, dot segments resolved (RFC 3986 §6.2.2, §5.2.4). Borrows when nothing has
/// to change, which one look at each byte tells.
///
/// # Errors
/// [`PathError`] for a path that is not absolute or that nobody can be sure how to read; the request deserves a 400.
pub fn canonical_path(path: &str) -> Result<CanonicalPath<'_>, PathError> {
    if !path.starts_with('/') {
        return Err(PathError::NotAbsolute);
    }
    if is_plain(path.as_bytes()) {
        return Ok(CanonicalPath { path: Cow::Borrowed(path), other_reading: None });
    }
    let escaped = normal_escapes(path.as_bytes())?;
    let canonical = resolve_dots(&escaped).ok_or(PathError::AboveRoot)?;
    let other_reading = generous(&canonical)?.filter(|other| *other != *canonical);
    let path = if canonical == path { Cow::Borrowed(path) } else { Cow::Owned(canonical) };
    Ok(CanonicalPath { path, other_reading: other_reading.map(Into::into) })
}

/// Whether there is nothing in a path that could be written in another way. Made so that it is a handful of wide
/// instructions for a path of usual length.
fn is_plain(path: &[u8]) -> bool {
    let odd = |byte: u8| byte <= b' ' || byte >= 0x7f || matches!(byte, b'%' | b'\\' | b';' | b'?' | b'#');
    let odd_bytes = path.iter().fold(false, |found, byte| found | odd(*byte));
    let after = path.get(1..).unwrap_or_default();
    let odd_pairs =
        path.iter().zip(after).fold(false, |found, (a, b)| found | (*a == b'/' && matches!(b, b'/' | b'.')));
    !odd_bytes && !odd_pairs
}

fn hex(byte: u8) -> Option<u8> {
    (byte as char).to_digit(16).map(|digit| digit as u8)
}

/// The byte that an escape at `at` stands for.
fn escaped_byte(path: &[u8], at: usize) -> Option<u8> {
    match path.get(at..at + 3)? {
        [b'%', high, low] => Some(hex(*high)? << 4 | hex(*low)?),
        _ => None,
    }
}

fn push_escape(out: &mut String, byte: u8) {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    out.extend(['%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
}

/// RFC 3986 §6.2.2.1 and §6.2.2.2, and the escapes that a sender left out.
fn normal_escapes(path: &[u8]) -> Result<String, PathError> {
    let mut out = String::with_capacity(path.len() + 16);
    let mut at = 0;
    while let Some(byte) = path.get(at) {
        at += 1;
        match *byte {
            b'%' => {
                let meant = escaped_byte(path, at - 1).ok_or(PathError::BadEscape)?;
                at += 2;
                match meant {
                    0 => return Err(PathError::BadCharacter),
                    b if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => out.push(b as char),
                    b => push_escape(&mut out, b),
                }
            }
            // Browsers make a slash of it (URL Standard, "path state"), other clients do not.
            b'\\' => return Err(PathError::Backslash),
            b if b <= b' ' || b == 0x7f || b == b'?' || b == b'#' => return Err(PathError::BadCharacter),
            b if b >= 0x80 => push_escape(&mut out, b),
            b => out.push(b as char),
        }
    }
    Ok(out)
}

/// RFC 3986 §5.2.4, but for a step above the root, which there is none of.
fn resolve_dots(path: &str) -> Option<String> {
    if !path.contains("/.") {
        return Some(path.to_owned());
    }
    let mut out = String::with_capacity(path.len());
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => out.truncate(out.rfind('/')?),
            _ => {
                out.push('/');
                out.push_str(segment);
                continue;
            }
        }
        if is_last {
            out.push('/');
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    Some(out)
}

/// The other reading of a canonical path; `None` if there is nothing to read otherwise.
fn generous(path: &str) -> Result<Option<String>, PathError> {
    if ![";", "//", "%2F", "%3B", "%5C", "%25"].iter().any(|part| path.contains(part)) {
        return Ok(None);
    }
    let mut decoded = path.as_bytes().to_vec();
    for _ in 0..MAX_ESCAPE_DEPTH {
        decoded = decode_separators(&decoded)?;
    }
    let mut out = String::with_capacity(decoded.len());
    for segment in decoded.split(|byte| matches!(byte, b'/' | b'\\')) {
        let segment = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        match segment {
            [] => {}
            b"." | b".." => return Err(PathError::HiddenDots),
            _ => {
                out.push('/');
                // What was canonical is ASCII, and only ASCII was decoded.
                out.extend(segment.iter().map(|byte| *byte as char));
            }
        }
    }
    if out.is_empty() || decoded.ends_with(b"/") {
        out.push('/');
    }
    Ok(Some(out))
}

/// Decodes what separates segments, and one level of escaped escapes.
fn decode_separators(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut out = Vec::with_capacity(path.len());
    let mut at = 0;
    while let Some(byte) = path.get(at) {
        match escaped_byte(path, at) {
            Some(0) => return Err(PathError::BadCharacter),
            Some(meant @ (b'/' | b'\\' | b'%' | b';' | b'.')) => {
                out.push(meant);
                at += 3;
            }
            Some(meant) if meant.is_ascii_alphanumeric() || b"-_~".contains(&meant) => {
                out.push(meant);
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(path: &str) -> Result<(String, Option<String>), PathError> {
        canonical_path(path).map(|found| (found.path.into_owned(), found.other_reading.map(Into::into)))
    }

    fn plainly(path: &str) -> Result<(String, Option<String>), PathError> {
        Ok((path.to_owned(), None))
    }

    #[test]
    fn a_path_that_is_canonical_is_borrowed() {
        for path in ["/", "/a/b.html", "/a/", "/a...b/c", "/~user/x_y-z", "/a:b@c,d!$&'()*+=", "/a|{}\"^`[]"]
        {
            let found = canonical_path(path).expect("is a path");
            assert!(matches!(found.path, Cow::Borrowed(_)) && found.other_reading.is_none(), "{path}");
        }
    }

    #[test]
    fn what_means_the_same_becomes_the_same() {
        for (sent, meant) in [
            ("/%61dmin", "/admin"),
            ("/%7euser/%2e", "/~user/"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/café", "/caf%C3%A9"),
            ("/a/./b", "/a/b"),
            ("/a/../admin", "/admin"),
            ("/a/%2e%2E/admin", "/admin"),
            ("/a/.%2e/admin/..", "/"),
            ("/a/b/../..", "/"),
            ("/a/.", "/a/"),
            ("/a/..b/.c", "/a/..b/.c"),
            ("/.well-known/x", "/.well-known/x"),
            ("/a%20b%3f%23", "/a%20b%3F%23"),
        ] {
            assert_eq!(canonical(sent), plainly(meant), "{sent}");
        }
    }

    #[test]
    fn what_nobody_can_be_sure_of_is_refused() {
        for (sent, error) in [
            ("admin", PathError::NotAbsolute),
            ("", PathError::NotAbsolute),
            ("/..", PathError::AboveRoot),
            ("/a/../../admin", PathError::AboveRoot),
            ("/%2e%2e/admin", PathError::AboveRoot),
            ("/a\\b", PathError::Backslash),
            ("/a%00", PathError::BadCharacter),
            ("/a%2500", PathError::BadCharacter),
            ("/a%", PathError::BadEscape),
            ("/a%4", PathError::BadEscape),
            ("/a%zz", PathError::BadEscape),
            ("/a%+1", PathError::BadEscape),
            ("/x/..%2fadmin", PathError::HiddenDots),
            ("/x/..%5cadmin", PathError::HiddenDots),
            ("/x%2f..%2fadmin", PathError::HiddenDots),
            ("/x/..;/admin", PathError::HiddenDots),
            ("/x/.;a=b/admin", PathError::HiddenDots),
            ("/x/%252e%252e/admin", PathError::HiddenDots),
            ("/x/%252e%252e%252fadmin", PathError::HiddenDots),
            ("/x/..%3b/admin", PathError::HiddenDots),
            ("/x/%25252e%25252e/admin", PathError::HiddenDots),
        ] {
            assert_eq!(canonical(sent), Err(error), "{sent}");
        }
    }

    #[test]
    fn what_origins_read_in_two_ways_has_both_readings() {
        for (sent, path, other) in [
            ("//admin", "//admin", "/admin"),
            ("/a//b/", "/a//b/", "/a/b/"),
            ("/admin;v=1/x", "/admin;v=1/x", "/admin/x"),
            ("/group%2fproject", "/group%2Fproject", "/group/project"),
            ("/a%5cb", "/a%5Cb", "/a/b"),
            ("/%2561dmin", "/%2561dmin", "/admin"),
            ("/a%252Fb", "/a%252Fb", "/a/b"),
            ("/;", "/;", "/"),
        ] {
            assert_eq!(canonical(sent), Ok((path.to_owned(), Some(other.to_owned()))), "{sent}");
        }
        assert_eq!(canonical("/100%25"), Ok(("/100%25".to_owned(), Some("/100%".to_owned()))));
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_its_own_and_has_no_dots(path in "/([a./;%\\\\é]|%2[eEfF5]|%5[cC]|%61|\\.\\./|\\./){0,12}") {
            if let Ok(found) = canonical_path(&path) {
                let again = canonical_path(&found.path).expect("stays a path");
                prop_assert_eq!(&again.path, &found.path);
                prop_assert_eq!(&again.other_reading, &found.other_reading);
                prop_assert!(found.path.split('/').all(|segment| segment != "." && segment != ".."));
                let other = found.other_reading.as_deref().unwrap_or("/");
                prop_assert!(other.split('/').all(|segment| segment != "." && segment != ".."), "{}", other);
                prop_assert!(!other.contains("//") && !other.contains(';'), "{}", other);
            }
        }

        #[test]
        fn the_first_look_agrees_with_the_long_way(path in "/[ -~]{0,20}") {
            if is_plain(path.as_bytes()) {
                prop_assert_eq!(normal_escapes(path.as_bytes()), Ok(path.clone()));
                prop_assert_eq!(resolve_dots(&path), Some(path.clone()));
                prop_assert_eq!(generous(&path), Ok(None));
            }
        }
    }
}
