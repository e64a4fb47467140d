//! What CPU the guest sees: what KVM supports, with the topology of this guest and without what would not
//! work.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::host::KvmModule;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHE: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
/// Sizes of addresses, and AMD's number of cores.
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX: the TSC-deadline timer, which the in-kernel APIC has whether or not
/// KVM_GET_SUPPORTED_CPUID says so (Documentation/virt/kvm/api.rst).
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the topology fields of EBX are valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x40000001, EAX: PV_UNHALT, PV_SEND_IPI and PV_SCHED_YIELD, hypercalls all three. On kvm_pvm a
/// `vmcall` from the guest never returns.
const KVM_HYPERCALLS: u32 = 1 << 7 | 1 << 11 | 1 << 13;
/// Leaf 0x40000001, EAX: ASYNC_PF, ASYNC_PF_VMEXIT and ASYNC_PF_INT: KVM tells the guest which pages are on their way,
/// and by an interrupt that they have come.
///
/// No guest gets that, for with it a guest can wait for ever for a page that is protected by userfaultfd. KVM keeps a
/// page that has come on its list until it can say so, and that is not before the guest's APIC is enabled
/// (`kvm_arch_can_dequeue_async_page_present`); Linux enables interrupts earlier, and with them asynchronous faults. If
/// the page is protected again meanwhile, KVM takes the next fault on it for one that it is seeing to
/// (`kvm_find_async_pf_gfn`) and tells nobody: the vCPU faults thousands of times a second, and no handler hears of it.
/// Firmware enables the APIC early on a PC; there is none here, and Linux disables it for a moment all the same.
/// What remains is that KVM takes a vCPU that waits for halted, so it is still interrupted and its guest can do something
/// else; and KVM's list is emptied at once then.
const KVM_ASYNC_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The CPUID table that all vCPUs start from; [`for_cpu`] makes each one's own.
///
/// # Errors
/// What KVM says.
pub fn supported(kvm: &Kvm, module: KvmModule) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            LEAF_FEATURES => {
                entry.ecx |= HYPERVISOR;
                if deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
            }
            LEAF_KVM_FEATURES => {
                entry.eax &= !KVM_ASYNC_FAULTS;
                if module == KvmModule::Pvm {
                    entry.eax &= !KVM_HYPERCALLS;
                }
            }
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Bits of a physical address that a CPU with this table has; 36 where it does not say (Intel SDM vol. 3, 5.1.4).
pub fn physical_bits(cpuid: &CpuId) -> u32 {
    let found = cpuid.as_slice().iter().find(|entry| entry.function == LEAF_ADDRESS_SIZES);
    found.map_or(36, |entry| entry.eax & 0xff)
}

/// The table for vCPU `id` of `cpus`: one socket, one thread a core, APIC id = vCPU id.
pub fn for_cpu(base: &CpuId, id: u8, cpus: u8) -> CpuId {
    let mut cpuid = base.clone();
    let id_bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        set_topology(entry, u32::from(id), u32::from(cpus), id_bits);
    }
    cpuid
}

/// Field positions: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.
fn set_topology(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32, id_bits: u32) {
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (cpus.min(255) << 16) | (id << 24);
            entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        LEAF_INTEL_CACHE if entry.eax & 0x1f != 0 => {
            // Bits 31:26 cores of the package, 25:14 threads that share this cache: all for the last level,
            // one below it.
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | ((cpus - 1).min(63) << 26) | (sharing.min(0xfff) << 14);
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
            // Subleaf 0: one thread a core. Subleaf 1: the cores of the socket.
            let (shift, count, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (id_bits, cpus, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = entry.index | (kind << 8);
            entry.edx = id;
        }
        LEAF_ADDRESS_SIZES => {
            entry.ecx = (entry.ecx & !0xf0ff) | (id_bits << 12) | ((cpus - 1) & 0xff);
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0x21, ..Default::default() }
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_holds_one() {
        let leaves = [
            entry(LEAF_FEATURES, 0),
            entry(LEAF_TOPOLOGY, 0),
            entry(LEAF_TOPOLOGY, 1),
            entry(LEAF_AMD_TOPOLOGY, 0),
        ];
        let base = CpuId::from_entries(&leaves).unwrap();
        for id in 0..3 {
            let table = for_cpu(&base, id, 3);
            let [features, threads, cores, amd] = table.as_slice() else { panic!("four leaves") };
            assert_eq!(features.ebx >> 24, u32::from(id));
            assert_eq!((features.ebx >> 16) & 0xff, 3);
            assert_eq!((threads.edx, cores.edx, amd.eax), (u32::from(id), u32::from(id), u32::from(id)));
            assert_eq!((cores.eax, cores.ebx, cores.ecx >> 8), (2, 3, 2), "three cores need two id bits");
        }
    }
}
