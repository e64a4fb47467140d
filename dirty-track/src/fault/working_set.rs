//! The pages that a guest used, to be fetched first the next time.

use std::fmt;
use std::str::FromStr;

use crate::addr::{Gfn, PageRange};
use crate::fault::text::ParseError;
use crate::stage2::{Block, Leaves, NoMemory, Stage2};

/// A set of frames.
///
/// As text, which [`FromStr`] reads and [`Display`](fmt::Display) writes, it is a range a line: the first frame in
/// hexadecimal, a plus, and the number of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// In ascending order, with gaps between them.
    ranges: Vec<PageRange>,
}

impl WorkingSet {
    /// The pages of `ranges`, which may come in any order and overlap. What is beyond the last frame that an address
    /// can name is left out.
    pub fn new(ranges: impl IntoIterator<Item = PageRange>) -> WorkingSet {
        const END: u64 = 1 << 52;
        let mut ranges: Vec<_> =
            ranges.into_iter().filter(|range| range.pages > 0 && range.start.0 < END).collect();
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<PageRange> = Vec::new();
        for range in ranges {
            let end = range.start.0.saturating_add(range.pages).min(END);
            match merged.last_mut() {
                Some(last) if range.start <= last.end() => last.pages = last.pages.max(end - last.start.0),
                _ => merged.push(PageRange { start: range.start, pages: end - range.start.0 }),
            }
        }
        WorkingSet { ranges: merged }
    }

    /// What is mapped according to `stage2` and not old: the pages that the guest is known to have touched. A page
    /// that came along and was only read is not in it.
    pub fn touched(stage2: &Stage2) -> WorkingSet {
        let mut ranges = Vec::new();
        let everything = PageRange { start: Gfn(0), pages: u64::MAX };
        let outcome = stage2.each(everything, |block, leaves| {
            let young = block.present() & !block.old() & leaves;
            ranges.extend(young.runs().map(|run| block.frames(run)));
            Ok::<_, NoMemory>(())
        });
        debug_assert_eq!(outcome, Ok(()), "nothing was changed");
        WorkingSet::new(ranges)
    }

    /// Its ranges in ascending order.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages).sum()
    }

    /// Its leaves in `block`.
    pub fn leaves(&self, block: &Block<'_>) -> Leaves {
        let first = self.ranges.partition_point(|range| range.end() <= block.first());
        let mut leaves = Leaves::NONE;
        for range in
            self.ranges[first..].iter().take_while(|range| range.start.block() <= block.first().block())
        {
            leaves |= block.leaves(*range);
        }
        leaves
    }
}

impl FromStr for WorkingSet {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<WorkingSet, ParseError> {
        let range = |(index, text): (usize, &str)| {
            let parse = || {
                let (start, pages) = text.strip_prefix("0x")?.split_once('+')?;
                let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
                let start = plain(start).then(|| u64::from_str_radix(start, 16).ok())??;
                let pages = plain(pages).then(|| pages.parse().ok())??;
                Some(PageRange { start: Gfn(start), pages })
            };
            parse()
                .ok_or_else(|| ParseError::Range { line: index + 1, text: text.chars().take(40).collect() })
        };
        Ok(WorkingSet::new(text.lines().enumerate().map(range).collect::<Result<Vec<_>, _>>()?))
    }
}

impl fmt::Display for WorkingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ranges.iter().try_for_each(|range| writeln!(f, "{range}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::stage2::{Mapping, Spare};

    proptest! {
        #[test]
        fn it_is_the_pages_of_its_ranges(
            ranges in prop::collection::vec((0..2000u64, 0..90u64), 0..20),
            first in 0..600u64,
        ) {
            let ranges = ranges.into_iter().map(|(start, pages)| PageRange { start: Gfn(start), pages });
            let naive: BTreeSet<_> = ranges.clone().flat_map(|range| range.iter()).collect();
            let set = WorkingSet::new(ranges);
            prop_assert_eq!(set.pages(), naive.len() as u64);
            prop_assert_eq!(set.to_string().parse::<WorkingSet>(), Ok(set.clone()));
            let stage2 = Stage2::new([PageRange { start: Gfn(first), pages: 1200 }]).unwrap();
            for at in (first..first + 1200).step_by(97) {
                let block = stage2.block(Gfn(at)).unwrap();
                let leaves = set.leaves(&block);
                let all = block.first().0..block.first().0 + 512;
                for (leaf, gfn) in all.enumerate() {
                    let there = naive.contains(&Gfn(gfn)) && block.own().contains(leaf);
                    prop_assert_eq!(leaves.contains(leaf), there);
                }
            }
        }

        #[test]
        fn no_text_panics(text in "(0x[0-9a-f]{0,18}\\+[0-9]{0,22}|.{0,8}\n){0,5}") {
            if let Ok(set) = text.parse::<WorkingSet>() {
                prop_assert!(set.pages() <= 1 << 52);
            }
        }
    }

    #[test]
    fn what_is_no_range_is_an_error_with_its_line() {
        for text in ["0x10+1\n\n", "0x10+1\n10+1", "0x10+1\n0x+1", "0x10+1\n0x1+-1", "0x10+1\n0x+1+1"] {
            assert!(matches!(text.parse::<WorkingSet>(), Err(ParseError::Range { line: 2, .. })), "{text}");
        }
    }

    #[test]
    fn what_came_along_is_not_in_it() {
        let stage2 = Stage2::new([PageRange { start: Gfn(0), pages: 2000 }]).unwrap();
        let mut block = stage2.block(Gfn(600)).unwrap();
        let mut spare = Spare::default();
        block.map(&Leaves::range(88..90), Mapping { protected: true, old: false }, &mut spare).unwrap();
        block.map(&Leaves::range(80..100), Mapping { protected: true, old: true }, &mut spare).unwrap();
        block.touch(&Leaves::one(99));
        drop(block);
        let range = |start, pages| PageRange { start: Gfn(start), pages };
        assert_eq!(WorkingSet::touched(&stage2).ranges(), [range(600, 2), range(611, 1)]);
    }
}
