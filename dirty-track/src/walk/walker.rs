//! The walker itself: from a table and callbacks to a walk. The rules are in the [module above](super).

use std::ops::Range;

use super::{HugeEntry, Look, Seen, Split, Step, Table, WalkError};

/// A walk that is being put together: a table and the visitor's callbacks.
///
/// ```
/// use dirty_track::addr::PageSize;
/// use dirty_track::walk::sim::{Entry, Sim};
/// use dirty_track::walk::{Seen, Step, Walk};
///
/// let table = Sim::new(1);
/// table.map(0, PageSize::M2, Entry::CLEAN).unwrap();
/// let (mut huge, mut holes) = (0, 0);
/// Walk::new(&table)
///     .huge(|entry| {
///         huge += entry.pages.end - entry.pages.start;
///         Ok::<_, ()>(Step::Handled)
///     })
///     .holes(|pages| {
///         holes += pages.end - pages.start;
///         Ok(Seen::All)
///     })
///     .run(0..1024)
///     .unwrap();
/// assert_eq!((huge, holes), (512, 512));
/// ```
///
/// A table that cannot split has no [`Step::Descend`] to return,
///
/// ```compile_fail,E0308
/// use dirty_track::walk::{Split, Step, Table, Walk};
///
/// fn descend<T: Table<Descend = std::convert::Infallible, Error = ()>>(table: &T) {
///     let _ = Walk::new(table).huge(|_| Ok::<_, ()>(Step::Descend(Split))).run(0..512);
/// }
/// ```
///
/// and cannot be asked for leaves alone:
///
/// ```compile_fail,E0271
/// use dirty_track::walk::{Seen, Split, Step, Table, Walk};
///
/// fn leaves<T: Table<Descend = std::convert::Infallible, Error = ()>>(table: &T) {
///     let _ = Walk::new(table).leaves(|_, _| Ok::<_, ()>(Seen::All)).run(0..512);
/// }
/// ```
#[derive(Debug)]
pub struct Walk<'t, T, H = Nothing, L = Nothing, O = Nothing> {
    table: &'t T,
    huge: H,
    leaves: L,
    holes: O,
}

/// No callback.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

/// A callback.
#[derive(Clone, Copy, Debug)]
pub struct Call<F>(F);

/// What a visitor with the leaf callback `L` does at a huge entry.
pub trait OnHuge<T: Table, E, L> {
    /// See [`Step`].
    ///
    /// # Errors
    /// The visitor's own; it ends the walk.
    fn huge(&mut self, entry: &HugeEntry<T::Huge>) -> Result<Step<T::Descend>, E>;
}

impl<T: Table, E> OnHuge<T, E, Nothing> for Nothing {
    fn huge(&mut self, _: &HugeEntry<T::Huge>) -> Result<Step<T::Descend>, E> {
        Ok(Step::Handled)
    }
}

impl<T: Table<Descend = Split>, E, F> OnHuge<T, E, Call<F>> for Nothing {
    fn huge(&mut self, _: &HugeEntry<T::Huge>) -> Result<Step<Split>, E> {
        Ok(Step::Descend(Split))
    }
}

impl<T, E, L, F> OnHuge<T, E, L> for Call<F>
where
    T: Table,
    F: FnMut(&HugeEntry<T::Huge>) -> Result<Step<T::Descend>, E>,
{
    fn huge(&mut self, entry: &HugeEntry<T::Huge>) -> Result<Step<T::Descend>, E> {
        (self.0)(entry)
    }
}

/// What a visitor does with leaves.
pub trait OnLeaves<T: Table, E> {
    /// `pages` are leaves that are all the same; see [`Look::Leaves`].
    ///
    /// # Errors
    /// The visitor's own; it ends the walk.
    fn leaves(&mut self, pages: Range<u64>, leaf: T::Leaf) -> Result<Seen, E>;
}

impl<T: Table, E> OnLeaves<T, E> for Nothing {
    fn leaves(&mut self, _: Range<u64>, _: T::Leaf) -> Result<Seen, E> {
        Ok(Seen::All)
    }
}

