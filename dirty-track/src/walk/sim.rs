//! A simulated table: 1 GiB entries over 2 MiB entries over leaves, with everything that happens to a real one while
//! somebody walks it. For tests, and for reading what a [`Table`] is.
//!
//! Each GiB has one lock, as a page table of a kernel has, and everything here is one step under it: a look, a split, a
//! guest's write, a change. So the races are those that a walker can meet: between a look and what follows from it.
//!
//! | what | absent | leaf | huge |
//! |---|---|---|---|
//! | [`write`](Sim::write) | a leaf, writable and dirty | writable and dirty | dirty if writable; else split, and the leaf |
//! | [`split`](Sim::split_at) | - | - | a table of equal entries of the next size |
//! | [`collapse`](Sim::collapse) | - | one huge entry, if no entry of the table is absent | - |
//! | [`zap`](Sim::zap) | - | absent | absent |
//!
//! What was collapsed is dirty if one entry of it was, and writable if all were.

use std::convert::Infallible;
use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::{Change, HugeEntry, Look, OutOfMemory, Protect, Split, State, Table};
use crate::addr::{LEAVES_PER_BLOCK, PageSize};

const LEAVES: usize = LEAVES_PER_BLOCK as usize;
const WORDS: usize = LEAVES / 64;
const GIGA: u64 = PageSize::G1.leaves();

/// What maps a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A write through it sets its dirty flag and nothing else happens.
    pub writable: bool,
    /// It was written since it was cleaned.
    pub dirty: bool,
    /// It maps the zero page.
    pub zero: bool,
}

impl Entry {
    /// Write-protected and clean.
    pub const CLEAN: Entry = Entry { writable: false, dirty: false, zero: false };
    /// Writable and clean.
    pub const WRITABLE: Entry = Entry { writable: true, ..Entry::CLEAN };
    /// Writable and dirty.
    pub const DIRTY: Entry = Entry { dirty: true, ..Entry::WRITABLE };
    /// Write-protected and clean, of the zero page.
    pub const ZERO: Entry = Entry { zero: true, ..Entry::CLEAN };

    /// What it is after `change`.
    pub fn with(self, change: Change) -> Entry {
        match change {
            Change::Protect => Entry { writable: false, ..self },
            Change::Clean => Entry { dirty: false, ..self },
        }
    }
}

impl From<Entry> for State {
    fn from(entry: Entry) -> State {
        State { writable: entry.writable, dirty: entry.dirty }
    }
}

/// What a GiB's lock guards.
#[derive(Debug, Default)]
pub struct Giga(Slot<Box<[Block]>>);

/// A 2 MiB entry.
type Block = Slot<Box<Leaves>>;

/// An entry of a table that is not of the last level; `T` is the table below it.
#[derive(Clone, Debug, Default)]
enum Slot<T> {
    #[default]
    Absent,
    Huge(Entry),
    Table(T),
}

impl<T> Slot<T> {
    /// The table below, after a split or, if nothing is mapped, a new one. `make` makes it, if there is memory.
    fn below(&mut self, make: impl FnOnce(Option<Entry>) -> Option<T>) -> Result<&mut T, OutOfMemory> {
        let entry = match *self {
            Slot::Absent => None,
            Slot::Huge(entry) => Some(entry),
            Slot::Table(ref mut table) => return Ok(table),
        };
        // One assignment: whoever looks finds the old entry or the table.
        *self = Slot::Table(make(entry).ok_or(OutOfMemory)?);
        match self {
            Slot::Table(table) => Ok(table),
            Slot::Absent | Slot::Huge(_) => unreachable!("it is the table of the line above"),
        }
    }
}

/// 512 leaves, a bit each. A leaf that is not present has no other bit set.
#[derive(Clone, Debug, Default)]
struct Leaves {
    present: [u64; WORDS],
    writable: [u64; WORDS],
    dirty: [u64; WORDS],
    zero: [u64; WORDS],
}

impl Leaves {
    fn filled(entry: Option<Entry>) -> Leaves {
        let mut leaves = Leaves::default();
        leaves.set(0..LEAVES, entry);
        leaves
    }

