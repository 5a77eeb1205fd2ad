//! The first bytes of a connection, by the PROXY protocol: what is a header stays the same one whatever follows, what is
//! the beginning of one needs no more than comes, and what is none stays none.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_proxy::fuzzing::{Introduction, introduction};

fuzz_target!(|data: &[u8]| {
    let whole = introduction(data);
    for cut in 0..data.len() {
        match (introduction(&data[..cut]), whole) {
            (Introduction::Whole(length, source), whole) => {
                assert!(length <= cut);
                assert_eq!(whole, Introduction::Whole(length, source), "what follows changes nothing");
            }
            (Introduction::Needs(more), Introduction::Whole(length, _)) => {
                assert!(more > 0 && cut + more <= length)
            }
            (Introduction::Needs(more), _) => assert!(more > 0),
            (Introduction::No, whole) => assert_eq!(whole, Introduction::No, "more bytes heal nothing"),
        }
    }
});
