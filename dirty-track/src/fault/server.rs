//! The threads that serve faults, on a userfaultfd over the slots.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::{BLOCK_SIZE, Gfn, LEAVES_PER_BLOCK, PAGE_BYTES, PageRange, PageSize};
use crate::fault::claims::Claims;
use crate::fault::counts::Counts;
use crate::fault::plan::{Origin, Policies};
use crate::fault::serve::{Fill, Kernel, Pager, Served, Worker};
use crate::fault::sweep::{NONE, Part, Sweep};
use crate::fault::{FaultError, Prefault, Source, WorkingSet};
use crate::stage2::{Block, Disagreement, Leaves, Seen, Stage2};
use crate::sys::pagemap::{Found, Pagemap};
use crate::sys::uffd::fill::{Progress, Staging, cold};
use crate::sys::uffd::lookout::Lookout;
use crate::sys::uffd::message::{Cause, Message};
use crate::sys::uffd::{Mode, Uffd, UffdError, Wait};
use crate::tracker::change::Tracked;
use crate::tracker::wp_slot::WpSlot;
use crate::tracker::{Backing, Slot};

/// How to serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// What decides.
    pub policies: Policies,
    /// For [`Prefault::Recorded`]; no use otherwise.
    pub working_set: WorkingSet,
    /// Number of threads: 1 or more. One serves some forty thousand faults a second; more help where a source takes
    /// its time.
    pub handlers: usize,
    /// Number of threads that bring in what was not asked for yet: 1 or more. A guest has little to do before its memory is
    /// there, so there may be one for each processor.
    pub ahead: usize,
    /// What nobody asks for is brought in from the first fault on, by threads that give way to handlers.
    pub fill: bool,
    /// Private anonymous memory gets huge pages (THP) where a block comes as a whole from a [`Source::Fetch`] and needs no
    /// protection: such a block is moved instead of copied. Without Linux 6.8, or without a huge page at hand, it has
    /// small ones.
    pub huge: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            policies: Policies::default(),
            working_set: WorkingSet::default(),
            handlers: 1,
            ahead: 1,
            fill: false,
            huge: false,
        }
    }
}

/// Serves the faults of guest memory; see the [module](crate::fault).
///
/// Dropping it ends the service: pages that are still missing read as zero from then on. While a guest may run on,
/// [`fill_rest`](Server::fill_rest) comes first.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    /// Readable for handlers that are to end.
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
    /// The first so many slots are.
    registered: usize,
}

#[derive(Debug)]
struct Shared {
    pager: Pager<KernelUffd>,
    /// Who works ahead is to end.
    ending: AtomicBool,
    /// The newest.
    failure: Mutex<Option<FaultError>>,
}

/// What is left of what is brought in before anybody asks for it.
#[derive(Debug)]
struct Ahead {
    /// Of the working set, if there is one.
    set: Option<Mutex<Sweep>>,
    /// Threads that have something of it.
    busy: AtomicUsize,
    /// Of all that is not just zeros, if it is to be brought in.
    rest: Option<Mutex<Sweep>>,
}

fn lock(sweep: &Mutex<Sweep>) -> MutexGuard<'_, Sweep> {
    // A set of numbers, whole between any two statements.
    sweep.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a handler waits after an error before it tries again.
const AFTER_ERROR: Duration = Duration::from_millis(1);

/// Between two looks whether anybody has asked for a page.
const BEFORE_FILLING: Duration = Duration::from_millis(1);

/// What a guest that goes on takes for the some ten pages that it needs first.
const ITS_FIRST_FAULTS: Duration = Duration::from_millis(3);

/// How long the end of the service waits for a handler that is busy with a source.
const FOR_HANDLERS: Duration = Duration::from_secs(1);

