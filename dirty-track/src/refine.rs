//! Refining: coarse pages whose contents are still what was last sent are taken out of a harvest.
//!
//! # Why
//! A block that re-arming leaves writable ([`crate::rearm`]) is reported whole in every epoch, written or not.
//! Sending it again costs the link 4 KiB a page; comparing it with what was sent last costs this host less
//! than half a microsecond a page. So whoever keeps what was sent can have both: a guest without faults, and
//! a stream with changed pages only.
//!
//! # Contract
//! - Only coarse pages are looked at ([`Harvest::is_coarse`]). A page that is known to be written stays.
//! - Contents are compared byte by byte. A digest would take 16 bytes a page instead of 4096, but then two
//!   different contents can look the same, and a guest that knows the hash can make them; a write that is
//!   missed once in a while is what this library is there to prevent.
//! - The page that is dropped is the one that the receiver has, provided that [`LastSent`] tells the truth: it
//!   must return the very bytes that were handed over (not the page read again, which may have changed since),
//!   and only once the receiver has them or is certain to get them.
//! - Nothing is lost by dropping. A coarse page is protected again before the harvest is handed out, so that a
//!   write after the comparison is logged; or it is still writable, and then it is in the next harvest.
//!
//! ```
//! use dirty_track::addr::PAGE_BYTES;
//! use dirty_track::refine::{Shadow, refine};
//! use dirty_track::region::RegionBitmap;
//! use dirty_track::tracker::{Tracker, TrackerError};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! fn send_epoch(
//!     tracker: &mut dyn Tracker,
//!     memory: &GuestMemoryMmap<RegionBitmap>,
//!     shadow: &mut Shadow,
//!     mut send: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut harvest = tracker.harvest()?;
//!     refine(&mut harvest, memory, shadow)?;
//!     for gfn in harvest.runs().flat_map(|run| run.iter()) {
//!         let mut page = [0; PAGE_BYTES];
//!         memory.read_slice(&mut page, GuestAddress(gfn.gpa().0))?;
//!         send(gfn.gpa().0, &page)?;
//!         shadow.record(gfn, &page);
//!     }
//!     harvest.commit();
//!     Ok(())
//! }
//! ```

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::bitmap::PAGES_PER_WORD;
use crate::tracker::Harvest;

/// What was last sent: the reference that coarse pages are compared with.
pub trait LastSent {
    /// The contents of `gfn` as the receiver has them; `None` when it has none, or when nobody knows.
    fn page(&self, gfn: Gfn) -> Option<&[u8; PAGE_BYTES]>;
}

impl<T: LastSent + ?Sized> LastSent for &T {
    fn page(&self, gfn: Gfn) -> Option<&[u8; PAGE_BYTES]> {
        (**self).page(gfn)
    }
}

impl<T: LastSent + ?Sized> LastSent for &mut T {
    fn page(&self, gfn: Gfn) -> Option<&[u8; PAGE_BYTES]> {
        (**self).page(gfn)
    }
}

/// What a refinement did, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refined {
    /// Coarse pages that were compared.
    pub compared: u64,
    /// Those of them that had not changed and are no longer in the harvest.
    pub dropped: u64,
    /// Coarse pages without a reference, which stay in the harvest.
    pub unknown: u64,
}

/// Why coarse pages could not be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefineError {
    /// A page of the harvest is not in the guest memory that was given.
    #[error(
        "page {gfn} of the harvest cannot be read: {source}; pass the memory that the tracker's slots are of"
    )]
    Memory {
        /// The page.
        gfn: Gfn,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
}

