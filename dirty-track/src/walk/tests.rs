//! The contract, rule by rule.

use std::cell::RefCell;
use std::convert::Infallible;

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
            step(entry)
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
            handled.borrow_mut().push(Told::Huge(entry.pages.clone(), entry.size));
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
fn what_is_split_after_it_was_handled_is_not_visited_again() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::M2, Entry::CLEAN)]);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |entry| {
        if entry.start() == 0 {
            sim.split_at(0).unwrap();
        }
        Ok(Step::Handled)
    });
    assert_eq!(outcome, Ok(()));
    assert_eq!(told, [0, BLOCK].map(|start| Told::Huge(start..start + BLOCK, PageSize::M2)));
}

#[test]
fn what_is_zapped_before_it_was_handled_is_looked_at_again() {
    let sim = sim(&[(0, PageSize::K4, Entry::DIRTY), (1, PageSize::K4, Entry::DIRTY)]);
    let told = RefCell::new(Vec::new());
    let outcome = Walk::new(&sim)
        .leaves(|pages, _| {
            told.borrow_mut().push(Told::Leaves(pages));
            // It did the first and found that the second is gone.
            sim.zap(1);
            Ok::<_, Infallible>(Seen::Only(1))
        })
        .holes(|pages| {
            told.borrow_mut().push(Told::Hole(pages));
            Ok(Seen::All)
        })
        .run(0..2);
    assert_eq!(outcome, Ok(()));
    assert_eq!(told.into_inner(), [Told::Leaves(0..2), Told::Hole(1..2)]);
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

type Race = fn(&Sim);

#[test]
fn a_split_that_lost_its_race_is_no_error() {
    let huge = Told::Huge(0..BLOCK, PageSize::M2);
    let races: [(Race, &[Told]); 4] = [
        (|sim| sim.split_at(0).unwrap(), &[huge.clone(), Told::Leaves(0..BLOCK)]),
        (|sim| assert!(sim.zap(0).is_some()), &[huge.clone(), Told::Hole(0..BLOCK)]),
        (
            |sim| sim.map(0, PageSize::M2, Entry::DIRTY).unwrap(),
            &[huge.clone(), huge.clone(), Told::Leaves(0..BLOCK)],
        ),
        (
            |sim| sim.map(0, PageSize::G1, Entry::CLEAN).unwrap(),
            &[huge.clone(), Told::Huge(0..BLOCK, PageSize::G1), huge.clone(), Told::Leaves(0..BLOCK)],
        ),
    ];
    for (race, then) in races {
        let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
        let mut raced = false;
        let (told, outcome) = tell(&sim, 0..BLOCK, |_| {
            if !raced {
                race(&sim);
            }
            raced = true;
            Ok(Step::Descend(Split))
        });
        assert_eq!(outcome, Ok(()));
        assert_eq!(told, then);
    }
}

#[test]
fn a_split_that_lost_its_race_takes_no_memory() {
    let races: [Race; 2] = [|sim| sim.split_at(0).unwrap(), |sim| assert!(sim.zap(0).is_some())];
    for race in races {
        let sim = sim(&[(0, PageSize::M2, Entry::CLEAN)]);
        let (_, outcome) = tell(&sim, 0..BLOCK, |_| {
            race(&sim);
            sim.limit_memory(0);
            Ok(Step::Descend(Split))
        });
        assert_eq!(outcome, Ok(()));
    }
}

/// A table on which something happens right before its first split or its first change.
struct Raced<'s>(&'s Sim, std::cell::Cell<Option<Race>>);

impl Raced<'_> {
    fn race(&self) {
        if let Some(race) = self.1.take() {
            race(self.0);
        }
    }
}

impl Table for Raced<'_> {
    type Huge = Entry;
    type Leaf = Entry;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Entry, Entry>, Infallible> {
        self.0.look(pages)
    }

    fn split(&self, seen: &HugeEntry<Entry>, how: Split) -> Result<(), OutOfMemory> {
        self.race();
        self.0.split(seen, how)
    }
}

impl Protect for Raced<'_> {
    fn change_huge(&self, seen: &HugeEntry<Entry>, change: Change) -> Result<bool, OutOfMemory> {
        self.race();
        self.0.change_huge(seen, change)
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> Result<u64, OutOfMemory> {
        self.race();
        self.0.change_leaves(pages, seen, change)
    }
}

