//! The fault server on the real KVM of this host: which pages a guest touched, which it wrote, what it finds in them,
//! and what becomes of it when a source is slow, fails or never answers.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{BLOCK_SIZE, Gfn, PAGE_SIZE, PageRange};
use dirty_track::fault::{
    Age, Config, Counts, FaultError, FaultTracker, FileRegion, PageSource, Policies, Prefault, Server,
    Source, Split, Staging, Threshold, WorkingSet,
};
use dirty_track::sys::collapse::collapse;
use dirty_track::tracker::Tracker;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::backing::{ALL, Backed, Backing, SLOTS, memfd};
use crate::machine::{Machine, frames, in_rig, kvm, skip};

/// One test at a time borrows huge pages.
static POOL: Mutex<()> = Mutex::new(());

fn pool() -> MutexGuard<'static, ()> {
    POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A server of all slots, or `None` where the host cannot have one.
fn serve(test: &str, machine: &Machine, source: &Source, config: Config) -> Option<Server> {
    let slots = machine.slots.iter().map(|slot| (slot.clone(), source.clone())).collect();
    match Server::start(slots, config) {
        Ok(server) => Some(server),
        Err(error @ (FaultError::Userfaultfd(_) | FaultError::Look { .. } | FaultError::Pagemap(_))) => {
            skip(test, error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn config(policies: Policies) -> Config {
    Config { policies, ..Config::default() }
}

/// Record and kernel agree in all that matters.
fn check(server: &Server) {
    let found = server.check().unwrap();
    let harmful: Vec<_> = found.iter().filter(|found| found.what.is_harmful()).collect();
    assert!(harmful.is_empty(), "{harmful:?}");
}

/// What was counted once everybody who waited was served: they are awake a moment before that is counted.
fn counts(server: &Server) -> Counts {
    while server.counts().waiting > 0 {
        thread::yield_now();
    }
    server.counts()
}

/// What a source has in a page, all over it.
fn original(gfn: Gfn) -> u32 {
    (gfn.0 as u32).wrapping_mul(0x9e37_79b9) | 1
}

fn bytes_of(pages: PageRange) -> Vec<u8> {
    let page = |gfn: Gfn| original(gfn).to_le_bytes().repeat(PAGE_SIZE as usize / 4);
    pages.iter().flat_map(page).collect()
}

#[derive(Debug)]
struct Originals;

impl PageSource for Originals {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&bytes_of(pages));
        Ok(())
    }
}

/// `page` is what it was, but for what the guest has stored there if that was `stamped`.
fn assert_page(machine: &Machine, gfn: Gfn, was: u32, stamped: Option<u32>) {
    let mut page = vec![0; PAGE_SIZE as usize];
    machine.memory.read_slice(&mut page, GuestAddress(gfn.gpa().0)).unwrap();
    let words: BTreeSet<_> =
        page.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let expected: BTreeSet<_> = stamped.into_iter().chain([was]).collect();
    assert_eq!(words, expected, "page {gfn:?}");
}

/// Pages in windows of their own, in both slots.
fn scattered() -> Vec<Gfn> {
    (0..40)
        .map(|window| Gfn(0x400 + window * 16 + window * 7 % 16))
        .chain([Gfn(0x1000), Gfn(0x15ff)])
        .collect()
}

#[test]
fn a_working_set_is_exactly_what_was_touched_if_what_came_along_is_old() {
    let test = "fault::a_working_set_is_exactly_what_was_touched_if_what_came_along_is_old";
    let Some(kvm) = kvm(test) else { return };
    for backing in [Backing::Small, Backing::Thp, Backing::Memfd, Backing::HugeMemfd] {
        for (age, along) in [(Age::Old, 0), (Age::Young, 15)] {
            for write in [false, true] {
                let Some(mut backed) = backing.untouched(&kvm, test) else { continue };
                let Backed { machine, guest, .. } = &mut backed;
                let policies = Policies { age, ..Policies::default() };
                let Some(server) = serve(test, machine, &Source::Zero, config(policies)) else { return };
                let pages = scattered();
                match write {
                    true => guest.write(&pages, 7),
                    false => guest.read(&pages),
                }
                let touched = WorkingSet::touched(server.stage2());
                let k = pages.len() as u64;
                assert_eq!(touched.pages(), k * (1 + along), "{backing:?}, {age}, write: {write}");
                if age == Age::Old {
                    let listed: Vec<_> = touched.ranges().iter().flat_map(|range| range.iter()).collect();
                    assert_eq!(listed, pages);
                }
                let counted = counts(&server);
                assert_eq!((counted.installed, counted.prefaulted), (k * 16, k * 15));
                assert_eq!(counted.untouched(), if age == Age::Old { k * 15 } else { 0 });
                assert_eq!(counted.failures, 0);
                check(&server);
                // Writing to what came along is touching it, and is seen.
                let neighbour = Gfn(pages[3].0 ^ 1);
                guest.write(&[neighbour], 8);
                assert_eq!(counts(&server).hits, u64::from(age == Age::Old));
                assert_eq!(machine.stamp(neighbour), 8);
            }
        }
    }
}

#[test]
fn dirty_sets_over_prefaulted_pages_are_exact() {
    let test = "fault::dirty_sets_over_prefaulted_pages_are_exact";
    let Some(kvm) = kvm(test) else { return };
    let _pool = pool();
    for backing in ALL {
        for age in [Age::Old, Age::Young] {
            let Some(mut backed) = backing.untouched(&kvm, test) else { continue };
            let Backed { machine, guest, .. } = &mut backed;
            let policies = Policies { age, ..Policies::default() };
            let Some(server) = serve(test, machine, &Source::Zero, config(policies)) else { return };
            let server = Arc::new(server);
            let mut tracker = FaultTracker::new(Arc::clone(&server));
            let pages = scattered();
            guest.write(&pages[..5], 1);
            tracker.arm().unwrap();
            guest.read(&pages);
            let harvest = tracker.harvest().unwrap();
            assert_eq!(frames(&harvest), [], "{backing:?}, {age}: only read");
            harvest.commit();
            // Pages that are there, that came along, and that are not there.
            let written: Vec<_> = [0x400, 0x401, 0x40f, 0x417, 0x7ff, 0x1001, 0x1300, 0x15fe].map(Gfn).into();
            guest.write(&written, 2);
            let harvest = tracker.harvest().unwrap();
            let leaves = backing.page().leaves();
            let units: BTreeSet<_> = written.iter().map(|gfn| gfn.0 / leaves).collect();
            let expected: Vec<_> =
                units.into_iter().flat_map(|unit| unit * leaves..(unit + 1) * leaves).map(Gfn).collect();
            assert_eq!(frames(&harvest), expected, "{backing:?}, {age}");
            assert_eq!(harvest.coarse_count(), 0);
            harvest.commit();
            guest.read(&written);
            assert!(tracker.harvest().unwrap().is_empty());
            check(&server);
        }
    }
}

#[test]
fn coarse_pages_are_marked_as_such() {
    let test = "fault::coarse_pages_are_marked_as_such";
    let Some(kvm) = kvm(test) else { return };
    let adaptive = Split::Adaptive(Threshold::new(4).unwrap());
    for (split, before) in [(Split::Block, 0), (adaptive, 3)] {
        let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
        let policies = Policies { split, prefault: Prefault::Block, age: Age::Old };
        let Some(server) = serve(test, &machine, &Source::Zero, config(policies)) else { return };
        let server = Arc::new(server);
        let mut tracker = FaultTracker::new(Arc::clone(&server));
        tracker.arm().unwrap();
        guest.read(&[Gfn(0x400), Gfn(0x600)]);
        let first: Vec<_> = (0x410..0x410 + before).map(Gfn).collect();
        if !first.is_empty() {
            guest.write(&first, 1);
            let harvest = tracker.harvest().unwrap();
            assert_eq!((frames(&harvest), harvest.coarse_count()), (first.clone(), 0));
            // Dropped, not committed; and the next harvest has them again.
            drop(harvest);
            guest.write(&first, 1);
        }
        guest.write(&[Gfn(0x500)], 1);
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), (0x400..0x600).map(Gfn).collect::<Vec<_>>(), "{split}");
        assert_eq!(harvest.coarse_count(), 512 - 1 - before);
        assert!(!harvest.is_coarse(Gfn(0x500)) && harvest.is_coarse(Gfn(0x501)));
        assert_eq!(counts(&server).blocks_opened, 1);
        harvest.commit();
    }
}

