//! The contract against a naive table, with others' changes before every step of the walker.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;

use proptest::prelude::*;

use super::sim::{Entry, Sim};
use super::*;
use crate::addr::LEAVES_PER_BLOCK;

const BLOCK: u64 = LEAVES_PER_BLOCK;
const GIGA: u64 = PageSize::G1.leaves();

/// What a property is played on.
#[derive(Clone, Copy, Debug)]
enum Ground {
    /// Three blocks, every page of them.
    Pages,
    /// A GiB, which may be one entry. [`FEW`] of its pages are meant one by one; a block's others are always alike.
    Giga,
}

const FEW: [u64; 9] = [0, 1, 64, 511, 512, 600, 1023, GIGA - BLOCK, GIGA - 1];

impl Ground {
    /// Where pages that are told apart begin, in ascending order, and the end of the last.
    fn cuts(self) -> BTreeSet<u64> {
        match self {
            Ground::Pages => (0..=3 * BLOCK).collect(),
            Ground::Giga => {
                let blocks = (0..=GIGA / BLOCK).map(|block| block * BLOCK);
                blocks.chain(FEW).chain(FEW.map(|page| page + 1)).collect()
            }
        }
    }

    /// A page that somebody may change alone. Those at the edges of words and blocks are met often.
    fn page(self) -> BoxedStrategy<u64> {
        let edges = vec![0, 1, 63, 64, 511, 512, 513, 1000, 1023, 1024, 1100, 1535];
        match self {
            Ground::Pages => prop_oneof![3 => prop::sample::select(edges), 1 => 0..3 * BLOCK].boxed(),
            Ground::Giga => prop::sample::select(&FEW[..]).boxed(),
        }
    }

    fn range(self) -> impl Strategy<Value = Range<u64>> {
        let cuts: Vec<_> = self.cuts().into_iter().collect();
        let end = cuts[cuts.len() - 1];
        let edge = prop_oneof![3 => self.page(), 2 => prop::sample::select(cuts), 1 => Just(end)];
        (edge.clone(), edge).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    fn ops(self, most: usize) -> impl Strategy<Value = Vec<Op>> {
        let entry = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(writable, dirty, zero)| Entry { writable, dirty, zero });
        let huge = match self {
            Ground::Pages => vec![PageSize::M2],
            Ground::Giga => vec![PageSize::M2, PageSize::G1, PageSize::G1],
        };
        let huge = prop::sample::select(huge);
        let size = prop_oneof![Just(PageSize::K4), huge.clone()];
        let page = self.page();
        let op = prop_oneof![
            3 => (page.clone(), size, entry).prop_map(|(page, size, entry)| Op::Map(page, size, entry)),
            1 => page.clone().prop_map(Op::Zap),
            1 => page.clone().prop_map(Op::Split),
            2 => (page.clone(), huge).prop_map(|(page, size)| Op::Collapse(page, size)),
            3 => page.prop_map(Op::Write),
        ];
        prop::collection::vec(op, 0..most)
    }
}

/// What others do.
#[derive(Clone, Debug)]
enum Op {
    Map(u64, PageSize, Entry),
    Zap(u64),
    Split(u64),
    Collapse(u64, PageSize),
    Write(u64),
}

impl Op {
    fn apply(&self, sim: &Sim) {
        match *self {
            Op::Map(page, size, entry) => sim.map(page, size, entry).unwrap(),
            Op::Zap(page) => _ = sim.zap(page),
            Op::Split(page) => sim.split_at(page).unwrap(),
            Op::Collapse(page, size) => _ = sim.collapse(page, size),
            Op::Write(page) => sim.write(page).unwrap(),
        }
    }
}

/// Pages that nothing tells apart, and what maps them.
#[derive(Clone, Debug)]
struct Cell {
    pages: Range<u64>,
    entry: Option<(PageSize, Entry)>,
}

/// The table without a structure: for each page, what maps it.
#[derive(Clone, Debug)]
struct Naive(Vec<Cell>);

impl Naive {
    fn new(ground: Ground) -> Naive {
        let cuts = ground.cuts();
        let cell = |(&start, &end)| Cell { pages: start..end, entry: None };
        Naive(cuts.iter().zip(cuts.iter().skip(1)).map(cell).collect())
    }

