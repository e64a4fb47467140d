//! The contract, rule by rule, and then all of it against a naive table, with others' changes between any two steps
//! of the walker.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;

use proptest::prelude::*;

use super::sim::{Entry, Sim};
use super::*;
use crate::addr::LEAVES_PER_BLOCK;

const BLOCK: u64 = LEAVES_PER_BLOCK;
const GIGA: u64 = PageSize::G1.leaves();

fn sim(entries: &[(u64, PageSize, Entry)]) -> Sim {
    let sim = Sim::new(2);
    entries.iter().for_each(|&(page, size, entry)| sim.map(page, size, entry).unwrap());
    sim
}

fn size_at(sim: &Sim, page: u64) -> Option<PageSize> {
    sim.entry(page).map(|(size, _)| size)
}

/// What a visitor was told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Huge(Range<u64>, PageSize),
    Leaves(Range<u64>),
    Hole(Range<u64>),
}

/// Walks with all three callbacks; `step` decides at huge entries.
fn tell(
    sim: &Sim,
    pages: Range<u64>,
    mut step: impl FnMut(&HugeEntry<Entry>) -> Result<Step<Split>, &'static str>,
) -> (Vec<Told>, Result<(), WalkError<&'static str, Infallible>>) {
    let told = RefCell::new(Vec::new());
    let outcome = Walk::new(sim)
        .huge(|entry| {
            told.borrow_mut().push(Told::Huge(entry.pages.clone(), entry.size));
            step(&entry)
        })
        .leaves(|pages, _| {
            told.borrow_mut().push(Told::Leaves(pages));
            Ok(Seen::All)
        })
        .holes(|pages| {
            told.borrow_mut().push(Told::Hole(pages));
            Ok(Seen::All)
        })
        .run(pages);
    (told.into_inner(), outcome)
}

// Rule 1.

#[test]
fn each_kind_of_entry_has_its_callback() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK + 3, PageSize::K4, Entry::DIRTY)]);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |_| Ok(Step::Handled));
    assert_eq!(outcome, Ok(()));
    assert_eq!(
        told,
        [
            Told::Huge(0..BLOCK, PageSize::M2),
            Told::Hole(BLOCK..BLOCK + 3),
            Told::Leaves(BLOCK + 3..BLOCK + 4),
            Told::Hole(BLOCK + 4..2 * BLOCK),
        ]
    );
}

#[test]
fn what_has_no_callback_is_passed_over() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::K4, Entry::CLEAN)]);
    let mut holes = Vec::new();
    let outcome = Walk::new(&sim)
        .holes(|pages| {
            holes.push(pages);
            Ok::<_, Infallible>(Seen::All)
        })
        .run(0..2 * BLOCK);
    assert_eq!(outcome, Ok(()));
    assert_eq!(holes, [BLOCK + 1..2 * BLOCK]);
    assert_eq!(size_at(&sim, 0), Some(PageSize::M2), "nobody asked for leaves");
}

#[test]
fn callbacks_get_the_part_of_an_entry_that_is_in_the_range() {
    let sim = sim(&[(0, PageSize::G1, Entry::CLEAN)]);
    let (told, _) = tell(&sim, 700..800, |entry| {
        assert!(!entry.is_whole());
        assert_eq!(entry.start(), 0);
        Ok(Step::Handled)
    });
    assert_eq!(told, [Told::Huge(700..800, PageSize::G1)]);
    let (told, _) = tell(&sim, 9..9, |_| Ok(Step::Handled));
    assert_eq!(told, [], "an empty range");
}

// Rule 2.

#[test]
fn an_error_stops_the_walk() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::M2, Entry::CLEAN)]);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |_| Err("enough"));
    assert_eq!(outcome, Err(WalkError::Visitor("enough")));
    assert_eq!(told.len(), 1);

    let sim = self::sim(&[(0, PageSize::K4, Entry::CLEAN)]);
    let outcome = Walk::new(&sim).leaves(|_, _| Err("enough")).run(0..2);
    assert_eq!(outcome, Err(WalkError::Visitor("enough")));
    let outcome = Walk::new(&sim).holes(|_| Err("enough")).run(0..2);
    assert_eq!(outcome, Err(WalkError::Visitor("enough")));
}