#[test]
fn a_guest_finds_what_its_source_has() {
    let test = "fault::a_guest_finds_what_its_source_has";
    let Some(kvm) = kvm(test) else { return };
    let _pool = pool();
    for backing in ALL {
        for prefault in ["none", "around=64K", "block", "recorded"] {
            let Some(mut backed) = backing.untouched(&kvm, test) else { continue };
            let Backed { machine, guest, .. } = &mut backed;
            let policies = Policies { prefault: prefault.parse().unwrap(), ..Policies::default() };
            let working_set = WorkingSet::new([PageRange { start: Gfn(0x402), pages: 0x20 }]);
            let config = Config { policies, working_set, handlers: 2, ..Config::default() };
            let source = Source::Fetch(Arc::new(Originals));
            let Some(server) = serve(test, machine, &source, config) else { return };
            let pages = scattered();
            guest.write(&pages, 3);
            guest.read(&[Gfn(0x7fe), Gfn(0x1234)]);
            pages.iter().for_each(|gfn| assert_page(machine, *gfn, original(*gfn), Some(3)));
            for gfn in [0x7fe, 0x1234, 0x5ab] {
                assert_page(machine, Gfn(gfn), original(Gfn(gfn)), None);
            }
            // What is dropped reads as zero, whatever its source holds.
            let slot = &machine.slots[0];
            let start = slot.hva() as *mut libc::c_void;
            // SAFETY: the guest does not run, and what it had there is of no interest here.
            let dropped = unsafe { libc::madvise(start, 512 * PAGE_SIZE as usize, libc::MADV_REMOVE) };
            let private = matches!(backing, Backing::Small | Backing::Thp);
            assert_eq!(dropped, if private { -1 } else { 0 });
            if private {
                // SAFETY: as above.
                assert_eq!(unsafe { libc::madvise(start, 512 * PAGE_SIZE as usize, libc::MADV_DONTNEED) }, 0);
            }
            guest.read(&[Gfn(0x401), Gfn(0x5ff)]);
            for gfn in [0x400, 0x401, 0x5ab] {
                assert_page(machine, Gfn(gfn), 0, None);
            }
            guest.write(&[Gfn(0x400)], 4);
            assert_page(machine, Gfn(0x400), 0, Some(4));
            check(&server);
            server.fill_rest().unwrap();
            server.stop().unwrap();
            guest.read(&[Gfn(0x1567)]);
            assert_page(machine, Gfn(0x1567), original(Gfn(0x1567)), None);
            assert_page(machine, Gfn(0x401), 0, None);
        }
    }
}

