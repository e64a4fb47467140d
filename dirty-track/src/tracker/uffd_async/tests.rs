//! The policy against a model: simulated protection that writes interleave with at every step, and that fails when
//! told to.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::tracker::sim::{Extent, Layout, Page, Wish, check_change, wishes};

const LAYOUT: Layout = Layout { ids: &[0, 1, 2], sizes: &[70, 200, 1] };
const SIZES: &[usize] = LAYOUT.sizes;

#[derive(Debug, Default)]
struct SimSlot {
    registered: Vec<bool>,
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
    fn register(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let registered = &mut sim.slots[LAYOUT.index(slot.slot())].registered[pages];
        assert!(!registered.contains(&true));
        registered.fill(true);
        Ok(())
    }

    fn unregister(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let slot = &mut sim.slots[LAYOUT.index(slot.slot())];
        slot.registered[pages.clone()].fill(false);
        slot.protected[pages].fill(false);
        Ok(())
    }

    fn protect(&mut self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let slot = &mut sim.slots[LAYOUT.index(slot.slot())];
        assert!(!pages.is_empty() && !slot.registered[pages.clone()].contains(&false));
        slot.protected[pages].fill(true);
        Ok(())
    }

    fn written(
        &mut self,
        slot: &WpSlot,
        pages: Range<usize>,
        found: &mut Vec<Range<usize>>,
    ) -> Result<usize, errno::Error> {
        let mut sim = self.0.lock().unwrap();
        sim.call()?;
        let protected = &sim.slots[LAYOUT.index(slot.slot())].protected;
        let mut at = pages.start;
        // Three runs a call, so that writes come between; what a call begins with may have been said before.
        for _ in 0..3 {
            let Some(start) = (at..pages.end).find(|&page| !protected[page]) else {
                return Ok(pages.end);
            };
            at = (start..pages.end).find(|&page| protected[page]).unwrap_or(pages.end);
            found.push(start..at);
        }
        Ok(at)
    }
}

struct World {
    sim: Arc<Mutex<Sim>>,
    /// All there are, tracked or not.
    slots: Vec<Slot>,
    layer: AsyncLayer<SimWp>,
    owed: OwedSet,
    /// What somebody has who copies what is handed out, and commits.
    copy: Vec<Vec<u32>>,
}

impl World {
    fn new() -> World {
        let slots = LAYOUT.slots();
        let sim = SIZES.iter().map(|&pages| SimSlot {
            contents: vec![0; pages],
            protected: vec![false; pages],
            registered: vec![false; pages],
        });
        let sim = Arc::new(Mutex::new(Sim { slots: sim.collect(), ..Sim::default() }));
        let layer = AsyncLayer::new(SimWp(Arc::clone(&sim)), simulated(&slots), HostWrites::Reported);
        let owed = layer.owed_set();
        World { sim, slots, layer, owed, copy: SIZES.iter().map(|&pages| vec![0; pages]).collect() }
    }

    fn tracked(&self) -> Extent {
        LAYOUT.tracked(self.layer.slots().iter().map(WpSlot::slot))
    }

    /// As [`UffdAsync::set_slots`]; and what is new is copied.
    fn set_slots(&mut self, wish: &[Wish]) -> Result<Extent, TestCaseError> {
        let before = self.tracked();
        let wished = LAYOUT.wished(&self.slots, wish);
        let outcome = self.layer.set_slots(simulated(&wished));
        self.owed.set_slots(self.layer.slots().iter().map(WpSlot::slot));
        let now = self.tracked();
        check_change(&outcome, &before, &LAYOUT.tracked(&wished), &now)?;
        let sim = self.sim.lock().unwrap();
        for (index, slot) in sim.slots.iter().enumerate().filter(|_| outcome.is_ok()) {
            prop_assert!((0..SIZES[index]).all(|page| slot.registered[page] == now.has((index, page))));
        }
        for (slot, run) in now.minus(&before).0 {
            self.copy[slot][run.clone()].copy_from_slice(&sim.slots[slot].contents[run]);
        }
        Ok(now)
    }

    /// As [`UffdAsync::arm`]; and the whole of memory is copied.
    fn arm(&mut self) -> Result<(), TrackerError> {
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
        self.slots[slot].host_writes().mark_dirty(page << PAGE_SHIFT, 1);
    }

