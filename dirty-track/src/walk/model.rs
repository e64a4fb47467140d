//! The contract under every order of events between a walker and others who change the table (loom tries them all).
//!
//! The properties of `oracle` interleave changes with the walker's steps at chosen points; here the others are threads.
//! Tables that break the rules of [`Table`] and [`Protect`] are run through the same models, which must find them
//! out. Each model is a few entries and a few events, because the orders of these multiply.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use super::sim::{Entry, Giga, Lock, Sim};
use super::*;
use crate::addr::LEAVES_PER_BLOCK;

const BLOCK: u64 = LEAVES_PER_BLOCK;

impl Lock for Mutex<Giga> {
    fn with<R>(&self, action: impl FnOnce(&mut Giga) -> R) -> R {
        action(&mut self.lock().unwrap())
    }
}

type Loomed = Sim<Mutex<Giga>>;

/// What one of the others does.
#[derive(Clone, Copy, Debug)]
enum Op {
    Split(u64),
    Zap(u64),
    Collapse(u64, PageSize),
    Write(u64),
    Map(u64, PageSize, Entry),
}

use Op::{Collapse, Map, Write, Zap};
use PageSize::{G1, K4, M2};

impl Op {
    fn apply(self, sim: &Loomed) {
        match self {
            Op::Split(page) => sim.split_at(page).unwrap(),
            Zap(page) => _ = sim.zap(page),
            Collapse(page, size) => _ = sim.collapse(page, size),
            Write(page) => sim.write(page).unwrap(),
            Map(page, size, entry) => sim.map(page, size, entry).unwrap(),
        }
    }
}

/// How a table breaks the rules.
const CORRECT: u8 = 0;
/// Says that it changed what is not there any more.
const BLIND: u8 = 1;
/// Changes an entry of another size than the one that was seen.
const STRAYS: u8 = 2;
/// A split unmaps the entry before it puts a table there.
const EMPTIES: u8 = 3;
/// A split that finds another at work says that there is no memory.
const LOSES: u8 = 4;

/// A table that breaks the rule `FAULT`.
struct Faulty<const FAULT: u8>(Arc<Loomed>);

impl<const FAULT: u8> Table for Faulty<FAULT> {
    type Huge = Entry;
    type Leaf = Entry;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Entry, Entry>, Infallible> {
        self.0.look(pages)
    }

    fn split(&self, seen: &HugeEntry<Entry>, how: Split) -> Result<(), OutOfMemory> {
        let page = seen.pages.start;
        match FAULT {
            EMPTIES => {
                if let Some((size, entry)) = self.0.zap(page) {
                    self.0.map(page, size, entry)?;
                }
                self.0.split_at(page)
            }
            LOSES if self.0.entry(page) != Some((seen.size, seen.huge)) => Err(OutOfMemory),
            _ => self.0.split(seen, how),
        }
    }
}