impl Server {
    /// Serves `slots`, each with its source. What is mapped there already stays as it is; only what is missing is
    /// fetched. Linux 6.7.
    ///
    /// # Errors
    /// [`FaultError::Userfaultfd`]; [`FaultError::Pagemap`] and [`FaultError::Look`]; [`FaultError::Slot`] when a slot and its source do not go together;
    /// [`FaultError::Config`]; [`FaultError::Register`]; [`FaultError::Handler`].
    pub fn start(slots: Vec<(Slot, Source)>, config: Config) -> Result<Server, FaultError> {
        let Config { policies, working_set, handlers, ahead, fill, huge } = config;
        if handlers == 0 || ahead == 0 {
            return Err(FaultError::Config("there must be a handler, and a thread that works ahead"));
        }
        if policies.prefault == Prefault::Recorded && working_set.ranges().is_empty() {
            return Err(FaultError::Config("prefault=recorded needs a working set that was recorded before"));
        }
        let staged = slots.iter().any(|(_, source)| matches!(source, Source::Staged(_)));
        let mut served: Vec<(WpSlot, Source)> = Vec::new();
        for (slot, source) in slots {
            let wp = WpSlot::all(vec![slot])?;
            served.extend(wp.into_iter().map(|slot| (slot, source.clone())));
        }
        served.sort_by_key(|(slot, _)| slot.slot().frames().start);
        for (slot, source) in &served {
            check(slot, source).map_err(|why| FaultError::Slot { id: slot.id(), why })?;
        }
        let stage2 = Stage2::new(served.iter().map(|(slot, _)| slot.slot().frames()))?;
        let (uffd, huge) = match Uffd::open(Mode::Serve { moves: staged || huge }) {
            Err(UffdError::Feature { .. }) if !staged => (Uffd::open(Mode::Serve { moves: false })?, false),
            opened => (opened?, huge),
        };
        let slots = served
            .iter()
            .map(|(slot, source)| Served {
                frames: slot.slot().frames(),
                hva: slot.slot().hva(),
                origin: source.origin(),
                source: match source {
                    Source::Fetch(source) => Some(Arc::clone(source)),
                    _ => None,
                },
                huge: slot.page() == PageSize::M2,
                moves: huge && slot.backing() == Backing::Private,
            })
            .collect();
        let staging = served.iter().map(|(_, source)| match source {
            Source::Staged(staging) => Some(Arc::clone(staging)),
            _ => None,
        });
        let staging = staging.collect();
        let pagemap = Pagemap::open().map_err(FaultError::Pagemap)?;
        let wp = served.into_iter().map(|(slot, _)| slot).collect();
        let kernel = KernelUffd { uffd, pagemap, slots: wp, staging };
        let pager = Pager {
            kernel,
            stage2,
            slots,
            policies,
            working_set,
            track: AtomicBool::new(false),
            news: RwLock::new(()),
            asked: AtomicU64::new(NONE),
            claims: Claims::default(),
            counters: Default::default(),
        };
        let shared = Arc::new(Shared { pager, ending: AtomicBool::new(false), failure: Mutex::new(None) });
        let stop = EventFd::new(EFD_NONBLOCK).map_err(FaultError::Handler)?;
        let mut server = Server { shared, stop, threads: Vec::new(), registered: 0 };
        for _ in 0..handlers {
            server.spawn().map_err(FaultError::Handler)?;
        }
        server.register()?;
        server.shared.pager.adopt()?;
        let recorded = policies.prefault == Prefault::Recorded;
        if recorded || fill {
            server.bring_ahead(recorded, fill, ahead).map_err(FaultError::Handler)?;
        }
        Ok(server)
    }

