//! A memslot as a tracker needs to know it.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Address, GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileMemory};

use crate::addr::{Gfn, Gpa, PAGE_SHIFT, PAGE_SIZE, PageRange};
use crate::region::RegionBitmap;
use crate::tracker::TrackerError;
use crate::tracker::change::Tracked;
use crate::tracker::chosen::Chosen;

/// A memslot: its number, the region of guest memory behind it, the flags it was registered with, and which of its
/// pages are to be tracked.
///
/// It keeps the region's mapping alive.
#[derive(Clone, Debug)]
pub struct Slot {
    id: u32,
    flags: u32,
    gpa: Gpa,
    mapping: Arc<MmapRegion<RegionBitmap>>,
    chosen: Chosen,
}

impl Slot {
    /// The memslot `id`, which is registered with KVM for the whole of `region` and with `flags` (those of
    /// KVM_SET_USER_MEMORY_REGION, without KVM_MEM_LOG_DIRTY_PAGES: that one is the tracker's).
    ///
    /// The slot must be registered before a tracker is armed with it, and stay so until the tracker is disarmed or
    /// was told otherwise ([`Tracker::set_slots`](crate::tracker::Tracker::set_slots)).
    pub fn of_region(id: u32, flags: u32, region: &GuestRegionMmap<RegionBitmap>) -> Slot {
        let mapping = region.get_mmap();
        let chosen = Chosen::all((mapping.size() as u64 / PAGE_SIZE) as usize);
        Slot { id, flags, gpa: Gpa(region.start_addr().raw_value()), mapping, chosen }
    }

