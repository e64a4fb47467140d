//! The atomic bitmap: pages and ranges of any kind, brought into what [`Marks`] can be asked.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use crate::addr::Gfn;
use crate::bitmap::marks::{Marks, within};
use crate::bitmap::{BlockCounts, LiveRuns, PAGES_PER_WORD, words_for};

/// A dirty bitmap that any number of threads may mark and drain at the same time.
///
/// Each word changes atomically, so a mark is either in what a drain returns or in the bitmap after it: none
/// is lost and none is seen twice. Pages outside the bitmap are ignored by every method.
///
/// **Mark after the write, copy after the drain.** Then a page whose mark came out of [`drain`](Self::drain),
/// [`test_and_clear`](Self::test_and_clear) or [`clear_range`](Self::clear_range) has, when it is read
/// afterwards, whatever was written to it before that mark.
///
/// Marking takes no lock, makes no system call and allocates nothing. A range costs a store for each whole
/// word and an atomic read-modify-write for a partial one at either end. Memory of a bitmap is provided by the
/// kernel where it is marked, and not when it is made; in huge pages if the guest is large.
#[derive(Debug, Default)]
pub struct DirtyBitmap {
    marks: Marks<AtomicU64>,
    pages: usize,
}

impl DirtyBitmap {
    /// A clean bitmap of `pages` pages.
    pub fn new(pages: usize) -> DirtyBitmap {
        DirtyBitmap { marks: Marks::new(words_for(pages)), pages }
    }

    /// Number of pages, dirty or not.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Marks `page`.
    #[inline]
    pub fn set(&self, page: usize) {
        if page < self.pages {
            self.marks.set(page / PAGES_PER_WORD, bit(page));
        }
    }

    /// Marks every page of `pages`, a word at a time.
    #[inline]
    pub fn set_range(&self, pages: Range<usize>) {
        self.marks.set_range(self.clip(pages));
    }

    /// Cleans every page of `pages`, a word at a time.
    pub fn clear_range(&self, pages: Range<usize>) {
        self.marks.clear_range(self.clip(pages));
    }

    /// Whether `page` is marked.
    pub fn get(&self, page: usize) -> bool {
        page < self.pages && self.marks.load(page / PAGES_PER_WORD) & bit(page) != 0
    }

    /// The marks of word number `word`; none beyond the end.
    pub(crate) fn word(&self, word: usize) -> u64 {
        if word < words_for(self.pages) { self.marks.load(word) } else { 0 }
    }

    /// Cleans `page`, and says whether it was marked.
    pub fn test_and_clear(&self, page: usize) -> bool {
        page < self.pages && self.marks.take(page / PAGES_PER_WORD, bit(page)) != 0
    }

    /// Takes every mark out of the bitmap and hands each word that had any to `take`, as (word number, bits).
    pub fn drain(&self, take: impl FnMut(usize, u64)) {
        self.marks.take_all(take);
    }

    /// Marks every page that is marked in `other`. Pages that `other` has beyond the end are ignored.
    pub fn merge(&self, other: &DirtyBitmap) {
        self.marks.merge(&other.marks, self.pages);
    }

    /// Marks the pages of `bits` in word number `word`.
    #[inline]
    pub fn merge_word(&self, word: usize, bits: u64) {
        let bits = bits & within(word, self.pages);
        if bits != 0 {
            self.marks.set(word, bits);
        }
    }

    /// The maximal runs of marked pages, in ascending order. Marks that change meanwhile may or may not show,
    /// and it is a drain that makes the pages safe to copy.
    pub fn runs(&self) -> LiveRuns<impl Iterator<Item = u64> + '_> {
        LiveRuns::new(self.marks.iter())
    }

    /// Number of marked pages.
    pub fn count(&self) -> usize {
        self.marks.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Marked pages of each block that has any; see [`BlockCounts`].
    pub fn block_counts(&self, first: Gfn) -> BlockCounts<LiveRuns<impl Iterator<Item = u64> + '_>> {
        BlockCounts::new(self.runs(), first)
    }

    #[inline]
    fn clip(&self, pages: Range<usize>) -> Range<usize> {
        pages.start..pages.end.min(self.pages)
    }
}

#[inline]
fn bit(page: usize) -> u64 {
    1 << (page % PAGES_PER_WORD)
}
