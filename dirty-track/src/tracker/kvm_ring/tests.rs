//! The policy against a model: rings as KVM has them, with guest writes that interleave at every step, and
//! resets that fail or stop early when told to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;

use super::*;
use crate::addr::{Gfn, PAGE_SIZE};
use crate::tracker::dirty_log::Logging;
use crate::tracker::sim::{Extent, Layout, Page, Wish, check_change, wishes};

/// (vCPU, page)
type Write = (usize, Page);

const CPUS: usize = 3;
/// Entries of a ring, and how many are in use when it counts as full.
const ENTRIES: usize = 16;
const SOFT_LIMIT: usize = 12;
/// Slots with numbers that are not their indexes, not in order, and with an address space in the high half.
const LAYOUT: Layout = Layout { ids: &[0x1_0007, 3, 0x1_0003], sizes: &[70, 1000, 1] };
const SIZES: &[usize] = LAYOUT.sizes;

fn base(index: usize) -> u64 {
    LAYOUT.base(index)
}

fn id(index: usize) -> u32 {
    LAYOUT.ids[index]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Flag {
    Free,
    Dirty,
    Reset,
}

/// One vCPU's ring.
#[derive(Debug)]
struct SimRing {
    entries: [(Flag, DirtyEntry); ENTRIES],
    /// KVM's end, and KVM's beginning.
    dirty: usize,
    reset: usize,
    /// The reader's.
    next: usize,
}

impl SimRing {
    fn new() -> SimRing {
        let free = (Flag::Free, DirtyEntry { slot: u32::MAX, page: u64::MAX });
        SimRing { entries: [free; ENTRIES], dirty: 0, reset: 0, next: 0 }
    }

    fn is_full(&self) -> bool {
        self.dirty - self.reset >= SOFT_LIMIT
    }

    fn push(&mut self, entry: DirtyEntry) {
        assert!(self.dirty - self.reset < ENTRIES, "an entry was overwritten");
        self.entries[self.dirty % ENTRIES] = (Flag::Dirty, entry);
        self.dirty += 1;
    }
}

/// One slot as KVM and the hardware hold it.
#[derive(Debug)]
struct SimSlot {
    /// Bumped by each write.
    contents: Vec<u32>,
    logging: bool,
    /// The page can be written without a fault, so without an entry.
    writable: Vec<bool>,
}

#[derive(Debug)]
struct Sim {
    slots: Vec<SimSlot>,
    rings: Vec<SimRing>,
    prepared: bool,
    /// Guest writes that race: one happens before each call.
    racing: VecDeque<Write>,
    /// Calls of the kernel until one fails.
    fails_in: Option<usize>,
    /// Entries after which a reset stops early; one number for each reset to come.
    short: VecDeque<usize>,
    /// One has, with something done.
    cut_short: bool,
    /// Every page written since it was last emptied, and by whom.
    written: BTreeMap<Page, BTreeSet<usize>>,
}

impl Sim {
    /// False when the vCPU cannot go on because its ring is full.
    fn write(&mut self, (vcpu, (slot, page)): Write) -> bool {
        let (ring, sim) = (&mut self.rings[vcpu], &mut self.slots[slot]);
        if ring.is_full() {
            return false;
        }
        sim.contents[page] += 1;
        if sim.logging && !sim.writable[page] {
            sim.writable[page] = true;
            let entry = DirtyEntry { slot: id(slot), page: page as u64 };
            ring.push(entry);
            // Whoever tries again after a full ring can be logged twice.
            if sim.contents[page].is_multiple_of(3) {
                ring.push(entry);
            }
        }
        self.written.entry((slot, page)).or_default().insert(vcpu);
        true
    }

    fn race(&mut self) {
        if let Some(write) = self.racing.pop_front() {
            // One that its ring does not let go on has not happened.
            self.write(write);
        }
    }

    fn call(&mut self) -> Result<(), errno::Error> {
        self.race();
        match &mut self.fails_in {
            Some(0) => {
                self.fails_in = None;
                Err(errno::Error::new(libc::ENOMEM))
            }
            Some(calls) => {
                *calls -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug)]
struct Shared(Arc<Mutex<Sim>>);

impl Rings for Shared {
    fn vcpus(&self) -> usize {
        CPUS
    }

    fn entries(&self) -> u32 {
        ENTRIES as u32
    }

    fn holds(&self, vcpu: usize, entries: u32) -> bool {
        let ring = &self.0.lock().unwrap().rings[vcpu];
        ring.entries[(ring.next + entries as usize - 1) % ENTRIES].0 == Flag::Dirty
    }

    fn take(&mut self, vcpu: usize) -> Option<DirtyEntry> {
        let mut sim = self.0.lock().unwrap();
        sim.race();
        let ring = &mut sim.rings[vcpu];
        let (flag, entry) = &mut ring.entries[ring.next % ENTRIES];
        if *flag != Flag::Dirty {
            return None;
        }
        *flag = Flag::Reset;
        ring.next += 1;
        Some(*entry)
    }

    fn reset(&mut self) -> Result<u32, errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let most = sim.short.pop_front().unwrap_or(usize::MAX);
        let sim = &mut *sim;
        let mut count = 0;
        let mut protected: Vec<DirtyEntry> = Vec::new();
        for ring in &mut sim.rings {
            while ring.entries[ring.reset % ENTRIES].0 == Flag::Reset {
                if count == most {
                    // What was not protected yet because more might have come along is forgotten.
                    protected.truncate(protected.len().saturating_sub(2));
                    sim.cut_short |= count > 0;
                    break;
                }
                let (flag, entry) = &mut ring.entries[ring.reset % ENTRIES];
                *flag = Flag::Free;
                protected.push(*entry);
                ring.reset += 1;
                count += 1;
            }
        }
        for entry in protected {
            let slot = (0..SIZES.len()).find(|&slot| id(slot) == entry.slot);
            let slot = slot.map(|slot| &mut sim.slots[slot]).filter(|slot| slot.logging);
            if let Some(writable) = slot.and_then(|slot| slot.writable.get_mut(entry.page as usize)) {
                *writable = false;
            }
        }
        Ok(count as u32)
    }
}

impl Logging for Shared {
    fn prepare(&mut self) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        sim.prepared = true;
        Ok(())
    }

    fn set_logging(&mut self, slot: &Slot, on: bool) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        assert!(sim.prepared || !on, "logging was turned on in an unknown mode");
        let slot = &mut sim.slots[LAYOUT.index(slot)];
        if on != slot.logging {
            slot.writable.fill(!on);
        }
        slot.logging = on;
        Ok(())
    }
}

