//! What this host is and can do, as facts.
//!
//! [`probe`] looks and judges nothing; what a fact means for the user is for [`crate::doctor`] to say. Looking
//! needs no rights: what may not be seen is a fact as well.

mod interfaces;
mod kvm;
mod memory;
mod module;
mod processor;

use std::arch::x86_64::__cpuid_count;
use std::fs;

use serde::Serialize;

#[cfg(test)]
pub(crate) use interfaces::UFFD_FEATURES;
pub use interfaces::{Interfaces, UserfaultFeature};
#[cfg(test)]
pub(crate) use kvm::capability_names;
pub use kvm::{Capability, Device, KvmFacts, KvmHost};
pub use memory::{HugetlbPool, MemoryHost};
pub use module::{KvmModule, Mmu, kvm_module};
use processor::Processor;

/// The facts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Host {
    /// Kernel release, as in `uname -r`.
    pub kernel: String,
    /// The processor's name.
    pub cpu: String,
    /// Processors online.
    pub cpus: usize,
    /// The processor's virtualization extension, `vmx` or `svm`.
    pub virtualization: Option<&'static str>,
    /// The host is itself a virtual machine.
    pub in_vm: bool,
    /// Its processor is a program, QEMU's TCG: what takes how long says nothing about real ones.
    pub emulated: bool,
    /// KVM.
    pub kvm: KvmHost,
    /// Kernel interfaces besides KVM that trackers use.
    pub interfaces: Interfaces,
    /// Memory, huge pages, limits.
    pub memory: MemoryHost,
}

/// Looks at this host. Takes some milliseconds (it creates a virtual machine) and leaves nothing behind.
pub fn probe() -> Host {
    let cpu = Processor::current();
    Host {
        kernel: text("/proc/sys/kernel/osrelease").unwrap_or_default(),
        cpu: cpu.model.clone(),
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        virtualization: ["vmx", "svm"].into_iter().find(|flag| cpu.has(flag)),
        in_vm: cpu.has("hypervisor"),
        emulated: cpu.has("hypervisor") && hypervisor() == *b"TCGTCGTCGTCG",
        kvm: kvm::probe(),
        interfaces: interfaces::probe(),
        memory: memory::probe(),
    }
}

/// The name of what this virtual machine runs on: CPUID leaf 0x40000000 (Documentation/virt/kvm/x86/cpuid.rst; QEMU's is in
/// its target/i386/cpu.c).
fn hypervisor() -> [u8; 12] {
    let leaf = __cpuid_count(0x4000_0000, 0);
    let words = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    std::array::from_fn(|byte| words[byte / 4][byte % 4])
}

/// A small text file of /proc or /sys, without white space around it; `None` when it is not to be read.
pub(crate) fn text(path: impl AsRef<std::path::Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}