impl<T, E, F> OnLeaves<T, E> for Call<F>
where
    T: Table,
    F: FnMut(Range<u64>, T::Leaf) -> Result<Seen, E>,
{
    fn leaves(&mut self, pages: Range<u64>, leaf: T::Leaf) -> Result<Seen, E> {
        (self.0)(pages, leaf)
    }
}

/// What a visitor does with holes.
pub trait OnHole<E> {
    /// Nothing is mapped at `pages`.
    ///
    /// # Errors
    /// The visitor's own; it ends the walk.
    fn hole(&mut self, pages: Range<u64>) -> Result<Seen, E>;
}

impl<E> OnHole<E> for Nothing {
    fn hole(&mut self, _: Range<u64>) -> Result<Seen, E> {
        Ok(Seen::All)
    }
}

impl<E, F: FnMut(Range<u64>) -> Result<Seen, E>> OnHole<E> for Call<F> {
    fn hole(&mut self, pages: Range<u64>) -> Result<Seen, E> {
        (self.0)(pages)
    }
}

impl<'t, T: Table> Walk<'t, T> {
    /// A walk over `table`, without callbacks.
    pub fn new(table: &'t T) -> Self {
        Walk { table, huge: Nothing, leaves: Nothing, holes: Nothing }
    }
}

impl<'t, T: Table, H, L, O> Walk<'t, T, H, L, O> {
    /// Calls `callback` at huge entries.
    pub fn huge<E, F>(self, callback: F) -> Walk<'t, T, Call<F>, L, O>
    where
        F: FnMut(&HugeEntry<T::Huge>) -> Result<Step<T::Descend>, E>,
    {
        Walk { table: self.table, huge: Call(callback), leaves: self.leaves, holes: self.holes }
    }

    /// Calls `callback` for leaves: once for a run of them that are all the same.
    pub fn leaves<E, F>(self, callback: F) -> Walk<'t, T, H, Call<F>, O>
    where
        F: FnMut(Range<u64>, T::Leaf) -> Result<Seen, E>,
    {
        Walk { table: self.table, huge: self.huge, leaves: Call(callback), holes: self.holes }
    }

    /// Calls `callback` for holes.
    pub fn holes<E, F>(self, callback: F) -> Walk<'t, T, H, L, Call<F>>
    where
        F: FnMut(Range<u64>) -> Result<Seen, E>,
    {
        Walk { table: self.table, huge: self.huge, leaves: self.leaves, holes: Call(callback) }
    }

    /// Walks over `pages`.
    ///
    /// # Errors
    /// See [`WalkError`]. All pages before the one where it happened are handled.
    pub fn run<E>(mut self, pages: Range<u64>) -> Result<(), WalkError<E, T::Error>>
    where
        H: OnHuge<T, E, L>,
        L: OnLeaves<T, E>,
        O: OnHole<E>,
    {
        // All pages before this one are handled, and none from it on is. Nothing else is remembered between two
        // looks, so nothing that was seen before a change can be acted upon after it.
        let mut page = pages.start;
        while page < pages.end {
            match self.table.look(page..pages.end).map_err(WalkError::Table)? {
                Look::Hole { end } => {
                    let run = page..end.clamp(page + 1, pages.end);
                    page = handled(&run, self.holes.hole(run.clone()).map_err(WalkError::Visitor)?);
                }
                Look::Leaves { end, leaf } => {
                    let run = page..end.clamp(page + 1, pages.end);
                    page = handled(&run, self.leaves.leaves(run.clone(), leaf).map_err(WalkError::Visitor)?);
                }
                Look::Huge { size, huge } => {
                    let left = size.leaves() - page % size.leaves();
                    let end = page.saturating_add(left).min(pages.end);
                    let entry = HugeEntry { pages: page..end, size, huge };
                    match self.huge.huge(&entry).map_err(WalkError::Visitor)? {
                        Step::Handled => page = end,
                        Step::Retry => {}
                        Step::Descend(how) => {
                            self.table.split(&entry, how).map_err(|_| WalkError::OutOfMemory { page })?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// First page of `run` that a callback did not handle.
fn handled(run: &Range<u64>, seen: Seen) -> u64 {
    match seen {
        Seen::All => run.end,
        Seen::Only(pages) => run.start.saturating_add(pages).min(run.end),
    }
}
