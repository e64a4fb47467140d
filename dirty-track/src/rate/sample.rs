//! The share of a guest's pages that change, from a random sample.
//!
//! The guest is not told, write-protected or slowed: some pages are read and hashed, and later once more. It
//! misses a page that was written with what it held, or changed and changed back, so it is a lower bound of
//! what was *written*, and an unbiased estimate of what *changed*.
//!
//! Reading a page that the guest never touched maps the zero page there (for private anonymous memory); it does
//! not allocate one.

use std::hash::{BuildHasher, Hasher, RandomState};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::mix::below;
use crate::rate::{RateError, positive};

/// A random sample of guest pages with their hashes.
///
/// The sample is stratified: memory is cut into as many equal parts as there are samples, and each has one
/// page, so a guest that is busy in one corner is neither overlooked nor blown up.
///
/// The hash is the standard library's SipHash with random keys. It takes 2 us a page, 1 ms per GiB at 512
/// samples, so a faster one would gain nothing; and with 64 bits, one change in 10^19 goes unseen.
#[derive(Debug)]
pub struct Sampler {
    pages: u64,
    /// In ascending order.
    sample: Vec<(Gfn, u64)>,
    keys: RandomState,
}

/// What changed between two looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Pages looked at.
    pub sampled: u64,
    /// Those of them that had changed.
    pub changed: u64,
    /// Pages that the sample stands for.
    pub pages: u64,
}

impl Change {
    /// Estimated number of pages that changed.
    pub fn changed_pages(&self) -> f64 {
        if self.sampled == 0 { 0.0 } else { self.changed as f64 / self.sampled as f64 * self.pages as f64 }
    }

    /// The 95 % confidence interval of the number of pages that changed: Wilson's, which holds for shares near
    /// 0 and 1 as well. The strata make the estimate rather better than that.
    pub fn interval(&self) -> (f64, f64) {
        if self.sampled == 0 {
            return (0.0, self.pages as f64);
        }
        let (n, z) = (self.sampled as f64, 1.959_964_f64);
        let share = self.changed as f64 / n;
        let denominator = 1.0 + z * z / n;
        let center = (share + z * z / (2.0 * n)) / denominator;
        let half = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt() / denominator;
        let pages = self.pages as f64;
        ((center - half).max(0.0) * pages, (center + half).min(1.0) * pages)
    }

    /// Changed pages per second, if `seconds` passed between the two looks: with the interval's ends.
    ///
    /// # Errors
    /// [`RateError::NotPositive`].
    pub fn rate(&self, seconds: f64) -> Result<(f64, (f64, f64)), RateError> {
        let seconds = positive("the time between two looks in seconds", seconds)?;
        let (low, high) = self.interval();
        Ok((self.changed_pages() / seconds, (low / seconds, high / seconds)))
    }
}

impl Sampler {
    /// Samples per GiB that are enough for most purposes: one for each block of 2 MiB.
    pub const PER_GIB: u64 = 512;

    /// Chooses pages of `ranges`, which do not overlap, `per_gib` for each GiB (at least one if there is any
    /// page at all), and reads them.
    ///
    /// # Errors
    /// [`RateError::Memory`] when a page is not in `memory`, [`RateError::NoData`] without pages.
    pub fn new<M: GuestMemoryBackend + ?Sized>(
        memory: &M,
        ranges: &[PageRange],
        per_gib: u64,
    ) -> Result<Sampler, RateError> {
        let keys = RandomState::new();
        let seed = keys.hash_one("which pages");
        Sampler::with_seed(memory, ranges, per_gib, keys, seed)
    }

    fn with_seed<M: GuestMemoryBackend + ?Sized>(
        memory: &M,
        ranges: &[PageRange],
        per_gib: u64,
        keys: RandomState,
        seed: u64,
    ) -> Result<Sampler, RateError> {
        let pages: u64 = ranges.iter().map(|range| range.pages).sum();
        if pages == 0 {
            return Err(RateError::NoData("pages"));
        }
        let wanted = u128::from(pages) * u128::from(per_gib) / (1 << 18);
        let count = wanted.clamp(1, u128::from(pages)) as u64;
        let bound = |stratum: u64| (u128::from(stratum) * u128::from(pages) / u128::from(count)) as u64;
        let mut sample = Vec::with_capacity(count as usize);
        let (mut ranges, mut range) = (ranges.iter(), PageRange { start: Gfn(0), pages: 0 });
        // Pages before `range`.
        let mut before = 0;
        for stratum in 0..count {
            let (from, to) = (bound(stratum), bound(stratum + 1));
            let page = from + below(seed ^ stratum, to - from);
            while page - before >= range.pages {
                before += range.pages;
                let Some(next) = ranges.next() else { break };
                range = *next;
            }
            let gfn = Gfn(range.start.0 + (page - before));
            sample.push((gfn, hash(&keys, memory, gfn)?));
        }
        sample.sort_unstable_by_key(|(gfn, _)| *gfn);
        Ok(Sampler { pages, sample, keys })
    }

    /// Number of pages in the sample.
    pub fn len(&self) -> usize {
        self.sample.len()
    }

