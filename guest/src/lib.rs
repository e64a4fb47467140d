//! The built-in guest: a bare-metal kernel that dirties memory and keeps exact books about it.
//!
//! [`ELF`] is the kernel, bootable by PVH under any monitor. [`abi`] is what it and its monitor agree on. The
//! other modules are the parts of the kernel that are pure functions; they are compiled into both, so that
//! they can be tested here.

pub mod abi;
pub mod cmdline;
pub mod histogram;
pub mod layout;
pub mod pattern;

/// The kernel: an ELF executable with a PVH entry point, linked into the second MiB of guest RAM.
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-kernel"));
