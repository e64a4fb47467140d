//! Blocks that are on their way, brought in by who works ahead.
//!
//! A handler that is asked for a page of such a block would fetch a second time what is about to come, and leave in pieces
//! what could be a huge page. So it leaves who asks to the one who has claimed the block, and who wakes them when the block
//! is there, or cannot be had: then they ask again, and a handler serves them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::addr::Gfn;

/// What is claimed: a block for each thread that works ahead.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<Vec<Claim>>);

#[derive(Debug)]
struct Claim {
    block: u64,
    slot: usize,
    sleepers: usize,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, Vec<Claim>> {
        // A list, whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the part of the block of `gfn` that is in `slot`. Several may: each ends one claim, whoever's it is.
    pub(super) fn begin(&self, slot: usize, gfn: Gfn) {
        self.lock().push(Claim { block: gfn.block(), slot, sleepers: 0 });
    }

    /// Leaves somebody who sleeps there to who has claimed it; does nothing and says so if nobody has.
    pub(super) fn leave(&self, slot: usize, gfn: Gfn) -> bool {
        let mut claims = self.lock();
        let claim = claims.iter_mut().find(|claim| (claim.block, claim.slot) == (gfn.block(), slot));
        claim.map(|claim| claim.sleepers += 1).is_some()
    }

    /// Gives up a claim, and returns how many were left to it: they are to be woken.
    pub(super) fn end(&self, slot: usize, gfn: Gfn) -> usize {
        let mut claims = self.lock();
        let at = claims.iter().position(|claim| (claim.block, claim.slot) == (gfn.block(), slot));
        at.map_or(0, |at| claims.swap_remove(at).sleepers)
    }
}