    /// The cells of the entry of `size` that `page` is in or could be in.
    fn of(&mut self, page: u64, size: PageSize) -> &mut [Cell] {
        let start = page - page % size.leaves();
        let first = self.0.partition_point(|cell| cell.pages.start < start);
        let end = self.0.partition_point(|cell| cell.pages.start < start + size.leaves());
        &mut self.0[first..end]
    }

    /// The cells that have some of `pages`.
    fn in_range(&mut self, pages: &Range<u64>) -> &mut [Cell] {
        let first = self.0.partition_point(|cell| cell.pages.end <= pages.start);
        let end = self.0.partition_point(|cell| cell.pages.start < pages.end);
        &mut self.0[first..end.max(first)]
    }

    fn entry(&self, page: u64) -> Option<(PageSize, Entry)> {
        self.0[self.0.partition_point(|cell| cell.pages.end <= page)].entry
    }

    /// Replaces all that maps the page, block or GiB of `page`.
    fn put(&mut self, page: u64, size: PageSize, entry: Option<Entry>) {
        let entry = entry.map(|entry| (size, entry));
        self.of(page, size).iter_mut().for_each(|cell| cell.entry = entry);
    }

    /// Splits what maps `page`, once.
    fn split(&mut self, page: u64) {
        let Some((size, _)) = self.entry(page) else { return };
        let below = if size == PageSize::G1 { PageSize::M2 } else { PageSize::K4 };
        for cell in self.of(page, size) {
            cell.entry = cell.entry.map(|(_, entry)| (below, entry));
        }
    }

    /// Splits what maps `page` until it is no larger than `size`.
    fn split_to(&mut self, page: u64, size: PageSize) {
        while self.entry(page).is_some_and(|(now, _)| now > size) {
            self.split(page);
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Map(page, size, entry) => {
                self.split_to(page, size);
                self.put(page, size, Some(entry));
            }
            Op::Zap(page) => {
                let Some((size, _)) = self.entry(page) else { return };
                self.put(page, size, None);
            }
            Op::Split(page) => self.split(page),
            Op::Collapse(page, size) => {
                let below = if size == PageSize::G1 { PageSize::M2 } else { PageSize::K4 };
                let small = |cell: &Cell| cell.entry.filter(|(size, _)| *size == below);
                let Some(entries) = self.of(page, size).iter().map(small).collect::<Option<Vec<_>>>() else {
                    return;
                };
                let entry = Entry {
                    writable: entries.iter().all(|(_, entry)| entry.writable),
                    dirty: entries.iter().any(|(_, entry)| entry.dirty),
                    zero: entries.iter().all(|(_, entry)| entry.zero),
                };
                self.put(page, size, Some(entry));
            }
            Op::Write(page) => {
                if let Some((size, entry)) = self.entry(page)
                    && entry.writable
                {
                    return self.put(page, size, Some(Entry::DIRTY));
                }
                self.split_to(page, PageSize::K4);
                self.put(page, PageSize::K4, Some(Entry::DIRTY));
            }
        }
    }

    fn is(&self, sim: &Sim) -> bool {
        let ends = |cell: &Cell| [cell.pages.start, cell.pages.end - 1];
        self.0.iter().all(|cell| ends(cell).into_iter().all(|page| sim.entry(page) == cell.entry))
    }
}

/// A table before a walk, what others do meanwhile, and where is walked.
#[derive(Clone, Debug)]
struct Scene {
    ground: Ground,
    before: Vec<Op>,
    racing: Vec<Op>,
    pages: Range<u64>,
}

fn scene(before: usize, racing: usize) -> impl Strategy<Value = Scene> {
    let ground = prop_oneof![2 => Just(Ground::Pages), 1 => Just(Ground::Giga)];
    ground.prop_flat_map(move |ground| {
        (ground.ops(before), ground.ops(racing), ground.range())
            .prop_map(move |(before, racing, pages)| Scene { ground, before, racing, pages })
    })
}

/// The simulated table with a naive one beside it, and others who change both before every step of the walker's.
struct Racing {
    sim: Sim,
    naive: RefCell<Naive>,
    racing: RefCell<VecDeque<Op>>,
    /// First pages of the cells that others changed.
    touched: RefCell<BTreeSet<u64>>,
    /// The range that is walked over: nothing else may be changed.
    pages: Range<u64>,
    /// What the walker changed, in order.
    changed: RefCell<Vec<Range<u64>>>,
    /// How many entries it split.
    splits: std::cell::Cell<usize>,
}

