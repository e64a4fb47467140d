//! The policy against a model: simulated protection that writes interleave with at every step, and that fails when
//! told to.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::*;
use crate::addr::{Gfn, PAGE_SIZE};
use crate::region::RegionBitmap;

/// (slot index, page in the slot)
type Page = (usize, usize);

const SIZES: [usize; 3] = [70, 200, 1];

/// First frame of slot `index`.
fn base(index: usize) -> u64 {
    0x100 + 0x1000 * index as u64
}

#[derive(Debug, Default)]
struct SimSlot {
    registered: bool,
    /// Bumped by each write.
    contents: Vec<u32>,
    protected: Vec<bool>,
}

#[derive(Debug, Default)]
struct Sim {
    slots: Vec<SimSlot>,
    /// Writes that race: one happens before each call into the mechanism.
    racing: VecDeque<Page>,
    /// Calls until one fails.
    fails_in: Option<usize>,
    /// Every page whose contents changed since this was last emptied.
    changed: BTreeSet<Page>,
}

impl Sim {
    fn write(&mut self, (slot, page): Page) {
        self.slots[slot].contents[page] += 1;
        self.slots[slot].protected[page] = false;
        self.changed.insert((slot, page));
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
struct SimWp(Arc<Mutex<Sim>>);

impl AsyncWp for SimWp {
    fn register(&mut self, slot: usize) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        assert!(!std::mem::replace(&mut sim.slots[slot].registered, true));
        Ok(())
    }

    fn unregister(&mut self, slot: usize) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        sim.slots[slot].registered = false;
        sim.slots[slot].protected.fill(false);
        Ok(())
    }

    fn protect(&mut self, slot: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        assert!(sim.slots[slot].registered && !pages.is_empty());
        sim.slots[slot].protected[pages].fill(true);
        Ok(())
    }

    fn written(
        &mut self,
        slot: usize,
        from: usize,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let protected = &sim.slots[slot].protected;
        let mut at = from;
        // Three runs a call, so that writes come between; what a call begins with may have been said before.
        for _ in 0..3 {
            let Some(start) = (at..protected.len()).find(|&page| !protected[page]) else {
                return Ok(protected.len());
            };
            at = (start..protected.len()).find(|&page| protected[page]).unwrap_or(protected.len());
            found.push(start..at);
        }
        Ok(at)
    }
}

struct World {
    sim: Arc<Mutex<Sim>>,
    layer: AsyncLayer<SimWp>,
    owed: OwedSet,
    /// What somebody has who copies what is handed out, and commits.
    copy: Vec<Vec<u32>>,
}

impl World {
    fn new() -> World {
        let slots = SIZES.iter().enumerate().map(|(index, &pages)| {
            let at = GuestAddress(base(index) * PAGE_SIZE);
            let region = GuestRegionMmap::<RegionBitmap>::from_range(at, pages * PAGE_SIZE as usize, None);
            WpSlot::simulated(Slot::of_region(index as u32, 0, &region.unwrap()), PageSize::K4)
        });
        let sim = SIZES.iter().map(|&pages| SimSlot {
            contents: vec![0; pages],
            protected: vec![false; pages],
            ..SimSlot::default()
        });
        let sim = Arc::new(Mutex::new(Sim { slots: sim.collect(), ..Sim::default() }));
        let layer = AsyncLayer::new(SimWp(Arc::clone(&sim)), slots.collect());
        let owed = layer.owed_set();
        World { sim, layer, owed, copy: SIZES.iter().map(|&pages| vec![0; pages]).collect() }
    }

    /// As [`UffdAsync::arm`]; and the whole of memory is copied.
    fn arm(&mut self) -> Result<(), TrackerError> {
        self.layer.slots().iter().for_each(|slot| slot.slot().host_writes().start());
        self.layer.arm()?;
        let mut sim = self.sim.lock().unwrap();
        self.copy = sim.slots.iter().map(|slot| slot.contents.clone()).collect();
        sim.changed.clear();
        Ok(())
    }

    /// The host drops a page, and says so as it is told to: afterwards.
    fn drop_page(&self, (slot, page): Page) {
        let mut sim = self.sim.lock().unwrap();
        sim.write((slot, page));
        let host_writes = self.layer.slots()[slot].slot().host_writes();
        host_writes.mark_dirty(page << PAGE_SHIFT, 1);
    }

    /// A page that the host has changed behind the protection's back, which stays.
    fn write_elsewhere(&self, (slot, page): Page) {
        let mut sim = self.sim.lock().unwrap();
        let was = sim.slots[slot].protected[page];
        sim.write((slot, page));
        sim.slots[slot].protected[page] = was;
        self.layer.slots()[slot].slot().host_writes().mark_dirty(page << PAGE_SHIFT, 1);
    }

