//! Numbers that look random, for choosing pages that no pattern of the guest's keeps meeting or missing.

/// A permutation of the 64-bit numbers that spreads neighbours apart (the finalizer of SplitMix64).
pub(crate) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// A number below `bound`, from the high half of a product; 0 when `bound` is 0. The bias is `bound` / 2^64.
pub(crate) const fn below(value: u64, bound: u64) -> u64 {
    ((mix(value) as u128 * bound as u128) >> 64) as u64
}
