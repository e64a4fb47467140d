//! The record against one that knows nothing of blocks' states: a struct for each page, and for each block whether
//! its pages are one mapping.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

/// A slot that begins and ends within blocks: 0x2f0 to 0xa10, five blocks of which three are whole.
const FRAMES: PageRange = PageRange { start: Gfn(0x2f0), pages: 0x720 };

#[derive(Clone, Debug)]
enum Op {
    Map(PageRange, Mapping),
    MapHuge(Gfn, Mapping),
    Split(Gfn),
    Collapse(Gfn),
    Protect(PageRange),
    Open(PageRange),
    Mark(PageRange),
    Clean(PageRange),
    Touch(PageRange),
    Zap(PageRange, Contents),
    /// Harvest everything that is dirty.
    Harvest,
}

/// The oracle.
struct Naive {
    pages: Vec<Leaf>,
    huge: Vec<bool>,
}

impl Naive {
    fn new() -> Naive {
        let blocks = FRAMES.end().block() + 1;
        Naive { pages: vec![Leaf::default(); FRAMES.pages as usize], huge: vec![false; blocks as usize] }
    }

    fn page(&mut self, gfn: Gfn) -> &mut Leaf {
        &mut self.pages[(gfn.0 - FRAMES.start.0) as usize]
    }

    fn whole(block: u64) -> bool {
        FRAMES.contains(Gfn(block * 512)) && FRAMES.contains(Gfn(block * 512 + 511))
    }

    fn block(&mut self, block: u64) -> Vec<Leaf> {
        (block * 512..block * 512 + 512).map(|gfn| *self.page(Gfn(gfn))).collect()
    }

    /// `change` page by page. A block stays huge if all its pages are still alike, and are still present.
    fn each(&mut self, range: PageRange, mut change: impl FnMut(&mut Leaf)) {
        for gfn in range.iter() {
            if FRAMES.contains(gfn) {
                change(self.page(gfn));
            }
        }
        for block in 0..self.huge.len() as u64 {
            if self.huge[block as usize] {
                let pages = self.block(block);
                self.huge[block as usize] = pages[0].present && pages.iter().all(|page| *page == pages[0]);
            }
        }
    }
}

fn page_op(page: &mut Leaf, op: &Op) {
    match *op {
        Op::Map(_, how) if !page.present => {
            *page = Leaf {
                present: true,
                protected: how.protected,
                dirty: page.dirty || !how.protected,
                coarse: !page.dirty && !how.protected,
                old: how.old,
                dropped: false,
            };
        }
        Op::Protect(_) => (page.protected, page.coarse) = (page.present, false),
        Op::Open(_) if page.present => {
            page.coarse |= !page.dirty;
            (page.protected, page.dirty) = (false, true);
        }
        Op::Mark(_) => (page.dirty, page.coarse) = (true, false),
        Op::Clean(_) => (page.protected, page.dirty, page.coarse) = (page.present, false, false),
        Op::Zap(_, contents) => {
            let dropped = page.dropped || contents == Contents::Dropped;
            let dirty = page.dirty || contents == Contents::Dropped;
            *page = Leaf { dirty, dropped, ..Leaf::default() };
        }
        _ => {}
    }
}

