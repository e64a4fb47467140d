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
//!
//! A guest must not be offered asynchronous page faults: [`fault`](crate::fault) says why.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::PageSize;
use crate::bitmap::{self, DirtyBitmap};
use crate::sys::uffd::lookout::Lookout;
use crate::sys::uffd::{Mode, Uffd, Wait};
use crate::tracker::change::{Change, Tracked, carry};
use crate::tracker::chosen::Chosen;
use crate::tracker::harvest::{OwedSet, SlotSet};
use crate::tracker::uffd_async::{guarantees, protect};
use crate::tracker::wp_slot::{WpSlot, masks};
use crate::tracker::{Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

const NAME: &str = Kind::UffdSync.name();

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct UffdSync {
    record: Arc<Record<KernelWp>>,
    harvester: Harvester,
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
        let record = Record::new(KernelWp(Uffd::open(Mode::Sync)?), unit);
        record.set_slots(&slots);
        Ok(UffdSync { record: Arc::new(record), harvester: Harvester::new(slots), handler: None })
    }

    /// Ends what `arm` began, in the order that leaves nobody asleep.
    fn stop(&mut self) -> Result<(), TrackerError> {
        let mut all = Change::new(&self.harvester.slots, Vec::new())?;
        all.let_go(|slot, pages| self.record.end(slot, pages))?;
        record_host_writes(&self.harvester.slots, false);
        self.handler = None;
        Ok(())
    }
}

fn record_host_writes<'a>(slots: impl IntoIterator<Item = &'a WpSlot>, on: bool) {
    let records = slots.into_iter().map(|slot| slot.slot().host_writes());
    records.for_each(|record| if on { record.start() } else { record.stop() });
}

