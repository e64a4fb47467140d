//! Memory whose addresses in this process and in the guest agree modulo 2 MiB, so that it can be huge in both.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;

use dirty_track::addr::{BLOCK_SIZE, Gpa};
use dirty_track::region::RegionBitmap;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

const BLOCK: usize = BLOCK_SIZE as usize;

/// A range of this process's addresses, unmapped when it is dropped.
pub(crate) struct Mapping {
    reserved: *mut libc::c_void,
    reserved_len: usize,
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes for guest memory at `gpa`: of the start of `file`, shared, or private ones.
    pub(crate) fn new(gpa: Gpa, len: usize, file: Option<&File>) -> Mapping {
        let reserved_len = len + 2 * BLOCK;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the first call maps where nothing is; the second replaces a part of what the first has mapped.
        unsafe {
            let reserved = libc::mmap(ptr::null_mut(), reserved_len, libc::PROT_NONE, none, -1, 0);
            assert_ne!(reserved, libc::MAP_FAILED);
            let start = (reserved as usize).next_multiple_of(BLOCK) + gpa.0 as usize % BLOCK;
            let (flags, fd) = file.map_or((none, -1), |file| (libc::MAP_SHARED, file.as_raw_fd()));
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(start as *mut libc::c_void, len, access, flags | libc::MAP_FIXED, fd, 0);
            assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            Mapping { reserved, reserved_len, start: start.cast(), len }
        }
    }

    /// vm-memory's view of it, which must not be used after it is dropped.
    pub(crate) fn region(&self, gpa: Gpa) -> GuestRegionMmap<RegionBitmap> {
        let builder = MmapRegionBuilder::new_with_bitmap(self.len, RegionBitmap::with_len(self.len))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE);
        // SAFETY: the range is mapped like that until `self` is dropped.
        let region = unsafe { builder.with_raw_mmap_pointer(self.start) }.build().unwrap();
        GuestRegionMmap::new(region, GuestAddress(gpa.0)).unwrap()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's, and whoever has a view of it has been told not to use it any more.
        unsafe { libc::munmap(self.reserved, self.reserved_len) };
    }
}

// SAFETY: it is a range of addresses, the same for all threads; nothing but dropping it does anything with them.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes anything but `drop`, which has it alone.
unsafe impl Sync for Mapping {}