/// Takes those coarse pages out of `harvest` whose contents in `memory` are what `last_sent` has.
///
/// Nothing is allocated. The guest may run meanwhile: a page is copied aside before it is compared.
///
/// # Errors
/// [`RefineError::Memory`]. Pages found unchanged up to there are out of the harvest, all others are in it.
pub fn refine<M: GuestMemoryBackend + ?Sized>(
    harvest: &mut Harvest<'_>,
    memory: &M,
    last_sent: &(impl LastSent + ?Sized),
) -> Result<Refined, RefineError> {
    let mut refined = Refined::default();
    let mut page = [0; PAGE_BYTES];
    for slot in 0..harvest.slots().len() {
        let first = harvest.slots()[slot].frames().start;
        for word in 0..harvest.slots()[slot].coarse_words().len() {
            let mut bits = harvest.slots()[slot].coarse_words()[word];
            while bits != 0 {
                let gfn = Gfn(first.0 + (word * PAGES_PER_WORD) as u64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
                let Some(sent) = last_sent.page(gfn) else {
                    refined.unknown += 1;
                    continue;
                };
                memory
                    .get_slice(GuestAddress(gfn.gpa().0), PAGE_BYTES)
                    .map_err(|source| RefineError::Memory { gfn, source })?
                    .copy_to(&mut page[..]);
                refined.compared += 1;
                if page == *sent {
                    harvest.discard(gfn);
                    refined.dropped += 1;
                }
            }
        }
    }
    Ok(refined)
}

/// A copy of what was sent, page by page: the plain [`LastSent`].
///
/// It takes as much address space as the guest has memory, and as much memory as was recorded.
#[derive(Debug)]
pub struct Shadow {
    /// In the order of their addresses.
    ranges: Vec<ShadowRange>,
}

#[derive(Debug)]
struct ShadowRange {
    frames: PageRange,
    contents: Vec<u8>,
    recorded: Vec<u64>,
}

impl Shadow {
    /// An empty shadow of the frames of `ranges`, such as those of a tracker's slots. What overlaps is kept
    /// once.
    pub fn new(ranges: impl IntoIterator<Item = PageRange>) -> Shadow {
        let mut frames: Vec<PageRange> = ranges.into_iter().collect();
        frames.sort_by_key(|range| range.start);
        let mut end = Gfn(0);
        let mut shadow = Shadow { ranges: Vec::with_capacity(frames.len()) };
        for range in frames {
            let start = range.start.max(end);
            if range.end() <= start {
                continue;
            }
            end = range.end();
            let frames = PageRange { start, pages: end.0 - start.0 };
            shadow.ranges.push(ShadowRange {
                frames,
                // Zeroed by the kernel when touched: pages that are never sent take no memory.
                contents: vec![0; frames.bytes() as usize],
                recorded: vec![0; (frames.pages as usize).div_ceil(PAGES_PER_WORD)],
            });
        }
        shadow
    }

    /// Records that the receiver has `contents` for `gfn`. `false`: the shadow does not cover that frame.
    pub fn record(&mut self, gfn: Gfn, contents: &[u8; PAGE_BYTES]) -> bool {
        let Some((range, index)) = self.find(gfn) else { return false };
        let range = &mut self.ranges[range];
        range.contents[index * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(contents);
        range.recorded[index / PAGES_PER_WORD] |= 1 << (index % PAGES_PER_WORD);
        true
    }

    /// Forgets what was recorded for `gfn`: the receiver may have something else.
    pub fn forget(&mut self, gfn: Gfn) {
        if let Some((range, index)) = self.find(gfn) {
            self.ranges[range].recorded[index / PAGES_PER_WORD] &= !(1 << (index % PAGES_PER_WORD));
        }
    }

    /// Forgets everything: another receiver.
    pub fn forget_all(&mut self) {
        self.ranges.iter_mut().for_each(|range| range.recorded.fill(0));
    }

    /// Index of the range that has `gfn`, and of the frame in it.
    fn find(&self, gfn: Gfn) -> Option<(usize, usize)> {
        let range = self.ranges.partition_point(|range| range.frames.start <= gfn).checked_sub(1)?;
        let frames = self.ranges[range].frames;
        frames.contains(gfn).then(|| (range, (gfn.0 - frames.start.0) as usize))
    }
}

impl LastSent for Shadow {
    fn page(&self, gfn: Gfn) -> Option<&[u8; PAGE_BYTES]> {
        let (range, index) = self.find(gfn)?;
        let range = &self.ranges[range];
        if range.recorded[index / PAGES_PER_WORD] >> (index % PAGES_PER_WORD) & 1 == 0 {
            return None;
        }
        range.contents[index * PAGE_BYTES..].first_chunk()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::region::RegionBitmap;
    use crate::tracker::Slot;
    use crate::tracker::harvest::OwedSet;

    const PAGES: u64 = 200;
    const FIRST: Gfn = Gfn(0x105);

    fn contents(value: u8, at: usize) -> [u8; PAGE_BYTES] {
        let mut page = [7; PAGE_BYTES];
        page[at] = value;
        page
    }

    /// For each page: coarse or known to be written or clean; what is in memory; what was sent.
    fn page() -> impl Strategy<Value = (u8, u8, Option<u8>, usize)> {
        (0..3u8, 0..2u8, prop::option::of(0..2u8), prop::sample::select(vec![0, 1, 2047, 4095]))
    }

    proptest! {
        #[test]
        fn just_the_coarse_pages_that_did_not_change_are_dropped(
            pages in prop::collection::vec(page(), PAGES as usize),
        ) {
            let memory = GuestMemoryMmap::<RegionBitmap>::from_ranges(&[(
                GuestAddress(FIRST.gpa().0),
                PAGES as usize * PAGE_BYTES,
            )])
            .unwrap();
            let slot = Slot::of_region(0, 0, memory.iter().next().unwrap());
            let mut owed = OwedSet::new(&[slot]);
            owed.allow_coarse();
            let mut shadow = Shadow::new([PageRange { start: FIRST, pages: PAGES }]);
            let (mut expected, mut counts) = (BTreeSet::new(), Refined::default());
            for (index, &(kind, value, sent, at)) in pages.iter().enumerate() {
                let gfn = Gfn(FIRST.0 + index as u64);
                memory.write_slice(&contents(value, at), GuestAddress(gfn.gpa().0)).unwrap();
                if let Some(sent) = sent {
                    prop_assert!(shadow.record(gfn, &contents(sent, at)));
                }
                let set = owed.slot(0);
                match kind {
                    0 => set.add_coarse(index / 64, 1 << (index % 64)),
                    1 => set.add(index / 64, 1 << (index % 64)),
                    _ => {}
                }
                if kind == 0 {
                    counts.compared += u64::from(sent.is_some());
                    counts.unknown += u64::from(sent.is_none());
                    counts.dropped += u64::from(sent == Some(value));
                }
                if kind == 1 || kind == 0 && sent != Some(value) {
                    expected.insert(gfn);
                }
            }
            let mut harvest = owed.lend();
            prop_assert_eq!(refine(&mut harvest, &memory, &shadow).unwrap(), counts);
            let left: BTreeSet<_> = harvest.runs().flat_map(|run| run.iter()).collect();
            prop_assert_eq!(left, expected);
            prop_assert_eq!(harvest.coarse_count(), counts.compared + counts.unknown - counts.dropped);
        }

        #[test]
        fn a_shadow_is_a_map(
            ranges in prop::collection::vec((0..60u64, 0..30u64), 0..5),
            ops in prop::collection::vec((0..100u64, 0..4u8), 0..60),
        ) {
            let ranges = ranges.into_iter().map(|(start, pages)| PageRange { start: Gfn(start), pages });
            let ranges: Vec<_> = ranges.collect();
            let covered = |gfn: Gfn| ranges.iter().any(|range| range.contains(gfn));
            let mut shadow = Shadow::new(ranges.clone());
            let mut oracle = BTreeMap::new();
            for (gfn, op) in ops {
                let gfn = Gfn(gfn);
                if op == 0 {
                    shadow.forget(gfn);
                    oracle.remove(&gfn);
                } else {
                    prop_assert_eq!(shadow.record(gfn, &contents(op, gfn.0 as usize)), covered(gfn));
                    if covered(gfn) {
                        oracle.insert(gfn, contents(op, gfn.0 as usize));
                    }
                }
                for gfn in (0..100).map(Gfn) {
                    prop_assert_eq!(shadow.page(gfn), oracle.get(&gfn));
                }
            }
            shadow.forget_all();
            prop_assert!((0..100).all(|gfn| shadow.page(Gfn(gfn)).is_none()));
        }
    }

    #[test]
    fn memory_that_is_not_the_trackers_is_an_error_and_loses_nothing() {
        let of = |gfn: Gfn| {
            let range = (GuestAddress(gfn.gpa().0), 4 * PAGE_BYTES);
            GuestMemoryMmap::<RegionBitmap>::from_ranges(&[range]).unwrap()
        };
        let memory = of(Gfn(10));
        let mut owed = OwedSet::new(&[Slot::of_region(0, 0, memory.iter().next().unwrap())]);
        owed.allow_coarse();
        owed.slot(0).add_coarse(0, 0b1111);
        let mut shadow = Shadow::new([PageRange { start: Gfn(10), pages: 4 }]);
        shadow.record(Gfn(12), &[0; PAGE_BYTES]);
        let mut harvest = owed.lend();
        let error = refine(&mut harvest, &of(Gfn(100)), &shadow).unwrap_err();
        assert!(matches!(error, RefineError::Memory { gfn: Gfn(12), .. }), "{error}");
        assert_eq!(harvest.count(), 4);
        assert_eq!(refine(&mut harvest, &memory, &shadow).unwrap().dropped, 1);
        assert_eq!(harvest.count(), 3);
    }
}
