//! The trackers by name: what each can be relied on for, what it needs, and which one to take.
//!
//! [`Kind::guarantees`] is the one table of guarantees. The trackers themselves answer from it, a monitor can print
//! it without a virtual machine, and the conformance suite holds each tracker to its row.

use std::fmt;
use std::str::FromStr;

use crate::addr::PageSize;
use crate::tracker::Guarantees;

/// A way of tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing is tracked.
    None,
    /// KVM's dirty bitmap, cleared as it is read.
    KvmBitmap,
    /// KVM's dirty bitmap, cleared by the tracker in chunks.
    KvmManual,
    /// KVM's dirty rings, one a vCPU.
    KvmRing,
    /// userfaultfd write protection, each fault served by a thread of this process.
    UffdSync,
    /// userfaultfd write protection, resolved by the kernel and read back with PAGEMAP_SCAN.
    UffdAsync,
    /// By who serves the faults of guest memory: see [`FaultTracker`](crate::fault::FaultTracker).
    UffdServe,
    /// KVM's log and userfaultfd together: no page is reported because it was read.
    Exact,
}

/// What is behind guest RAM, as far as it makes a difference to a tracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory of small or transparent huge pages.
    #[default]
    Private,
    /// A memfd, or a file of tmpfs: userfaultfd zaps its huge mappings when it protects them.
    Shared,
    /// Pages of hugetlb, private or shared, of this size: userfaultfd protects no less than one.
    Hugetlb(PageSize),
}

/// What the choice of a tracker depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Value of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub manual_protect: u64,
    /// Most bytes of a vCPU's dirty ring: value of KVM_CAP_DIRTY_LOG_RING or KVM_CAP_DIRTY_LOG_RING_ACQ_REL.
    pub ring_bytes: u64,
    /// userfaultfd may be used for faults of the kernel, and can write-protect.
    pub uffd_wp: bool,
    /// Its feature UFFD_FEATURE_WP_UNPOPULATED.
    pub uffd_wp_unpopulated: bool,
    /// Its feature UFFD_FEATURE_WP_ASYNC.
    pub uffd_wp_async: bool,
    /// The ioctl PAGEMAP_SCAN.
    pub pagemap_scan: bool,
    /// KVM emulates the guest's kernel instruction by instruction (`kvm_pvm`): a batch of its writes can overrun
    /// a dirty ring, which loses them.
    pub emulates_kernel: bool,
}

impl Kind {
    /// All of them, the simplest first.
    pub const ALL: [Kind; 8] = [
        Kind::None,
        Kind::KvmBitmap,
        Kind::KvmManual,
        Kind::KvmRing,
        Kind::UffdSync,
        Kind::UffdAsync,
        Kind::UffdServe,
        Kind::Exact,
    ];