    /// A harvest that copies what it gets, after a moment in which the guest writes on. Returns what it reported.
    fn harvest(&mut self, commit: bool, later: Option<Page>) -> Result<BTreeSet<Page>, TrackerError> {
        self.layer.collect(&mut self.owed, true)?;
        let harvest = self.owed.lend();
        let mut sim = self.sim.lock().unwrap();
        later.into_iter().for_each(|page| sim.write(page));
        let page = |gfn: Gfn| {
            let slot = (0..SIZES.len()).rfind(|&slot| base(slot) <= gfn.0).unwrap();
            (slot, (gfn.0 - base(slot)) as usize)
        };
        let pages: BTreeSet<_> = harvest.runs().flat_map(|run| run.iter()).map(page).collect();
        if commit {
            for &(slot, page) in &pages {
                self.copy[slot][page] = sim.slots[slot].contents[page];
            }
            harvest.commit();
        }
        Ok(pages)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(Page),
    DropPage(Page),
    WriteElsewhere(Page),
    Harvest { racing: Vec<Page>, fails_in: Option<usize>, commit: bool, later: Option<Page> },
    Rearm { racing: Vec<Page>, fails_in: Option<usize> },
}

fn page() -> impl Strategy<Value = Page> {
    // Few different pages, near each other, so that writes meet.
    (0..SIZES.len(), 0..9usize)
        .prop_map(|(slot, page)| (slot, (page * 2 % 11 + 60 * (page % 2)) % SIZES[slot]))
}

fn op() -> impl Strategy<Value = Op> {
    let racing = || prop::collection::vec(page(), 0..12);
    let fails_in = || prop::option::weighted(0.2, 0..12usize);
    prop_oneof![
        6 => page().prop_map(Op::Write),
        1 => page().prop_map(Op::DropPage),
        1 => page().prop_map(Op::WriteElsewhere),
        4 => (racing(), fails_in(), any::<bool>(), prop::option::of(page()))
            .prop_map(|(racing, fails_in, commit, later)| Op::Harvest { racing, fails_in, commit, later }),
        1 => (racing(), fails_in()).prop_map(|(racing, fails_in)| Op::Rearm { racing, fails_in }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Whoever copies what is handed out has all of memory in the end, whatever races and fails; and nothing is
    /// handed out that did not change.
    #[test]
    fn copies_converge_and_nothing_else_is_reported(ops in prop::collection::vec(op(), 1..40)) {
        let mut world = World::new();
        world.arm().unwrap();
        // Changed since the last commit, or in the moment before it.
        let mut changed = BTreeSet::new();
        let mut before = BTreeSet::new();
        for op in ops {
            match op {
                Op::Write(page) => world.sim.lock().unwrap().write(page),
                Op::DropPage(page) => world.drop_page(page),
                Op::WriteElsewhere(page) => world.write_elsewhere(page),
                Op::Harvest { racing, fails_in, commit, later } => {
                    {
                        let mut sim = world.sim.lock().unwrap();
                        changed.append(&mut std::mem::take(&mut sim.changed));
                        sim.racing = racing.into();
                        sim.fails_in = fails_in;
                    }
                    let outcome = world.harvest(commit, later);
                    let mut sim = world.sim.lock().unwrap();
                    sim.fails_in = None;
                    sim.racing.clear();
                    let during = std::mem::take(&mut sim.changed);
                    drop(sim);
                    if let Ok(reported) = outcome {
                        let mut known = &changed | &before;
                        prop_assert!(changed.is_subset(&reported), "missed {:?}", &changed - &reported);
                        known.extend(&during);
                        prop_assert!(reported.is_subset(&known), "extra {:?}", &reported - &known);
                        if commit {
                            changed.clear();
                            before.clear();
                        }
                    }
                    before.extend(during);
                }
                Op::Rearm { racing, fails_in } => {
                    world.layer.disarm().unwrap();
                    world.owed.clear();
                    {
                        let mut sim = world.sim.lock().unwrap();
                        sim.racing = racing.into();
                        sim.fails_in = fails_in;
                    }
                    if world.arm().is_err() {
                        let registered = |sim: &Sim| sim.slots.iter().any(|slot| slot.registered);
                        prop_assert!(!registered(&world.sim.lock().unwrap()), "a failed arm leaves nothing");
                        world.sim.lock().unwrap().racing.clear();
                        world.arm().unwrap();
                    }
                    let mut sim = world.sim.lock().unwrap();
                    sim.racing.clear();
                    sim.fails_in = None;
                    changed.clear();
                    // Writes while it armed may be reported.
                    before = (0..SIZES.len()).flat_map(|slot| (0..SIZES[slot]).map(move |page| (slot, page))).collect();
                }
            }
        }
        world.harvest(true, None).unwrap();
        let sim = world.sim.lock().unwrap();
        for (slot, copy) in sim.slots.iter().zip(&world.copy) {
            prop_assert_eq!(&slot.contents, copy);
        }
    }
}

#[test]
fn states_that_make_no_sense_are_typed_errors() {
    let mut world = World::new();
    assert!(matches!(world.layer.disarm(), Err(TrackerError::NotArmed)));
    assert!(matches!(world.harvest(true, None), Err(TrackerError::NotArmed)));
    world.arm().unwrap();
    assert!(matches!(world.layer.arm(), Err(TrackerError::AlreadyArmed)));
}

#[test]
fn a_scan_that_makes_no_progress_is_an_error() {
    struct Stuck;
    impl AsyncWp for Stuck {
        fn register(&mut self, _: usize) -> Result<(), errno::Error> {
            Ok(())
        }
        fn unregister(&mut self, _: usize) -> Result<(), errno::Error> {
            Ok(())
        }
        fn protect(&mut self, _: usize, _: Range<usize>) -> Result<(), errno::Error> {
            Ok(())
        }
        fn written(
            &mut self,
            _: usize,
            from: usize,
            _: &mut Vec<Range<usize>>,
        ) -> Result<usize, errno::Error> {
            Ok(from)
        }
    }
    let slots = World::new().layer.slots;
    let mut layer = AsyncLayer::new(Stuck, slots);
    let mut owed = layer.owed_set();
    layer.arm().unwrap();
    let error = layer.collect(&mut owed, true).unwrap_err();
    assert!(matches!(error, TrackerError::Scan { slot: 0, first: 0, .. }), "{error}");
}