    /// Has so many threads bring in what nobody has asked for yet.
    fn bring_ahead(&mut self, recorded: bool, fill: bool, threads: usize) -> io::Result<()> {
        let set = recorded.then(|| Mutex::new(Sweep::new(self.shared.blocks_of_working_set())));
        let rest = fill.then(|| Mutex::new(Sweep::new(self.shared.blocks_of_sources())));
        let ahead = Arc::new(Ahead { set, busy: AtomicUsize::new(threads), rest });
        for first in (0..threads).map(|number| number == 0) {
            let (shared, ahead) = (Arc::clone(&self.shared), Arc::clone(&ahead));
            let work = move || shared.bring_ahead(&ahead, first);
            self.threads.push(thread::Builder::new().name("fault-ahead".into()).spawn(work)?);
        }
        Ok(())
    }

    fn spawn(&mut self) -> io::Result<()> {
        let (shared, stopped) = (Arc::clone(&self.shared), self.stop.try_clone()?);
        let work = move || {
            // A source that panics must not leave a guest asleep: what the handler had taken is asked anew.
            while let Err(panic) = catch_unwind(AssertUnwindSafe(|| shared.handle(&stopped))) {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                shared.failed(FaultError::Panicked(text));
                shared.wake_all();
            }
        };
        self.threads.push(thread::Builder::new().name("fault-handler".into()).spawn(work)?);
        Ok(())
    }

    fn register(&mut self) -> Result<(), FaultError> {
        let Shared { pager, .. } = &*self.shared;
        for (index, slot) in pager.kernel.slots.iter().enumerate() {
            pager
                .kernel
                .uffd
                .register_slot(slot.slot(), slot.backing() != Backing::Private)
                .map_err(|source| FaultError::Register { id: slot.id(), source })?;
            self.registered = index + 1;
        }
        Ok(())
    }

    /// The record of what is mapped, and how.
    pub fn stage2(&self) -> &Stage2 {
        &self.shared.pager.stage2
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.shared.pager.counters.now()
    }

    /// What went wrong last, once. Whatever it was is being tried again: nothing is lost by it but time.
    pub fn failure(&self) -> Option<FaultError> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// In what the record and the kernel disagree. Each block is looked at while no handler changes it; what the host
    /// itself is dropping at this moment may be mapped for a little longer than it is recorded.
    ///
    /// # Errors
    /// [`FaultError::Look`].
    pub fn check(&self) -> Result<Vec<Disagreement>, FaultError> {
        self.shared.pager.check()
    }

    /// What decides.
    pub fn policies(&self) -> &Policies {
        &self.shared.pager.policies
    }

    pub(super) fn pager(&self) -> &Pager<KernelUffd> {
        &self.shared.pager
    }

    /// In the order of the pager's.
    pub(super) fn slots(&self) -> &[WpSlot] {
        &self.shared.pager.kernel.slots
    }

    /// Whether pages are moved, and so cannot be installed protected.
    pub(super) fn moves(&self) -> bool {
        self.shared.pager.slots.iter().any(|slot| slot.origin == Origin::Staged)
    }

    /// Installs what is still missing of `ranges`, which are old then: nobody asked for them.
    ///
    /// # Errors
    /// [`FaultError::Fetch`], [`FaultError::Install`]. It can be called again.
    pub fn fill(&self, ranges: &[PageRange]) -> Result<(), FaultError> {
        let pager = &self.shared.pager;
        let mut worker = Worker::default();
        for range in ranges {
            let mut at = range.start;
            while at < range.end() {
                let next = Gfn((at.block() + 1) * LEAVES_PER_BLOCK);
                if let Some(index) = pager.slots.iter().position(|slot| slot.frames.contains(at)) {
                    pager.fill_block(&mut worker, index, at, |block| block.leaves(*range))?;
                }
                at = next;
            }
        }
        Ok(())
    }

    /// Installs everything that is still missing and would not be zero, so that the service can end while the guest
    /// runs. Its pages are old: nobody asked for them.
    ///
    /// # Errors
    /// [`FaultError::Fetch`], [`FaultError::Install`]. It can be called again.
    pub fn fill_rest(&self) -> Result<(), FaultError> {
        self.shared.fill_rest(&Mutex::new(Sweep::new(self.shared.blocks_of_sources())))
    }

