//! The record held against the kernel.
//!
//! What the two may differ in without harm: the kernel takes pages out of page tables that it reclaims, and joins or
//! splits mappings by itself. What they must not differ in is what a harvest relies on; [`Difference`] tells which is
//! which.

use std::fmt;

use crate::addr::PageRange;
use crate::stage2::{Block, Kind, Leaves};

/// How the leaves of a block are mapped, according to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Mapped.
    pub present: Leaves,
    /// Of those: write-protected.
    pub protected: Leaves,
    /// Of those: by a huge page.
    pub huge: Leaves,
}

/// What record and kernel disagree about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Difference {
    /// The kernel has pages mapped of which the record knows nothing: their writes are not seen.
    Unknown,
    /// Pages are recorded as protected and can be written: that is not seen.
    Open,
    /// Pages are recorded as open and are protected: the next write is a fault more. Harmless.
    Protected,
    /// Pages are recorded as mapped and are not: the kernel has taken them back, or is being asked to. Harmless.
    Gone,
    /// One has a huge mapping where the other has small ones. Harmless.
    Size,
}

impl Difference {
    /// Whether a write may be missed by it.
    pub fn is_harmful(self) -> bool {
        matches!(self, Difference::Unknown | Difference::Open)
    }
}

/// Pages about which record and kernel disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// In what.
    pub what: Difference,
    /// The pages.
    pub pages: PageRange,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            Difference::Unknown => "are mapped, and recorded as absent",
            Difference::Open => "can be written, and are recorded as protected",
            Difference::Protected => "are protected, and recorded as open",
            Difference::Gone => "are not mapped, and recorded as present",
            Difference::Size => "are of another size than recorded",
        };
        write!(f, "pages {} {what}", self.pages)
    }
}

impl Block<'_> {
    /// In what this block, as it is recorded, differs from what was `seen` of it while it was held.
    pub fn differences(&self, seen: &Seen) -> Vec<Disagreement> {
        let (present, protected) = (self.present(), self.protected());
        let both = present & seen.present;
        let huge = match self.kind() {
            Kind::Huge { .. } => self.own(),
            Kind::Absent | Kind::Split => Leaves::NONE,
        };
        let found = [
            (Difference::Unknown, self.own() & seen.present & !present),
            (Difference::Open, both & protected & !seen.protected),
            (Difference::Protected, both & seen.protected & !protected),
            (Difference::Gone, present & !seen.present),
            (Difference::Size, both & (huge & !seen.huge | seen.huge & !huge)),
        ];
        let runs = |(what, leaves): (Difference, Leaves)| {
            leaves.runs().map(|run| Disagreement { what, pages: self.frames(run) }).collect::<Vec<_>>()
        };
        found.into_iter().flat_map(runs).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::stage2::{Mapping, Spare, Stage2};

    #[test]
    fn each_difference_is_found_with_its_pages() {
        let stage2 = Stage2::new([PageRange { start: Gfn(0x410), pages: 0x400 }]).unwrap();
        let mut spare = Spare::default();
        let mut block = stage2.block(Gfn(0x410)).unwrap();
        let range = Leaves::range;
        block.map(&range(0x10..0x40), Mapping { protected: true, old: false }, &mut spare).unwrap();
        block.map(&range(0x40..0x60), Mapping { protected: false, old: false }, &mut spare).unwrap();
        let same = Seen { present: block.present(), protected: block.protected(), huge: Leaves::NONE };
        assert_eq!(block.differences(&same), []);
        // What the slot has not is nobody's business.
        let seen = Seen { present: same.present | range(0..0x10), ..same };
        assert_eq!(block.differences(&seen), []);
        let pages = |start, pages| PageRange { start: Gfn(start), pages };
        let seen = Seen {
            present: range(0x10..0x30) | range(0x38..0x62),
            protected: range(0x10..0x20) | range(0x22..0x44),
            huge: range(0x12..0x14),
        };
        let found = [
            (Difference::Unknown, pages(0x460, 2)),
            (Difference::Open, pages(0x420, 2)),
            (Difference::Protected, pages(0x440, 4)),
            (Difference::Gone, pages(0x430, 8)),
            (Difference::Size, pages(0x412, 2)),
        ];
        assert_eq!(block.differences(&seen), found.map(|(what, pages)| Disagreement { what, pages }));
        drop(block);
        let mut block = stage2.block(Gfn(0x600)).unwrap();
        block.map_huge(Mapping { protected: true, old: false }).unwrap();
        let seen = Seen { present: Leaves::ALL, protected: Leaves::ALL, huge: Leaves::NONE };
        let found = block.differences(&seen);
        assert_eq!(found, [Disagreement { what: Difference::Size, pages: pages(0x600, 512) }]);
        assert!(
            !found[0].what.is_harmful() && Difference::Unknown.is_harmful() && Difference::Open.is_harmful()
        );
    }
}
