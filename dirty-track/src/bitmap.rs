//! The dirty bitmap: one bit a page, in 64-bit words.
//!
//! There are two holders of such words. [`DirtyBitmap`] is atomic: many threads mark it while one drains it.
//! A plain `[u64]` belongs to one owner: what a harvest yields, or what KVM copied out. The functions of this
//! module ([`runs`], [`count`], [`block_counts`]) read such words; they use AVX2 or AVX-512 where the processor
//! has them, and nothing that they return allocates.
//!
//! Bit `i % 64` of word `i / 64` stands for page `i`. Bits past the last page are zero, always: each way in
//! masks them out, so that no way out has to.

mod atomic;
mod bytes;
mod marks;
mod runs;

pub use atomic::DirtyBitmap;
pub use bytes::SliceAt;
pub use runs::{BlockCounts, LiveRuns, Runs};

use crate::addr::Gfn;
use crate::sys::simd::Path;
use crate::sys::zeroed::zeroed_words;

/// Pages that one word stands for.
pub const PAGES_PER_WORD: usize = u64::BITS as usize;

/// Words that a bitmap of `pages` needs.
pub const fn words_for(pages: usize) -> usize {
    pages.div_ceil(PAGES_PER_WORD)
}

/// Clean words for a bitmap of `pages` pages.
///
/// The same as `vec![0; words_for(pages)]`, but where the kernel has huge pages to give, those of a large guest
/// (a word for each 256 KiB: 64 GiB fill a huge page) lie in them, which makes reading them faster.
pub fn clean_words(pages: usize) -> Vec<u64> {
    zeroed_words(words_for(pages))
}

/// The maximal runs of set bits of `words`, in ascending order.
///
/// ```
/// use dirty_track::bitmap::runs;
///
/// let words = [0b1110_0110, 0, 1 << 63, 1];
/// assert_eq!(runs(&words).collect::<Vec<_>>(), [1..3, 5..8, 191..193]);
/// ```
pub fn runs(words: &[u64]) -> Runs<'_> {
    Runs::new(words, Path::best())
}

/// Number of set bits of `words`.
pub fn count(words: &[u64]) -> usize {
    Path::best().count(words)
}

/// Set bits of `words` in each block that has any; see [`BlockCounts`].
pub fn block_counts(words: &[u64], first: Gfn) -> BlockCounts<Runs<'_>> {
    BlockCounts::new(runs(words), first)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
