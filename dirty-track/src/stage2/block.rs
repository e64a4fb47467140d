//! One block, locked: what can be done to it.

use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::addr::{Gfn, LEAVES_PER_BLOCK, PageRange};
use crate::bitmap::DirtyBitmap;
use crate::stage2::leaves::Leaves;
use crate::stage2::state::{Leaf, NoMemory, Planes, Spare, State};

/// How much of a block is mapped, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing of it is mapped.
    Absent,
    /// By one huge mapping, write-protected or not.
    Huge {
        /// Its first write will be seen.
        protected: bool,
    },
    /// Leaf by leaf, and not all leaves need be.
    Split,
}

/// How leaves are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Write-protected. What is not is dirty from the start, and coarse: nobody sees when it is written.
    pub protected: bool,
    /// Nobody asked for them; they came along.
    pub old: bool,
}

/// What becomes of the contents of leaves that are zapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// They stay where they are (a shared file), and only the mapping goes.
    Kept,
    /// They are gone: the leaves read as zero from now on. That is a change of contents, so they are dirty.
    Dropped,
}

/// Why leaves cannot become a huge mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotHuge {
    /// The slot has not all of the block.
    #[error("the slot ends within the block")]
    Partial,
    /// Some of it is mapped already (`map_huge`), or not all of it is (`collapse`).
    #[error("not all leaves are present, or not all are absent")]
    Present,
    /// Some leaves are write-protected and some are not.
    #[error("some leaves are write-protected and others are not")]
    Protection,
}

/// A block of guest memory, or the part of one that a slot has, while nobody else has it; see the
/// [module](crate::stage2).
#[derive(Debug)]
pub struct Block<'a> {
    pub(super) state: MutexGuard<'a, State>,
    pub(super) first: Gfn,
    pub(super) own: Leaves,
    pub(super) index: usize,
    pub(super) heat: &'a AtomicU8,
    pub(super) dirty: &'a DirtyBitmap,
}

