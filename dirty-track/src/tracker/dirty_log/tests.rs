//! The policy against a model: a simulated log that guest writes interleave with at every step, and that
//! fails when told to.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::*;
use crate::addr::{Gfn, PAGE_SIZE};
use crate::rearm::DenseSkip;
use crate::region::RegionBitmap;
use crate::tracker::sim::{Extent, Layout, Page, Wish, check_change, wishes};

/// One slot as KVM and the hardware hold it.
#[derive(Debug, Default)]
struct SimSlot {
    /// Bumped by each write.
    contents: Vec<u32>,
    logging: bool,
    log: Vec<bool>,
    /// The page can be written without a fault, so without a log entry.
    writable: Vec<bool>,
}

#[derive(Debug)]
struct Sim {
    /// What the tracker under test was made for.
    protocol: Protocol,
    /// What the VM was put into.
    mode: Option<Protocol>,
    slots: Vec<SimSlot>,
    /// Guest writes that race: one happens before each call into the log.
    racing: VecDeque<Page>,
    /// Calls until one fails.
    fails_in: Option<usize>,
    /// A GET that fails does so after it has cleared.
    fails_late: bool,
    /// Every page written since it was last emptied.
    written: BTreeSet<Page>,
    /// Pages that were cleared by CLEAR.
    cleared: usize,
    /// A GET has cleared and not reported.
    lost: bool,
}

impl Sim {
    fn write(&mut self, (slot, page): Page) {
        let sim = &mut self.slots[slot];
        sim.contents[page] += 1;
        if sim.logging && !sim.writable[page] {
            sim.writable[page] = true;
            sim.log[page] = true;
        }
        self.written.insert((slot, page));
    }

    fn initially_set(&self) -> bool {
        self.protocol == Protocol::Manual { initially_set: true }
    }

    fn call(&mut self) -> Result<(), errno::Error> {
        if let Some(page) = self.racing.pop_front() {
            self.write(page);
        }
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
struct SimLog(Arc<Mutex<Sim>>);

impl Logging for SimLog {
    fn prepare(&mut self) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        sim.mode = Some(sim.protocol);
        Ok(())
    }

    fn set_logging(&mut self, slot: &Slot, on: bool) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        assert_eq!(sim.mode, Some(sim.protocol), "logging was switched in the wrong mode");
        let initially_set = sim.initially_set();
        let slot = &mut sim.slots[LAYOUT.index(slot)];
        if on && !slot.logging {
            slot.log = vec![initially_set; slot.contents.len()];
            slot.writable = vec![initially_set; slot.contents.len()];
        }
        slot.logging = on;
        Ok(())
    }
}

impl DirtyLog for SimLog {
    fn get(&mut self, slot: &Slot, words: &mut [u64]) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        let outcome = sim.call();
        let (clears, fails_late) = (sim.protocol == Protocol::ClearedByGet, sim.fails_late);
        if outcome.is_err() && !(clears && fails_late) {
            return outcome;
        }
        let slot = &mut sim.slots[LAYOUT.index(slot)];
        assert!(slot.logging, "the log of a slot that has none was read");
        assert_eq!(words.len(), slot.log.len().div_ceil(64));
        words.fill(0);
        for page in 0..slot.log.len() {
            if slot.log[page] {
                words[page / 64] |= 1 << (page % 64);
                if clears {
                    (slot.log[page], slot.writable[page]) = (false, false);
                }
            }
        }
        if outcome.is_err() {
            words.fill(0);
            sim.lost = true;
            return Err(errno::Error::new(libc::EFAULT));
        }
        Ok(())
    }

    fn clear(&mut self, slot: &Slot, first: usize, pages: usize, words: &[u64]) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let protocol = sim.protocol;
        let slot = &mut sim.slots[LAYOUT.index(slot)];
        assert_ne!(protocol, Protocol::ClearedByGet, "GET has cleared already");
        // KVM's own conditions.
        assert!(slot.logging && first.is_multiple_of(64) && pages > 0 && first + pages <= slot.log.len());
        assert!(pages.is_multiple_of(64) || first + pages == slot.log.len());
        let mut cleared = 0;
        for page in (0..pages).filter(|page| words[page / 64] >> (page % 64) & 1 != 0) {
            cleared += 1;
            if std::mem::take(&mut slot.log[first + page]) {
                slot.writable[first + page] = false;
            }
        }
        sim.cleared += cleared;
        Ok(())
    }
}

const MANUAL: Protocol = Protocol::Manual { initially_set: true };
const PROTOCOLS: [Protocol; 3] = [Protocol::ClearedByGet, Protocol::Manual { initially_set: false }, MANUAL];