    /// Lets everybody go on who sleeps, with pages of zeros, or of what a shared file has, where none are; from now on nothing
    /// is served. For a guest that does not run on.
    pub fn let_go(&self) {
        let kernel = &self.shared.pager.kernel;
        for slot in &kernel.slots {
            // What is not registered any more need not be unregistered.
            let _ = kernel.uffd.unregister(slot.slot().hva(), slot.slot().len());
        }
        self.shared.wake_all();
    }

    /// Ends the service. Whoever sleeps is woken; pages that are still missing read as zero, or as what a shared file
    /// has.
    ///
    /// # Errors
    /// [`FaultError::Register`]: what could not be unregistered is so when this returns, for the descriptor is closed.
    pub fn stop(mut self) -> Result<Counts, FaultError> {
        let outcome = self.release();
        let counts = self.counts();
        outcome.map(|()| counts)
    }

    /// In the order that leaves nobody asleep: who drops memory waits for a handler until the last moment.
    fn release(&mut self) -> Result<(), FaultError> {
        let mut outcome = Ok(());
        self.shared.ending.store(true, Ordering::Relaxed);
        let kernel = &self.shared.pager.kernel;
        for slot in &kernel.slots[..self.registered] {
            if let Err(source) = kernel.uffd.unregister(slot.slot().hva(), slot.slot().len()) {
                outcome = outcome.and(Err(FaultError::Register { id: slot.id(), source }));
            }
        }
        self.shared.wake_all();
        self.registered = 0;
        // An eventfd whose counter is not nearly full takes the write.
        let _ = self.stop.write(1);
        // A source that does not return keeps its handler, which has all that it needs and touches nothing any more.
        let deadline = Instant::now() + FOR_HANDLERS;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(AFTER_ERROR);
            }
            if thread.is_finished() {
                // It cannot have panicked.
                let _ = thread.join();
            }
        }
        outcome
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = self.release();
    }
}

/// Whether `slot` can be served from `source`.
fn check(slot: &WpSlot, source: &Source) -> Result<(), &'static str> {
    let misaligned = (slot.slot().hva() ^ slot.slot().gpa().0) & (BLOCK_SIZE - 1) != 0;
    match (slot.backing(), source) {
        (Backing::Hugetlb(PageSize::G1), _) => Err("pages of 1 GiB cannot be served: use pages of 2 MiB"),
        (Backing::Hugetlb(_), _) if misaligned => {
            Err("its huge pages are not at the same place in this process as in the guest, modulo 2 MiB")
        }
        (Backing::Hugetlb(_), Source::Shared) => Err("a shared source needs a memfd without hugetlb"),
        (Backing::Private, Source::Shared) => Err("a shared source needs a shared mapping of a memfd"),
        (Backing::Shared | Backing::Hugetlb(_), Source::Staged(_)) => {
            Err("pages can be moved into private anonymous memory only")
        }
        (Backing::Private, Source::Staged(staging))
            if (staging.pages() as u64) < slot.slot().frames().pages =>
        {
            Err("the staging memory is smaller than the slot")
        }
        _ => Ok(()),
    }
}

impl Shared {
    /// Serves until told to stop.
    fn handle(&self, stop: &EventFd) {
        let pager = &self.pager;
        let (mut worker, mut messages, mut faults) = (Worker::default(), Vec::new(), Vec::new());
        let mut lookout = Lookout::default();
        loop {
            match pager.kernel.uffd.wait(stop, &mut lookout) {
                Ok(Wait::Stopped) => return,
                Ok(Wait::Faults) => {}
                Err(error) => self.failed(FaultError::Read(error)),
            }
            if let Err(error) = self.listen(&mut worker, &mut messages) {
                self.failed(FaultError::Read(error));
                thread::sleep(AFTER_ERROR);
            }
            faults.extend(messages.drain(..).filter_map(|message| match message {
                Message::Fault { address, cause } => Some((address, cause)),
                _ => None,
            }));
            self.batch(&mut worker, &mut faults);
        }
    }

