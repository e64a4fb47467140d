//! Who saves which page: the order of events that a copy stands on, apart from how pages are copied and opened.
//!
//! It is checked by loom (`model.rs`), which is why the words are a type parameter.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bitmap::{PAGES_PER_WORD, runs, words_for};

/// A 64-bit atomic: std's, or loom's.
pub(super) trait Word: Sized {
    fn zero() -> Self;
    fn store(&self, bits: u64);
    /// Keeps `bits`, and returns what was there: one step.
    fn keep(&self, bits: u64) -> u64;
}

impl Word for AtomicU64 {
    fn zero() -> AtomicU64 {
        AtomicU64::new(0)
    }

    fn store(&self, bits: u64) {
        self.store(bits, Ordering::Release);
    }

    fn keep(&self, bits: u64) -> u64 {
        self.fetch_and(bits, Ordering::AcqRel)
    }
}

/// What is done to pages, counted from the slot's start.
pub(super) trait Mechanism {
    /// Copies the contents of `pages`, which are protected; they come one run after the other.
    fn copy(&mut self, pages: Range<usize>);
    /// Lifts the protection of `pages`, and wakes who waits there.
    fn open(&mut self, pages: Range<usize>);
    /// Writes what was copied to where it belongs.
    fn write(&mut self);
}

/// The pages of a slot that are to be saved, and those that nobody has begun to save.
#[derive(Debug)]
pub(super) struct Claims<W> {
    pages: usize,
    /// Pages that are protected, and so claimed, together.
    unit: usize,
    /// By page. Set once, before anything is claimed.
    wanted: OnceLock<Vec<u64>>,
    /// By unit.
    pending: Box<[W]>,
}

/// What a page turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was saved, and so many pages with it.
    Saved(usize),
    /// Somebody else has claimed it: he opens it, or has done so.
    Taken,
    /// Nobody wanted it, and it was opened.
    Unwanted,
}

impl<W: Word> Claims<W> {
    pub(super) fn new(pages: usize, unit: usize) -> Claims<W> {
        let words = words_for(pages.div_ceil(unit));
        Claims { pages, unit, wanted: OnceLock::new(), pending: (0..words).map(|_| W::zero()).collect() }
    }

    /// From here on `wanted` are to be saved. They are protected, and nobody writes. Once.
    pub(super) fn want(&self, wanted: Vec<u64>) {
        let wanted = self.wanted.get_or_init(|| wanted);
        let mut pending = vec![0u64; self.pending.len()];
        for run in runs(wanted) {
            for unit in run.start / self.unit..run.end.div_ceil(self.unit) {
                pending[unit / PAGES_PER_WORD] |= 1 << (unit % PAGES_PER_WORD);
            }
        }
        self.pending.iter().zip(pending).for_each(|(word, bits)| word.store(bits));
    }

    fn wanted(&self) -> &[u64] {
        self.wanted.get().map_or(&[], Vec::as_slice)
    }

    fn wants(&self, unit: usize) -> bool {
        self.wanted_of(unit..unit + 1).next().is_some()
    }

    fn pages_of(&self, units: &Range<usize>) -> Range<usize> {
        units.start * self.unit..(units.end * self.unit).min(self.pages)
    }

    /// The wanted pages of `units`, as runs.
    fn wanted_of(&self, units: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let pages = self.pages_of(&units);
        let words = pages.start / PAGES_PER_WORD..words_for(pages.end).min(self.wanted().len());
        let base = words.start * PAGES_PER_WORD;
        let part = self.wanted().get(words).unwrap_or(&[]);
        runs(part)
            .map(move |run| (base + run.start).max(pages.start)..(base + run.end).min(pages.end))
            .filter(|run| !run.is_empty())
    }

    /// Claims those of `bits` of word number `word` that nobody has claimed. They are the caller's to save.
    fn claim(&self, word: usize, bits: u64) -> u64 {
        self.pending[word].keep(!bits) & bits
    }

    /// Saves claimed units, of one word or more. **Copied, then opened**: in between, and before, nobody writes to them.
    fn save(&self, claimed: &[Range<usize>], by: &mut impl Mechanism) -> usize {
        let mut saved = 0;
        for pages in claimed.iter().flat_map(|units| self.wanted_of(units.clone())) {
            saved += pages.len();
            by.copy(pages);
        }
        let mut hull: Option<Range<usize>> = None;
        for units in claimed {
            match &mut hull {
                // What nobody wants between them may be opened as well, and one call is cheaper than two.
                Some(open) if self.wanted_of(open.end..units.start).next().is_none() => open.end = units.end,
                _ => {
                    let done = hull.replace(units.clone());
                    done.into_iter().for_each(|units| by.open(self.pages_of(&units)));
                }
            }
        }
        hull.into_iter().for_each(|units| by.open(self.pages_of(&units)));
        by.write();
        saved
    }

    /// Somebody waits to write to `page`: saves it, and those of the `window` of units around it that nobody has claimed.
    pub(super) fn serve(&self, page: usize, window: usize, by: &mut impl Mechanism) -> Outcome {
        let unit = page / self.unit;
        let (word, bit) = (unit / PAGES_PER_WORD, 1u64 << (unit % PAGES_PER_WORD));
        let first = unit / window * window;
        let around = (u64::MAX >> (PAGES_PER_WORD - window)) << (first % PAGES_PER_WORD);
        let base = word * PAGES_PER_WORD;
        if !self.wants(unit) {
            // Neighbours that nobody wants either are not waited for one by one.
            let units = self.pages.div_ceil(self.unit);
            let unwanted = (first..(first + window).min(units)).filter(|unit| !self.wants(*unit));
            let bits = unwanted.fold(0u64, |bits, unit| bits | 1 << (unit % PAGES_PER_WORD));
            for run in runs(&[bits]) {
                by.open(self.pages_of(&(base + run.start..base + run.end)));
            }
            return Outcome::Unwanted;
        }
        if self.claim(word, bit) == 0 {
            return Outcome::Taken;
        }
        let claimed = bit | self.claim(word, around);
        let units: Vec<_> = runs(&[claimed]).map(|run| base + run.start..base + run.end).collect();
        Outcome::Saved(self.save(&units, by))
    }

    /// Saves those of `pages`, which begin and end with words of units, that nobody has claimed. Returns how many.
    pub(super) fn save_rest(&self, pages: Range<usize>, by: &mut impl Mechanism) -> usize {
        let units = pages.start / self.unit..pages.end.div_ceil(self.unit);
        let words = units.start / PAGES_PER_WORD..units.end.div_ceil(PAGES_PER_WORD);
        let claimed: Vec<u64> = words
            .clone()
            .map(|word| {
                let base = word * PAGES_PER_WORD;
                let (from, to) = (units.start.max(base) - base, (units.end - base).min(PAGES_PER_WORD));
                self.claim(word, (u64::MAX >> (PAGES_PER_WORD - (to - from))) << from)
            })
            .collect();
        let base = words.start * PAGES_PER_WORD;
        let claimed: Vec<_> = runs(&claimed).map(|run| base + run.start..base + run.end).collect();
        if claimed.is_empty() { 0 } else { self.save(&claimed, by) }
    }
}