/// Slots of sizes that are no multiples of 64, one with two CLEAR chunks and a bit.
const LAYOUT: Layout = Layout { ids: &[0, 1, 2], sizes: &[70, 2 * CLEAR_CHUNK + 65, 1] };
const SIZES: &[usize] = LAYOUT.sizes;

fn base(index: usize) -> u64 {
    LAYOUT.base(index)
}

fn machine(protocol: Protocol) -> (SimLog, Logged<SimLog>) {
    let slots = LAYOUT.slots();
    let log = SimLog(Arc::new(Mutex::new(Sim {
        protocol,
        mode: None,
        slots: SIZES
            .iter()
            .map(|&pages| SimSlot { contents: vec![0; pages], ..SimSlot::default() })
            .collect(),
        racing: VecDeque::new(),
        fails_in: None,
        fails_late: false,
        written: BTreeSet::new(),
        cleared: 0,
        lost: false,
    })));
    (log.clone(), Logged::new(log, protocol, slots))
}

/// What a harvest says to be coarse.
fn coarse(harvest: &Harvest<'_>) -> BTreeSet<Page> {
    let frames: Vec<_> = harvest.coarse_runs().flat_map(|run| run.iter()).collect();
    assert_eq!(harvest.coarse_count(), frames.len() as u64);
    assert!(frames.iter().all(|&gfn| harvest.is_coarse(gfn)));
    frames.into_iter().map(|gfn| LAYOUT.page(gfn)).collect()
}

/// What a harvest reports, and what of it is said to be the host's.
fn pages(harvest: &Harvest<'_>) -> (BTreeSet<Page>, BTreeSet<Page>) {
    let (all, host) = (LAYOUT.pages(harvest.runs()), LAYOUT.pages(harvest.host_runs()));
    assert_eq!(harvest.count(), all.len() as u64);
    assert_eq!(harvest.host_count(), host.len() as u64);
    assert_eq!(harvest.is_empty(), all.is_empty());
    (all, host)
}

#[derive(Clone, Debug)]
enum Op {
    GuestWrite(Page),
    HostWrite(Page),
    /// A harvest with writes racing with it; it fails at some call, or is dropped, or is committed.
    Harvest {
        racing: Vec<Page>,
        fails_in: Option<usize>,
        fails_late: bool,
        commit: bool,
    },
    /// Disarm and arm again, with writes in between, after and before.
    Rearm {
        racing: Vec<Page>,
        fails_in: Option<usize>,
    },
    /// Another re-arming policy.
    Policy(Rearm),
    /// Other slots, or other pages of them.
    SetSlots {
        wish: Vec<Wish>,
        racing: Vec<Page>,
        fails_in: Option<usize>,
    },
}

fn page() -> impl Strategy<Value = Page> {
    // Few pages, so that they are written again and again, and those at the ends of words, chunks and slots.
    prop_oneof![
        prop::sample::select(vec![0, 1, 63, 64, 69]).prop_map(|page| (0, page)),
        prop::sample::select(vec![0, 62, 63, 64, 1000, CLEAR_CHUNK - 1, CLEAR_CHUNK, SIZES[1] - 1])
            .prop_map(|page| (1, page)),
        Just((2, 0)),
    ]
}

