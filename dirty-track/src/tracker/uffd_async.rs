//! `uffd-async`: write-protection by userfaultfd that the kernel lifts itself, and PAGEMAP_SCAN to ask where.
//!
//! The pages of the *host's* page table are protected. Every write goes through it, the guest's and the host's
//! own, so both are seen; a read lifts no protection, so none is reported. KVM follows: below a page that the host
//! may not write there is no second-level mapping that the guest can write through.
//!
//! # A harvest
//! 1. *Look* which pages are not protected any more (PAGEMAP_SCAN, without its protecting mode; see
//!    [`crate::sys::pagemap`] for what that would cost), and note them.
//! 2. *Protect* those runs, and nothing else.
//! 3. Hand them out.
//!
//! A page that is written before it is looked at is noted. One that is written after that, and before it is
//! protected, was noted or it was not. If it was, it is protected before it is handed out, so whoever copies it gets
//! this write too. If it was not, nobody protects it, and the next look finds it. This is why a run is never
//! extended over a clean page, however cheap one ioctl for two runs would be: the clean page may be written between
//! look and protection, and protecting it would then wipe out the only trace of that.
//! An ioctl that fails leaves pages noted and unprotected: they are owed, and found again.
//!
//! # What it does to the memory
//! - Anonymous memory and huge pages of it (THP) stay as they are until written; the first write to a huge page
//!   splits it. Memory of the hugetlb pool is protected and reported by its own page size. Shared memory with huge
//!   pages is mapped by small ones from arming on.
//! - Memory that was never touched is marked as protected in page tables that are allocated for it (2 MiB a GiB);
//!   what is touched there while the tracker is armed gets small pages.
//! - Where protection is lost without a write (`MADV_DONTNEED` on anonymous memory), the page is reported once more
//!   than it need be, or, where whole page tables go, when it is next written. That the contents are gone is a
//!   write of the host: whoever drops memory marks it in the [`RegionBitmap`](crate::region::RegionBitmap)
//!   *afterwards*, as for any write past vm-memory, and the next harvest has it, protected.
//! - Writes through another mapping of the same file (another process, a second `mmap`) are not seen, unless they
//!   are marked in the same way.

use std::ops::Range;

use vm_memory::bitmap::Bitmap;
use vmm_sys_util::errno;

use crate::addr::{PAGE_SHIFT, PageSize};
use crate::bitmap;
use crate::sys::pagemap::{Found, Pagemap};
use crate::sys::uffd::{Mode, Uffd};
use crate::tracker::harvest::{OwedSet, SlotSet};
use crate::tracker::wp_slot::{WpSlot, masks};
use crate::tracker::{Backing, Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

const NAME: &str = Kind::UffdAsync.name();

/// Runs that are looked at before they are protected: few enough for the cache, enough to make looking cheap.
const BATCH: usize = 512;

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct UffdAsync {
    layer: AsyncLayer<UffdWp>,
    owed: OwedSet,
}

impl UffdAsync {
    /// A tracker of `slots`. It is not armed yet. It needs nothing of KVM, but that the slots' memory is what a VM
    /// runs on.
    ///
    /// # Errors
    /// [`TrackerError::Userfaultfd`] when the host has none, none that can do it (Linux 6.7), or none for this user;
    /// [`TrackerError::BadSlot`]; [`TrackerError::Pagemap`].
    pub fn new(slots: Vec<Slot>) -> Result<UffdAsync, TrackerError> {
        let layer = AsyncLayer::open(slots)?;
        let owed = layer.owed_set();
        Ok(UffdAsync { layer, owed })
    }
}

impl Tracker for UffdAsync {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        guarantees(Kind::UffdAsync, self.layer.slots())
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.layer.armed() {
            return Err(TrackerError::AlreadyArmed);
        }
        self.layer.slots().iter().for_each(|slot| slot.slot().host_writes().start());
        self.layer.arm().inspect_err(|_| self.layer.stop_host_writes())
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        self.layer.collect(&mut self.owed, true)?;
        Ok(self.owed.lend())
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.layer.disarm()?;
        self.layer.stop_host_writes();
        self.owed.clear();
        Ok(())
    }
}

impl Drop for UffdAsync {
    fn drop(&mut self) {
        if self.layer.armed() {
            self.layer.stop_host_writes();
        }
    }
}

/// What protection by userfaultfd guarantees over `slots`, resolved by the smallest unit that can be.
pub(crate) fn guarantees(kind: Kind, slots: &[WpSlot]) -> Guarantees {
    let of = |slot: &WpSlot| kind.guarantees(slot.backing());
    slots.iter().map(of).fold(kind.guarantees(Backing::Private), |all, one| Guarantees {
        granularity: all.granularity.max(one.granularity),
        keeps_huge: all.keeps_huge && one.keeps_huge,
        ..all
    })
}

