//! A memslot as a tracker needs to know it.

use std::sync::Arc;

use vm_memory::{Address, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::addr::{Gfn, Gpa, PAGE_SIZE, PageRange};
use crate::region::RegionBitmap;
use crate::tracker::TrackerError;

/// A memslot: its number, the region of guest memory behind it, and the flags it was registered with.
///
/// It keeps the region's mapping alive.
#[derive(Clone, Debug)]
pub struct Slot {
    id: u32,
    flags: u32,
    gpa: Gpa,
    mapping: Arc<MmapRegion<RegionBitmap>>,
}

impl Slot {
    /// The memslot `id`, which is registered with KVM for the whole of `region` and with `flags` (those of
    /// KVM_SET_USER_MEMORY_REGION, without KVM_MEM_LOG_DIRTY_PAGES: that one is the tracker's).
    ///
    /// The slot must be registered before a tracker is armed with it, and stay so.
    pub fn of_region(id: u32, flags: u32, region: &GuestRegionMmap<RegionBitmap>) -> Slot {
        Slot { id, flags, gpa: Gpa(region.start_addr().raw_value()), mapping: region.get_mmap() }
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