impl Racing {
    fn new(scene: Scene) -> Racing {
        let (sim, mut naive) = (Sim::new(1), Naive::new(scene.ground));
        for op in &scene.before {
            naive.apply(op);
            op.apply(&sim);
        }
        Racing {
            sim,
            naive: RefCell::new(naive),
            racing: RefCell::new(scene.racing.into()),
            touched: RefCell::default(),
            pages: scene.pages,
            changed: RefCell::default(),
            splits: std::cell::Cell::new(0),
        }
    }

    fn race(&self) {
        let Some(op) = self.racing.borrow_mut().pop_front() else { return };
        op.apply(&self.sim);
        let mut naive = self.naive.borrow_mut();
        let before = naive.clone();
        naive.apply(&op);
        let flags = |cell: &Cell| cell.entry.map(|(_, entry)| entry);
        let differ = naive.0.iter().zip(&before.0).filter(|(now, before)| flags(now) != flags(before));
        self.touched.borrow_mut().extend(differ.map(|(cell, _)| cell.pages.start));
    }

    fn entry(&self, page: u64) -> Option<(PageSize, Entry)> {
        self.naive.borrow().entry(page)
    }

    /// Whether all of `pages` are mapped as `entry`.
    fn is(&self, pages: &Range<u64>, entry: Option<(PageSize, Entry)>) -> bool {
        self.naive.borrow_mut().in_range(pages).iter().all(|cell| cell.entry == entry)
    }

    fn change(&self, pages: Range<u64>, size: PageSize, seen: Entry, change: Change) {
        assert!(
            self.pages.start <= pages.start && pages.end <= self.pages.end,
            "{pages:?} are not all in the range"
        );
        assert!(
            if change == Change::Clean { seen.dirty } else { seen.writable },
            "{pages:?} needed no change"
        );
        assert!(self.is(&pages, Some((size, seen))), "{pages:?} were not as seen");
        for cell in self.naive.borrow_mut().in_range(&pages) {
            assert!(pages.start <= cell.pages.start && cell.pages.end <= pages.end);
            cell.entry = Some((size, seen.with(change)));
        }
        let mut changed = self.changed.borrow_mut();
        match changed.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ => changed.push(pages),
        }
    }

    /// First pages of the cells of the range that nobody else touched and whose entries are `what`.
    fn untouched(&self, what: impl Fn(Entry) -> bool) -> Vec<u64> {
        let touched = self.touched.borrow();
        let mut naive = self.naive.borrow_mut();
        let cells = naive.in_range(&self.pages).iter().filter(|cell| !touched.contains(&cell.pages.start));
        cells
            .filter(|cell| cell.entry.is_some_and(|(_, entry)| what(entry)))
            .map(|cell| cell.pages.start)
            .collect()
    }
}

impl Table for Racing {
    type Huge = Entry;
    type Leaf = Entry;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Entry, Entry>, Infallible> {
        self.race();
        self.sim.look(pages)
    }

    fn split(&self, seen: &HugeEntry<Entry>, how: Split) -> Result<(), OutOfMemory> {
        self.race();
        if self.entry(seen.pages.start) == Some((seen.size, seen.huge)) {
            self.naive.borrow_mut().split(seen.pages.start);
            self.splits.set(self.splits.get() + 1);
        }
        self.sim.split(seen, how)
    }
}

