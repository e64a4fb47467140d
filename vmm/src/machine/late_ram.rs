//! RAM that a guest is started without.
//!
//! A KVM that shadows page tables allocates 8 bytes per guest page for every memslot (its reverse map): half a
//! millisecond for 1 GiB, a third of a second for 64 GiB. Under such a KVM the built-in guest starts with its
//! first memslot, and the others are added while it runs. An access to RAM that is not there yet comes out as
//! memory-mapped I/O; the vCPU waits for the memslot and makes the access itself. That is right for data and
//! impossible for instructions and page tables, so only a guest that keeps these low is started this way.

use std::sync::{Condvar, Mutex};

use super::MachineConfig;
use crate::boot::Kernel;

/// RAM that gets its memslots after the vCPUs have started.
#[derive(Debug)]
pub struct LateRam {
    /// Index of the first late region.
    pub(super) first: usize,
    all_there: Mutex<bool>,
    changed: Condvar,
}

impl LateRam {
    pub(super) fn new(first: usize) -> LateRam {
        LateRam { first, all_there: Mutex::new(false), changed: Condvar::new() }
    }

    pub(super) fn arrived(&self) {
        *self.all_there.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = true;
        self.changed.notify_all();
    }

    /// Waits until all of RAM has its memslots.
    pub fn wait(&self) {
        let mut there = self.all_there.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while !*there {
            there = self.changed.wait(there).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

/// Whether the guest needs nothing but data from RAM beyond the first memslot. The built-in guest's page tables
/// for huge pages take 4 KiB per GiB, and for small ones 2 MiB, which is too much to be sure.
pub(super) fn starts_low(config: &MachineConfig) -> bool {
    let parsed = guest::cmdline::Config::parse(config.cmdline.as_bytes(), |_| ());
    config.kernel == Kernel::BuiltIn && parsed.is_ok_and(|guest| guest.map == guest::cmdline::Mapping::Huge)
}
