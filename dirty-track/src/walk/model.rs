//! The contract under every order of events between a walker and two others who change the table (loom tries them all).
//!
//! The property tests interleave changes with the walker's calls at chosen points; here the others are threads. Tables
//! that break the rules of [`Table`] and [`Protect`] are run through the same models, which must find them out.

use std::convert::Infallible;
use std::ops::Range;

use loom::sync::{Arc, Mutex};
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
    Collapse(u64),
    Write(u64),
    Map(u64, PageSize, Entry),
}

use Op::{Collapse, Map, Write, Zap};

impl Op {
    fn apply(self, sim: &Loomed) {
        match self {
            Op::Split(page) => sim.split(page, Split).unwrap(),
            Zap(page) => _ = sim.zap(page),
            Collapse(page) => _ = sim.collapse(page, PageSize::M2),
            Write(page) => sim.write(page).unwrap(),
            Map(page, size, entry) => sim.map(page, size, entry).unwrap(),
        }
    }
}

/// How a table breaks the rules.
const CORRECT: u8 = 0;
/// Says that it changed what it did not look at again.
const BLIND: u8 = 1;
/// A split unmaps the entry before it puts a table there.
const EMPTIES: u8 = 2;
/// A split that finds another at work says that there is no memory.
const LOSES: u8 = 3;

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

    fn split(&self, page: u64, how: Split) -> Result<(), OutOfMemory> {
        match FAULT {
            EMPTIES => {
                if let Some((PageSize::M2, entry)) = self.0.zap(page) {
                    self.0.map(page, PageSize::M2, entry)?;
                }
                self.0.split(page, how)
            }
            LOSES => match self.0.entry(page) {
                Some((PageSize::M2, _)) => self.0.split(page, how),
                _ => Err(OutOfMemory),
            },
            _ => self.0.split(page, how),
        }
    }
}

