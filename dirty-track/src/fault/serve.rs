//! The way of one fault: plan, allocate, install, record, wake.
//!
//! A plan is made with the block held, and carried out only if everything that it needs is at hand. If something has
//! to be fetched first, the block is let go, and when it was fetched the block is looked at *again*: what was fetched
//! and is not needed any more does no harm, and what is needed now and was not fetched is fetched next. So what may
//! wait or fail happens before anything is visible, and with nothing held.
//!
//! Installing cannot half-happen to a page: the kernel fills it or leaves it. To several pages it can, and what is
//! recorded is what was filled. `EEXIST` (somebody else filled the page), `ENOENT` (it is not registered any more),
//! `EAGAIN` (mappings are changing) and `EFAULT` of a page from a file's cache (the file does not have it now) are no
//! errors: whoever sleeps is woken, looks again, and if the page still is not as it needs it, says so anew.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vmm_sys_util::errno;

use crate::addr::{BLOCK_SIZE, Gfn, LEAVES_PER_BLOCK, PAGE_BYTES, PageRange};
use crate::fault::claims::Claims;
use crate::fault::counts::{Counter, Counters};
use crate::fault::plan::{Install, Origin, Plan, Policies, View, ahead, plan};
use crate::fault::{Age, FaultError, PageSource, Prefault, WorkingSet};
use crate::stage2::{Block, Contents, Kind, Leaves, Mapping, NoMemory, Seen, Spare, Stage2};
use crate::sys::uffd::fill::{Progress, Staging};
use crate::sys::uffd::message::Cause;