    /// A page that the host has changed behind the protection's back, which stays.
    fn write_elsewhere(&self, (slot, page): Page) {
        let mut sim = self.sim.lock().unwrap();
        let was = sim.slots[slot].protected[page];
        sim.write((slot, page));
        sim.slots[slot].protected[page] = was;
        self.slots[slot].host_writes().mark_dirty(page << PAGE_SHIFT, 1);
    }

    /// A harvest that copies what it gets, after a moment in which the guest writes on. Returns what it reported.
    fn harvest(&mut self, commit: bool, later: Option<Page>) -> Result<BTreeSet<Page>, TrackerError> {
        self.layer.collect(&mut self.owed)?;
        let harvest = self.owed.lend();
        let mut sim = self.sim.lock().unwrap();
        later.into_iter().for_each(|page| sim.write(page));
        let pages = LAYOUT.pages(harvest.runs());
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
    SetSlots { wish: Vec<Wish>, racing: Vec<Page>, fails_in: Option<usize> },
}

fn simulated(slots: &[Slot]) -> Vec<WpSlot> {
    slots.iter().map(|slot| WpSlot::simulated(slot.clone(), PageSize::K4)).collect()
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
        2 => (wishes(SIZES.len()), racing(), fails_in())
            .prop_map(|(wish, racing, fails_in)| Op::SetSlots { wish, racing, fails_in }),
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
        let mut tracked = world.tracked();
        for op in ops {
            match op {
                Op::Write(page) => world.sim.lock().unwrap().write(page),
                Op::DropPage(page) => world.drop_page(page),
                Op::WriteElsewhere(page) => world.write_elsewhere(page),
                Op::Harvest { racing, fails_in, commit, later } => {
                    {
                        let mut sim = world.sim.lock().unwrap();
                        changed.append(&mut std::mem::take(&mut sim.changed));
                        changed.retain(|&page| tracked.has(page));
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
                        prop_assert!(reported.iter().all(|&page| tracked.has(page)), "not asked for");
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
                Op::SetSlots { wish, racing, fails_in } => {
                    {
                        let mut sim = world.sim.lock().unwrap();
                        changed.append(&mut std::mem::take(&mut sim.changed));
                        sim.racing = racing.into();
                        sim.fails_in = fails_in;
                    }
                    let now = world.set_slots(&wish)?;
                    let mut sim = world.sim.lock().unwrap();
                    sim.fails_in = None;
                    sim.racing.clear();
                    // What is written meanwhile to a page that stays must be reported.
                    changed.append(&mut std::mem::take(&mut sim.changed));
                    changed.retain(|&page| tracked.has(page) && now.has(page));
                    // Pages that are new may be reported once.
                    for (slot, run) in now.minus(&tracked).0 {
                        before.extend(run.map(|page| (slot, page)));
                    }
                    tracked = now;
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
                        let registered = |sim: &Sim| sim.slots.iter().any(|slot| slot.registered.contains(&true));
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
        for (slot, run) in tracked.0 {
            prop_assert_eq!(&sim.slots[slot].contents[run.clone()], &world.copy[slot][run]);
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
        fn register(&mut self, _: &WpSlot, _: Range<usize>) -> Result<(), errno::Error> {
            Ok(())
        }
        fn unregister(&mut self, _: &WpSlot, _: Range<usize>) -> Result<(), errno::Error> {
            Ok(())
        }
        fn protect(&mut self, _: &WpSlot, _: Range<usize>) -> Result<(), errno::Error> {
            Ok(())
        }
        fn written(
            &mut self,
            _: &WpSlot,
            pages: Range<usize>,
            _: &mut Vec<Range<usize>>,
        ) -> Result<usize, errno::Error> {
            Ok(pages.start)
        }
    }
    let mut layer = AsyncLayer::new(Stuck, simulated(&LAYOUT.slots()), HostWrites::Reported);
    let mut owed = layer.owed_set();
    layer.arm().unwrap();
    let error = layer.collect(&mut owed).unwrap_err();
    assert!(matches!(error, TrackerError::Scan { slot: 0, first: 0, .. }), "{error}");
}