#[test]
fn a_handled_entry_is_not_split_and_its_leaves_are_not_visited() {
    let sim = sim(&[(0, PageSize::G1, Entry::DIRTY), (GIGA, PageSize::M2, Entry::DIRTY)]);
    let (told, _) = tell(&sim, 0..GIGA + BLOCK, |_| Ok(Step::Handled));
    assert_eq!(told, [Told::Huge(0..GIGA, PageSize::G1), Told::Huge(GIGA..GIGA + BLOCK, PageSize::M2)]);
    assert_eq!(size_at(&sim, 0), Some(PageSize::G1));
    assert_eq!(size_at(&sim, GIGA), Some(PageSize::M2));
}

#[test]
fn a_retry_looks_at_the_entry_again() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
    let mut looks = 0;
    let (told, _) = tell(&sim, 0..BLOCK, |_| {
        looks += 1;
        match looks {
            1 => Ok(Step::Retry),
            2 => {
                sim.zap(0);
                Ok(Step::Retry)
            }
            _ => unreachable!("it is a hole by now"),
        }
    });
    let huge = Told::Huge(0..BLOCK, PageSize::M2);
    assert_eq!(told, [huge.clone(), huge, Told::Hole(0..BLOCK)]);
}

// Rule 3. What does not compile is in the documentation of `Walk`.

#[test]
fn descending_splits_level_by_level() {
    let sim = sim(&[(0, PageSize::G1, Entry::WRITABLE)]);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |entry| {
        Ok(if entry.size == PageSize::G1 || entry.pages.start == BLOCK {
            Step::Descend(Split)
        } else {
            Step::Handled
        })
    });
    assert_eq!(outcome, Ok(()));
    assert_eq!(
        told,
        [
            Told::Huge(0..2 * BLOCK, PageSize::G1),
            Told::Huge(0..BLOCK, PageSize::M2),
            Told::Huge(BLOCK..2 * BLOCK, PageSize::M2),
            Told::Leaves(BLOCK..2 * BLOCK),
        ]
    );
    assert_eq!(sim.entry(0), Some((PageSize::M2, Entry::WRITABLE)));
    assert_eq!(sim.entry(BLOCK), Some((PageSize::K4, Entry::WRITABLE)), "it inherits what the entry was");
    assert_eq!(sim.entry(GIGA - 1), Some((PageSize::M2, Entry::WRITABLE)));
}

#[test]
fn descending_splits_also_for_a_visitor_that_has_no_leaf_callback() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
    let outcome = Walk::new(&sim).huge(|_| Ok::<_, Infallible>(Step::Descend(Split))).run(0..BLOCK);
    assert_eq!(outcome, Ok(()));
    assert_eq!(size_at(&sim, 0), Some(PageSize::K4));
}

// Rule 4.

#[test]
fn a_visitor_of_leaves_alone_splits_what_is_huge() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (GIGA, PageSize::G1, Entry::DIRTY)]);
    let mut leaves = Vec::new();
    let outcome = Walk::new(&sim)
        .leaves(|pages, entry| {
            leaves.push((pages, entry));
            Ok::<_, Infallible>(Seen::All)
        })
        .run(0..GIGA + 1);
    assert_eq!(outcome, Ok(()));
    assert_eq!(leaves, [(0..BLOCK, Entry::CLEAN), (GIGA..GIGA + 1, Entry::DIRTY)]);
    assert_eq!(size_at(&sim, GIGA), Some(PageSize::K4));
    assert_eq!(size_at(&sim, GIGA + BLOCK), Some(PageSize::M2), "no more is split than must be");
}

// Rule 5, one change at a time; the properties below and `model` have all the others.