    /// Reads what there is to read, and records what is dropped: as long as that is not read the kernel refuses to fill
    /// anything, and it must be known before it is filled again.
    fn listen(&self, worker: &mut Worker, messages: &mut Vec<Message>) -> io::Result<()> {
        let _news = self.pager.news();
        let outcome = self.pager.kernel.uffd.messages(messages);
        for message in &*messages {
            let outcome = match message {
                Message::Fault { .. } => Ok(()),
                Message::Remove(range) | Message::Unmap(range) => self.pager.removed(worker, range.clone()),
                Message::Remap(range) => {
                    self.failed(FaultError::Moved { start: range.start, end: range.end });
                    self.pager.removed(worker, range.clone())
                }
            };
            outcome.unwrap_or_else(|error| self.failed(error));
        }
        outcome
    }

    fn batch(&self, worker: &mut Worker, faults: &mut Vec<(u64, Cause)>) {
        // Sleepers at the same page are woken together, so one message is enough.
        faults.sort_unstable();
        faults.dedup();
        // Given back even if a source panics.
        let mut waiting = self.pager.counters.waiting.hold(faults.len());
        for (address, cause) in faults.drain(..) {
            if let Err(error) = self.pager.serve(worker, address, cause) {
                self.failed(error);
                // Whoever sleeps looks again, and says again what it needs.
                thread::sleep(AFTER_ERROR);
                if let Some((index, gfn)) = self.pager.find(address) {
                    let page = (gfn.0 - self.pager.slots[index].frames.start.0) as usize;
                    self.pager.kernel.wake(index, page..page + 1);
                }
            }
            waiting.one_done();
        }
    }