/// What pages are filled with.
#[derive(Debug)]
pub(super) enum Fill<'a> {
    Bytes(&'a [u8]),
    /// With what this has from that page on. It is moved if that can be done, and copied if not.
    Lent(&'a mut Staging, usize),
    ZeroPage,
    Cache,
    Staged,
}

/// The mechanism. Slots are named by their index, pages are counted from the slot's start. Nothing but `wake` wakes.
pub(super) trait Kernel {
    /// Fills `pages` as far as they are missing, in order, and stops at the first that cannot be filled.
    fn fill(&self, slot: usize, pages: Range<usize>, with: Fill<'_>, protected: bool) -> Progress;
    /// Lifts protection.
    fn open(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Protects.
    fn protect(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error>;
    /// Wakes who sleeps there, to look again.
    fn wake(&self, slot: usize, pages: Range<usize>);
    /// Lets the host take pages for unused.
    fn cold(&self, slot: usize, pages: Range<usize>);
    /// Hands those of `pages` to `take` that may be mapped, as runs that are not empty.
    fn there(
        &self,
        slot: usize,
        pages: Range<usize>,
        take: &mut dyn FnMut(Range<usize>),
    ) -> Result<(), errno::Error>;
    /// How `pages` are mapped, the first of them being leaf `leaf` of its block, in which they all are.
    fn look(&self, slot: usize, pages: Range<usize>, leaf: usize) -> Result<Seen, errno::Error>;
}

/// A slot whose faults are served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) frames: PageRange,
    pub(super) hva: u64,
    pub(super) origin: Origin,
    /// For [`Origin::Buffer`].
    pub(super) source: Option<Arc<dyn PageSource>>,
    /// It consists of huge pages of 2 MiB.
    pub(super) huge: bool,
    /// It takes such pages if they are moved there.
    pub(super) moves: bool,
}

impl Served {
    pub(super) fn addresses(&self) -> Range<u64> {
        self.hva..self.hva + self.frames.bytes()
    }

    /// The leaves of the block of `gfn` that the source has something but zeros for, as far as it knows.
    pub(super) fn filled(&self, gfn: Gfn) -> io::Result<Leaves> {
        let first = gfn.block() * LEAVES_PER_BLOCK;
        let start = first.max(self.frames.start.0);
        let end = (first + LEAVES_PER_BLOCK).min(self.frames.end().0);
        let mut leaves = Leaves::NONE;
        let mut add = |range: PageRange| {
            let leaf = |gfn: u64| (gfn.clamp(start, end) - first) as usize;
            leaves |= Leaves::range(leaf(range.start.0)..leaf(range.end().0));
        };
        match &self.source {
            Some(source) => source.filled(PageRange { start: Gfn(start), pages: end - start }, &mut add)?,
            None => add(PageRange { start: Gfn(start), pages: end - start }),
        }
        Ok(leaves)
    }

    /// Whether nothing has to be fetched first.
    fn has_at_hand(&self, worker: &Worker, install: &Install) -> bool {
        install.cached || self.origin != Origin::Buffer || worker.fetched.includes(&install.filled)
    }

    /// A run of leaves of the block at `first`, as pages of the slot, which has them.
    pub(super) fn pages(&self, first: Gfn, run: &Range<usize>) -> Range<usize> {
        let page = |leaf: usize| (first.0 + leaf as u64 - self.frames.start.0) as usize;
        page(run.start)..page(run.end)
    }
}

/// Everything that handlers and harvests share.
#[derive(Debug)]
pub(super) struct Pager<K> {
    pub(super) kernel: K,
    pub(super) stage2: Stage2,
    /// In the order of their frames, as in `stage2`.
    pub(super) slots: Vec<Served>,
    pub(super) policies: Policies,
    pub(super) working_set: WorkingSet,
    /// Every first write is to be seen. Read with a block held; set before all blocks are protected one by one: so
    /// whoever installs pages in a block has either seen it, or has that block protected after it.
    pub(super) track: AtomicBool,
    /// Held alone from before messages are read until what they say was dropped is recorded, and shared while pages are
    /// installed. Whoever drops memory goes on as soon as the message is read: so what was planned before is installed
    /// before the drop, and what is installed after it was planned with the knowledge of it. It is held shared until
    /// what was made writable is recorded, so a harvest that has held it alone finds that. Taken before any block.
    pub(super) news: RwLock<()>,
    /// The block of the last fault of a missing page, or [`NONE`](crate::fault::sweep::NONE).
    pub(super) asked: AtomicU64,
    /// Blocks that handlers leave to who works ahead.
    pub(super) claims: Claims,
    pub(super) counters: Counters,
}

/// A claim to a block, which is one until it is dropped: see [`Pager::claim`].
pub(super) struct Claimed<'a, K: Kernel> {
    pager: &'a Pager<K>,
    slot: usize,
    gfn: Gfn,
}

impl<K: Kernel> Drop for Claimed<'_, K> {
    fn drop(&mut self) {
        let Claimed { pager, slot, gfn } = *self;
        let sleepers = pager.claims.end(slot, gfn);
        if sleepers > 0 {
            let frames = pager.slots[slot].frames;
            let first = gfn.block() * LEAVES_PER_BLOCK;
            let page = |gfn: u64| (gfn.clamp(frames.start.0, frames.end().0) - frames.start.0) as usize;
            pager.kernel.wake(slot, page(first)..page(first + LEAVES_PER_BLOCK));
            pager.counters.waiting.take(sleepers);
        }
    }
}

/// What one handler has to itself.
#[derive(Debug, Default)]
pub(super) struct Worker {
    pub(super) spare: Spare,
    /// Contents of the leaves in `fetched` of the block that is being served, each at its place. Made when it is needed.
    buffer: Option<Staging>,
    fetched: Leaves,
    /// A block of zeros. Never written to, so it takes no memory.
    zeros: Vec<u8>,
}

/// Why a series of calls ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    /// Mappings are changing.
    Again,
    /// They are gone, or not served any more.
    Gone(errno::Error),
    Failed(errno::Error),
}

