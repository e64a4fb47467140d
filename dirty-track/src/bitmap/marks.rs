//! The words of a bitmap that many threads mark while one takes: which operations on them, in which order.
//!
//! # Contract
//! Whoever marks a page has written to it *before*; whoever takes marks copies the pages *after*. For each
//! page, either the copy has the write, or the mark is (or will be) in the words for the next to take. That is
//! all of it, and it has two halves:
//!
//! - **No mark is lost.** Marks are taken by a swap: what was there before it, all of it, is what the taker
//!   gets; what comes after it stays.
//! - **A mark that was taken brings the write with it.** Were each mark a read-modify-write with release
//!   order, and each taking one with acquire order, nothing more would have to be said: each takes part in
//!   the release sequence of every earlier one. But a locked read-modify-write costs about 5 ns, and a range
//!   of 512 pages eight of them. Where *all* bits of a word are set, the old value does not matter, so a plain
//!   store will do; it loses nobody's mark, because it sets that too. But it ends the release sequence: a
//!   taker that reads its value synchronizes with the thread that stored, and not with one that marked a page
//!   of the word a moment earlier, whose mark it takes all the same. Therefore every marker has a sequentially
//!   consistent fence between its write and its mark, and every taker has one between taking and copying.
//!   The mark comes before the taking in the order of the word's changes, so the marker's fence comes before
//!   the taker's (C++20, [atomics.order] 4), and then no read after the taker's fence can miss a write before
//!   the marker's.
//!
//! On x86-64 the fences need no instruction, see [`x86_fence`].
//!
//! # Rejected: a load first, and no mark if the bits are there already
//! A taker may empty the word between that load and the moment when the page's write leaves the store buffer;
//! it copies the old contents, and the mark is gone. A fence between the write and the load would prevent it,
//! a real one on every processor, which costs as much as the read-modify-write that is to be saved.
//!
//! All of this is checked by loom (`model.rs`), which is why the words are a type parameter.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence, fence};

use crate::bitmap::PAGES_PER_WORD;
use crate::sys::zeroed::zeroed_atomics;

/// A 64-bit atomic: std's, or loom's.
pub(super) trait Word: Sized {
    /// `len` words of zero.
    fn zeroed(len: usize) -> Box<[Self]>;
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, bits: u64, order: Ordering);
    fn swap(&self, bits: u64, order: Ordering) -> u64;
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64;
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64;
    /// What a marker does between its write and its marks, and a taker between taking and reading.
    fn fence();
}

impl Word for AtomicU64 {
    fn zeroed(len: usize) -> Box<[AtomicU64]> {
        zeroed_atomics(len)
    }

    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline]
    fn store(&self, bits: u64, order: Ordering) {
        self.store(bits, order);
    }

    #[inline]
    fn swap(&self, bits: u64, order: Ordering) -> u64 {
        self.swap(bits, order)
    }

    #[inline]
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.fetch_or(bits, order)
    }

    #[inline]
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.fetch_and(bits, order)
    }

    #[inline]
    fn fence() {
        if cfg!(target_arch = "x86_64") { x86_fence() } else { fence(Ordering::SeqCst) }
    }
}

/// The fence, where the processor keeps the order anyway.
///
/// x86-64 makes one processor's stores visible to all others in the order of the program, and in one order
/// for all (Intel SDM volume 3, "Memory Ordering in P6 and More Recent Processor Families"). So whoever sees
/// that the word has changed after a marker's mark, by whosesoever store, sees the marker's earlier write.
/// Taking is a locked instruction, and no load that follows is done before it. What remains is that the
/// compiler must not reorder.
#[inline]
fn x86_fence() {
    compiler_fence(Ordering::SeqCst);
}

/// Words with the contract of this module. Page and word numbers must lie within.
#[derive(Debug, Default)]
pub(super) struct Marks<W> {
    words: Box<[W]>,
}

impl<W: Word> Marks<W> {
    pub(super) fn new(words: usize) -> Marks<W> {
        Marks { words: W::zeroed(words) }
    }

