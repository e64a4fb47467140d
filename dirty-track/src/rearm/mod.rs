//! Re-arming: what to write-protect again when an epoch ends.
//!
//! # Why
//! Under a log that works by write protection the guest pays a fault (5 us here) for the first write to each
//! page of an epoch. A guest that rewrites a block of 512 pages in every epoch pays 512 faults each time to
//! tell what was known before. [`Rearm::DenseSkip`] leaves such a block writable: it costs no faults, its
//! pages count as dirty in every epoch, and the harvest marks them *coarse*, which is to say that they may
//! have been written. That trade, guest faults against bytes sent, is the user's to make, and
//! [`refine`](crate::refine) takes part of it back: it compares contents.
//!
//! # The policy
//! A block is in one of three states, and an epoch's end takes it to the next:
//!
//! | state | the epoch's dirty leaves | next | protected again |
//! |---|---|---|---|
//! | exact | fewer than the threshold | exact | all dirty leaves |
//! | exact | at least the threshold | open, for *n* epochs | none |
//! | open, for *n* > 1 more epochs | not known | open, for *n* - 1 | none |
//! | open, for the last epoch | not known | probed | [`PROBES`] leaves, one in each part of the block |
//! | probed | of the probes: at least half of the threshold's share | open, for `for_epochs` | none |
//! | probed | fewer | exact | all dirty leaves |
//!
//! Why a probe and not the whole block: re-protecting all of a block that is still dense costs 512 faults.
//! One epoch of that in 17 would still hold a guest back 15 times; two faults in 17 epochs are not felt.
//! So a dense block never goes back to exact tracking just to look; one that has cooled does, at most
//! `for_epochs` + 1 epochs later. Half the threshold, because two probes are a small sample: a block at
//! 80 % under a threshold of 75 % is taken for cool in 4 of 100 probes, and one that dropped to 1 % passes
//! for hot in 2 of 100. Which leaves are probed changes each time, so no pattern can hide from it for long.
//!
//! Blocks that become dense together do not stay in step: *n* is `for_epochs` or less at first, depending on
//! the block's number, so the probes of a large guest spread over the epochs.
//!
//! # Correctness
//! Not protecting a page is not clearing its log bit. In KVM's manual mode a bit that is set stays set, and
//! the next KVM_GET_DIRTY_LOG returns it again: a leaf that may be writable is reported in every epoch. A
//! leaf of an open block whose bit is *not* set is still write-protected (under logging KVM maps by 4 KiB, and
//! maps or makes writable no page without setting its bit), so its first write is logged as ever. So the rule
//! **bit set, or write-protected** holds for each single leaf whatever the plan says, and no plan can lose a
//! write; a bad one costs faults or bytes. (Linux, virt/kvm/kvm_main.c: `kvm_get_dirty_log_protect`,
//! `kvm_clear_dirty_log_protect`; arch/x86/kvm/mmu/spte.c: `make_spte`.) With page-modification logging the
//! processor's dirty flag takes the place of write protection, and the rule is the same.
//!
//! A *block* is here 512 pages counted from the slot's start: one of guest-physical memory where the slot
//! begins at a multiple of 2 MiB, as RAM does.

mod text;

use crate::addr::LEAVES_PER_BLOCK;
use crate::bitmap::{self, PAGES_PER_WORD};
use crate::mix::{below, mix};

pub use text::ParseError;

/// Leaves of an open block that are protected to find out whether it is still dense.
pub const PROBES: usize = 2;

const WORDS_PER_BLOCK: usize = LEAVES_PER_BLOCK as usize / PAGES_PER_WORD;

/// Which pages are write-protected again when an epoch ends; see the [module](self).
///
/// As text, which [`FromStr`](std::str::FromStr) reads and [`Display`](std::fmt::Display) writes: `all`,
/// `dense-skip`, `dense-skip,threshold=75%,for-epochs=16`; a threshold without `%` is a number of leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rearm {
    /// Every page that was dirty. Each epoch is exact.
    #[default]
    All,
    /// Blocks that were dense stay writable for some epochs.
    DenseSkip(DenseSkip),
}

/// The parameters of [`Rearm::DenseSkip`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseSkip {
    threshold: u16,
    for_epochs: u8,
}

/// A parameter of [`DenseSkip`] that is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RearmError {
    /// The threshold.
    #[error("a threshold of {0} leaves: a block has 512, so give 1 to 512, or 1% to 100%")]
    Threshold(u64),
    /// The number of epochs.
    #[error("dense blocks left writable for {0} epochs: give 1 to {max}", max = DenseSkip::MAX_EPOCHS)]
    Epochs(u64),
}

impl DenseSkip {
    /// Most epochs that a block can be left writable before it is looked at.
    pub const MAX_EPOCHS: u8 = 250;