struct Bench {
    shared: Shared,
    slots: Vec<Slot>,
    collector: Collector<Shared>,
    tracker: Ringed<Shared>,
}

impl Bench {
    fn new() -> Bench {
        let slots = LAYOUT.slots();
        let slot = |&pages: &usize| SimSlot {
            contents: vec![0; pages],
            logging: false,
            writable: vec![true; pages],
        };
        let shared = Shared(Arc::new(Mutex::new(Sim {
            slots: SIZES.iter().map(slot).collect(),
            rings: (0..CPUS).map(|_| SimRing::new()).collect(),
            prepared: false,
            racing: VecDeque::new(),
            fails_in: None,
            short: VecDeque::new(),
            cut_short: false,
            written: BTreeMap::new(),
        })));
        Bench {
            collector: Collector::new(shared.clone()),
            tracker: Ringed::new(shared.clone(), slots.clone()),
            slots,
            shared,
        }
    }

    fn sim(&self) -> std::sync::MutexGuard<'_, Sim> {
        self.shared.0.lock().unwrap()
    }

    /// A write as a vCPU's thread makes it: when the ring is full, room is made.
    fn write(&mut self, write: Write) {
        if !self.sim().write(write) {
            self.collector.serve_full(write.0).unwrap();
            assert!(self.sim().write(write), "a vCPU was served and cannot go on");
        }
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        self.tracker.collect(&mut self.collector)?;
        Ok(self.tracker.hand_out())
    }

    fn contents(&self) -> Vec<Vec<u32>> {
        self.sim().slots.iter().map(|slot| slot.contents.clone()).collect()
    }
}

