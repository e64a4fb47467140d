//! A slot as userfaultfd sees it: a range of addresses that is protected in units of its backing's page size.

use std::io;
use std::ops::Range;

use crate::addr::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange, PageSize};
use crate::bitmap::{self, PAGES_PER_WORD};
use crate::sys::maps;
use crate::tracker::change::Tracked;
use crate::tracker::chosen::Chosen;
use crate::tracker::{Backing, Slot, TrackerError};

/// Bytes that one ioctl protects at most. The kernel keeps KVM's MMU notifier for the range open throughout, and
/// no vCPU can resolve a fault in it meanwhile.
const CHUNK: u64 = 128 << 20;

/// A slot, and how it is backed.
#[derive(Clone, Debug)]
pub(crate) struct WpSlot {
    slot: Slot,
    backing: Backing,
}

impl WpSlot {
    /// Looks up how each of `slots`, in the order of their addresses, is backed.
    pub(crate) fn all(slots: Vec<Slot>) -> Result<Vec<WpSlot>, TrackerError> {
        Slot::sorted(slots)?.into_iter().map(WpSlot::new).collect()
    }

    fn new(slot: Slot) -> Result<WpSlot, TrackerError> {
        let bad = |why| TrackerError::BadSlot { id: slot.id(), why };
        let (mut page, mut zaps_huge) = (PageSize::K4, false);
        let mut at = slot.hva();
        while at < slot.hva() + slot.len() {
            let vma = maps::vma_at(at).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => bad("a part of it is not mapped in this process"),
                _ => bad("its page size cannot be found out: /proc/self/maps and smaps cannot be read"),
            })?;
            let size = [PageSize::K4, PageSize::M2, PageSize::G1]
                .into_iter()
                .find(|size| size.bytes() == vma.page_size)
                .ok_or_else(|| bad("its pages are of an unknown size"))?;
            page = page.max(size);
            zaps_huge |= vma.shared && size == PageSize::K4;
            at = vma.end;
        }
        if !slot.hva().is_multiple_of(page.bytes()) || !slot.len().is_multiple_of(page.bytes()) {
            return Err(bad("its addresses and size must be multiples of its backing's page size"));
        }
        let leaves = page.leaves();
        let first = slot.frames().start.0;
        let odd = |range: &PageRange| {
            !(range.start.0 - first).is_multiple_of(leaves) || !range.pages.is_multiple_of(leaves)
        };
        if let Some(range) = slot.tracked().find(odd) {
            let why = "its ends must be multiples of its backing's page size, from the memslot's start on";
            return Err(TrackerError::BadRange { range, why });
        }
        let backing = match page {
            PageSize::K4 if zaps_huge => Backing::Shared,
            PageSize::K4 => Backing::Private,
            size => Backing::Hugetlb(size),
        };
        Ok(WpSlot { slot, backing })
    }

    #[cfg(test)]
    pub(crate) fn simulated(slot: Slot, page: PageSize) -> WpSlot {
        let backing = if page == PageSize::K4 { Backing::Private } else { Backing::Hugetlb(page) };
        WpSlot { slot, backing }
    }

    pub(crate) fn id(&self) -> u32 {
        self.slot.id()
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }

    /// The unit of protection.
    pub(crate) fn page(&self) -> PageSize {
        match self.backing {
            Backing::Private | Backing::Shared => PageSize::K4,
            Backing::Hugetlb(size) => size,
        }
    }

    /// Number of pages of 4 KiB.
    pub(crate) fn pages(&self) -> usize {
        self.slot.frames().pages as usize
    }

    /// Words of its bitmap.
    pub(crate) fn words(&self) -> usize {
        bitmap::words_for(self.pages())
    }

    /// Address of page `page`.
    pub(crate) fn hva(&self, page: usize) -> u64 {
        self.slot.hva() + ((page as u64) << PAGE_SHIFT)
    }

    /// Where `pages` begin, and their bytes.
    pub(crate) fn addresses(&self, pages: &Range<usize>) -> (u64, u64) {
        (self.hva(pages.start), (pages.len() as u64) << PAGE_SHIFT)
    }

    /// The pages that `addresses` touch, clipped to the slot.
    pub(crate) fn pages_at(&self, addresses: Range<u64>) -> Range<usize> {
        let page = |address: u64, round: u64| {
            let offset = address.saturating_sub(self.slot.hva()).min(self.slot.len());
            ((offset + round) >> PAGE_SHIFT) as usize
        };
        page(addresses.start, 0)..page(addresses.end, PAGE_SIZE - 1).min(self.pages())
    }

    /// `pages`, made as large as guest-physical units of `size` are, and as pages of the backing are in this process's
    /// addresses, clipped to the slot.
    pub(crate) fn widen(&self, pages: Range<usize>, size: PageSize) -> Range<usize> {
        let widen = |pages: Range<usize>, base: u64, leaves: u64| {
            let start = (base + pages.start as u64) / leaves * leaves;
            let end = (base + pages.end as u64).next_multiple_of(leaves);
            start.saturating_sub(base) as usize..((end - base) as usize).min(self.pages())
        };
        let pages = widen(pages, self.slot.frames().start.0, size.leaves());
        widen(pages, self.slot.hva() >> PAGE_SHIFT, self.page().leaves())
    }

    /// `pages` cut at multiples of [`CHUNK`] in this process's addresses, so that no cut splits a huge page.
    pub(crate) fn chunks(&self, pages: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'_> {
        let chunk = CHUNK.max(self.page().bytes());
        let mut start = pages.start;
        std::iter::from_fn(move || {
            let cut = (self.hva(start) / chunk + 1) * chunk;
            let end = self.pages_at(cut..cut).start.min(pages.end);
            let piece = start..end;
            start = end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// The host's writes to tracked pages, taken out: word number and bits, in units that can be protected. In order,
    /// but a word may come more than once.
    pub(crate) fn take_host_writes(&self, size: PageSize, mut take: impl FnMut(usize, u64)) {
        let mut take = |word, bits| match bits & self.slot.chosen().bits(word) {
            0 => {}
            bits => take(word, bits),
        };
        self.slot.host_writes().drain(|word, bits| {
            if size.max(self.page()) == PageSize::K4 {
                return take(word, bits);
            }
            for run in bitmap::runs(&[bits]) {
                let base = word * PAGES_PER_WORD;
                masks(self.widen(base + run.start..base + run.end, size), &mut take);
            }
        });
    }
}

impl Tracked for WpSlot {
    fn slot(&self) -> &Slot {
        &self.slot
    }

    fn choosing(&self, chosen: Chosen) -> WpSlot {
        WpSlot { slot: self.slot.choosing(chosen), backing: self.backing }
    }
}

const _: () = assert!(CHUNK.is_multiple_of(BLOCK_SIZE));

/// Hands `pages` to `take` as (word number, bits).
pub(crate) fn masks(pages: Range<usize>, mut take: impl FnMut(usize, u64)) {
    let mut at = pages.start;
    while at < pages.end {
        let (word, bit) = (at / PAGES_PER_WORD, at % PAGES_PER_WORD);
        let count = (PAGES_PER_WORD - bit).min(pages.end - at);
        take(word, (u64::MAX >> (PAGES_PER_WORD - count)) << bit);
        at += count;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    use super::*;
    use crate::region::RegionBitmap;

    fn slot(pages: usize) -> WpSlot {
        let region = GuestRegionMmap::<RegionBitmap>::from_range(GuestAddress(0x10_0000), pages << 12, None);
        WpSlot::new(Slot::of_region(0, 0, &region.unwrap())).unwrap()
    }

    proptest! {
        #[test]
        fn masks_are_the_pages(start in 0..300usize, len in 0..300usize) {
            let mut pages = Vec::new();
            masks(start..start + len, |word, bits| {
                pages.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| word * 64 + bit));
            });
            prop_assert_eq!(pages, (start..start + len).collect::<Vec<_>>());
        }

        #[test]
        fn chunks_are_the_pages_cut_where_huge_pages_meet(start in 0..90_000usize, len in 0..90_000usize) {
            let slot = slot(100_001);
            let pages = start..(start + len).min(slot.pages());
            let mut at = pages.start;
            for chunk in slot.chunks(pages.clone()) {
                prop_assert_eq!(chunk.start, at);
                prop_assert!(chunk.end > chunk.start);
                prop_assert!(((chunk.end - chunk.start) << 12) as u64 <= CHUNK);
                prop_assert!(chunk.end == pages.end || slot.hva(chunk.end).is_multiple_of(CHUNK));
                at = chunk.end;
            }
            prop_assert_eq!(at, pages.end.max(pages.start));
        }

        #[test]
        fn what_is_widened_covers_whole_blocks(start in 0..2000usize, len in 1..600usize) {
            let slot = slot(2001);
            let pages = start..(start + len).min(slot.pages());
            let wide = slot.widen(pages.clone(), PageSize::M2);
            prop_assert!(wide.start <= pages.start && wide.end >= pages.end && wide.end <= slot.pages());
            let first = slot.slot().frames().start.0 as usize;
            prop_assert!(wide.start == 0 || (first + wide.start).is_multiple_of(512));
            prop_assert!(wide.end == slot.pages() || (first + wide.end).is_multiple_of(512));
            prop_assert!(pages.start - wide.start < 512 && wide.end - pages.end < 512);
            prop_assert_eq!(slot.widen(pages.clone(), PageSize::K4), pages);
        }
    }

    #[test]
    fn addresses_outside_are_clipped() {
        let slot = slot(10);
        assert_eq!(slot.pages_at(0..u64::MAX), 0..10);
        assert_eq!(slot.pages_at(slot.hva(3) + 1..slot.hva(4) + 1), 3..5);
        assert!(slot.backing() == Backing::Private);
    }
}