#[test]
fn a_collapse_in_the_middle_hands_out_what_is_left_and_nothing_twice() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (7, PageSize::K4, Entry::DIRTY)]);
    let handled = RefCell::new(Vec::new());
    let outcome = Walk::new(&sim)
        .huge(|entry| {
            assert_eq!(entry.start(), 0);
            assert!(!entry.is_whole());
            handled.borrow_mut().push(Told::Huge(entry.pages, entry.size));
            Ok::<_, Infallible>(Step::Handled)
        })
        .leaves(|pages, entry| {
            if entry.dirty {
                assert!(sim.collapse(0, PageSize::M2));
            }
            handled.borrow_mut().push(Told::Leaves(pages));
            Ok(Seen::All)
        })
        .run(0..BLOCK);
    assert_eq!(outcome, Ok(()));
    let expected = [Told::Leaves(0..7), Told::Leaves(7..8), Told::Huge(8..BLOCK, PageSize::M2)];
    assert_eq!(handled.into_inner(), expected);
}

#[test]
fn a_callback_that_handled_a_part_is_not_given_that_part_again() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
    let mut told = Vec::new();
    let outcome = Walk::new(&sim)
        .leaves(|pages, _| {
            told.push(pages);
            Ok::<_, Infallible>(if told.len() == 1 { Seen::Only(100) } else { Seen::Only(u64::MAX) })
        })
        .run(0..BLOCK);
    assert_eq!(outcome, Ok(()));
    assert_eq!(told, [0..BLOCK, 100..BLOCK]);
}

// Rule 6.

#[test]
fn a_split_that_lost_its_race_is_no_error() {
    type Race = fn(&Sim);
    // Those who lose need no memory.
    let races: [(Race, u64, Told); 3] = [
        (|sim| sim.split(0, Split).unwrap(), 0, Told::Leaves(0..BLOCK)),
        (|sim| assert!(sim.zap(0).is_some()), 0, Told::Hole(0..BLOCK)),
        (|sim| sim.map(0, PageSize::M2, Entry::DIRTY).unwrap(), 1, Told::Leaves(0..BLOCK)),
    ];
    for (race, tables, then) in races {
        let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
        let (told, outcome) = tell(&sim, 0..BLOCK, |_| {
            race(&sim);
            sim.limit_memory(tables);
            Ok(Step::Descend(Split))
        });
        assert_eq!(outcome, Ok(()));
        assert_eq!(told.last(), Some(&then));
    }
}

#[test]
fn running_out_of_memory_is_reported_as_that_and_leaves_the_entry_whole() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::M2, Entry::DIRTY)]);
    sim.limit_memory(1);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |_| Ok(Step::Descend(Split)));
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: BLOCK, size: PageSize::M2 }));
    assert!(told.contains(&Told::Leaves(0..BLOCK)), "all pages before it are handled");
    assert_eq!(sim.entry(BLOCK), Some((PageSize::M2, Entry::DIRTY)));

    sim.map(0, PageSize::G1, Entry::DIRTY).unwrap();
    let (_, outcome) = tell(&sim, 5..6, |_| Ok(Step::Descend(Split)));
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: 5, size: PageSize::G1 }));
    assert_eq!(sim.entry(5), Some((PageSize::G1, Entry::DIRTY)));
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("1G") && text.contains("memory"), "{text}");
}

// Rule 7.

#[test]
fn the_zero_page_is_split_like_any_other() {
    let sim = sim(&[(0, PageSize::M2, Entry::ZERO)]);
    let (told, outcome) = tell(&sim, 0..BLOCK, |_| Ok(Step::Descend(Split)));
    assert_eq!(outcome, Ok(()));
    assert_eq!(told, [Told::Huge(0..BLOCK, PageSize::M2), Told::Leaves(0..BLOCK)]);
    assert_eq!(sim.entry(0), Some((PageSize::K4, Entry::ZERO)));

    // A write to a huge zero page splits it, and only the page that was written is another one.
    sim.map(0, PageSize::M2, Entry::ZERO).unwrap();
    sim.write(9).unwrap();
    assert_eq!(sim.entry(9), Some((PageSize::K4, Entry::DIRTY)));
    assert_eq!(sim.entry(10), Some((PageSize::K4, Entry::ZERO)));
}