impl<const FAULT: u8> Protect for Faulty<FAULT> {
    fn change_huge(&self, page: u64, seen: Entry, change: Change) -> bool {
        self.0.change_huge(page, seen, change) || FAULT == BLIND
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> u64 {
        let changed = self.0.change_leaves(pages.clone(), seen, change);
        if FAULT == BLIND { pages.end - pages.start } else { changed }
    }
}

/// Runs `walk` over a table that first has `before` and that two threads work on meanwhile, each with its list.
fn model<const FAULT: u8>(
    before: &'static [Op],
    others: [&'static [Op]; 2],
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

/// Two blocks: a huge one, and one of leaves of two kinds.
const MIXED: &[Op] = &[
    Map(0, PageSize::M2, Entry::WRITABLE),
    Map(BLOCK, PageSize::M2, Entry::WRITABLE),
    Map(BLOCK + 9, PageSize::K4, Entry::DIRTY),
];

const SPLIT_AND_COLLAPSE: &[Op] = &[Op::Split(0), Collapse(BLOCK), Collapse(0)];
const ZAP_AND_MAP: &[Op] = &[Zap(BLOCK + 9), Zap(0), Map(0, PageSize::M2, Entry::CLEAN)];

/// Hands out all pages of a range, and checks that each comes once. Huge entries that are whole are split if `descend`
/// says so, and handled otherwise.
fn once<const FAULT: u8>(table: &Faulty<FAULT>, pages: Range<u64>, descend: bool) {
    let handled = std::cell::RefCell::new(Vec::<Range<u64>>::new());
    let outcome = Walk::new(table)
        .huge(|entry| {
            if descend && entry.is_whole() {
                return Ok(Step::Descend(Split));
            }
            handled.borrow_mut().push(entry.pages);
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

#[test]
fn loom_each_page_is_handled_once() {
    for descend in [false, true] {
        model::<CORRECT>(MIXED, [SPLIT_AND_COLLAPSE, ZAP_AND_MAP], move |table| {
            once(table, 5..2 * BLOCK - 5, descend);
            Box::new(|_| ())
        });
    }
}

#[test]
#[should_panic(expected = "a lost race is no error")]
fn loom_finds_out_a_split_that_fails_because_it_raced() {
    model::<LOSES>(MIXED, [&[Op::Split(0)], &[]], |table| {
        once(table, 0..BLOCK, true);
        Box::new(|_| ())
    });
}

/// A walk that splits, while somebody else looks at what was mapped all the time.
fn nobody_sees_it_empty<const FAULT: u8>() {
    loom::model(|| {
        let sim = Arc::new(Loomed::with_locks(1));
        sim.map(0, PageSize::G1, Entry::ZERO).unwrap();
        sim.split(0, Split).unwrap();
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
    nobody_sees_it_empty::<CORRECT>();
}

#[test]
#[should_panic(expected = "a split left it empty")]
fn loom_finds_out_a_split_that_empties_the_entry() {
    nobody_sees_it_empty::<EMPTIES>();
}

/// Protects the first block and a half while others split and collapse them, none of which makes anything writable.
fn all_is_protected<const FAULT: u8>() {
    model::<FAULT>(MIXED, [SPLIT_AND_COLLAPSE, &[Zap(BLOCK + 9), Op::Split(BLOCK)]], |table| {
        let pages = 0..BLOCK + BLOCK / 2;
        assert!(write_protect(table, pages.clone()).is_ok());
        Box::new(move |sim| {
            let writable = |page| sim.entry(page).is_some_and(|(_, entry)| entry.writable);
            assert!(![0, 1, BLOCK, BLOCK + 9, pages.end - 1].into_iter().any(writable), "left writable");
        })
    });
}

#[test]
fn loom_write_protect_leaves_nothing_writable() {
    all_is_protected::<CORRECT>();
}

#[test]
#[should_panic(expected = "left writable")]
fn loom_finds_out_a_change_that_does_not_look() {
    all_is_protected::<BLIND>();
}

/// Pages that the guest writes: one through a writable huge entry, one through a protected one (which splits it).
const WRITTEN: [u64; 2] = [3, BLOCK + 3];
const NEVER_WRITTEN: u64 = BLOCK + 4;

/// Every write is recorded or still to be found, whatever comes between.
fn no_write_is_lost<const FAULT: u8>(others: [&'static [Op]; 2]) {
    const BEFORE: &[Op] = &[Map(0, PageSize::M2, Entry::WRITABLE), Map(BLOCK, PageSize::M2, Entry::CLEAN)];
    model::<FAULT>(BEFORE, others, |table| {
        let mut dirty = Dirty::default();
        clean_and_record(table, 0..2 * BLOCK, &mut dirty).unwrap();
        Box::new(move |sim| {
            let recorded = |page| dirty.runs().iter().any(|run| run.contains(&page));
            let dirty = |page| sim.entry(page).is_some_and(|(_, entry)| entry.dirty);
            assert!(WRITTEN.into_iter().all(|page| recorded(page) || dirty(page)), "a write was lost");
            assert!(!recorded(NEVER_WRITTEN) || dirty_as_huge(&dirty, &recorded), "recorded without a write");
        })
    });
}

/// The block of [`NEVER_WRITTEN`] was collapsed while a page of it was dirty, and so all of it is.
fn dirty_as_huge(dirty: &dyn Fn(u64) -> bool, recorded: &dyn Fn(u64) -> bool) -> bool {
    [BLOCK, BLOCK + 3, 2 * BLOCK - 1].into_iter().all(|page| dirty(page) || recorded(page))
}

#[test]
fn loom_clean_and_record_loses_no_write() {
    no_write_is_lost::<CORRECT>([
        &[Write(3), Op::Split(0), Collapse(0)],
        &[Write(BLOCK + 3), Collapse(BLOCK)],
    ]);
    no_write_is_lost::<CORRECT>([&[Op::Split(0), Write(3)], &[Write(BLOCK + 3), Op::Split(0)]]);
}
