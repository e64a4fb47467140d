//! Pages that are missing, put where they are missing: by copy, as zero, from the file's own cache, or by moving.
//!
//! Each call either fills a page or leaves it as it was; nothing that is there is ever replaced. A call for several
//! pages fills them in order and stops at the first that it cannot. None of them wakes anybody: see
//! [`Uffd::wake`].
//!
//! Source: Linux, fs/userfaultfd.c and mm/userfaultfd.c.

use std::io;
use std::ops::Range;
use std::{ptr, slice};

use libc::c_ulong;
use linux_raw_sys::general::{
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, uffdio_continue,
    uffdio_copy, uffdio_move, uffdio_range, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WRITEPROTECT, UFFDIO_ZEROPAGE};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use super::Uffd;
use crate::addr::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE};
use crate::sys::kvm::check;
use crate::tracker::Slot;

const UFFDIO_MOVE: c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, 0xaa, 0x05, size_of::<uffdio_move>() as u32);

// The numbers as a C compiler computes them from the header.
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && size_of::<uffdio_copy>() == 40);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04 && size_of::<uffdio_zeropage>() == 32);
const _: () = assert!(UFFDIO_CONTINUE == 0xc020_aa07 && size_of::<uffdio_continue>() == 32);
const _: () = assert!(UFFDIO_MOVE == 0xc028_aa05);

/// `DONTWAKE` and `WP`, the same bits in COPY and CONTINUE (`DONTWAKE` in all): expressions in the header, some of
/// which bindgen leaves out.
const DONT_WAKE: u64 = 1;
const PROTECTED: u64 = 2;
/// `UFFDIO_WRITEPROTECT_MODE_DONTWAKE`.
const OPEN_DONT_WAKE: u64 = 2;

/// How far a call got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were filled.
    pub pages: usize,
    /// Why it stopped, if it did: `EEXIST`: something is there. `ENOENT`: the range is not registered any more.
    /// `EAGAIN`: mappings change at this moment, or it stopped after the first page and another call says why.
    /// `EFAULT`: the file's cache does not have the page.
    pub error: Option<i32>,
}

impl Progress {
    fn of(result: libc::c_int, bytes: i64) -> Progress {
        let error = (result < 0).then(|| errno::Error::last().errno());
        Progress { pages: (bytes.max(0) as u64 >> PAGE_SHIFT) as usize, error }
    }

    /// Nothing was done, for the arguments cannot be.
    pub(crate) const REFUSED: Progress = Progress { pages: 0, error: Some(libc::EINVAL) };
}

/// The addresses of `pages` of `slot`, if it has them all.
fn range(slot: &Slot, pages: &Range<usize>) -> Option<uffdio_range> {
    let inside = pages.start < pages.end && pages.end as u64 <= slot.frames().pages;
    let start = slot.hva() + ((pages.start as u64) << PAGE_SHIFT);
    inside.then(|| uffdio_range { start, len: (pages.len() as u64) << PAGE_SHIFT })
}

impl Uffd {
    /// Registers all of `slot` for write-protection and for faults of pages that are nowhere; if it maps a `file`,
    /// of tmpfs or hugetlb, also for faults of pages that the file's cache has and only the mapping has not.
    ///
    /// # Errors
    /// As for [`register`](Uffd::register).
    pub fn register_slot(&self, slot: &Slot, file: bool) -> Result<(), errno::Error> {
        let minor = if file { UFFDIO_REGISTER_MODE_MINOR } else { 0 };
        let mode = UFFDIO_REGISTER_MODE_MISSING | minor | UFFDIO_REGISTER_MODE_WP;
        self.register_for(slot.hva(), slot.len(), mode)
    }