impl End {
    fn of(error: i32) -> End {
        match error {
            libc::EAGAIN => End::Again,
            libc::ENOENT | libc::ESRCH => End::Gone(errno::Error::new(error)),
            error => End::Failed(errno::Error::new(error)),
        }
    }
}

impl<K: Kernel> Pager<K> {
    /// The slot that has `address`, and the frame.
    pub(super) fn find(&self, address: u64) -> Option<(usize, Gfn)> {
        let index = self.slots.iter().position(|slot| slot.addresses().contains(&address))?;
        let slot = &self.slots[index];
        Some((index, Gfn(slot.frames.start.0 + (address - slot.hva) / crate::addr::PAGE_SIZE)))
    }

    /// Nothing is dropped of which nobody has heard as long as the guard lives.
    fn no_news(&self) -> RwLockReadGuard<'_, ()> {
        // It guards no data that a panic could leave half-changed.
        self.news.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while messages are read, and what they say is recorded. Who has held it knows that whatever was
    /// dropped or made writable before is recorded.
    pub(super) fn news(&self) -> RwLockWriteGuard<'_, ()> {
        self.news.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the block of `gfn` is about to be brought in, from a source that does not take long: a handler does not
    /// fetch it as well, and leaves who sleeps there to whoever holds the claim.
    pub(super) fn claim(&self, slot: usize, gfn: Gfn) -> Claimed<'_, K> {
        self.claims.begin(slot, gfn);
        Claimed { pager: self, slot, gfn }
    }

    /// Somebody sleeps at `address`. When this returns they are awake, or will be when a claim ends, or an error says why
    /// they are not: then it is to be called again, or they are to be woken to fault anew.
    pub(super) fn serve(&self, worker: &mut Worker, address: u64, cause: Cause) -> Result<(), FaultError> {
        match cause {
            Cause::Missing { .. } => self.counters.missing.add(1),
            Cause::Minor { .. } => self.counters.minor.add(1),
            Cause::Protected => self.counters.protected.add(1),
        }
        let Some((index, gfn)) = self.find(address) else {
            self.counters.strange.add(1);
            return Ok(());
        };
        if cause != Cause::Protected {
            self.asked.store(gfn.block(), Ordering::Relaxed);
        }
        let slot = &self.slots[index];
        let leaf = (gfn.0 % LEAVES_PER_BLOCK) as usize;
        let mut policies = self.policies;
        worker.fetched = Leaves::NONE;
        loop {
            worker.spare.fill()?;
            let no_news = self.no_news();
            let Some(mut block) = self.stage2.block(gfn) else { return Ok(()) };
            let recorded = match policies.prefault {
                Prefault::Recorded => self.working_set.leaves(&block),
                _ => Leaves::NONE,
            };
            let view = View::of(&block, recorded, slot, self.track.load(Ordering::Acquire));
            match plan(&view, leaf, cause, &policies) {
                Plan::Open(leaves) => {
                    let (end, wake) = self.open(worker, &mut block, index, leaf, leaves)?;
                    drop((block, no_news));
                    return self.wake(index, gfn, wake | Leaves::one(leaf), end);
                }
                Plan::Install(install) if slot.has_at_hand(worker, &install) => {
                    let (end, done) = self.install(worker, &mut block, index, Some(leaf), &install)?;
                    let young = block.present() & !block.old() | Leaves::one(leaf);
                    drop((block, no_news));
                    let outcome = self.wake(index, gfn, done | Leaves::one(leaf), end);
                    self.cool(index, gfn, &(done & !Leaves::one(leaf)), &young);
                    return outcome;
                }
                Plan::Install(install) => {
                    let (first, alone) = (block.first(), install.filled == Leaves::one(leaf));
                    drop((block, no_news));
                    // They wait still. Counted before they are left: who ends the claim counts them no more.
                    self.counters.waiting.add(1);
                    if self.claims.leave(index, gfn) {
                        return Ok(());
                    }
                    self.counters.waiting.take(1);
                    match worker.fetch(slot, first, &install) {
                        Ok(()) => {}
                        // A neighbour that cannot be had is no reason to let the guest wait.
                        Err(_) if !alone && !slot.huge => policies.prefault = Prefault::None,
                        Err(source) => return Err(FaultError::Fetch { gfn, source }),
                    }
                }
            }
        }
    }

    /// Installs what is missing of the `wanted` leaves of the block of `gfn`, of which nobody is known to have touched
    /// any.
    pub(super) fn fill_block(
        &self,
        worker: &mut Worker,
        index: usize,
        gfn: Gfn,
        wanted: impl Fn(&Block<'_>) -> Leaves,
    ) -> Result<(), FaultError> {
        let slot = &self.slots[index];
        worker.fetched = Leaves::NONE;
        loop {
            worker.spare.fill()?;
            let no_news = self.no_news();
            let Some(mut block) = self.stage2.block(gfn) else { return Ok(()) };
            let view = View::of(&block, Leaves::NONE, slot, self.track.load(Ordering::Acquire));
            let install = ahead(&view, wanted(&block), self.policies.age);
            if (install.filled | install.zeroed).is_empty() {
                return Ok(());
            }
            if !slot.has_at_hand(worker, &install) {
                let first = block.first();
                drop((block, no_news));
                worker.fetch(slot, first, &install).map_err(|source| FaultError::Fetch { gfn, source })?;
                continue;
            }
            let (end, done) = self.install(worker, &mut block, index, None, &install)?;
            drop((block, no_news));
            let outcome = self.wake(index, gfn, done, end);
            match end {
                // Mappings change; a handler has to read that before it can go on.
                End::Again => std::thread::yield_now(),
                End::Gone(source) => return Err(FaultError::Install { gfn, source }),
                End::Done | End::Failed(_) => return outcome,
            }
        }
    }

    /// Installs, and records what was.
    fn install(
        &self,
        worker: &mut Worker,
        block: &mut Block<'_>,
        index: usize,
        leaf: Option<usize>,
        plan: &Install,
    ) -> Result<(End, Leaves), FaultError> {
        let Worker { spare, buffer, fetched, zeros } = worker;
        let (slot, first) = (&self.slots[index], block.first());
        let one = leaf.map_or(Leaves::NONE, Leaves::one);
        let counters = &self.counters;
        if !plan.zeroed.is_empty() {
            zeros.resize(BLOCK_SIZE as usize, 0);
        }
        let bytes = |run: &Range<usize>| run.start * PAGE_BYTES..run.end * PAGE_BYTES;
        let (mut done, mut there) = (Leaves::NONE, Leaves::NONE);
        let mut end = End::Done;
        for (leaves, zero) in [(&plan.filled, false), (&plan.zeroed, true)] {
            for run in leaves.runs() {
                if end != End::Done {
                    break;
                }
                end = fill_run(&run, slot.huge, &mut done, &mut there, |run| {
                    let (with, counter): (_, &Counter) = match slot.origin {
                        _ if zero && plan.zero_page => (Fill::ZeroPage, &counters.zeroes),
                        _ if zero => (Fill::Bytes(&zeros[bytes(&run)]), &counters.copies),
                        _ if plan.cached => (Fill::Cache, &counters.continues),
                        Origin::Staged => (Fill::Staged, &counters.moves),
                        Origin::Buffer if plan.moved => (lent(buffer, run.start), &counters.moves),
                        // Of these two others, one has a cache and the other zeros.
                        Origin::Buffer | Origin::Cache | Origin::Zero => {
                            (Fill::Bytes(fetched_bytes(buffer, bytes(&run))), &counters.copies)
                        }
                    };
                    counter.add(1);
                    self.kernel.fill(index, slot.pages(first, &run), with, plan.protected)
                });
            }
        }
        if plan.moved {
            // What the kernel has moved, it may deny.
            *fetched = Leaves::NONE;
        }
        let opened = plan.open && done.includes(&one) && end == End::Done;
        if let (true, Some(leaf)) = (opened, leaf)
            && let Err(error) = self.kernel.open(index, slot.pages(first, &(leaf..leaf + 1)))
        {
            end = End::of(error.errno());
        }
        let along = match self.policies.age {
            Age::Old => !one,
            Age::Young => Leaves::NONE,
        };
        let mapped = record(block, plan, done, one, along, slot.huge, spare)?;
        if opened && end == End::Done {
            block.open(&one, spare)?;
        }
        if plan.written {
            block.mark(&(done & one & !block.protected()), spare)?;
        }
        // What is being dropped is there until it is dropped, and a harvest knows that.
        let unknown = there & !block.present() & !block.dropped();
        if !unknown.is_empty() {
            self.recall(block, index, unknown, spare)?;
        }
        counters.installed.add(mapped.count());
        counters.prefaulted.add((mapped & !one).count());
        counters.old.add((mapped & block.old()).count());
        if mapped.is_empty() && end == End::Done {
            counters.stale.add(1);
        }
        Ok((end, done))
    }

    /// Opens, and records what was.
    fn open(
        &self,
        worker: &mut Worker,
        block: &mut Block<'_>,
        index: usize,
        leaf: usize,
        leaves: Leaves,
    ) -> Result<(End, Leaves), FaultError> {
        let (slot, one, spare) = (&self.slots[index], Leaves::one(leaf), &mut worker.spare);
        let before = block.kind();
        let (mut opened, mut end) = (Leaves::NONE, End::Done);
        for run in leaves.runs() {
            if let Err(error) = self.kernel.open(index, slot.pages(block.first(), &run)) {
                end = End::of(error.errno());
                break;
            }
            opened |= Leaves::range(run);
        }
        if opened.contains(leaf) && !block.dropped().contains(leaf) {
            // It is there, whatever was recorded; unless it is just being dropped.
            block.map(&one, Mapping { protected: false, old: false }, spare)?;
        }
        block.open(&opened, spare)?;
        if opened.contains(leaf) {
            block.mark(if slot.huge { &opened } else { &one }, spare)?;
            self.counters.hits.add(block.touch(&one).count());
        }
        self.counters.opened.add(opened.count());
        if opened.count() > 1 {
            self.counters.blocks_opened.add(1);
        }
        if let (Kind::Huge { .. }, Kind::Split) = (before, block.kind()) {
            self.counters.splits.add(1);
        }
        Ok((end, opened))
    }

    /// Wakes who sleeps at `leaves`, and says how it went.
    fn wake(&self, index: usize, gfn: Gfn, leaves: Leaves, end: End) -> Result<(), FaultError> {
        if matches!(end, End::Again | End::Gone(_)) {
            self.counters.again.add(1);
        }
        // One call wakes more cheaply than several, and whoever is woken in vain looks again.
        let first = Gfn(gfn.block() * LEAVES_PER_BLOCK);
        let hull = leaves.runs().reduce(|hull, run| hull.start..run.end);
        match (end, hull) {
            (End::Failed(source), _) => Err(FaultError::Install { gfn, source }),
            (_, Some(hull)) => {
                self.kernel.wake(index, self.slots[index].pages(first, &hull));
                Ok(())
            }
            (_, None) => Ok(()),
        }
    }

    /// The old pages of the block of `gfn` look unused to the host.
    pub(super) fn cool_block(&self, index: usize, gfn: Gfn) {
        let Some(block) = self.stage2.block(gfn) else { return };
        let (old, young) = (block.old(), block.present() & !block.old());
        drop(block);
        self.cool(index, gfn, &old, &young);
    }

    /// After everybody is awake: pages that came along and are old look unused to the host.
    fn cool(&self, index: usize, gfn: Gfn, along: &Leaves, young: &Leaves) {
        if self.policies.age == Age::Old && !self.slots[index].huge {
            let first = Gfn(gfn.block() * LEAVES_PER_BLOCK);
            hulls(along, young, |run| self.kernel.cold(index, self.slots[index].pages(first, &run)));
        }
    }
}

