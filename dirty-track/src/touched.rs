//! Which pages were touched in an interval, read or written: the working set.
//!
//! Everything is unmapped, and what is mapped at the interval's end was touched in it. That is exact for memory that is
//! shared in small pages (a memfd): unmapping loses nothing there, and each page comes back by itself when the guest, a
//! device or the monitor touches it. It has its price: each page that is touched again costs another fault (some 6 us),
//! unmapping some 25 ms per GiB, looking 1 ms. So the same can be had of a sample of pages, at next to no cost.
//!
//! # Contract
//! - A page that was touched after [`begin`](Touched::begin) returned is in the set. One that was touched while it was at
//!   work may be.
//! - A page that nobody touched is not in the set. For that, the host must not map neighbours of a page that is read
//!   (*fault-around*, mm/memory.c). It does not where a userfaultfd is registered for write-protection or minor faults
//!   (`uffd_disable_fault_around`), so this registers one, and protects nothing; where a tracker or a fault server has
//!   one already, that does as well. What a fault server brings along is mapped, and is in the set.
//! - The dirty log of KVM may report a page that was only read once more for it: unmapped pages are mapped anew.

use std::io;

use vmm_sys_util::errno;

use crate::addr::{Gfn, PAGE_SHIFT, PageRange};
use crate::mix::below;
use crate::rate::Change;
use crate::sys::pagemap::{Found, Pagemap};
use crate::sys::uffd::{Mode, Uffd, UffdError};
use crate::sys::unmap::SharedSlot;
use crate::tracker::{Slot, TrackerError};

/// Pages that one call unmaps: it keeps KVM's MMU notifier open, and vCPUs out, for so long.
const CHUNK: usize = 1 << 15;