    fn get(&self, leaf: usize) -> Option<Entry> {
        let bit = |words: &[u64; WORDS]| words[leaf / 64] >> (leaf % 64) & 1 != 0;
        bit(&self.present).then(|| Entry {
            writable: bit(&self.writable),
            dirty: bit(&self.dirty),
            zero: bit(&self.zero),
        })
    }

    fn set(&mut self, leaves: Range<usize>, entry: Option<Entry>) {
        let Entry { writable, dirty, zero } = entry.unwrap_or(Entry::CLEAN);
        for index in leaves.start / 64..leaves.end.div_ceil(64) {
            let mask = mask(&leaves, index);
            let put = |words: &mut [u64; WORDS], on: bool| {
                words[index] = words[index] & !mask | if on { mask } else { 0 };
            };
            put(&mut self.present, entry.is_some());
            put(&mut self.writable, writable);
            put(&mut self.dirty, dirty);
            put(&mut self.zero, zero);
        }
    }

    /// Where the leaves from `leaves.start` on that are `as_this` end.
    fn run(&self, leaves: Range<usize>, as_this: Option<Entry>) -> usize {
        let Entry { writable, dirty, zero } = as_this.unwrap_or(Entry::CLEAN);
        for index in leaves.start / 64..leaves.end.div_ceil(64) {
            let differs = |words: &[u64; WORDS], on: bool| words[index] ^ if on { u64::MAX } else { 0 };
            let others = (differs(&self.present, as_this.is_some())
                | differs(&self.writable, writable)
                | differs(&self.dirty, dirty)
                | differs(&self.zero, zero))
                & mask(&leaves, index);
            if others != 0 {
                return index * 64 + others.trailing_zeros() as usize;
            }
        }
        leaves.end
    }
}

/// The bits of word `index` that stand for one of `leaves`.
fn mask(leaves: &Range<usize>, index: usize) -> u64 {
    let from = leaves.start.saturating_sub(index * 64).min(63);
    let left = leaves.end - index * 64;
    u64::MAX << from & if left < 64 { (1 << left) - 1 } else { u64::MAX }
}

/// A lock, so that the same table can be run under a model checker.
pub trait Lock: From<Giga> {
    /// Does `action` with what is guarded, alone.
    fn with<R>(&self, action: impl FnOnce(&mut Giga) -> R) -> R;
}

