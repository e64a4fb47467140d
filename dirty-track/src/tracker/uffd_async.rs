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
use crate::tracker::change::{Change, Tracked};
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
        let layer = AsyncLayer::open(slots, HostWrites::Reported)?;
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
        self.layer.arm()
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        self.layer.collect(&mut self.owed)?;
        Ok(self.owed.lend())
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        let outcome = self.layer.set_slots(WpSlot::all(slots)?);
        self.owed.set_slots(self.layer.slots().iter().map(WpSlot::slot));
        outcome
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.layer.disarm()?;
        self.owed.clear();
        Ok(())
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

/// Protection that is lifted by writes alone: the mechanism. Pages are counted from the slot's start.
pub(crate) trait AsyncWp: Send {
    /// Makes `pages` ones that can be protected. None is, yet.
    fn register(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Undoes that, and lifts all protection.
    fn unregister(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Protects `pages`.
    fn protect(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Pushes runs of unprotected pages of `pages` to `found`, ascending, as far as it has capacity, and returns the
    /// page to go on from. It may hand out pages that it has handed out before.
    fn written(
        &mut self,
        slot: &WpSlot,
        pages: Range<usize>,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error>;
}

/// The kernel's own.
#[derive(Debug)]
pub(crate) struct UffdWp {
    uffd: Uffd,
    pagemap: Pagemap,
    found: Box<[Found]>,
}

impl AsyncWp for UffdWp {
    fn register(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = slot.addresses(&pages);
        self.uffd.register(start, len)
    }

    fn unregister(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = slot.addresses(&pages);
        self.uffd.unregister(start, len)
    }

    fn protect(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        protect(&self.uffd, slot, pages)
    }

    fn written(
        &mut self,
        slot: &WpSlot,
        pages: Range<usize>,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error> {
        let room = self.found.len().min(found.capacity() - found.len());
        let (start, end) = (slot.hva(pages.start), slot.hva(pages.end));
        let (runs, next) = self.pagemap.written(start, end, &mut self.found[..room])?;
        found.extend(self.found[..runs].iter().map(|run| slot.pages_at(run.addresses())));
        Ok(slot.pages_at(next..next).start)
    }
}

/// Tries that the kernel may say `EAGAIN` to, because mappings of the process change at this moment.
const PATIENCE: usize = 1000;

/// Protects `pages` of `slot`, in pieces.
pub(crate) fn protect(uffd: &Uffd, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
    for piece in slot.chunks(pages) {
        let (start, len) = slot.addresses(&piece);
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

/// Who deals with what the host has marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostWrites {
    /// The layer: it is reported, and protected again.
    Reported,
    /// Somebody else.
    Elsewhere,
}

/// The policy: what is protected when, and what is noted before.
#[derive(Debug)]
pub(crate) struct AsyncLayer<W: AsyncWp> {
    wp: W,
    slots: Vec<WpSlot>,
    host_writes: HostWrites,
    /// Runs of one look, never grown.
    batch: Vec<Range<usize>>,
    /// Pages of one slot that the host wrote and that no look has found; all zero between harvests.
    marks: Vec<u64>,
    armed: bool,
}

impl AsyncLayer<UffdWp> {
    /// The kernel's, over `slots`.
    pub(crate) fn open(
        slots: Vec<Slot>,
        host_writes: HostWrites,
    ) -> Result<AsyncLayer<UffdWp>, TrackerError> {
        let slots = WpSlot::all(slots)?;
        let wp = UffdWp {
            uffd: Uffd::open(Mode::Async)?,
            pagemap: Pagemap::open().map_err(TrackerError::Pagemap)?,
            found: vec![Found::NOTHING; BATCH].into(),
        };
        Ok(AsyncLayer::new(wp, slots, host_writes))
    }
}

impl<W: AsyncWp> AsyncLayer<W> {
    pub(crate) fn new(wp: W, slots: Vec<WpSlot>, host_writes: HostWrites) -> AsyncLayer<W> {
        let batch = Vec::with_capacity(BATCH);
        let mut layer =
            AsyncLayer { wp, slots: Vec::new(), host_writes, batch, marks: Vec::new(), armed: false };
        layer.adopt(slots);
        layer
    }

    /// Those that are tracked, in the order of their addresses.
    pub(crate) fn slots(&self) -> &[WpSlot] {
        &self.slots
    }

    pub(crate) fn owed_set(&self) -> OwedSet {
        OwedSet::new(self.slots.iter().map(WpSlot::slot))
    }

    pub(crate) fn armed(&self) -> bool {
        self.armed
    }

    fn record_host_writes<'a>(&self, slots: impl IntoIterator<Item = &'a WpSlot>, on: bool) {
        if self.host_writes == HostWrites::Elsewhere {
            return;
        }
        let records = slots.into_iter().map(|slot| slot.slot().host_writes());
        records.for_each(|record| if on { record.start() } else { record.stop() });
    }

    fn adopt(&mut self, slots: Vec<WpSlot>) {
        let words = slots.iter().map(WpSlot::words).max().unwrap_or(0);
        self.marks.resize(words.max(self.marks.len()), 0);
        self.slots = slots;
    }

    /// Protects everything.
    pub(crate) fn arm(&mut self) -> Result<(), TrackerError> {
        if self.armed {
            return Err(TrackerError::AlreadyArmed);
        }
        self.gain(&Change::new(&[], self.slots.clone())?)?;
        self.armed = true;
        Ok(())
    }

    /// See [`Tracker::set_slots`]. `slots` are in the order of their addresses.
    pub(crate) fn set_slots(&mut self, slots: Vec<WpSlot>) -> Result<(), TrackerError> {
        if !self.armed {
            self.adopt(slots);
            return Ok(());
        }
        let mut change = Change::new(&self.slots, slots)?;
        self.gain(&change)?;
        let outcome = change.let_go(|slot, pages| self.end(slot, pages));
        let left = change.slots();
        let gone = self.slots.iter().filter(|old| !left.iter().any(|slot| slot.slot().is(old.slot())));
        self.record_host_writes(gone, false);
        self.adopt(left);
        outcome
    }

    /// Begins to protect all that `change` gains, or nothing of it.
    fn gain(&mut self, change: &Change<WpSlot>) -> Result<(), TrackerError> {
        let new = || change.steps().iter().filter(|step| step.new).map(|step| &step.slot);
        self.record_host_writes(new(), true);
        for (number, (slot, pages)) in change.gained().enumerate() {
            if let Err(error) = self.begin(slot, pages) {
                // What was registered is so no more. If that fails too, the first error is the one to know.
                change.gained().take(number).for_each(|(slot, pages)| drop(self.end(slot, pages)));
                self.record_host_writes(new(), false);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Registers and protects `pages`, or nothing.
    fn begin(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), TrackerError> {
        let registered = self.wp.register(slot, pages.clone());
        registered.map_err(|source| TrackerError::Register { slot: slot.id(), on: true, source })?;
        protect_noted(&mut self.wp, slot, pages.clone()).inspect_err(|_| drop(self.end(slot, pages)))
    }

    fn end(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), TrackerError> {
        let outcome = self.wp.unregister(slot, pages);
        outcome.map_err(|source| TrackerError::Register { slot: slot.id(), on: false, source })
    }

    /// Adds the pages that were written to `owed`, and those that the host has marked, all of them protected again.
    pub(crate) fn collect(&mut self, owed: &mut OwedSet) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        for index in 0..self.slots.len() {
            let reported = self.host_writes == HostWrites::Reported;
            let marked = reported && self.take_marks(index, owed.slot(index));
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
        let AsyncLayer { wp, slots, batch, marks, .. } = self;
        let slot = &slots[index];
        for range in slot.slot().chosen().ranges() {
            let mut from = range.start;
            while from < range.end {
                batch.clear();
                let failed = |source| TrackerError::Scan { slot: slot.id(), first: from, source };
                let next = wp.written(slot, from..range.end, batch).map_err(failed)?;
                // Noted before it is protected: should that fail, nothing is lost.
                for run in &*batch {
                    masks(run.clone(), |word, bits| {
                        owed.add(word, bits);
                        marks[word] &= !bits;
                    });
                }
                for run in &*batch {
                    protect_noted(wp, slot, run.clone())?;
                }
                if next <= from {
                    // It never was; but rather an error than a monitor that hangs.
                    return Err(failed(errno::Error::new(libc::EPROTO)));
                }
                from = next;
            }
        }
        Ok(())
    }

    fn protect_marks(&mut self, index: usize) -> Result<(), TrackerError> {
        let slot = &self.slots[index];
        bitmap::runs(&self.marks[..slot.words()]).try_for_each(|run| protect_noted(&mut self.wp, slot, run))
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
        protect_noted(&mut self.wp, &self.slots[index], pages)
    }

    /// Lifts all protection. A slot that refuses does not keep the others from it.
    pub(crate) fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        let mut change = Change::new(&self.slots, Vec::new())?;
        change.let_go(|slot, pages| self.end(slot, pages))?;
        self.record_host_writes(&self.slots, false);
        self.armed = false;
        Ok(())
    }
}

fn protect_noted(wp: &mut impl AsyncWp, slot: &WpSlot, pages: Range<usize>) -> Result<(), TrackerError> {
    let (first, count) = (pages.start, pages.len());
    let failed = |source| TrackerError::WriteProtect { slot: slot.id(), first, pages: count, source };
    wp.protect(slot, pages).map_err(failed)
}

impl<W: AsyncWp> Drop for AsyncLayer<W> {
    fn drop(&mut self) {
        if self.armed {
            self.record_host_writes(&self.slots, false);
        }
    }
}

#[cfg(test)]
mod tests;