    /// Marks `bits` of word number `word`.
    #[inline]
    pub(super) fn set(&self, word: usize, bits: u64) {
        W::fence();
        self.mark(word, bits);
    }

    /// Marks every page of `pages`.
    #[inline]
    pub(super) fn set_range(&self, pages: Range<usize>) {
        if pages.is_empty() {
            return;
        }
        W::fence();
        let Edges { first, head, last, tail } = Edges::of(pages);
        if first == last {
            self.mark(first, head & tail);
            return;
        }
        self.mark(first, head);
        for word in &self.words[first + 1..last] {
            word.store(u64::MAX, Ordering::Release);
        }
        self.mark(last, tail);
    }

    /// The fence must have been passed.
    #[inline]
    fn mark(&self, word: usize, bits: u64) {
        let word = &self.words[word];
        if bits == u64::MAX {
            word.store(u64::MAX, Ordering::Release);
        } else {
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// Takes the marks of `bits` of word number `word`: those that were there.
    #[inline]
    pub(super) fn take(&self, word: usize, bits: u64) -> u64 {
        let were = self.words[word].fetch_and(!bits, Ordering::AcqRel) & bits;
        W::fence();
        were
    }

    /// Takes the marks of every page of `pages`, and forgets them.
    pub(super) fn clear_range(&self, pages: Range<usize>) {
        if pages.is_empty() {
            return;
        }
        let Edges { first, head, last, tail } = Edges::of(pages);
        for word in first..=last {
            let head = if word == first { head } else { u64::MAX };
            let tail = if word == last { tail } else { u64::MAX };
            self.words[word].fetch_and(!(head & tail), Ordering::AcqRel);
        }
        W::fence();
    }

    /// Takes every mark, and hands each word that had any to `each`, as (word number, bits).
    #[inline]
    pub(super) fn take_all(&self, mut each: impl FnMut(usize, u64)) {
        for (index, word) in self.words.iter().enumerate() {
            // A read first: most words of most bitmaps are clean, and a swap would dirty their cache lines.
            // A mark that lands between the two is in what the swap returns, or stays for the next time.
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::AcqRel);
                W::fence();
                if bits != 0 {
                    each(index, bits);
                }
            }
        }
    }

    /// Word number `word` as it is now.
    #[inline]
    pub(super) fn load(&self, word: usize) -> u64 {
        let bits = self.words[word].load(Ordering::Acquire);
        W::fence();
        bits
    }

    /// Marks what is marked in `other`, within `pages`. It takes nothing, but passes the order on: the fence
    /// of `set` lies between the load and the new mark.
    pub(super) fn merge(&self, other: &Marks<W>, pages: usize) {
        for (index, bits) in other.iter().take(self.words.len()).enumerate() {
            let bits = bits & within(index, pages);
            if bits != 0 {
                self.set(index, bits);
            }
        }
    }

    /// Every word, each as it is when its turn comes. What is marked may not yet be readable.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().map(|word| word.load(Ordering::Acquire))
    }
}

/// The bits of word number `word` that stand for one of the first `pages` pages.
#[inline]
pub(super) fn within(word: usize, pages: usize) -> u64 {
    match pages.saturating_sub(word.saturating_mul(PAGES_PER_WORD)) {
        0 => 0,
        left => u64::MAX >> (PAGES_PER_WORD - left.min(PAGES_PER_WORD)),
    }
}

/// The first and the last word of a range that is not empty, and the bits of them that lie in it.
struct Edges {
    first: usize,
    head: u64,
    last: usize,
    tail: u64,
}

impl Edges {
    #[inline]
    fn of(pages: Range<usize>) -> Edges {
        let end = pages.end - 1;
        Edges {
            first: pages.start / PAGES_PER_WORD,
            head: u64::MAX << (pages.start % PAGES_PER_WORD),
            last: end / PAGES_PER_WORD,
            tail: u64::MAX >> (PAGES_PER_WORD - 1 - end % PAGES_PER_WORD),
        }
    }
}
