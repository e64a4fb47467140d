//! The page walk: one walker over everything that maps pages, and the contract that keeps it honest while the
//! table changes under it.
//!
//! Dirty tracking walks over mappings that others split, zap and collapse meanwhile. A walker that goes on to leaves
//! that are not there, or hands a page out twice or never, is wrong in a way that shows as a lost write much later. So
//! there is one walker, and what it must not do cannot be written down, or is retried.
//!
//! A *table* ([`Table`]) says what is at a page: nothing (a *hole*), a *leaf* of 4 KiB, or a *huge entry* of 2 MiB or
//! 1 GiB. A *visitor* is up to three callbacks, one for each of these, and [`Walk`] calls them over a range of pages,
//! in ascending order. Pages are numbers of 4 KiB pages in whatever space the table maps: guest frames, this
//! process's addresses or the guest's virtual ones, each divided by 4096. So the end of every range is a number, also
//! that of the last page of 64 bits.
//!
//! # Contract
//! 1. *Callbacks.* A visitor may have a callback for huge entries, one for leaves and one for holes. What has no
//!    callback is passed over, with the one exception of rule 4.
//! 2. *What a huge callback answers.* An error stops the walk and is its result. [`Step::Handled`] ends with this
//!    entry: it is not split, and its leaves are not visited. [`Step::Retry`] looks at the entry again.
//!    [`Step::Descend`] goes on to the level below.
//! 3. *There is no leaf level without a split.* `Descend` splits the entry before anything else happens, always. To
//!    leave an entry whole is to leave its leaves alone; a third way cannot be written down: `Descend` carries
//!    [`Table::Descend`], which the walker can only spend on [`Table::split`], and a table without a split has no
//!    value of that type.
//! 4. *Leaves alone.* A visitor with a leaf callback and none for huge entries wants every page as a leaf: huge
//!    entries are split. Where there is no split, such a visitor does not compile.
//! 5. *Exactly once.* Each page is handled by one callback, once, although others split, zap and collapse entries
//!    meanwhile. A callback that finds that its entry changed says so ([`Seen::Only`], [`Step::Retry`]), and
//!    the walker looks again, at what is not handled yet and at nothing else: an entry that is larger than that comes
//!    with the part of it that is still to do ([`HugeEntry::pages`]).
//! 6. *A split does not fail because it raced, and splits only what was seen.* Whoever wins the race has split, zapped,
//!    collapsed or replaced the entry. The walker looks again, and asks anew about a huge entry that came in its
//!    place. A split leaves a table behind at once, and nobody ever sees the entry empty on the way. The one error is
//!    that there is no memory for the table, it is reported as that, and the entry is still whole.
//! 7. *The zero page is no special case.* An entry that maps it is split, protected and cleaned as any other.
//! 8. *What needs nothing done stays as it is.* A walk that only reads splits nothing. [`write_protect`] and
//!    [`clean_and_record`] pass over huge entries that are already protected or clean, and split none of them.
//!    The latter records the tight bounds of what was dirty.
//!
//! Retrying is lock-free: a walk goes round again only because somebody else got something done.
//!
//! # Tables
//! - [`sim`]: a simulated table with everything that races, for tests and for reading.
//! - [`x86`]: the guest's own page tables, read out of guest memory; [`virt`] asks them which virtual addresses map
//!   what was dirtied.
//! - [`host`]: how this process maps guest memory, by PAGEMAP_SCAN.

pub mod host;
mod range;
pub mod sim;
pub mod virt;
mod walker;
pub mod x86;

use std::ops::Range;

pub use range::{Change, Dirty, Protect, State, clean_and_record, write_protect};
pub use walker::{Call, Nothing, OnHole, OnHuge, OnLeaves, Walk};

use crate::addr::PageSize;

/// Something that maps pages.
pub trait Table {
    /// What the table says about a huge entry.
    type Huge: Copy;
    /// What it says about a leaf.
    type Leaf: Copy;
    /// [`Split`] if huge entries can be split, [`Infallible`](std::convert::Infallible) if not.
    type Descend;
    /// Why the table cannot say what is at a page. `Infallible` for a table that always can.
    type Error;

    /// What is at `pages.start`. The answer may be old by the time that it is used; it must have been true at some
    /// moment during the call. `pages` is not empty, and tells how far it is worth looking.
    ///
    /// # Errors
    /// The table's own.
    fn look(&self, pages: Range<u64>) -> Result<Look<Self::Huge, Self::Leaf>, Self::Error>;

    /// Replaces the huge entry `seen` by a table of the next smaller size that maps the same: each entry of the table
    /// inherits what the huge one was. Does nothing when something else maps `seen.pages.start` now, be it another
    /// huge entry, or one of another size. In between, no one sees less than the one or the other. Memory is taken
    /// before anything is changed.
    ///
    /// # Errors
    /// [`OutOfMemory`], and then the entry is as it was.
    fn split(&self, seen: &HugeEntry<Self::Huge>, how: Self::Descend) -> Result<(), OutOfMemory>;
}

/// What a table says about a page.
///
/// Where nothing is mapped but there is something to tell (a page was swapped out, or is dirty because its contents
/// were dropped), that is a leaf too: only to a hole is there nothing that could be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look<H, L> {
    /// Nothing is mapped from this page on up to `end`.
    Hole {
        /// First page that may be something else. One past the range that was asked for is cut off.
        end: u64,
    },
    /// Leaves, all of them the same.
    Leaves {
        /// As for a hole.
        end: u64,
        /// What they are. Where leaves have an address, this is that of the first, and the others follow it.
        leaf: L,
    },
    /// A huge entry.
    Huge {
        /// How much it maps; it begins at the last multiple of that.
        size: PageSize,
        /// What it is.
        huge: H,
    },
}

/// The right to descend below a huge entry of a table that can split it; see [`Step::Descend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split;

/// There is no memory for the table that a split takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// A huge entry as a callback sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HugeEntry<H> {
    /// The pages that the callback is to handle: those of the entry that are in the walk's range and were not handled
    /// before.
    pub pages: Range<u64>,
    /// How much the entry maps.
    pub size: PageSize,
    /// What it is.
    pub huge: H,
}

impl<H> HugeEntry<H> {
    /// Whether all of the entry is to be handled. What is done to an entry of which that is not so concerns others'
    /// pages too.
    pub fn is_whole(&self) -> bool {
        self.pages.end - self.pages.start == self.size.leaves()
    }

    /// First page of the entry, which may be before those that are to be handled.
    pub fn start(&self) -> u64 {
        self.pages.start - self.pages.start % self.size.leaves()
    }
}

/// What a huge callback wants. `D` is the table's [`Table::Descend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<D> {
    /// The pages are handled; their leaves are not visited.
    Handled,
    /// The entry is not what it was. Look again.
    Retry,
    /// Split the entry, then visit what is below.
    Descend(D),
}

/// What a leaf or hole callback did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Handled all pages.
    All,
    /// Handled this many pages, from the first one on, and found something else after them. Look again there.
    Only(u64),
}

/// Why a walk ended early. `V` is the visitor's error, `T` the table's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError<V, T> {
    /// A callback stopped the walk.
    #[error("{0}")]
    Visitor(V),
    /// An entry could not be split. It is whole, and no page from `page` on was handled.
    #[error(
        "to split the entry of page {page:#x} takes a table, and there is no memory for it: free some, then walk on \
             from this page"
    )]
    OutOfMemory {
        /// First page that was not handled.
        page: u64,
    },
    /// The table could not be read.
    #[error("{0}")]
    Table(T),
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
