//! KVM's dirty log: the ioctls that kvm-ioctls lacks, or wraps with an allocation on each call.
//!
//! Source: Linux, Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use libc::c_ulong;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

use crate::bitmap;
use crate::tracker::Slot;

const KVM_GET_DIRTY_LOG: c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0x42, size_of::<kvm_dirty_log>() as u32);
const KVM_CLEAR_DIRTY_LOG: c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xc0, size_of::<kvm_clear_dirty_log>() as u32);
const KVM_ENABLE_CAP: c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xa3, size_of::<kvm_enable_cap>() as u32);

// The numbers as a C compiler computes them from the header.
const _: () = assert!(KVM_GET_DIRTY_LOG == 0x4010_ae42);
const _: () = assert!(KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
const _: () = assert!(KVM_ENABLE_CAP == 0x4068_aea3);

/// Name of the capability, for errors.
pub(crate) const MANUAL_PROTECT: &str = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";

/// Bit of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_GET_DIRTY_LOG does not clear.
pub const MANUAL_PROTECT_ENABLE: u64 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;

/// Bit of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: the log of a slot begins with every bit set.
pub const INITIALLY_SET: u64 = KVM_DIRTY_LOG_INITIALLY_SET as u64;

/// The bits of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 that this host offers and that are known here; 0 when it has
/// no such capability.
pub fn manual_protect_modes(vm: &VmFd) -> u64 {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    u64::try_from(offered).unwrap_or(0) & (MANUAL_PROTECT_ENABLE | INITIALLY_SET)
}

/// Puts the whole VM into the mode of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with the bits of `mode`; 0 takes it out
/// of manual mode. No change is no error, and it can be changed as often as one likes.
///
/// Source: Linux, virt/kvm/kvm_main.c (`kvm_vm_ioctl_enable_cap_generic`).
///
/// # Errors
/// `EINVAL` when `mode` has a bit that the host does not know.
pub fn set_manual_protect(vm: &VmFd, mode: u64) -> Result<(), errno::Error> {
    if mode == 0 && manual_protect_modes(vm) == 0 {
        // A KVM without the capability would refuse it, and has no other mode.
        return Ok(());
    }
    enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, mode)
}

/// Enables `capability` of a VM with one argument. Only for capabilities that change no memory of ours.
pub(crate) fn enable(vm: &VmFd, capability: u32, argument: u64) -> Result<(), errno::Error> {
    let cap = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
    // SAFETY: the ioctl reads a kvm_enable_cap, which outlives the call, and the callers, all in this crate,
    // name capabilities that change how KVM logs and no memory of ours.
    check(unsafe { ioctl_with_ref(vm, KVM_ENABLE_CAP, &cap) })
}

/// A memslot whose dirty log can be switched, read and cleared.
#[derive(Debug)]
pub struct LoggedSlot {
    vm: Arc<VmFd>,
    slot: Slot,
    /// KVM has accepted this slot, with its size, for logging. Reading the log depends on it.
    logging: bool,
}

impl LoggedSlot {
    /// The memslot `slot` of `vm`, whose logging is off.
    pub fn new(vm: Arc<VmFd>, slot: Slot) -> LoggedSlot {
        LoggedSlot { vm, slot, logging: false }
    }

    /// The memslot.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Whether its logging was turned on, and not off again.
    pub fn is_logging(&self) -> bool {
        self.logging
    }

    /// Turns KVM_MEM_LOG_DIRTY_PAGES of the slot on or off. No change is no error.
    ///
    /// # Errors
    /// `EINVAL` when the slot is registered with another address or size than it says.
    pub fn set_logging(&mut self, on: bool) -> Result<(), errno::Error> {
        let log = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let region = kvm_userspace_memory_region {
            slot: self.slot.id(),
            flags: self.slot.flags() & !KVM_MEM_LOG_DIRTY_PAGES | log,
            guest_phys_addr: self.slot.gpa().0,
            memory_size: self.slot.len(),
            userspace_addr: self.slot.hva(),
        };
        // SAFETY: KVM lets nothing but the flags of an existing slot change: another host address or another
        // size is refused. So this grants the guest no memory that it did not have when the slot was
        // registered, which the slot's maker vouches for (see `Slot::of_region`), and the mapping named here
        // is kept alive by `self.slot`.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.logging = on;
        Ok(())
    }

    /// Copies the slot's dirty log to `words`, in manual mode without changing it; otherwise it is cleared, and
    /// its pages are write-protected.
    ///
    /// # Errors
    /// `ENOENT` when logging is off, `EINVAL` when `words` is too short, `ENXIO` when the VM has a dirty ring
    /// and no bitmap besides.
    pub fn get_dirty_log(&self, words: &mut [u64]) -> Result<(), errno::Error> {
        if !self.logging {
            return Err(errno::Error::new(libc::ENOENT));
        }
        if words.len() < self.words() {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let log = kvm_dirty_log {
            slot: self.slot.id(),
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
        };
        // SAFETY: KVM writes one bit for each page of its slot, rounded up to whole words. Its slot has the
        // size that `self.slot` says, as `set_logging` has had it confirmed, and `words` has room for that.
        check(unsafe { ioctl_with_ref(&*self.vm, KVM_GET_DIRTY_LOG, &log) })
    }

    /// Clears the log bits that are set in `words` and write-protects their pages again; bit 0 of `words` is
    /// page `first` of the slot, and `pages` pages are looked at. When it returns, no vCPU can write to those
    /// pages any more without setting their bit.
    ///
    /// # Errors
    /// `EINVAL` when `first` is no multiple of 64, when `pages` is none and does not end with the slot, when
    /// the range is not in the slot, or when `words` is too short. `ENOENT` when logging is off.
    pub fn clear_dirty_log(&self, first: u64, pages: u32, words: &[u64]) -> Result<(), errno::Error> {
        if words.len() < bitmap::words_for(pages as usize) {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let mut log = kvm_clear_dirty_log {
            slot: self.slot.id(),
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: KVM reads one bit for each of the `pages`, rounded up to whole words, which `words` has; it
        // writes neither to them nor to `log`, whatever the direction in the ioctl's number says.
        check(unsafe { ioctl_with_mut_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG, &mut log) })
    }

    fn words(&self) -> usize {
        bitmap::words_for(self.slot.frames().pages as usize)
    }
}

/// An ioctl's return value as a result.
pub(crate) fn check(ret: libc::c_int) -> Result<(), errno::Error> {
    if ret < 0 { Err(errno::Error::last()) } else { Ok(()) }
}