fn rearm() -> impl Strategy<Value = Rearm> {
    // A threshold so low that single pages make a block dense, and stays so short that they end.
    prop_oneof![
        Just(Rearm::All),
        (1..=3u64, 1..4u64)
            .prop_map(|(threshold, epochs)| Rearm::DenseSkip(DenseSkip::new(threshold, epochs).unwrap())),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let racing = || prop::collection::vec(page(), 0..12);
    prop_oneof![
        4 => page().prop_map(Op::GuestWrite),
        2 => page().prop_map(Op::HostWrite),
        4 => (racing(), prop::option::weighted(0.3, 0..8usize), prop::bool::weighted(0.2), any::<bool>())
            .prop_map(|(racing, fails_in, fails_late, commit)| Op::Harvest { racing, fails_in, fails_late, commit }),
        1 => (racing(), prop::option::weighted(0.3, 0..8usize))
            .prop_map(|(racing, fails_in)| Op::Rearm { racing, fails_in }),
        1 => rearm().prop_map(Op::Policy),
        2 => (wishes(SIZES.len()), racing(), prop::option::weighted(0.3, 0..6usize))
            .prop_map(|(wish, racing, fails_in)| Op::SetSlots { wish, racing, fails_in }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// Whatever races, fails or is dropped, whatever is left writable and whenever that changes: each page
    /// written since the last committed harvest returned is reported, none is that was not written since it
    /// began and is not coarse, and who copies what was reported ends with the guest's memory.
    #[test]
    fn harvests_are_exact_and_lose_nothing(
        protocol in prop::sample::select(PROTOCOLS.to_vec()),
        policy in rearm(),
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let (log, mut tracker) = machine(protocol);
        // GET knows no policy.
        let possible = |policy| if protocol == Protocol::ClearedByGet { Rearm::All } else { policy };
        let mut policy = possible(policy);
        tracker.set_rearm(policy);
        let sim = || log.0.lock().unwrap();
        tracker.arm().unwrap();
        sim().written.clear();
        let mut copy: Vec<Vec<u32>> = sim().slots.iter().map(|slot| slot.contents.clone()).collect();
        // Written since the last committed harvest began, and since it returned.
        let (mut may, mut must, mut host) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        // Coarse in a harvest that was not committed.
        let mut owed_coarse = BTreeSet::new();
        let slots = tracker.slots.clone();
        // What is tracked; and what is since a change, and may be reported once for what was before.
        let (mut tracked, mut fresh) = (LAYOUT.tracked(&slots), Extent::default());

        // In the end everything is harvested once more, in peace.
        let end = Op::Harvest { racing: Vec::new(), fails_in: None, fails_late: false, commit: true };
        for op in ops.into_iter().chain([end]) {
            match op {
                Op::GuestWrite(page) => sim().write(page),
                Op::Policy(next) => {
                    policy = possible(next);
                    tracker.set_rearm(policy);
                }
                Op::HostWrite((slot, page)) => {
                    // Past the log: the host's mapping is not write-protected.
                    sim().slots[slot].contents[page] += 1;
                    sim().written.insert((slot, page));
                    slots[slot].host_writes().mark_dirty(page * PAGE_SIZE as usize + 9, 1);
                    if tracked.has((slot, page)) {
                        host.insert((slot, page));
                    }
                }
                Op::Harvest { racing, fails_in, fails_late, commit } => {
                    must.append(&mut std::mem::take(&mut sim().written));
                    must.retain(|&page| tracked.has(page));
                    may.extend(must.iter().copied());
                    sim().racing = racing.into();
                    sim().fails_in = fails_in;
                    sim().fails_late = fails_late;
                    let was_exact = tracker.rearm.iter().all(|slot| slot.open_blocks() == 0);
                    let harvest = tracker.harvest();
                    let failed = sim().fails_in.is_none() && fails_in.is_some();
                    prop_assert_eq!(harvest.is_err(), failed);
                    if std::mem::take(&mut sim().lost) {
                        // What a GET cleared and did not report is made up for by everything.
                        may.extend((0..SIZES.len()).flat_map(|slot| (0..SIZES[slot]).map(move |page| (slot, page))));
                    }
                    let raced = std::mem::take(&mut sim().written);
                    may.extend(raced.iter().copied());
                    // Writes that did not fit in race with the copying.
                    let late = std::mem::take(&mut sim().racing);
                    sim().fails_in = None;
                    if let Ok(harvest) = harvest {
                        let (reported, from_host) = pages(&harvest);
                        prop_assert!(reported.is_superset(&must), "missed {:?}", must.difference(&reported));
                        let coarse = coarse(&harvest);
                        prop_assert!(coarse.is_subset(&reported) && coarse.is_disjoint(&from_host));
                        prop_assert!(reported.iter().all(|&page| tracked.has(page)), "not asked for");
                        let extra = reported.difference(&may).copied();
                        let extra: BTreeSet<_> = extra.filter(|&page| !fresh.has(page)).collect();
                        prop_assert!(extra.is_subset(&coarse), "extra {:?}, coarse {:?}", extra, coarse);
                        prop_assert!(!was_exact || coarse.is_subset(&owed_coarse), "coarse without cause");
                        prop_assert!(from_host.is_superset(&host));
                        prop_assert!(from_host.iter().all(|&page| host.contains(&page) || fresh.has(page)));
                        late.iter().for_each(|&page| sim().write(page));
                        if commit {
                            for (slot, page) in reported {
                                copy[slot][page] = sim().slots[slot].contents[page];
                            }
                            harvest.commit();
                            host.clear();
                            must.clear();
                            owed_coarse.clear();
                            // What raced may have been in time for this harvest, or not.
                            may = raced;
                            fresh = Extent::default();
                        } else {
                            drop(harvest);
                            must.extend(raced);
                            owed_coarse = coarse;
                        }
                    } else {
                        must.extend(raced);
                        // Some slots may have been harvested, and what they yielded is owed.
                        for (index, slot) in tracker.slots.iter().enumerate() {
                            let coarse = bitmap::runs(tracker.owed.slot(index).coarse_words()).flatten();
                            owed_coarse.extend(coarse.map(|page| (LAYOUT.index(slot), page)));
                        }
                        late.iter().for_each(|&page| sim().write(page));
                    }
                }
                Op::SetSlots { wish, racing, fails_in } => {
                    must.append(&mut std::mem::take(&mut sim().written));
                    may.extend(must.iter().copied());
                    sim().racing = racing.into();
                    sim().fails_in = fails_in;
                    let wished = LAYOUT.wished(&slots, &wish);
                    let outcome = tracker.set_slots(wished.clone());
                    sim().fails_in = None;
                    sim().racing.clear();
                    if std::mem::take(&mut sim().lost) {
                        may.extend((0..SIZES.len()).flat_map(|slot| (0..SIZES[slot]).map(move |page| (slot, page))));
                    }
                    let now = LAYOUT.tracked(&tracker.slots);
                    check_change(&outcome, &tracked, &LAYOUT.tracked(&wished), &now)?;
                    let all_off = sim().slots.iter().enumerate().all(|(index, slot)| {
                        slot.logging == tracker.slots.iter().any(|now| LAYOUT.index(now) == index)
                    });
                    prop_assert!(all_off || outcome.is_err(), "a slot is logged and not tracked, or the reverse");
                    let raced = std::mem::take(&mut sim().written);
                    may.extend(raced.iter().copied());
                    must.extend(raced);
                    must.retain(|&page| tracked.has(page) && now.has(page));
                    host.retain(|&page| tracked.has(page) && now.has(page));
                    // A copy is made of what is new.
                    for (slot, run) in now.minus(&tracked).0 {
                        copy[slot][run.clone()].copy_from_slice(&sim().slots[slot].contents[run.clone()]);
                        fresh.0.push((slot, run));
                    }
                    owed_coarse.retain(|&page| now.has(page));
                    tracked = now;
                }
                Op::Rearm { racing, fails_in } => {
                    tracker.disarm().unwrap();
                    sim().racing = racing.into();
                    sim().fails_in = fails_in;
                    if tracker.arm().is_err() {
                        prop_assert!(sim().slots.iter().all(|slot| !slot.logging), "left on after a failure");
                        sim().fails_in = None;
                        tracker.arm().unwrap();
                    }
                    sim().fails_in = None;
                    sim().lost = false;
                    sim().racing.clear();
                    // Nothing from before is owed, but what raced may be reported.
                    may = std::mem::take(&mut sim().written);
                    must.clear();
                    host.clear();
                    owed_coarse.clear();
                    copy = sim().slots.iter().map(|slot| slot.contents.clone()).collect();
                }
            }
        }
        // Under `all` the harvest before this one, at the latest, has closed what was open.
        if policy == Rearm::All {
            prop_assert_eq!(tracker.rearm.iter().map(SlotRearm::open_blocks).sum::<usize>(), 0);
        }
        prop_assert!(sim().written.is_empty());
        for (slot, run) in tracked.0 {
            prop_assert_eq!(&copy[slot][run.clone()], &sim().slots[slot].contents[run]);
        }
    }
}

#[test]
fn a_harvest_clears_only_what_it_reports() {
    let (log, mut tracker) = machine(MANUAL);
    tracker.arm().unwrap();
    let mut sim = log.0.lock().unwrap();
    assert_eq!(
        sim.cleared,
        SIZES.iter().map(|pages| pages.div_ceil(64) * 64).sum::<usize>().min(sim.cleared)
    );
    sim.cleared = 0;
    sim.write((1, 7));
    sim.write((1, CLEAR_CHUNK + 7));
    drop(sim);
    tracker.harvest().unwrap().commit();
    assert_eq!(log.0.lock().unwrap().cleared, 2);
}

#[test]
fn a_dense_block_is_left_writable_and_reported_until_it_cools() {
    const EPOCHS: u64 = 3;
    let (log, mut tracker) = machine(Protocol::Manual { initially_set: true });
    tracker.set_rearm(Rearm::DenseSkip(DenseSkip::new(256, EPOCHS).unwrap()));
    tracker.arm().unwrap();
    let dense: BTreeSet<Page> = (512..900).map(|page| (1, page)).collect();
    let sparse: BTreeSet<Page> = (1100..1200).map(|page| (1, page)).collect();
    dense.iter().chain(&sparse).for_each(|&page| log.0.lock().unwrap().write(page));
    let harvest = tracker.harvest().unwrap();
    assert_eq!(pages(&harvest).0, &dense | &sparse);
    assert_eq!(harvest.coarse_count(), 0, "that epoch was tracked exactly");
    harvest.commit();
    // From here on the dense block is written no more; the page next to it is, once.
    log.0.lock().unwrap().write((1, 1100));
    let harvest = tracker.harvest().unwrap();
    assert_eq!(coarse(&harvest), dense);
    assert_eq!(pages(&harvest).0, &dense | &BTreeSet::from([(1, 1100)]));
    harvest.commit();
    let mut epochs = 0;
    loop {
        let harvest = tracker.harvest().unwrap();
        let reported = pages(&harvest).0;
        harvest.commit();
        if reported.is_empty() {
            break;
        }
        assert!(reported.is_subset(&dense));
        epochs += 1;
        assert!(epochs <= EPOCHS + 1, "the block stays open");
    }
    log.0.lock().unwrap().write((1, 600));
    let harvest = tracker.harvest().unwrap();
    assert_eq!((pages(&harvest).0, harvest.coarse_count()), (BTreeSet::from([(1, 600)]), 0));
    harvest.commit();
}

#[test]
fn arming_anew_begins_exact() {
    let (log, mut tracker) = machine(Protocol::Manual { initially_set: false });
    tracker.set_rearm(Rearm::DenseSkip(DenseSkip::new(1, 250).unwrap()));
    tracker.arm().unwrap();
    log.0.lock().unwrap().write((1, 5));
    tracker.harvest().unwrap().commit();
    assert_eq!(coarse(&tracker.harvest().unwrap()), BTreeSet::from([(1, 5)]));
    tracker.disarm().unwrap();
    tracker.arm().unwrap();
    log.0.lock().unwrap().write((1, 5));
    let harvest = tracker.harvest().unwrap();
    assert_eq!((pages(&harvest).0, harvest.coarse_count()), (BTreeSet::from([(1, 5)]), 0));
}

#[test]
fn states_that_make_no_sense_are_typed_errors() {
    let (_, mut tracker) = machine(MANUAL);
    assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
    assert!(matches!(tracker.disarm(), Err(TrackerError::NotArmed)));
    tracker.arm().unwrap();
    assert!(matches!(tracker.arm(), Err(TrackerError::AlreadyArmed)));
    tracker.harvest().unwrap().commit();
    tracker.disarm().unwrap();
    assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
}

#[test]
fn a_page_can_be_asked_for_and_discarded() {
    let (log, mut tracker) = machine(MANUAL);
    tracker.arm().unwrap();
    log.0.lock().unwrap().write((0, 5));
    log.0.lock().unwrap().write((2, 0));
    tracker.slots[2].host_writes().mark_dirty(0, 1);
    let mut harvest = tracker.harvest().unwrap();
    let (first, last) = (Gfn(base(0) + 5), Gfn(base(2)));
    assert!(harvest.contains(first) && !harvest.from_host(first));
    assert!(harvest.contains(last) && harvest.from_host(last));
    for outside in [Gfn(0), Gfn(base(0) + 70), Gfn(base(2) + 1), Gfn(u64::MAX)] {
        assert!(!harvest.contains(outside) && !harvest.discard(outside));
    }
    assert_eq!(harvest.dirty_blocks(), 2);
    assert!(harvest.discard(last));
    assert!(!harvest.contains(last) && !harvest.from_host(last) && !harvest.discard(last));
    drop(harvest);
    assert_eq!(pages(&tracker.harvest().unwrap()).0, BTreeSet::from([(0, 5)]));
}

#[test]
fn slots_that_cannot_be_tracked_are_refused() {
    let region = |gpa: u64, len: usize| {
        GuestRegionMmap::<RegionBitmap>::from_range(GuestAddress(gpa), len, None).unwrap()
    };
    let why = |slots: Vec<Slot>| match Slot::sorted(slots) {
        Err(TrackerError::BadSlot { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let (low, high, odd) = (region(0, 8192), region(4096, 8192), region(0x10_0000, 5000));
    assert!(why(vec![Slot::of_region(1, 0, &high), Slot::of_region(0, 0, &low)]).contains("overlaps"));
    assert!(why(vec![Slot::of_region(0, 0, &odd)]).contains("multiples"));
    let far = region(1 << 30, 4096);
    assert!(why(vec![Slot::of_region(3, 0, &low), Slot::of_region(3, 0, &far)]).contains("twice"));
    let default = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(4096, RegionBitmap::default())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    let default = GuestRegionMmap::new(default, GuestAddress(0)).unwrap();
    assert!(why(vec![Slot::of_region(0, 0, &default)]).contains("another size"));
}
