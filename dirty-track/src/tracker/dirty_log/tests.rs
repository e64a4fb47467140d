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

/// (slot index, page in the slot)
type Page = (usize, usize);

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

    fn set_logging(&mut self, slot: usize, on: bool) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        assert_eq!(sim.mode, Some(sim.protocol), "logging was switched in the wrong mode");
        let initially_set = sim.initially_set();
        let slot = &mut sim.slots[slot];
        if on && !slot.logging {
            slot.log = vec![initially_set; slot.contents.len()];
            slot.writable = vec![initially_set; slot.contents.len()];
        }
        slot.logging = on;
        Ok(())
    }
}

impl DirtyLog for SimLog {
    fn get(&mut self, slot: usize, words: &mut [u64]) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        let outcome = sim.call();
        let (clears, fails_late) = (sim.protocol == Protocol::ClearedByGet, sim.fails_late);
        if outcome.is_err() && !(clears && fails_late) {
            return outcome;
        }
        let slot = &mut sim.slots[slot];
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

    fn clear(&mut self, slot: usize, first: usize, pages: usize, words: &[u64]) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let protocol = sim.protocol;
        let slot = &mut sim.slots[slot];
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

/// Sizes of the slots in pages: none a multiple of 64, one with two CLEAR chunks and a bit.
const SIZES: [usize; 3] = [70, 2 * CLEAR_CHUNK + 65, 1];

/// First frame of slot `index`; with holes between the slots.
fn base(index: usize) -> u64 {
    0x100 + 0x100_0000 * index as u64
}

fn machine(protocol: Protocol) -> (SimLog, Logged<SimLog>) {
    let slots = SIZES.iter().enumerate().map(|(index, &pages)| {
        let region = GuestRegionMmap::<RegionBitmap>::from_range(
            GuestAddress(base(index) * PAGE_SIZE),
            pages * PAGE_SIZE as usize,
            None,
        );
        Slot::of_region(index as u32, 0, &region.unwrap())
    });
    let slots = Slot::sorted(slots.collect()).unwrap();
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

fn to_page(gfn: Gfn) -> Page {
    let slot = (0..SIZES.len()).rfind(|&slot| base(slot) <= gfn.0).unwrap();
    (slot, (gfn.0 - base(slot)) as usize)
}

/// What a harvest says to be coarse.
fn coarse(harvest: &Harvest<'_>) -> BTreeSet<Page> {
    let frames: Vec<_> = harvest.coarse_runs().flat_map(|run| run.iter()).collect();
    assert_eq!(harvest.coarse_count(), frames.len() as u64);
    assert!(frames.iter().all(|&gfn| harvest.is_coarse(gfn)));
    frames.into_iter().map(to_page).collect()
}

/// What a harvest reports, and what of it is said to be the host's.
fn pages(harvest: &Harvest<'_>) -> (BTreeSet<Page>, BTreeSet<Page>) {
    let all: BTreeSet<_> = harvest.runs().flat_map(|run| run.iter()).map(to_page).collect();
    let host: BTreeSet<_> = harvest.host_runs().flat_map(|run| run.iter()).map(to_page).collect();
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
                    let bitmap = tracker.slots[slot].host_writes().clone();
                    bitmap.mark_dirty(page * PAGE_SIZE as usize + 9, 1);
                    host.insert((slot, page));
                }
                Op::Harvest { racing, fails_in, fails_late, commit } => {
                    must.append(&mut std::mem::take(&mut sim().written));
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
                        let extra: BTreeSet<_> = reported.difference(&may).copied().collect();
                        prop_assert!(extra.is_subset(&coarse), "extra {:?}, coarse {:?}", extra, coarse);
                        prop_assert!(!was_exact || coarse.is_subset(&owed_coarse), "coarse without cause");
                        prop_assert_eq!(&from_host, &host);
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
                        } else {
                            drop(harvest);
                            must.extend(raced);
                            owed_coarse = coarse;
                        }
                    } else {
                        must.extend(raced);
                        // Some slots may have been harvested, and what they yielded is owed.
                        for slot in 0..SIZES.len() {
                            owed_coarse.extend(bitmap::runs(tracker.owed.slot(slot).coarse_words()).flatten().map(|page| (slot, page)));
                        }
                        late.iter().for_each(|&page| sim().write(page));
                    }
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
        for (slot, copied) in copy.iter().enumerate() {
            let late: BTreeSet<_> = sim().written.iter().filter(|page| page.0 == slot).copied().collect();
            prop_assert!(late.is_empty());
            prop_assert_eq!(copied, &sim().slots[slot].contents);
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
