//! What a write to a protected page opens: the page, or its block.
//!
//! Opening a page costs the guest a fault for each page that it writes in an epoch, and tells exactly which those
//! were. Opening the block costs one fault for all of it, keeps a huge mapping huge, and says only that something in
//! it may have been written. The adaptive policy is exact as long as that is cheap: a block that has shown by so many
//! dirty leaves that it is going to be dense is opened whole. And since a dense block tends to stay so, it is opened whole
//! at its first write in the epochs that follow, and looked at leaf by leaf again after some of them.

use std::fmt;
use std::str::FromStr;

use crate::addr::LEAVES_PER_BLOCK;
use crate::fault::text::{ParseError, number};
use crate::stage2::Leaves;

/// What the first write to a protected page opens.
///
/// As text, which [`FromStr`] reads and [`Display`](fmt::Display) writes: `leaf`, `block`, `adaptive`,
/// `adaptive,threshold=64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// The page. Every dirty page is one that was written.
    #[default]
    Leaf,
    /// Everything that is mapped of its block, which is dirty from then on.
    Block,
    /// The page, until so many leaves of its block are dirty; then what is mapped of the block.
    Adaptive(Threshold),
}

/// Dirty leaves of a block from which on [`Split::Adaptive`] opens it whole: 1 to 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold(u16);

impl Threshold {
    /// `leaves`, if it is in range.
    pub fn new(leaves: u64) -> Option<Threshold> {
        (1..=LEAVES_PER_BLOCK).contains(&leaves).then_some(Threshold(leaves as u16))
    }

    /// As a number of leaves.
    pub fn leaves(self) -> usize {
        self.0.into()
    }
}

/// 64: an eighth of a block. By then the faults have cost about what copying the rest of the block would.
impl Default for Threshold {
    fn default() -> Threshold {
        Threshold(64)
    }
}

/// Epochs that a dense block is opened whole before it is looked at again: at a threshold of 64 that look costs as much
/// as four faults in each of them.
const REMEMBERED: u8 = 16;

impl Split {
    /// The leaves to open when `leaf` is written: `leaf` and none that is not `protected`. `dirty` are the leaves of
    /// the block that are dirty before this write, `heat` is what the policy [remembers](Split::remembers) of it.
    pub fn opens(self, leaf: usize, protected: &Leaves, dirty: &Leaves, heat: u8) -> Leaves {
        let one = Leaves::one(leaf);
        let whole = match self {
            Split::Leaf => false,
            Split::Block => true,
            Split::Adaptive(threshold) => heat > 0 || (*dirty | one).count() >= threshold.leaves(),
        };
        if whole { *protected | one } else { one }
    }

    /// The heat of block number `block` after an epoch in which it was written to: for so many epochs more it is opened
    /// whole. `dirty` are the leaves that were dirty, and `coarse` those of them that were just open. Blocks that become
    /// dense together are not looked at again in one and the same epoch.
    pub fn remembers(self, block: u64, heat: u8, dirty: &Leaves, coarse: &Leaves) -> u8 {
        match self {
            Split::Adaptive(threshold) if (*dirty & !*coarse).count() >= threshold.leaves() => {
                REMEMBERED - (block % u64::from(REMEMBERED / 2)) as u8
            }
            Split::Adaptive(_) => heat.saturating_sub(1),
            Split::Leaf | Split::Block => 0,
        }
    }
}

