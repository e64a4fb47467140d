//! Whose memory is dirty: at which virtual addresses the guest maps the pages of an epoch.
//!
//! A dirty page has no owner by itself, so this looks for one in the guest's page tables: those that its vCPUs use at the
//! epoch's end, and those that they were seen to use a short while ago (a guest has more address spaces than vCPUs, and
//! the one that wrote may not run just then). The guest goes on meanwhile and changes its tables as it likes: what is
//! found is a description, not a proof, and nothing depends on it.

use dirty_track::addr::PageRange;
use dirty_track::walk::virt::{Limits, VirtualRun, virtual_view};
use dirty_track::walk::x86::{Paging, X86Error};
use kvm_bindings::kvm_sregs;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryBackend;

/// Address spaces that are looked at in an epoch: those of vCPUs first, then the ones seen last.
const SPACES: usize = 16;

/// Epochs that an address space is remembered after a vCPU used it. Its tables may be other things by then.
const REMEMBERED: u32 = 10;

/// Runs that are told of each address space, the longest.
const RUNS: usize = 8;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// What an address space has of an epoch's dirty pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// The root of its page tables, as in CR3 but without flags.
    #[serde(with = "hex")]
    pub cr3: u64,
    /// vCPUs that used it when the epoch ended.
    pub vcpus: Vec<u8>,
    /// Dirty pages that it maps.
    pub pages: u64,
    /// Those of them that its user mode may reach: most likely its own.
    pub user_pages: u64,
    /// The longest runs of its user mode's; of all, if it has none.
    pub runs: Vec<Run>,
    /// How many more runs it has.
    pub more_runs: usize,
    /// False: its tables were too large to look at all of them, and there is more.
    pub complete: bool,
}

/// Neighbouring virtual addresses that map neighbouring dirty frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First virtual address.
    #[serde(with = "hex")]
    pub gva: u64,
    /// First guest-physical address.
    #[serde(with = "hex")]
    pub gpa: u64,
    /// Pages.
    pub pages: u64,
    /// The guest may write there.
    pub writable: bool,
    /// The guest's user mode may go there.
    pub user: bool,
}

/// Addresses as people write them.
mod hex {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(address: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{address:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        digits.ok_or_else(|| D::Error::custom(format_args!("{text:?} is no address")))
    }
}

impl From<&VirtualRun> for Run {
    fn from(run: &VirtualRun) -> Run {
        Run {
            gva: run.start,
            gpa: run.frames.start.gpa().0,
            pages: run.frames.pages,
            writable: run.writable,
            user: run.user,
        }
    }
}

/// The address spaces that were seen.
#[derive(Debug)]
pub struct Owners {
    maxphyaddr: u32,
    epoch: u32,
    /// The ones that were used last come first.
    seen: Vec<Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    paging: Paging,
    epoch: u32,
}

impl Owners {
    /// Nothing was seen yet of a guest whose physical addresses have `maxphyaddr` bits.
    pub fn new(maxphyaddr: u32) -> Owners {
        Owners { maxphyaddr, epoch: 0, seen: Vec::new() }
    }

    /// Closes an epoch in which the `dirty` pages of `memory` were written, and at whose end the vCPUs had these
    /// registers. The spaces with most pages of their user mode's come first; those without any dirty page are left
    /// out. A vCPU without 64-bit paging (one that has not started) has none.
    ///
    /// # Errors
    /// [`X86Error::PhysBits`] for a guest whose CPUID says something impossible.
    pub fn look<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        vcpus: &[(u8, kvm_sregs)],
        dirty: &[PageRange],
    ) -> Result<Vec<Space>, X86Error> {
        self.epoch += 1;
        let now: Vec<_> = vcpus
            .iter()
            .filter_map(|(vcpu, registers)| Some((*vcpu, paging(registers, self.maxphyaddr)?)))
            .collect();
        for &(_, paging) in &now {
            self.seen.retain(|seen| seen.paging != paging);
            self.seen.insert(0, Seen { paging, epoch: self.epoch });
        }
        self.seen.retain(|seen| self.epoch - seen.epoch <= REMEMBERED);
        self.seen.truncate(SPACES);
        let mut spaces = Vec::new();
        for Seen { paging, .. } in &self.seen {
            let view = virtual_view(memory, *paging, dirty, Limits::default())?;
            let user: Vec<_> = view.runs.iter().filter(|run| run.user).collect();
            let all: Vec<_> = view.runs.iter().collect();
            let mut runs = if user.is_empty() { all.clone() } else { user.clone() };
            if runs.is_empty() {
                continue;
            }
            runs.sort_by_key(|run| std::cmp::Reverse(run.frames.pages));
            spaces.push(Space {
                cr3: paging.cr3,
                vcpus: now.iter().filter(|(_, of)| of == paging).map(|(vcpu, _)| *vcpu).collect(),
                pages: distinct(&all),
                user_pages: distinct(&user),
                more_runs: runs.len().saturating_sub(RUNS),
                runs: runs.into_iter().take(RUNS).map(Run::from).collect(),
                complete: view.cut_short_at.is_none(),
            });
        }
        spaces.sort_by_key(|space| std::cmp::Reverse((space.user_pages, space.pages)));
        Ok(spaces)
    }
}

