//! Random bits, request ids and trace context (W3C Trace Context, level 1), made without a lock.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, Hasher, RandomState};

use bytes::{Bytes, BytesMut};
use http::HeaderValue;

/// Longest request id that is passed on.
const MAX_REQUEST_ID_BYTES: usize = 128;
/// Ids are cut from blocks of this size: one allocation for many requests.
const BLOCK_BYTES: usize = 8 * 1024;
/// `00-` trace id `-` parent id `-` flags.
const TRACEPARENT_BYTES: usize = 55;

/// One core's source of random bits. Good for balancing and for names, not for secrets.
#[derive(Debug)]
pub(crate) struct Random(Cell<u64>);

impl Random {
    pub(crate) fn new() -> Self {
        // The standard library seeds its hashers from the operating system.
        Self(Cell::new(RandomState::new().build_hasher().finish()))
    }

    /// SplitMix64: 64 bits with full period.
    pub(crate) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// One core's maker of ids.
#[derive(Debug)]
pub(crate) struct IdMaker(RefCell<BytesMut>);

/// What names a request: the values of `x-request-id` and `traceparent`.
#[derive(Clone, Debug)]
pub(crate) struct Ids {
    pub(crate) request: HeaderValue,
    pub(crate) traceparent: HeaderValue,
}

impl Ids {
    /// The 32 digits of the trace id.
    pub(crate) fn trace(&self) -> &[u8] {
        self.traceparent.as_bytes().get(3..35).unwrap_or_default()
    }
}

impl IdMaker {
    pub(crate) fn new() -> Self {
        Self(RefCell::new(BytesMut::new()))
    }

    /// Keeps what the client sent and is well formed, and makes the rest. A request id that is made is
    /// the trace id, so that one name finds everything.
    pub(crate) fn ids(
        &self,
        random: &Random,
        request: Option<&HeaderValue>,
        traceparent: Option<&HeaderValue>,
    ) -> Ids {
        let (traceparent, made) = match traceparent {
            Some(sent) if is_traceparent(sent.as_bytes()) => (sent.clone(), None),
            _ => {
                let made = self.make_traceparent(random);
                (value(made.clone()), Some(made))
            }
        };
        let request = match request {
            Some(sent) if is_request_id(sent.as_bytes()) => sent.clone(),
            _ => made.map_or_else(
                || HeaderValue::from_bytes(&traceparent.as_bytes()[3..35]).unwrap_or_else(|_| none()),
                |made| value(made.slice(3..35)),
            ),
        };
        Ids { request, traceparent }
    }

    fn make_traceparent(&self, random: &Random) -> Bytes {
        let mut ids = [[0; 16]; 3];
        let bits = [random.next() | 1, random.next(), random.next() | 1];
        ids.iter_mut().zip(bits).for_each(|(id, bits)| hex(bits, id));
        let mut text = *b"00-aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbb-cccccccccccccccc-01";
        text[3..19].copy_from_slice(&ids[0]);
        text[19..35].copy_from_slice(&ids[1]);
        text[36..52].copy_from_slice(&ids[2]);
        let mut block = self.0.borrow_mut();
        if block.capacity() < TRACEPARENT_BYTES {
            *block = BytesMut::with_capacity(BLOCK_BYTES);
        }
        block.extend_from_slice(&text);
        block.split().freeze()
    }
}

fn value(bytes: Bytes) -> HeaderValue {
    HeaderValue::from_maybe_shared(bytes).unwrap_or_else(|_| none())
}

const fn none() -> HeaderValue {
    HeaderValue::from_static("-")
}

/// Two digits for each byte.
const HEX: [[u8; 2]; 256] = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [DIGITS[byte >> 4], DIGITS[byte & 15]];
        byte += 1;
    }
    pairs
};

fn hex(bits: u64, into: &mut [u8; 16]) {
    let (pairs, _) = into.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(bits.to_be_bytes()) {
        *pair = HEX[usize::from(byte)];
    }
}

fn is_request_id(id: &[u8]) -> bool {
    let fine = |b: &u8| b.is_ascii_alphanumeric() || b"-_.:+/=@~".contains(b);
    (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(fine)
}

/// Version, trace id and parent id are checked; a later version may be longer (§4.3 of the specification).
fn is_traceparent(text: &[u8]) -> bool {
    let lower_hex = |part: &[u8]| part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let some = |part: &[u8]| part.iter().any(|b| *b != b'0');
    if text.len() < TRACEPARENT_BYTES || text[2] != b'-' || text[35] != b'-' || text[52] != b'-' {
        return false;
    }
    let (version, trace, parent, flags) = (&text[..2], &text[3..35], &text[36..52], &text[53..55]);
    let length_fits = match version {
        b"00" => text.len() == TRACEPARENT_BYTES,
        b"ff" => false,
        _ => text.len() == TRACEPARENT_BYTES || text[55] == b'-',
    };
    length_fits
        && [version, trace, parent, flags].iter().all(|part| lower_hex(part))
        && some(trace)
        && some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn made(request: Option<&'static str>, trace: Option<&'static str>) -> Ids {
        let header = |text: Option<&'static str>| text.map(HeaderValue::from_static);
        IdMaker::new().ids(&Random::new(), header(request).as_ref(), header(trace).as_ref())
    }

    #[test]
    fn what_the_client_sent_is_kept_when_it_is_well_formed() {
        let ids = made(Some("abc-123"), Some(SENT));
        assert_eq!(ids.request, "abc-123");
        assert_eq!(ids.traceparent, SENT);
        assert_eq!(ids.trace(), b"4bf92f3577b34da6a3ce929d0e0e4736");
    }

    #[test]
    fn what_is_malformed_is_made_anew_and_well_formed() {
        let zero = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        for bad in ["", "00", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", zero] {
            let ids = made(Some("a b\"c"), Some(bad));
            assert!(is_traceparent(ids.traceparent.as_bytes()), "{:?}", ids.traceparent);
            assert_eq!(ids.request.as_bytes(), ids.trace());
        }
        assert!(!is_traceparent(SENT.to_uppercase().as_bytes()));
        assert!(!is_request_id(&[b'a'; 129]));
    }

    #[test]
    fn ids_do_not_repeat() {
        let (maker, random) = (IdMaker::new(), Random::new());
        let ids: std::collections::HashSet<_> =
            (0..10_000).map(|_| maker.ids(&random, None, None).request).collect();
        assert_eq!(ids.len(), 10_000);
    }
}
