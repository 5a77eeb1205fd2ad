//! Where the frames of a WebSocket end: cut anywhere they end at the same places, and as for a reader that has all of
//! them. The first byte says how they are cut.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_proxy::fuzzing::WebSocket;

fuzz_target!(|data: &[u8]| {
    let Some((step, bytes)) = data.split_first() else { return };
    let mut in_pieces = WebSocket::default();
    bytes.chunks(usize::from(*step).max(1)).for_each(|piece| in_pieces.pass(piece));
    assert_eq!(in_pieces.is_between_and_closed(), read(bytes));
});

/// Whether the bytes are whole frames, and whether a `Close` is among them (RFC 6455 §5.2).
fn read(mut bytes: &[u8]) -> (bool, bool) {
    let mut closed = false;
    while !bytes.is_empty() {
        let Some((head, length)) = head(bytes) else { return (false, closed) };
        if length >> 63 != 0 {
            return (false, closed);
        }
        let key = if bytes[1] & 0x80 == 0 { 0 } else { 4 };
        let frame = u128::from(length) + key + head as u128;
        if (bytes.len() as u128) < frame {
            return (false, closed);
        }
        closed |= bytes[0] & 0x0f == 0x8;
        bytes = &bytes[frame as usize..];
    }
    (true, closed)
}

/// Length of a frame's header without its masking key, and of its payload.
fn head(bytes: &[u8]) -> Option<(usize, u64)> {
    match bytes.get(1)? & 0x7f {
        126 => Some((4, u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)))),
        127 => Some((10, u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?))),
        short => Some((2, u64::from(short))),
    }
}
