//! Where the frames of a WebSocket end (RFC 6455 §5.2). Only headers are read: what a frame carries, its
//! extensions and its masking are the two ends' own matter.
//!
//! A frame's end is the one place where a frame of the edge may follow: between two frames of a fragmented
//! message too, for a `Close` is a control frame (§5.4).

/// The two bytes that every header begins with, and the longest length that may follow them.
const MAX_HEAD_BYTES: usize = 2 + 8;
const FIRST_HEAD_BYTES: usize = 2;
const MASKING_KEY_BYTES: u64 = 4;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
const OPCODE: u8 = 0x0f;
const CLOSE: u8 = 0x8;
/// Status code of a `Close`: "service restart" (IANA WebSocket Close Code Number Registry, 1012): come back.
const SERVICE_RESTART: u16 = 1012;

/// Follows one direction of a WebSocket from frame to frame.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    head: [u8; MAX_HEAD_BYTES],
    /// Bytes of a header that have passed, while it is not whole.
    have: u8,
    /// Bytes of the frame that are still to pass.
    left: u64,
    /// The frame under way is a `Close`.
    closing: bool,
    closed: bool,
    /// The length is none that a frame can have (§5.2: its first bit is 0). No further border is known.
    lost: bool,
}

impl Frames {
    /// Whether what has passed are whole frames.
    pub(crate) const fn is_between(&self) -> bool {
        self.left == 0 && self.have == 0 && !self.lost
    }

    /// Whether a `Close` has passed: nothing may follow it (§5.5.1).
    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Follows bytes on their way.
    pub(crate) fn pass(&mut self, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            at += self.step(&bytes[at..]);
        }
    }

    /// Follows bytes up to the end of the frame that is under way; how many those are.
    pub(crate) fn pass_frame(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() && !self.is_between() {
            at += self.step(&bytes[at..]);
        }
        at
    }

    /// Passes some bytes, at least one, and none beyond the end of a frame.
    fn step(&mut self, bytes: &[u8]) -> usize {
        if self.lost {
            return bytes.len();
        }
        if self.left > 0 {
            let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            self.left -= here as u64;
            self.end_frame();
            return here;
        }
        for (at, byte) in bytes.iter().enumerate() {
            self.head[usize::from(self.have)] = *byte;
            self.have += 1;
            if usize::from(self.have) == self.head_bytes() {
                self.begin_frame();
                return at + 1;
            }
        }
        bytes.len()
    }

    /// How long the header is, as far as that is known; its masking key is counted with the payload.
    fn head_bytes(&self) -> usize {
        match self.head[1] & !MASKED {
            _ if usize::from(self.have) < FIRST_HEAD_BYTES => FIRST_HEAD_BYTES,
            126 => FIRST_HEAD_BYTES + 2,
            127 => FIRST_HEAD_BYTES + 8,
            _ => FIRST_HEAD_BYTES,
        }
    }

    fn begin_frame(&mut self) {
        let [first, second, long @ ..] = self.head;
        let payload = match second & !MASKED {
            126 => u64::from(u16::from_be_bytes([long[0], long[1]])),
            127 => u64::from_be_bytes(long),
            short => u64::from(short),
        };
        self.have = 0;
        self.closing = first & OPCODE == CLOSE;
        self.lost = payload >> 63 != 0;
        // A length that is none may be as long as numbers go.
        self.left = payload.saturating_add(if second & MASKED == 0 { 0 } else { MASKING_KEY_BYTES });
        self.end_frame();
    }

    fn end_frame(&mut self) {
        if self.left == 0 {
            self.closed |= self.closing;
        }
    }
}

