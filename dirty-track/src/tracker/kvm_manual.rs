//! `kvm-manual`: KVM's dirty bitmap with manual re-protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
//!
//! KVM_GET_DIRTY_LOG only copies the bitmap out; KVM_CLEAR_DIRTY_LOG clears bits and write-protects their
//! pages, in ranges of our choice. A harvest is GET, *note what it said*, then CLEAR of exactly the reported
//! pages in chunks. A page that is written between the two is in this harvest and need not be in the next:
//! its bit was noted, it is copied after CLEAR, and CLEAR protects it. A page first written after GET has a
//! bit that CLEAR does not touch.
//!
//! With KVM_DIRTY_LOG_INITIALLY_SET, turning the log on sets every bit and protects nothing, which is cheap
//! but means that the whole guest is reported as dirty. `arm` clears all of it, so that the first harvest
//! reports what was written since.
//!
//! Which of the reported pages are cleared is a policy of its own; see [`crate::rearm`]. A page that is not
//! cleared keeps its bit and stays writable, so GET returns it again and it is in the next harvest as well.
//!
//! Sources: Linux, Documentation/virt/kvm/api.rst (KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG) and
//! virt/kvm/kvm_main.c (`kvm_clear_dirty_log_protect`).

use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::rearm::Rearm;
use crate::sys::kvm;
use crate::tracker::dirty_log::{KvmLog, Logged, Protocol};
use crate::tracker::{Backing, Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

const NAME: &str = Kind::KvmManual.name();

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct KvmManual {
    logged: Logged<KvmLog>,
    initially_set: bool,
}

impl KvmManual {
    /// A tracker of `slots`, which are registered in `vm`. It is not armed yet.
    ///
    /// From arming on the VM is in manual mode: a KVM_GET_DIRTY_LOG by anyone no longer clears. The tracker
    /// owns the KVM_MEM_LOG_DIRTY_PAGES flag of the slots for as long as it lives.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] before Linux 5.2, [`TrackerError::BadSlot`].
    pub fn new(vm: Arc<VmFd>, slots: Vec<Slot>) -> Result<KvmManual, TrackerError> {
        let slots = Slot::sorted(slots)?;
        let mode = kvm::manual_protect_modes(&vm);
        if mode & kvm::MANUAL_PROTECT_ENABLE == 0 {
            return Err(TrackerError::Unsupported { capability: kvm::MANUAL_PROTECT, tracker: NAME });
        }
        let initially_set = mode & kvm::INITIALLY_SET != 0;
        let log = KvmLog::new(&vm, mode);
        Ok(KvmManual { logged: Logged::new(log, Protocol::Manual { initially_set }, slots), initially_set })
    }

    /// The tracker with another re-arming policy than [`Rearm::All`].
    pub fn with_rearm(mut self, rearm: Rearm) -> KvmManual {
        self.set_rearm(rearm);
        self
    }

    /// Changes the re-arming policy, armed or not. It decides from the next harvest on; [`Rearm::All`] protects
    /// in that harvest whatever had been left writable. This allocates when the policy is the first that needs
    /// memory: 65 bytes for each 2 MiB of the slots.
    pub fn set_rearm(&mut self, rearm: Rearm) {
        self.logged.set_rearm(rearm);
    }

    /// Blocks of 2 MiB that the guest can write in this epoch without being seen, so that their pages will be
    /// coarse in the next harvest. 0 under [`Rearm::All`].
    pub fn open_blocks(&self) -> usize {
        self.logged.open_blocks()
    }

    /// The slots that are tracked.
    pub(crate) fn slots(&self) -> &[Slot] {
        self.logged.slots()
    }

    /// Whether the host has KVM_DIRTY_LOG_INITIALLY_SET (Linux 5.7), which makes arming cheap.
    pub fn initially_set(&self) -> bool {
        self.initially_set
    }
}

impl Tracker for KvmManual {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        Kind::KvmManual.guarantees(Backing::Private)
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
