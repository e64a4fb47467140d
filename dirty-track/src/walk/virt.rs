//! The guest's virtual view of dirty memory: which virtual addresses of an address space map the frames that were
//! dirtied.
//!
//! It is found by walking the whole address space, for there is no map the other way round. Both the effort and the
//! result are limited, because the guest decides how large they get; a view that was cut short says where.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::x86::{GuestTables, Mapping, Paging, X86Error};
use super::{Seen, Step, Walk, WalkError};
use crate::addr::{Gfn, PAGE_SHIFT, PageRange};

/// How much a view may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Looks at the guest's tables: see [`GuestTables::new`]. A process of a few GiB takes some tens of thousands, a
    /// kernel that maps 64 GiB of RAM by 4 KiB pages 32768 for these.
    pub looks: u64,
    /// Runs of the result.
    pub runs: usize,
}

impl Default for Limits {
    /// A million looks and 65536 runs: well below a second, and a few MiB.
    fn default() -> Limits {
        Limits { looks: 1 << 20, runs: 1 << 16 }
    }
}

/// Virtual addresses that map dirty frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualRun {
    /// First virtual address.
    pub start: u64,
    /// What it maps, frame by frame.
    pub frames: PageRange,
    /// The guest may write there.
    pub writable: bool,
    /// The guest's user mode may go there.
    pub user: bool,
    /// The guest may not execute what is there.
    pub no_execute: bool,
}

/// What a view found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualView {
    /// Ascending; neighbours that could be one run are one.
    pub runs: Vec<VirtualRun>,
    /// The virtual address up to which the view is complete, when a limit ended it. `None` when it is complete.
    pub cut_short_at: Option<u64>,
    /// See [`GuestTables::malformed`].
    pub malformed: u64,
}

/// The virtual addresses that map one of the `dirty` frames in the address space of `paging`. The dirty ranges may come
/// in any order.
///
/// # Errors
/// [`X86Error::PhysBits`].
pub fn virtual_view<M: GuestMemoryBackend>(
    memory: &M,
    paging: Paging,
    dirty: &[PageRange],
    limits: Limits,
) -> Result<VirtualView, X86Error> {
    let dirty = normalize(dirty);
    let tables = GuestTables::new(memory, paging, limits.looks)?;
    let found = RefCell::new(Found { runs: Vec::new(), most: limits.runs });
    let walked = Walk::new(&tables)
        .huge(|entry| {
            // The part of the entry that is to be handled need not begin where the entry does.
            let skipped = entry.pages.start - entry.start();
            let mapping = Mapping { gfn: Gfn(entry.huge.gfn.0 + skipped), ..entry.huge };
            found.borrow_mut().add(&dirty, entry.pages.clone(), mapping)?;
            Ok(Step::<Infallible>::Handled)
        })
        .leaves(|pages, mapping| {
            found.borrow_mut().add(&dirty, pages, mapping)?;
            Ok(Seen::All)
        })
        .run(tables.pages());
    let cut_short_at = match walked {
        Ok(()) => None,
        Err(WalkError::Table(error @ X86Error::PhysBits(_))) => return Err(error),
        Err(
            WalkError::Visitor(Full { page })
            | WalkError::Table(X86Error::TooLong { page })
            | WalkError::OutOfMemory { page },
        ) => Some(page << PAGE_SHIFT),
    };
    Ok(VirtualView { runs: found.into_inner().runs, cut_short_at, malformed: tables.malformed() })
}

/// There is no room for the run that begins at `page`.
struct Full {
    page: u64,
}

struct Found {
    runs: Vec<VirtualRun>,
    most: usize,
}

impl Found {
    /// Adds what of `pages`, which map neighbouring frames from that of `mapping` on, is in `dirty`.
    fn add(&mut self, dirty: &[Range<u64>], pages: Range<u64>, mapping: Mapping) -> Result<(), Full> {
        let frames = mapping.gfn.0..mapping.gfn.0 + (pages.end - pages.start);
        let first = dirty.partition_point(|run| run.end <= frames.start);
        for run in dirty[first..].iter().take_while(|run| run.start < frames.end) {
            let common = run.start.max(frames.start)..run.end.min(frames.end);
            let page = pages.start + (common.start - frames.start);
            self.push(VirtualRun {
                start: page << PAGE_SHIFT,
                frames: PageRange { start: Gfn(common.start), pages: common.end - common.start },
                writable: mapping.writable,
                user: mapping.user,
                no_execute: mapping.no_execute,
            })
            .map_err(|()| Full { page })?;
        }
        Ok(())
    }

    fn push(&mut self, run: VirtualRun) -> Result<(), ()> {
        if let Some(last) = self.runs.last_mut() {
            let goes_on = VirtualRun {
                // The last run of all ends at 2^64, and nothing follows.
                start: last.start.wrapping_add(last.frames.bytes()),
                frames: PageRange { start: last.frames.end(), pages: run.frames.pages },
                ..*last
            };
            if run == goes_on {
                last.frames.pages += run.frames.pages;
                return Ok(());
            }
        }
        if self.runs.len() == self.most {
            return Err(());
        }
        self.runs.push(run);
        Ok(())
    }
}

/// `ranges` in ascending order, with a gap between any two.
fn normalize(ranges: &[PageRange]) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> = ranges
        .iter()
        .map(|range| range.start.0..range.start.0.saturating_add(range.pages))
        .filter(|range| !range.is_empty())
        .collect();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    sorted
}

#[cfg(test)]
mod tests;
