//! The record held against the kernel: against how the host maps the memory, page by page, and against how much of it
//! KVM says that it maps.
//!
//! What record and host may differ in without harm: the kernel takes pages out of page tables that it reclaims, and joins or
//! splits mappings by itself. What they must not differ in is what a harvest relies on; [`Difference`] tells which is
//! which.

use std::convert::Infallible;
use std::fmt;

use crate::addr::{LEAVES_PER_BLOCK, PageRange};
use crate::stage2::{Block, Kind, Leaves, Stage2};

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

/// How much is recorded as mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Blocks that are mapped as one.
    pub huge: u64,
}

/// How much KVM maps, by the size of its mappings: the statistics `pages_4k`, `pages_2m` and `pages_1g` of a VM (Linux,
/// Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SecondLevel {
    /// Mappings of 4 KiB.
    pub pages_4k: u64,
    /// Mappings of 2 MiB.
    pub pages_2m: u64,
    /// Mappings of 1 GiB.
    pub pages_1g: u64,
}

/// What KVM maps that the record does not explain. Nothing that the host does not map is mapped by KVM, and nothing in
/// one piece that the host has in several (Linux, arch/x86/kvm/mmu/mmu.c, `host_pfn_mapping_level`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unexplained {
    /// Pages of 4 KiB. It can be told only where KVM maps each page once, which shadow paging does not.
    pub pages: Option<u64>,
    /// Blocks that KVM maps as one and that are not recorded as one. The host joins pages by itself, so this is
    /// harmless.
    pub huge: u64,
}

/// Pages that KVM maps for itself: a task-state segment, a page table and the local APIC's (Linux,
/// arch/x86/include/asm/kvm_host.h, `KVM_INTERNAL_MEM_SLOTS`; 3, 1 and 1 of them).
const KVMS_OWN: u64 = 5;

impl SecondLevel {
    /// Pages of 4 KiB that it maps.
    pub fn pages(&self) -> u64 {
        self.pages_4k + self.huge() * LEAVES_PER_BLOCK
    }

    fn huge(&self) -> u64 {
        self.pages_2m + self.pages_1g * LEAVES_PER_BLOCK
    }
}

impl Stage2 {
    /// How much is recorded as mapped. It looks at each block.
    pub fn mapped(&self) -> Mapped {
        let mut mapped = Mapped::default();
        for slot in self.slots() {
            let outcome = self.each(slot, |block, _| {
                mapped.pages += block.present().count() as u64;
                mapped.huge += u64::from(matches!(block.kind(), Kind::Huge { .. }));
                Ok::<_, Infallible>(())
            });
            match outcome {
                Ok(()) => {}
                Err(never) => match never {},
            }
        }
        mapped
    }
}

impl Mapped {
    /// What of `kvm`'s mappings this does not explain, where all of the guest's memory is recorded and nobody changes
    /// mappings meanwhile. `once`: KVM maps each page once, by EPT or NPT.
    pub fn leaves_unexplained(&self, kvm: &SecondLevel, once: bool) -> Unexplained {
        Unexplained {
            pages: once.then(|| kvm.pages().saturating_sub(self.pages + KVMS_OWN)),
            huge: kvm.huge().saturating_sub(self.huge),
        }
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

    #[test]
    fn what_kvm_maps_is_explained_by_what_is_recorded() {
        let stage2 = Stage2::new([PageRange { start: Gfn(0x410), pages: 0x400 }]).unwrap();
        let mut spare = Spare::default();
        let protected = Mapping { protected: true, old: false };
        stage2.block(Gfn(0x410)).unwrap().map(&Leaves::range(0x10..0x40), protected, &mut spare).unwrap();
        stage2.block(Gfn(0x600)).unwrap().map_huge(protected).unwrap();
        let mapped = stage2.mapped();
        assert_eq!(mapped, Mapped { pages: 0x230, huge: 1 });
        let kvm = |pages_4k, pages_2m, pages_1g| SecondLevel { pages_4k, pages_2m, pages_1g };
        let unexplained = |pages, huge| Unexplained { pages, huge };
        for (seen, found) in [
            (kvm(0, 0, 0), unexplained(Some(0), 0)),
            (kvm(0x30, 1, 0), unexplained(Some(0), 0)),
            (kvm(0x230 + 5, 0, 0), unexplained(Some(0), 0)),
            (kvm(0x230 + 6, 0, 0), unexplained(Some(1), 0)),
            (kvm(0, 2, 0), unexplained(Some(1024 - 0x230 - 5), 1)),
            (kvm(0, 0, 1), unexplained(Some(512 * 512 - 0x230 - 5), 511)),
        ] {
            assert_eq!(mapped.leaves_unexplained(&seen, true), found, "{seen:?}");
            assert_eq!(mapped.leaves_unexplained(&seen, false), Unexplained { pages: None, ..found });
        }
    }
}