impl<const FAULT: u8> Protect for Faulty<FAULT> {
    fn change_huge(&self, seen: &HugeEntry<Entry>, change: Change) -> Result<bool, OutOfMemory> {
        let now = match self.0.entry(seen.pages.start) {
            Some((size, huge)) if FAULT == STRAYS && size != K4 => HugeEntry { size, huge, ..seen.clone() },
            _ => seen.clone(),
        };
        Ok(self.0.change_huge(&now, change)? || FAULT == BLIND)
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> Result<u64, OutOfMemory> {
        let changed = self.0.change_leaves(pages.clone(), seen, change)?;
        Ok(if FAULT == BLIND { pages.end - pages.start } else { changed })
    }
}

/// Runs `walk` over a table that first has `before` and that others work on meanwhile, each with its list; then what
/// `walk` returned.
fn model<const FAULT: u8, const OTHERS: usize>(
    before: &'static [Op],
    others: [&'static [Op]; OTHERS],
    walk: impl Fn(&Faulty<FAULT>) -> Box<dyn Fn(&Loomed)> + Send + Sync + 'static,
) {
    loom::model(move || {
        let sim = Arc::new(Loomed::with_locks(1));
        before.iter().for_each(|op| op.apply(&sim));
        let threads = others.map(|ops| {
            let sim = sim.clone();
            thread::spawn(move || ops.iter().for_each(|op| op.apply(&sim)))
        });
        let check = walk(&Faulty(sim.clone()));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        check(&sim);
    });
}

/// One huge block.
const HUGE: &[Op] = &[Map(0, M2, Entry::WRITABLE)];
/// One block of leaves, in three runs.
const LEAVES: &[Op] = &[Map(0, M2, Entry::WRITABLE), Map(9, K4, Entry::DIRTY)];

/// Hands out all pages of a range, and checks that each comes once. Huge entries are split if `descend` says so, and
/// handled otherwise.
fn once<const FAULT: u8>(table: &Faulty<FAULT>, pages: Range<u64>, descend: bool) {
    let handled = RefCell::new(Vec::<Range<u64>>::new());
    let outcome = Walk::new(table)
        .huge(|entry| {
            if descend {
                return Ok(Step::Descend(Split));
            }
            handled.borrow_mut().push(entry.pages.clone());
            Ok::<_, Infallible>(Step::Handled)
        })
        .leaves(|pages, _| {
            handled.borrow_mut().push(pages);
            Ok(Seen::All)
        })
        .holes(|pages| {
            handled.borrow_mut().push(pages);
            Ok(Seen::All)
        })
        .run(pages.clone());
    assert_eq!(outcome, Ok(()), "a lost race is no error");
    let mut next = pages.start;
    for run in handled.into_inner() {
        assert_eq!(run.start, next, "each page is handled once");
        next = run.end;
    }
    assert_eq!(next, pages.end, "each page is handled");
}

fn each_page_is_handled_once<const OTHERS: usize>(
    before: &'static [Op],
    others: [&'static [Op]; OTHERS],
    descend: bool,
) {
    model::<CORRECT, OTHERS>(before, others, move |table| {
        once(table, 5..BLOCK + 5, descend);
        Box::new(|_| ())
    });
}

#[test]
fn loom_a_page_that_is_zapped_and_mapped_again_is_handled_once() {
    each_page_is_handled_once(HUGE, [&[Zap(0), Map(0, M2, Entry::CLEAN)], &[Op::Split(0)]], true);
    each_page_is_handled_once(HUGE, [&[Zap(0), Map(0, M2, Entry::CLEAN)], &[Op::Split(0)]], false);
}

#[test]
fn loom_a_page_that_is_split_and_collapsed_is_handled_once() {
    each_page_is_handled_once(LEAVES, [&[Collapse(0, M2), Op::Split(0)], &[Collapse(0, M2)]], true);
    each_page_is_handled_once(LEAVES, [&[Collapse(0, M2), Op::Split(0)], &[Collapse(0, M2)]], false);
}

#[test]
fn loom_a_page_that_is_split_collapsed_and_zapped_is_handled_once() {
    each_page_is_handled_once(HUGE, [&[Op::Split(0), Collapse(0, M2)], &[Zap(9)]], true);
    each_page_is_handled_once(LEAVES, [&[Collapse(0, M2), Op::Split(0)], &[Zap(9)]], false);
}

#[test]
#[should_panic(expected = "a lost race is no error")]
fn loom_finds_out_a_split_that_fails_because_it_raced() {
    model::<LOSES, 1>(HUGE, [&[Op::Split(0)]], |table| {
        once(table, 0..BLOCK, true);
        Box::new(|_| ())
    });
}

/// A walk that splits, while somebody else looks at what was mapped all the time.
fn nobody_sees_it_empty<const FAULT: u8>(before: &'static [Op]) {
    loom::model(move || {
        let sim = Arc::new(Loomed::with_locks(1));
        before.iter().for_each(|op| op.apply(&sim));
        let walker = {
            let table = Faulty::<FAULT>(sim.clone());
            thread::spawn(move || once(&table, 0..BLOCK, true))
        };
        for _ in 0..2 {
            let look = sim.look(7..8).unwrap();
            assert!(!matches!(look, Look::Hole { .. }), "a split left it empty");
        }
        walker.join().unwrap();
    });
}

#[test]
fn loom_a_split_leaves_a_table_behind_at_once() {
    nobody_sees_it_empty::<CORRECT>(&[Map(0, G1, Entry::ZERO)]);
}

#[test]
#[should_panic(expected = "a split left it empty")]
fn loom_finds_out_a_split_that_empties_the_entry() {
    nobody_sees_it_empty::<EMPTIES>(HUGE);
}

/// Protects the first half of a block while others, none of whom makes anything writable, change it.
fn all_is_protected<const FAULT: u8, const OTHERS: usize>(
    before: &'static [Op],
    others: [&'static [Op]; OTHERS],
    pages: Range<u64>,
) {
    model::<FAULT, OTHERS>(before, others, move |table| {
        assert!(write_protect(table, pages.clone()).is_ok());
        let pages = pages.clone();
        Box::new(move |sim| {
            let writable = |page: &u64| sim.entry(*page).is_some_and(|(_, entry)| entry.writable);
            assert_eq!(
                [0, 1, 9, 10, BLOCK - 1].into_iter().filter(|page| pages.contains(page)).find(writable),
                None
            );
        })
    });
}

#[test]
fn loom_write_protect_leaves_nothing_writable() {
    all_is_protected::<CORRECT, 2>(HUGE, [&[Op::Split(0), Zap(9)], &[Collapse(0, M2)]], 0..BLOCK);
    all_is_protected::<CORRECT, 2>(LEAVES, [&[Collapse(0, M2), Op::Split(0)], &[Zap(9)]], 0..BLOCK);
}

#[test]
fn loom_write_protect_of_a_part_leaves_nothing_of_it_writable() {
    all_is_protected::<CORRECT, 2>(HUGE, [&[Op::Split(0), Collapse(0, M2)], &[Zap(9)]], 0..11);
    all_is_protected::<CORRECT, 2>(LEAVES, [&[Collapse(0, M2), Op::Split(0)], &[Zap(9)]], 0..11);
}

#[test]
#[should_panic(expected = "left: Some")]
fn loom_finds_out_a_change_that_does_not_look() {
    all_is_protected::<BLIND, 1>(HUGE, [&[Op::Split(0)]], 0..BLOCK);
}

/// Every page of `written`, which others write, is recorded or dirty at the end, and `never`, which nobody writes, is
/// neither.
fn no_write_is_lost<const FAULT: u8, const OTHERS: usize>(
    before: &'static [Op],
    others: [&'static [Op]; OTHERS],
    written: &'static [u64],
    never: Option<u64>,
) {
    model::<FAULT, OTHERS>(before, others, move |table| {
        let mut dirty = Dirty::default();
        clean_and_record(table, 0..BLOCK, &mut dirty).unwrap();
        Box::new(move |sim| {
            let recorded = |page| dirty.runs().iter().any(|run| run.contains(&page));
            let reported =
                |page: &u64| recorded(*page) || sim.entry(*page).is_some_and(|(_, entry)| entry.dirty);
            assert!(written.iter().all(reported), "a write was lost");
            assert!(!never.as_ref().is_some_and(reported), "recorded without a write");
        })
    });
}

#[test]
fn loom_no_write_through_a_huge_entry_is_lost() {
    no_write_is_lost::<CORRECT, 2>(HUGE, [&[Write(3), Op::Split(0)], &[Write(4)]], &[3, 4], None);
    no_write_is_lost::<CORRECT, 2>(HUGE, [&[Write(3), Op::Split(0)], &[Collapse(0, M2)]], &[3], None);
}

#[test]
fn loom_no_write_that_splits_is_lost() {
    const PROTECTED: &[Op] = &[Map(0, M2, Entry::CLEAN)];
    no_write_is_lost::<CORRECT, 2>(PROTECTED, [&[Write(3)], &[Write(4), Write(3)]], &[3, 4], Some(5));
}

#[test]
fn loom_no_write_to_a_page_that_was_passed_is_lost_in_a_collapse() {
    no_write_is_lost::<CORRECT, 1>(LEAVES, [&[Write(3), Collapse(0, M2)]], &[3, 9], None);
}

/// A block next to another, both dirty and huge, which others make one GiB.
fn no_neighbour_is_lost<const FAULT: u8>() {
    const BLOCKS: &[Op] = &[Map(0, G1, Entry::DIRTY), Op::Split(0)];
    no_write_is_lost::<FAULT, 1>(BLOCKS, [&[Collapse(0, G1)]], &[0, BLOCK], None);
}

#[test]
fn loom_no_neighbour_is_lost_in_a_collapse() {
    no_neighbour_is_lost::<CORRECT>();
}

#[test]
#[should_panic(expected = "a write was lost")]
fn loom_finds_out_a_change_of_an_entry_of_another_size() {
    no_neighbour_is_lost::<STRAYS>();
}