// Rule 8, and the utilities.

#[test]
fn what_is_protected_and_clean_stays_huge() {
    let sim = sim(&[
        (0, PageSize::M2, Entry::CLEAN),
        (BLOCK, PageSize::M2, Entry::ZERO),
        (GIGA, PageSize::G1, Entry::CLEAN),
    ]);
    sim.limit_memory(0);
    let mut dirty = Dirty::default();
    // Parts of entries, where protecting or cleaning anything would take a split, and there is no memory for one.
    for pages in [5..6, 0..2 * BLOCK, 0..GIGA + 3] {
        assert_eq!(write_protect(&sim, pages.clone()), Ok(0));
        assert_eq!(clean_and_record(&sim, pages, &mut dirty), Ok(()));
    }
    assert_eq!(dirty.bounds(), None);
    assert_eq!(size_at(&sim, 0), Some(PageSize::M2));
}

#[test]
fn a_whole_huge_entry_is_protected_and_cleaned_as_one() {
    let sim = sim(&[(0, PageSize::M2, Entry::DIRTY), (GIGA, PageSize::G1, Entry::DIRTY)]);
    sim.limit_memory(0);
    assert_eq!(write_protect(&sim, sim.pages()), Ok(BLOCK + GIGA));
    assert_eq!(sim.entry(0), Some((PageSize::M2, Entry { dirty: true, ..Entry::CLEAN })));
    let mut dirty = Dirty::default();
    assert_eq!(clean_and_record(&sim, sim.pages(), &mut dirty), Ok(()));
    assert_eq!(dirty.runs(), [0..BLOCK, GIGA..2 * GIGA]);
    assert_eq!(dirty.bounds(), Some(0..2 * GIGA));
    assert_eq!(dirty.pages(), BLOCK + GIGA);
    assert_eq!(sim.entry(GIGA), Some((PageSize::G1, Entry::CLEAN)));
}

#[test]
fn bounds_are_tight() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::M2, Entry::WRITABLE)]);
    for page in [17, 18, 40, BLOCK + 9] {
        sim.map(page, PageSize::K4, Entry::DIRTY).unwrap();
    }
    let mut dirty = Dirty::default();
    clean_and_record(&sim, 0..BLOCK + 10, &mut dirty).unwrap();
    assert_eq!(dirty.bounds(), Some(17..BLOCK + 10));
    assert_eq!(dirty.runs(), [17..19, 40..41, BLOCK + 9..BLOCK + 10]);
    // A second walk finds nothing more, and one over lower addresses does not disturb the bounds.
    clean_and_record(&sim, 0..2 * BLOCK, &mut dirty).unwrap();
    sim.write(3).unwrap();
    clean_and_record(&sim, 0..2 * BLOCK, &mut dirty).unwrap();
    assert_eq!(dirty.bounds(), Some(3..BLOCK + 10));
}

#[test]
fn what_was_cleaned_before_memory_ran_out_is_recorded() {
    let sim = sim(&[(0, PageSize::M2, Entry::DIRTY), (BLOCK, PageSize::M2, Entry::DIRTY)]);
    sim.limit_memory(0);
    let mut dirty = Dirty::default();
    let outcome = clean_and_record(&sim, 0..BLOCK + 5, &mut dirty);
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: BLOCK, size: PageSize::M2 }));
    assert_eq!(dirty.runs(), [0..BLOCK]);
    assert_eq!(sim.entry(BLOCK), Some((PageSize::M2, Entry::DIRTY)), "nothing of it is lost");
}

// All of it, against a naive table.

/// Pages that the properties look at: three blocks.
const PAGES: u64 = 3 * BLOCK;

#[derive(Clone, Debug)]
enum Op {
    Map(u64, PageSize, Entry),
    Zap(u64),
    Split(u64),
    Collapse(u64),
    Write(u64),
}

/// The table page by page.
#[derive(Clone, Debug, PartialEq)]
struct Naive(Vec<Option<(PageSize, Entry)>>);