/// Protection that is lifted by writes alone: the mechanism. Slots are named by their index, pages are counted from
/// the slot's start.
pub(crate) trait AsyncWp: Send {
    /// Makes a slot one whose pages can be protected. None is, yet.
    fn register(&mut self, slot: usize) -> Result<(), errno::Error>;
    /// Undoes that, and lifts all protection.
    fn unregister(&mut self, slot: usize) -> Result<(), errno::Error>;
    /// Protects `pages`.
    fn protect(&mut self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Pushes runs of unprotected pages from page `from` on to `found`, ascending, as far as it has capacity, and
    /// returns the page to go on from. It may hand out pages that it has handed out before.
    fn written(
        &mut self,
        slot: usize,
        from: usize,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error>;
}

/// The kernel's own.
#[derive(Debug)]
pub(crate) struct UffdWp {
    uffd: Uffd,
    pagemap: Pagemap,
    slots: Vec<WpSlot>,
    found: Box<[Found]>,
}

impl AsyncWp for UffdWp {
    fn register(&mut self, slot: usize) -> Result<(), errno::Error> {
        let slot = self.slots[slot].slot();
        self.uffd.register(slot.hva(), slot.len())
    }

    fn unregister(&mut self, slot: usize) -> Result<(), errno::Error> {
        let slot = self.slots[slot].slot();
        self.uffd.unregister(slot.hva(), slot.len())
    }

    fn protect(&mut self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        protect(&self.uffd, &self.slots[slot], pages)
    }

    fn written(
        &mut self,
        slot: usize,
        from: usize,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error> {
        let slot = &self.slots[slot];
        let room = self.found.len().min(found.capacity() - found.len());
        let end = slot.hva(slot.pages());
        let (runs, next) = self.pagemap.written(slot.hva(from), end, &mut self.found[..room])?;
        found.extend(self.found[..runs].iter().map(|run| slot.pages_at(run.addresses())));
        Ok(slot.pages_at(next..next).start)
    }
}

/// Tries that the kernel may say `EAGAIN` to, because mappings of the process change at this moment.
const PATIENCE: usize = 1000;

/// Protects `pages` of `slot`, in pieces.
pub(crate) fn protect(uffd: &Uffd, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
    for piece in slot.chunks(pages) {
        let (start, len) = (slot.hva(piece.start), (piece.len() as u64) << PAGE_SHIFT);
        let mut tries = 0;
        while let Err(error) = uffd.protect(start, len) {
            tries += 1;
            if error.errno() != libc::EAGAIN || tries == PATIENCE {
                return Err(error);
            }
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// The policy: what is protected when, and what is noted before.
#[derive(Debug)]
pub(crate) struct AsyncLayer<W: AsyncWp> {
    wp: W,
    slots: Vec<WpSlot>,
    /// Runs of one look, never grown.
    batch: Vec<Range<usize>>,
    /// Pages of one slot that the host wrote and that no look has found; all zero between harvests.
    marks: Vec<u64>,
    armed: bool,
}

impl AsyncLayer<UffdWp> {
    /// The kernel's, over `slots`.
    pub(crate) fn open(slots: Vec<Slot>) -> Result<AsyncLayer<UffdWp>, TrackerError> {
        let slots = WpSlot::all(slots)?;
        let wp = UffdWp {
            uffd: Uffd::open(Mode::Async)?,
            pagemap: Pagemap::open().map_err(TrackerError::Pagemap)?,
            slots: slots.clone(),
            found: vec![Found::NOTHING; BATCH].into(),
        };
        Ok(AsyncLayer::new(wp, slots))
    }
}

impl<W: AsyncWp> AsyncLayer<W> {
    pub(crate) fn new(wp: W, slots: Vec<WpSlot>) -> AsyncLayer<W> {
        let words = slots.iter().map(WpSlot::words).max().unwrap_or(0);
        AsyncLayer { wp, slots, batch: Vec::with_capacity(BATCH), marks: vec![0; words], armed: false }
    }

    pub(crate) fn slots(&self) -> &[WpSlot] {
        &self.slots
    }

    pub(crate) fn owed_set(&self) -> OwedSet {
        let slots: Vec<_> = self.slots.iter().map(|slot| slot.slot().clone()).collect();
        OwedSet::new(&slots)
    }

    pub(crate) fn armed(&self) -> bool {
        self.armed
    }

    pub(crate) fn stop_host_writes(&self) {
        self.slots.iter().for_each(|slot| slot.slot().host_writes().stop());
    }

    /// Protects everything.
    pub(crate) fn arm(&mut self) -> Result<(), TrackerError> {
        if self.armed {
            return Err(TrackerError::AlreadyArmed);
        }
        for index in 0..self.slots.len() {
            let all = 0..self.slots[index].pages();
            let outcome = self
                .wp
                .register(index)
                .map_err(|source| TrackerError::Register { slot: self.slots[index].id(), on: true, source })
                .and_then(|()| self.protect(index, all));
            if let Err(error) = outcome {
                // What was registered is so no more. If that fails too, the first error is the one to know.
                let _ = self.unregister(index + 1);
                return Err(error);
            }
        }
        self.armed = true;
        Ok(())
    }

    /// Adds the pages that were written to `owed`, and those that the host has marked (`host_writes`), all of them
    /// protected again.
    pub(crate) fn collect(&mut self, owed: &mut OwedSet, host_writes: bool) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        for index in 0..self.slots.len() {
            let marked = host_writes && self.take_marks(index, owed.slot(index));
            // What is marked and was not found lost its protection in another way, or was written by another one.
            let outcome = self
                .collect_slot(index, owed.slot(index))
                .and_then(|()| if marked { self.protect_marks(index) } else { Ok(()) });
            if marked {
                self.forget_marks(index, outcome.is_err());
            }
            outcome?;
        }
        Ok(())
    }

    fn take_marks(&mut self, index: usize, owed: &mut SlotSet) -> bool {
        let (slot, marks) = (&self.slots[index], &mut self.marks);
        let mut any = false;
        slot.take_host_writes(PageSize::K4, |word, bits| {
            any = true;
            marks[word] |= bits;
            owed.add_host(word, bits);
        });
        any
    }

    fn collect_slot(&mut self, index: usize, owed: &mut SlotSet) -> Result<(), TrackerError> {
        let (id, pages) = (self.slots[index].id(), self.slots[index].pages());
        let mut from = 0;
        while from < pages {
            self.batch.clear();
            let next = self
                .wp
                .written(index, from, &mut self.batch)
                .map_err(|source| TrackerError::Scan { slot: id, first: from, source })?;
            // Noted before it is protected: should that fail, nothing is lost.
            for run in &self.batch {
                masks(run.clone(), |word, bits| {
                    owed.add(word, bits);
                    self.marks[word] &= !bits;
                });
            }
            for run in 0..self.batch.len() {
                self.protect(index, self.batch[run].clone())?;
            }
            if next <= from {
                // It never was; but rather an error than a monitor that hangs.
                let source = errno::Error::new(libc::EPROTO);
                return Err(TrackerError::Scan { slot: id, first: from, source });
            }
            from = next;
        }
        Ok(())
    }

    fn protect_marks(&mut self, index: usize) -> Result<(), TrackerError> {
        let marks = std::mem::take(&mut self.marks);
        let words = self.slots[index].words();
        let outcome = bitmap::runs(&marks[..words]).try_for_each(|run| self.protect(index, run));
        self.marks = marks;
        outcome
    }

    /// Empties the marks; when they could not be dealt with, they go back to where they came from.
    fn forget_marks(&mut self, index: usize, restore: bool) {
        let slot = &self.slots[index];
        let marks = &mut self.marks[..slot.words()];
        if restore {
            let host_writes = slot.slot().host_writes();
            let bytes = |pages: usize| pages << PAGE_SHIFT;
            bitmap::runs(marks).for_each(|run| host_writes.mark_dirty(bytes(run.start), bytes(run.len())));
        }
        marks.fill(0);
    }

    /// Protects `pages`, which the caller has noted.
    pub(crate) fn protect(&mut self, index: usize, pages: Range<usize>) -> Result<(), TrackerError> {
        let (slot, first, count) = (self.slots[index].id(), pages.start, pages.len());
        self.wp.protect(index, pages).map_err(|source| TrackerError::WriteProtect {
            slot,
            first,
            pages: count,
            source,
        })
    }

    /// Lifts all protection.
    pub(crate) fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        self.unregister(self.slots.len())?;
        self.armed = false;
        Ok(())
    }

    /// Unregisters the first `slots` slots. One that refuses does not keep the others from it.
    fn unregister(&mut self, slots: usize) -> Result<(), TrackerError> {
        let mut outcome = Ok(());
        for (index, slot) in self.slots[..slots].iter().enumerate() {
            if let Err(source) = self.wp.unregister(index) {
                outcome = outcome.and(Err(TrackerError::Register { slot: slot.id(), on: false, source }));
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests;
