//! Copy-on-write: the contents of memory as they were at one moment, saved while the guest runs on.
//!
//! # Why
//! Whoever copies a guest's memory while it stands still holds it up for as long as that takes. Here it stands still only
//! for what *fixes* its memory: its pages are write-protected, and whoever writes to one waits until that one was copied.
//!
//! # The way of a copy
//! 1. **While the guest runs** ([`protect`](Cow::protect)): pages are protected, in pieces. Who writes to one meanwhile is let
//!    through, and the page is noted.
//! 2. **While it stands still** ([`freeze`](Cow::freeze)): what was let through, which is little, is protected again. From here
//!    on the contents are fixed.
//! 3. **While it runs again** ([`save`](Cow::save)): copiers go through all pages, and the handler of faults takes those that
//!    somebody waits for, with their neighbours. Each page is *claimed* by one of them, copied, opened, and only then
//!    written to the image: nobody waits for a disk but the copiers (and whoever writes to the next page that is not
//!    copied yet, while the handler writes).
//!
//! # Why the copy is that of the moment
//! (The unit of all this is that of protection: a page of 4 KiB, or of 2 MiB where memory consists of these.)
//!
//! A page that is wanted is protected from `freeze` on until it was copied: only who has claimed it opens it, after having
//! copied it, and a claim is one atomic operation, so nobody else has it. Between the end of `freeze` and that, no write
//! gets through, by a vCPU or by the host (devices that read a file into guest memory wait in the system call). Writes
//! through other mappings of shared memory, of other processes for one, are not seen.
//!
//! A page that somebody waits for and that is claimed already is left to its claimer: the kernel wakes all who wait at it
//! when it is opened, and whoever comes later finds it open (`userfaultfd_must_wait` is asked after one has queued up).
//!
//! Memory that has nothing in it at the moment is zeros and stays unprotected; blocks of 2 MiB that are all absent are found
//! out beforehand, looked at once more when the guest stands still, and cost nothing.
//!
//! If anything fails, the copy has failed, and the guest runs on unharmed: everything is opened.
//!
//! Source of what the kernel does: Linux, mm/userfaultfd.c and fs/userfaultfd.c. Linux 6.4 at least.

mod claim;
#[cfg(test)]
mod model;
mod saver;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::{BLOCK_SIZE, Gfn, PAGE_SHIFT, PageSize};
use crate::bitmap::{self, DirtyBitmap};
use crate::image::{ImageError, ImageWriter};
use crate::sys::pagemap::{Found, Pagemap};
use crate::sys::uffd::lookout::Lookout;
use crate::sys::uffd::{Mode, Uffd, UffdError, Wait};
use crate::tracker::change::Tracked;
use crate::tracker::wp_slot::WpSlot;
use crate::tracker::{Backing, Slot, TrackerError};
use claim::Claims;
use saver::Saver;