    /// Brings in the working set, and then what nobody asks for. Just the `first` thread begins with the set at once; without
    /// one all of them let the guest begin.
    fn bring_ahead(&self, ahead: &Ahead, first: bool) {
        let is_in = || ahead.set.as_ref().is_some_and(|set| lock(set).is_done());
        if !first || ahead.set.is_none() {
            self.let_the_guest_begin(is_in);
        }
        // A source that fails or panics here is asked again by a handler, which reports it.
        if let Some(set) = &ahead.set {
            let _ = catch_unwind(AssertUnwindSafe(|| self.work_ahead(set)));
            if ahead.busy.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.cool_working_set();
            }
        }
        if let Some(rest) = &ahead.rest {
            let _ = catch_unwind(AssertUnwindSafe(|| self.fill_rest(rest)));
        }
    }

    /// Returns a moment after somebody has asked for a page, or when there is no need to wait. Before, a guest is being made
    /// that should start soon; and what it needs then to get on at all comes sooner, page by page, if nobody else wants
    /// processors.
    fn let_the_guest_begin(&self, no_need: impl Fn() -> bool) {
        let has_begun = || self.pager.counters.now().missing > 0 || self.ending.load(Ordering::Relaxed);
        while !has_begun() && !no_need() {
            thread::sleep(BEFORE_FILLING);
        }
        thread::sleep(ITS_FIRST_FAULTS);
    }

    /// Installs the blocks of the working set that `sweep` has, one by one.
    fn work_ahead(&self, sweep: &Mutex<Sweep>) {
        let pager = &self.pager;
        let mut worker = Worker::default();
        let wanted = |block: &Block<'_>| pager.working_set.leaves(block);
        while let Some((index, gfn)) = self.next_of(sweep) {
            let _claimed = pager.claim(index, gfn);
            match pager.fill_block(&mut worker, index, gfn, wanted) {
                // What is unregistered cannot be filled, and need not be.
                Err(_) if self.ending.load(Ordering::Relaxed) => return,
                outcome => outcome.unwrap_or_else(|error| self.failed(error)),
            }
        }
    }

    /// What was installed of the working set and is old looks unused to the host. Not before all of it is there: each of
    /// these calls holds up who runs on another processor.
    fn cool_working_set(&self) {
        let sweep = Mutex::new(Sweep::new(self.blocks_of_working_set()));
        while let Some((index, gfn)) = self.next_of(&sweep) {
            self.pager.cool_block(index, gfn);
        }
    }

    /// The blocks that have pages of the working set.
    fn blocks_of_working_set(&self) -> impl Iterator<Item = Part> + '_ {
        let slots = self.pager.slots.iter().enumerate();
        slots.flat_map(|(index, slot)| {
            let ranges = self.pager.working_set.ranges().iter();
            ranges.flat_map(move |range| {
                // A range may reach beyond the slot.
                let start = range.start.max(slot.frames.start);
                let end = range.end().min(slot.frames.end());
                blocks(start..end).map(move |block| (block, index))
            })
        })
    }

    /// The blocks that have pages which the kernel does not find by itself, in a file, and which are not just zeros.
    fn blocks_of_sources(&self) -> impl Iterator<Item = Part> + '_ {
        let slots = self.pager.slots.iter().enumerate();
        let slots = slots.filter(|(_, slot)| !matches!(slot.origin, Origin::Cache | Origin::Zero));
        slots.flat_map(|(index, slot)| {
            blocks(slot.frames.start..slot.frames.end()).map(move |block| (block, index))
        })
    }

    /// Installs what is missing of the blocks that `sweep` has. It ends with the service.
    fn fill_rest(&self, sweep: &Mutex<Sweep>) -> Result<(), FaultError> {
        let pager = &self.pager;
        let mut worker = Worker::default();
        while let Some((index, gfn)) = self.next_of(sweep) {
            if pager.counters.now().waiting > 0 {
                // A handler has to do. Not by a low priority: a block that is being filled is held, and whoever has it
                // must not have to wait for a processor.
                thread::yield_now();
            }
            let slot = &pager.slots[index];
            let wanted = slot.filled(gfn).map_err(|source| FaultError::Fetch { gfn, source })?;
            if !wanted.is_empty() {
                let _claimed = pager.claim(index, gfn);
                pager.fill_block(&mut worker, index, gfn, |_| wanted)?;
            }
        }
        Ok(())
    }

    /// The next block of `sweep`: its slot, and its first page there. `None` when the service ends, too.
    fn next_of(&self, sweep: &Mutex<Sweep>) -> Option<(usize, Gfn)> {
        if self.ending.load(Ordering::Relaxed) {
            return None;
        }
        let (block, index) = lock(sweep).next(self.pager.asked.load(Ordering::Relaxed))?;
        Some((index, Gfn(block * LEAVES_PER_BLOCK).max(self.pager.slots[index].frames.start)))
    }

    fn failed(&self, error: FaultError) {
        self.pager.counters.failures.add(1);
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn wake_all(&self) {
        for (index, slot) in self.pager.slots.iter().enumerate() {
            self.pager.kernel.wake(index, 0..slot.frames.pages as usize);
        }
    }
}

/// The numbers of the blocks that `frames` are in.
fn blocks(frames: Range<Gfn>) -> Range<u64> {
    match frames.is_empty() {
        true => 0..0,
        false => frames.start.block()..Gfn(frames.end.0 - 1).block() + 1,
    }
}

/// Whether a page cannot be moved at all, and not just because something is there already, or mappings change.
fn refused(error: i32) -> bool {
    !matches!(error, libc::EEXIST | libc::EAGAIN | libc::ENOENT | libc::ESRCH)
}

/// The kernel's own mechanism.
#[derive(Debug)]
pub(super) struct KernelUffd {
    uffd: Uffd,
    pagemap: Pagemap,
    slots: Vec<WpSlot>,
    staging: Vec<Option<Arc<Staging>>>,
}

