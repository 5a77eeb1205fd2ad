//! Hashes that have to give the same answer in every process and version.

/// FNV-1a, 64 bits, followed by the finalizer of SplitMix64 so that all bits are usable.
///
/// Stable for ever: consistent hashing and sticky cookies depend on it. Not a defence against chosen
/// keys; the table's own maps use a keyed hash for that.
#[must_use]
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash ^= u64::from(*byte);
        hash = hash.wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

/// SplitMix64's finalizer: a bijection on 64 bits with full avalanche.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// 2^64 divided by the golden ratio: its multiples fall evenly into every interval.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Maps 64 even or random bits onto `0..bound` without a division. 0 for an empty range.
pub(crate) const fn below(bits: u64, bound: u64) -> u64 {
    ((bits as u128 * bound as u128) >> 64) as u64
}