    /// Fills `pages` of `slot` with what is in `from`, which has as many.
    pub fn copy(&self, slot: &Slot, pages: Range<usize>, from: &[u8], protected: bool) -> Progress {
        let Some(range) = range(slot, &pages).filter(|range| range.len == from.len() as u64) else {
            return Progress::REFUSED;
        };
        let mode = DONT_WAKE | if protected { PROTECTED } else { 0 };
        let mut copy =
            uffdio_copy { dst: range.start, src: from.as_ptr() as u64, len: range.len, mode, copy: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call, and reads `len` bytes of `from`,
        // which has them. It writes only to pages of the slot's mapping, which the slot keeps alive, and which are
        // guest memory: nobody has a reference into it.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY.into(), &mut copy) };
        Progress::of(result, copy.copy)
    }

    /// Maps the zero page at `pages` of `slot`. There is no protected form.
    pub fn zero(&self, slot: &Slot, pages: Range<usize>) -> Progress {
        let Some(range) = range(slot, &pages) else { return Progress::REFUSED };
        let mut zero = uffdio_zeropage { range, mode: DONT_WAKE, zeropage: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call, and maps pages that read as zero in
        // the slot's mapping where none were, which is guest memory.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE.into(), &mut zero) };
        Progress::of(result, zero.zeropage)
    }

    /// Maps `pages` of `slot` from its file's cache.
    pub fn map_cached(&self, slot: &Slot, pages: Range<usize>, protected: bool) -> Progress {
        let Some(range) = range(slot, &pages) else { return Progress::REFUSED };
        let mode = DONT_WAKE | if protected { PROTECTED } else { 0 };
        let mut map = uffdio_continue { range, mode, mapped: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call, and maps what the mapping stands for.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_CONTINUE.into(), &mut map) };
        Progress::of(result, map.mapped)
    }

    /// Moves pages of `staging`, from page `first` on, to `pages` of `slot`; a huge page stays huge if all of it
    /// moves. There is no protected form. Linux 6.8, private anonymous memory only.
    ///
    /// It may say `EEXIST` of pages that it has just moved itself (seen on 6.18, when it had to split a huge page because
    /// somebody had faulted at the destination): they are as they should be.
    pub fn take(&self, slot: &Slot, pages: Range<usize>, staging: &Staging, first: usize) -> Progress {
        let Some(range) = range(slot, &pages) else { return Progress::REFUSED };
        if first.checked_add(pages.len()).is_none_or(|end| end > staging.pages()) {
            return Progress::REFUSED;
        }
        let src = staging.start as u64 + ((first as u64) << PAGE_SHIFT);
        let mut take = uffdio_move { dst: range.start, src, len: range.len, mode: DONT_WAKE, move_: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call. It takes pages out of the staging
        // memory, to which nobody has references (they read as zero afterwards), and puts them into the slot's
        // mapping where none were, which is guest memory.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_MOVE, &mut take) };
        Progress::of(result, take.move_)
    }

    /// Lifts the protection of `pages` of `slot`, and wakes nobody.
    ///
    /// # Errors
    /// As for [`protect`](Uffd::protect).
    pub fn open_pages(&self, slot: &Slot, pages: Range<usize>) -> Result<(), errno::Error> {
        let range = range(slot, &pages).ok_or_else(|| errno::Error::new(libc::EINVAL))?;
        let mut change = uffdio_writeprotect { range, mode: OPEN_DONT_WAKE };
        // SAFETY: the ioctl reads the struct, which outlives the call, and changes no contents of memory.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_WRITEPROTECT.into(), &mut change) })
    }
}

/// Private memory whose pages are going to be moved into a guest.
#[derive(Debug)]
pub struct Staging {
    start: *mut u8,
    pages: usize,
    mapped: (*mut libc::c_void, usize),
}

const FRESH: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Staging {
    /// Memory of `pages` pages that starts where a huge page can.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn new(pages: usize) -> io::Result<Staging> {
        let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
        let len = pages.checked_mul(PAGE_SIZE as usize).ok_or_else(too_large)?;
        let whole = len.checked_add(BLOCK_SIZE as usize).ok_or_else(too_large)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: it maps new memory where there was none.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), whole, access, FRESH, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (mapped as usize).next_multiple_of(BLOCK_SIZE as usize) as *mut u8;
        // SAFETY: the range is what was mapped just now; the advice changes neither contents nor access. MOVE refuses
        // pages that a child process shares.
        unsafe { libc::madvise(mapped, whole, libc::MADV_DONTFORK) };
        Ok(Staging { start, pages, mapped: (mapped, whole) })
    }

    /// Empties it. What is written from now on goes into huge pages, as far as the host has such pages. (Where small pages
    /// were, a table for them stays, and no huge page comes into its place: so all is mapped anew.)
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn prepare_huge(&mut self) -> io::Result<()> {
        let (start, len) = (self.start.cast(), self.pages << PAGE_SHIFT);
        let flags = FRESH | libc::MAP_FIXED;
        // SAFETY: the range is within the mapping, which is this value's alone and is not borrowed now.
        let mapped = unsafe { libc::mmap(start, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; the advice changes neither contents nor access.
        unsafe {
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
            libc::madvise(start, len, libc::MADV_DONTFORK);
        }
        Ok(())
    }

    /// Its size.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Its contents: zeros, but for what was written and was not moved since.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the range is within the mapping, which is this value's alone, and nobody else has it, nor moves pages
        // out of it, while it is borrowed.
        unsafe { slice::from_raw_parts_mut(self.start, self.pages << PAGE_SHIFT) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing has references into it.
        unsafe { libc::munmap(self.mapped.0, self.mapped.1) };
    }
}

// SAFETY: it is a range of addresses, the same for all threads. Through a shared reference only the kernel changes
// it, page by page.
unsafe impl Send for Staging {}
// SAFETY: as above.
unsafe impl Sync for Staging {}

/// Tells the host that `pages` of `slot` were not used lately: their accessed bits in this process's page tables are
/// cleared. No contents change, and nothing happens to memory for which that has no meaning.
pub fn cold(slot: &Slot, pages: Range<usize>) {
    if let Some(range) = range(slot, &pages) {
        // SAFETY: the range is in the slot's mapping, which the slot keeps alive; the advice changes no contents.
        unsafe { libc::madvise(range.start as *mut libc::c_void, range.len as usize, libc::MADV_COLD) };
    }
}