/// The paging that a vCPU with these registers uses, if it is that of 64-bit mode, in a guest whose physical addresses
/// have `maxphyaddr` bits.
pub fn paging(registers: &kvm_sregs, maxphyaddr: u32) -> Option<Paging> {
    let on = registers.cr0 & CR0_PG != 0 && registers.efer & EFER_LMA != 0;
    on.then_some(Paging {
        // The rest are the PCID, or flags of caching.
        cr3: registers.cr3 & !0xfff & ((1 << 52) - 1),
        la57: registers.cr4 & CR4_LA57 != 0,
        nxe: registers.efer & EFER_NXE != 0,
        maxphyaddr,
    })
}

/// How many frames `runs` have, those that are mapped twice counted once.
fn distinct(runs: &[&VirtualRun]) -> u64 {
    let mut frames: Vec<_> = runs.iter().map(|run| (run.frames.start.0, run.frames.end().0)).collect();
    frames.sort_unstable();
    let (mut pages, mut counted_to) = (0, 0);
    for (start, end) in frames {
        pages += end.saturating_sub(start.max(counted_to));
        counted_to = counted_to.max(end);
    }
    pages
}

#[cfg(test)]
mod tests {
    use dirty_track::addr::Gfn;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const USER: u64 = 0x4000_0000;
    const KERNEL: u64 = 0xffff_8880_0000_0000;

    /// Tables from page `at` on, 4 pages for each address: `pages` pages from `gva` on map those from `gpa` on.
    fn map(memory: &GuestMemoryMmap, root: u64, at: u64, gva: u64, gpa: u64, pages: u64, user: bool) {
        let flags = 0b11 | u64::from(user) << 2;
        let entry = |table: u64, shift: u32| GuestAddress(table + (gva >> shift & 511) * 8);
        for (level, table) in [(39, root), (30, at), (21, at + 0x1000)].into_iter() {
            let next = if level == 39 { at } else { table + 0x1000 };
            memory.write_obj(next | flags, entry(table, level)).unwrap();
        }
        for page in 0..pages {
            let at = GuestAddress(entry(at + 0x2000, 12).0 + page * 8);
            memory.write_obj((gpa + (page << 12)) | flags, at).unwrap();
        }
    }

    fn registers(cr3: u64) -> kvm_sregs {
        kvm_sregs { cr0: CR0_PG | 1, cr3, efer: EFER_LMA, ..Default::default() }
    }

    fn pages(first: u64, pages: u64) -> PageRange {
        PageRange { start: Gfn(first), pages }
    }

    #[test]
    fn dirty_pages_have_the_owners_that_map_them() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let (one, two) = (0x10_0000, 0x11_0000);
        // Two processes, and a kernel that maps all of it in both.
        map(&memory, one, 0x12_0000, USER, 0x20_0000, 4, true);
        map(&memory, one, 0x13_0000, KERNEL, 0x20_0000, 16, false);
        map(&memory, two, 0x14_0000, USER, 0x20_4000, 4, true);
        map(&memory, two, 0x13_0000, KERNEL, 0x20_0000, 16, false);
        let mut owners = Owners::new(40);
        let dirty = [pages(0x201, 2), pages(0x205, 1), pages(0x208, 1)];
        // PCID and flags in CR3 make no other space.
        let vcpus = [(0, registers(one | 0x7)), (2, registers(one)), (3, kvm_sregs::default())];
        let spaces = owners.look(&memory, &vcpus, &dirty).unwrap();
        let run = |gva, gpa, pages| Run { gva, gpa, pages, writable: true, user: true };
        let first = Space {
            cr3: one,
            vcpus: vec![0, 2],
            pages: 4,
            user_pages: 2,
            runs: vec![run(USER + 0x1000, 0x20_1000, 2)],
            more_runs: 0,
            complete: true,
        };
        assert_eq!(spaces, std::slice::from_ref(&first));
        // The first one is remembered; and its pages are not the other's.
        let spaces = owners.look(&memory, &[(0, registers(two))], &dirty).unwrap();
        let second = Space {
            cr3: two,
            vcpus: vec![0],
            user_pages: 1,
            runs: vec![run(USER + 0x1000, 0x20_5000, 1)],
            ..first.clone()
        };
        assert_eq!(spaces, [Space { vcpus: vec![], ..first }, second]);
        for _ in 0..REMEMBERED {
            owners.look(&memory, &[(0, registers(two))], &[]).unwrap();
        }
        let spaces = owners.look(&memory, &[(0, registers(two))], &dirty).unwrap();
        assert_eq!(spaces.iter().map(|space| space.cr3).collect::<Vec<_>>(), [two]);
        assert_eq!(owners.look(&memory, &[], &[]).unwrap(), []);
    }

    #[test]
    fn frames_that_are_mapped_twice_count_once() {
        let run = |first, count| VirtualRun {
            start: 0,
            frames: pages(first, count),
            writable: true,
            user: true,
            no_execute: false,
        };
        let runs = [run(10, 5), run(12, 1), run(14, 4), run(3, 1)];
        assert_eq!(distinct(&runs.iter().collect::<Vec<_>>()), 9);
    }
}