    /// The name by which a user chooses it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::None => "none",
            Kind::KvmBitmap => "kvm-bitmap",
            Kind::KvmManual => "kvm-manual",
            Kind::KvmRing => "kvm-ring",
            Kind::UffdSync => "uffd-sync",
            Kind::UffdAsync => "uffd-async",
            Kind::UffdServe => "uffd-serve",
            Kind::Exact => "exact",
        }
    }

    /// What its harvests can be relied on for over memory of `backing`, as the tracker is made by default.
    pub const fn guarantees(self, backing: Backing) -> Guarantees {
        let tracks = !matches!(self, Kind::None);
        let protects = matches!(self, Kind::UffdSync | Kind::UffdAsync | Kind::UffdServe | Kind::Exact);
        let granularity = match backing {
            Backing::Hugetlb(size) if protects => size,
            _ => PageSize::K4,
        };
        // KVM splits what it logs when it protects, or all of it when its log is turned on; userfaultfd protects
        // a huge mapping as it is, and the first write splits it.
        let keeps_huge = match self {
            Kind::None => true,
            Kind::UffdSync | Kind::UffdAsync | Kind::UffdServe => !matches!(backing, Backing::Shared),
            Kind::KvmBitmap | Kind::KvmManual | Kind::KvmRing | Kind::Exact => false,
        };
        Guarantees {
            sees_guest_writes: tracks,
            sees_host_writes: tracks,
            // A read fault on a page that KVM has not mapped yet maps it writable, and so dirty, when the host's
            // page is writable. Under userfaultfd's protection it is not.
            may_report_reads: tracks && !protects,
            granularity,
            keeps_huge,
            per_vcpu: matches!(self, Kind::KvmRing),
        }
    }

    /// What a host with these facts lacks for it; `None`: it works there.
    pub const fn lacks(self, host: &HostFacts) -> Option<&'static str> {
        match self {
            Kind::None | Kind::KvmBitmap => None,
            Kind::KvmManual if host.manual_protect & 1 == 0 => {
                Some("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.2)")
            }
            Kind::KvmRing if host.ring_bytes == 0 => Some("KVM_CAP_DIRTY_LOG_RING (Linux 5.11)"),
            Kind::UffdSync | Kind::UffdAsync | Kind::UffdServe | Kind::Exact if !host.uffd_wp => Some(
                "userfaultfd for this user: run as root, or set the sysctl vm.unprivileged_userfaultfd to 1",
            ),
            Kind::UffdSync | Kind::UffdAsync | Kind::UffdServe | Kind::Exact if !host.uffd_wp_unpopulated => {
                Some("UFFD_FEATURE_WP_UNPOPULATED (Linux 6.4)")
            }
            Kind::UffdAsync | Kind::Exact if !host.uffd_wp_async => Some("UFFD_FEATURE_WP_ASYNC (Linux 6.7)"),
            Kind::UffdAsync | Kind::UffdServe | Kind::Exact if !host.pagemap_scan => {
                Some("the ioctl PAGEMAP_SCAN (Linux 6.7)")
            }
            Kind::Exact if host.manual_protect & 1 == 0 => {
                Some("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.2)")
            }
            Kind::KvmManual
            | Kind::KvmRing
            | Kind::UffdSync
            | Kind::UffdAsync
            | Kind::UffdServe
            | Kind::Exact => None,
        }
    }

    /// The tracker to take on a host with these facts when its user has no preference, and why.
    ///
    /// The guest pays last: a fault under KVM's log costs it less than one under userfaultfd, and clearing by
    /// chunks holds KVM's locks for less time than reading and clearing in one go. A ring is worth having for
    /// attribution to vCPUs, but stops a vCPU that writes much, so it is never taken unasked.
    pub const fn choose(host: &HostFacts) -> (Kind, &'static str) {
        if Kind::KvmManual.lacks(host).is_none() {
            let why = "the cheapest for the guest: faults are KVM's alone, and its locks are held for a chunk at a time";
            (Kind::KvmManual, why)
        } else {
            (
                Kind::KvmBitmap,
                "this host's KVM has no manual protection, so its log is read and cleared in one go",
            )
        }
    }

    /// What to know before this tracker is taken on such a host, if anything.
    pub const fn caveat(self, host: &HostFacts) -> Option<&'static str> {
        match self {
            Kind::KvmRing if host.emulates_kernel => Some(
                "loses writes of the guest's kernel on this host, which emulates it in batches: for ring 3 only",
            ),
            Kind::UffdSync => Some("each first write waits for a thread of the monitor"),
            Kind::UffdServe => {
                Some("for memory whose faults the monitor serves; each waits for a thread of it")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// There is no tracker of that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no tracker '{0}' (there are none, kvm-bitmap, kvm-manual, kvm-ring, uffd-sync, uffd-async, uffd-serve and exact)"
)]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Kind, UnknownKind> {
        let found = Kind::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODERN: HostFacts = HostFacts {
        manual_protect: 3,
        ring_bytes: 1 << 20,
        uffd_wp: true,
        uffd_wp_unpopulated: true,
        uffd_wp_async: true,
        pagemap_scan: true,
        emulates_kernel: false,
    };

    #[test]
    fn names_are_read_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert!(UnknownKind(String::new()).to_string().contains(kind.name()));
        }
        assert!("kvm".parse::<Kind>().is_err());
    }

    #[test]
    fn a_modern_host_lacks_nothing_and_a_bare_one_still_tracks() {
        assert!(Kind::ALL.iter().all(|kind| kind.lacks(&MODERN).is_none()));
        let works: Vec<_> =
            Kind::ALL.into_iter().filter(|kind| kind.lacks(&HostFacts::default()).is_none()).collect();
        assert_eq!(works, [Kind::None, Kind::KvmBitmap]);
    }

    #[test]
    fn the_choice_works_on_its_host_and_misses_nothing() {
        for manual_protect in 0..4 {
            for ring_bytes in [0, 1 << 16] {
                for bits in 0..32u8 {
                    let host = HostFacts {
                        manual_protect,
                        ring_bytes,
                        uffd_wp: bits & 1 != 0,
                        uffd_wp_async: bits & 2 != 0,
                        pagemap_scan: bits & 4 != 0,
                        emulates_kernel: bits & 8 != 0,
                        uffd_wp_unpopulated: bits & 16 != 0,
                    };
                    let (kind, why) = Kind::choose(&host);
                    assert_eq!(kind.lacks(&host), None);
                    assert_eq!(kind.caveat(&host), None);
                    assert!(kind.guarantees(Backing::Private).sees_guest_writes && !why.is_empty());
                }
            }
        }
    }
}
