//! `kvm-bitmap`: KVM's dirty bitmap as it was before manual re-protection, on every KVM since 2.6.
//!
//! KVM_GET_DIRTY_LOG copies a slot's bitmap out, clears it and write-protects the reported pages, all in one
//! call. That is the right order (a page is protected before anybody can copy it) and the simplest of all
//! logs, at a price: KVM holds its MMU lock, which every vCPU fault needs, for the whole slot, and what the
//! call has cleared is known to the caller alone. A harvest therefore notes it before anything else can fail.
//! The one call that fails *after* clearing is one whose copy to user space faulted (`EFAULT`); then every
//! page of the slot is owed, because any of them may have been dirty.
//!
//! A VM can be in manual mode (see [`kvm_manual`](super::kvm_manual)), where GET does not clear. No ioctl tells,
//! but KVM lets the mode be changed at any time, so `arm` sets it to what this tracker needs.
//!
//! Sources: Linux, Documentation/virt/kvm/api.rst (KVM_GET_DIRTY_LOG) and virt/kvm/kvm_main.c
//! (`kvm_get_dirty_log_protect`, `kvm_vm_ioctl_enable_cap_generic`).

use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::tracker::dirty_log::{KvmLog, Logged, Protocol};
use crate::tracker::{Backing, Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

const NAME: &str = Kind::KvmBitmap.name();

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct KvmBitmap {
    logged: Logged<KvmLog>,
}

impl KvmBitmap {
    /// A tracker of `slots`, which are registered in `vm`. It is not armed yet.
    ///
    /// Arming takes the VM out of manual mode: from then on a KVM_GET_DIRTY_LOG by anyone clears, and whoever
    /// else calls it takes pages away from this tracker. The tracker owns the KVM_MEM_LOG_DIRTY_PAGES flag of
    /// the slots for as long as it lives.
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`].
    pub fn new(vm: Arc<VmFd>, slots: Vec<Slot>) -> Result<KvmBitmap, TrackerError> {
        let slots = Slot::sorted(slots)?;
        let log = KvmLog::new(&vm, 0);
        Ok(KvmBitmap { logged: Logged::new(log, Protocol::ClearedByGet, slots) })
    }
}

impl Tracker for KvmBitmap {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        Kind::KvmBitmap.guarantees(Backing::Private)
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        self.logged.arm()
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        self.logged.harvest()
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.logged.set_slots(Slot::sorted(slots)?)
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.logged.disarm()
    }
}