impl Protect for Racing {
    fn change_huge(&self, seen: &HugeEntry<Entry>, change: Change) -> Result<bool, OutOfMemory> {
        self.race();
        let changed = self.sim.change_huge(seen, change)?;
        if changed {
            let start = seen.start();
            self.change(start..start + seen.size.leaves(), seen.size, seen.huge, change);
        }
        Ok(changed)
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> Result<u64, OutOfMemory> {
        self.race();
        let changed = self.sim.change_leaves(pages.clone(), seen, change)?;
        if changed > 0 {
            self.change(pages.start..pages.start + changed, PageSize::K4, seen, change);
        }
        Ok(changed)
    }
}

/// Adds `pages`, which must begin where the last ones ended.
fn hand_out(handled: &RefCell<Range<u64>>, pages: &Range<u64>) {
    let mut handled = handled.borrow_mut();
    assert_eq!(handled.end, pages.start, "each page is handled once, in ascending order");
    handled.end = pages.end;
}

proptest! {
    #[test]
    fn the_simulated_table_does_as_the_naive_one(scene in scene(30, 1)) {
        let table = Racing::new(scene);
        prop_assert!(table.naive.borrow().is(&table.sim));
    }

    #[test]
    fn each_page_is_handled_once_as_what_it_is(
        scene in scene(12, 40),
        steps in prop::collection::vec(0..4u8, 40),
    ) {
        let pages = scene.pages.clone();
        let table = Racing::new(scene);
        let mut steps = steps.into_iter();
        let handled = RefCell::new(pages.start..pages.start);
        // Nothing races between a look and its callback here, so what is told must be what is there.
        let outcome = Walk::new(&table)
            .huge(|entry| {
                assert!(table.is(&entry.pages, Some((entry.size, entry.huge))));
                Ok::<_, Infallible>(match steps.next() {
                    Some(0) => Step::Retry,
                    Some(1 | 2) => Step::Descend(Split),
                    _ => {
                        hand_out(&handled, &entry.pages);
                        Step::Handled
                    }
                })
            })
            .leaves(|pages, leaf| {
                assert!(table.is(&pages, Some((PageSize::K4, leaf))));
                let some = pages.start..pages.end.min(pages.start + 100);
                hand_out(&handled, &some);
                Ok(Seen::Only(some.end - some.start))
            })
            .holes(|pages| {
                assert!(table.is(&pages, None));
                hand_out(&handled, &pages);
                Ok(Seen::All)
            })
            .run(pages.clone());
        prop_assert_eq!(outcome, Ok(()));
        prop_assert_eq!(handled.into_inner(), pages);
        prop_assert!(table.naive.borrow().is(&table.sim));
    }

    #[test]
    fn clean_and_record_takes_what_was_dirty(scene in scene(12, 12)) {
        let pages = scene.pages.clone();
        let table = Racing::new(scene);
        let was = table.untouched(|entry| entry.dirty);
        let mut dirty = Dirty::default();
        prop_assert_eq!(clean_and_record(&table, pages, &mut dirty), Ok(()));

        prop_assert_eq!(dirty.runs(), &**table.changed.borrow(), "recorded is what was cleaned, once");
        let bounds = dirty.runs().first().zip(dirty.runs().last());
        prop_assert_eq!(dirty.bounds(), bounds.map(|(first, last)| first.start..last.end));
        prop_assert!(table.naive.borrow().is(&table.sim));
        prop_assert_eq!(table.untouched(|entry| entry.dirty), [0; 0], "left dirty");
        let recorded = |page: &u64| dirty.runs().iter().any(|run| run.contains(page));
        let clean: BTreeSet<_> = table.untouched(|_| true).into_iter().collect();
        for page in clean {
            prop_assert_eq!(recorded(&page), was.contains(&page), "page {}", page);
        }
    }

    #[test]
    fn write_protect_protects_the_range(scene in scene(12, 12)) {
        let pages = scene.pages.clone();
        let table = Racing::new(scene);
        let protected = write_protect(&table, pages);
        let changed: u64 = table.changed.borrow().iter().map(|run| run.end - run.start).sum();
        prop_assert_eq!(protected, Ok(changed));
        prop_assert!(table.naive.borrow().is(&table.sim));
        prop_assert_eq!(table.untouched(|entry| entry.writable), [0; 0], "left writable");
    }

    #[test]
    fn nothing_is_split_for_nothing(scene in scene(12, 1)) {
        let pages = scene.pages.clone();
        let table = Racing::new(scene);
        // Only a huge entry that reaches beyond the range and is dirty needs a split: one at each end, or, of a GiB,
        // one for each size.
        let cut = |page: u64, size: PageSize| !page.is_multiple_of(size.leaves()) && !pages.is_empty();
        let mut split = BTreeSet::new();
        for (edge, page) in [(pages.start, pages.start), (pages.end, pages.end.saturating_sub(1))] {
            if !cut(edge, PageSize::M2) && !cut(edge, PageSize::G1) {
                continue;
            }
            let Some((now, entry)) = table.entry(page) else { continue };
            let sizes = [PageSize::G1, PageSize::M2].into_iter().filter(|size| *size <= now && entry.dirty);
            split.extend(sizes.filter(|size| cut(edge, *size)).map(|size| (size, page / size.leaves())));
        }
        prop_assert_eq!(clean_and_record(&table, pages.clone(), &mut Dirty::default()), Ok(()));
        prop_assert_eq!(table.splits.get(), split.len());
    }
}
