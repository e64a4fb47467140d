//! Runs and blocks: the two shapes in which marked pages are asked for.

use std::ops::Range;

use crate::addr::{Gfn, LEAVES_PER_BLOCK};
use crate::bitmap::PAGES_PER_WORD;
use crate::sys::simd::{POSITIONS, Path, Positions};

/// Iterator over the maximal runs of set bits of a slice of words, as ranges of page numbers in ascending
/// order. It allocates nothing.
///
/// It finds runs a few hundred at a time with the processor's vector instructions, into a buffer of 2 KiB
/// that is part of the iterator. `for_each`, `fold` and what is built on them (`sum`, `count`) are faster than
/// a `for` loop.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    path: Path,
    /// The first word that was not looked at yet.
    next_word: usize,
    /// Page number that is position 0.
    base: usize,
    positions: Positions,
    /// Those of `positions` that are still to be handed out: a start, its end, a start, and so on. When one
    /// is left over, it is the start of a run whose end has not been found yet.
    left: Range<usize>,
}

impl<'a> Runs<'a> {
    pub(super) fn new(words: &'a [u64], path: Path) -> Runs<'a> {
        Runs { words, path, next_word: 0, base: 0, positions: [0; POSITIONS], left: 0..0 }
    }

    fn page(&self, position: usize) -> usize {
        self.base + self.positions[position] as usize
    }

    /// The next run, once less than a whole one is left in the buffer. It is never inlined: the loop around
    /// `next` should be small.
    #[cold]
    #[inline(never)]
    fn refill(&mut self) -> Option<Range<usize>> {
        let mut open = (!self.left.is_empty()).then(|| self.page(self.left.start));
        self.left = 0..0;
        while self.next_word < self.words.len() {
            let found = self.path.changes(self.words, self.next_word, &mut self.positions);
            self.base = self.next_word * PAGES_PER_WORD;
            self.next_word += found.words;
            match (open, found.positions) {
                (_, 0) => {}
                (Some(start), count) => {
                    self.left = 1..count;
                    return Some(start..self.page(0));
                }
                (None, 1) => open = Some(self.page(0)),
                (None, count) => {
                    self.left = 2..count;
                    return Some(self.page(0)..self.page(1));
                }
            }
        }
        // Nothing ends a run that reaches the last bit of the last word.
        open.map(|start| start..self.words.len() * PAGES_PER_WORD)
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        if self.left.len() < 2 {
            return self.refill();
        }
        let start = self.left.start;
        self.left.start += 2;
        Some(self.page(start)..self.page(start + 1))
    }

    #[inline]
    fn fold<B, F: FnMut(B, Range<usize>) -> B>(mut self, init: B, mut f: F) -> B {
        let mut result = init;
        loop {
            // A loop of its own over what is in the buffer, with nothing to be looked at but the buffer.
            let (pairs, _) = self.positions[self.left.clone()].as_chunks::<2>();
            for &[start, end] in pairs {
                result = f(result, self.base + start as usize..self.base + end as usize);
            }
            self.left.start += 2 * pairs.len();
            match self.refill() {
                Some(run) => result = f(result, run),
                None => return result,
            }
        }
    }
}

impl std::iter::FusedIterator for Runs<'_> {}

/// Iterator over the maximal runs of set bits of words that come one by one, such as those of a bitmap that
/// others change meanwhile. It allocates nothing.
#[derive(Debug)]
pub struct LiveRuns<I> {
    words: I,
    /// What is left of the current word.
    word: u64,
    /// Page number of bit 0 of the word after the current one.
    next_base: usize,
}

impl<I: Iterator<Item = u64>> LiveRuns<I> {
    pub(super) fn new(words: I) -> LiveRuns<I> {
        LiveRuns { words, word: 0, next_base: 0 }
    }

    /// Makes the next word the current one; `None` at the end.
    fn advance(&mut self) -> Option<u64> {
        self.word = self.words.next()?;
        self.next_base += PAGES_PER_WORD;
        Some(self.word)
    }
}

impl<I: Iterator<Item = u64>> Iterator for LiveRuns<I> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        while self.word == 0 {
            self.advance()?;
        }
        let low = self.word.trailing_zeros();
        let start = self.next_base - PAGES_PER_WORD + low as usize;
        let ones = (self.word >> low).trailing_ones();
        if low + ones < u64::BITS {
            self.word &= u64::MAX << (low + ones);
            return Some(start..start + ones as usize);
        }
        // The run reaches the end of its word: it goes on for as long as words begin with ones.
        self.word = 0;
        let mut end = self.next_base;
        while let Some(word) = self.advance() {
            let ones = word.trailing_ones();
            end += ones as usize;
            if ones < u64::BITS {
                self.word = word & (u64::MAX << ones);
                break;
            }
            self.word = 0;
        }
        Some(start..end)
    }
}

/// Iterator over the blocks that have a dirty leaf, as (block number, dirty leaves), in ascending order.
///
/// Blocks are those of guest-physical memory (see [`Gfn::block`]), wherever the bitmap begins in one, so a
/// bitmap may cover only a part of its first and last block. `count()` is the number of dirty blocks.
#[derive(Debug)]
pub struct BlockCounts<R> {
    runs: R,
    /// What is left of the current run, in frame numbers.
    run: Range<u64>,
    first: u64,
}

impl<R: Iterator<Item = Range<usize>>> BlockCounts<R> {
    pub(super) fn new(runs: R, first: Gfn) -> BlockCounts<R> {
        BlockCounts { runs, run: 0..0, first: first.0 }
    }
}

impl<R: Iterator<Item = Range<usize>>> Iterator for BlockCounts<R> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let mut found: Option<(u64, u64)> = None;
        loop {
            if self.run.is_empty() {
                let Some(run) = self.runs.next() else { return found };
                self.run = self.first + run.start as u64..self.first + run.end as u64;
            }
            let block = Gfn(self.run.start).block();
            match &mut found {
                Some((current, _)) if *current != block => return found,
                _ => {}
            }
            let end = self.run.end.min((block + 1) * LEAVES_PER_BLOCK);
            found.get_or_insert((block, 0)).1 += end - self.run.start;
            self.run.start = end;
        }
    }
}
