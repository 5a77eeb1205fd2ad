//! What a certificate authority answers: whatever it is, what is said of it is one line that fits into a state, and the time to
//! come back is bounded. The same bytes as a chain: what is read of it is there, and names no longer than names are.
//!
//! Three lines (status, content type, retry after), then the body.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_certs::fuzzing::{answer, chain};

const MAX_TEXT_CHARS: usize = 600;
const MAX_AFTER_MS: u64 = 7 * 24 * 3_600_000;
const MAX_CHAIN: usize = 10;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(4, |byte| *byte == b'\n');
    let mut next = || parts.next().unwrap_or_default();
    let (status, kind, after, body) = (next(), next(), next(), next());
    let status = std::str::from_utf8(status).ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    if let Err(told) = answer(status, kind, after, after, body) {
        assert!(told.text.chars().count() <= MAX_TEXT_CHARS, "{} characters", told.text.chars().count());
        assert!(!told.text.chars().any(char::is_control), "{:?}", told.text);
        assert!(told.after_ms.is_none_or(|ms| ms <= MAX_AFTER_MS));
    }
    let Ok(text) = std::str::from_utf8(body) else { return };
    match chain(text) {
        Ok((certificates, leaf)) => {
            assert!((1..=MAX_CHAIN).contains(&certificates));
            for name in &leaf.names {
                assert!(leaf.covers(name), "{name:?}");
                assert!(!name.chars().any(|c| c.is_control() || c.is_ascii_uppercase()), "{name:?}");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