#[test]
fn a_huge_entry_that_came_in_place_of_another_is_not_split_for_it() {
    let sim = sim(&[(0, PageSize::M2, Entry::WRITABLE)]);
    let race: Race = |sim| sim.map(0, PageSize::M2, Entry::CLEAN).unwrap();
    // The writable one had to be split: only a part of it is to be protected. The clean one need not.
    assert_eq!(write_protect(&Raced(&sim, Some(race).into()), 5..9), Ok(0));
    assert_eq!(sim.entry(5), Some((PageSize::M2, Entry::CLEAN)));
}

#[test]
fn an_entry_of_another_size_is_not_the_one_that_was_seen() {
    let sim = sim(&[(0, PageSize::G1, Entry::DIRTY)]);
    let race: Race = |sim| sim.split_at(0).unwrap();
    // Flag by flag the block of page 0 is what the GiB was. Who takes it for that leaves 511 blocks dirty.
    let mut dirty = Dirty::default();
    assert_eq!(clean_and_record(&Raced(&sim, Some(race).into()), 0..GIGA, &mut dirty), Ok(()));
    assert_eq!(dirty.runs(), [0..GIGA]);
    for block in 0..GIGA / BLOCK {
        assert_eq!(sim.entry(block * BLOCK), Some((PageSize::M2, Entry { dirty: false, ..Entry::DIRTY })));
    }
}

#[test]
fn what_changes_before_it_is_cleaned_is_looked_at_again() {
    let races: [(Race, &[Range<u64>]); 3] = [
        (|sim| sim.zap(0).map(|_| ()).unwrap(), &[]),
        (|sim| sim.split_at(0).unwrap(), &[0..BLOCK]),
        (
            |sim| {
                sim.map(0, PageSize::M2, Entry::CLEAN).unwrap();
                sim.write(7).unwrap();
            },
            &[7..8],
        ),
    ];
    for (race, recorded) in races {
        let sim = sim(&[(0, PageSize::M2, Entry::DIRTY)]);
        let mut dirty = Dirty::default();
        assert_eq!(clean_and_record(&Raced(&sim, Some(race).into()), 0..BLOCK, &mut dirty), Ok(()));
        assert_eq!(dirty.runs(), recorded);
        assert!(!(0..BLOCK).any(|page| sim.entry(page).is_some_and(|(_, entry)| entry.dirty)));
    }
}

#[test]
fn running_out_of_memory_is_reported_as_that_and_leaves_the_entry_whole() {
    let sim = sim(&[(0, PageSize::M2, Entry::CLEAN), (BLOCK, PageSize::M2, Entry::DIRTY)]);
    sim.limit_memory(1);
    let (told, outcome) = tell(&sim, 0..2 * BLOCK, |_| Ok(Step::Descend(Split)));
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: BLOCK }));
    assert!(told.contains(&Told::Leaves(0..BLOCK)), "all pages before it are handled");
    assert_eq!(sim.entry(BLOCK), Some((PageSize::M2, Entry::DIRTY)));

    sim.map(0, PageSize::G1, Entry::DIRTY).unwrap();
    let (_, outcome) = tell(&sim, 5..6, |_| Ok(Step::Descend(Split)));
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: 5 }));
    assert_eq!(sim.entry(5), Some((PageSize::G1, Entry::DIRTY)));
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("page 0x5 ") && text.contains("memory"), "{text}");
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
fn a_walk_that_only_reads_splits_nothing() {
    let sim = sim(&[(0, PageSize::M2, Entry::DIRTY), (BLOCK, PageSize::K4, Entry::DIRTY)]);
    sim.limit_memory(0);
    let mut leaves = Vec::new();
    let outcome = Walk::new(&sim)
        .huge(|_| Ok::<_, Infallible>(Step::Handled))
        .leaves(|pages, _| {
            leaves.push(pages);
            Ok(Seen::All)
        })
        .run(0..2 * BLOCK);
    assert_eq!(outcome, Ok(()));
    assert_eq!(leaves, [BLOCK..BLOCK + 1], "leaves that are there are visited, and no other");
    assert_eq!(size_at(&sim, 0), Some(PageSize::M2));
}

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
    assert_eq!(outcome, Err(WalkError::OutOfMemory { page: BLOCK }));
    assert_eq!(dirty.runs(), [0..BLOCK]);
    assert_eq!(sim.entry(BLOCK), Some((PageSize::M2, Entry::DIRTY)), "nothing of it is lost");
}