impl FromStr for Split {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Split, ParseError> {
        match text.split_once(',') {
            None if text == "leaf" => Ok(Split::Leaf),
            None if text == "block" => Ok(Split::Block),
            None if text == "adaptive" => Ok(Split::Adaptive(Threshold::default())),
            Some(("adaptive", option)) if option.starts_with("threshold=") => {
                let value = &option["threshold=".len()..];
                number(value).and_then(Threshold::new).map(Split::Adaptive).ok_or_else(|| ParseError::Value {
                    option: "threshold",
                    value: value.to_owned(),
                    must: "a number of leaves from 1 to 512",
                })
            }
            _ => Err(ParseError::Policy {
                what: "split",
                given: text.to_owned(),
                choices: "leaf, block or adaptive[,threshold=64]",
            }),
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Split::Leaf => f.write_str("leaf"),
            Split::Block => f.write_str("block"),
            Split::Adaptive(threshold) => write!(f, "adaptive,threshold={}", threshold.leaves()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn adaptive(leaves: u64) -> Split {
        Split::Adaptive(Threshold::new(leaves).unwrap())
    }

    #[test]
    fn policies_are_read_and_written() {
        for (text, policy) in [
            ("leaf", Split::Leaf),
            ("block", Split::Block),
            ("adaptive,threshold=64", Split::Adaptive(Threshold::default())),
            ("adaptive,threshold=1", adaptive(1)),
            ("adaptive,threshold=512", adaptive(512)),
        ] {
            assert_eq!(text.parse(), Ok(policy));
            assert_eq!(policy.to_string(), text);
        }
        assert_eq!("adaptive".parse(), Ok(Split::Adaptive(Threshold::default())));
        for text in ["", "Leaf", "leaf,", "block,threshold=1", "adaptive,", "adaptive,x=1", " leaf"] {
            assert!(matches!(text.parse::<Split>(), Err(ParseError::Policy { what: "split", .. })), "{text}");
        }
        for value in ["", "0", "513", "+1", "1x", "99999999999999999999"] {
            let text = format!("adaptive,threshold={value}");
            assert!(matches!(text.parse::<Split>(), Err(ParseError::Value { .. })), "{text}");
        }
    }

    #[test]
    fn the_adaptive_policy_changes_over_with_the_leaf_that_reaches_the_threshold() {
        let protected = !Leaves::range(0..63);
        assert_eq!(adaptive(64).opens(63, &protected, &Leaves::range(0..62), 0), Leaves::one(63));
        assert_eq!(adaptive(64).opens(63, &protected, &Leaves::range(0..63), 0), protected);
        // A leaf that is dirty already and protected again counts once.
        assert_eq!(adaptive(64).opens(5, &Leaves::ALL, &Leaves::range(0..63), 0), Leaves::one(5));
    }

    #[test]
    fn a_block_that_was_dense_is_opened_whole_for_some_epochs_and_looked_at_again() {
        let policy = adaptive(64);
        let (exact, opened) = (Leaves::range(0..64), (Leaves::ALL, !Leaves::one(7)));
        for block in 0..40 {
            let mut heat = policy.remembers(block, 0, &exact, &Leaves::NONE);
            let mut epochs = 0;
            while heat > 0 {
                assert_eq!(policy.opens(7, &Leaves::ALL, &Leaves::NONE, heat), Leaves::ALL);
                heat = policy.remembers(block, heat, &opened.0, &opened.1);
                epochs += 1;
            }
            assert!((9..=16).contains(&epochs), "{epochs}");
            assert_eq!(policy.opens(7, &Leaves::ALL, &Leaves::NONE, heat), Leaves::one(7));
            // It has cooled, and is exact from then on; or has not.
            assert_eq!(policy.remembers(block, 0, &Leaves::range(0..63), &Leaves::NONE), 0);
            assert_ne!(policy.remembers(block, 0, &Leaves::ALL, &Leaves::range(64..512)), 0);
        }
        assert_eq!(Split::Leaf.remembers(0, 3, &Leaves::ALL, &Leaves::NONE), 0);
        assert_eq!(Split::Block.remembers(0, 3, &Leaves::ALL, &Leaves::NONE), 0);
    }

    proptest! {
        #[test]
        fn a_plan_has_the_leaf_and_nothing_that_is_open(
            leaf in 0..512usize,
            words in any::<[[u64; 8]; 2]>(),
            threshold in 1..=512u64,
            heat: u8,
        ) {
            let (protected, dirty) = (Leaves(words[0]), Leaves(words[1]));
            for policy in [Split::Leaf, Split::Block, adaptive(threshold)] {
                let plan = policy.opens(leaf, &protected, &dirty, heat);
                prop_assert!(plan.contains(leaf));
                prop_assert!((protected | Leaves::one(leaf)).includes(&plan));
            }
        }
    }
}
