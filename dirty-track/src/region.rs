//! The bitmap of one guest memory region that records what the *host* writes there.
//!
//! KVM's dirty logs see the guest's own writes only. What a device model writes (a disk read, a received
//! packet, the used ring) goes through vm-memory, which calls the region's [`Bitmap`] after each write.
//! [`RegionBitmap`] is that bitmap, and a [tracker](crate::tracker) merges it into its harvests.
//!
//! # Use
//! Memory that vm-memory allocates takes it as a type parameter:
//!
//! ```
//! use dirty_track::region::RegionBitmap;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let memory = GuestMemoryMmap::<RegionBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! memory.write_obj(1u8, GuestAddress(0x5000))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Memory that the monitor mapped itself goes through `MmapRegionBuilder`:
//! `MmapRegionBuilder::new_with_bitmap(len, RegionBitmap::with_len(len)).with_raw_mmap_pointer(pointer)`,
//! then `build()` and `GuestRegionMmap::new(mapping, base)`.
//!
//! # Cost
//! While nobody tracks, a mark is one fence and one load, and the bitmap itself is not even allocated.
//!
//! Code that writes to guest memory past vm-memory (through a raw pointer, by `read(2)` into it) must call
//! `mark_dirty` itself, *after* the write.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};

use crate::addr::PAGE_SIZE;
use crate::bitmap::{DirtyBitmap, SliceAt};

/// Records the host's writes to one region of guest memory. Clones share the record.
///
/// It has one reader: the tracker that was armed with it last. Two trackers must not share a region.
#[derive(Clone, Debug, Default)]
pub struct RegionBitmap {
    record: Arc<Record>,
}

#[derive(Debug, Default)]
struct Record {
    pages: usize,
    enabled: AtomicBool,
    /// Something was marked since the last drain.
    marked: AtomicBool,
    /// Made when recording starts for the first time: a monitor that never tracks a guest of 64 GiB does not
    /// pay for 2 MiB of zeros at its start.
    bitmap: OnceLock<DirtyBitmap>,
}

impl RegionBitmap {
    /// Pages that the bitmap covers.
    pub fn pages(&self) -> usize {
        self.record.pages
    }

    /// Forgets what was recorded and begins to record. Every write that is not visible to the caller when
    /// this returns will be recorded.
    pub fn start(&self) {
        let bitmap = self.record.bitmap.get_or_init(|| DirtyBitmap::new(self.record.pages));
        self.record.enabled.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        bitmap.drain(|_, _| {});
    }

    /// Stops recording.
    pub fn stop(&self) {
        self.record.enabled.store(false, Ordering::SeqCst);
    }

    /// Takes what was recorded since the last call: (word number, bits) for each word that has any.
    pub fn drain(&self, take: impl FnMut(usize, u64)) {
        // Most epochs of most regions have none, and looking for them would cost more than the rest of a harvest.
        if let Some(bitmap) = self.record.bitmap.get()
            && self.record.marked.swap(false, Ordering::AcqRel)
        {
            bitmap.drain(take);
        }
    }
}

impl NewBitmap for RegionBitmap {
    fn with_len(len: usize) -> RegionBitmap {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        RegionBitmap { record: Arc::new(Record { pages, ..Record::default() }) }
    }
}

impl<'a> WithBitmapSlice<'a> for RegionBitmap {
    type S = RegionSlice<'a>;
}

/// A [`RegionBitmap`] seen from some offset on.
pub type RegionSlice<'a> = SliceAt<'a, RegionBitmap>;

impl Bitmap for RegionBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // Pairs with the fence in `start`. The write that is to be marked comes before it; so either this
        // thread sees that recording is on, or whoever turned it on sees the write. Without it the processor
        // may look at the flag first and let the write become visible only after a first copy was taken.
        fence(Ordering::SeqCst);
        if self.record.enabled.load(Ordering::Relaxed)
            && let Some(bitmap) = self.record.bitmap.get()
        {
            bitmap.mark_dirty(offset, len);
            // After the marks, and always: whoever finds it clear may leave marks behind that are made meanwhile,
            // and must find it set the next time. A store that depended on a look at it could be late.
            self.record.marked.store(true, Ordering::Release);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.record.bitmap.get().is_some_and(|bitmap| bitmap.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> RegionSlice<'_> {
        SliceAt::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    fn dirty_pages(bitmap: &RegionBitmap) -> Vec<usize> {
        let mut pages = Vec::new();
        bitmap.drain(|word, bits| {
            pages.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| word * 64 + bit));
        });
        pages
    }

    proptest! {
        #[test]
        fn a_mark_covers_every_byte_of_the_write(
            len in 1..40_000usize,
            base in 0..50_000usize,
            offset in 0..50_000usize,
            size in 0..50_000usize,
        ) {
            let bitmap = RegionBitmap::with_len(len);
            bitmap.start();
            bitmap.slice_at(base / 2).slice_at(base - base / 2).mark_dirty(offset, size);
            let written = base + offset..base + offset + size;
            let expected: Vec<_> = (0..len.div_ceil(4096))
                .filter(|page| written.start < (page + 1) * 4096 && written.end > page * 4096)
                .filter(|_| size > 0)
                .collect();
            prop_assert!(expected.iter().all(|page| bitmap.dirty_at(page * 4096)));
            prop_assert_eq!(dirty_pages(&bitmap), expected);
        }
    }

    #[test]
    fn a_mark_at_the_end_of_the_address_space_is_harmless() {
        let bitmap = RegionBitmap::with_len(8192);
        bitmap.start();
        bitmap.slice_at(usize::MAX).mark_dirty(usize::MAX, usize::MAX);
        bitmap.mark_dirty(4096, usize::MAX);
        assert_eq!(dirty_pages(&bitmap), [1]);
    }

    #[test]
    fn writes_through_vm_memory_are_recorded_while_somebody_tracks() {
        let memory = GuestMemoryMmap::<RegionBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let bitmap = memory.iter().next().unwrap().get_mmap().bitmap().clone();
        memory.write_obj(1u64, GuestAddress(0x3000)).unwrap();
        assert!(dirty_pages(&bitmap).is_empty(), "not recording yet");

        bitmap.start();
        memory.write_obj(1u64, GuestAddress(0x5ffc)).unwrap();
        memory.write_slice(&[7; 5000], GuestAddress(0x10000)).unwrap();
        memory.store(1u32, GuestAddress(0x20000), Ordering::Release).unwrap();
        memory.read_obj::<u64>(GuestAddress(0x30000)).unwrap();
        memory.read_volatile_from(GuestAddress(0x40fff), &mut &[1u8, 2][..], 2).unwrap();
        assert_eq!(dirty_pages(&bitmap), [0x5, 0x6, 0x10, 0x11, 0x20, 0x40, 0x41]);

        memory.write_obj(1u64, GuestAddress(0x7000)).unwrap();
        bitmap.start();
        assert!(dirty_pages(&bitmap).is_empty(), "a new start forgets what was before");
        bitmap.stop();
        memory.write_obj(1u64, GuestAddress(0x8000)).unwrap();
        assert!(dirty_pages(&bitmap).is_empty());
    }
}