impl Lock for Mutex<Giga> {
    fn with<R>(&self, action: impl FnOnce(&mut Giga) -> R) -> R {
        // Every action leaves a whole table behind, also one that panics: it changes nothing before it can.
        action(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The table; see the [module](self).
#[derive(Debug)]
pub struct Sim<M = Mutex<Giga>> {
    gigas: Box<[M]>,
    /// Tables that there is memory for.
    memory: AtomicU64,
}

impl Sim {
    /// A table for `gigas` GiB, of which nothing is mapped.
    pub fn new(gigas: usize) -> Sim {
        Sim::with_locks(gigas)
    }
}

impl<M: Lock> Sim<M> {
    /// As [`Sim::new`], with locks of another kind.
    pub fn with_locks(gigas: usize) -> Sim<M> {
        let gigas = iter::repeat_with(|| M::from(Giga::default())).take(gigas).collect();
        Sim { gigas, memory: AtomicU64::new(u64::MAX) }
    }

    /// Pages that it has entries for.
    pub fn pages(&self) -> Range<u64> {
        0..self.gigas.len() as u64 * GIGA
    }

    /// Leaves memory for `tables` more tables. At first there is no limit.
    pub fn limit_memory(&self, tables: u64) {
        self.memory.store(tables, Ordering::Relaxed);
    }

    /// Tables that there is still memory for.
    pub fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// Maps `entry` over the page, block or GiB of `page`, in place of all that was there.
    ///
    /// # Errors
    /// [`OutOfMemory`], when that takes a table.
    pub fn map(&self, page: u64, size: PageSize, entry: Entry) -> Result<(), OutOfMemory> {
        self.at(page, Ok(()), |giga| {
            match size {
                PageSize::G1 => giga.0 = Slot::Huge(entry),
                PageSize::M2 => self.blocks(giga)?[block(page)] = Slot::Huge(entry),
                PageSize::K4 => self.leaves(giga, page)?.set(leaf(page)..leaf(page) + 1, Some(entry)),
            }
            Ok(())
        })
    }

    /// Unmaps the entry that maps `page`, whatever its size, and returns it.
    pub fn zap(&self, page: u64) -> Option<(PageSize, Entry)> {
        self.at(page, None, |giga| {
            let zapped = find(giga, page)?;
            match &mut giga.0 {
                Slot::Table(blocks) => match &mut blocks[block(page)] {
                    Slot::Table(leaves) => leaves.set(leaf(page)..leaf(page) + 1, None),
                    whole => *whole = Slot::Absent,
                },
                whole => *whole = Slot::Absent,
            }
            Some(zapped)
        })
    }

    /// Splits the huge entry that maps `page`, if one does.
    ///
    /// # Errors
    /// [`OutOfMemory`], and then it is whole.
    pub fn split_at(&self, page: u64) -> Result<(), OutOfMemory> {
        self.at(page, Ok(()), |giga| self.divide(giga, page))
    }

    /// Puts one entry of `size` (2 MiB or 1 GiB) in place of the table of `page` that it would replace, if all entries
    /// of that are mapped, and for a GiB huge. Returns whether it did.
    pub fn collapse(&self, page: u64, size: PageSize) -> bool {
        self.at(page, false, |giga| {
            let Slot::Table(blocks) = &mut giga.0 else { return false };
            if size == PageSize::G1 {
                let huge = |block: &Block| if let Slot::Huge(entry) = block { Some(*entry) } else { None };
                return merge(blocks.iter().map(huge)).map(|entry| giga.0 = Slot::Huge(entry)).is_some();
            }
            let slot = &mut blocks[block(page)];
            let Slot::Table(leaves) = slot else { return false };
            merge((0..LEAVES).map(|leaf| leaves.get(leaf))).map(|entry| *slot = Slot::Huge(entry)).is_some()
        })
    }

    /// The guest writes to `page`.
    ///
    /// # Errors
    /// [`OutOfMemory`], when mapping it takes a table.
    pub fn write(&self, page: u64) -> Result<(), OutOfMemory> {
        self.at(page, Ok(()), |giga| {
            match find(giga, page) {
                Some((PageSize::G1, entry)) if entry.writable => giga.0 = Slot::Huge(Entry::DIRTY),
                Some((PageSize::M2, entry)) if entry.writable => {
                    self.blocks(giga)?[block(page)] = Slot::Huge(Entry::DIRTY);
                }
                _ => self.leaves(giga, page)?.set(leaf(page)..leaf(page) + 1, Some(Entry::DIRTY)),
            }
            Ok(())
        })
    }

    /// What maps `page`.
    pub fn entry(&self, page: u64) -> Option<(PageSize, Entry)> {
        self.at(page, None, |giga| find(giga, page))
    }

    /// Does `action` with the GiB of `page`; beyond the last there is nothing, which is `nothing`.
    fn at<R>(&self, page: u64, nothing: R, action: impl FnOnce(&mut Giga) -> R) -> R {
        match self.gigas.get((page / GIGA) as usize) {
            Some(giga) => giga.with(action),
            None => nothing,
        }
    }

    /// The table of blocks, made if there is none.
    fn blocks<'g>(&self, giga: &'g mut Giga) -> Result<&'g mut [Block], OutOfMemory> {
        let blocks = giga.0.below(|entry| {
            let block = entry.map_or(Slot::Absent, Slot::Huge);
            self.allocate().then(|| vec![block; LEAVES].into_boxed_slice())
        });
        blocks.map(|blocks| &mut **blocks)
    }

    /// The table of leaves of `page`, made if there is none.
    fn leaves<'g>(&self, giga: &'g mut Giga, page: u64) -> Result<&'g mut Leaves, OutOfMemory> {
        let block = &mut self.blocks(giga)?[block(page)];
        block
            .below(|entry| self.allocate().then(|| Box::new(Leaves::filled(entry))))
            .map(|leaves| &mut **leaves)
    }

    /// Splits the huge entry that maps `page`, if one does.
    fn divide(&self, giga: &mut Giga, page: u64) -> Result<(), OutOfMemory> {
        match find(giga, page) {
            Some((PageSize::G1, _)) => self.blocks(giga).map(|_| ()),
            Some((PageSize::M2, _)) => self.leaves(giga, page).map(|_| ()),
            _ => Ok(()),
        }
    }

    fn allocate(&self) -> bool {
        self.memory.try_update(Ordering::Relaxed, Ordering::Relaxed, |tables| tables.checked_sub(1)).is_ok()
    }
}