#[test]
fn a_recorded_working_set_is_there_before_it_is_asked_for() {
    let test = "fault::a_recorded_working_set_is_there_before_it_is_asked_for";
    let Some(kvm) = kvm(test) else { return };
    for backing in [Backing::Small, Backing::Memfd] {
        let Some(mut backed) = backing.untouched(&kvm, test) else { continue };
        let Backed { machine, guest, .. } = &mut backed;
        let policies = Policies { prefault: Prefault::Recorded, ..Policies::default() };
        // It comes from a file, and may name what this guest does not have.
        let pages = scattered();
        let recorded = pages.iter().map(|&start| PageRange { start, pages: 1 });
        let beyond = PageRange { start: Gfn(SLOTS[1].0.0 + SLOTS[1].1 - 3), pages: 1 << 50 };
        let working_set = WorkingSet::new(recorded.chain([beyond]));
        let config = Config { policies, working_set, ahead: 3, ..Config::default() };
        let Some(server) = serve(test, machine, &Source::Fetch(Arc::new(Originals)), config) else { return };
        let all = pages.len() as u64 + 2;
        let patience = Instant::now() + Duration::from_secs(60);
        while server.counts().installed < all && Instant::now() < patience {
            thread::yield_now();
        }
        assert_eq!((server.counts().installed, server.counts().failures), (all, 0), "{backing:?}");
        guest.read(&pages);
        let counted = counts(&server);
        assert_eq!((counted.missing, counted.installed, counted.old), (0, all, all), "{backing:?}");
        // That they were read nobody saw; that they are written is seen.
        assert_eq!(WorkingSet::touched(server.stage2()).pages(), 0);
        guest.write(&pages[..5], 9);
        assert_eq!((WorkingSet::touched(server.stage2()).pages(), counts(&server).hits), (5, 5));
        for (index, gfn) in pages.iter().enumerate() {
            assert_page(machine, *gfn, original(*gfn), (index < 5).then_some(9));
        }
        check(&server);
    }
}

