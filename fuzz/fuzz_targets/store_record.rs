//! Records of the store's log, as a damaged disk may give them back: a revision (8 bytes, little-endian), then the
//! record. Nothing panics, and what is read is written as the same bytes.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use peregrine_engine::store::record::{CHECKSUM_BYTES, decode, decode_body, encode};

fuzz_target!(|data: &[u8]| {
    let Some((revision, record)) = data.split_first_chunk() else { return };
    let revision = u64::from_le_bytes(*revision);
    let record = Bytes::copy_from_slice(record);
    if let Ok(writes) = decode(revision, &record) {
        assert_eq!(encode(revision, &writes), record, "a record is written in one way only");
    }
    // Past the checksum, which a fuzzer does not guess.
    if let Ok(writes) = decode_body(record.clone()) {
        let again = encode(revision, &writes);
        assert_eq!(again[..again.len() - CHECKSUM_BYTES], record[..], "a body is written in one way only");
        assert_eq!(decode(revision, &again.into()), Ok(writes), "what is written is read");
    }
});
