//! Huge mappings for memory whose tracking has split them.
//!
//! Tracking splits a huge page of the host at its first write (by userfaultfd) or leaves it alone (KVM's logs, which
//! split second-level mappings only). Those that were split come back one day, when khugepaged passes by. This brings
//! them back at once, for about a quarter of a millisecond a block: too much to do unasked, while a guest may want
//! its memory, so no tracker does it when it is disarmed. KVM's own mappings follow at the guest's next touch.

use crate::addr::BLOCK_SIZE;
use crate::sys;
use crate::tracker::Slot;

/// What became of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collapsed {
    /// Blocks that are huge now, or were before.
    pub huge: u64,
    /// Blocks that are not: the kernel had no huge page, or would not do it for this memory, or somebody held a page.
    pub small: u64,
}

/// Asks for a huge page for every whole block of `slots` that is aligned in this process. Disarm first: what is
/// write-protected by userfaultfd does not collapse. Memory that was never touched counts as small, or is allocated
/// when a part of its block was.
pub fn collapse(slots: &[Slot]) -> Collapsed {
    let mut collapsed = Collapsed::default();
    for slot in slots {
        let mut offset = slot.hva().next_multiple_of(BLOCK_SIZE) - slot.hva();
        while offset + BLOCK_SIZE <= slot.len() {
            match sys::collapse::collapse(slot, offset) {
                Ok(()) => collapsed.huge += 1,
                Err(_) => collapsed.small += 1,
            }
            offset += BLOCK_SIZE;
        }
    }
    collapsed
}
