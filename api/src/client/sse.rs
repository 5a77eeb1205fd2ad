//! Reading `text/event-stream` (WHATWG HTML §9.2.6) from chunks that may break anywhere.

/// Longest line or event: what is longer is not one of ours.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// A parser that holds what has come of an event that is not complete.
#[derive(Default)]
pub(super) struct SseParser {
    line: Vec<u8>,
    after_cr: bool,
    data: Vec<u8>,
    has_data: bool,
}

/// The stream is not one of ours.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

impl SseParser {
    /// Takes a chunk and gives the `data` of every event that it completes.
    pub(super) fn take(&mut self, chunk: &[u8]) -> Result<Vec<Vec<u8>>, TooLong> {
        let mut complete = Vec::new();
        for &byte in chunk {
            match byte {
                b'\n' if std::mem::take(&mut self.after_cr) => {} // the second half of CRLF
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    self.end_of_line(&mut complete);
                }
                _ => {
                    self.after_cr = false;
                    self.line.push(byte);
                }
            }
            if self.line.len() + self.data.len() > MAX_EVENT_BYTES {
                return Err(TooLong);
            }
        }
        Ok(complete)
    }

    fn end_of_line(&mut self, complete: &mut Vec<Vec<u8>>) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            if std::mem::take(&mut self.has_data) {
                complete.push(data);
            }
            return;
        }
        let (field, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (&line[..], &[][..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        // The id and the type are in the data too, a comment has an empty field, and the pause before a new
        // attempt is the client's own business.
        if field == b"data" {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_in_chunks_of(size: usize, text: &str) -> Vec<String> {
        let mut parser = SseParser::default();
        let chunks = text.as_bytes().chunks(size);
        chunks
            .flat_map(|chunk| parser.take(chunk).unwrap())
            .map(|data| String::from_utf8(data).unwrap())
            .collect()
    }

    #[test]
    fn events_are_the_same_however_the_stream_is_cut() {
        let text = "retry: 1000\n\n: heartbeat\n\nid: 1\nevent: a\ndata: {\"x\":1}\n\nid: 2\r\ndata: one\r\ndata:two\r\n\r\ndata\n\n";
        for size in 1..text.len() {
            assert_eq!(parse_in_chunks_of(size, text), ["{\"x\":1}", "one\ntwo", ""], "chunks of {size}");
        }
    }

    #[test]
    fn an_event_that_is_not_complete_is_not_told() {
        assert!(parse_in_chunks_of(5, "data: half\n").is_empty());
    }

    #[test]
    fn a_line_without_end_is_given_up_at_the_limit() {
        let mut parser = SseParser::default();
        let long = vec![b'x'; MAX_EVENT_BYTES + 1];
        assert_eq!(parser.take(&long), Err(TooLong));
    }
}