/// Gives `each` the leaves `along` in as few runs as leave out the `young` ones. What else they have is absent, or old
/// already.
fn hulls(along: &Leaves, young: &Leaves, mut each: impl FnMut(Range<usize>)) {
    for gap in (!*young).runs() {
        let inside = *along & Leaves::range(gap);
        let hull = inside.runs().reduce(|hull, run| hull.start..run.end);
        hull.into_iter().for_each(&mut each);
    }
}

/// Records the leaves `done` as mapped, and returns those that were not before.
fn record(
    block: &mut Block<'_>,
    plan: &Install,
    done: Leaves,
    one: Leaves,
    along: Leaves,
    huge: bool,
    spare: &mut Spare,
) -> Result<Leaves, NoMemory> {
    // What was filled was not there, whatever was recorded.
    let lost = done & block.present();
    if !lost.is_empty() {
        block.zap(&lost, if plan.cached { Contents::Kept } else { Contents::Dropped }, spare)?;
    }
    let mapping = Mapping { protected: plan.protected, old: false };
    if huge && done == Leaves::ALL && block.map_huge(mapping).is_ok() {
        return Ok(done);
    }
    block.map(&(done & !along), mapping, spare)?;
    block.map(&(done & !one), Mapping { old: true, ..mapping }, spare)?;
    Ok(done)
}

