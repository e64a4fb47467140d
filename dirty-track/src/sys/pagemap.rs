//! PAGEMAP_SCAN: which pages of a range were written since they were write-protected, and how they are mapped.
//!
//! Only looking is offered here. The ioctl can protect what it finds in the same walk (`PM_SCAN_WP_MATCHING`), but
//! then KVM's MMU notifier is called for the whole range that is walked, which zaps every second-level mapping of
//! it: at 1 % dirty the guest's next pass over its memory takes some hundred times as long as with a look that is
//! followed by protecting just what was found.
//!
//! Source: Linux, include/uapi/linux/fs.h, Documentation/admin-guide/mm/pagemap.rst and fs/proc/task_mmu.c
//! (`do_pagemap_scan`).

use std::fs::File;
use std::io;
use std::ops::Range;

use libc::c_ulong;
use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN,
    page_region, pm_scan_arg,
};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

const PAGEMAP_SCAN: c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, b'f' as u32, 16, size_of::<pm_scan_arg>() as u32);

// The number as a C compiler computes it from the header, and the layout of what comes back.
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);
const _: () = assert!(size_of::<page_region>() == 24);

/// A run of pages that a scan found.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Found(page_region);

impl Found {
    /// An entry of a buffer that nothing was found for yet.
    pub const NOTHING: Found = Found(page_region { start: 0, end: 0, categories: 0 });

    /// Its addresses.
    pub fn addresses(&self) -> Range<u64> {
        self.0.start..self.0.end
    }

    /// They are not write-protected by userfaultfd.
    pub fn is_written(&self) -> bool {
        self.is(PAGE_IS_WRITTEN)
    }

    /// They are mapped by huge pages: transparent ones, or of the hugetlb pool. A run of [`Pagemap::mapped`] alone knows.
    pub fn is_huge(&self) -> bool {
        self.is(PAGE_IS_HUGE)
    }

    /// They are the zero page. A run of [`Pagemap::mapped`] alone knows.
    pub fn is_zero(&self) -> bool {
        self.is(PAGE_IS_PFNZERO)
    }

    /// They belong to a file, or to shared memory. A run of [`Pagemap::mapped`] alone knows.
    pub fn is_file(&self) -> bool {
        self.is(PAGE_IS_FILE)
    }

    /// They are not in memory. A run of [`Pagemap::mapped`] alone knows.
    pub fn is_swapped(&self) -> bool {
        self.is(PAGE_IS_SWAPPED)
    }

    fn is(&self, category: u32) -> bool {
        self.0.categories & u64::from(category) != 0
    }
}

/// The page tables of this process.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens /proc/self/pagemap.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn open() -> io::Result<Pagemap> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// Looks for pages in `start..end` that are not write-protected by userfaultfd, which in asynchronous mode
    /// means that they were written. Fills `found` from its start, in ascending order, and returns the number of
    /// runs and the address to go on from, which is `end` when all of the range was looked at.
    ///
    /// # Errors
    /// `ENOTTY` before Linux 6.7.
    pub fn written(&self, start: u64, end: u64, found: &mut [Found]) -> Result<(usize, u64), errno::Error> {
        // As a mask of all, not of any: for exactly this question the kernel has a fast path.
        self.scan(
            pm_scan_arg { category_mask: PAGE_IS_WRITTEN.into(), ..question(start, end, PAGE_IS_WRITTEN) },
            found,
        )
    }

    /// Looks for pages in `start..end` that are mapped or swapped out, as runs of pages that are mapped in the same way.
    /// Fills `found` and returns as [`written`](Pagemap::written) does.
    ///
    /// # Errors
    /// `ENOTTY` before Linux 6.7.
    pub fn mapped(&self, start: u64, end: u64, found: &mut [Found]) -> Result<(usize, u64), errno::Error> {
        let any_of = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
        let told = any_of | PAGE_IS_WRITTEN | PAGE_IS_HUGE | PAGE_IS_PFNZERO | PAGE_IS_FILE;
        self.scan(pm_scan_arg { category_anyof_mask: any_of.into(), ..question(start, end, told) }, found)
    }

    /// Puts a question. No flag is to be set in it.
    fn scan(&self, mut scan: pm_scan_arg, found: &mut [Found]) -> Result<(usize, u64), errno::Error> {
        scan.vec = found.as_mut_ptr() as u64;
        scan.vec_len = found.len() as u64;
        // SAFETY: the ioctl reads and fills the struct, which outlives the call, and writes at most `vec_len`
        // elements to `vec`, which is `found`: of the layout that it expects (transparent over page_region),
        // and ours alone. Without PM_SCAN_WP_MATCHING it changes no mapping.
        let runs = unsafe { ioctl_with_mut_ref(&self.0, PAGEMAP_SCAN, &mut scan) };
        let runs = usize::try_from(runs).map_err(|_| errno::Error::last())?;
        Ok((runs.min(found.len()), scan.walk_end))
    }
}

/// A question about `start..end` whose answers tell which of the categories `told` pages are in.
fn question(start: u64, end: u64, told: u32) -> pm_scan_arg {
    pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: 0,
        return_mask: told.into(),
    }
}