/// Why memory cannot be saved like this, or was not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CowError {
    /// No userfaultfd that can do it.
    #[error(transparent)]
    Userfaultfd(#[from] UffdError),
    /// The slots.
    #[error(transparent)]
    Slots(#[from] TrackerError),
    /// A slot's memory cannot be registered.
    #[error("cannot hold up writes to memory slot {id}: {source}; another userfaultfd may have it")]
    Register {
        /// Number of the slot.
        id: u32,
        /// What the kernel said.
        source: errno::Error,
    },
    /// Protection.
    #[error("cannot write-protect {pages} pages from page {first} of memory slot {id}: {source}")]
    Protect {
        /// Number of the slot.
        id: u32,
        /// First page, counted from the slot's start.
        first: usize,
        /// Number of pages.
        pages: usize,
        /// What the kernel said.
        source: errno::Error,
    },
    /// A page cannot be opened.
    #[error("cannot let the guest write to a page again: {0}")]
    Open(errno::Error),
    /// No thread.
    #[error("cannot start a thread that saves memory: {0}")]
    Thread(io::Error),
    /// Faults cannot be read.
    #[error("cannot read from the userfaultfd: {0}")]
    Read(io::Error),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// What is to be saved.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// All pages.
    All,
    /// The pages that are marked: those of the slots one after the other in the order of their addresses, each from a new
    /// word on.
    Marked(&'a DirtyBitmap),
}

/// How it went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CowReport {
    /// Writes that were held up until their page was copied.
    pub faults: u64,
    /// Pages that were copied for them.
    pub fault_pages: u64,
    /// The longest time in microseconds from when such a write was heard of until it was let through.
    pub worst_fault_us: f64,
    /// The mean of these times.
    pub mean_fault_us: f64,
    /// Writes to pages that nobody wanted, or that were let through before the moment.
    pub let_through: u64,
    /// Pages that were protected while the guest stood still.
    pub protected_still: u64,
}

/// A copy in the making; see the [module](self).
#[derive(Debug)]
pub struct Cow {
    shared: Arc<Shared>,
    stop: EventFd,
    handler: Option<JoinHandle<()>>,
    /// The first so many slots are registered.
    registered: usize,
}

/// A slot that is saved.
#[derive(Debug)]
struct Part {
    slot: WpSlot,
    /// Pages that are protected and were not let through since; only before the moment.
    armed: DirtyBitmap,
    /// Pages of blocks that had nothing in them when they were to be protected.
    absent: DirtyBitmap,
    claims: Claims<AtomicU64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Writes are let through, and noted.
    Before,
    /// They wait.
    Saving,
    /// They are let through: the copy is lost.
    Failed,
}

#[derive(Debug)]
struct Shared {
    uffd: Uffd,
    parts: Vec<Part>,
    image: Arc<ImageWriter>,
    /// Held while a page is opened and noted, and while the phase changes.
    phase: Mutex<Phase>,
    /// Set with the phase.
    failed: AtomicBool,
    failure: Mutex<Option<CowError>>,
    /// Pages that are wanted and not copied yet.
    left: AtomicUsize,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    faults: AtomicU64,
    fault_pages: AtomicU64,
    worst_ns: AtomicU64,
    total_ns: AtomicU64,
    let_through: AtomicU64,
    still: AtomicU64,
}

/// Between two looks whether the last pages were copied by somebody else.
const NAP: Duration = Duration::from_micros(50);

/// Runs of pages to be protected that are no further apart than this are protected in one call. It also protects what is
/// between them, which costs less than another call does.
const GAP: usize = 128;

/// Pages of a block.
const BLOCK: usize = (BLOCK_SIZE >> PAGE_SHIFT) as usize;

impl Cow {
    /// Prepares to save `slots` to `image`. Nothing is protected yet. With `anonymous`, memory of private slots that is not
    /// there is zeros (it maps no file), and need not be looked at.
    ///
    /// # Errors
    /// [`CowError::Userfaultfd`], [`CowError::Slots`], [`CowError::Register`] where this cannot be had; [`CowError::Thread`].
    pub fn new(slots: Vec<Slot>, image: Arc<ImageWriter>, anonymous: bool) -> Result<Cow, CowError> {
        let slots = WpSlot::all(slots)?;
        if let Some(slot) = slots.iter().find(|slot| slot.page() == PageSize::G1) {
            let why = "a guest would wait for a page of 1 GiB for too long";
            return Err(TrackerError::BadSlot { id: slot.id(), why }.into());
        }
        let uffd = Uffd::open(Mode::Sync)?;
        // Without it (before Linux 6.7) everything is looked at.
        let pagemap = if anonymous { Pagemap::open().ok() } else { None };
        let part = |slot: WpSlot| {
            let pages = slot.pages();
            let absent = DirtyBitmap::new(pages);
            if let Some(pagemap) = pagemap.as_ref().filter(|_| slot.backing() == Backing::Private) {
                absent_blocks(pagemap, &slot, 0..pages, |block| absent.set_range(block));
            }
            Part {
                armed: DirtyBitmap::new(pages),
                absent,
                claims: Claims::new(pages, slot.page().leaves() as usize),
                slot,
            }
        };
        let shared = Arc::new(Shared {
            uffd,
            parts: slots.into_iter().map(part).collect(),
            image,
            phase: Mutex::new(Phase::Before),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            left: AtomicUsize::new(0),
            counters: Counters::default(),
        });
        let stop = EventFd::new(EFD_NONBLOCK).map_err(CowError::Thread)?;
        let mut cow = Cow { shared, stop, handler: None, registered: 0 };
        let (shared, stopped) = (Arc::clone(&cow.shared), cow.stop.try_clone().map_err(CowError::Thread)?);
        let handler = thread::Builder::new().name("cow-handler".into());
        cow.handler = Some(handler.spawn(move || shared.handle(&stopped)).map_err(CowError::Thread)?);
        for (index, part) in cow.shared.parts.iter().enumerate() {
            let (start, len) = part.slot.addresses(&(0..part.slot.pages()));
            let registered = cow.shared.uffd.register(start, len);
            registered.map_err(|source| CowError::Register { id: part.slot.id(), source })?;
            cow.registered = index + 1;
        }
        Ok(cow)
    }

    /// Protects the blocks of what is going to be `wanted`, as far as that is known, while the guest runs: what is protected
    /// now needs not be when it stands still.
    ///
    /// # Errors
    /// [`CowError::Protect`].
    pub fn protect(&self, wanted: Wanted<'_>) -> Result<(), CowError> {
        let mut base = 0;
        for part in &self.shared.parts {
            let pages = part.slot.pages();
            match wanted {
                Wanted::All => self.arm(part, 0..pages)?,
                Wanted::Marked(marks) => {
                    let mut done = 0;
                    for run in marks.runs() {
                        let (start, end) = (run.start.max(base), run.end.min(base + pages));
                        if start >= end {
                            continue;
                        }
                        let blocks =
                            (start - base) / BLOCK * BLOCK..(end - base).next_multiple_of(BLOCK).min(pages);
                        self.arm(part, blocks.start.max(done)..blocks.end)?;
                        done = blocks.end;
                    }
                }
            }
            base += pages.next_multiple_of(bitmap::PAGES_PER_WORD);
        }
        Ok(())
    }

    /// Protects what is there of `pages`.
    fn arm(&self, part: &Part, pages: std::ops::Range<usize>) -> Result<(), CowError> {
        let mut at = pages.start;
        while at < pages.end {
            let absent = part.absent.get(at);
            let mut end = at;
            while end < pages.end && part.absent.get(end) == absent {
                end = ((end / BLOCK + 1) * BLOCK).min(pages.end);
            }
            if !absent {
                for piece in part.slot.chunks(at..end) {
                    // Noted first: who is let through meanwhile takes his page's note away again.
                    part.armed.set_range(piece.clone());
                    self.shared.protect(part, piece)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Fixes what is `wanted`, while nobody writes to memory: no vCPU runs, and no device does anything. When this returns
    /// they may go on.
    ///
    /// # Errors
    /// [`CowError::Protect`], and what went wrong before: nothing is fixed then.
    pub fn freeze(&self, wanted: Wanted<'_>) -> Result<(), CowError> {
        let shared = &*self.shared;
        let mut phase = shared.phase();
        if let Some(error) = shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        let pagemap = Pagemap::open().ok();
        let (mut base, mut left) = (0, 0);
        for part in &shared.parts {
            let pages = part.slot.pages();
            let words = bitmap::words_for(pages);
            if let Some(pagemap) = &pagemap {
                still_absent(part, pagemap);
            }
            let mut all: Vec<u64> = match wanted {
                Wanted::All => {
                    let mut words = vec![u64::MAX; words];
                    if let (Some(last), rest @ 1..) = (words.last_mut(), pages % bitmap::PAGES_PER_WORD) {
                        *last = (1 << rest) - 1;
                    }
                    words
                }
                Wanted::Marked(marks) => (0..words).map(|word| marks.word(base + word)).collect(),
            };
            for (word, bits) in all.iter_mut().enumerate() {
                *bits &= !part.absent.word(word);
            }
            let open: Vec<u64> =
                all.iter().enumerate().map(|(word, bits)| bits & !part.armed.word(word)).collect();
            for run in merged(bitmap::runs(&open), GAP) {
                let run = part.slot.widen(run, part.slot.page());
                shared.counters.still.fetch_add(run.len() as u64, Ordering::Relaxed);
                for piece in part.slot.chunks(run) {
                    shared.protect(part, piece)?;
                }
            }
            left += bitmap::count(&all);
            part.claims.want(all);
            base += words;
        }
        shared.left.store(left, Ordering::Release);
        *phase = Phase::Saving;
        Ok(())
    }

    /// Saves everything with `copiers` threads, this one among them, and ends. The image has all that was wanted then.
    ///
    /// # Errors
    /// [`CowError::Image`], [`CowError::Open`], [`CowError::Read`], [`CowError::Thread`]: the image is good for nothing,
    /// and the guest has run on.
    pub fn save(mut self, copiers: usize) -> Result<CowReport, CowError> {
        let shared = &self.shared;
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 1..copiers.max(1) {
                let copier = thread::Builder::new().name("cow-copier".into());
                // One is enough.
                let _ = copier.spawn_scoped(scope, || shared.copy_all(&next));
            }
            shared.copy_all(&next);
        });
        while shared.left.load(Ordering::Acquire) > 0 && !shared.failed.load(Ordering::Acquire) {
            thread::sleep(NAP);
        }
        self.release();
        match self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(self.shared.counters.report()),
        }
    }

    /// In the order that leaves nobody asleep.
    fn release(&mut self) {
        for part in &self.shared.parts[..std::mem::take(&mut self.registered)] {
            let (start, len) = part.slot.addresses(&(0..part.slot.pages()));
            // What cannot be unregistered is so when the descriptor is closed.
            let _ = self.shared.uffd.unregister(start, len);
            let _ = self.shared.uffd.wake(start, len);
        }
        // An eventfd whose counter is not nearly full takes the write.
        let _ = self.stop.write(1);
        // It has written what it had copied when it ends.
        self.handler.take().map(JoinHandle::join);
    }
}

impl Drop for Cow {
    fn drop(&mut self) {
        if self.handler.is_some() {
            self.release();
        }
    }
}

impl Shared {
    /// Its value is right between any two statements.
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn protect(&self, part: &Part, pages: std::ops::Range<usize>) -> Result<(), CowError> {
        let (start, len) = part.slot.addresses(&pages);
        self.uffd.protect(start, len).map_err(|source| CowError::Protect {
            id: part.slot.id(),
            first: pages.start,
            pages: pages.len(),
            source,
        })
    }

    /// Gives the copy up. From now on everybody is let through.
    fn fail(&self, error: CowError) {
        let mut phase = self.phase();
        *phase = Phase::Failed;
        self.lose(error);
        for part in &self.parts {
            let (start, len) = part.slot.addresses(&(0..part.slot.pages()));
            // Who is not let through by this says so again when he is woken.
            let _ = self.uffd.unprotect(start, len);
            let _ = self.uffd.wake(start, len);
        }
    }

    /// Notes that the copy is lost. The copiers end, and then everything is opened.
    fn lose(&self, error: CowError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    /// Serves faults until told to stop.
    fn handle(&self, stop: &EventFd) {
        let (mut saver, mut lookout) = (Saver::new(self), Lookout::default());
        loop {
            let fault = match self.uffd.wait(stop, &mut lookout) {
                Ok(Wait::Stopped) => return,
                Ok(Wait::Faults) => self.uffd.fault(),
                Err(error) => Err(error),
            };
            match fault {
                Ok(Some(address)) => saver.serve(address),
                Ok(None) => {}
                Err(error) => {
                    self.fail(CowError::Read(error));
                    // It must not end, or whoever waits would wait for ever.
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// Saves block after block, until no other is left or the copy has failed.
    fn copy_all(&self, next: &AtomicUsize) {
        let mut saver = Saver::new(self);
        loop {
            let mut number = next.fetch_add(1, Ordering::Relaxed);
            let part = self.parts.iter().find(|part| {
                let blocks = part.slot.pages().div_ceil(BLOCK);
                number < blocks || {
                    number -= blocks;
                    false
                }
            });
            let Some(part) = part.filter(|_| !self.failed.load(Ordering::Acquire)) else { return };
            let start = number * BLOCK;
            saver.save_block(part, start..(start + BLOCK).min(part.slot.pages()));
        }
    }
}

impl Counters {
    fn report(&self) -> CowReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = load(&self.faults);
        CowReport {
            faults,
            fault_pages: load(&self.fault_pages),
            worst_fault_us: load(&self.worst_ns) as f64 / 1000.0,
            mean_fault_us: if faults == 0 {
                0.0
            } else {
                load(&self.total_ns) as f64 / 1000.0 / faults as f64
            },
            let_through: load(&self.let_through),
            protected_still: load(&self.still),
        }
    }
}

/// Runs that are no further apart than `gap` as one.
fn merged(
    runs: impl Iterator<Item = std::ops::Range<usize>>,
    gap: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut runs = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while let Some(next) = runs.next_if(|next| next.start - run.end <= gap) {
            run.end = next.end;
        }
        Some(run)
    })
}

/// Hands each whole block of `pages` that has nothing in it to `take`. Nothing at all if that cannot be found out.
fn absent_blocks(
    pagemap: &Pagemap,
    slot: &WpSlot,
    pages: std::ops::Range<usize>,
    mut take: impl FnMut(std::ops::Range<usize>),
) {
    let mut take_up_to = |from: usize, to: usize| {
        let (from, to) = (from.next_multiple_of(BLOCK), to / BLOCK * BLOCK);
        if from < to {
            take(from..to);
        }
    };
    let mut found = [Found::NOTHING; 256];
    let (mut at, end) = (slot.hva(pages.start), slot.hva(pages.end));
    let mut nothing_from = pages.start;
    while at < end {
        let Ok((runs, next)) = pagemap.mapped(at, end, &mut found) else { return };
        if next <= at {
            return;
        }
        for run in &found[..runs] {
            let there = slot.pages_at(run.addresses());
            take_up_to(nothing_from, there.start);
            nothing_from = nothing_from.max(there.end);
        }
        at = next;
    }
    take_up_to(nothing_from, pages.end);
}

/// Takes those blocks out of the absent ones that have something by now.
fn still_absent(part: &Part, pagemap: &Pagemap) {
    let before: Vec<_> = part.absent.runs().collect();
    for run in before {
        let still = DirtyBitmap::new(part.slot.pages());
        absent_blocks(pagemap, &part.slot, run.clone(), |block| still.set_range(block));
        for block in run.step_by(BLOCK).filter(|block| !still.get(*block)) {
            part.absent.clear_range(block..(block + BLOCK).min(part.slot.pages()));
        }
    }
}

/// The frame of page `page` of `slot`.
fn gfn(slot: &WpSlot, page: usize) -> Gfn {
    Gfn(slot.slot().frames().start.0 + page as u64)
}
