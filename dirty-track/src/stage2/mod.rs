//! The monitor's own record of how guest memory is mapped, block by block.
//!
//! # Why
//! The kernel knows which pages of a guest are mapped, write-protected and written, and tells each of these by
//! another call, at a cost that grows with the guest. What the monitor did itself it can remember: which pages it
//! installed, which of them nobody asked for, which it opened for writing and which it discarded. That is what
//! serving faults, splitting huge pages, harvesting and the working set are decided by.
//!
//! # What it costs
//! A block of 2 MiB takes 25 bytes while all of its leaves are alike, absent or mapped as one, and a table of 256
//! bytes more while they are not. A guest of 64 GiB that was never touched takes 804 KiB.
//!
//! # What is recorded
//! A leaf is absent, or absent because its contents were *dropped* (it reads as zero then, whatever its source holds),
//! or present. A present leaf is *protected* or open. It is *dirty* when it was written, or may have been. It is
//! *old* when it came along with another and was not seen to be touched. Always
//!
//! > what is present and not protected is dirty,
//!
//! so taking dirty leaves out of the record is the same step as protecting them ([`Block::clean`]), and a block that
//! is not tracked is one that is dirty all over. What is dirty for no other reason than that it is open is *coarse*:
//! nobody saw it being written, and nobody would have.
//!
//! # Transitions
//! Of a block; *some* means some of its leaves and not all, *all* means all. A slot may have only part of a block, at
//! its ends: such a block is never huge, and *all* means all that there are. Whatever is not in the table stays as
//! it is.
//!
//! | operation | absent | huge | split |
//! |---|---|---|---|
//! | [`map`](Block::map) | split | | absent leaves become present |
//! | [`map_huge`](Block::map_huge) | huge; dirty if any leaf was, or if open | refused | refused |
//! | [`split`](Block::split) | | split, all leaves as the huge mapping was | |
//! | [`collapse`](Block::collapse) | refused | | huge if all are present and all or none protected; dirty if any was, old if all were; refused otherwise |
//! | [`protect`](Block::protect) all | | huge, protected; dirty if it was open | leaves protected; dirty if they were open |
//! | [`protect`](Block::protect) some | | split if it was open | leaves protected |
//! | [`open`](Block::open) all | | huge, open | leaves open |
//! | [`open`](Block::open) some | | split if it was protected | leaves open |
//! | [`mark`](Block::mark) some | leaves dirty (needs a table) | split if it was clean or coarse | leaves dirty, not coarse |
//! | [`clean`](Block::clean) all | clean | huge, protected, clean | leaves protected, clean |
//! | [`clean`](Block::clean) some | leaves clean | split if it was dirty or open | leaves protected, clean |
//! | [`touch`](Block::touch) some | | young, all of it | leaves young |
//! | [`zap`](Block::zap), contents kept, all | | absent | absent; dirty leaves stay dirty |
//! | [`zap`](Block::zap), contents kept, some | | split, leaves absent | leaves absent |
//! | [`zap`](Block::zap), contents dropped | leaves dropped, dirty | as above; leaves dropped, dirty | as above; leaves dropped, dirty |
//!
//! So what changes nothing splits nothing, and a split has its whole table at once: there is never an empty entry in
//! between. A block none of whose leaves is present is absent whether it has a table or not (it has one if some leaves
//! are dropped or dirty and others are not).
//!
//! # Who may do what
//! Each block has a lock of its own, and [`Block`] holds it. Whoever changes how the kernel maps a block holds its
//! lock from before the call until the record says so: that is the *turn* that keeps record and kernel together, and
//! a harvest and the handlers of faults take turns block by block. Nothing that waits for the guest may be done
//! while a block is held. A harvest looks only at blocks that say that they have dirty leaves, and it finds that out
//! before it takes their locks. A leaf is writable a moment before the record says so, and another vCPU may write to it
//! just then: so a harvest waits first until whoever was making leaves writable when it began has recorded it. Where the
//! kernel changes a mapping by itself the record is coarser, in these ways only:
//!
//! - khugepaged may join small pages: the record says split, and the next partial change splits them again.
//! - Memory may be dropped by whoever shares it, or by `madvise` in this process. Who does that calls
//!   [`zap`](Block::zap) *after* it. A fault that says that a page is missing is right, whatever is recorded.

mod agree;
mod block;
mod leaves;
mod state;
mod walk;

use std::sync::atomic::AtomicU8;
use std::sync::{Mutex, PoisonError};

use crate::addr::{Gfn, LEAVES_PER_BLOCK, PageRange};
use crate::bitmap::{self, DirtyBitmap};

pub use agree::{Difference, Disagreement, Mapped, SecondLevel, Seen, Unexplained};
pub use block::{Block, Contents, Kind, Mapping, NotHuge};
pub use leaves::Leaves;
pub use state::{Leaf, NoMemory, Spare};

use state::State;

/// Memory slots that cannot be recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stage2Error {
    /// A slot without pages, or beyond what an address can name.
    #[error("the slot at frame {0} has no pages, or more than there can be")]
    Size(Gfn),
    /// Two slots have a page in common.
    #[error("the slot at frame {0} overlaps another")]
    Overlap(Gfn),
}

/// The record of all slots; see the [module](self).
#[derive(Debug)]
pub struct Stage2 {
    /// In the order of their frames.
    slots: Vec<SlotRecord>,
}