/// What a harvest reports, what of it is said to be the host's, and by whom the rest was written.
fn pages(harvest: &Harvest<'_>) -> (BTreeSet<Page>, BTreeSet<Page>, BTreeSet<Write>) {
    let (all, host) = (LAYOUT.pages(harvest.runs()), LAYOUT.pages(harvest.host_runs()));
    let mut by = BTreeSet::new();
    for vcpu in 0..harvest.vcpus() {
        let before = by.len();
        by.extend(LAYOUT.pages(harvest.written_by(vcpu)).into_iter().map(|page| (vcpu, page)));
        assert_eq!(harvest.count_by(vcpu), (by.len() - before) as u64);
    }
    assert_eq!(harvest.count(), all.len() as u64);
    (all, host, by)
}

#[derive(Clone, Debug)]
enum Op {
    Write(Write),
    HostWrite(Page),
    /// The reaper, or a vCPU that came out: both with writes racing, and with a reset that fails or stops early.
    Empty {
        full: Option<usize>,
        racing: Vec<Write>,
        fails_in: Option<usize>,
        short: Vec<usize>,
    },
    Harvest {
        racing: Vec<Write>,
        fails_in: Option<usize>,
        short: Vec<usize>,
        commit: bool,
    },
    /// Other slots, or other pages of them.
    SetSlots {
        wish: Vec<Wish>,
        racing: Vec<Write>,
        fails_in: Option<usize>,
        short: Vec<usize>,
    },
    /// Disarm and arm again, with writes in between, after and before.
    Rearm {
        racing: Vec<Write>,
        fails_in: Option<usize>,
        short: Vec<usize>,
    },
}

fn page() -> impl Strategy<Value = Page> {
    // Few pages, so that they are written again and again, and those at the ends of words and slots.
    prop_oneof![
        prop::sample::select(vec![0, 1, 63, 64, 69]).prop_map(|page| (0, page)),
        (0..20usize).prop_map(|page| (1, page)),
        prop::sample::select(vec![62, 63, 64, 500, 999]).prop_map(|page| (1, page)),
        Just((2, 0)),
    ]
}

fn write() -> impl Strategy<Value = Write> {
    (0..CPUS, page())
}

