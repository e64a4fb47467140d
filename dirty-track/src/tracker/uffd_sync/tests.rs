//! The turns, held against a model: at every step of whatever is under way, something else comes in between. What
//! has to wait for a turn waits; everything else happens. Nobody may ever have an old copy after a harvest.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::*;
use crate::addr::PAGE_SIZE;
use crate::region::RegionBitmap;

/// Pages of the one slot: two blocks and a bit, and it begins in the middle of one.
const PAGES: usize = 1100;
const FIRST: u64 = 0x300;

/// What may happen at any time.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// A vCPU writes, or goes to sleep at the page.
    Write(usize),
    /// The handler serves one sleeper.
    Resolve,
    /// A harvest, copying and committing.
    Harvest,
}

#[derive(Default)]
struct World {
    protected: RefCell<Vec<bool>>,
    contents: RefCell<Vec<u32>>,
    copy: RefCell<Vec<u32>>,
    /// Pages that a vCPU sleeps at, and whether the handler has yet to be told so.
    asleep: RefCell<Vec<(usize, bool)>>,
    record: RefCell<Option<Rc<Record<SimWp>>>>,
    harvester: RefCell<Option<Harvester>>,
    /// What comes in between, and after how many more steps.
    intruder: Cell<Option<(usize, Op)>>,
    fails_in: Cell<Option<usize>>,
    /// Pages reported, and pages written, since the last commit.
    reported_clean: Cell<usize>,
}

#[derive(Clone)]
struct SimWp(Rc<World>);

impl SimWp {
    /// A moment in which others get on.
    fn step(&self) {
        match self.0.intruder.take() {
            Some((0, op)) => run(&self.0, op),
            Some((steps, op)) => self.0.intruder.set(Some((steps - 1, op))),
            None => {}
        }
    }

    fn call(&self) -> Result<(), errno::Error> {
        self.step();
        match self.0.fails_in.take() {
            Some(0) => Err(errno::Error::new(libc::EAGAIN)),
            calls => {
                self.0.fails_in.set(calls.map(|calls| calls - 1));
                Ok(())
            }
        }
    }
}

impl SyncWp for SimWp {
    fn protect(&self, _: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        self.call()?;
        self.0.protected.borrow_mut()[pages].fill(true);
        self.step();
        Ok(())
    }

    fn open(&self, _: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        self.call()?;
        self.0.protected.borrow_mut()[pages.clone()].fill(false);
        self.wake(0, pages);
        self.step();
        Ok(())
    }

    /// Whoever wakes writes, or goes to sleep again.
    fn wake(&self, _: usize, pages: Range<usize>) {
        let awake: Vec<_> =
            self.0.asleep.borrow_mut().extract_if(.., |(page, _)| pages.contains(page)).collect();
        awake.into_iter().for_each(|(page, _)| run(&self.0, Op::Write(page)));
    }
}

fn world(unit: PageSize) -> Rc<World> {
    let region = GuestRegionMmap::<RegionBitmap>::from_range(
        GuestAddress(FIRST * PAGE_SIZE),
        PAGES * PAGE_SIZE as usize,
        None,
    );
    let slot = WpSlot::simulated(Slot::of_region(0, 0, &region.unwrap()), PageSize::K4);
    let world = Rc::new(World {
        protected: RefCell::new(vec![true; PAGES]),
        contents: RefCell::new(vec![0; PAGES]),
        copy: RefCell::new(vec![0; PAGES]),
        ..World::default()
    });
    *world.harvester.borrow_mut() = Some(Harvester::new(std::slice::from_ref(&slot)));
    *world.record.borrow_mut() = Some(Rc::new(Record::new(SimWp(Rc::clone(&world)), vec![slot], unit)));
    world
}

