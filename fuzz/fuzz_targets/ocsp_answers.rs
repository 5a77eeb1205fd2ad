//! What an OCSP responder answers for one certificate. The seeds are answers that the issuer, and a responder that it has
//! delegated to, have signed: whatever is made of them, nothing passes that says something else than they do. The same bytes as a
//! certificate: the responder that it names is an address in clear text, and not longer than addresses are.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_certs::fuzzing::{responder, responder_answer};

const CERTIFICATE: &[u8] = include_bytes!("../fixtures/ocsp/certificate.der");
const ISSUER: &[u8] = include_bytes!("../fixtures/ocsp/issuer.der");
/// A moment at which the answers hold, and between which two they were made, in milliseconds of Unix time.
const NOW_MS: u64 = 1_800_000_000_000;
const MADE_MS: std::ops::Range<u64> = 1_795_462_680_000..1_795_462_700_000;
const DAYS_MS: u64 = 3_650 * 24 * 3_600_000;
const MAX_URL_BYTES: usize = 1_024;

fuzz_target!(|data: &[u8]| {
    match responder_answer(CERTIFICATE, ISSUER, data, NOW_MS) {
        Ok(said) => {
            assert!(MADE_MS.contains(&said.this_update_ms), "{said:?}");
            assert_eq!(said.next_update_ms - said.this_update_ms, DAYS_MS, "{said:?}");
        }
        Err(why) => assert!(!why.is_empty()),
    }
    if let Some(url) = responder(data) {
        assert!(url.len() <= MAX_URL_BYTES && url.to_ascii_lowercase().starts_with("http://"), "{url:?}");
    }
});
