//! The `peregrine` binary.
fn main() {}
