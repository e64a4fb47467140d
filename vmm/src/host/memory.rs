//! Memory, huge pages and the limits on them.

use procfs::Current;
use procfs::process::{LimitValue, Process};
use serde::Serialize;

use super::text;

/// What can be said about memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryHost {
    /// RAM in bytes.
    pub total: u64,
    /// Of it, available without swapping, by the kernel's estimate.
    pub available: u64,
    /// Transparent huge pages for anonymous memory: `always`, `madvise` or `never`; `None` without THP.
    pub thp: Option<String>,
    /// The same for shared memory: `always`, `within_size`, `advise`, `never`, `deny` or `force`.
    pub thp_shmem: Option<String>,
    /// Pages of the hugetlb pool with 2 MiB; `None` when the kernel has no such pool.
    pub hugetlb_2m: Option<HugetlbPool>,
    /// With 1 GiB.
    pub hugetlb_1g: Option<HugetlbPool>,
    /// The sysctl vm.overcommit_memory: 0 by guess, 1 always, 2 never.
    pub overcommit: Option<u32>,
    /// RLIMIT_MEMLOCK in bytes, soft; `None` is unlimited.
    pub memlock: Option<u64>,
}

/// A pool of hugetlb pages, in numbers of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HugetlbPool {
    /// In the pool.
    pub total: u64,
    /// Of them, free and promised to nobody.
    pub free: u64,
}

/// Looks.
pub(super) fn probe() -> MemoryHost {
    let memory = procfs::Meminfo::current().ok();
    MemoryHost {
        total: memory.as_ref().map_or(0, |memory| memory.mem_total),
        available: memory.as_ref().and_then(|memory| memory.mem_available).unwrap_or(0),
        thp: text("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|modes| chosen(&modes)),
        thp_shmem: text("/sys/kernel/mm/transparent_hugepage/shmem_enabled").and_then(|modes| chosen(&modes)),
        hugetlb_2m: pool(2 << 10),
        hugetlb_1g: pool(1 << 20),
        overcommit: text("/proc/sys/vm/overcommit_memory").and_then(|mode| mode.parse().ok()),
        memlock: memlock(),
    }
}

/// The choice in brackets of a list like `always [madvise] never`.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    let (choice, _) = rest.split_once(']')?;
    Some(choice.to_owned())
}

fn pool(page_kib: u64) -> Option<HugetlbPool> {
    let number = |name: &str| {
        text(format!("/sys/kernel/mm/hugepages/hugepages-{page_kib}kB/{name}"))?.parse::<u64>().ok()
    };
    let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
    Some(HugetlbPool { total: number("nr_hugepages")?, free })
}

fn memlock() -> Option<u64> {
    match Process::myself().and_then(|process| process.limits()).ok()?.max_locked_memory.soft_limit {
        LimitValue::Unlimited => None,
        LimitValue::Value(bytes) => Some(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_mode_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("[always]").as_deref(), Some("always"));
        assert_eq!(chosen("always madvise never"), None);
        assert_eq!(chosen("]["), None);
    }
}