/// A `Close` that says "service restart". A client masks what it sends, a server does not (§5.3).
pub(crate) fn close_frame(masking_key: Option<[u8; 4]>) -> Vec<u8> {
    let [high, low] = SERVICE_RESTART.to_be_bytes();
    match masking_key {
        None => vec![FIN | CLOSE, 2, high, low],
        Some(key) => {
            let [a, b, c, d] = key;
            vec![FIN | CLOSE, MASKED | 2, a, b, c, d, high ^ a, low ^ b]
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    struct Frame {
        first: u8,
        key: Option<[u8; 4]>,
        payload: usize,
        /// Lengths need not be written in the shortest form for the border to be where it is.
        long: u8,
    }

    impl Frame {
        fn bytes(&self) -> Vec<u8> {
            let mask = if self.key.is_some() { MASKED } else { 0 };
            let mut bytes = vec![self.first];
            match (self.payload, self.long) {
                (0..126, 0) => bytes.push(mask | u8::try_from(self.payload).expect("short")),
                (0..65_536, 0 | 1) => {
                    bytes.push(mask | 126);
                    bytes.extend(u16::try_from(self.payload).expect("fits").to_be_bytes());
                }
                _ => {
                    bytes.push(mask | 127);
                    bytes.extend((self.payload as u64).to_be_bytes());
                }
            }
            bytes.extend(self.key.iter().flatten());
            bytes.resize(bytes.len() + self.payload, 0x88); // reads as a `Close` wherever a border is missed
            bytes
        }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let opcode = prop_oneof![Just(0x0_u8), Just(0x1), Just(0x2), Just(0x9), Just(0xa)];
        let payload = prop_oneof![0_usize..8, 120_usize..130, 0_usize..2_000, 65_530_usize..65_540];
        let key = prop::option::of(any::<[u8; 4]>());
        (opcode, 0_u8..16, key, payload, 0_u8..3).prop_map(|(opcode, flags, key, payload, long)| Frame {
            first: flags << 4 | opcode,
            key,
            payload,
            long,
        })
    }

    /// Borders by arithmetic alone: the sums of the frames' lengths.
    fn borders(frames: &[Frame]) -> Vec<usize> {
        let mut end = 0;
        std::iter::once(0)
            .chain(frames.iter().map(|frame| {
                end += frame.bytes().len();
                end
            }))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn however_the_bytes_are_cut_up_the_borders_are_where_the_frames_end(
            frames in prop::collection::vec(frame(), 1..6),
            pieces in prop::collection::vec(1_usize..70_000, 1..20),
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
            let borders = borders(&frames);
            let (mut follower, mut at, mut pieces) = (Frames::default(), 0, pieces.into_iter().cycle());
            while at < bytes.len() {
                let piece = pieces.next().expect("endless").min(bytes.len() - at);
                follower.pass(&bytes[at..at + piece]);
                at += piece;
                prop_assert_eq!(follower.is_between(), borders.contains(&at), "at {}", at);
                prop_assert!(!follower.is_closed());
            }
        }

        #[test]
        fn from_any_byte_on_the_next_border_is_found(
            frames in prop::collection::vec(frame(), 1..6),
            from in any::<prop::sample::Index>(),
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
            let from = from.index(bytes.len() + 1);
            let mut follower = Frames::default();
            follower.pass(&bytes[..from]);
            let end = from + follower.pass_frame(&bytes[from..]);
            prop_assert_eq!(Some(end), borders(&frames).into_iter().find(|border| *border >= from));
        }

        #[test]
        fn a_close_is_seen_at_its_last_byte(before in prop::collection::vec(frame(), 0..4), masked: bool) {
            let close = close_frame(masked.then_some([7, 7, 7, 7]));
            let mut follower = Frames::default();
            before.iter().for_each(|frame| follower.pass(&frame.bytes()));
            for byte in &close {
                prop_assert!(!follower.is_closed());
                follower.pass(&[*byte]);
            }
            prop_assert!(follower.is_closed() && follower.is_between());
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..9)) {
            let mut follower = Frames::default();
            for piece in pieces {
                let passed = follower.pass_frame(&piece);
                follower.pass(&piece[passed..]);
            }
        }
    }

    #[test]
    fn a_length_that_no_frame_has_is_the_end_of_what_is_known() {
        let mut follower = Frames::default();
        follower.pass(&[0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        follower.pass(&[0; 100]);
        assert!(!follower.is_between() && !follower.is_closed());
    }

    #[test]
    fn the_close_is_masked_towards_the_server_only() {
        assert_eq!(close_frame(None), [0x88, 0x02, 0x03, 0xf4]);
        let masked = close_frame(Some([0x11, 0x22, 0x33, 0x44]));
        assert_eq!(masked, [0x88, 0x82, 0x11, 0x22, 0x33, 0x44, 0x03 ^ 0x11, 0xf4 ^ 0x22]);
    }

    #[test]
    fn the_longest_length_there_can_be_is_lost_and_counted_nowhere() {
        let mut frames = Frames::default();
        frames.pass(&[[FIN | 1, MASKED | 127].as_slice(), &[0xff; 64]].concat());
        assert!(!frames.is_between() && !frames.is_closed());
    }
}
