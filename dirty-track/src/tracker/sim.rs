//! What the tests that hold trackers against models share: slots in memory that no VM uses, their pages by index, and
//! changes of what is tracked.

use std::collections::BTreeSet;
use std::ops::Range;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::addr::{Gfn, PAGE_SIZE, PageRange};
use crate::region::RegionBitmap;
use crate::tracker::chosen::Chosen;
use crate::tracker::{Slot, TrackerError};

/// (slot index, page in the slot)
pub(crate) type Page = (usize, usize);

/// The slots of a test: their numbers, and their sizes in pages.
pub(crate) struct Layout {
    pub(crate) ids: &'static [u32],
    pub(crate) sizes: &'static [usize],
}

impl Layout {
    /// First frame of slot `index`; with holes between the slots, and in the middle of a block.
    pub(crate) fn base(&self, index: usize) -> u64 {
        0x300 + 0x100_0000 * index as u64
    }

    pub(crate) fn slots(&self) -> Vec<Slot> {
        let slot = |index: usize| {
            let (start, len) = (GuestAddress(self.base(index) * PAGE_SIZE), self.sizes[index]);
            let region = GuestRegionMmap::<RegionBitmap>::from_range(start, len * PAGE_SIZE as usize, None);
            Slot::of_region(self.ids[index], 0, &region.unwrap())
        };
        Slot::sorted((0..self.sizes.len()).map(slot).collect()).unwrap()
    }

    /// Index of `slot`.
    pub(crate) fn index(&self, slot: &Slot) -> usize {
        self.ids.iter().position(|&id| id == slot.id()).unwrap()
    }

    pub(crate) fn page(&self, gfn: Gfn) -> Page {
        let slot = (0..self.sizes.len()).rfind(|&slot| self.base(slot) <= gfn.0).unwrap();
        (slot, (gfn.0 - self.base(slot)) as usize)
    }

    pub(crate) fn pages(&self, runs: impl Iterator<Item = PageRange>) -> BTreeSet<Page> {
        runs.flat_map(|run| run.iter()).map(|gfn| self.page(gfn)).collect()
    }

    /// The pages of `slots` that are tracked.
    pub(crate) fn tracked<'a>(&self, slots: impl IntoIterator<Item = &'a Slot>) -> Extent {
        let of = |slot: &'a Slot| slot.chosen().ranges().iter().map(move |run| (slot, run.clone()));
        Extent(slots.into_iter().flat_map(of).map(|(slot, run)| (self.index(slot), run)).collect())
    }

    /// Those of all `slots` that are wished for.
    pub(crate) fn wished(&self, slots: &[Slot], wish: &[Wish]) -> Vec<Slot> {
        let mut ranges = Vec::new();
        for (index, wish) in wish.iter().enumerate().take(slots.len()) {
            for pages in wish.ranges(self.sizes[index]) {
                let start = Gfn(self.base(index) + pages.start as u64);
                ranges.push(PageRange { start, pages: pages.len() as u64 });
            }
        }
        Slot::choose(slots.to_vec(), &ranges).unwrap()
    }
}

/// A set of pages, as ranges of slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent(pub(crate) Vec<(usize, Range<usize>)>);

impl Extent {
    pub(crate) fn has(&self, (slot, page): Page) -> bool {
        self.0.iter().any(|(index, run)| *index == slot && run.contains(&page))
    }

    /// What is in here and not in `other`.
    pub(crate) fn minus(&self, other: &Extent) -> Extent {
        let mut left = Vec::new();
        for (slot, run) in &self.0 {
            let cuts: Vec<_> = other.0.iter().filter(|cut| cut.0 == *slot).map(|cut| cut.1.clone()).collect();
            let pages = cuts.iter().map(|cut| cut.end).max().unwrap_or(0).max(run.end + 1);
            let runs = Chosen::of(std::slice::from_ref(run), pages).minus(&Chosen::of(&cuts, pages));
            left.extend(runs.into_iter().map(|run| (*slot, run)));
        }
        Extent(left)
    }
}

/// What is to be tracked of a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wish {
    Nothing,
    All,
    /// A part from its start on, and one to its end, in 256ths; both together, if they meet.
    Ends(u8, u8),
}

impl Wish {
    fn ranges(self, pages: usize) -> Vec<Range<usize>> {
        let part = |part: u8| pages * usize::from(part) / 256;
        match self {
            Wish::Nothing => vec![],
            Wish::All => vec![0..pages],
            Wish::Ends(first, last) if part(first) + part(last) >= pages => vec![0..pages],
            Wish::Ends(first, last) => [0..part(first), pages - part(last)..pages]
                .into_iter()
                .filter(|run| !run.is_empty())
                .collect(),
        }
    }
}

/// One wish for each of `slots` slots.
pub(crate) fn wishes(slots: usize) -> impl Strategy<Value = Vec<Wish>> {
    let wish = prop_oneof![
        1 => Just(Wish::Nothing),
        2 => Just(Wish::All),
        2 => any::<(u8, u8)>().prop_map(|(first, last)| Wish::Ends(first, last)),
    ];
    prop::collection::vec(wish, slots)
}

/// What holds of what is tracked after `set_slots` said `outcome`: `before`, `wished` and `now` are what was, was to be
/// and is tracked.
pub(crate) fn check_change(
    outcome: &Result<(), TrackerError>,
    before: &Extent,
    wished: &Extent,
    now: &Extent,
) -> Result<(), TestCaseError> {
    match outcome {
        Ok(()) => prop_assert_eq!(now, wished),
        Err(TrackerError::SetLogging { on: false, .. } | TrackerError::Register { on: false, .. }) => {
            prop_assert!(wished.minus(now).0.is_empty());
            prop_assert!(now.minus(wished).minus(before).0.is_empty());
        }
        Err(_) => prop_assert_eq!(now, before),
    }
    Ok(())
}
