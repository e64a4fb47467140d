//! The turns, held against a model: at every step of whatever is under way, something else comes in between. What
//! has to wait for a turn waits; everything else happens. Nobody may ever have an old copy after a harvest.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::addr::PAGE_SIZE;
use crate::tracker::sim::{Extent, Layout, Page, Wish, check_change};

/// Two blocks and a bit, and it begins in the middle of one; and a slot besides.
const LAYOUT: Layout = Layout { ids: &[7, 3], sizes: &[1100, 70] };
const PAGES: usize = LAYOUT.sizes[0];

/// What may happen at any time.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// A vCPU writes, or goes to sleep at the page.
    Write(Page),
    /// The handler serves one sleeper.
    Resolve,
    /// A harvest, copying and committing.
    Harvest,
    /// Other slots, or other pages of them; what is new is copied.
    SetSlots([Wish; 2]),
}

/// One number for each page of each slot.
type Pages<T> = RefCell<Vec<Vec<T>>>;

fn pages<T: Clone>(value: T) -> Pages<T> {
    RefCell::new(LAYOUT.sizes.iter().map(|&pages| vec![value.clone(); pages]).collect())
}

struct World {
    /// All there are, tracked or not.
    slots: Vec<Slot>,
    registered: Pages<bool>,
    protected: Pages<bool>,
    contents: Pages<u32>,
    copy: Pages<u32>,
    /// Pages that a vCPU sleeps at, and whether the handler has yet to be told so.
    asleep: RefCell<Vec<(Page, bool)>>,
    record: RefCell<Option<Rc<Record<SimWp>>>>,
    harvester: RefCell<Harvester>,
    /// What comes in between, and after how many more steps.
    intruder: Cell<Option<(usize, Op)>>,
    fails_in: Cell<Option<usize>>,
    /// Pages reported that had not been written, and harvests that failed.
    reported_clean: Cell<usize>,
    failed: Cell<usize>,
}

impl World {
    fn tracked(harvester: &Harvester) -> Extent {
        LAYOUT.tracked(harvester.slots.iter().map(WpSlot::slot))
    }

    /// Whether the copy of what is tracked has all of `contents`, or, if it is to be `newest`, is equal.
    fn has_all(&self, tracked: &Extent, contents: &[Vec<u32>], newest: bool) -> bool {
        let copy = self.copy.borrow();
        tracked.0.iter().all(|(slot, run)| {
            let mut both = contents[*slot][run.clone()].iter().zip(&copy[*slot][run.clone()]);
            both.all(|(contents, copy)| contents == copy || contents < copy && !newest)
        })
    }
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
    fn register(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        self.call()?;
        self.0.registered.borrow_mut()[LAYOUT.index(slot.slot())][pages].fill(true);
        self.step();
        Ok(())
    }

    fn unregister(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        self.call()?;
        let slot = LAYOUT.index(slot.slot());
        self.0.registered.borrow_mut()[slot][pages.clone()].fill(false);
        self.0.protected.borrow_mut()[slot][pages].fill(false);
        self.step();
        Ok(())
    }

    fn protect(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        self.change(slot, pages, true)
    }

    fn open(&self, slot: &WpSlot, pages: Range<usize>) -> Result<(), errno::Error> {
        self.change(slot, pages.clone(), false)?;
        self.wake(slot, pages);
        self.step();
        Ok(())
    }

    /// Whoever wakes writes, or goes to sleep again.
    fn wake(&self, slot: &WpSlot, pages: Range<usize>) {
        let slot = LAYOUT.index(slot.slot());
        let here = |page: &Page| page.0 == slot && pages.contains(&page.1);
        let awake: Vec<_> = self.0.asleep.borrow_mut().extract_if(.., |(page, _)| here(page)).collect();
        awake.into_iter().for_each(|(page, _)| run(&self.0, Op::Write(page)));
    }
}

impl SimWp {
    fn change(&self, slot: &WpSlot, pages: Range<usize>, protect: bool) -> Result<(), errno::Error> {
        self.call()?;
        let slot = LAYOUT.index(slot.slot());
        if self.0.registered.borrow()[slot][pages.clone()].contains(&false) {
            return Err(errno::Error::new(libc::ENOENT));
        }
        self.0.protected.borrow_mut()[slot][pages].fill(protect);
        if protect {
            self.step();
        }
        Ok(())
    }
}

fn simulated(slots: &[Slot]) -> Vec<WpSlot> {
    slots.iter().map(|slot| WpSlot::simulated(slot.clone(), PageSize::K4)).collect()
}

/// Everything is tracked, and protected.
fn world(unit: PageSize) -> Rc<World> {
    let slots = LAYOUT.slots();
    let tracked = simulated(&slots);
    let world = Rc::new(World {
        registered: pages(true),
        protected: pages(true),
        contents: pages(0),
        copy: pages(0),
        asleep: RefCell::default(),
        record: RefCell::default(),
        harvester: RefCell::new(Harvester::new(tracked.clone())),
        intruder: Cell::default(),
        fails_in: Cell::default(),
        reported_clean: Cell::default(),
        failed: Cell::default(),
        slots,
    });
    let record = Record::new(SimWp(Rc::clone(&world)), unit);
    record.set_slots(&tracked);
    *world.record.borrow_mut() = Some(Rc::new(record));
    world
}

