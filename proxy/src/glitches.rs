//! Counts what HTTP/2 clients send that is work for the edge and use for nobody, and ends the connections of those who
//! send too much of it.
//!
//! PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM, empty DATA, CONTINUATION and frames of unknown types are all
//! allowed, and a good client sends a few. A flood of them costs its sender nothing. Each has a price; a connection has a
//! budget for it, which grows again with requests, with what the client is sent, and with time. So the work for such
//! frames stays in proportion to the work that is wanted, whatever the kind of flood.
//!
//! Only headers of frames are read (RFC 9113 §4.1), beside the parser, which judges the frames. Never decides about
//! anything but the connection's end.

/// A frame's header (RFC 9113 §4.1).
const HEAD_BYTES: usize = 9;
/// What comes before the first frame (RFC 9113 §3.4).
const PREFACE_BYTES: u32 = 24;
/// What a request gives back: some frames of every kind belong to each.
const EARNED_BY_REQUEST: u32 = 4;
/// Bytes to the client that pay for one point: what is taken is acknowledged by frames, also by clients that do so for
/// each event of a stream. The answer to a PING has 17 and must not pay for the next one.
const SENT_BYTES_PER_POINT: u32 = 32;
/// Time that pays for one point: five a second, so that pings that keep a connection alive may go on for ever.
const MS_PER_POINT: u64 = 200;

const FLAG_END_STREAM: u8 = 0x1;
const FLAG_END_HEADERS: u8 = 0x4;

/// The client has sent too much of what nobody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flood;

/// The frames of one connection.
#[derive(Debug)]
pub(crate) struct Glitches {
    head: [u8; HEAD_BYTES],
    /// Bytes of a header that have come, while it is not whole.
    have: usize,
    /// Bytes of a payload that are still to come.
    left: u32,
    /// Points that are left, and the most there can be.
    points: u32,
    most: u32,
    /// Bytes to the client that have not paid for a point yet.
    sent: u32,
    paid_until_ms: u64,
}

impl Glitches {
    pub(crate) const fn new(budget: u32, now_ms: u64) -> Self {
        Self {
            head: [0; HEAD_BYTES],
            have: 0,
            left: PREFACE_BYTES,
            points: budget,
            most: budget,
            sent: 0,
            paid_until_ms: now_ms,
        }
    }