/// Why touched pages cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TouchedError {
    /// The slots make no sense.
    #[error(transparent)]
    Slots(#[from] TrackerError),
    /// Memory that would be lost if it were unmapped.
    #[error(
        "what was touched in memslot {0} cannot be told: it has to be shared memory in small pages (a memfd), \
         because all of it is unmapped for that"
    )]
    NotShared(u32),
    /// /proc.
    #[error("cannot look at this process's own memory in /proc: {0}")]
    Proc(#[source] io::Error),
    /// No userfaultfd.
    #[error(transparent)]
    Userfaultfd(#[from] UffdError),
    /// It cannot have the memory.
    #[error("cannot register memslot {slot} with a userfaultfd: {source}")]
    Register {
        /// The memslot.
        slot: u32,
        /// What the system said.
        source: errno::Error,
    },
    /// Unmapping.
    #[error("cannot unmap memslot {slot}: {source}")]
    Unmap {
        /// The memslot.
        slot: u32,
        /// What the system said.
        source: errno::Error,
    },
    /// Looking.
    #[error("cannot see what of memslot {slot} is mapped (PAGEMAP_SCAN, Linux 6.7): {source}")]
    Look {
        /// The memslot.
        slot: u32,
        /// What the system said.
        source: errno::Error,
    },
}

/// Tells which pages of some slots are touched.
#[derive(Debug)]
pub struct Touched {
    slots: Vec<SharedSlot>,
    pagemap: Pagemap,
    /// The pages that are looked at; `None` for all of them. Slot and page, ascending.
    sample: Option<Vec<(usize, usize)>>,
    /// Dropped last.
    _uffd: Uffd,
}

impl Touched {
    /// Prepares to tell which pages of `slots` are touched.
    ///
    /// # Errors
    /// Every [`TouchedError`] but that of unmapping.
    pub fn new(slots: Vec<Slot>) -> Result<Touched, TouchedError> {
        let uffd = Uffd::open(Mode::Sync)?;
        let mut shared = Vec::new();
        for slot in Slot::sorted(slots)? {
            let id = slot.id();
            match uffd.register(slot.hva(), slot.len()) {
                // Somebody else's does as well.
                Err(error) if error.errno() == libc::EBUSY => {}
                other => other.map_err(|source| TouchedError::Register { slot: id, source })?,
            }
            shared
                .push(SharedSlot::new(slot).map_err(TouchedError::Proc)?.ok_or(TouchedError::NotShared(id))?);
        }
        let touched = Touched {
            slots: shared,
            pagemap: Pagemap::open().map_err(TouchedError::Proc)?,
            sample: None,
            _uffd: uffd,
        };
        // Whether the kernel can be asked at all.
        touched.slots.first().map_or(Ok(()), |slot| touched.mapped(slot, 0..1, |_| {}))?;
        Ok(touched)
    }

    /// The same for a random sample of `per_gib` pages of each GiB, one in each of as many equal parts. Different
    /// `seed`s choose different pages.
    ///
    /// # Errors
    /// See [`new`](Touched::new).
    pub fn sampled(slots: Vec<Slot>, per_gib: u64, seed: u64) -> Result<Touched, TouchedError> {
        let mut touched = Touched::new(slots)?;
        let mut sample = Vec::new();
        for (index, slot) in touched.slots.iter().enumerate() {
            let pages = slot.slot().frames().pages;
            let count = ((u128::from(pages) * u128::from(per_gib)) >> 18).clamp(1, pages.into()) as u64;
            let bound = |part: u64| (u128::from(part) * u128::from(pages) / u128::from(count)) as u64;
            sample.extend((0..count).map(|part| {
                let (from, to) = (bound(part), bound(part + 1));
                (index, (from + below(seed ^ part, to - from)) as usize)
            }));
        }
        touched.sample = Some(sample);
        Ok(touched)
    }

    /// All pages that there are.
    fn all_pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.slot().frames().pages).sum()
    }

    /// Begins an interval.
    ///
    /// # Errors
    /// [`TouchedError::Unmap`]: no interval has begun.
    pub fn begin(&mut self) -> Result<(), TouchedError> {
        let unmap = |slot: &SharedSlot, pages| {
            slot.unmap(pages).map_err(|source| TouchedError::Unmap { slot: slot.slot().id(), source })
        };
        if let Some(sample) = &self.sample {
            return sample.iter().try_for_each(|&(slot, page)| unmap(&self.slots[slot], page..page + 1));
        }
        for slot in &self.slots {
            let pages = slot.slot().frames().pages as usize;
            (0..pages).step_by(CHUNK).try_for_each(|start| unmap(slot, start..(start + CHUNK).min(pages)))?;
        }
        Ok(())
    }

    /// Calls `each` for every run of pages that were touched since the interval began, in ascending order, as far as
    /// they are in the sample, and says how much that is. The interval goes on.
    ///
    /// # Errors
    /// [`TouchedError::Look`].
    pub fn look(&self, mut each: impl FnMut(PageRange)) -> Result<Change, TouchedError> {
        let pages = self.all_pages();
        let mut changed = 0;
        let mut count = |range: PageRange| {
            changed += range.pages;
            each(range);
        };
        let sampled = match &self.sample {
            Some(sample) => {
                for &(slot, page) in sample {
                    self.mapped(&self.slots[slot], page..page + 1, &mut count)?;
                }
                sample.len() as u64
            }
            None => {
                for slot in &self.slots {
                    self.mapped(slot, 0..slot.slot().frames().pages as usize, &mut count)?;
                }
                pages
            }
        };
        Ok(Change { sampled, changed, pages })
    }

    /// Calls `each` for the runs of `pages` that are mapped.
    fn mapped(
        &self,
        slot: &SharedSlot,
        pages: std::ops::Range<usize>,
        mut each: impl FnMut(PageRange),
    ) -> Result<(), TouchedError> {
        let slot = slot.slot();
        let address = |page: usize| slot.hva() + ((page as u64) << PAGE_SHIFT);
        let (mut from, end) = (address(pages.start), address(pages.end));
        let mut last = PageRange { start: slot.frames().start, pages: 0 };
        while from < end {
            let mut found = [Found::NOTHING; 128];
            let looked = self.pagemap.mapped(from, end, &mut found);
            let (runs, next) = looked.map_err(|source| TouchedError::Look { slot: slot.id(), source })?;
            // What is left of a protected page that was unmapped is a marker, which counts as one in swap.
            for run in found[..runs].iter().filter(|run| !run.is_swapped()) {
                let addresses = run.addresses();
                let first = Gfn(slot.frames().start.0 + ((addresses.start - slot.hva()) >> PAGE_SHIFT));
                let pages = (addresses.end - addresses.start) >> PAGE_SHIFT;
                // The kernel tells protected pages from others.
                if last.end() == first {
                    last.pages += pages;
                } else {
                    if last.pages > 0 {
                        each(last);
                    }
                    last = PageRange { start: first, pages };
                }
            }
            from = next.max(from + (1 << PAGE_SHIFT));
        }
        if last.pages > 0 {
            each(last);
        }
        Ok(())
    }
}