fn op() -> impl Strategy<Value = Op> {
    let racing = || prop::collection::vec(write(), 0..20);
    let short = || prop::collection::vec(0..6usize, 0..4);
    let fails_in = |most: Range<usize>| prop::option::weighted(0.3, most);
    prop_oneof![
        24 => write().prop_map(Op::Write),
        2 => page().prop_map(Op::HostWrite),
        2 => (prop::option::of(0..CPUS), racing(), fails_in(0..2), short())
            .prop_map(|(full, racing, fails_in, short)| Op::Empty { full, racing, fails_in, short }),
        4 => (racing(), fails_in(0..2), short(), any::<bool>())
            .prop_map(|(racing, fails_in, short, commit)| Op::Harvest { racing, fails_in, short, commit }),
        1 => (racing(), fails_in(0..8), short())
            .prop_map(|(racing, fails_in, short)| Op::Rearm { racing, fails_in, short }),
        3 => (wishes(SIZES.len()), racing(), fails_in(0..5), short())
            .prop_map(|(wish, racing, fails_in, short)| Op::SetSlots { wish, racing, fails_in, short }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, ..ProptestConfig::default() })]

    /// Whatever races, fails, stops early or is dropped: each page written since the last committed harvest
    /// returned is reported, none is that was not written since it began, each for a vCPU that wrote it, and
    /// who copies what was reported ends with the guest's memory.
    #[test]
    fn harvests_are_exact_and_lose_nothing(ops in prop::collection::vec(op(), 1..120)) {
        let mut bench = Bench::new();
        bench.tracker.arm(&mut bench.collector).unwrap();
        let mut copy = bench.contents();
        // Written since the last committed harvest began, and since it returned.
        let (mut may, mut must) = (BTreeMap::<Page, BTreeSet<usize>>::new(), BTreeSet::new());
        let mut host = BTreeSet::new();
        // What is tracked; and what is since a change, and may be reported once for what was before.
        let (mut tracked, mut fresh) = (LAYOUT.tracked(&bench.slots), Extent::default());
        let add = |may: &mut BTreeMap<Page, BTreeSet<usize>>, written: BTreeMap<Page, BTreeSet<usize>>| {
            for (page, by) in written {
                may.entry(page).or_default().extend(by);
            }
        };

        // In the end everything is harvested once more, in peace.
        let end = Op::Harvest { racing: Vec::new(), fails_in: None, short: Vec::new(), commit: true };
        for op in ops.into_iter().chain([end]) {
            match op {
                Op::Write(write) => bench.write(write),
                Op::HostWrite((slot, page)) => {
                    // Past the ring: the host's mapping is not write-protected.
                    bench.sim().slots[slot].contents[page] += 1;
                    bench.slots[slot].host_writes().mark_dirty(page * PAGE_SIZE as usize + 9, 1);
                    if tracked.has((slot, page)) {
                        host.insert((slot, page));
                    }
                }
                Op::Empty { full, racing, fails_in, short } => {
                    bench.sim().racing = racing.into();
                    bench.sim().fails_in = fails_in;
                    bench.sim().short = short.into();
                    let outcome = match full {
                        Some(vcpu) => bench.collector.serve_full(vcpu),
                        None => bench.collector.relieve(),
                    };
                    let failed = fails_in.is_some() && bench.sim().fails_in.is_none();
                    prop_assert_eq!(outcome.is_err(), failed);
                    bench.sim().racing.clear();
                    bench.sim().fails_in = None;
                    bench.sim().short.clear();
                }
                Op::Harvest { racing, fails_in, short, commit } => {
                    let before = std::mem::take(&mut bench.sim().written);
                    must.extend(before.keys().copied().filter(|&page| tracked.has(page)));
                    add(&mut may, before);
                    bench.sim().racing = racing.into();
                    bench.sim().fails_in = fails_in;
                    bench.sim().short = short.into();
                    let shared = bench.shared.clone();
                    let sim = || shared.0.lock().unwrap();
                    let harvest = bench.harvest();
                    let failed = fails_in.is_some() && sim().fails_in.is_none();
                    prop_assert_eq!(harvest.is_err(), failed);
                    sim().fails_in = None;
                    sim().short.clear();
                    let raced = std::mem::take(&mut sim().written);
                    add(&mut may, raced.clone());
                    // Writes that did not fit in race with the copying.
                    let late = std::mem::take(&mut sim().racing);
                    let Ok(harvest) = harvest else {
                        must.extend(raced.into_keys().filter(|&page| tracked.has(page)));
                        late.into_iter().for_each(|write| bench.write(write));
                        continue;
                    };
                    let (reported, from_host, by) = pages(&harvest);
                    let missed: Vec<_> = must.difference(&reported).collect();
                    prop_assert!(missed.is_empty(), "missed {:?}", missed);
                    prop_assert!(reported.iter().all(|&page| tracked.has(page)), "not asked for");
                    let coarse = LAYOUT.pages(harvest.coarse_runs());
                    prop_assert!(coarse.is_empty() || sim().cut_short);
                    let known = |page: &Page| {
                        may.contains_key(page)
                            || host.contains(page)
                            || coarse.contains(page)
                            || fresh.has(*page)
                    };
                    prop_assert!(reported.iter().all(known), "extra in {:?}", reported);
                    prop_assert!(from_host.is_superset(&host));
                    prop_assert!(from_host.iter().all(|&page| host.contains(&page) || fresh.has(page)));
                    for (vcpu, page) in &by {
                        prop_assert!(may.get(page).is_some_and(|by| by.contains(vcpu)), "{} {:?}", vcpu, page);
                    }
                    // Who wrote a page without an entry is not known.
                    let nobodys = |page: &&Page| {
                        !sim().cut_short && !(0..CPUS).any(|vcpu| by.contains(&(vcpu, **page)))
                    };
                    let unattributed: Vec<_> = must.iter().filter(nobodys).collect();
                    prop_assert!(unattributed.is_empty(), "written by nobody: {:?}", unattributed);
                    late.iter().for_each(|&write| {
                        sim().write(write);
                    });
                    if commit {
                        for (slot, page) in reported {
                            copy[slot][page] = sim().slots[slot].contents[page];
                        }
                        harvest.commit();
                        host.clear();
                        must.clear();
                        // What raced may have been in time for this harvest, or not.
                        may = raced;
                        fresh = Extent::default();
                    } else {
                        drop(harvest);
                        must.extend(raced.into_keys().filter(|&page| tracked.has(page)));
                    }
                }
                Op::SetSlots { wish, racing, fails_in, short } => {
                    let before = std::mem::take(&mut bench.sim().written);
                    must.extend(before.keys().copied());
                    add(&mut may, before);
                    bench.sim().racing = racing.into();
                    bench.sim().fails_in = fails_in;
                    bench.sim().short = short.into();
                    let wished = LAYOUT.wished(&bench.slots, &wish);
                    let outcome = bench.tracker.set_slots(&mut bench.collector, wished.clone());
                    bench.sim().fails_in = None;
                    bench.sim().short.clear();
                    bench.sim().racing.clear();
                    let now = LAYOUT.tracked(bench.tracker.slots());
                    check_change(&outcome, &tracked, &LAYOUT.tracked(&wished), &now)?;
                    let raced = std::mem::take(&mut bench.sim().written);
                    must.extend(raced.keys().copied());
                    add(&mut may, raced);
                    must.retain(|&page| tracked.has(page) && now.has(page));
                    host.retain(|&page| tracked.has(page) && now.has(page));
                    // A copy is made of what is new.
                    for (slot, run) in now.minus(&tracked).0 {
                        copy[slot][run.clone()].copy_from_slice(&bench.sim().slots[slot].contents[run.clone()]);
                        fresh.0.push((slot, run));
                    }
                    tracked = now;
                }
                Op::Rearm { racing, fails_in, short } => {
                    bench.tracker.disarm(&mut bench.collector).unwrap();
                    bench.sim().cut_short = false;
                    bench.sim().racing = racing.into();
                    bench.sim().fails_in = fails_in;
                    bench.sim().short = short.into();
                    if bench.tracker.arm(&mut bench.collector).is_err() {
                        let left_on = bench.sim().slots.iter().any(|slot| slot.logging);
                        prop_assert!(!left_on, "left on after a failure");
                        bench.sim().fails_in = None;
                        bench.tracker.arm(&mut bench.collector).unwrap();
                    }
                    bench.sim().fails_in = None;
                    bench.sim().short.clear();
                    bench.sim().racing.clear();
                    // Nothing from before is owed, but what raced may be reported.
                    may = std::mem::take(&mut bench.sim().written);
                    must.clear();
                    host.clear();
                    copy = bench.contents();
                }
            }
        }
        let late = std::mem::take(&mut bench.sim().written);
        prop_assert!(late.is_empty());
        for (slot, run) in tracked.0 {
            prop_assert_eq!(&copy[slot][run.clone()], &bench.sim().slots[slot].contents[run]);
        }
    }
}

