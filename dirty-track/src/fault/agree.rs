//! Keeping the record and the kernel of one mind: what was mapped before, what is dropped, and what is only thought to
//! be there.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::addr::{Gfn, LEAVES_PER_BLOCK, PageRange};
use crate::fault::FaultError;
use crate::fault::serve::{Kernel, Pager, Worker};
use crate::stage2::{Block, Contents, Disagreement, Leaves, Mapping, Seen, Spare};

impl<K: Kernel> Pager<K> {
    /// Records what is mapped already. It can be written without anybody seeing it, until it is protected.
    pub(super) fn adopt(&self) -> Result<(), FaultError> {
        let mut spare = Spare::default();
        for (index, slot) in self.slots.iter().enumerate() {
            // Most often there is nothing at all, which is found out faster for all of it than block by block.
            let mut blocks = BTreeSet::new();
            let frame = |page: usize| Gfn(slot.frames.start.0 + page as u64);
            let there = self.kernel.there(index, 0..slot.frames.pages as usize, &mut |pages| {
                blocks.extend(frame(pages.start).block()..=frame(pages.end - 1).block());
            });
            there.map_err(|source| FaultError::Look { range: slot.frames, source })?;
            for number in blocks {
                let start = (number * LEAVES_PER_BLOCK).max(slot.frames.start.0);
                let end = ((number + 1) * LEAVES_PER_BLOCK).min(slot.frames.end().0);
                self.stage2.each(PageRange { start: Gfn(start), pages: end - start }, |block, _| {
                    spare.fill()?;
                    let seen = self.seen(block, index)?;
                    if block.own() == Leaves::ALL && seen.huge == Leaves::ALL && seen.protected.is_empty() {
                        // Nothing of it was recorded, so it cannot be refused.
                        let _ = block.map_huge(Mapping { protected: false, old: false });
                    }
                    Ok::<_, FaultError>(map_as_seen(block, &seen, &block.own(), &mut spare)?)
                })?;
            }
        }
        Ok(())
    }

    /// Records those of `leaves` that are mapped although nobody knew.
    pub(super) fn recall(
        &self,
        block: &mut Block<'_>,
        index: usize,
        leaves: Leaves,
        spare: &mut Spare,
    ) -> Result<(), FaultError> {
        let seen = self.seen(block, index)?;
        Ok(map_as_seen(block, &seen, &leaves, spare)?)
    }

    /// The host drops or unmaps what is at `addresses`.
    pub(super) fn removed(&self, worker: &mut Worker, addresses: Range<u64>) -> Result<(), FaultError> {
        for slot in &self.slots {
            let start = addresses.start.max(slot.hva);
            let end = addresses.end.min(slot.addresses().end);
            if start >= end {
                continue;
            }
            let page = |address: u64| (address - slot.hva) / crate::addr::PAGE_SIZE;
            let range = PageRange {
                start: Gfn(slot.frames.start.0 + page(start)),
                pages: page(end - 1) + 1 - page(start),
            };
            self.stage2.each(range, |block, leaves| {
                worker.spare.fill()?;
                self.counters.removed.add((block.present() & leaves).count());
                self.counters.unmapped_old.add((block.old() & leaves).count());
                block.zap(&leaves, Contents::Dropped, &mut worker.spare)
            })?;
        }
        Ok(())
    }

    /// In what the record and the kernel disagree, block by block.
    pub(super) fn check(&self) -> Result<Vec<Disagreement>, FaultError> {
        let mut found = Vec::new();
        drop(self.news());
        self.each_block(|index, block| {
            found.extend(block.differences(&self.seen(block, index)?));
            Ok(())
        })?;
        Ok(found)
    }

    /// Gives every block to `each`, with the index of its slot.
    pub(super) fn each_block(
        &self,
        mut each: impl FnMut(usize, &mut Block<'_>) -> Result<(), FaultError>,
    ) -> Result<(), FaultError> {
        for (index, slot) in self.slots.iter().enumerate() {
            self.stage2.each(slot.frames, |block, _| each(index, block))?;
        }
        Ok(())
    }

    /// What the kernel says about a block that is held.
    pub(super) fn seen(&self, block: &Block<'_>, index: usize) -> Result<Seen, FaultError> {
        let slot = &self.slots[index];
        // A slot has a block's leaves without gaps.
        let Some(run) = block.own().runs().next() else { return Ok(Seen::default()) };
        let pages = slot.pages(block.first(), &run);
        let leaf = run.start;
        self.kernel
            .look(index, pages, leaf)
            .map_err(|source| FaultError::Look { range: block.frames(run), source })
    }

    /// The slot that has the block, which is recorded.
    pub(super) fn slot_of(&self, block: &Block<'_>) -> Option<usize> {
        let leaf = block.own().runs().next()?.start;
        debug_assert!(leaf < LEAVES_PER_BLOCK as usize);
        let gfn = Gfn(block.first().0 + leaf as u64);
        self.slots.iter().position(|slot| slot.frames.contains(gfn))
    }
}

/// Records those of `leaves` that were seen to be mapped as they were seen.
fn map_as_seen(
    block: &mut Block<'_>,
    seen: &Seen,
    leaves: &Leaves,
    spare: &mut Spare,
) -> Result<(), crate::stage2::NoMemory> {
    let present = seen.present & *leaves;
    for (mapped, protected) in [(present & !seen.protected, false), (present & seen.protected, true)] {
        block.map(&mapped, Mapping { protected, old: false }, spare)?;
    }
    Ok(())
}