#[test]
fn a_file_and_a_shared_memfd_are_sources() {
    let test = "fault::a_file_and_a_shared_memfd_are_sources";
    let Some(kvm) = kvm(test) else { return };
    let slot = [SLOTS[0]];
    let range = PageRange { start: slot[0].0, pages: slot[0].1 };
    let filled = || {
        let mut file = memfd(0);
        file.write_all(&bytes_of(PageRange { pages: range.pages - 100, ..range })).unwrap();
        file
    };
    let from_file = Source::Fetch(Arc::new(FileRegion::new(filled(), 0, range.start)));
    for (source, file) in [(from_file, false), (Source::Shared, true)] {
        let (machine, mut guest) =
            Machine::over(&kvm, &slot, || if file { Some(filled()) } else { None::<File> });
        let Some(server) = serve(test, &machine, &source, Config::default()) else { return };
        let server = Arc::new(server);
        let mut tracker = FaultTracker::new(Arc::clone(&server));
        tracker.arm().unwrap();
        guest.read(&[Gfn(0x444), Gfn(0x7f0)]);
        guest.write(&[Gfn(0x446), Gfn(0x7f8)], 9);
        assert_page(&machine, Gfn(0x444), original(Gfn(0x444)), None);
        assert_page(&machine, Gfn(0x446), original(Gfn(0x446)), Some(9));
        // Behind the file's end.
        assert_page(&machine, Gfn(0x7f0), 0, None);
        assert_page(&machine, Gfn(0x7f8), 0, Some(9));
        assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x446), Gfn(0x7f8)], "from a file: {file}");
        let Counts { copies, continues, .. } = counts(&server);
        assert_eq!(continues > 0, file);
        assert!(copies > 0);
        check(&server);
    }
}

#[test]
fn a_huge_page_is_moved_as_one() {
    let test = "fault::a_huge_page_is_moved_as_one";
    let Some(kvm) = kvm(test) else { return };
    let Some(mut backed) = Backing::Thp.untouched(&kvm, test) else { return };
    let Backed { machine, guest, .. } = &mut backed;
    let slots: Result<Vec<_>, io::Error> = machine
        .slots
        .iter()
        .map(|slot| {
            let mut staging = Staging::new(slot.frames().pages as usize)?;
            staging.prepare_huge()?;
            staging.bytes().copy_from_slice(&bytes_of(slot.frames()));
            Ok((slot.clone(), Source::Staged(Arc::new(staging))))
        })
        .collect();
    let policies = Policies { prefault: Prefault::Block, ..Policies::default() };
    let server = match Server::start(slots.unwrap(), config(policies)) {
        Ok(server) => Arc::new(server),
        Err(error) => return skip(test, error),
    };
    let mut tracker = FaultTracker::new(Arc::clone(&server));
    tracker.arm().unwrap();
    assert!(tracker.guarantees().may_report_reads);
    guest.read(&[Gfn(0x433), Gfn(0x1234)]);
    guest.write(&[Gfn(0x655)], 5);
    for gfn in [0x433, 0x5ff, 0x1200] {
        assert_page(machine, Gfn(gfn), original(Gfn(gfn)), None);
    }
    assert_page(machine, Gfn(0x655), original(Gfn(0x655)), Some(5));
    let counted = counts(&server);
    assert_eq!((counted.moves, counted.installed), (3, 3 * 512));
    // Pages that are moved cannot be protected as they are: they are in the first harvest, marked.
    let harvest = tracker.harvest().unwrap();
    assert_eq!((harvest.count(), harvest.coarse_count()), (3 * 512, 3 * 512 - 1));
    harvest.commit();
    guest.write(&[Gfn(0x1201)], 6);
    assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x1201)]);
    check(&server);
}