#[test]
fn the_reaper_leaves_rings_alone_that_are_not_filling() {
    let filling = collect::filling(ENTRIES as u32) as usize;
    assert!(1 < filling && filling < SOFT_LIMIT);
    let mut bench = Bench::new();
    bench.tracker.arm(&mut bench.collector).unwrap();
    for page in 0..filling - 1 {
        bench.write((0, (1, page)));
        bench.write((1, (1, 100 + page)));
    }
    bench.collector.relieve().unwrap();
    assert_eq!(bench.sim().rings[0].next, 0);
    bench.write((0, (1, 50)));
    bench.collector.relieve().unwrap();
    let next = |vcpu: usize| bench.sim().rings[vcpu].next;
    assert_eq!((next(0), next(1)), (filling, 0));
    assert_eq!(bench.sim().rings[0].reset, filling);
}

/// Nothing is handed out before all that was read is protected again; and when KVM never gets there, that is an
/// error and no endless loop.
#[test]
fn a_reset_that_does_not_get_on_is_an_error() {
    let mut bench = Bench::new();
    bench.tracker.arm(&mut bench.collector).unwrap();
    for page in 0..5 {
        bench.write((0, (1, page)));
    }
    bench.sim().short = VecDeque::from(vec![0; 10_000]);
    match bench.harvest() {
        Err(TrackerError::ResetRings { left: 5, source }) => assert_eq!(source.errno(), libc::EINTR),
        other => panic!("{other:?}"),
    }
    bench.sim().short = VecDeque::from(vec![2, 0, 0, 1]);
    assert_eq!(pages(&bench.harvest().unwrap()).0, (0..5).map(|page| (1, page)).collect());
    assert_eq!(bench.sim().short.len(), 0);
}