fn apply(naive: &mut Naive, op: &Op) {
    match *op {
        Op::MapHuge(gfn, how) => {
            let block = gfn.block();
            if Naive::whole(block) && naive.block(block).iter().all(|page| !page.present) {
                let written = naive.block(block).iter().any(|page| page.dirty);
                let mapped = Leaf {
                    present: true,
                    protected: how.protected,
                    dirty: written || !how.protected,
                    coarse: !written && !how.protected,
                    old: how.old,
                    dropped: false,
                };
                naive.each(PageRange { start: Gfn(block * 512), pages: 512 }, |page| *page = mapped);
                naive.huge[block as usize] = true;
            }
        }
        Op::Split(gfn) => naive.huge[gfn.block() as usize] = false,
        Op::Collapse(gfn) => {
            let block = gfn.block();
            if !Naive::whole(block) || naive.huge[block as usize] {
                return;
            }
            let pages = naive.block(block);
            let alike = pages.iter().all(|page| page.present && page.protected == pages[0].protected);
            if alike {
                let (dirty, old) = (pages.iter().any(|page| page.dirty), pages.iter().all(|page| page.old));
                let coarse = dirty && pages.iter().all(|page| page.coarse);
                naive.each(PageRange { start: Gfn(block * 512), pages: 512 }, |page| {
                    (page.dirty, page.coarse, page.old) = (dirty, coarse, old);
                });
                naive.huge[block as usize] = true;
            }
        }
        Op::Touch(range) => {
            for gfn in range.iter().filter(|gfn| FRAMES.contains(*gfn)) {
                if naive.huge[gfn.block() as usize] {
                    let start = Gfn(gfn.block() * 512);
                    naive.each(PageRange { start, pages: 512 }, |page| page.old = false);
                } else {
                    naive.page(gfn).old = false;
                }
            }
        }
        Op::Harvest => naive.each(FRAMES, |page| {
            if page.dirty {
                (page.protected, page.dirty, page.coarse) = (page.present, false, false);
            }
        }),
        Op::Map(range, _)
        | Op::Protect(range)
        | Op::Open(range)
        | Op::Mark(range)
        | Op::Clean(range)
        | Op::Zap(range, _) => naive.each(range, |page| page_op(page, op)),
    }
}

fn run(stage2: &Stage2, op: &Op, spare: &mut Spare) -> Vec<Gfn> {
    let mut taken = Vec::new();
    let mut take = |block: &Block<'_>, leaves: Leaves| {
        taken.extend(leaves.runs().flat_map(|run| block.frames(run).iter().collect::<Vec<_>>()));
    };
    let on = |gfn: Gfn, change: &mut dyn FnMut(&mut Block<'_>)| {
        if let Some(mut block) = stage2.block(gfn) {
            change(&mut block);
        }
    };
    match *op {
        Op::MapHuge(gfn, how) => on(gfn, &mut |block| _ = block.map_huge(how)),
        Op::Split(gfn) => on(gfn, &mut |block| block.split(spare).unwrap()),
        Op::Collapse(gfn) => on(gfn, &mut |block| _ = block.collapse()),
        Op::Harvest => stage2
            .each_dirty(|block| {
                let dirty = block.clean(&block.dirty(), spare)?;
                take(block, dirty);
                Ok::<_, NoMemory>(())
            })
            .unwrap(),
        Op::Map(range, how) => stage2.each(range, |block, leaves| block.map(&leaves, how, spare)).unwrap(),
        Op::Protect(range) => stage2.each(range, |block, leaves| block.protect(&leaves, spare)).unwrap(),
        Op::Open(range) => stage2.each(range, |block, leaves| block.open(&leaves, spare)).unwrap(),
        Op::Mark(range) => stage2.each(range, |block, leaves| block.mark(&leaves, spare)).unwrap(),
        Op::Touch(range) => stage2
            .each(range, |block, leaves| {
                let were = block.touch(&leaves);
                take(block, were);
                Ok::<_, NoMemory>(())
            })
            .unwrap(),
        Op::Clean(range) => stage2
            .each(range, |block, leaves| {
                let dirty = block.clean(&leaves, spare)?;
                take(block, dirty);
                Ok::<_, NoMemory>(())
            })
            .unwrap(),
        Op::Zap(range, contents) => {
            stage2.each(range, |block, leaves| block.zap(&leaves, contents, spare)).unwrap();
        }
    }
    taken
}

