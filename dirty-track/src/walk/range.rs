//! What dirty tracking wants of a range of pages: write-protect it, and take what was dirty.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;

use super::{HugeEntry, OutOfMemory, Seen, Split, Step, Table, Walk, WalkError};

/// What counts about an entry that maps something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Writes go through it unnoticed but for the dirty flag.
    pub writable: bool,
    /// It was written since it was last [cleaned](Change::Clean). A table in which a write through a writable entry
    /// sets nothing calls every writable entry dirty.
    pub dirty: bool,
}

/// What can be done to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is not writable any more. Dirty stays dirty.
    Protect,
    /// It is not dirty any more, and the next write makes it dirty again: a table in which that takes protection
    /// protects it too.
    Clean,
}

/// A table whose entries can be write-protected and cleaned.
///
/// Looking and changing are one step, for everybody who writes, splits, zaps or collapses.
pub trait Protect: Table<Descend = Split, Huge: Into<State>, Leaf: Into<State>> {
    /// Changes the huge entry `seen`. Returns whether it did: not so when something else maps `seen.pages.start` now,
    /// be it another huge entry, or one of another size.
    ///
    /// # Errors
    /// [`OutOfMemory`], and then the entry is as it was.
    fn change_huge(&self, seen: &HugeEntry<Self::Huge>, change: Change) -> Result<bool, OutOfMemory>;

    /// Changes leaves from `pages.start` on, as long as they are what `seen` says, up to the end of `pages`, and
    /// returns how many. It may stop earlier than it must, but not at the first leaf if that is as seen.
    ///
    /// # Errors
    /// [`OutOfMemory`], for a table that keeps one entry for leaves that are all the same and has to split it now.
    /// Then they are all as they were.
    fn change_leaves(&self, pages: Range<u64>, seen: Self::Leaf, change: Change) -> Result<u64, OutOfMemory>;
}

/// Write-protects `pages`, and returns how many of them were writable. Huge entries stay huge, but those that reach
/// beyond the range and are writable are split. No page outside is touched.
///
/// # Errors
/// [`WalkError::OutOfMemory`], when an entry had to be split; all pages before it are protected.
pub fn write_protect<T: Protect>(
    table: &T,
    pages: Range<u64>,
) -> Result<u64, WalkError<Infallible, T::Error>> {
    let mut protected = 0;
    change(
        table,
        pages,
        Change::Protect,
        |state| state.writable,
        |pages| protected += pages.end - pages.start,
    )?;
    Ok(protected)
}

/// Cleans `pages`, and adds those that were dirty to `dirty`: every page was either recorded here and is clean, or it
/// was clean. Of a dirty huge entry all pages are recorded, that being what the table knows, and it stays huge; one
/// that reaches beyond the range is split, and only its part in the range is recorded and cleaned.
///
/// Whoever copies the pages must do so after this, and must know that no write goes past a cleaned entry (on hardware:
/// TLBs are flushed).
///
/// # Errors
/// [`WalkError::OutOfMemory`], when an entry had to be split. What was cleaned until then is in `dirty`, as always.
pub fn clean_and_record<T: Protect>(
    table: &T,
    pages: Range<u64>,
    dirty: &mut Dirty,
) -> Result<(), WalkError<Infallible, T::Error>> {
    change(table, pages, Change::Clean, |state| state.dirty, |pages| dirty.push(pages))
}

/// Applies `change` to the entries that `need` it, and tells `done` which pages these map.
fn change<T: Protect>(
    table: &T,
    pages: Range<u64>,
    change: Change,
    need: impl Fn(State) -> bool,
    done: impl FnMut(Range<u64>),
) -> Result<(), WalkError<Infallible, T::Error>> {
    let done = RefCell::new(done);
    let walked = Walk::new(table)
        .huge(|entry| {
            let page = entry.pages.start;
            if !need(entry.huge.into()) {
                return Ok(Step::Handled);
            }
            if !entry.is_whole() {
                return Ok(Step::Descend(Split));
            }
            if !table.change_huge(entry, change).map_err(|_| page)? {
                return Ok(Step::Retry);
            }
            done.borrow_mut()(entry.pages.clone());
            Ok(Step::Handled)
        })
        .leaves(|pages, leaf| {
            if !need(leaf.into()) {
                return Ok(Seen::All);
            }
            let changed = table.change_leaves(pages.clone(), leaf, change).map_err(|_| pages.start)?;
            if changed > 0 {
                done.borrow_mut()(pages.start..pages.start + changed);
            }
            Ok(Seen::Only(changed))
        })
        .run(pages);
    walked.map_err(|error| match error {
        // The first page of an entry for whose change there is no memory.
        WalkError::Visitor(page) | WalkError::OutOfMemory { page } => WalkError::OutOfMemory { page },
        WalkError::Table(error) => WalkError::Table(error),
    })
}

/// Which pages were dirty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    runs: Vec<Range<u64>>,
}

impl Dirty {
    /// The pages, in the order in which they were recorded: ascending for one walk, and no two runs of it touch.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// From the first dirty page to behind the last one, or `None` when there is none.
    pub fn bounds(&self) -> Option<Range<u64>> {
        let start = self.runs.iter().map(|run| run.start).min()?;
        let end = self.runs.iter().map(|run| run.end).max()?;
        Some(start..end)
    }

    /// Number of pages; one that was recorded by two walks counts twice.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    fn push(&mut self, pages: Range<u64>) {
        match self.runs.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ => self.runs.push(pages),
        }
    }
}
