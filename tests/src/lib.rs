//! End-to-end tests.

pub mod cargo;
pub mod compare;
pub mod conformance;
pub mod debian;
pub mod e2e;
pub mod hugetlb;
pub mod initramfs;
pub mod kernel;
pub mod peer;
pub mod recipe;
pub mod rig;
pub mod skip;
pub mod store;
pub mod sys;
pub mod tiny;
pub mod virtio_disk;
