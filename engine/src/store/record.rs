//! The form of a commit in the log, and the checksums of what is stored.
//!
//! ```text
//!   format (1 byte) | writes (u32) | write … | checksum (8 bytes)
//!   write: 1 | key length (u32) | key | value length (u32) | value      put
//!          2 | key length (u32) | key                                   delete
//! ```
//!
//! Integers are little-endian. SQLite has no checksums of its own: without these, a flipped bit on the disk
//! would become a wrong weight or a wrong address without a word. Decoding never panics and never allocates
//! more than it was given, whatever the bytes.

use bytes::{Buf, Bytes};
use sha2::{Digest, Sha256};

use super::{MAX_BATCH_WRITES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision, Write};

/// Bytes of a checksum: the first of a SHA-256.
pub const CHECKSUM_BYTES: usize = 8;

const FORMAT: u8 = 1;
const PUT: u8 = 1;
const DELETE: u8 = 2;

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The checksum is not that of the bytes, or not of this revision.
    #[error("its checksum is wrong")]
    Checksum,
    /// The format is not one that this version knows.
    #[error("its format {0} is unknown")]
    Format(u8),
    /// It ends too early, goes on too long or has something that no writer writes.
    #[error("{0}")]
    Malformed(&'static str),
}

/// A commit as bytes. The revision goes into the checksum, so that a record cannot pass for another.
#[must_use]
pub fn encode(revision: Revision, writes: &[Write]) -> Vec<u8> {
    let length: usize = writes.iter().map(encoded_bytes).sum();
    let mut bytes = Vec::with_capacity(1 + 4 + length + CHECKSUM_BYTES);
    bytes.push(FORMAT);
    put_length(&mut bytes, writes.len());
    for write in writes {
        match write {
            Write::Put(key, value) => {
                bytes.push(PUT);
                put_slice(&mut bytes, key.as_bytes());
                put_slice(&mut bytes, value);
            }
            Write::Delete(key) => {
                bytes.push(DELETE);
                put_slice(&mut bytes, key.as_bytes());
            }
        }
    }
    let checksum = checksum(revision, &[&bytes]);
    bytes.extend_from_slice(&checksum);
    bytes
}

/// The writes of a record. Values share the memory of `bytes`.
///
/// # Errors
///
/// When the bytes are not what [`encode`] makes for this revision.
pub fn decode(revision: Revision, bytes: &Bytes) -> Result<Vec<Write>, RecordError> {
    let format = *bytes.first().ok_or(RecordError::Malformed("it is empty"))?;
    if format != FORMAT {
        return Err(RecordError::Format(format));
    }
    let end = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(RecordError::Malformed("it ends too early"))?;
    let body = bytes.slice(..end);
    if checksum(revision, &[&body]) != bytes[end..] {
        return Err(RecordError::Checksum);
    }
    decode_body(body)
}

/// Checksum of a stored entry.
#[must_use]
pub fn entry_checksum(key: &str, revision: Revision, value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let key_length = u32::try_from(key.len()).unwrap_or(u32::MAX).to_le_bytes();
    checksum(revision, &[&key_length, key.as_bytes(), value])
}

/// Decodes what is between nothing and the checksum. Apart from [`decode`] so that fuzzing gets past it.
///
/// # Errors
///
/// When the bytes are not what [`encode`] makes, without the checksum.
pub fn decode_body(mut body: Bytes) -> Result<Vec<Write>, RecordError> {
    if body.is_empty() || body.get_u8() != FORMAT {
        return Err(RecordError::Malformed("it has no format"));
    }
    let count = take_length(&mut body)?;
    if count > MAX_BATCH_WRITES {
        return Err(RecordError::Malformed("it has too many writes"));
    }
    let mut writes = Vec::with_capacity(count.min(body.len() / 5)); // a write is at least 5 bytes long
    for _ in 0..count {
        writes.push(take_write(&mut body)?);
    }
    if body.has_remaining() {
        return Err(RecordError::Malformed("it goes on too long"));
    }
    Ok(writes)
}