    /// Blocks with at least `threshold` of their 512 leaves dirty are left writable for `for_epochs` epochs
    /// at a time. Of the smaller block at a slot's end, the same share counts.
    ///
    /// # Errors
    /// [`RearmError`] when `threshold` is not 1 to 512 or `for_epochs` not 1 to [`DenseSkip::MAX_EPOCHS`].
    pub fn new(threshold: u64, for_epochs: u64) -> Result<DenseSkip, RearmError> {
        if threshold == 0 || threshold > LEAVES_PER_BLOCK {
            return Err(RearmError::Threshold(threshold));
        }
        match u8::try_from(for_epochs) {
            Ok(epochs @ 1..=DenseSkip::MAX_EPOCHS) => {
                Ok(DenseSkip { threshold: threshold as u16, for_epochs: epochs })
            }
            _ => Err(RearmError::Epochs(for_epochs)),
        }
    }

    /// Dirty leaves that make a block dense.
    pub fn threshold(self) -> u64 {
        self.threshold.into()
    }

    /// Epochs that a dense block is left writable before it is looked at.
    pub fn for_epochs(self) -> u64 {
        self.for_epochs.into()
    }

    /// Whether `dirty` of `leaves` reach the threshold's share.
    fn is_dense(self, dirty: u64, leaves: u64) -> bool {
        dirty * LEAVES_PER_BLOCK >= self.threshold() * leaves
    }
}

impl Default for DenseSkip {
    /// Three quarters of a block, for 16 epochs.
    fn default() -> DenseSkip {
        DenseSkip { threshold: 384, for_epochs: 16 }
    }
}

/// What is known about a block, in one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockState(u8);

impl BlockState {
    /// Every leaf that is not dirty is protected.
    pub const EXACT: BlockState = BlockState(0);
    /// Its dirty leaves are writable but for the probes.
    pub const PROBED: BlockState = BlockState(u8::MAX);

    /// Its dirty leaves are writable, for this epoch and `epochs` - 1 more.
    fn open(epochs: u8) -> BlockState {
        BlockState(epochs)
    }

    /// Whether the block is tracked exactly in this epoch.
    pub fn is_exact(self) -> bool {
        self == BlockState::EXACT
    }
}

/// Which dirty leaves of a block are to be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protect {
    /// All.
    All,
    /// None: they stay writable.
    None,
    /// Only those that the next probe looks at.
    Probes,
}

/// What an epoch showed of one block. Of an open block it showed nothing: what is said of that is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Leaves that the block has; fewer than 512 at a slot's end.
    pub leaves: u64,
    /// Leaves in the log. Only looked at in [`BlockState::EXACT`].
    pub dirty: u64,
    /// Leaves that were probed: 0 but in [`BlockState::PROBED`].
    pub probed: u64,
    /// Those of them in the log.
    pub probed_dirty: u64,
}

impl Rearm {
    /// What the end of an epoch does to block number `block`: the table in the [module](self), as a function.
    pub fn step(self, block: usize, state: BlockState, seen: Seen) -> (BlockState, Protect) {
        let Rearm::DenseSkip(skip) = self else { return (BlockState::EXACT, Protect::All) };
        match state {
            BlockState::EXACT if seen.dirty > 0 && skip.is_dense(seen.dirty, seen.leaves) => {
                let staggered = 1 + block % usize::from(skip.for_epochs);
                (BlockState::open(staggered as u8), Protect::None)
            }
            BlockState::EXACT => (BlockState::EXACT, Protect::All),
            BlockState::PROBED if seen.probed > 0 && skip.is_dense(2 * seen.probed_dirty, seen.probed) => {
                (BlockState::open(skip.for_epochs), Protect::None)
            }
            BlockState::PROBED => (BlockState::EXACT, Protect::All),
            BlockState(0..=1) => (BlockState::PROBED, Protect::Probes),
            // A policy with fewer epochs may have come since.
            BlockState(epochs) => (BlockState::open((epochs - 1).min(skip.for_epochs)), Protect::None),
        }
    }
}

/// The leaves that the probe of epoch `epoch` looks at in block `block`, which has `leaves` leaves: one in
/// each of [`PROBES`] equal parts.
fn probes(block: usize, epoch: u32, leaves: usize) -> [u64; WORDS_PER_BLOCK] {
    let mut words = [0; WORDS_PER_BLOCK];
    let seed = mix((block as u64) << 32 | u64::from(epoch));
    for part in 0..PROBES {
        let (start, end) = (part * leaves / PROBES, (part + 1) * leaves / PROBES);
        if start < end {
            let leaf = start + below(seed ^ part as u64, (end - start) as u64) as usize;
            words[leaf / PAGES_PER_WORD] |= 1 << (leaf % PAGES_PER_WORD);
        }
    }
    words
}

