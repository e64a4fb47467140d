//! The state of one block, in as few bytes as it takes: flags for all of it, or a table of its leaves.

use crate::stage2::leaves::{Leaves, WORDS};

/// There is no memory for a block's table of 256 bytes. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no memory for the table of a split block: free some, or give the guest less")]
pub struct NoMemory;

/// 64 leaves, one bit each in four words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quad {
    pub(super) present: u64,
    pub(super) protected: u64,
    /// Known to be written. What is present and not protected counts as dirty as well.
    pub(super) dirty: u64,
    /// Of a leaf that is present: old. Of one that is not: dropped.
    pub(super) old: u64,
}

impl Quad {
    /// Those that can be written without anybody seeing it.
    pub(super) fn open(&self) -> u64 {
        self.present & !self.protected
    }
}

/// The same for a whole block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Planes {
    pub(super) present: Leaves,
    pub(super) protected: Leaves,
    pub(super) dirty: Leaves,
    pub(super) old: Leaves,
}

impl Planes {
    /// Present and not protected.
    pub(super) fn open(&self) -> Leaves {
        self.present & !self.protected
    }

    fn change(&mut self, mask: &Leaves, change: &impl Fn(&mut Quad, u64)) {
        for word in 0..WORDS {
            if mask.0[word] == 0 {
                continue;
            }
            let mut quad = Quad {
                present: self.present.0[word],
                protected: self.protected.0[word],
                dirty: self.dirty.0[word],
                old: self.old.0[word],
            };
            change(&mut quad, mask.0[word]);
            self.present.0[word] = quad.present;
            self.protected.0[word] = quad.protected;
            self.dirty.0[word] = quad.dirty;
            self.old.0[word] = quad.old;
        }
    }
}

/// A block's leaves. An array of one, because that can be had from a vector, whose allocation may fail.
pub(super) type Table = Box<[Planes; 1]>;

/// Memory for one table, taken before it is needed.
///
/// A transition that splits takes the table from here, and from the allocator only if there is none; one that leaves
/// a table without a use puts it back here. So whoever [fills](Spare::fill) it first knows that no transition of one
/// block fails.
#[derive(Debug, Default)]
pub struct Spare(Option<Table>);

impl Spare {
    /// Has memory for one table afterwards.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn fill(&mut self) -> Result<(), NoMemory> {
        if self.0.is_none() {
            let mut one = Vec::new();
            one.try_reserve_exact(1).map_err(|_| NoMemory)?;
            one.push(Planes::default());
            self.0 = Some(one.into_boxed_slice().try_into().map_err(|_| NoMemory)?);
        }
        Ok(())
    }

    fn take(&mut self) -> Result<Table, NoMemory> {
        self.fill()?;
        self.0.take().ok_or(NoMemory)
    }
}

/// One leaf's flags, and those of all leaves of a block that has no table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// It is mapped.
    pub present: bool,
    /// Its first write will be seen. Only if it is present.
    pub protected: bool,
    /// It was written, or can be without anybody seeing it, or its contents were dropped.
    pub dirty: bool,
    /// It is dirty only because it can be written without anybody seeing it.
    pub coarse: bool,
    /// It came along with another leaf, and nobody was seen to touch it. Only if it is present.
    pub old: bool,
    /// Its contents were dropped: it reads as zero, whatever it held before. Only if it is not present.
    pub dropped: bool,
}

impl Leaf {
    fn words(self) -> Quad {
        let word = |flag: bool| if flag { u64::MAX } else { 0 };
        Quad {
            present: word(self.present),
            protected: word(self.protected),
            dirty: word(self.dirty && !self.coarse),
            old: word(self.old || self.dropped),
        }
    }

    /// The flags that bit 0 of each word says.
    fn of(words: Quad) -> Leaf {
        let flag = |word: u64| word & 1 != 0;
        Leaf {
            present: flag(words.present),
            protected: flag(words.protected),
            dirty: flag(words.dirty | words.open()),
            coarse: flag(words.open() & !words.dirty),
            old: flag(words.old & words.present),
            dropped: flag(words.old & !words.present),
        }
    }
}

/// How a block is recorded.
#[derive(Debug)]
pub(super) enum State {
    /// All leaves are alike, and if they are present they are one huge mapping.
    Whole(Leaf),
    /// Each leaf for itself.
    Split(Table),
}

impl State {
    pub(super) fn planes(&self, own: &Leaves) -> Planes {
        match self {
            State::Split(table) => table[0],
            State::Whole(leaf) => {
                let mut planes = Planes::default();
                planes.change(own, &|words, mask| {
                    let all = leaf.words();
                    *words = Quad {
                        present: all.present & mask,
                        protected: all.protected & mask,
                        dirty: all.dirty & mask,
                        old: all.old & mask,
                    };
                });
                planes
            }
        }
    }

    /// The table, made if there is none.
    pub(super) fn split(&mut self, own: &Leaves, spare: &mut Spare) -> Result<&mut Planes, NoMemory> {
        if let State::Whole(_) = self {
            let planes = self.planes(own);
            let mut table = spare.take()?;
            table[0] = planes;
            *self = State::Split(table);
        }
        match self {
            State::Split(table) => Ok(&mut table[0]),
            State::Whole(_) => Err(NoMemory),
        }
    }

    /// Makes `change` to the leaves of `mask`. `change` is given words and the bits of them that are meant, and does
    /// the same to each of those. A block without a table gets one only if some of its leaves change and others do
    /// not, or if small pages appear.
    pub(super) fn change(
        &mut self,
        own: &Leaves,
        mask: &Leaves,
        spare: &mut Spare,
        change: impl Fn(&mut Quad, u64),
    ) -> Result<(), NoMemory> {
        let mask = *mask & *own;
        if mask.is_empty() {
            return Ok(());
        }
        if let State::Whole(leaf) = self {
            let before = leaf.words();
            let mut after = before;
            change(&mut after, u64::MAX);
            if after == before {
                return Ok(());
            }
            if mask == *own && (after.present == 0 || before.present != 0) {
                *leaf = Leaf::of(after);
                return Ok(());
            }
        }
        self.split(own, spare)?.change(&mask, &change);
        Ok(())
    }

    /// Puts the table back into `spare` if it says nothing that flags could not.
    pub(super) fn tidy(&mut self, own: &Leaves, spare: &mut Spare) {
        let State::Split(table) = self else { return };
        let planes = &table[0];
        let uniform = |plane: &Leaves| plane.is_empty() || plane == own;
        if planes.present.is_empty() && uniform(&planes.dirty) && uniform(&planes.old) {
            let (dirty, dropped) = (!planes.dirty.is_empty(), !planes.old.is_empty());
            let flags = State::Whole(Leaf { dirty, dropped, ..Leaf::default() });
            if let State::Split(table) = std::mem::replace(self, flags) {
                spare.0 = Some(table);
            }
        }
    }
}