fn range() -> impl Strategy<Value = PageRange> {
    prop_oneof![
        (0x2e0..0xa20u64, 0..40u64).prop_map(|(start, pages)| PageRange { start: Gfn(start), pages }),
        (0..6u64).prop_map(|block| PageRange { start: Gfn(block * 512), pages: 512 }),
        (0x200..0xa00u64, 300..1300u64).prop_map(|(start, pages)| PageRange { start: Gfn(start), pages }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let how = || (any::<bool>(), any::<bool>()).prop_map(|(protected, old)| Mapping { protected, old });
    let gfn = || (FRAMES.start.0..FRAMES.end().0).prop_map(Gfn);
    let contents = prop_oneof![Just(Contents::Kept), Just(Contents::Dropped)];
    prop_oneof![
        4 => (range(), how()).prop_map(|(range, how)| Op::Map(range, how)),
        3 => (gfn(), how()).prop_map(|(gfn, how)| Op::MapHuge(gfn, how)),
        1 => gfn().prop_map(Op::Split),
        2 => gfn().prop_map(Op::Collapse),
        3 => range().prop_map(Op::Protect),
        3 => range().prop_map(Op::Open),
        1 => range().prop_map(Op::Mark),
        2 => range().prop_map(Op::Clean),
        2 => range().prop_map(Op::Touch),
        2 => (range(), contents).prop_map(|(range, contents)| Op::Zap(range, contents)),
        2 => Just(Op::Harvest),
    ]
}

/// Everything that can be asked.
fn compare(stage2: &Stage2, naive: &mut Naive) -> Result<(), TestCaseError> {
    for gfn in FRAMES.iter() {
        let block = stage2.block(gfn).unwrap();
        let leaf = (gfn.0 - block.first().0) as usize;
        let flags = block.leaf(leaf);
        prop_assert_eq!(flags, *naive.page(gfn), "{}", gfn);
        prop_assert!(!flags.present || flags.protected || flags.dirty, "open and clean: {}", gfn);
        let in_sets = Leaf {
            present: block.present().contains(leaf),
            protected: block.protected().contains(leaf),
            dirty: block.dirty().contains(leaf),
            coarse: block.coarse().contains(leaf),
            old: block.old().contains(leaf),
            dropped: block.dropped().contains(leaf),
        };
        prop_assert_eq!(flags, in_sets);
    }
    for number in FRAMES.start.block()..=Gfn(FRAMES.end().0 - 1).block() {
        let gfn = Gfn((number * 512).max(FRAMES.start.0));
        let block = stage2.block(gfn).unwrap();
        let kind = if naive.huge[number as usize] {
            Kind::Huge { protected: naive.page(gfn).protected }
        } else if block.present().is_empty() {
            Kind::Absent
        } else {
            Kind::Split
        };
        prop_assert_eq!(block.kind(), kind, "block {}", number);
        prop_assert!(block.own().includes(&(block.present() | block.dirty() | block.dropped())));
        if let Kind::Huge { .. } = kind {
            prop_assert_eq!(block.table_bytes(), 0);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn transitions_are_those_of_single_pages(ops in prop::collection::vec(op(), 1..25)) {
        let stage2 = Stage2::new([FRAMES]).unwrap();
        let (mut naive, mut spare) = (Naive::new(), Spare::default());
        for op in &ops {
            let had: Vec<_> = FRAMES.iter().map(|gfn| *naive.page(gfn)).collect();
            apply(&mut naive, op);
            let taken = run(&stage2, op, &mut spare);
            // What an operation hands out is what the pages lost by it.
            let lost = |gfn: &Gfn, flag: fn(&Leaf) -> bool, naive: &mut Naive| {
                flag(&had[(gfn.0 - FRAMES.start.0) as usize]) && !flag(naive.page(*gfn))
            };
            match op {
                Op::Harvest | Op::Clean(_) => {
                    let clean: Vec<_> = FRAMES.iter().filter(|gfn| lost(gfn, |leaf| leaf.dirty, &mut naive)).collect();
                    prop_assert_eq!(taken, clean);
                }
                Op::Touch(_) => {
                    let young: Vec<_> = FRAMES.iter().filter(|gfn| lost(gfn, |leaf| leaf.old, &mut naive)).collect();
                    prop_assert_eq!(taken, young);
                }
                _ => prop_assert!(taken.is_empty()),
            }
        }
        compare(&stage2, &mut naive)?;
        run(&stage2, &Op::Zap(FRAMES, Contents::Dropped), &mut spare);
        prop_assert_eq!(stage2.bytes(), 5 * 25 + 8, "tables of nothing");
    }
}

#[test]
fn what_was_filled_in_advance_is_enough_for_one_transition() {
    let stage2 = Stage2::new([FRAMES]).unwrap();
    let mut spare = Spare::default();
    spare.fill().unwrap();
    let mut block = stage2.block(Gfn(0x400)).unwrap();
    block.map_huge(Mapping { protected: true, old: false }).unwrap();
    block.open(&Leaves::one(7), &mut spare).unwrap();
    assert_eq!(block.kind(), Kind::Split);
    assert_eq!((block.dirty(), block.coarse()), (Leaves::one(7), Leaves::one(7)));
    block.mark(&Leaves::one(7), &mut spare).unwrap();
    assert_eq!((block.dirty(), block.coarse()), (Leaves::one(7), Leaves::NONE));
    assert_eq!(block.protected(), !Leaves::one(7));
    assert_eq!(block.collapse(), Err(NotHuge::Protection));
    block.open(&Leaves::ALL, &mut spare).unwrap();
    assert_eq!(block.collapse(), Ok(0));
    assert_eq!(block.clean(&Leaves::ALL, &mut spare), Ok(Leaves::ALL));
    assert_eq!(block.kind(), Kind::Huge { protected: true });
}

#[test]
fn a_clean_protected_huge_block_is_left_alone() {
    let stage2 = Stage2::new([FRAMES]).unwrap();
    let (mut spare, some) = (Spare::default(), Leaves::range(3..70));
    let mut block = stage2.block(Gfn(0x400)).unwrap();
    block.map_huge(Mapping { protected: true, old: true }).unwrap();
    block.clean(&some, &mut spare).unwrap();
    block.protect(&some, &mut spare).unwrap();
    assert_eq!(block.kind(), Kind::Huge { protected: true });
    assert_eq!(block.table_bytes(), 0);
}

#[test]
fn collapsing_says_what_became_dirty() {
    let stage2 = Stage2::new([FRAMES]).unwrap();
    let mut spare = Spare::default();
    let mut block = stage2.block(Gfn(0x400)).unwrap();
    block.map(&Leaves::ALL, Mapping { protected: true, old: true }, &mut spare).unwrap();
    block.mark(&Leaves::range(0..12), &mut spare).unwrap();
    assert_eq!(block.collapse(), Ok(500));
    assert_eq!(block.dirty(), Leaves::ALL);
    drop(block);
    assert_eq!(stage2.block(Gfn(0x2f0)).unwrap().collapse(), Err(NotHuge::Partial));
    let young = Mapping { protected: true, old: false };
    assert_eq!(stage2.block(Gfn(0x2f0)).unwrap().map_huge(young), Err(NotHuge::Partial));
    assert_eq!(stage2.block(Gfn(0x400)).unwrap().map_huge(young), Err(NotHuge::Present));
    assert_eq!(stage2.block(Gfn(0x600)).unwrap().collapse(), Err(NotHuge::Present));
}

#[test]
fn an_untouched_guest_of_64_gib_takes_less_than_a_mebibyte() {
    let pages = 64 << 18;
    let stage2 = Stage2::new([PageRange { start: Gfn(0), pages }]).unwrap();
    assert!(stage2.bytes() < 1 << 20, "{} bytes", stage2.bytes());
    assert_eq!(stage2.bytes(), 804 << 10, "what the module's documentation says");
    let mut spare = Spare::default();
    let before = stage2.bytes();
    let how = Mapping { protected: true, old: false };
    stage2.block(Gfn(1000)).unwrap().map(&Leaves::one(1), how, &mut spare).unwrap();
    assert!(stage2.bytes() - before <= 300);
}

#[test]
fn slots_are_checked_and_found() {
    let range = |start, pages| PageRange { start: Gfn(start), pages };
    assert_eq!(Stage2::new([range(5, 0)]).unwrap_err(), Stage2Error::Size(Gfn(5)));
    assert_eq!(Stage2::new([range(5, u64::MAX)]).unwrap_err(), Stage2Error::Size(Gfn(5)));
    assert_eq!(Stage2::new([range(100, 5), range(0, 101)]).unwrap_err(), Stage2Error::Overlap(Gfn(100)));
    let stage2 = Stage2::new([range(0x1000, 3), range(0x10, 0x20)]).unwrap();
    assert_eq!(stage2.slots().collect::<Vec<_>>(), [range(0x10, 0x20), range(0x1000, 3)]);
    for absent in [0, 0xf, 0x30, 0xfff, 0x1003, u64::MAX] {
        assert!(stage2.block(Gfn(absent)).is_none(), "{absent:#x}");
    }
    let block = stage2.block(Gfn(0x2f)).unwrap();
    assert_eq!((block.first(), block.own()), (Gfn(0), Leaves::range(0x10..0x30)));
    drop(block);
    let mut seen = Vec::new();
    let all = PageRange { start: Gfn(0), pages: u64::MAX };
    stage2
        .each(all, |block, leaves| {
            seen.push((block.first(), leaves.count()));
            Ok::<_, NoMemory>(())
        })
        .unwrap();
    assert_eq!(seen, [(Gfn(0), 0x20), (Gfn(0x1000), 3)]);
}

#[test]
fn a_harvest_that_fails_keeps_what_it_did_not_take() {
    let stage2 = Stage2::new([FRAMES]).unwrap();
    let mut spare = Spare::default();
    run(&stage2, &Op::Mark(FRAMES), &mut spare);
    let mut calls = 0;
    let failed = stage2.each_dirty(|block| {
        calls += 1;
        if calls == 2 {
            return Err(NoMemory);
        }
        block.clean(&Leaves::ALL, &mut spare).map(drop)
    });
    assert_eq!((failed, calls), (Err(NoMemory), 2));
    let rest = run(&stage2, &Op::Harvest, &mut spare);
    assert_eq!(rest.first(), Some(&Gfn(0x400)));
    assert_eq!(rest.len() as u64, FRAMES.end().0 - 0x400);
}

/// Handlers open pages and write; a harvester takes turns with them. Every write is in a harvest that came after it.
#[test]
fn writers_and_harvests_take_turns() {
    const ROUNDS: u64 = 2000;
    let stage2 = Stage2::new([FRAMES]).unwrap();
    let written: Vec<_> = FRAMES.iter().map(|_| AtomicU64::new(0)).collect();
    let harvested: Vec<_> = FRAMES.iter().map(|_| AtomicU64::new(0)).collect();
    let how = Mapping { protected: true, old: false };
    run(&stage2, &Op::Map(FRAMES, how), &mut Spare::default());
    let at = |gfn: Gfn| (gfn.0 - FRAMES.start.0) as usize;
    let harvest = || {
        let mut spare = Spare::default();
        for gfn in run(&stage2, &Op::Harvest, &mut spare) {
            harvested[at(gfn)].store(written[at(gfn)].load(Ordering::SeqCst), Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (stage2, written) = (&stage2, &written);
            scope.spawn(move || {
                let mut spare = Spare::default();
                for round in 0..ROUNDS {
                    // Each page has one writer.
                    let page = (crate::mix::mix(round * 3 + thread) % (FRAMES.pages / 3)) * 3 + thread;
                    let gfn = Gfn(FRAMES.start.0 + page);
                    let mut block = stage2.block(gfn).unwrap();
                    let leaf = Leaves::one((gfn.0 - block.first().0) as usize);
                    // A write needs the page open; with the block held nobody protects it meanwhile.
                    if block.protected().includes(&leaf) {
                        block.open(&leaf, &mut spare).unwrap();
                    }
                    written[page as usize].store(round + 1, Ordering::SeqCst);
                }
            });
        }
        (0..200).for_each(|_| harvest());
    });
    harvest();
    for page in 0..written.len() {
        assert_eq!(
            written[page].load(Ordering::SeqCst),
            harvested[page].load(Ordering::SeqCst),
            "page {page}"
        );
    }
}