impl Tracker for UffdSync {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        let guarantees = guarantees(Kind::UffdSync, &self.harvester.slots);
        Guarantees { granularity: guarantees.granularity.max(self.record.unit), ..guarantees }
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.handler.is_some() {
            return Err(TrackerError::AlreadyArmed);
        }
        self.record.clear();
        let handler = Handler::start(Arc::clone(&self.record)).map_err(TrackerError::Handler)?;
        self.record.gain(&Change::new(&[], self.harvester.slots.clone())?)?;
        self.handler = Some(handler);
        Ok(())
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if self.handler.is_none() {
            return Err(TrackerError::NotArmed);
        }
        self.harvester.collect(&self.record)?;
        Ok(self.harvester.owed.lend())
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        let slots = WpSlot::all(slots)?;
        if self.handler.is_some() {
            return self.harvester.set_slots(&self.record, slots);
        }
        self.record.set_slots(&slots);
        self.harvester.adopt(slots);
        Ok(())
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
            let mut lookout = Lookout::default();
            loop {
                let outcome = match record.wp.0.wait(&stopped, &mut lookout) {
                    Ok(Wait::Stopped) => return,
                    Ok(Wait::Faults) => record.wp.0.fault(),
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

/// Protection that somebody has to lift: the mechanism. Pages are counted from the slot's start.
trait SyncWp {
    /// Makes `pages` ones that can be protected. None is, yet.
    fn register(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Undoes that, and lifts all protection. It wakes nobody.
    fn unregister(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Protects `pages`.
    fn protect(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Lifts the protection of `pages` and wakes who sleeps there.
    fn open(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Wakes who sleeps at `pages`, to try again.
    fn wake(&self, slot: &WpSlot, pages: Range<usize>);
}

/// The kernel's own.
#[derive(Debug)]
struct KernelWp(Uffd);

impl SyncWp for KernelWp {
    fn register(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = slot.addresses(&pages);
        self.0.register(start, len)
    }

    fn unregister(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = slot.addresses(&pages);
        self.0.unregister(start, len)
    }

    fn protect(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        protect(&self.0, slot, pages)
    }

    fn open(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let (start, len) = slot.addresses(&pages);
        self.0.unprotect(start, len)
    }

    fn wake(&self, slot: &WpSlot, pages: Range<usize>) {
        let (start, len) = slot.addresses(&pages);
        // It cannot fail for a range that is not empty.
        let _ = self.0.wake(start, len);
    }
}

/// A part of a slot for which a harvest takes one turn, and its record.
#[derive(Debug)]
struct Part {
    pages: Range<usize>,
    written: DirtyBitmap,
}

/// A slot and what was opened of it.
#[derive(Debug)]
struct Opened {
    slot: WpSlot,
    /// In order and without gaps.
    parts: Vec<Part>,
}

impl Opened {
    fn new(slot: &WpSlot) -> Opened {
        let part = |pages: Range<usize>| Part { written: DirtyBitmap::new(pages.len()), pages };
        Opened { slot: slot.clone(), parts: slot.chunks(0..slot.pages()).map(part).collect() }
    }

    /// Forgets what is recorded of pages that are not tracked.
    fn forget_others(&self) {
        for pages in Chosen::all(self.slot.pages()).minus(self.slot.slot().chosen()) {
            for part in &self.parts {
                let clip = |page: usize| page.clamp(part.pages.start, part.pages.end) - part.pages.start;
                part.written.clear_range(clip(pages.start)..clip(pages.end));
            }
        }
    }

    /// Records `pages`, which are in the slot.
    fn note(&self, pages: &Range<usize>) {
        let first = self.parts.partition_point(|part| part.pages.end <= pages.start);
        for part in self.parts[first..].iter().take_while(|part| part.pages.start < pages.end) {
            let base = part.pages.start;
            part.written.set_range(pages.start.saturating_sub(base)..pages.end - base);
        }
    }
}

/// What handler and harvests share.
#[derive(Debug)]
struct Record<W> {
    wp: W,
    /// What one write opens.
    unit: PageSize,
    /// The slots, in the order of their addresses. Held for a *turn*: while a page is recorded and opened, or taken
    /// out of the record and protected.
    turn: Mutex<Vec<Opened>>,
    /// Why the handler could not open a page, as an errno; 0 when it could.
    failed: AtomicI32,
}

impl<W: SyncWp> Record<W> {
    fn new(wp: W, unit: PageSize) -> Record<W> {
        Record { wp, unit, turn: Mutex::new(Vec::new()), failed: AtomicI32::new(0) }
    }

    /// Waits for a turn. No invariant can be broken by a panic while it lasted, because none can happen.
    fn turn(&self) -> MutexGuard<'_, Vec<Opened>> {
        self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn clear(&self) {
        self.turn().iter().flat_map(|opened| &opened.parts).for_each(|part| part.written.drain(|_, _| {}));
        self.failed.store(0, Ordering::Relaxed);
    }

    /// Makes `slots` those that writers are served in. What is recorded of the ones that stay is kept.
    fn set_slots(&self, slots: &[WpSlot]) {
        let mut turn = self.turn();
        let before: Vec<_> = turn.iter().map(|opened| opened.slot.clone()).collect();
        carry(&before, slots, &mut turn, Opened::new);
        for (opened, slot) in turn.iter_mut().zip(slots) {
            opened.slot = slot.clone();
            opened.forget_others();
        }
    }

    /// Begins to protect all that `change` gains, or nothing of it. Writers to it are served already.
    fn gain(&self, change: &Change<WpSlot>) -> Result<(), TrackerError> {
        let new = || change.steps().iter().filter(|step| step.new).map(|step| &step.slot);
        record_host_writes(new(), true);
        for (number, (slot, pages)) in change.gained().enumerate() {
            if let Err(error) = self.begin(slot, pages) {
                // If that fails too, the first error is the one to know.
                change.gained().take(number).for_each(|(slot, pages)| drop(self.end(slot, pages)));
                record_host_writes(new(), false);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Registers and protects `pages`, or nothing.
    fn begin(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), TrackerError> {
        let registered = self.wp.register(slot, pages.clone());
        registered.map_err(|source| TrackerError::Register { slot: slot.id(), on: true, source })?;
        let (first, count) = (pages.start, pages.len());
        self.wp.protect(slot, pages.clone()).map_err(|source| {
            // The first error is the one to know.
            let _ = self.end(slot, pages);
            TrackerError::WriteProtect { slot: slot.id(), first, pages: count, source }
        })
    }

    /// Lifts the protection of `pages`, and wakes all who sleep there.
    fn end(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), TrackerError> {
        let outcome = self.wp.unregister(slot, pages.clone());
        // The kernel does this itself for missing pages only (`userfaultfd_unregister`).
        self.wp.wake(slot, pages);
        outcome.map_err(|source| TrackerError::Register { slot: slot.id(), on: false, source })
    }

    /// Somebody waits to write at `address`.
    fn resolve(&self, address: u64) {
        let turn = self.turn();
        let found = turn.iter().find(|opened| {
            let slot = &opened.slot;
            (slot.hva(0)..slot.hva(slot.pages())).contains(&address)
        });
        let Some(opened) = found else { return };
        let slot = &opened.slot;
        let page = slot.pages_at(address..address + 1);
        // What is not protected is left alone. Nobody waits there any more who was not woken.
        let pages = slot.slot().chosen().around(page.start, slot.widen(page, self.unit));
        let Some(pages) = pages else { return };
        opened.note(&pages);
        let Err(error) = self.wp.open(slot, pages.clone()) else { return };
        // EAGAIN: mappings change just now. ENOENT: the range is not registered any more. In either case, and in
        // any other, the writer looks again, and whoever still finds the page protected says so again.
        if !matches!(error.errno(), libc::EAGAIN | libc::ENOENT) {
            self.failed.store(error.errno(), Ordering::Relaxed);
        }
        self.wp.wake(slot, pages);
    }
}

/// The other side of the record.
#[derive(Debug)]
struct Harvester {
    /// Those of the record.
    slots: Vec<WpSlot>,
    owed: OwedSet,
    /// One part's record; as large as the largest needs.
    taken: Vec<u64>,
}

impl Harvester {
    fn new(slots: Vec<WpSlot>) -> Harvester {
        let mut harvester = Harvester { slots: Vec::new(), owed: OwedSet::new(&[]), taken: Vec::new() };
        harvester.adopt(slots);
        harvester
    }

    fn adopt(&mut self, slots: Vec<WpSlot>) {
        let parts = slots.iter().flat_map(|slot| slot.chunks(0..slot.pages()));
        let words = parts.map(|pages| bitmap::words_for(pages.len())).max().unwrap_or(0);
        self.taken.resize(words, 0);
        self.owed.set_slots(slots.iter().map(WpSlot::slot));
        self.slots = slots;
    }

    /// See [`Tracker::set_slots`]. `slots` are in the order of their addresses.
    fn set_slots<W: SyncWp>(&mut self, record: &Record<W>, slots: Vec<WpSlot>) -> Result<(), TrackerError> {
        let mut change = Change::new(&self.slots, slots)?;
        // Whoever writes is served from the first protection on and to the last.
        record.set_slots(&change.slots());
        record.gain(&change).inspect_err(|_| record.set_slots(&self.slots))?;
        let outcome = change.let_go(|slot, pages| record.end(slot, pages));
        let left = change.slots();
        record.set_slots(&left);
        let gone = self.slots.iter().filter(|old| !left.iter().any(|slot| slot.slot().is(old.slot())));
        record_host_writes(gone, false);
        self.adopt(left);
        outcome
    }

    fn collect<W: SyncWp>(&mut self, record: &Record<W>) -> Result<(), TrackerError> {
        match record.failed.swap(0, Ordering::Relaxed) {
            0 => {}
            failed => return Err(TrackerError::Resolve(errno::Error::new(failed))),
        }
        for (index, slot) in self.slots.iter().enumerate() {
            let owed = self.owed.slot(index);
            // Into the record, so that they are protected too: a page that the host dropped, or wrote through
            // another mapping, may not be.
            let turn = record.turn();
            slot.take_host_writes(record.unit, |word, bits| {
                owed.add_host(word, bits);
                let base = word * bitmap::PAGES_PER_WORD;
                bitmap::runs(&[bits]).for_each(|run| turn[index].note(&(base + run.start..base + run.end)));
            });
            let parts = turn[index].parts.len();
            drop(turn);
            for part in 0..parts {
                collect_part(record, index, part, &mut self.taken, owed)?;
            }
        }
        Ok(())
    }
}

/// Takes a turn for one part of a slot: what was opened there goes from the record to `owed`, and is protected.
fn collect_part<W: SyncWp>(
    record: &Record<W>,
    index: usize,
    part: usize,
    taken: &mut [u64],
    owed: &mut SlotSet,
) -> Result<(), TrackerError> {
    let turn = record.turn();
    let (slot, part) = (&turn[index].slot, &turn[index].parts[part]);
    let taken = &mut taken[..bitmap::words_for(part.pages.len())];
    taken.fill(0);
    part.written.drain(|word, bits| taken[word] = bits);
    let base = part.pages.start;
    for run in bitmap::runs(taken) {
        let pages = base + run.start..base + run.end;
        masks(pages.clone(), |word, bits| owed.add(word, bits));
        if let Err(source) = record.wp.protect(slot, pages.clone()) {
            // All of it is owed, and to be protected the next time.
            taken.iter().enumerate().for_each(|(word, &bits)| part.written.merge_word(word, bits));
            let (first, pages) = (pages.start, pages.len());
            return Err(TrackerError::WriteProtect { slot: slot.id(), first, pages, source });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
