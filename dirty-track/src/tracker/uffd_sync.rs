//! `uffd-sync`: write-protection by userfaultfd that a thread of this process lifts, write by write.
//!
//! A writer, vCPU or host thread, sleeps at a protected page until the *handler* thread has recorded the page and
//! lifted its protection: 4 KiB of it, or the whole block of 2 MiB, which stays huge then and is reported whole.
//! That costs a write fault some 20 us where [`uffd_async`](super::uffd_async) costs 5; it works from Linux 6.4 on.
//! What is said there about what is seen, and about memory, holds here as well, but for pages that lose their
//! protection without a write: they are reported only if they are marked. And no file on a disk can be tracked.
//!
//! # Why no write is lost
//! The handler records and lifts in one turn; a harvest takes the record and protects what it took in one turn. A
//! mutex gives the turns, and a harvest takes one for each 128 MiB. Between turns therefore
//!
//! > a page without protection is in the record.
//!
//! A write that was complete before a harvest began went through a page without protection: the page was in the
//! record, and the harvest took it. A write after the page's turn in the harvest finds it protected, and the writer
//! sleeps until the handler has recorded the page for the next. There is no third kind but the write that comes
//! *during* the harvest and before its page's turn, which the harvest takes, and protects before it hands out.
//!
//! Without the turns there would be: the handler records a page, the harvest takes the record and protects the page
//! (which still is protected), the handler lifts the protection. Now the page is open and nobody knows. To lift
//! first and record later is no better: another vCPU may write in between and be stopped, and the harvest that is to
//! be the last finds nothing.
//!
//! The handler touches no memory of the guest and a harvest waits for no vCPU, so a turn always ends; vCPUs may
//! stand still or run. Disarming lifts all protection first, then wakes all who sleep, then ends the handler.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::{PAGE_SHIFT, PageSize};
use crate::bitmap::{self, DirtyBitmap};
use crate::sys::uffd::{Mode, Uffd, Wait};
use crate::tracker::harvest::OwedSet;
use crate::tracker::uffd_async::{guarantees, protect};
use crate::tracker::wp_slot::{WpSlot, masks};
use crate::tracker::{Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

const NAME: &str = Kind::UffdSync.name();

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct UffdSync {
    record: Arc<Record<KernelWp>>,
    harvester: Harvester,
    /// The first so many slots are.
    registered: usize,
    /// While armed.
    handler: Option<Handler>,
}

impl UffdSync {
    /// A tracker of `slots` that opens `unit` at each write: a page, or a block. It is not armed yet.
    ///
    /// # Errors
    /// [`TrackerError::Userfaultfd`] when the host has none, none that can do it (Linux 6.4), or none for this user;
    /// [`TrackerError::BadSlot`].
    pub fn new(slots: Vec<Slot>, unit: PageSize) -> Result<UffdSync, TrackerError> {
        let slots = WpSlot::all(slots)?;
        let wp = KernelWp { uffd: Uffd::open(Mode::Sync)?, slots: slots.clone() };
        let harvester = Harvester::new(&slots);
        Ok(UffdSync {
            record: Arc::new(Record::new(wp, slots, unit)),
            harvester,
            registered: 0,
            handler: None,
        })
    }

    /// Registers and protects everything. The handler runs already.
    fn protect_all(&mut self) -> Result<(), TrackerError> {
        let record = Arc::clone(&self.record);
        for (index, slot) in record.slots.iter().enumerate() {
            record
                .wp
                .uffd
                .register(slot.slot().hva(), slot.slot().len())
                .map_err(|source| TrackerError::Register { slot: slot.id(), on: true, source })?;
            self.registered = index + 1;
            let pages = slot.pages();
            record.wp.protect(index, 0..pages).map_err(|source| TrackerError::WriteProtect {
                slot: slot.id(),
                first: 0,
                pages,
                source,
            })?;
        }
        Ok(())
    }

    /// Lifts all protection and wakes all who sleep. A slot that refuses does not keep the others from it.
    fn release(&self) -> Result<(), TrackerError> {
        let mut outcome = Ok(());
        for slot in &self.record.slots[..self.registered] {
            let (start, len) = (slot.slot().hva(), slot.slot().len());
            if let Err(source) = self.record.wp.uffd.unregister(start, len) {
                outcome = outcome.and(Err(TrackerError::Register { slot: slot.id(), on: false, source }));
            }
            // The kernel does this itself for missing pages only (`userfaultfd_unregister`). It cannot fail for
            // a range that is not empty.
            let _ = self.record.wp.uffd.wake(start, len);
        }
        outcome
    }

    /// Ends what `arm` began, in the order that leaves nobody asleep.
    fn stop(&mut self) -> Result<(), TrackerError> {
        self.release()?;
        self.registered = 0;
        self.record.slots.iter().for_each(|slot| slot.slot().host_writes().stop());
        self.handler = None;
        Ok(())
    }
}

impl Tracker for UffdSync {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        let guarantees = guarantees(Kind::UffdSync, &self.record.slots);
        Guarantees { granularity: guarantees.granularity.max(self.record.unit), ..guarantees }
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.handler.is_some() {
            return Err(TrackerError::AlreadyArmed);
        }
        self.record.clear();
        self.record.slots.iter().for_each(|slot| slot.slot().host_writes().start());
        self.handler = Some(Handler::start(Arc::clone(&self.record)).map_err(TrackerError::Handler)?);
        self.protect_all().inspect_err(|_| {
            // If that fails too, the first error is the one to know; the handler must go on then.
            let _ = self.stop();
        })
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if self.handler.is_none() {
            return Err(TrackerError::NotArmed);
        }
        self.harvester.collect(&self.record)?;
        Ok(self.harvester.owed.lend())
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        if self.handler.is_none() {
            return Err(TrackerError::NotArmed);
        }
        self.stop()?;
        self.harvester.owed.clear();
        Ok(())
    }
}

