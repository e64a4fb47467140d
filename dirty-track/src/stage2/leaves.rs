//! A set of leaves of one block: 512 bits, 64 bytes.

use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not, Range};

use crate::addr::LEAVES_PER_BLOCK;
use crate::bitmap;

/// Words of a set.
pub(super) const WORDS: usize = LEAVES_PER_BLOCK as usize / bitmap::PAGES_PER_WORD;

/// A set of the leaves of a block, numbered from the block's start: 0 to 511.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaves(pub(crate) [u64; WORDS]);

impl Leaves {
    /// No leaf.
    pub const NONE: Leaves = Leaves([0; WORDS]);

    /// Every leaf.
    pub const ALL: Leaves = Leaves([u64::MAX; WORDS]);

    /// The leaf `leaf`, which is below 512.
    pub fn one(leaf: usize) -> Leaves {
        Leaves::range(leaf..leaf + 1)
    }

    /// The leaves of `range`, as far as there are.
    pub fn range(range: Range<usize>) -> Leaves {
        let below = |end: usize, word: usize| match end.saturating_sub(word * bitmap::PAGES_PER_WORD) {
            bits @ 0..bitmap::PAGES_PER_WORD => (1 << bits) - 1,
            _ => u64::MAX,
        };
        Leaves(std::array::from_fn(|word| below(range.end, word) & !below(range.start, word)))
    }

    /// Whether `leaf` is in the set.
    pub fn contains(&self, leaf: usize) -> bool {
        self.0
            .get(leaf / bitmap::PAGES_PER_WORD)
            .is_some_and(|word| word >> (leaf % bitmap::PAGES_PER_WORD) & 1 != 0)
    }

    /// Whether all of `other` is in the set.
    pub fn includes(&self, other: &Leaves) -> bool {
        (*other & !*self).is_empty()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Number of leaves in the set.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The maximal runs of leaves, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        bitmap::runs(&self.0)
    }
}

impl BitAnd for Leaves {
    type Output = Leaves;

    fn bitand(self, other: Leaves) -> Leaves {
        Leaves(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }
}

impl BitOr for Leaves {
    type Output = Leaves;

    fn bitor(self, other: Leaves) -> Leaves {
        Leaves(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }
}

impl BitAndAssign for Leaves {
    fn bitand_assign(&mut self, other: Leaves) {
        *self = *self & other;
    }
}

impl BitOrAssign for Leaves {
    fn bitor_assign(&mut self, other: Leaves) {
        *self = *self | other;
    }
}

impl Not for Leaves {
    type Output = Leaves;

    fn not(self) -> Leaves {
        Leaves(self.0.map(|word| !word))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_range_is_its_leaves(start in 0..600usize, len in 0..600usize) {
            let leaves = Leaves::range(start..start + len);
            for leaf in 0..700 {
                prop_assert_eq!(leaves.contains(leaf), (start..start + len).contains(&leaf) && leaf < 512);
            }
            prop_assert_eq!(leaves.count(), 512.min(start + len) - 512.min(start));
            prop_assert!(leaves.is_empty() == (leaves.count() == 0));
            prop_assert!(leaves.runs().count() <= 1);
            prop_assert_eq!(leaves | !leaves, Leaves::ALL);
            prop_assert_eq!(leaves & !leaves, Leaves::NONE);
            prop_assert!(Leaves::ALL.includes(&leaves) && leaves.includes(&Leaves::NONE));
            prop_assert!(leaves.includes(&Leaves::ALL) == (leaves == Leaves::ALL));
        }
    }
}