impl Naive {
    fn new() -> Naive {
        Naive(vec![None; PAGES as usize])
    }

    fn block(&mut self, page: u64) -> &mut [Option<(PageSize, Entry)>] {
        let start = (page - page % BLOCK) as usize;
        &mut self.0[start..start + BLOCK as usize]
    }

    fn split(&mut self, page: u64) {
        self.block(page).iter_mut().flatten().for_each(|(size, _)| *size = PageSize::K4);
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Map(page, PageSize::K4, entry) => {
                self.split(page);
                self.0[page as usize] = Some((PageSize::K4, entry));
            }
            Op::Map(page, size, entry) => self.block(page).fill(Some((size, entry))),
            Op::Zap(page) => match self.0[page as usize] {
                Some((PageSize::M2, _)) => self.block(page).fill(None),
                _ => self.0[page as usize] = None,
            },
            Op::Split(page) => self.split(page),
            Op::Collapse(page) => {
                let leaves: Vec<_> = self.block(page).iter().copied().flatten().collect();
                if leaves.len() == BLOCK as usize && leaves[0].0 == PageSize::K4 {
                    let entry = Entry {
                        writable: leaves.iter().all(|(_, entry)| entry.writable),
                        dirty: leaves.iter().any(|(_, entry)| entry.dirty),
                        zero: leaves.iter().all(|(_, entry)| entry.zero),
                    };
                    self.block(page).fill(Some((PageSize::M2, entry)));
                }
            }
            Op::Write(page) => match self.0[page as usize] {
                Some((PageSize::M2, entry)) if entry.writable => {
                    self.block(page).fill(Some((PageSize::M2, Entry::DIRTY)));
                }
                _ => {
                    self.split(page);
                    self.0[page as usize] = Some((PageSize::K4, Entry::DIRTY));
                }
            },
        }
    }
}

fn apply(sim: &Sim, op: &Op) {
    match *op {
        Op::Map(page, size, entry) => sim.map(page, size, entry).unwrap(),
        Op::Zap(page) => _ = sim.zap(page),
        Op::Split(page) => sim.split(page, Split).unwrap(),
        Op::Collapse(page) => _ = sim.collapse(page, PageSize::M2),
        Op::Write(page) => sim.write(page).unwrap(),
    }
}

fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    // Mostly pages that are met often, at the edges of words and blocks.
    let page = prop_oneof![
        3 => prop::sample::select(vec![0, 1, 63, 64, 511, 512, 513, 1000, 1023, 1024, 1100, 1535]),
        1 => 0..PAGES,
    ];
    let entry = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.1))
        .prop_map(|(writable, dirty, zero)| Entry { writable, dirty, zero });
    let size = prop_oneof![Just(PageSize::K4), Just(PageSize::M2)];
    let op = prop_oneof![
        3 => (page.clone(), size, entry).prop_map(|(page, size, entry)| Op::Map(page, size, entry)),
        1 => page.clone().prop_map(Op::Zap),
        1 => page.clone().prop_map(Op::Split),
        2 => page.clone().prop_map(Op::Collapse),
        3 => page.prop_map(Op::Write),
    ];
    prop::collection::vec(op, 0..most)
}

/// The simulated table with a naive one beside it, and others who change both before every call of the walker's.
struct Racing<'s> {
    sim: &'s Sim,
    naive: RefCell<Naive>,
    racing: RefCell<VecDeque<Op>>,
    /// Pages that racing changes may have made dirty or writable.
    touched: RefCell<BTreeSet<u64>>,
    /// The range that is walked over: nothing else may be changed.
    pages: Range<u64>,
    /// Pages that the walker changed, in order.
    changed: RefCell<Vec<u64>>,
    splits: Cell<usize>,
}