/// Does `op`, or leaves it when it would have to wait for a turn.
fn run(world: &Rc<World>, op: Op) {
    let record = Rc::clone(world.record.borrow().as_ref().unwrap());
    if let Op::Write(page) = op {
        let (slot, index) = page;
        if world.protected.borrow()[slot][index] {
            world.asleep.borrow_mut().push((page, true));
        } else {
            world.contents.borrow_mut()[slot][index] += 1;
        }
        return;
    }
    if record.turn.try_lock().is_err() {
        return;
    }
    match op {
        Op::Write(_) => {}
        Op::Resolve => {
            // Each message is delivered once.
            let message = world
                .asleep
                .borrow_mut()
                .iter_mut()
                .find_map(|(page, untold)| std::mem::take(untold).then_some(*page));
            if let Some((slot, page)) = message {
                record.resolve(world.slots[slot].hva() + (page as u64 * PAGE_SIZE) + 0x7f8);
            }
        }
        Op::Harvest => {
            let Ok(mut harvester) = world.harvester.try_borrow_mut() else { return };
            let before = world.contents.borrow().clone();
            if harvester.collect(&record).is_err() {
                world.failed.set(world.failed.get() + 1);
                return;
            }
            let tracked = World::tracked(&harvester);
            let harvest = harvester.owed.lend();
            for (slot, page) in LAYOUT.pages(harvest.runs()) {
                assert!(tracked.has((slot, page)), "not asked for");
                let contents = world.contents.borrow()[slot][page];
                let copied = std::mem::replace(&mut world.copy.borrow_mut()[slot][page], contents);
                world.reported_clean.set(world.reported_clean.get() + usize::from(copied == contents));
            }
            harvest.commit();
            // This may have been the last harvest, with all vCPUs stopped.
            assert!(world.has_all(&tracked, &before, false), "a write is missing");
        }
        Op::SetSlots(wish) => {
            let Ok(mut harvester) = world.harvester.try_borrow_mut() else { return };
            let before = World::tracked(&harvester);
            let wished = LAYOUT.wished(&world.slots, &wish);
            let outcome = harvester.set_slots(&record, simulated(&wished));
            let now = World::tracked(&harvester);
            check_change(&outcome, &before, &LAYOUT.tracked(&wished), &now).unwrap();
            for (slot, run) in now.minus(&before).0 {
                let contents = &world.contents.borrow()[slot][run.clone()];
                world.copy.borrow_mut()[slot][run].copy_from_slice(contents);
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    // Few different pages, some of them in the same block.
    let page = prop::sample::select(vec![0usize, 1, 63, 64, 255, 256, 300, 800, PAGES - 1]);
    let wish = prop::sample::select(vec![
        Wish::Nothing,
        Wish::All,
        Wish::All,
        Wish::Ends(15, 0),
        Wish::Ends(60, 60),
        Wish::Ends(0, 150),
    ]);
    prop_oneof![
        3 => (prop::bool::weighted(0.2), page).prop_map(|(other, page)| {
            Op::Write(if other { (1, page % LAYOUT.sizes[1]) } else { (0, page) })
        }),
        3 => Just(Op::Resolve),
        2 => Just(Op::Harvest),
        1 => (wish.clone(), wish).prop_map(|(one, other)| Op::SetSlots([one, other])),
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
        world.failed.set(0);
        run(&world, Op::Harvest);
        run(&world, Op::Harvest);
        prop_assert_eq!(world.failed.get(), 0);
        let tracked = World::tracked(&world.harvester.borrow());
        prop_assert!(world.has_all(&tracked, &world.contents.borrow(), true));
        break_link(&world);
    }
}

/// The vCPUs are stopped in the middle of anything: one harvest is enough to have everything that was written.
#[test]
fn one_harvest_has_all_that_was_written_before_it() {
    let others = Op::SetSlots([Wish::Ends(80, 80), Wish::Nothing]);
    for intruder in [Op::Harvest, Op::Write((0, 1)), Op::Write((0, 2)), Op::Resolve, others] {
        for step in 0..8 {
            for main in [Op::Resolve, Op::Harvest] {
                let world = world(PageSize::M2);
                for page in [0, 300, 800] {
                    run(&world, Op::Write((0, page)));
                }
                run(&world, Op::Resolve);
                world.intruder.set(Some((step, intruder)));
                run(&world, main);
                world.intruder.set(None);
                run(&world, Op::Harvest);
                let tracked = World::tracked(&world.harvester.borrow());
                let all = world.has_all(&tracked, &world.contents.borrow(), true);
                assert!(all, "{main:?}, {intruder:?} after {step}");
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
            run(&world, Op::Write((0, page)));
            run(&world, Op::Resolve);
            run(&world, Op::Write((0, page)));
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
    let mut opened = Opened::new(&simulated(&LAYOUT.slots())[0]);
    opened.parts = vec![part(0..100), part(100..600), part(600..PAGES)];
    let counts = |opened: &Opened| opened.parts.iter().map(|part| part.written.count()).collect::<Vec<_>>();
    for (pages, noted) in
        [(0..1, [1, 0, 0]), (99..101, [1, 1, 0]), (50..700, [50, 500, 100]), (600..601, [0, 0, 1])]
    {
        opened.note(&pages);
        assert_eq!(counts(&opened), noted, "{pages:?}");
        opened.parts.iter().for_each(|part| part.written.clear_range(0..part.pages.len()));
    }
    opened.note(&(0..PAGES));
    opened.slot = opened.slot.choosing(Chosen::of(&[90..101, 500..501, 599..PAGES], PAGES));
    opened.forget_others();
    assert_eq!(counts(&opened), [10, 3, PAGES - 600]);
}
