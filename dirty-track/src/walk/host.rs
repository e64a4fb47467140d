//! The host's view of guest memory: how this process maps it, as a table that is only read.
//!
//! The kernel tells it by PAGEMAP_SCAN (Linux 6.7), in runs. A [`HostMap`] is such an answer, and does not change any
//! more when the mappings do: it was true page by page, each at some moment while it was
//! [taken](HostMap::take).

use std::convert::Infallible;
use std::ops::Range;

use vmm_sys_util::errno;

use super::{HugeEntry, Look, OutOfMemory, Table};
use crate::addr::{PAGE_SHIFT, PAGE_SIZE, PageSize};
use crate::sys::pagemap::{Found, Pagemap};
use crate::tracker::Slot;

/// Runs that are asked for at a time.
const BATCH: usize = 512;

/// Why the host's view cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The pages of this process cannot be asked for.
    #[error("cannot open /proc/self/pagemap: {0}; is /proc mounted?")]
    Open(#[source] std::io::Error),
    /// The kernel does not answer.
    #[error("PAGEMAP_SCAN of the addresses from {address:#x} on: {source}; it takes Linux 6.7")]
    Scan {
        /// Where.
        address: u64,
        /// Why.
        source: errno::Error,
    },
    /// A walk went beyond what was taken.
    #[error("page {page:#x} is not one of those that the map was taken of: walk over HostMap::pages")]
    NotTaken {
        /// An address in this process, divided by 4096.
        page: u64,
    },
}

/// How the host maps something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// It is not write-protected by userfaultfd. In asynchronous mode that means written since it was protected.
    pub written: bool,
    /// It is the zero page: read, and never written.
    pub zero: bool,
    /// It belongs to a file, or to shared memory.
    pub file: bool,
    /// It is not in memory: it was swapped out, or there is but a marker of userfaultfd's, which says that it is
    /// protected.
    pub swapped: bool,
}

/// What a range of this process's addresses maps. Pages are addresses in this process, divided by 4096.
///
/// A huge entry is one of 2 MiB; one of 1 GiB (of the hugetlb pool) is told as 512 of these.
#[derive(Debug)]
pub struct HostMap {
    pages: Range<u64>,
    /// Ascending, and no two of them overlap.
    runs: Vec<Run>,
}

/// Pages that are mapped in the same way.
#[derive(Debug)]
struct Run {
    pages: Range<u64>,
    huge: bool,
    entry: HostEntry,
}

impl HostMap {
    /// Asks for all of `slot`, of which a part of a page at the end is left out.
    ///
    /// # Errors
    /// As [`take`](HostMap::take).
    pub fn of_slot(slot: &Slot) -> Result<HostMap, HostError> {
        let start = slot.hva() >> PAGE_SHIFT;
        HostMap::take(start..start + slot.frames().pages)
    }

    /// Asks for `pages`. It takes 24 bytes for each run of pages of a kind, so take large memory in parts.
    ///
    /// # Errors
    /// [`HostError::Open`]; [`HostError::Scan`], with `ENOTTY` before Linux 6.7 and `EFAULT` for addresses that are
    /// none of a process.
    pub fn take(pages: Range<u64>) -> Result<HostMap, HostError> {
        let pagemap = Pagemap::open().map_err(HostError::Open)?;
        let mut map = HostMap { pages: pages.clone(), runs: Vec::new() };
        let mut batch = [Found::NOTHING; BATCH];
        let none = HostError::Scan { address: u64::MAX, source: errno::Error::new(libc::EFAULT) };
        let end = pages.end.checked_mul(PAGE_SIZE).ok_or(none)?;
        // An empty range may begin anywhere.
        let mut address = pages.start.saturating_mul(PAGE_SIZE);
        while address < end {
            let failed = |source| HostError::Scan { address, source };
            let (count, next) = pagemap.mapped(address, end, &mut batch).map_err(failed)?;
            batch[..count].iter().for_each(|found| map.add(found));
            // A kernel that does not get on would keep us here for ever.
            if next <= address {
                return Err(failed(errno::Error::new(libc::EIO)));
            }
            address = next;
        }
        Ok(map)
    }

    /// Adds what comes after the runs that there are. The kernel may tell the end of one batch again in the next.
    fn add(&mut self, found: &Found) {
        let Range { start, end } = found.addresses();
        let told = self.runs.last().map_or(0, |run| run.pages.end);
        let pages = (start >> PAGE_SHIFT).max(told)..end >> PAGE_SHIFT;
        if pages.is_empty() {
            return;
        }
        let entry = HostEntry {
            written: found.is_written(),
            zero: found.is_zero(),
            file: found.is_file(),
            swapped: found.is_swapped(),
        };
        self.runs.push(Run { pages, huge: found.is_huge(), entry });
    }

    /// The pages that it was taken of.
    pub fn pages(&self) -> Range<u64> {
        self.pages.clone()
    }
}

impl Table for HostMap {
    type Huge = HostEntry;
    type Leaf = HostEntry;
    type Descend = Infallible;
    type Error = HostError;

    fn look(&self, pages: Range<u64>) -> Result<Look<HostEntry, HostEntry>, HostError> {
        let page = pages.start;
        if page < self.pages.start || self.pages.end < pages.end {
            let page = if page < self.pages.start { page } else { page.max(self.pages.end) };
            return Err(HostError::NotTaken { page });
        }
        let next = self.runs.partition_point(|run| run.pages.end <= page);
        let Some(run) = self.runs.get(next) else { return Ok(Look::Hole { end: self.pages.end }) };
        Ok(match run.pages {
            Range { start, .. } if page < start => Look::Hole { end: start },
            _ if run.huge => Look::Huge { size: PageSize::M2, huge: run.entry },
            Range { end, .. } => Look::Leaves { end, leaf: run.entry },
        })
    }

    fn split(&self, _: &HugeEntry<HostEntry>, how: Infallible) -> Result<(), OutOfMemory> {
        match how {}
    }
}
