//! In which order blocks are brought in that nobody has asked for yet.
//!
//! A guest goes on from where it is, not from where its memory begins: so from the block after the one that was asked
//! for last, upwards, and then round to the others. Who is asked for one page after the other in between has the next
//! blocks there before the guest is.

use std::collections::BTreeSet;
use std::ops::Bound;

/// A block, or the part of it that a slot has: its number, and the slot's index.
pub(super) type Part = (u64, usize);

/// Blocks that are still to be brought in.
#[derive(Debug)]
pub(super) struct Sweep {
    left: BTreeSet<Part>,
    /// The last one that was handed out.
    at: Part,
    /// What was asked for when it was.
    asked: u64,
}

impl Sweep {
    pub(super) fn new(parts: impl IntoIterator<Item = Part>) -> Sweep {
        Sweep { left: parts.into_iter().collect(), at: (NONE, 0), asked: NONE }
    }

    /// Whether there is no next one.
    pub(super) fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// The next one, each once. `asked` is the block that was asked for last, or [`NONE`].
    pub(super) fn next(&mut self, asked: u64) -> Option<Part> {
        if self.asked != asked {
            (self.asked, self.at) = (asked, (asked, usize::MAX));
        }
        let after = (Bound::Excluded(self.at), Bound::Unbounded);
        let next = self.left.range(after).next().or_else(|| self.left.first()).copied()?;
        self.left.remove(&next);
        self.at = next;
        Some(next)
    }
}

/// No block.
pub(super) const NONE: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_goes_on_from_what_was_asked_for_and_leaves_nothing_out() {
        let mut sweep = Sweep::new([(3, 0), (4, 0), (4, 1), (5, 1), (9, 1), (10, 1)]);
        assert_eq!(sweep.next(NONE), Some((3, 0)));
        assert_eq!(sweep.next(7), Some((9, 1)));
        assert_eq!(sweep.next(7), Some((10, 1)));
        // Round.
        assert_eq!(sweep.next(7), Some((4, 0)));
        assert_eq!(sweep.next(4), Some((5, 1)));
        assert_eq!(sweep.next(4), Some((4, 1)));
        assert!(!Sweep::new([(3, 0)]).is_done() && sweep.is_done());
        assert_eq!(sweep.next(4), None);
        assert_eq!(sweep.next(1), None);
        assert_eq!(Sweep::new([]).next(NONE), None);
    }
}
