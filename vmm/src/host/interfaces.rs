//! Kernel interfaces besides KVM that trackers are made of: userfaultfd and PAGEMAP_SCAN.

use std::fs::File;
use std::io;

use linux_raw_sys::general as raw;
use serde::Serialize;

use super::text;
use crate::sys::probe;

/// What can be said about them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Interfaces {
    /// The ioctl PAGEMAP_SCAN (Linux 6.7).
    pub pagemap_scan: bool,
    /// Features of userfaultfd, if this user may use it.
    pub userfaultfd: Option<Vec<UserfaultFeature>>,
    /// Why not, if not.
    pub userfaultfd_error: Option<String>,
    /// /dev/userfaultfd: `None` when it is absent, else whether this user may open it.
    pub userfaultfd_device: Option<bool>,
    /// The sysctl vm.unprivileged_userfaultfd: users without rights may use it for kernel faults too.
    pub unprivileged_userfaultfd: Option<bool>,
}

/// A feature of userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UserfaultFeature {
    /// Its name without `UFFD_FEATURE_`.
    pub name: &'static str,
    /// The kernel has it.
    pub available: bool,
}

impl Interfaces {
    /// Whether userfaultfd may be used and has the feature `name` (without `UFFD_FEATURE_`).
    pub fn has_userfault(&self, name: &str) -> bool {
        self.userfaultfd
            .as_ref()
            .is_some_and(|features| features.iter().any(|feature| feature.name == name && feature.available))
    }
}

/// The features that are asked for, with their bits.
pub(crate) const UFFD_FEATURES: [(&str, u32); 12] = [
    ("PAGEFAULT_FLAG_WP", raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP),
    ("WP_HUGETLBFS_SHMEM", raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
    ("WP_UNPOPULATED", raw::UFFD_FEATURE_WP_UNPOPULATED),
    ("WP_ASYNC", raw::UFFD_FEATURE_WP_ASYNC),
    ("MISSING_SHMEM", raw::UFFD_FEATURE_MISSING_SHMEM),
    ("MISSING_HUGETLBFS", raw::UFFD_FEATURE_MISSING_HUGETLBFS),
    ("MINOR_SHMEM", raw::UFFD_FEATURE_MINOR_SHMEM),
    ("MINOR_HUGETLBFS", raw::UFFD_FEATURE_MINOR_HUGETLBFS),
    ("MOVE", raw::UFFD_FEATURE_MOVE),
    ("POISON", raw::UFFD_FEATURE_POISON),
    ("EVENT_REMOVE", raw::UFFD_FEATURE_EVENT_REMOVE),
    ("THREAD_ID", raw::UFFD_FEATURE_THREAD_ID),
];

/// Looks.
pub(super) fn probe() -> Interfaces {
    let features = probe::userfaultfd_features();
    Interfaces {
        pagemap_scan: probe::pagemap_scan().is_ok(),
        userfaultfd_error: features.as_ref().err().map(io::Error::to_string),
        userfaultfd: features.ok().map(|bits| {
            UFFD_FEATURES
                .iter()
                .map(|&(name, bit)| UserfaultFeature { name, available: bits & u64::from(bit) != 0 })
                .collect()
        }),
        userfaultfd_device: match File::open("/dev/userfaultfd") {
            Ok(_) => Some(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => Some(false),
        },
        unprivileged_userfaultfd: text("/proc/sys/vm/unprivileged_userfaultfd").map(|value| value == "1"),
    }
}