impl Block<'_> {
    /// Frame of leaf 0, which the slot may not have.
    pub fn first(&self) -> Gfn {
        self.first
    }

    /// The leaves that the slot has: all but at its ends.
    pub fn own(&self) -> Leaves {
        self.own
    }

    /// Those leaves of `range` that the slot has.
    pub fn leaves(&self, range: PageRange) -> Leaves {
        let leaf = |gfn: Gfn| gfn.0.saturating_sub(self.first.0).min(LEAVES_PER_BLOCK) as usize;
        Leaves::range(leaf(range.start)..leaf(range.end())) & self.own
    }

    /// The frames of a run of leaves.
    pub fn frames(&self, run: std::ops::Range<usize>) -> PageRange {
        PageRange { start: Gfn(self.first.0 + run.start as u64), pages: run.len() as u64 }
    }

    /// How it is mapped.
    pub fn kind(&self) -> Kind {
        match &*self.state {
            State::Whole(leaf) if leaf.present => Kind::Huge { protected: leaf.protected },
            State::Split(table) if !table[0].present.is_empty() => Kind::Split,
            State::Whole(_) | State::Split(_) => Kind::Absent,
        }
    }

    /// The flags of one leaf; none for a leaf that the slot has not.
    pub fn leaf(&self, leaf: usize) -> Leaf {
        let has = |leaves: &Leaves| leaves.contains(leaf);
        match &*self.state {
            State::Whole(flags) if has(&self.own) => *flags,
            State::Whole(_) => Leaf::default(),
            State::Split(table) => {
                let planes @ Planes { present, protected, dirty, old } = &table[0];
                let open = has(&planes.open());
                Leaf {
                    present: has(present),
                    protected: has(protected),
                    dirty: has(dirty) || open,
                    coarse: open && !has(dirty),
                    old: has(present) && has(old),
                    dropped: !has(present) && has(old),
                }
            }
        }
    }

    /// What a policy remembers of this block, 0 at first. Nothing here depends on it.
    pub fn heat(&self) -> u8 {
        self.heat.load(Ordering::Relaxed)
    }

    /// See [`heat`](Block::heat).
    pub fn set_heat(&mut self, heat: u8) {
        self.heat.store(heat, Ordering::Relaxed);
    }

    /// The leaves that are mapped.
    pub fn present(&self) -> Leaves {
        self.state.planes(&self.own).present
    }

    /// The leaves whose first write will be seen.
    pub fn protected(&self) -> Leaves {
        self.state.planes(&self.own).protected
    }

    /// The leaves that are dirty.
    pub fn dirty(&self) -> Leaves {
        let planes = self.state.planes(&self.own);
        planes.dirty | planes.open()
    }

    /// Those of the dirty leaves of which it is not known that they were written.
    pub fn coarse(&self) -> Leaves {
        let planes = self.state.planes(&self.own);
        planes.open() & !planes.dirty
    }

    /// The leaves that came along and were not seen to be touched.
    pub fn old(&self) -> Leaves {
        let planes = self.state.planes(&self.own);
        planes.present & planes.old
    }

    /// The leaves that read as zero because their contents were dropped.
    pub fn dropped(&self) -> Leaves {
        let planes = self.state.planes(&self.own);
        !planes.present & planes.old
    }

    /// Bytes that this block takes besides what every block does.
    pub fn table_bytes(&self) -> usize {
        match &*self.state {
            State::Whole(_) => 0,
            State::Split(table) => size_of_val(&**table),
        }
    }

    /// Maps those of `leaves` that are absent, by small pages.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn map(&mut self, leaves: &Leaves, how: Mapping, spare: &mut Spare) -> Result<(), NoMemory> {
        self.state.change(&self.own, leaves, spare, |words, mask| {
            let new = mask & !words.present;
            words.present |= new;
            words.old = if how.old { words.old | new } else { words.old & !new };
            if how.protected {
                words.protected |= new;
            }
        })?;
        self.note();
        Ok(())
    }

    /// Maps the whole block, of which nothing is mapped, by one huge page.
    ///
    /// # Errors
    /// [`NotHuge`], and nothing is changed.
    pub fn map_huge(&mut self, how: Mapping) -> Result<(), NotHuge> {
        if self.own != Leaves::ALL {
            return Err(NotHuge::Partial);
        }
        let planes = self.state.planes(&self.own);
        if !planes.present.is_empty() {
            return Err(NotHuge::Present);
        }
        // One mapping is dirty as one.
        let written = !planes.dirty.is_empty();
        *self.state = State::Whole(Leaf {
            present: true,
            protected: how.protected,
            dirty: written || !how.protected,
            coarse: !written && !how.protected,
            old: how.old,
            dropped: false,
        });
        self.note();
        Ok(())
    }

    /// Replaces a huge mapping by 512 small ones with the same flags, at once. Anything else stays as it is.
    ///
    /// # Errors
    /// [`NoMemory`]: it stays huge.
    pub fn split(&mut self, spare: &mut Spare) -> Result<(), NoMemory> {
        if let Kind::Huge { .. } = self.kind() {
            self.state.split(&self.own, spare)?;
        }
        Ok(())
    }

    /// Replaces 512 small mappings by a huge one, and says how many clean leaves are dirty now: one mapping is dirty
    /// as one. It is old only if all leaves were. What is huge stays so.
    ///
    /// # Errors
    /// [`NotHuge`], and nothing is changed.
    pub fn collapse(&mut self) -> Result<usize, NotHuge> {
        if let Kind::Huge { .. } = self.kind() {
            return Ok(0);
        }
        if self.own != Leaves::ALL {
            return Err(NotHuge::Partial);
        }
        let planes @ Planes { present, protected, dirty, old } = self.state.planes(&self.own);
        if present != Leaves::ALL {
            return Err(NotHuge::Present);
        }
        if !protected.is_empty() && protected != Leaves::ALL {
            return Err(NotHuge::Protection);
        }
        let flags = Leaf {
            present: true,
            protected: !protected.is_empty(),
            dirty: !dirty.is_empty() || protected.is_empty(),
            coarse: dirty.is_empty() && protected.is_empty(),
            old: old == Leaves::ALL,
            dropped: false,
        };
        *self.state = State::Whole(flags);
        Ok(if flags.dirty { (!(dirty | planes.open())).count() } else { 0 })
    }

    /// Write-protects those of `leaves` that are present. What was dirty stays so.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn protect(&mut self, leaves: &Leaves, spare: &mut Spare) -> Result<(), NoMemory> {
        self.state.change(&self.own, leaves, spare, |words, mask| {
            words.dirty |= mask & words.open();
            words.protected |= mask & words.present;
        })
    }

    /// Lifts the protection of those of `leaves` that are present: they are dirty from now on, and coarse unless
    /// they are [marked](Block::mark) as written.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn open(&mut self, leaves: &Leaves, spare: &mut Spare) -> Result<(), NoMemory> {
        self.state.change(&self.own, leaves, spare, |words, mask| words.protected &= !mask)?;
        self.note();
        Ok(())
    }

    /// Records `leaves` as written, mapped or not.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn mark(&mut self, leaves: &Leaves, spare: &mut Spare) -> Result<(), NoMemory> {
        self.state.change(&self.own, leaves, spare, |words, mask| words.dirty |= mask)?;
        self.note();
        Ok(())
    }

    /// Records that those of `leaves` that are present are write-protected and clean now, and returns those that were
    /// dirty. The protection must be in force *before* the next who has this block can look, and the contents must
    /// be read after it.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn clean(&mut self, leaves: &Leaves, spare: &mut Spare) -> Result<Leaves, NoMemory> {
        let dirty = self.dirty() & *leaves;
        self.state.change(&self.own, leaves, spare, |words, mask| {
            words.protected |= mask & words.present;
            words.dirty &= !mask;
        })?;
        self.state.tidy(&self.own, spare);
        Ok(dirty)
    }

    /// Records that `leaves` were touched, and returns those that were old until now. A huge mapping is young or old
    /// as one: it returns all of it.
    pub fn touch(&mut self, leaves: &Leaves) -> Leaves {
        match &mut *self.state {
            State::Whole(flags) if flags.present && flags.old && !(*leaves & self.own).is_empty() => {
                flags.old = false;
                self.own
            }
            State::Whole(_) => Leaves::NONE,
            State::Split(table) => {
                let were = *leaves & table[0].present & table[0].old;
                table[0].old &= !were;
                were
            }
        }
    }

    /// Records that `leaves` are not mapped any more.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn zap(&mut self, leaves: &Leaves, contents: Contents, spare: &mut Spare) -> Result<(), NoMemory> {
        self.state.change(&self.own, leaves, spare, |words, mask| {
            let gone = mask & words.present;
            words.dirty |= mask & words.open();
            words.present &= !mask;
            words.protected &= !mask;
            match contents {
                Contents::Kept => words.old &= !gone,
                Contents::Dropped => {
                    words.old |= mask;
                    words.dirty |= mask;
                }
            }
        })?;
        self.state.tidy(&self.own, spare);
        self.note();
        Ok(())
    }

    /// Lets [`Stage2::each_dirty`](crate::stage2::Stage2::each_dirty) find this block if it has to.
    pub(super) fn note(&self) {
        let dirty = match &*self.state {
            State::Whole(flags) => flags.dirty,
            State::Split(table) => !(table[0].dirty | table[0].open()).is_empty(),
        };
        if dirty {
            self.dirty.set(self.index);
        }
    }
}