#[test]
fn a_block_that_comes_whole_is_moved_unless_it_is_tracked() {
    let test = "fault::a_block_that_comes_whole_is_moved_unless_it_is_tracked";
    let Some(kvm) = kvm(test) else { return };
    let Some(mut backed) = Backing::Thp.untouched(&kvm, test) else { return };
    let Backed { machine, guest, .. } = &mut backed;
    let policies = Policies { prefault: Prefault::Block, age: Age::Young, ..Policies::default() };
    let config = Config { policies, huge: true, ..Config::default() };
    let Some(server) = serve(test, machine, &Source::Fetch(Arc::new(Originals)), config) else { return };
    let server = Arc::new(server);
    guest.read(&[Gfn(0x433)]);
    let counted = counts(&server);
    assert_eq!((counted.moves, counted.copies, counted.installed), (1, 0, 512));
    let mut tracker = FaultTracker::new(Arc::clone(&server));
    tracker.arm().unwrap();
    assert!(!tracker.guarantees().may_report_reads);
    guest.read(&[Gfn(0x1234)]);
    guest.write(&[Gfn(0x434), Gfn(0x1233)], 5);
    assert_eq!((counts(&server).moves, counts(&server).copies), (1, 1));
    assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x434), Gfn(0x1233)]);
    tracker.disarm().unwrap();
    // What nobody has faulted at is one huge page, where the host has one.
    server.fill_rest().unwrap();
    assert!(counts(&server).moves > 1);
    for gfn in machine.slots.iter().flat_map(|slot| slot.frames().iter()).step_by(37) {
        let stamped = [0x434, 0x1233].contains(&gfn.0).then_some(5);
        assert_page(machine, gfn, original(gfn), stamped);
    }
    assert_page(machine, Gfn(0x434), original(Gfn(0x434)), Some(5));
    assert_eq!(counts(&server).failures, 0);
    check(&server);
}

