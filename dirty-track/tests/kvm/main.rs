//! The library on the real KVM of this host. Without one, each test says on the terminal that it is skipped.

mod allocation;
mod backing;
mod copy;
mod fault;
mod host_map;
mod logs;
mod machine;
mod mapping;
mod rearm;
mod reclaim;
mod ring;
mod slots;
mod stats;
mod touched;
mod uffd;