impl<M: Lock> Table for Sim<M> {
    type Huge = Entry;
    type Leaf = Entry;
    type Descend = Split;
    type Error = Infallible;

    fn look(&self, pages: Range<u64>) -> Result<Look<Entry, Entry>, Infallible> {
        let page = pages.start;
        let first = page - page % LEAVES_PER_BLOCK;
        Ok(self.at(page, Look::Hole { end: u64::MAX }, |giga| match &giga.0 {
            Slot::Absent => Look::Hole { end: page - page % GIGA + GIGA },
            Slot::Huge(entry) => Look::Huge { size: PageSize::G1, huge: *entry },
            Slot::Table(blocks) => match &blocks[block(page)] {
                Slot::Absent => Look::Hole { end: first + LEAVES_PER_BLOCK },
                Slot::Huge(entry) => Look::Huge { size: PageSize::M2, huge: *entry },
                Slot::Table(leaves) => {
                    let end = (pages.end - first).min(LEAVES_PER_BLOCK) as usize;
                    let entry = leaves.get(leaf(page));
                    let end = first + leaves.run(leaf(page)..end, entry) as u64;
                    entry.map_or(Look::Hole { end }, |leaf| Look::Leaves { end, leaf })
                }
            },
        }))
    }

    fn split(&self, seen: &HugeEntry<Entry>, _: Split) -> Result<(), OutOfMemory> {
        let page = seen.pages.start;
        self.at(page, Ok(()), |giga| {
            let same = find(giga, page) == Some((seen.size, seen.huge));
            if same { self.divide(giga, page) } else { Ok(()) }
        })
    }
}

impl<M: Lock> Protect for Sim<M> {
    fn change_huge(&self, seen: &HugeEntry<Entry>, change: Change) -> Result<bool, OutOfMemory> {
        let page = seen.pages.start;
        Ok(self.at(page, false, |giga| {
            let same = find(giga, page) == Some((seen.size, seen.huge));
            if same {
                let entry = seen.huge.with(change);
                match &mut giga.0 {
                    Slot::Table(blocks) => blocks[block(page)] = Slot::Huge(entry),
                    whole => *whole = Slot::Huge(entry),
                }
            }
            same
        }))
    }

    fn change_leaves(&self, pages: Range<u64>, seen: Entry, change: Change) -> Result<u64, OutOfMemory> {
        Ok(self.at(pages.start, 0, |giga| {
            let Slot::Table(blocks) = &mut giga.0 else { return 0 };
            let Slot::Table(leaves) = &mut blocks[block(pages.start)] else { return 0 };
            let start = leaf(pages.start);
            let end = (start as u64 + (pages.end - pages.start)).min(LEAVES_PER_BLOCK) as usize;
            let end = leaves.run(start..end, Some(seen));
            leaves.set(start..end, Some(seen.with(change)));
            (end - start) as u64
        }))
    }
}

/// Number of the block of `page` in its GiB.
fn block(page: u64) -> usize {
    (page % GIGA / LEAVES_PER_BLOCK) as usize
}

/// Number of `page` in its block.
fn leaf(page: u64) -> usize {
    (page % LEAVES_PER_BLOCK) as usize
}

/// What maps `page`, which is in `giga`.
fn find(giga: &Giga, page: u64) -> Option<(PageSize, Entry)> {
    match &giga.0 {
        Slot::Absent => None,
        Slot::Huge(entry) => Some((PageSize::G1, *entry)),
        Slot::Table(blocks) => match &blocks[block(page)] {
            Slot::Absent => None,
            Slot::Huge(entry) => Some((PageSize::M2, *entry)),
            Slot::Table(leaves) => leaves.get(leaf(page)).map(|entry| (PageSize::K4, entry)),
        },
    }
}

/// One entry for all of `entries`, if none of them is absent.
fn merge(mut entries: impl Iterator<Item = Option<Entry>>) -> Option<Entry> {
    let first = entries.next()??;
    entries.try_fold(first, |all, entry| {
        let entry = entry?;
        Some(Entry {
            writable: all.writable && entry.writable,
            dirty: all.dirty || entry.dirty,
            zero: all.zero && entry.zero,
        })
    })
}