impl<'s> Racing<'s> {
    fn new(sim: &'s Sim, before: &[Op], racing: &[Op], pages: Range<u64>) -> Racing<'s> {
        let mut naive = Naive::new();
        for op in before {
            naive.apply(op);
            apply(sim, op);
        }
        Racing {
            sim,
            naive: RefCell::new(naive),
            racing: RefCell::new(racing.iter().cloned().collect()),
            touched: RefCell::default(),
            pages,
            changed: RefCell::default(),
            splits: Cell::new(0),
        }
    }

    fn race(&self) {
        let Some(op) = self.racing.borrow_mut().pop_front() else { return };
        apply(self.sim, &op);
        let mut naive = self.naive.borrow_mut();
        let before = naive.clone();
        naive.apply(&op);
        let worse =
            |(page, (now, before)): (u64, (&Option<(PageSize, Entry)>, &Option<(PageSize, Entry)>))| {
                (now.map(|(_, entry)| entry) != before.map(|(_, entry)| entry)).then_some(page)
            };
        self.touched.borrow_mut().extend((0..).zip(naive.0.iter().zip(&before.0)).filter_map(worse));
    }

    fn entry(&self, page: u64) -> Option<(PageSize, Entry)> {
        self.naive.borrow().0[page as usize]
    }

    fn note_change(&self, pages: Range<u64>, size: PageSize, seen: Entry, change: Change) {
        assert!(
            self.pages.start <= pages.start && pages.end <= self.pages.end,
            "{pages:?} are not all in the range"
        );
        for page in pages {
            assert_eq!(self.entry(page), Some((size, seen)), "page {page} was not as seen");
            let mut entry = seen;
            match change {
                Change::Protect => entry.writable = false,
                Change::Clean => entry.dirty = false,
            }
            self.naive.borrow_mut().0[page as usize] = Some((size, entry));
            self.changed.borrow_mut().push(page);
        }
    }

    fn matches(&self) -> bool {
        (0..PAGES).all(|page| self.sim.entry(page) == self.entry(page))
    }
}

impl Table for Racing<'_> {
    type Huge = Entry;
    type Leaf = Entry;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Entry, Entry>, Infallible> {
        self.race();
        self.sim.look(pages)
    }

    fn split(&self, page: u64, how: Split) -> Result<(), OutOfMemory> {
        self.race();
        self.naive.borrow_mut().split(page);
        self.splits.set(self.splits.get() + 1);
        self.sim.split(page, how)
    }
}

impl Protect for Racing<'_> {
    fn change_huge(&self, page: u64, seen: Entry, change: Change) -> bool {
        self.race();
        let changed = self.sim.change_huge(page, seen, change);
        if changed {
            let start = page - page % BLOCK;
            self.note_change(start..start + BLOCK, PageSize::M2, seen, change);
        }
        changed
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> u64 {
        self.race();
        let changed = self.sim.change_leaves(pages.clone(), seen, change);
        self.note_change(pages.start..pages.start + changed, PageSize::K4, seen, change);
        changed
    }
}

fn range() -> impl Strategy<Value = Range<u64>> {
    let edge = prop_oneof![prop::sample::select(vec![0, 1, 64, 512, 600, 1024, 1536]), 0..=PAGES];
    (edge.clone(), edge).prop_map(|(a, b)| a.min(b)..a.max(b))
}