/// The re-arming of one slot: a [`BlockState`] for each block, and the plan at each epoch's end.
///
/// At an epoch's end call [`coarse`](SlotRearm::coarse), then [`plan`](SlotRearm::plan), with the epoch's log.
#[derive(Clone, Debug)]
pub struct SlotRearm {
    policy: Rearm,
    pages: usize,
    /// Empty as long as no policy needs it.
    states: Vec<BlockState>,
    /// Number of states that are not exact.
    open: usize,
    /// Number of plans made; chooses the leaves to probe.
    epoch: u32,
}

impl SlotRearm {
    /// The re-arming of a slot of `pages` pages by `policy`, with all blocks exact.
    pub fn new(policy: Rearm, pages: usize) -> SlotRearm {
        let mut slot = SlotRearm { policy: Rearm::All, pages, states: Vec::new(), open: 0, epoch: 0 };
        slot.set_policy(policy);
        slot
    }

    /// Changes the policy. Blocks that are open stay so until the epoch's end; [`Rearm::All`] closes them then.
    pub fn set_policy(&mut self, policy: Rearm) {
        self.policy = policy;
        if policy != Rearm::All && self.states.is_empty() {
            self.states = vec![BlockState::EXACT; self.pages.div_ceil(LEAVES_PER_BLOCK as usize)];
        }
    }

    /// Makes all blocks exact: their pages have just been protected.
    pub fn reset(&mut self) {
        self.states.fill(BlockState::EXACT);
        self.open = 0;
    }

    /// Number of blocks that are not tracked exactly in this epoch.
    pub fn open_blocks(&self) -> usize {
        self.open
    }

    /// Hands `take` those pages of the epoch's `log` (one bit a page, see [`crate::bitmap`]) that were
    /// writable since the epoch began, so that nobody knows whether they were written: as (word number, bits).
    pub fn coarse(&self, log: &[u64], mut take: impl FnMut(usize, u64)) {
        if self.open == 0 {
            return;
        }
        for (block, (state, words)) in self.states.iter().zip(log.chunks(WORDS_PER_BLOCK)).enumerate() {
            if state.is_exact() {
                continue;
            }
            let exact = self.probed(block, *state);
            for (index, (word, exact)) in words.iter().zip(exact).enumerate() {
                if word & !exact != 0 {
                    take(block * WORDS_PER_BLOCK + index, word & !exact);
                }
            }
        }
    }

    /// Closes the epoch: takes out of its `log` the pages that are to stay writable. What is left in `log` is
    /// to be protected. Nothing is allocated.
    pub fn plan(&mut self, log: &mut [u64]) {
        if self.policy == Rearm::All && self.open == 0 {
            return;
        }
        let mut open = 0;
        for (block, words) in log.chunks_mut(WORDS_PER_BLOCK).enumerate().take(self.states.len()) {
            let state = self.states[block];
            if state.is_exact() && words.iter().fold(0, |any, word| any | word) == 0 {
                continue;
            }
            let leaves = self.leaves(block);
            let seen = self.seen(block, state, words);
            let (next, protect) = self.policy.step(block, state, seen);
            match protect {
                Protect::All => {}
                Protect::None => words.fill(0),
                Protect::Probes => {
                    let probes = probes(block, self.epoch.wrapping_add(1), leaves);
                    words.iter_mut().zip(probes).for_each(|(word, probe)| *word &= probe);
                }
            }
            self.states[block] = next;
            open += usize::from(!next.is_exact());
        }
        self.open = open;
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// What the epoch showed of block `block`, as far as `step` looks at it in `state`: counting bits is most of
    /// the cost of a plan.
    fn seen(&self, block: usize, state: BlockState, words: &[u64]) -> Seen {
        let mut seen = Seen { leaves: self.leaves(block) as u64, dirty: 0, probed: 0, probed_dirty: 0 };
        if state == BlockState::EXACT {
            seen.dirty = bitmap::count(words) as u64;
        } else if state == BlockState::PROBED {
            for (word, probed) in words.iter().zip(self.probed(block, state)) {
                seen.probed += u64::from(probed.count_ones());
                seen.probed_dirty += u64::from((word & probed).count_ones());
            }
        }
        seen
    }

    /// Leaves of block `block`.
    fn leaves(&self, block: usize) -> usize {
        (self.pages - block * LEAVES_PER_BLOCK as usize).min(LEAVES_PER_BLOCK as usize)
    }

    /// The leaves of block `block` that are protected in this epoch as probes.
    fn probed(&self, block: usize, state: BlockState) -> [u64; WORDS_PER_BLOCK] {
        if state == BlockState::PROBED {
            probes(block, self.epoch, self.leaves(block))
        } else {
            [0; WORDS_PER_BLOCK]
        }
    }
}

#[cfg(test)]
mod tests;