    /// Restricts tracking to `ranges`: returns those of `slots` that have pages there, each with no others to be
    /// tracked. A range may reach across slots that are neighbours. Whatever was chosen before is forgotten.
    ///
    /// Pages outside the ranges are in no harvest. userfaultfd trackers leave them alone altogether; a KVM log has
    /// whole slots, but `kvm-manual` leaves them writable once the guest has written them.
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`]; [`TrackerError::BadRange`] when a range is empty, overlaps another one or has pages
    /// that are in no slot. A tracker refuses ranges with ends that its backing's page size does not divide.
    pub fn choose(slots: Vec<Slot>, ranges: &[PageRange]) -> Result<Vec<Slot>, TrackerError> {
        let slots = Slot::sorted(slots)?;
        let mut ranges = ranges.to_vec();
        ranges.sort_by_key(|range| range.start);
        let mut pieces: Vec<Vec<Range<usize>>> = vec![Vec::new(); slots.len()];
        let mut free = Gfn(0);
        for range in ranges {
            let bad = |why| TrackerError::BadRange { range, why };
            let end = range.start.0.checked_add(range.pages).ok_or(bad("it ends beyond all addresses"))?;
            if range.pages == 0 {
                return Err(bad("it has no pages"));
            }
            if range.start < free {
                return Err(bad("it overlaps another range"));
            }
            free = Gfn(end);
            let mut at = range.start.0;
            let first = slots.partition_point(|slot| slot.frames().end().0 <= at);
            for (slot, pieces) in slots[first..].iter().zip(&mut pieces[first..]) {
                let frames = slot.frames();
                if at == end || !frames.contains(Gfn(at)) {
                    break;
                }
                let stop = end.min(frames.end().0);
                pieces.push((at - frames.start.0) as usize..(stop - frames.start.0) as usize);
                at = stop;
            }
            if at < end {
                return Err(bad("a part of it is in no memslot"));
            }
        }
        let with_pages = slots.into_iter().zip(pieces).filter(|(_, pieces)| !pieces.is_empty());
        Ok(with_pages
            .map(|(slot, pieces)| {
                let chosen = Chosen::of(&pieces, slot.frames().pages as usize);
                slot.choosing(chosen)
            })
            .collect())
    }

    /// The memslot's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The flags that the slot has while nobody tracks it.
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// Guest-physical address of its first byte.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Whether the slot has no memory at all; KVM has no such slots.
    pub fn is_empty(&self) -> bool {
        self.mapping.size() == 0
    }

    /// Address of its first byte in this process.
    pub fn hva(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Its frames.
    pub fn frames(&self) -> PageRange {
        PageRange { start: self.gpa.gfn(), pages: self.len() / PAGE_SIZE }
    }

    /// The frames that are tracked: all, unless they were [chosen](Slot::choose).
    pub fn tracked(&self) -> impl Iterator<Item = PageRange> + '_ {
        let first = self.frames().start.0;
        let frames = move |pages: &Range<usize>| PageRange {
            start: Gfn(first + pages.start as u64),
            pages: pages.len() as u64,
        };
        self.chosen.ranges().iter().map(frames)
    }

    pub(crate) fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// The same slot, with all of its pages chosen.
    pub(crate) fn whole(&self) -> Slot {
        self.choosing(Chosen::all(self.frames().pages as usize))
    }

    /// Whether it is the same memslot, whatever is chosen of it.
    pub(crate) fn is(&self, other: &Slot) -> bool {
        (self.id, self.flags, self.gpa) == (other.id, other.flags, other.gpa)
            && Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Whether it cannot be there together with `other`.
    pub(crate) fn excludes(&self, other: &Slot) -> bool {
        let meet = |a: u64, b: u64| a < b.saturating_add(other.len()) && b < a.saturating_add(self.len());
        self.id == other.id || meet(self.gpa.0, other.gpa.0) || meet(self.hva(), other.hva())
    }

    /// Copies what is in memory from page `page` on, as it is at this moment, to `into`.
    pub(crate) fn read(&self, page: usize, into: &mut [u8]) -> bool {
        let copied = self.mapping.get_slice(page << PAGE_SHIFT, into.len()).map(|slice| slice.copy_to(into));
        copied.is_ok_and(|bytes| bytes == into.len())
    }

    /// The record of the host's writes to it.
    pub fn host_writes(&self) -> &RegionBitmap {
        self.mapping.bitmap()
    }

    /// Checks `slots` and puts them in the order of their addresses.
    pub(crate) fn sorted(mut slots: Vec<Slot>) -> Result<Vec<Slot>, TrackerError> {
        slots.sort_by_key(|slot| slot.gpa);
        let mut end = Gfn(0);
        for slot in &slots {
            let bad = |why| Err(TrackerError::BadSlot { id: slot.id, why });
            if slot.is_empty() {
                return bad("it has no memory");
            }
            if slot.gpa.0 % PAGE_SIZE != 0 || slot.len() % PAGE_SIZE != 0 || slot.hva() % PAGE_SIZE != 0 {
                return bad("its addresses and size must be multiples of 4 KiB");
            }
            if slot.frames().start < end {
                return bad("it overlaps another slot");
            }
            if slot.host_writes().pages() as u64 != slot.frames().pages {
                return bad("its RegionBitmap was made for another size");
            }
            end = slot.frames().end();
        }
        for (index, slot) in slots.iter().enumerate() {
            if slots[..index].iter().any(|other| other.id == slot.id) {
                return Err(TrackerError::BadSlot { id: slot.id, why: "its number is given twice" });
            }
        }
        Ok(slots)
    }
}

impl Tracked for Slot {
    fn slot(&self) -> &Slot {
        self
    }

    fn choosing(&self, chosen: Chosen) -> Slot {
        Slot { chosen, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    /// Two neighbours, and one apart.
    const SLOTS: [(u64, u64); 3] = [(10, 70), (80, 30), (200, 5)];

    fn slots() -> Vec<Slot> {
        let region = |&(first, pages): &(u64, u64)| {
            let start = GuestAddress(first * PAGE_SIZE);
            GuestRegionMmap::<RegionBitmap>::from_range(start, (pages * PAGE_SIZE) as usize, None).unwrap()
        };
        (0..).zip(&SLOTS).map(|(id, slot)| Slot::of_region(id, 0, &region(slot))).collect()
    }

    proptest! {
        #[test]
        fn chosen_ranges_are_tracked_or_refused(
            ranges in prop::collection::vec((0..215u64, 0..60u64), 0..4),
        ) {
            let ranges: Vec<_> =
                ranges.into_iter().map(|(start, pages)| PageRange { start: Gfn(start), pages }).collect();
            let wanted: Vec<_> = ranges.iter().flat_map(PageRange::iter).collect();
            let set: BTreeSet<_> = wanted.iter().copied().collect();
            let known = |gfn: &Gfn| SLOTS.iter().any(|slot| (slot.0..slot.0 + slot.1).contains(&gfn.0));
            let good =
                set.len() == wanted.len() && set.iter().all(known) && ranges.iter().all(|range| range.pages > 0);
            match Slot::choose(slots(), &ranges) {
                Ok(chosen) => {
                    prop_assert!(good);
                    let tracked: Vec<_> =
                        chosen.iter().flat_map(|slot| slot.tracked().flat_map(|run| run.iter())).collect();
                    prop_assert_eq!(tracked, set.into_iter().collect::<Vec<_>>());
                    prop_assert!(chosen.iter().all(|slot| slot.tracked().next().is_some()));
                }
                Err(TrackerError::BadRange { .. }) => prop_assert!(!good),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }

    #[test]
    fn a_range_that_ends_beyond_all_addresses_is_refused() {
        let range = PageRange { start: Gfn(u64::MAX - 1), pages: 3 };
        assert!(matches!(Slot::choose(slots(), &[range]), Err(TrackerError::BadRange { .. })));
    }
}