    /// Whether the sample is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.sample.is_empty()
    }

    /// Reads the sample again, says what has changed since it was last read, and remembers it as it is now.
    /// Nothing is allocated.
    ///
    /// # Errors
    /// [`RateError::Memory`]; the pages before the one that failed are remembered as they are now.
    pub fn look<M: GuestMemoryBackend + ?Sized>(&mut self, memory: &M) -> Result<Change, RateError> {
        let mut changed = 0;
        for (gfn, known) in &mut self.sample {
            let now = hash(&self.keys, memory, *gfn)?;
            changed += u64::from(now != *known);
            *known = now;
        }
        Ok(Change { sampled: self.sample.len() as u64, changed, pages: self.pages })
    }
}

fn hash<M: GuestMemoryBackend + ?Sized>(keys: &RandomState, memory: &M, gfn: Gfn) -> Result<u64, RateError> {
    let mut page = [0; PAGE_BYTES];
    // Copied aside first: the guest writes while we read.
    memory
        .get_slice(GuestAddress(gfn.gpa().0), PAGE_BYTES)
        .map_err(|source| RateError::Memory { gfn, source })?
        .copy_to(&mut page[..]);
    let mut hasher = keys.build_hasher();
    hasher.write(&page);
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    fn memory(ranges: &[PageRange]) -> GuestMemoryMmap<()> {
        let ranges: Vec<_> =
            ranges.iter().map(|range| (GuestAddress(range.start.gpa().0), range.bytes() as usize)).collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    const RANGES: [PageRange; 2] =
        [PageRange { start: Gfn(0x100), pages: 3000 }, PageRange { start: Gfn(0x10_0000), pages: 5000 }];

    #[test]
    fn one_byte_changes_a_page_and_a_look_remembers() {
        let memory = memory(&RANGES);
        // As many samples as pages: nothing is left to chance.
        let mut all = Sampler::new(&memory, &RANGES, 1 << 18).unwrap();
        assert_eq!(all.len(), 8000);
        assert_eq!(all.look(&memory).unwrap().changed, 0);
        for (gfn, offset) in [(0x100, 0), (0x100 + 2999, 4095), (0x10_0000, 2048), (0x10_0000 + 4999, 1)] {
            memory.write_obj(1u8, GuestAddress((gfn << 12) + offset)).unwrap();
        }
        let change = all.look(&memory).unwrap();
        assert_eq!(change, Change { sampled: 8000, changed: 4, pages: 8000 });
        assert_eq!(change.rate(0.5).unwrap().0, 8.0);
        assert_eq!(all.look(&memory).unwrap().changed, 0);
    }

    #[test]
    fn each_stratum_has_one_page() {
        let memory = memory(&RANGES);
        for per_gib in [0, 1, 100, 512, 5000, 1 << 17, u64::MAX] {
            let sampler = Sampler::new(&memory, &RANGES, per_gib).unwrap();
            let count = sampler.len() as u64;
            assert_eq!(count, (8000 * u128::from(per_gib) / (1 << 18)).clamp(1, 8000) as u64);
            let index = |gfn: Gfn| if gfn.0 < 0x10_0000 { gfn.0 - 0x100 } else { 3000 + gfn.0 - 0x10_0000 };
            for (stratum, (gfn, _)) in (0..).zip(&sampler.sample) {
                let page = index(*gfn);
                assert!(page >= stratum * 8000 / count && page < (stratum + 1) * 8000 / count, "{gfn}");
            }
        }
    }

    #[test]
    fn pages_outside_memory_and_no_pages_are_errors() {
        let memory = memory(&RANGES);
        let outside = [PageRange { start: Gfn(0x50_0000), pages: 1 }];
        assert!(matches!(Sampler::new(&memory, &outside, 512), Err(RateError::Memory { .. })));
        assert!(matches!(Sampler::new(&memory, &[], 512), Err(RateError::NoData(_))));
        let change = Sampler::new(&memory, &RANGES, 512).unwrap().look(&memory).unwrap();
        assert!(matches!(change.rate(0.0), Err(RateError::NotPositive { .. })));
    }

    /// The interval holds the truth about as often as it says, for shares from few to most; and more often
    /// than not the estimate is near.
    #[test]
    fn the_interval_covers_the_truth() {
        let memory = memory(&RANGES);
        for share in [1, 10, 50, 90] {
            let (mut covered, runs) = (0, 60);
            for run in 0..runs {
                let seed = run * 1000 + share;
                let mut sampler =
                    Sampler::with_seed(&memory, &RANGES, 8192, RandomState::new(), seed).unwrap();
                let mut changed = 0u32;
                for range in RANGES {
                    for gfn in range.iter().filter(|gfn| below(gfn.0 ^ seed << 32, 100) < share) {
                        changed += 1;
                        memory.write_obj(run as u32 + 1, GuestAddress(gfn.gpa().0 + share * 8)).unwrap();
                    }
                }
                let (low, high) = sampler.look(&memory).unwrap().interval();
                covered += u32::from((low..=high).contains(&f64::from(changed)));
            }
            assert!(covered >= 51, "{share} %: {covered} of {runs}");
        }
    }

    proptest! {
        #[test]
        fn intervals_are_sane(sampled in 0..10_000u64, changed in 0..10_000u64, pages in 0..1u64 << 40) {
            let change = Change { sampled, changed: changed.min(sampled), pages };
            let (low, high) = change.interval();
            let estimate = change.changed_pages();
            prop_assert!(0.0 <= low && high <= pages as f64);
            prop_assert!(low <= estimate + 1e-3 && estimate <= high + 1e-3);
        }
    }
}
