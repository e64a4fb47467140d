//! What comes along when a page is missing: its neighbours, its block, or what an earlier run used.
//!
//! Serving one page costs the guest some 20 us, and most of that is the way to the handler and back. A neighbour in
//! the same call costs a tenth. But a page that nobody asked for takes memory and, unless it is told apart, makes the
//! working set look larger than it is: see [`Age`](crate::fault::Age).

use std::fmt;
use std::str::FromStr;

use crate::addr::{BLOCK_SIZE, PAGE_SIZE};
use crate::fault::text::{ParseError, size};
use crate::stage2::Leaves;

/// Which absent pages of the block come along with a page that faulted.
///
/// As text, which [`FromStr`] reads and [`Display`](fmt::Display) writes: `none`, `around=64K`, `block`, `recorded`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefault {
    /// None.
    None,
    /// Those of the aligned window that the page is in.
    Around(Window),
    /// All.
    Block,
    /// Those that are in a recorded [working set](crate::fault::WorkingSet).
    Recorded,
}

/// Size of a window: a power of two from 4 KiB to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window(u64);

impl Window {
    /// A window of `bytes`, if it can be one.
    pub fn new(bytes: u64) -> Option<Window> {
        (bytes.is_power_of_two() && (PAGE_SIZE..=BLOCK_SIZE).contains(&bytes)).then_some(Window(bytes))
    }

    /// Its size.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// 64 KiB: a fault that takes twice as long as one for a page, and brings sixteen.
impl Default for Window {
    fn default() -> Window {
        Window(64 << 10)
    }
}

impl Default for Prefault {
    fn default() -> Prefault {
        Prefault::Around(Window::default())
    }
}

impl Prefault {
    /// The leaves to install when `leaf` is missing: `leaf`, and of the `absent` ones those that the policy has come
    /// along. `recorded` are the leaves of the block that are in the working set.
    pub fn installs(self, leaf: usize, absent: &Leaves, recorded: &Leaves) -> Leaves {
        let along = match self {
            Prefault::None => Leaves::NONE,
            Prefault::Around(window) => {
                let pages = (window.0 / PAGE_SIZE) as usize;
                let start = leaf / pages * pages;
                Leaves::range(start..start + pages)
            }
            Prefault::Block => Leaves::ALL,
            Prefault::Recorded => *recorded,
        };
        along & *absent | Leaves::one(leaf)
    }
}

impl FromStr for Prefault {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Prefault, ParseError> {
        match text.split_once('=') {
            None if text == "none" => Ok(Prefault::None),
            None if text == "block" => Ok(Prefault::Block),
            None if text == "recorded" => Ok(Prefault::Recorded),
            Some(("around", value)) => {
                size(value).and_then(Window::new).map(Prefault::Around).ok_or_else(|| ParseError::Value {
                    option: "around",
                    value: value.to_owned(),
                    must: "a power of two from 4K to 2M",
                })
            }
            _ => Err(ParseError::Policy {
                what: "prefault",
                given: text.to_owned(),
                choices: "none, around=64K, block or recorded",
            }),
        }
    }
}

impl fmt::Display for Prefault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Prefault::None => f.write_str("none"),
            Prefault::Around(Window(bytes)) if *bytes >= 1 << 20 => write!(f, "around={}M", bytes >> 20),
            Prefault::Around(Window(bytes)) => write!(f, "around={}K", bytes >> 10),
            Prefault::Block => f.write_str("block"),
            Prefault::Recorded => f.write_str("recorded"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn around(bytes: u64) -> Prefault {
        Prefault::Around(Window::new(bytes).unwrap())
    }

    #[test]
    fn policies_are_read_and_written() {
        for (text, policy) in [
            ("none", Prefault::None),
            ("around=4K", around(4096)),
            ("around=64K", Prefault::default()),
            ("around=2M", around(2 << 20)),
            ("block", Prefault::Block),
            ("recorded", Prefault::Recorded),
        ] {
            assert_eq!(text.parse(), Ok(policy));
            assert_eq!(policy.to_string(), text);
        }
        assert_eq!("around=1024K".parse(), Ok(around(1 << 20)));
        assert_eq!("around=65536".parse(), Ok(Prefault::default()));
        for text in ["", "all", "around", "block=1", "none,", "around =4K"] {
            assert!(matches!(text.parse::<Prefault>(), Err(ParseError::Policy { .. })), "{text}");
        }
        for value in ["", "K", "0", "4", "5K", "4M", "4k", "-4K", "99999999999999999M", "4\u{212a}"] {
            let text = format!("around={value}");
            assert!(matches!(text.parse::<Prefault>(), Err(ParseError::Value { .. })), "{text}");
        }
    }

    #[test]
    fn a_window_is_aligned_and_has_only_what_is_absent() {
        let absent = Leaves::range(20..400);
        assert_eq!(around(64 << 10).installs(37, &absent, &Leaves::ALL), Leaves::range(32..48));
        assert_eq!(around(64 << 10).installs(22, &absent, &Leaves::ALL), Leaves::range(20..32));
        assert_eq!(around(2 << 20).installs(22, &absent, &Leaves::ALL), absent);
        assert_eq!(Prefault::Block.installs(22, &absent, &Leaves::NONE), absent);
        assert_eq!(Prefault::None.installs(22, &absent, &Leaves::ALL), Leaves::one(22));
        // What the fault says is missing is missing, whatever is thought of it.
        assert_eq!(Prefault::None.installs(5, &absent, &Leaves::ALL), Leaves::one(5));
        let recorded = Leaves::range(10..30);
        assert_eq!(Prefault::Recorded.installs(22, &absent, &recorded), Leaves::range(20..30));
    }

    proptest! {
        #[test]
        fn a_plan_has_the_leaf_and_else_only_absent_ones(
            leaf in 0..512usize,
            words in any::<[[u64; 8]; 2]>(),
            window in 12..=21u32,
        ) {
            let (absent, recorded) = (Leaves(words[0]), Leaves(words[1]));
            for policy in [Prefault::None, Prefault::Block, Prefault::Recorded, around(1 << window)] {
                let plan = policy.installs(leaf, &absent, &recorded);
                prop_assert!(plan.contains(leaf));
                prop_assert!((absent | Leaves::one(leaf)).includes(&plan));
            }
        }
    }
}