impl KernelUffd {
    fn slot(&self, index: usize) -> &Slot {
        self.slots[index].slot()
    }

    fn addresses(&self, slot: usize, pages: &Range<usize>) -> Range<u64> {
        self.slots[slot].hva(pages.start)..self.slots[slot].hva(pages.end)
    }
}

impl Kernel for KernelUffd {
    fn fill(&self, slot: usize, pages: Range<usize>, with: Fill<'_>, protected: bool) -> Progress {
        let (slot, staging) = (self.slot(slot), &self.staging[slot]);
        match (with, staging) {
            (Fill::Bytes(from), _) => self.uffd.copy(slot, pages, from, protected),
            (Fill::Lent(lent, first), _) => match self.uffd.take(slot, pages.clone(), lent, first) {
                Progress { pages: 0, error: Some(error) } if refused(error) => {
                    let from = first * PAGE_BYTES..(first + pages.len()) * PAGE_BYTES;
                    self.uffd.copy(slot, pages, lent.bytes().get(from).unwrap_or_default(), protected)
                }
                progress => progress,
            },
            (Fill::ZeroPage, _) => self.uffd.zero(slot, pages),
            (Fill::Cache, _) => self.uffd.map_cached(slot, pages, protected),
            (Fill::Staged, Some(staging)) => self.uffd.take(slot, pages.clone(), staging, pages.start),
            (Fill::Staged, None) => Progress::REFUSED,
        }
    }

    fn open(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        self.uffd.open_pages(self.slot(slot), pages)
    }

    fn protect(&self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        let addresses = self.addresses(slot, &pages);
        self.uffd.protect(addresses.start, addresses.end - addresses.start)
    }

    fn wake(&self, slot: usize, pages: Range<usize>) {
        let addresses = self.addresses(slot, &pages);
        // It cannot fail for a range that is not empty.
        let _ = self.uffd.wake(addresses.start, addresses.end - addresses.start);
    }

    fn cold(&self, slot: usize, pages: Range<usize>) {
        cold(self.slot(slot), pages);
    }

    fn there(
        &self,
        slot: usize,
        pages: Range<usize>,
        take: &mut dyn FnMut(Range<usize>),
    ) -> Result<(), errno::Error> {
        let addresses = self.addresses(slot, &pages);
        let mut found = [Found::NOTHING; 32];
        let mut from = addresses.start;
        while from < addresses.end {
            let (runs, next) = self.pagemap.mapped(from, addresses.end, &mut found)?;
            let runs = found[..runs].iter().map(|run| self.slots[slot].pages_at(run.addresses()));
            runs.filter(|run| !run.is_empty()).for_each(&mut *take);
            if next <= from {
                return Err(errno::Error::new(libc::EPROTO));
            }
            from = next;
        }
        Ok(())
    }

    fn look(&self, slot: usize, pages: Range<usize>, leaf: usize) -> Result<Seen, errno::Error> {
        let addresses = self.addresses(slot, &pages);
        let mut found = [Found::NOTHING; 32];
        let mut seen = Seen::default();
        let mut from = addresses.start;
        while from < addresses.end {
            let (runs, next) = self.pagemap.mapped(from, addresses.end, &mut found)?;
            for run in found[..runs].iter().filter(|run| !run.is_swapped()) {
                let run_pages = self.slots[slot].pages_at(run.addresses());
                let at = |page: usize| (page.max(pages.start) - pages.start + leaf).min(leaf + pages.len());
                let leaves = Leaves::range(at(run_pages.start)..at(run_pages.end));
                seen.present |= leaves;
                if !run.is_written() {
                    seen.protected |= leaves;
                }
                if run.is_huge() {
                    seen.huge |= leaves;
                }
            }
            if next <= from {
                return Err(errno::Error::new(libc::EPROTO));
            }
            from = next;
        }
        Ok(seen)
    }
}