/// Does `op`, or leaves it when it would have to wait for a turn.
fn run(world: &Rc<World>, op: Op) {
    let record = Rc::clone(world.record.borrow().as_ref().unwrap());
    match op {
        Op::Write(page) => {
            if world.protected.borrow()[page] {
                world.asleep.borrow_mut().push((page, true));
            } else {
                world.contents.borrow_mut()[page] += 1;
            }
        }
        Op::Resolve => {
            if record.turn.try_lock().is_err() {
                return;
            }
            // Each message is delivered once.
            let message = world
                .asleep
                .borrow_mut()
                .iter_mut()
                .find_map(|(page, untold)| std::mem::take(untold).then_some(*page));
            if let Some(page) = message {
                record.resolve(record.slots[0].hva(page) + 0x7f8);
            }
        }
        Op::Harvest => {
            if record.turn.try_lock().is_err() {
                return;
            }
            let Ok(mut harvester) = world.harvester.try_borrow_mut() else { return };
            let harvester = harvester.as_mut().unwrap();
            let before = world.contents.borrow().clone();
            if harvester.collect(&record).is_err() {
                return;
            }
            let harvest = harvester.owed.lend();
            let contents = world.contents.borrow();
            let mut copy = world.copy.borrow_mut();
            for gfn in harvest.runs().flat_map(|run| run.iter()) {
                let page = (gfn.0 - FIRST) as usize;
                world
                    .reported_clean
                    .set(world.reported_clean.get() + usize::from(copy[page] == contents[page]));
                copy[page] = contents[page];
            }
            harvest.commit();
            // This may have been the last harvest, with all vCPUs stopped.
            assert!(before.iter().zip(&*copy).all(|(before, copy)| before <= copy), "a write is missing");
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    // Few different pages, some of them in the same block.
    let page = prop::sample::select(vec![0usize, 1, 63, 64, 255, 256, 300, 800, PAGES - 1]);
    prop_oneof![
        3 => page.prop_map(Op::Write),
        3 => Just(Op::Resolve),
        2 => Just(Op::Harvest),
    ]
}

fn break_link(world: &Rc<World>) {
    *world.record.borrow_mut() = None;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_write_is_lost_whatever_comes_in_between(
        ops in prop::collection::vec((op(), prop::option::of((0..4usize, op()))), 1..30),
        fails_in in prop::option::weighted(0.2, 0..40usize),
        blocks in any::<bool>(),
    ) {
        let world = world(if blocks { PageSize::M2 } else { PageSize::K4 });
        world.fails_in.set(fails_in);
        for (op, intruder) in ops {
            world.intruder.set(intruder);
            run(&world, op);
            world.intruder.set(None);
        }
        // Everybody gets to write, and then all stand still.
        while !world.asleep.borrow().is_empty() {
            let told = world.asleep.borrow().iter().all(|(_, untold)| !untold);
            prop_assert!(!told, "somebody sleeps and nobody will wake them");
            run(&world, Op::Resolve);
        }
        world.fails_in.set(None);
        run(&world, Op::Harvest);
        run(&world, Op::Harvest);
        prop_assert_eq!(&*world.contents.borrow(), &*world.copy.borrow());
        break_link(&world);
    }
}

/// The vCPUs are stopped in the middle of anything: one harvest is enough to have everything that was written.
#[test]
fn one_harvest_has_all_that_was_written_before_it() {
    for intruder in [Op::Harvest, Op::Write(1), Op::Write(2), Op::Resolve] {
        for step in 0..8 {
            for main in [Op::Resolve, Op::Harvest] {
                let world = world(PageSize::M2);
                for page in [0, 300, 800] {
                    run(&world, Op::Write(page));
                }
                run(&world, Op::Resolve);
                world.intruder.set(Some((step, intruder)));
                run(&world, main);
                world.intruder.set(None);
                run(&world, Op::Harvest);
                assert_eq!(
                    *world.contents.borrow(),
                    *world.copy.borrow(),
                    "{main:?}, {intruder:?} after {step}"
                );
                break_link(&world);
            }
        }
    }
}

#[test]
fn a_page_is_reported_once_for_each_epoch_it_is_written_in() {
    let world = world(PageSize::K4);
    for _ in 0..5 {
        for page in [0, 64, PAGES - 1] {
            run(&world, Op::Write(page));
            run(&world, Op::Resolve);
            run(&world, Op::Write(page));
        }
        run(&world, Op::Harvest);
        run(&world, Op::Harvest);
    }
    assert_eq!(world.reported_clean.get(), 0);
    assert_eq!(*world.contents.borrow(), *world.copy.borrow());
    break_link(&world);
}

#[test]
fn what_is_noted_crosses_parts() {
    let part = |pages: Range<usize>| Part { written: DirtyBitmap::new(pages.len()), pages };
    let world = world(PageSize::K4);
    let mut record = Rc::into_inner(world.record.take().unwrap()).unwrap();
    record.parts[0] = vec![part(0..100), part(100..600), part(600..PAGES)];
    for (pages, counts) in
        [(0..1, [1, 0, 0]), (99..101, [1, 1, 0]), (50..700, [50, 500, 100]), (600..601, [0, 0, 1])]
    {
        record.note(0, &pages);
        let found: Vec<_> = record.parts[0].iter().map(|part| part.written.count()).collect();
        assert_eq!(found, counts, "{pages:?}");
        record.clear();
    }
}