/// A source that answers when it is told to.
#[derive(Debug, Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    asked: AtomicU32,
    panics: AtomicBool,
    fails: AtomicBool,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait_for(&self, asked: u32) {
        while self.asked.load(Ordering::SeqCst) < asked {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl PageSource for Gate {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.panics.swap(false, Ordering::SeqCst) {
            panic!("a source that panics");
        }
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
        match self.fails.swap(false, Ordering::SeqCst) {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Originals.fetch(pages, into),
        }
    }
}

/// What is being brought in already is not fetched by a handler, too; if it cannot be had it is asked for anew.
#[test]
fn who_asks_for_what_is_on_its_way_gets_it() {
    let test = "fault::who_asks_for_what_is_on_its_way_gets_it";
    let Some(kvm) = kvm(test) else { return };
    for fails in [false, true] {
        let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
        let gate = Arc::new(Gate { fails: fails.into(), ..Gate::default() });
        let policies = Policies { prefault: Prefault::Recorded, ..Policies::default() };
        let working_set = WorkingSet::new([PageRange { start: Gfn(0x400), pages: 0x20 }]);
        let config = Config { policies, working_set, ..Config::default() };
        let Some(server) = serve(test, &machine, &Source::Fetch(gate.clone()), config) else { return };
        gate.wait_for(1);
        let (asked, finished, waiting) = thread::scope(|scope| {
            // A page that comes, and one of its block that does not.
            let writes = scope.spawn(|| guest.write(&[Gfn(0x410), Gfn(0x430)], 1));
            while server.counts().waiting == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            // As long as a fetch would take.
            thread::sleep(Duration::from_millis(20));
            let asked = gate.asked.load(Ordering::SeqCst);
            let so_far = (asked, writes.is_finished(), server.counts().waiting);
            gate.open();
            so_far
        });
        assert_eq!((asked, finished, waiting), (1, false, 1));
        let asked = if fails { 3 } else { 2 };
        assert_eq!(gate.asked.load(Ordering::SeqCst), asked, "fails: {fails}");
        assert_eq!((counts(&server).waiting, counts(&server).failures), (0, u64::from(fails)));
        for gfn in [0x410, 0x430] {
            assert_page(&machine, Gfn(gfn), original(Gfn(gfn)), Some(1));
        }
        check(&server);
    }
}

#[test]
fn a_slow_source_loses_nothing_and_holds_up_nobody_else() {
    let test = "fault::a_slow_source_loses_nothing_and_holds_up_nobody_else";
    let Some(kvm) = kvm(test) else { return };
    let (machine, mut guests) = Machine::with_vcpus(&kvm, &SLOTS, 2);
    let gate = Arc::new(Gate::default());
    let slots = vec![
        (machine.slots[0].clone(), Source::Fetch(gate.clone())),
        (machine.slots[1].clone(), Source::Fetch(Arc::new(Originals))),
    ];
    let Some(server) = start(test, slots, Config { handlers: 2, ..Config::default() }) else { return };
    let server = Arc::new(server);
    let mut tracker = FaultTracker::new(Arc::clone(&server));
    tracker.arm().unwrap();
    let (mut other, mut guest) = (guests.pop().unwrap(), guests.pop().unwrap());
    thread::scope(|scope| {
        let waits = scope.spawn(|| guest.write(&[Gfn(0x400), Gfn(0x510)], 1));
        gate.wait_for(1);
        assert_eq!(server.counts().waiting, 1);
        // Neither another page, nor a harvest, nor who drops memory waits for it.
        other.write(&[Gfn(0x1000), Gfn(0x1234)], 2);
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), [Gfn(0x1000), Gfn(0x1234)]);
        harvest.commit();
        let start = (machine.slots[1].hva() + 0x400 * PAGE_SIZE) as *mut libc::c_void;
        // SAFETY: nobody uses that memory now.
        assert_eq!(unsafe { libc::madvise(start, PAGE_SIZE as usize, libc::MADV_DONTNEED) }, 0);
        assert!(!waits.is_finished());
        gate.open();
    });
    assert_page(&machine, Gfn(0x510), original(Gfn(0x510)), Some(1));
    let harvest = tracker.harvest().unwrap();
    assert_eq!(frames(&harvest), [Gfn(0x400), Gfn(0x510), Gfn(0x1400)]);
}

fn start(test: &str, slots: Vec<(dirty_track::tracker::Slot, Source)>, config: Config) -> Option<Server> {
    Server::start(slots, config).inspect_err(|error| skip(test, error)).ok()
}