fn take_write(body: &mut Bytes) -> Result<Write, RecordError> {
    let kind = if body.has_remaining() { body.get_u8() } else { 0 };
    if kind != PUT && kind != DELETE {
        return Err(RecordError::Malformed("it has a write of an unknown kind"));
    }
    let key = take_slice(body, MAX_KEY_BYTES)?;
    let key =
        std::str::from_utf8(&key).map_err(|_| RecordError::Malformed("it has a key that is not UTF-8"))?;
    let key = key.to_owned();
    if kind == DELETE {
        return Ok(Write::Delete(key));
    }
    Ok(Write::Put(key, take_slice(body, MAX_VALUE_BYTES)?))
}

fn take_slice(body: &mut Bytes, limit: usize) -> Result<Bytes, RecordError> {
    let length = take_length(body)?;
    if length > limit {
        return Err(RecordError::Malformed("it has a key or value beyond the limit"));
    }
    if length > body.len() {
        return Err(RecordError::Malformed("it ends too early"));
    }
    Ok(body.split_to(length))
}

fn take_length(body: &mut Bytes) -> Result<usize, RecordError> {
    let length = body.try_get_u32_le().map_err(|_| RecordError::Malformed("it ends too early"))?;
    usize::try_from(length).map_err(|_| RecordError::Malformed("it has a length beyond the limit"))
}

fn encoded_bytes(write: &Write) -> usize {
    match write {
        Write::Put(key, value) => 1 + 4 + key.len() + 4 + value.len(),
        Write::Delete(key) => 1 + 4 + key.len(),
    }
}

fn put_slice(bytes: &mut Vec<u8>, slice: &[u8]) {
    put_length(bytes, slice.len());
    bytes.extend_from_slice(slice);
}

fn put_length(bytes: &mut Vec<u8>, length: usize) {
    let length = u32::try_from(length).expect("the limits of a batch are far below 4 GiB");
    bytes.extend_from_slice(&length.to_le_bytes());
}

fn checksum(revision: Revision, parts: &[&[u8]]) -> [u8; CHECKSUM_BYTES] {
    let mut hash = Sha256::new_with_prefix(revision.to_le_bytes());
    for part in parts {
        hash.update(part);
    }
    let mut short = [0; CHECKSUM_BYTES];
    short.copy_from_slice(&hash.finalize()[..CHECKSUM_BYTES]);
    short
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(key: &str, value: &'static [u8]) -> Write {
        Write::Put(key.to_owned(), Bytes::from_static(value))
    }

    #[test]
    fn a_record_is_of_its_revision_only() {
        let bytes = Bytes::from(encode(7, &[put("a", b"1"), Write::Delete("b".to_owned())]));
        assert_eq!(decode(7, &bytes), Ok(vec![put("a", b"1"), Write::Delete("b".to_owned())]));
        assert_eq!(decode(8, &bytes), Err(RecordError::Checksum));
    }

    #[test]
    fn a_record_with_any_bit_flipped_is_refused() {
        let whole = encode(7, &[put("key", b"value"), Write::Delete("gone".to_owned())]);
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(7, &Bytes::from(bytes)).is_err(), "bit {bit} was flipped and nobody noticed");
        }
    }

    #[test]
    fn a_record_that_claims_more_writes_than_it_has_is_refused() {
        let mut body = vec![FORMAT];
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode_body(body.into()), Err(RecordError::Malformed("it has too many writes")));
        let mut body = vec![FORMAT, 1, 0, 0, 0, PUT];
        body.extend_from_slice(&400_u32.to_le_bytes());
        assert_eq!(decode_body(body.into()), Err(RecordError::Malformed("it ends too early")));
    }

    fn any_write() -> impl Strategy<Value = Write> {
        let key = "[a-z/é]{0,20}";
        prop_oneof![
            (key, proptest::collection::vec(any::<u8>(), 0..100)).prop_map(|(k, v)| Write::Put(k, v.into())),
            key.prop_map(Write::Delete),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            revision in any::<u64>(),
            writes in proptest::collection::vec(any_write(), 0..20),
        ) {
            prop_assert_eq!(decode(revision, &encode(revision, &writes).into()), Ok(writes));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(bytes);
            prop_assert!(decode(1, &bytes).is_err());
            if let Ok(writes) = decode_body(bytes.clone()) {
                let again = encode(1, &writes);
                prop_assert_eq!(&again[..again.len() - CHECKSUM_BYTES], &bytes[..]);
            }
        }
    }
}