    /// Looks at what has come.
    pub(crate) fn read(&mut self, mut bytes: &[u8], now_ms: u64) -> Result<(), Flood> {
        let points = now_ms.saturating_sub(self.paid_until_ms) / MS_PER_POINT;
        self.paid_until_ms += points * MS_PER_POINT;
        self.earn(u32::try_from(points).unwrap_or(u32::MAX));
        while !bytes.is_empty() {
            if self.left > 0 {
                let here = bytes.len().min(self.left as usize);
                self.left -= here as u32;
                bytes = &bytes[here..];
                continue;
            }
            let here = bytes.len().min(HEAD_BYTES - self.have);
            self.head[self.have..self.have + here].copy_from_slice(&bytes[..here]);
            self.have += here;
            bytes = &bytes[here..];
            if self.have == HEAD_BYTES {
                self.have = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    /// Takes note of bytes that the client was sent.
    pub(crate) fn sent(&mut self, bytes: usize) {
        let sent = u64::from(self.sent) + bytes as u64;
        self.sent = (sent % u64::from(SENT_BYTES_PER_POINT)) as u32;
        self.earn(u32::try_from(sent / u64::from(SENT_BYTES_PER_POINT)).unwrap_or(u32::MAX));
    }

    fn earn(&mut self, points: u32) {
        self.points = self.points.saturating_add(points).min(self.most);
    }

    fn frame(&mut self) -> Result<(), Flood> {
        let [high, mid, low, kind, flags, ..] = self.head;
        self.left = u32::from_be_bytes([0, high, mid, low]);
        let is_empty = self.left == 0;
        let price = match kind {
            // DATA without any, but for the end of a body.
            0x0 => 5 * u32::from(is_empty && flags & FLAG_END_STREAM == 0),
            0x1 => {
                self.earn(EARNED_BY_REQUEST);
                2 * u32::from(flags & FLAG_END_HEADERS == 0) + 10 * u32::from(is_empty)
            }
            // PRIORITY, RST_STREAM, WINDOW_UPDATE, PRIORITY_UPDATE (RFC 9218 §7.1).
            0x2 | 0x3 | 0x8 | 0x10 => 1,
            // SETTINGS, PUSH_PROMISE, GOAWAY: once in a connection, or never.
            0x4 if flags & 1 == 0 => 10,
            0x5 | 0x7 => 10,
            // CONTINUATION.
            0x9 => 2 + 8 * u32::from(is_empty),
            // PING, acknowledgements, unknown types.
            _ => 2,
        };
        match self.points.checked_sub(price) {
            Some(left) => {
                self.points = left;
                Ok(())
            }
            None => Err(Flood),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: u32 = 1_000;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, high, mid, low] = (payload.len() as u32).to_be_bytes();
        [&[high, mid, low, kind, flags, 0, 0, 0, 1][..], payload].concat()
    }

    fn after_preface() -> Glitches {
        let mut glitches = Glitches::new(BUDGET, 1);
        glitches.read(&[b'x'; 24], 1).expect("is the preface");
        glitches
    }

    /// How many frames it takes to be ended, if they do.
    fn ended_after(frame: &[u8], step: usize) -> Option<usize> {
        let mut glitches = after_preface();
        (0..20_000).find(|_| frame.chunks(step).any(|piece| glitches.read(piece, 1).is_err()))
    }

    #[test]
    fn every_kind_of_flood_ends_a_connection() {
        for (kind, flags, payload, most) in [
            (0x0, 0, 0, 200),    // empty DATA
            (0x1, 0, 0, 200),    // empty HEADERS without their end
            (0x2, 0, 5, 1_000),  // PRIORITY
            (0x3, 0, 4, 1_000),  // RST_STREAM
            (0x4, 0, 0, 100),    // SETTINGS
            (0x4, 1, 0, 500),    // acknowledged SETTINGS
            (0x6, 0, 8, 500),    // PING
            (0x6, 1, 8, 500),    // acknowledged PING
            (0x8, 0, 4, 1_000),  // WINDOW_UPDATE
            (0x9, 0, 0, 100),    // empty CONTINUATION
            (0x9, 0, 10, 500),   // CONTINUATION
            (0x10, 0, 4, 1_000), // PRIORITY_UPDATE
            (0xbb, 0, 100, 500), // unknown
        ] {
            for step in [1, 4, 1_000] {
                let ended = ended_after(&frame(kind, flags, &vec![0; payload]), step);
                assert!(ended.is_some_and(|frames| frames <= most), "{kind:#x} {flags}: {ended:?}");
            }
        }
    }

    #[test]
    fn what_carries_something_is_free() {
        assert_eq!(ended_after(&frame(0x0, 0, b"data"), 3), None);
        assert_eq!(ended_after(&frame(0x0, FLAG_END_STREAM, b""), 9), None);
        assert_eq!(ended_after(&frame(0x1, FLAG_END_HEADERS | FLAG_END_STREAM, b"head"), 5), None);
    }

    #[test]
    fn a_client_that_takes_what_it_asked_for_may_acknowledge_each_piece_of_it() {
        let mut glitches = after_preface();
        let update = frame(0x8, 0, &[0, 0, 0, 1]);
        for _ in 0..20_000 {
            glitches.sent(64);
            glitches.read(&update, 1).expect("one for the stream");
            glitches.read(&update, 1).expect("one for the connection");
        }
        // The answer to a PING does not pay for the next.
        let ping = frame(0x6, 0, &[0; 8]);
        let ended = (0..20_000).any(|_| {
            glitches.sent(17);
            glitches.read(&ping, 1).is_err()
        });
        assert!(ended);
    }

    #[test]
    fn pings_that_keep_a_connection_alive_may_go_on_for_ever() {
        let (mut glitches, ping) = (after_preface(), frame(0x6, 0, &[0; 8]));
        for second in 0..100_000 {
            glitches.read(&ping, second * 1_000).expect("one a second");
        }
    }
}