#[test]
fn a_source_that_fails_or_panics_is_asked_again_and_reported() {
    let test = "fault::a_source_that_fails_or_panics_is_asked_again_and_reported";
    let Some(kvm) = kvm(test) else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let gate = Arc::new(Gate { panics: true.into(), open: true.into(), ..Gate::default() });
    let Some(server) = serve(test, &machine, &Source::Fetch(gate), Config::default()) else { return };
    guest.write(&[Gfn(0x400)], 1);
    let failure = server.failure();
    assert!(
        matches!(&failure, Some(FaultError::Panicked(why)) if why == "a source that panics"),
        "{failure:?}"
    );
    assert!(server.failure().is_none());
    assert_eq!(counts(&server).failures, 1);
    assert_page(&machine, Gfn(0x400), original(Gfn(0x400)), Some(1));

    /// Fails a few times for each page.
    #[derive(Debug, Default)]
    struct Fails(AtomicU32);
    impl PageSource for Fails {
        fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
            match self.0.fetch_add(1, Ordering::SeqCst) % 5 {
                4 => Originals.fetch(pages, into),
                _ => Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
    }
    drop(server);
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let source = Source::Fetch(Arc::new(Fails::default()));
    let Some(server) = serve(test, &machine, &source, Config::default()) else { return };
    guest.write(&[Gfn(0x400), Gfn(0x1000)], 2);
    assert_page(&machine, Gfn(0x1000), original(Gfn(0x1000)), Some(2));
    assert!(matches!(server.failure(), Some(FaultError::Fetch { gfn: Gfn(0x400 | 0x1000), .. })));
    assert!(counts(&server).failures > 0);
    check(&server);
}

#[test]
fn the_end_comes_even_while_a_guest_waits_and_a_source_never_answers() {
    let test = "fault::the_end_comes_even_while_a_guest_waits_and_a_source_never_answers";
    let Some(kvm) = kvm(test) else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let gate = Arc::new(Gate::default());
    let Some(server) = serve(test, &machine, &Source::Fetch(gate.clone()), Config::default()) else { return };
    thread::scope(|scope| {
        let waits = scope.spawn(|| guest.write(&[Gfn(0x400)], 1));
        gate.wait_for(1);
        let counted = server.stop().unwrap();
        assert_eq!((counted.missing, counted.installed), (1, 0));
        waits.join().unwrap();
    });
    // Nobody had anything else to give.
    assert_page(&machine, Gfn(0x400), 0, Some(1));
    // The handler comes back late, to memory that is not its own any more.
    gate.open();
    gate.wait_for(1);
    assert_page(&machine, Gfn(0x400), 0, Some(1));
}

/// Two vCPUs write, each page has one writer; a harvester copies what it is told; a third thread drops blocks. In the
/// end the copy is memory.
/// So often is memory dropped, and are blocks collapsed, in each round of a vCPU. A fault in memory that was just dropped
/// can take longer than it stays dropped (Linux frees the page table since 6.14, and with transparent huge pages the
/// next fault clears 2 MiB before a userfaultfd hears of it): without a bound a slow guest would never get on.
const DISTURBANCES: u32 = 64;

fn race(test: &str, kvm: &Kvm, policies: Policies, rounds: u32) {
    let (machine, mut guests) = Machine::with_vcpus(kvm, &SLOTS, 2);
    if policies.split != Split::Leaf {
        for slot in &machine.slots {
            // SAFETY: the advice changes no contents.
            unsafe { libc::madvise(slot.hva() as *mut _, slot.len() as usize, libc::MADV_HUGEPAGE) };
        }
    }
    let source = Source::Fetch(Arc::new(Originals));
    let config = Config { policies, handlers: 2, ..Config::default() };
    let Some(server) = serve(test, &machine, &source, config) else { return };
    let server = Arc::new(server);
    let mut tracker = FaultTracker::new(Arc::clone(&server));
    let (mut other, mut guest) = (guests.pop().unwrap(), guests.pop().unwrap());
    let (begun, done) = (AtomicU32::new(0), AtomicU32::new(0));
    // Calls `disturb` over and over, as often as the vCPUs' rounds allow.
    let disturb = |pause: Duration, disturb: &dyn Fn(u32)| {
        let mut times = 0;
        while done.load(Ordering::SeqCst) < 2 {
            if times < begun.load(Ordering::SeqCst) * DISTURBANCES {
                disturb(times);
                times += 1;
            }
            thread::sleep(pause);
        }
    };
    let drop_block = || {
        let start = (machine.slots[1].hva() + 0x200 * PAGE_SIZE) as *mut libc::c_void;
        // SAFETY: the guest's contents there are of no interest.
        assert_eq!(unsafe { libc::madvise(start, 0x200 * PAGE_SIZE as usize, libc::MADV_DONTNEED) }, 0);
    };
    drop_block();
    // What nobody but the guest touches; the rest is dropped all the time.
    let kept = |gfn: &Gfn| !(0x1200..0x1400).contains(&gfn.0);
    let mut copy: Vec<_> = machine.stamps().into_iter().filter(|(gfn, _)| kept(gfn)).collect();
    tracker.arm().unwrap();
    for (gfn, stamp) in &mut copy {
        *stamp = machine.stamp(*gfn);
    }
    thread::scope(|scope| {
        for (vcpu, guest) in [(0, &mut guest), (1, &mut other)] {
            let (begun, done) = (&begun, &done);
            scope.spawn(move || {
                for round in 1..=rounds {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let pages: Vec<_> = SLOTS
                        .iter()
                        .flat_map(|&(first, pages)| first.0..first.0 + pages)
                        .filter(|gfn| {
                            gfn % 2 == vcpu && gfn.wrapping_mul(0x9e37_79b9) >> 7 & 7 == u64::from(round & 7)
                        })
                        .map(Gfn)
                        .collect();
                    guest.write(&pages, round * 2 + vcpu as u32);
                    guest.read(&pages);
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        let drops = scope.spawn(|| disturb(Duration::from_micros(300), &|_| drop_block()));
        // As khugepaged does. The kernel refuses a block with protected pages.
        let collapses = scope.spawn(|| {
            disturb(Duration::from_micros(700), &|times| {
                for slot in &machine.slots {
                    let _ = collapse(slot, u64::from(times) * BLOCK_SIZE % slot.len());
                }
            });
        });
        let mut harvests = 0u32;
        loop {
            let last = done.load(Ordering::SeqCst) == 2;
            let harvest = tracker.harvest().unwrap();
            harvests += 1;
            for gfn in frames(&harvest).into_iter().filter(kept) {
                let at = copy.binary_search_by_key(&gfn, |(gfn, _)| *gfn).unwrap();
                copy[at].1 = machine.stamp(gfn);
            }
            if !harvests.is_multiple_of(3) || last {
                harvest.commit();
            }
            if harvests.is_multiple_of(5) {
                check_running(&server);
            }
            if last {
                break;
            }
        }
        drops.join().unwrap();
        collapses.join().unwrap();
    });
    let now: Vec<_> = machine.stamps().into_iter().filter(|(gfn, _)| kept(gfn)).collect();
    assert_eq!(copy, now);
    // What the source has never comes back to where it was dropped.
    for gfn in (0x1200..0x1400).map(Gfn) {
        assert_page(&machine, gfn, 0, Some(machine.stamp(gfn)));
    }
    let counted = counts(&server);
    assert_eq!((counted.failures, counted.strange), (0, 0), "{:?}", server.failure());
    check(&server);
}

/// What is being dropped is known before it is gone, so only there may the kernel have more than the record.
fn check_running(server: &Server) {
    let dropped = PageRange { start: Gfn(0x1200), pages: 0x200 };
    let found = server.check().unwrap();
    let harmful = found.iter().find(|found| found.what.is_harmful() && !dropped.contains(found.pages.start));
    assert_eq!(harmful, None);
}

#[test]
fn writers_harvests_drops_and_collapses_at_once_lose_nothing() {
    let test = "fault::writers_harvests_drops_and_collapses_at_once_lose_nothing";
    let Some(kvm) = kvm(test) else { return };
    let rounds = if in_rig() { 4 } else { 16 };
    // A soak of as many minutes takes this many times as long.
    let soak = std::env::var("SOAK").ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(1);
    let adaptive = Split::Adaptive(Threshold::new(40).unwrap());
    for (split, prefault, age) in [
        (Split::Leaf, Prefault::default(), Age::Old),
        (Split::Block, Prefault::Block, Age::Young),
        (adaptive, Prefault::None, Age::Old),
    ] {
        race(test, &kvm, Policies { split, prefault, age }, rounds * soak);
    }
}
