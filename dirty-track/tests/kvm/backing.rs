//! The kinds of memory that a slot may consist of.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::FromRawFd;

use dirty_track::addr::{Gfn, PageSize};
use kvm_ioctls::Kvm;

use crate::machine::{Machine, Writer, skip};

/// How a machine's slots are backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private anonymous memory in small pages.
    Small,
    /// Private anonymous memory in transparent huge pages.
    Thp,
    /// A memfd in small pages, shared.
    Memfd,
    /// A memfd in transparent huge pages, shared.
    HugeMemfd,
    /// A memfd of the hugetlb pool with pages of 2 MiB.
    Hugetlb,
}

/// Every kind.
pub(crate) const ALL: [Backing; 5] =
    [Backing::Small, Backing::Thp, Backing::Memfd, Backing::HugeMemfd, Backing::Hugetlb];

/// Slots of whole blocks, for backings that need it: two blocks, and three with a hole before them.
pub(crate) const SLOTS: [(Gfn, u64); 2] = [(Gfn(0x400), 0x400), (Gfn(0x1000), 0x600)];

/// A machine with [`SLOTS`], and what it borrowed from the host.
pub(crate) struct Backed {
    pub(crate) machine: Machine,
    pub(crate) guest: Writer,
    // Last, so that the memory is free when its pages go back.
    _pool: Option<Pool>,
}

impl Backing {
    /// The unit in which this memory is protected.
    pub(crate) fn page(self) -> PageSize {
        if self == Backing::Hugetlb { PageSize::M2 } else { PageSize::K4 }
    }

    /// A machine over such memory, all of it touched; or `None`, and a line on the terminal that says why `test` is
    /// skipped for this backing.
    pub(crate) fn machine(self, kvm: &Kvm, test: &str) -> Option<Backed> {
        let backed = self.untouched(kvm, test)?;
        for slot in &backed.machine.slots {
            let (start, len) = (slot.hva() as *mut libc::c_void, slot.len() as usize);
            // SAFETY: the range is a slot's own mapping, which is populated, and keeps its contents.
            assert_eq!(unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) }, 0);
        }
        Some(backed)
    }

    /// The same, nothing of it touched.
    pub(crate) fn untouched(self, kvm: &Kvm, test: &str) -> Option<Backed> {
        let pool = match self {
            Backing::Hugetlb => match Pool::grow(SLOTS.iter().map(|(_, pages)| pages / 512).sum()) {
                Ok(pool) => Some(pool),
                Err(why) => {
                    skip(test, format_args!("hugetlb memory: {why}"));
                    return None;
                }
            },
            _ => None,
        };
        let (machine, guest) = match self {
            Backing::Small | Backing::Thp => Machine::new(kvm, &SLOTS),
            Backing::Memfd | Backing::HugeMemfd => Machine::over(kvm, &SLOTS, || Some(memfd(0))),
            Backing::Hugetlb => {
                Machine::over(kvm, &SLOTS, || Some(memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)))
            }
        };
        for slot in &machine.slots {
            let (start, len) = (slot.hva() as *mut libc::c_void, slot.len() as usize);
            let advice = match self {
                Backing::Small | Backing::Memfd => Some(libc::MADV_NOHUGEPAGE),
                Backing::Thp | Backing::HugeMemfd => Some(libc::MADV_HUGEPAGE),
                Backing::Hugetlb => None,
            };
            // SAFETY: the range is a slot's own mapping; neither advice changes its contents. A kernel without huge
            // pages refuses advice about them, and has small ones.
            advice.map(|advice| unsafe { libc::madvise(start, len, advice) });
        }
        Some(Backed { machine, guest, _pool: pool })
    }
}

/// An empty file in memory.
pub(crate) fn memfd(flags: libc::c_uint) -> File {
    const NAME: &CStr = c"slot";
    // SAFETY: the name is a NUL-terminated string, and the descriptor that is returned is nobody else's.
    unsafe {
        let fd = libc::memfd_create(NAME.as_ptr(), flags | libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

/// Huge pages that were added to the host's pool, and are taken out again.
struct Pool(u64);

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl Pool {
    fn size() -> Result<u64, String> {
        let text = fs::read_to_string(NR_HUGEPAGES).map_err(|error| format!("{NR_HUGEPAGES}: {error}"))?;
        text.trim().parse().map_err(|error| format!("{NR_HUGEPAGES}: {error}"))
    }

    fn grow(pages: u64) -> Result<Pool, String> {
        let before = Pool::size()?;
        fs::write(NR_HUGEPAGES, (before + pages).to_string())
            .map_err(|error| format!("cannot raise nr_hugepages: {error}"))?;
        let added = Pool(Pool::size()?.saturating_sub(before));
        if added.0 < pages {
            return Err(format!("the host gave {} of {pages} huge pages", added.0));
        }
        Ok(added)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Ok(now) = Pool::size() {
            let _ = fs::write(NR_HUGEPAGES, now.saturating_sub(self.0).to_string());
        }
    }
}
