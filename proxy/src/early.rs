//! What of a request's body is taken in before there is an upstream for it.
//!
//! However small the pieces are in which a client sends it, what is kept is little more than the bytes themselves: small
//! frames are put together, those without a byte are dropped. An intermediary may do so in either version of HTTP (RFC 9112
//! §7.1: chunks mean nothing to the recipient; RFC 9113 §8.1: nor do the borders of DATA frames).

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;

/// A frame of at least so much is kept as it came; of what is smaller several become one.
const MIN_FRAME_BYTES: usize = 4 * 1024;

/// Frames in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Early {
    whole: VecDeque<Bytes>,
    /// Small frames, behind those that are whole.
    small: BytesMut,
    /// The last of all.
    trailers: Option<HeaderMap>,
    bytes: u64,
}

impl Early {
    /// Bytes of what is kept, trailers included.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.small.is_empty() && self.trailers.is_none()
    }

    /// Takes a frame in; how many bytes it has.
    pub(crate) fn push(&mut self, frame: Frame<Bytes>) -> u64 {
        let frame = match frame.into_data() {
            Ok(data) => {
                self.push_data(&data);
                self.bytes += data.len() as u64;
                return data.len() as u64;
            }
            Err(frame) => frame,
        };
        let Ok(trailers) = frame.into_trailers() else { return 0 };
        let bytes: usize = trailers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        self.trailers = Some(trailers);
        self.bytes += bytes as u64;
        bytes as u64
    }

    fn push_data(&mut self, data: &Bytes) {
        if data.len() < MIN_FRAME_BYTES {
            // A copy: a slice of a byte would keep the whole buffer that it was read into.
            self.small.extend_from_slice(data);
            if self.small.len() < MIN_FRAME_BYTES {
                return;
            }
        }
        if !self.small.is_empty() {
            self.whole.push_back(self.small.split().freeze());
        }
        if data.len() >= MIN_FRAME_BYTES {
            self.whole.push_back(data.clone());
        }
    }

    pub(crate) fn pop(&mut self) -> Option<Frame<Bytes>> {
        let data = self.whole.pop_front();
        let data = data.or_else(|| (!self.small.is_empty()).then(|| self.small.split().freeze()));
        if let Some(data) = data {
            self.bytes -= data.len() as u64;
            return Some(Frame::data(data));
        }
        self.bytes = 0;
        self.trailers.take().map(Frame::trailers)
    }

    #[cfg(test)]
    fn frames(&self) -> usize {
        self.whole.len() + usize::from(!self.small.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drain(early: &mut Early) -> (Vec<u8>, Option<HeaderMap>) {
        let (mut data, mut trailers) = (Vec::new(), None);
        while let Some(frame) = early.pop() {
            assert!(trailers.is_none(), "trailers are the last");
            match frame.into_data() {
                Ok(bytes) => data.extend_from_slice(&bytes),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        (data, trailers)
    }

    #[test]
    fn sixty_four_thousand_frames_of_a_byte_and_as_many_empty_ones_are_kept_as_sixteen() {
        let mut early = Early::default();
        for n in 0..65_536_u32 {
            early.push(Frame::data(Bytes::copy_from_slice(&[n as u8])));
            early.push(Frame::data(Bytes::new()));
        }
        assert_eq!((early.bytes(), early.frames()), (65_536, 16));
        let (data, _) = drain(&mut early);
        assert!(data.iter().enumerate().all(|(n, byte)| n as u8 == *byte) && data.len() == 65_536);
        assert!(early.is_empty() && early.bytes() == 0);
    }

    #[test]
    fn empty_frames_alone_are_nothing() {
        let mut early = Early::default();
        (0..1_000).for_each(|_| assert_eq!(early.push(Frame::data(Bytes::new())), 0));
        assert!(early.is_empty() && early.frames() == 0 && early.pop().is_none());
    }

    proptest! {
        #[test]
        fn whatever_the_frames_the_bytes_come_out_as_they_went_in(
            lengths in prop::collection::vec(prop_oneof![0..10_usize, 4_000..4_200_usize, 0..20_000_usize], 0..30),
            with_trailers: bool,
        ) {
            let mut early = Early::default();
            let mut sent = Vec::new();
            for (n, length) in lengths.iter().enumerate() {
                let data = vec![n as u8; *length];
                sent.extend_from_slice(&data);
                early.push(Frame::data(data.into()));
            }
            prop_assert_eq!(early.bytes(), sent.len() as u64);
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().expect("a value"));
            if with_trailers {
                early.push(Frame::trailers(trailers.clone()));
            }
            prop_assert_eq!(drain(&mut early), (sent, with_trailers.then_some(trailers)));
        }
    }
}