impl Drop for UffdSync {
    fn drop(&mut self) {
        if self.handler.is_some() {
            // Nobody is left to tell. Whatever was not released is so when the descriptor is closed.
            let _ = self.stop();
        }
    }
}

/// The thread that lifts protection.
#[derive(Debug)]
struct Handler {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// How long the handler waits after an error before it tries again: it must not end, or vCPUs would never wake.
const AFTER_ERROR: Duration = Duration::from_millis(1);

impl Handler {
    fn start(record: Arc<Record<KernelWp>>) -> io::Result<Handler> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let work = move || {
            loop {
                let outcome = match record.wp.uffd.wait(&stopped) {
                    Ok(Wait::Stopped) => return,
                    Ok(Wait::Faults) => record.wp.uffd.fault(),
                    Err(error) => Err(error),
                };
                match outcome {
                    Ok(address) => address.into_iter().for_each(|address| record.resolve(address)),
                    Err(error) => {
                        record.failed.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
                        thread::sleep(AFTER_ERROR);
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("uffd-handler".into()).spawn(work)?;
        Ok(Handler { stop, thread: Some(thread) })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // An eventfd whose counter is not nearly full takes the write.
        let _ = self.stop.write(1);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Protection that somebody has to lift: the mechanism. Slots are named by their index, pages are counted from the
/// slot's start.
trait SyncWp {
    /// Protects `pages`.
    fn protect(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Lifts the protection of `pages` and wakes who sleeps there.
    fn open(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Wakes who sleeps at `pages`, to try again.
    fn wake(&self, slot: usize, pages: Range<usize>);
}

/// The kernel's own.
#[derive(Debug)]
struct KernelWp {
    uffd: Uffd,
    slots: Vec<WpSlot>,
}

impl KernelWp {
    fn range(&self, slot: usize, pages: &Range<usize>) -> (u64, u64) {
        (self.slots[slot].hva(pages.start), (pages.len() as u64) << PAGE_SHIFT)
    }
}

impl SyncWp for KernelWp {
    fn protect(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        protect(&self.uffd, &self.slots[slot], pages)
    }

    fn open(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = self.range(slot, &pages);
        self.uffd.unprotect(start, len)
    }

    fn wake(&self, slot: usize, pages: Range<usize>) {
        let (start, len) = self.range(slot, &pages);
        // It cannot fail for a range that is not empty.
        let _ = self.uffd.wake(start, len);
    }
}

/// A part of a slot for which a harvest takes one turn, and its record.
#[derive(Debug)]
struct Part {
    pages: Range<usize>,
    written: DirtyBitmap,
}

/// What was opened: what handler and harvests share.
#[derive(Debug)]
struct Record<W> {
    wp: W,
    slots: Vec<WpSlot>,
    /// Of each slot, in order and without gaps.
    parts: Vec<Vec<Part>>,
    /// What one write opens.
    unit: PageSize,
    /// Held while a page is recorded and opened, or taken out of the record and protected.
    turn: Mutex<()>,
    /// Why the handler could not open a page, as an errno; 0 when it could.
    failed: AtomicI32,
}

impl<W: SyncWp> Record<W> {
    fn new(wp: W, slots: Vec<WpSlot>, unit: PageSize) -> Record<W> {
        let part = |pages: Range<usize>| Part { written: DirtyBitmap::new(pages.len()), pages };
        let parts = slots.iter().map(|slot| slot.chunks(0..slot.pages()).map(part).collect()).collect();
        Record { wp, slots, parts, unit, turn: Mutex::new(()), failed: AtomicI32::new(0) }
    }

    /// Waits for a turn. No invariant can be broken by a panic while it lasted, because none can happen.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn clear(&self) {
        self.parts.iter().flatten().for_each(|part| part.written.drain(|_, _| {}));
        self.failed.store(0, Ordering::Relaxed);
    }

    /// Records `pages`, which are in the slot.
    fn note(&self, slot: usize, pages: &Range<usize>) {
        let parts = &self.parts[slot];
        let first = parts.partition_point(|part| part.pages.end <= pages.start);
        for part in parts[first..].iter().take_while(|part| part.pages.start < pages.end) {
            let base = part.pages.start;
            part.written.set_range(pages.start.saturating_sub(base)..pages.end - base);
        }
    }

    /// Somebody waits to write at `address`.
    fn resolve(&self, address: u64) {
        let slot = |slot: &WpSlot| (slot.hva(0)..slot.hva(slot.pages())).contains(&address);
        let Some(index) = self.slots.iter().position(slot) else { return };
        let slot = &self.slots[index];
        let pages = slot.widen(slot.pages_at(address..address + 1), self.unit);
        let opened = {
            let _turn = self.turn();
            self.note(index, &pages);
            self.wp.open(index, pages.clone())
        };
        let Err(error) = opened else { return };
        // EAGAIN: mappings change just now. ENOENT: the range is not registered any more. In either case, and in
        // any other, the writer looks again, and whoever still finds the page protected says so again.
        if !matches!(error.errno(), libc::EAGAIN | libc::ENOENT) {
            self.failed.store(error.errno(), Ordering::Relaxed);
        }
        self.wp.wake(index, pages);
    }
}

/// The other side of the record.
#[derive(Debug)]
struct Harvester {
    owed: OwedSet,
    /// One part's record; as large as the largest needs.
    taken: Vec<u64>,
}

impl Harvester {
    fn new(slots: &[WpSlot]) -> Harvester {
        let parts = slots.iter().flat_map(|slot| slot.chunks(0..slot.pages()));
        let words = parts.map(|pages| bitmap::words_for(pages.len())).max().unwrap_or(0);
        let slots: Vec<_> = slots.iter().map(|slot| slot.slot().clone()).collect();
        Harvester { owed: OwedSet::new(&slots), taken: vec![0; words] }
    }

    fn collect<W: SyncWp>(&mut self, record: &Record<W>) -> Result<(), TrackerError> {
        match record.failed.swap(0, Ordering::Relaxed) {
            0 => {}
            failed => return Err(TrackerError::Resolve(errno::Error::new(failed))),
        }
        for (index, slot) in record.slots.iter().enumerate() {
            let owed = self.owed.slot(index);
            // Into the record, so that they are protected too: a page that the host dropped, or wrote through
            // another mapping, may not be.
            slot.take_host_writes(record.unit, |word, bits| {
                owed.add_host(word, bits);
                let base = word * bitmap::PAGES_PER_WORD;
                bitmap::runs(&[bits]).for_each(|run| record.note(index, &(base + run.start..base + run.end)));
            });
            for part in &record.parts[index] {
                self.collect_part(record, index, part)?;
            }
        }
        Ok(())
    }

    fn collect_part<W: SyncWp>(
        &mut self,
        record: &Record<W>,
        index: usize,
        part: &Part,
    ) -> Result<(), TrackerError> {
        let taken = &mut self.taken[..bitmap::words_for(part.pages.len())];
        taken.fill(0);
        let base = part.pages.start;
        let _turn = record.turn();
        part.written.drain(|word, bits| taken[word] = bits);
        let owed = self.owed.slot(index);
        for run in bitmap::runs(taken) {
            let pages = base + run.start..base + run.end;
            masks(pages.clone(), |word, bits| owed.add(word, bits));
            if let Err(source) = record.wp.protect(index, pages.clone()) {
                // All of it is owed, and to be protected the next time.
                taken.iter().enumerate().for_each(|(word, &bits)| part.written.merge_word(word, bits));
                let (first, pages) = (pages.start, pages.len());
                return Err(TrackerError::WriteProtect {
                    slot: record.slots[index].id(),
                    first,
                    pages,
                    source,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