/// Fills `run` by as many calls as it takes, leaving out pages that are `there` and pages that cannot be filled.
fn fill_run(
    run: &Range<usize>,
    huge: bool,
    done: &mut Leaves,
    there: &mut Leaves,
    mut call: impl FnMut(Range<usize>) -> Progress,
) -> End {
    let mut at = run.start;
    while at < run.end {
        let Progress { pages, error } = call(at..run.end);
        let filled = at..run.end.min(at + pages);
        at = filled.end;
        *done |= Leaves::range(filled);
        match error {
            None => return End::Done,
            // The next call says why.
            Some(_) if pages > 0 => {}
            Some(error @ (libc::EEXIST | libc::EFAULT)) => {
                let next = if huge { run.end } else { at + 1 };
                if error == libc::EEXIST {
                    *there |= Leaves::range(at..next);
                }
                at = next;
            }
            Some(error) => return End::of(error),
        }
    }
    End::Done
}

/// What `buffer` has at `range`. What was never fetched has no bytes, which nothing can be filled with.
fn fetched_bytes(buffer: &mut Option<Staging>, range: Range<usize>) -> &[u8] {
    buffer.as_mut().and_then(|buffer| buffer.bytes().get(range)).unwrap_or_default()
}

/// The pages of `buffer` from `page` on, as [`fetched_bytes`].
fn lent(buffer: &mut Option<Staging>, page: usize) -> Fill<'_> {
    buffer.as_mut().map_or(Fill::Bytes(&[]), |buffer| Fill::Lent(buffer, page))
}

impl Worker {
    /// Fetches what `install` fills of the block at `first`, as far as it is not at hand.
    fn fetch(&mut self, slot: &Served, first: Gfn, install: &Install) -> io::Result<()> {
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            none => none.insert(Staging::new(LEAVES_PER_BLOCK as usize)?),
        };
        if install.moved {
            self.fetched = Leaves::NONE;
            buffer.prepare_huge()?;
        }
        let source = slot.source.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let missing = install.filled & !self.fetched;
        for run in missing.runs() {
            let pages = PageRange { start: Gfn(first.0 + run.start as u64), pages: run.len() as u64 };
            source.fetch(pages, &mut buffer.bytes()[run.start * PAGE_BYTES..run.end * PAGE_BYTES])?;
            self.fetched |= Leaves::range(run);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
