//! The record as a table of the page walk.
//!
//! A leaf that is absent but dirty or dropped is a leaf to the walk: its contents count.

use std::convert::Infallible;
use std::ops::Range;

use super::{Block, Kind, Leaf, Leaves, NoMemory, Spare, Stage2};
use crate::addr::{Gfn, LEAVES_PER_BLOCK, PageSize};
use crate::walk::{Change, HugeEntry, Look, OutOfMemory, Protect, Split, State, Table};

impl From<Leaf> for State {
    fn from(leaf: Leaf) -> State {
        State { writable: leaf.present && !leaf.protected, dirty: leaf.dirty }
    }
}

impl From<NoMemory> for OutOfMemory {
    fn from(_: NoMemory) -> OutOfMemory {
        OutOfMemory
    }
}

/// Where the leaves from `leaf` on that are as it is end, below `end`.
fn run(block: &Block<'_>, leaf: usize, end: usize) -> usize {
    let alike = block.leaf(leaf);
    (leaf + 1..end).find(|&next| !block.own().contains(next) || block.leaf(next) != alike).unwrap_or(end)
}

fn is_huge(block: &Block<'_>, seen: &HugeEntry<Leaf>) -> bool {
    matches!(block.kind(), Kind::Huge { .. }) && seen.size == PageSize::M2 && block.leaf(0) == seen.huge
}

impl Stage2 {
    fn at(&self, page: u64) -> Option<(Block<'_>, usize)> {
        let block = self.block(Gfn(page))?;
        let leaf = (page - block.first().0) as usize;
        Some((block, leaf))
    }
}

impl Table for Stage2 {
    type Huge = Leaf;
    type Leaf = Leaf;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Leaf, Leaf>, Infallible> {
        let Some((block, leaf)) = self.at(pages.start) else {
            let next = self.slots().map(|slot| slot.start.0).find(|start| *start > pages.start);
            return Ok(Look::Hole { end: next.unwrap_or(u64::MAX) });
        };
        let flags = block.leaf(leaf);
        if let Kind::Huge { .. } = block.kind() {
            return Ok(Look::Huge { size: PageSize::M2, huge: flags });
        }
        let end = (pages.end - block.first().0).min(LEAVES_PER_BLOCK) as usize;
        let end = block.first().0 + run(&block, leaf, end) as u64;
        let nothing = flags == Leaf::default();
        Ok(if nothing { Look::Hole { end } } else { Look::Leaves { end, leaf: flags } })
    }

    fn split(&self, seen: &HugeEntry<Leaf>, _: Split) -> Result<(), OutOfMemory> {
        let Some((mut block, _)) = self.at(seen.pages.start).filter(|(block, _)| is_huge(block, seen)) else {
            return Ok(());
        };
        Ok(block.split(&mut Spare::default())?)
    }
}

impl Protect for Stage2 {
    fn change_huge(&self, seen: &HugeEntry<Leaf>, change: Change) -> Result<bool, OutOfMemory> {
        let Some((mut block, _)) = self.at(seen.pages.start).filter(|(block, _)| is_huge(block, seen)) else {
            return Ok(false);
        };
        apply(&mut block, &Leaves::ALL, change)?;
        Ok(true)
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Leaf, change: Change) -> Result<u64, OutOfMemory> {
        let Some((mut block, leaf)) = self.at(pages.start) else { return Ok(0) };
        if matches!(block.kind(), Kind::Huge { .. }) || block.leaf(leaf) != seen {
            return Ok(0);
        }
        let end = (pages.end - block.first().0).min(LEAVES_PER_BLOCK) as usize;
        let end = run(&block, leaf, end);
        apply(&mut block, &Leaves::range(leaf..end), change)?;
        Ok((end - leaf) as u64)
    }
}

fn apply(block: &mut Block<'_>, leaves: &Leaves, change: Change) -> Result<(), NoMemory> {
    let mut spare = Spare::default();
    match change {
        Change::Protect => block.protect(leaves, &mut spare),
        Change::Clean => block.clean(leaves, &mut spare).map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PageRange;
    use crate::stage2::Mapping;
    use crate::walk::{Dirty, clean_and_record, write_protect};

    #[test]
    fn the_record_is_walked() {
        let record = Stage2::new([
            PageRange { start: Gfn(0), pages: 1024 },
            PageRange { start: Gfn(1100), pages: 50 },
        ])
        .unwrap();
        let open = Mapping { protected: false, old: false };
        record.block(Gfn(0)).unwrap().map_huge(open).unwrap();
        record.block(Gfn(1100)).unwrap().map(&Leaves::ALL, open, &mut Spare::default()).unwrap();
        let mut dirty = Dirty::default();
        assert_eq!(write_protect(&record, 0..2000), Ok(512 + 50));
        clean_and_record(&record, 0..2000, &mut dirty).unwrap();
        assert_eq!(dirty.runs(), [0..512, 1100..1150]);
        assert_eq!(record.block(Gfn(0)).unwrap().kind(), Kind::Huge { protected: true });
        record.block(Gfn(600)).unwrap().mark(&Leaves::ALL, &mut Spare::default()).unwrap();
        let mut dirty = Dirty::default();
        clean_and_record(&record, 600..700, &mut dirty).unwrap();
        assert_eq!(dirty.runs(), [600..700]);
        clean_and_record(&record, 0..2000, &mut dirty).unwrap();
        assert_eq!(dirty.pages(), 512);
    }
}