#[derive(Debug)]
struct SlotRecord {
    frames: PageRange,
    blocks: Box<[Mutex<State>]>,
    /// Of each block, while it is held.
    heat: Box<[AtomicU8]>,
    /// A bit for each block: it may have dirty leaves. Set while the block is held.
    dirty: DirtyBitmap,
}

// What the module's documentation says about memory.
const _: () = assert!(size_of::<Mutex<State>>() == 24);
const _: () = assert!(size_of::<state::Planes>() == 256);

impl Stage2 {
    /// A record of `slots`, in any order, nothing of which is mapped.
    ///
    /// # Errors
    /// [`Stage2Error`].
    pub fn new(slots: impl IntoIterator<Item = PageRange>) -> Result<Stage2, Stage2Error> {
        let mut slots: Vec<_> = slots.into_iter().collect();
        slots.sort_by_key(|frames| frames.start);
        let mut end = 0;
        for frames in &slots {
            let slot_end = frames.start.0.checked_add(frames.pages).filter(|end| *end <= LAST_FRAME);
            let Some(slot_end) = slot_end.filter(|_| frames.pages > 0) else {
                return Err(Stage2Error::Size(frames.start));
            };
            if frames.start.0 < end {
                return Err(Stage2Error::Overlap(frames.start));
            }
            end = slot_end;
        }
        Ok(Stage2 { slots: slots.into_iter().map(SlotRecord::new).collect() })
    }

    /// The slots, in the order of their frames.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = PageRange> + '_ {
        self.slots.iter().map(|slot| slot.frames)
    }

    /// The block of `gfn`, once nobody else has it; none if no slot has the page. A thread must not ask for a block
    /// while it has one.
    pub fn block(&self, gfn: Gfn) -> Option<Block<'_>> {
        let after = self.slots.partition_point(|slot| slot.frames.start <= gfn);
        let slot = &self.slots[after.checked_sub(1)?];
        slot.frames.contains(gfn).then(|| slot.block((gfn.block() - slot.frames.start.block()) as usize))
    }

    /// Gives each block that has pages of `range`, in ascending order, to `each`, together with those pages.
    ///
    /// # Errors
    /// The first that `each` returns; the blocks after it are not looked at.
    pub fn each<E>(
        &self,
        range: PageRange,
        mut each: impl FnMut(&mut Block<'_>, Leaves) -> Result<(), E>,
    ) -> Result<(), E> {
        for slot in &self.slots {
            let start = slot.frames.start.max(range.start);
            let end = slot.frames.end().0.min(range.start.0.saturating_add(range.pages));
            if start.0 >= end {
                continue;
            }
            let base = slot.frames.start.block();
            for index in start.block() - base..=Gfn(end - 1).block() - base {
                let mut block = slot.block(index as usize);
                let leaves = block.leaves(PageRange { start, pages: end - start.0 });
                each(&mut block, leaves)?;
            }
        }
        Ok(())
    }

    /// Gives each block that has dirty leaves to `each`, in ascending order of each slot. Of a block that becomes
    /// dirty meanwhile this call or the next has it. Blocks that are not dirty cost a bit each.
    ///
    /// # Errors
    /// The first that `each` returns; that block and those after it are kept for the next call.
    pub fn each_dirty<E>(&self, mut each: impl FnMut(&mut Block<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut outcome = Ok(());
        for slot in &self.slots {
            slot.dirty.drain(|word, bits| {
                let numbers = (0..bitmap::PAGES_PER_WORD).filter(|bit| bits >> bit & 1 != 0);
                for index in numbers.map(|bit| word * bitmap::PAGES_PER_WORD + bit) {
                    let mut block = slot.block(index);
                    if outcome.is_ok() && !block.dirty().is_empty() {
                        outcome = each(&mut block);
                    }
                    block.note();
                }
            });
        }
        outcome
    }

    /// Bytes that the record takes now.
    pub fn bytes(&self) -> usize {
        let slot = |slot: &SlotRecord| {
            let tables: usize = (0..slot.blocks.len()).map(|index| slot.block(index).table_bytes()).sum();
            size_of_val(&*slot.blocks)
                + size_of_val(&*slot.heat)
                + bitmap::words_for(slot.blocks.len()) * size_of::<u64>()
                + tables
        };
        self.slots.iter().map(slot).sum()
    }
}

/// Frames that an address of 64 bits can name.
const LAST_FRAME: u64 = 1 << 52;

impl SlotRecord {
    fn new(frames: PageRange) -> SlotRecord {
        let blocks = (Gfn(frames.end().0 - 1).block() - frames.start.block() + 1) as usize;
        let absent = || Mutex::new(State::Whole(Leaf::default()));
        SlotRecord {
            frames,
            blocks: (0..blocks).map(|_| absent()).collect(),
            heat: (0..blocks).map(|_| AtomicU8::new(0)).collect(),
            dirty: DirtyBitmap::new(blocks),
        }
    }

    fn block(&self, index: usize) -> Block<'_> {
        let first = Gfn((self.frames.start.block() + index as u64) * LEAVES_PER_BLOCK);
        let leaf = |gfn: u64| gfn.saturating_sub(first.0).min(LEAVES_PER_BLOCK) as usize;
        Block {
            // No transition can stop half-way by a panic: there is none in one.
            state: self.blocks[index].lock().unwrap_or_else(PoisonError::into_inner),
            first,
            own: Leaves::range(leaf(self.frames.start.0)..leaf(self.frames.end().0)),
            index,
            heat: &self.heat[index],
            dirty: &self.dirty,
        }
    }
}

#[cfg(test)]
mod tests;