proptest! {
    #[test]
    fn the_simulated_table_does_as_the_naive_one(ops in ops(30)) {
        let sim = Sim::new(1);
        let table = Racing::new(&sim, &ops, &[], 0..0);
        prop_assert!(table.matches());
    }

    #[test]
    fn each_page_is_handled_once_as_what_it_is(
        before in ops(12),
        racing in ops(40),
        steps in prop::collection::vec(0..4u8, 40),
        pages in range(),
    ) {
        let sim = Sim::new(1);
        let table = Racing::new(&sim, &before, &racing, pages.clone());
        let mut steps = steps.into_iter();
        let handled = RefCell::new(Vec::new());
        let mut splits = 0;
        // Nothing races between a look and its callback here, so what is told must be what is there.
        let is = |pages: &Range<u64>, entry: Option<(PageSize, Entry)>| {
            pages.clone().all(|page| table.entry(page) == entry)
        };
        let outcome = Walk::new(&table)
            .huge(|entry| {
                assert!(is(&entry.pages, Some((entry.size, entry.huge))));
                Ok::<_, Infallible>(match steps.next() {
                    Some(0) => Step::Retry,
                    Some(1 | 2) => {
                        splits += 1;
                        Step::Descend(Split)
                    }
                    _ => {
                        handled.borrow_mut().extend(entry.pages);
                        Step::Handled
                    }
                })
            })
            .leaves(|pages, leaf| {
                assert!(is(&pages, Some((PageSize::K4, leaf))));
                let some = pages.start..pages.end.min(pages.start + 100);
                handled.borrow_mut().extend(some.clone());
                Ok(Seen::Only(some.end - some.start))
            })
            .holes(|pages| {
                assert!(is(&pages, None));
                handled.borrow_mut().extend(pages);
                Ok(Seen::All)
            })
            .run(pages.clone());
        prop_assert_eq!(outcome, Ok(()));
        prop_assert_eq!(handled.into_inner(), pages.collect::<Vec<_>>());
        prop_assert_eq!(table.splits.get(), splits, "one split for each descent");
        prop_assert!(table.matches());
    }

    #[test]
    fn clean_and_record_takes_what_was_dirty(before in ops(12), racing in ops(12), pages in range()) {
        let sim = Sim::new(1);
        let table = Racing::new(&sim, &before, &racing, pages.clone());
        let was: Vec<_> = pages
            .clone()
            .filter(|&page| table.entry(page).is_some_and(|(_, entry)| entry.dirty))
            .collect();
        let mut dirty = Dirty::default();
        prop_assert_eq!(clean_and_record(&table, pages.clone(), &mut dirty), Ok(()));

        let recorded: Vec<_> = dirty.runs().iter().cloned().flatten().collect();
        prop_assert_eq!(&recorded, &*table.changed.borrow(), "recorded is what was cleaned, once");
        prop_assert!(dirty.runs().windows(2).all(|runs| runs[0].end < runs[1].start), "runs do not touch");
        prop_assert!(table.matches());
        let touched = table.touched.borrow();
        for page in pages {
            let still = table.entry(page).is_some_and(|(_, entry)| entry.dirty);
            prop_assert!(!still || touched.contains(&page), "page {} was left dirty", page);
            if !touched.contains(&page) {
                prop_assert_eq!(recorded.binary_search(&page).is_ok(), was.binary_search(&page).is_ok());
            }
        }
    }

    #[test]
    fn write_protect_protects_the_range(before in ops(12), racing in ops(12), pages in range()) {
        let sim = Sim::new(1);
        let table = Racing::new(&sim, &before, &racing, pages.clone());
        let protected = write_protect(&table, pages.clone());
        prop_assert_eq!(protected, Ok(table.changed.borrow().len() as u64));
        prop_assert!(table.matches());
        let touched = table.touched.borrow();
        for page in pages {
            let writable = table.entry(page).is_some_and(|(_, entry)| entry.writable);
            prop_assert!(!writable || touched.contains(&page), "page {} was left writable", page);
        }
    }

    #[test]
    fn nothing_is_split_for_nothing(before in ops(12), pages in range()) {
        let sim = Sim::new(1);
        let table = Racing::new(&sim, &before, &[], pages.clone());
        // Only a huge entry that reaches beyond the range and is dirty needs a split: one at each end.
        let cut = |page: u64| !page.is_multiple_of(BLOCK) && !pages.is_empty();
        let dirty_huge = |page: u64| matches!(table.entry(page), Some((PageSize::M2, entry)) if entry.dirty);
        let mut blocks = BTreeSet::new();
        if cut(pages.start) && dirty_huge(pages.start) {
            blocks.insert(pages.start / BLOCK);
        }
        if cut(pages.end) && dirty_huge(pages.end - 1) {
            blocks.insert((pages.end - 1) / BLOCK);
        }
        clean_and_record(&table, pages.clone(), &mut Dirty::default()).unwrap();
        prop_assert_eq!(table.splits.get(), blocks.len());
    }
}
