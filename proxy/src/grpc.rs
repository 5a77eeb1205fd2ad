//! What the edge has to know of gRPC: how a call is ended so that its client reads "unavailable" and not a broken
//! connection, and where its messages end.
//!
//! A call ends with its status in the trailers of the answer, or in the head of an answer that has no body
//! ("Trailers-Only"), whatever the status of HTTP is. That needs HTTP/2 towards the client. gRPC-Web is another
//! protocol: it carries its trailers in the body.

use http::{HeaderMap, HeaderName, HeaderValue};

pub(crate) const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// UNAVAILABLE: clients call again, most of them by themselves.
const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// A flag and a length.
const PREFIX_BYTES: usize = 5;

/// Whether a `Content-Type` is one of gRPC.
pub(crate) fn is_grpc(content_type: Option<&HeaderValue>) -> bool {
    const NAME: &[u8] = b"application/grpc";
    let Some((start, rest)) = content_type.and_then(|value| value.as_bytes().split_at_checked(NAME.len()))
    else {
        return false;
    };
    start.eq_ignore_ascii_case(NAME) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
}

/// Says "unavailable" in a head or in trailers. The text is for people; it needs no escaping.
pub(crate) fn say_unavailable(fields: &mut HeaderMap, message: &'static str) {
    fields.insert(STATUS, UNAVAILABLE);
    fields.insert(MESSAGE, HeaderValue::from_static(message));
}

/// Follows the messages of one direction of a call.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of a prefix that have passed, while it is not whole.
    have: u8,
    /// Bytes of the message that are still to pass.
    left: u32,
}

impl Messages {
    /// Whether what has passed are whole messages.
    pub(crate) const fn is_between(&self) -> bool {
        self.have == 0 && self.left == 0
    }

    /// Follows bytes on their way.
    pub(crate) fn pass(&mut self, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            at += self.step(&bytes[at..]);
        }
    }

    /// Follows bytes up to the end of the message that is under way; how many those are.
    pub(crate) fn pass_message(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() && !self.is_between() {
            at += self.step(&bytes[at..]);
        }
        at
    }

    /// Passes some bytes, at least one, and none beyond the end of a message.
    fn step(&mut self, bytes: &[u8]) -> usize {
        if self.left > 0 {
            let here = bytes.len().min(self.left as usize);
            self.left -= u32::try_from(here).unwrap_or(self.left);
            return here;
        }
        let here = bytes.len().min(PREFIX_BYTES - usize::from(self.have));
        for byte in &bytes[..here] {
            self.prefix[usize::from(self.have)] = *byte;
            self.have += 1;
        }
        if usize::from(self.have) == PREFIX_BYTES {
            let [_, length @ ..] = self.prefix;
            self.left = u32::from_be_bytes(length);
            self.have = 0;
        }
        here
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn grpc_is_told_by_its_content_type_and_grpc_web_is_not_it() {
        let is = |text: &'static str| is_grpc(Some(&HeaderValue::from_static(text)));
        assert!(is("application/grpc") && is("application/grpc+proto") && is("Application/gRPC;x=1"));
        assert!(!is("application/grpc-web") && !is("application/grpc-web+proto") && !is("application/json"));
        assert!(!is_grpc(None));
    }

    proptest! {
        #[test]
        fn however_the_bytes_are_cut_up_the_borders_are_where_the_messages_end(
            lengths in prop::collection::vec(prop_oneof![0_usize..4, 0_usize..3_000], 1..8),
            pieces in prop::collection::vec(1_usize..900, 1..20),
            from in any::<prop::sample::Index>(),
        ) {
            let (mut bytes, mut borders) = (Vec::new(), vec![0]);
            for length in lengths {
                bytes.push(1);
                bytes.extend(u32::try_from(length).expect("short").to_be_bytes());
                bytes.resize(bytes.len() + length, 0);
                borders.push(bytes.len());
            }
            let (mut messages, mut at, mut pieces) = (Messages::default(), 0, pieces.into_iter().cycle());
            while at < bytes.len() {
                let piece = pieces.next().expect("endless").min(bytes.len() - at);
                messages.pass(&bytes[at..at + piece]);
                at += piece;
                prop_assert_eq!(messages.is_between(), borders.contains(&at), "at {}", at);
            }
            let from = from.index(bytes.len() + 1);
            let mut messages = Messages::default();
            messages.pass(&bytes[..from]);
            let end = from + messages.pass_message(&bytes[from..]);
            prop_assert_eq!(Some(end), borders.into_iter().find(|border| *border >= from));
        }
    }
}