#[test]
fn entries_that_are_nobodys_are_passed_over() {
    let mut bench = Bench::new();
    bench.tracker.arm(&mut bench.collector).unwrap();
    // A slot of the same number in another address space, one that nobody knows, and pages beyond a slot's end.
    for (slot, page) in [(id(0) & 0xffff, 1), (99, 0), (id(2), 1), (id(1), 1000), (id(1), u64::MAX)] {
        bench.sim().rings[0].push(DirtyEntry { slot, page });
    }
    bench.write((0, (0, 1)));
    assert_eq!(pages(&bench.harvest().unwrap()).0, BTreeSet::from([(0, 1)]));
}

#[test]
fn a_discarded_page_was_written_by_nobody() {
    let mut bench = Bench::new();
    bench.tracker.arm(&mut bench.collector).unwrap();
    bench.write((0, (1, 7)));
    bench.write((2, (1, 8)));
    let mut harvest = bench.harvest().unwrap();
    assert_eq!(pages(&harvest).2, BTreeSet::from([(0, (1, 7)), (2, (1, 8))]));
    assert!(harvest.discard(Gfn(base(1) + 8)));
    assert_eq!((harvest.count_by(0), harvest.count_by(1), harvest.count_by(2)), (1, 0, 0));
    assert_eq!(harvest.count_by(CPUS), 0, "there is no such vCPU");
    drop(harvest);
    assert_eq!(pages(&bench.harvest().unwrap()).2, BTreeSet::from([(0, (1, 7))]));
}

#[test]
fn states_that_make_no_sense_are_typed_errors() {
    let mut bench = Bench::new();
    assert!(matches!(bench.harvest(), Err(TrackerError::NotArmed)));
    assert!(matches!(bench.tracker.disarm(&mut bench.collector), Err(TrackerError::NotArmed)));
    bench.tracker.arm(&mut bench.collector).unwrap();
    assert!(matches!(bench.tracker.arm(&mut bench.collector), Err(TrackerError::AlreadyArmed)));
    bench.harvest().unwrap().commit();
    bench.tracker.disarm(&mut bench.collector).unwrap();
    assert!(matches!(bench.harvest(), Err(TrackerError::NotArmed)));
}
