//! KVM calls and fields that kvm-ioctls leaves unsafe, with the reasons why our uses are sound.

use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::memory::RamRegion;

/// Gives `region` to the guest as memslot `slot`, without dirty logging.
///
/// # Errors
/// What KVM says; `EEXIST` for a slot that overlaps another.
pub fn add_memslot(vm: &VmFd, slot: u32, region: &RamRegion) -> Result<(), kvm_ioctls::Error> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.gpa,
        memory_size: region.len,
        userspace_addr: region.hva() as u64,
    };
    // SAFETY: the range is a mapping that `region` owns, and the machine keeps its RAM for as long as the VM.
    unsafe { vm.set_user_memory_region(slot) }
}

/// The suberror of a vCPU whose last exit was KVM_EXIT_INTERNAL_ERROR (KVM_INTERNAL_ERROR_*).
pub fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: every variant of this union is plain integers, so any bytes are a valid `internal`; for this
    // exit KVM has filled just that one.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

/// Sets the extended state of a vCPU.
///
/// # Errors
/// What KVM says.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than the 4096 bytes that there are only for a process that has asked for dynamic features
    // for its guests (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM). This program never does.
    unsafe { vcpu.set_xsave(xsave) }
}
