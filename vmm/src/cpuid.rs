//! What CPU the guest sees: what KVM supports, with the topology of this guest and without what would not
//! work.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::host::KvmModule;
use crate::state::MachineState;

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
/// Leaf 0x40000001, EAX: ASYNC_PF, ASYNC_PF_VMEXIT and ASYNC_PF_INT, by which KVM tells a guest what pages it is
/// fetching, and by an interrupt that they have come. With these a guest can fault for ever on a page that a
/// tracker protects: [`dirty_track::fault`] says how. No guest has them, however it is tracked, because trackers come and
/// go while a guest runs.
const KVM_ASYNC_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The CPUID table that all vCPUs start from; [`for_cpu`] makes each one's own. KVM is asked once: each leaf is an
/// instruction that a hypervisor under it traps.
///
/// # Errors
/// What KVM says.
pub fn supported(kvm: &Kvm, module: KvmModule) -> Result<&'static CpuId, kvm_ioctls::Error> {
    static TABLE: OnceLock<CpuId> = OnceLock::new();
    if let Some(table) = TABLE.get() {
        return Ok(table);
    }
    let asked = ask(kvm, module)?;
    Ok(TABLE.get_or_init(|| asked))
}

fn ask(kvm: &Kvm, module: KvmModule) -> Result<CpuId, kvm_ioctls::Error> {
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

/// Why a guest cannot go on on this host.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not say.
    #[error("cannot ask for the supported CPUID: {0}")]
    Kvm(kvm_ioctls::Error),
    /// Another vendor's.
    #[error(
        "the guest was on a processor of {found:?}, and this host's is of {host:?}: it cannot go on here"
    )]
    Vendor {
        /// The guest's.
        found: String,
        /// The host's.
        host: String,
    },
    /// Features.
    #[error("this host lacks what the guest was told that its processor has: {}; it cannot go on here", .0.join(", "))]
    Missing(Vec<String>),
}

/// A register of a leaf of features, with the bits that do not matter: they are this host's to give, or tell of what a guest
/// has turned on.
struct Features {
    leaf: u32,
    index: u32,
    register: &'static str,
    ignored: u32,
    /// Bits that have names.
    names: &'static [(u32, &'static str)],
}

/// Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
const FEATURES: [Features; 10] = [
    Features {
        leaf: LEAF_FEATURES,
        index: 0,
        register: "ECX",
        // OSXSAVE is the guest's own.
        ignored: HYPERVISOR | 1 << 27,
        names: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4.1"),
            (20, "sse4.2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc-deadline"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    Features {
        leaf: LEAF_FEATURES,
        index: 0,
        register: "EDX",
        ignored: HTT,
        names: &[(26, "sse2"), (4, "tsc")],
    },
    Features {
        leaf: 7,
        index: 0,
        register: "EBX",
        ignored: 0,
        names: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    Features {
        leaf: 7,
        index: 0,
        register: "ECX",
        // OSPKE is the guest's own.
        ignored: 1 << 4,
        names: &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (8, "gfni"),
            (9, "vaes"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    },
    Features {
        leaf: 7,
        index: 0,
        register: "EDX",
        ignored: 0,
        names: &[
            (4, "fsrm"),
            (22, "amx-bf16"),
            (24, "amx-tile"),
            (25, "amx-int8"),
            (26, "spec-ctrl"),
            (31, "ssbd"),
        ],
    },
    Features {
        leaf: 0xd,
        index: 0,
        register: "EAX",
        ignored: 0,
        names: &[(2, "xsave of avx"), (5, "xsave of avx-512")],
    },
    Features {
        leaf: 0xd,
        index: 1,
        register: "EAX",
        ignored: 0,
        names: &[(0, "xsaveopt"), (1, "xsavec"), (3, "xsaves")],
    },
    Features {
        leaf: LEAF_KVM_FEATURES,
        index: 0,
        register: "EAX",
        ignored: 0,
        names: &[(3, "kvmclock"), (4, "async page faults"), (5, "steal time"), (6, "pv-eoi")],
    },
    Features {
        leaf: 0x8000_0001,
        index: 0,
        register: "ECX",
        ignored: 0,
        names: &[(5, "lzcnt"), (6, "sse4a"), (16, "fma4"), (22, "topology extensions")],
    },
    Features {
        leaf: 0x8000_0001,
        index: 0,
        register: "EDX",
        ignored: 0,
        names: &[(11, "syscall"), (20, "nx"), (26, "pages of 1 GiB"), (27, "rdtscp"), (29, "long mode")],
    },
];

/// Checks that a guest with `state` can go on here: that this host has all that its processor was said to have.
///
/// # Errors
/// See [`CpuidError`].
pub fn check(kvm: &Kvm, module: KvmModule, state: &MachineState) -> Result<(), CpuidError> {
    let able = able(kvm, module).map_err(CpuidError::Kvm)?;
    state.vcpus.iter().try_for_each(|vcpu| compare(vcpu.cpuid(), able.as_slice()))
}

/// The table that [`check`] holds a guest's against. Who has asked once need not wait for it later.
///
/// # Errors
/// What KVM says.
pub fn able(kvm: &Kvm, module: KvmModule) -> Result<&'static CpuId, kvm_ioctls::Error> {
    static TABLE: OnceLock<CpuId> = OnceLock::new();
    let supported = supported(kvm, module)?;
    Ok(TABLE.get_or_init(|| {
        let mut able = supported.clone();
        if module == KvmModule::Pvm {
            // It adds the processor's own features to these leaves, whatever it is told.
            for entry in able.as_mut_slice().iter_mut().filter(|entry| matches!(entry.function, 1 | 7 | 0xd))
            {
                let own = __cpuid_count(entry.function, entry.index);
                entry.eax |= own.eax;
                entry.ebx |= own.ebx;
                entry.ecx |= own.ecx;
                entry.edx |= own.edx;
            }
        }
        able
    }))
}

fn compare(wanted: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Result<(), CpuidError> {
    let find = |table: &[kvm_cpuid_entry2], leaf, index| {
        table.iter().find(|entry| entry.function == leaf && entry.index == index).copied().unwrap_or_default()
    };
    let vendor = |table| {
        let kvm_cpuid_entry2 { ebx, ecx, edx, .. } = find(table, 0, 0);
        String::from_utf8_lossy([ebx, edx, ecx].map(u32::to_le_bytes).as_flattened()).into_owned()
    };
    let (found, host) = (vendor(wanted), vendor(supported));
    if found != host {
        return Err(CpuidError::Vendor { found, host });
    }
    let mut missing = Vec::new();
    for &Features { leaf, index, register, ignored, names } in &FEATURES {
        let value = |entry: kvm_cpuid_entry2| match register {
            "EAX" => entry.eax,
            "EBX" => entry.ebx,
            "ECX" => entry.ecx,
            _ => entry.edx,
        };
        let lacks = value(find(wanted, leaf, index)) & !value(find(supported, leaf, index)) & !ignored;
        for bit in (0..u32::BITS).filter(|bit| lacks >> bit & 1 != 0) {
            let name = names.iter().find(|(named, _)| *named == bit).map(|(_, name)| (*name).to_owned());
            missing.push(
                name.unwrap_or_else(|| format!("bit {bit} of {register} of CPUID leaf {leaf:#x}.{index}")),
            );
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(CpuidError::Missing(missing)) }
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
    fn what_a_host_lacks_is_named() {
        let host = [entry(0, 0), entry(LEAF_FEATURES, 0), entry(7, 0)];
        let mut guest = host;
        assert!(compare(&guest, &host).is_ok());
        // What the guest turned on itself is no feature of the host.
        guest[1].ecx = 1 << 28 | 1 << 27 | HYPERVISOR;
        guest[2].ebx = 1 << 16 | 1 << 6;
        let CpuidError::Missing(missing) = compare(&guest, &host).unwrap_err() else { panic!("a vendor") };
        assert_eq!(missing, ["avx", "bit 6 of EBX of CPUID leaf 0x7.0", "avx512f"]);
        assert!(compare(&host, &guest).is_ok());
        guest[0].ebx = u32::from_le_bytes(*b"Genu");
        assert!(matches!(compare(&guest, &host), Err(CpuidError::Vendor { .. })));
    }

    #[test]
    fn no_guest_is_told_of_pages_that_kvm_fetches() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: no_guest_is_told_of_pages_that_kvm_fetches: no KVM");
            return;
        };
        for module in [KvmModule::Pvm, KvmModule::Amd] {
            let cpuid = supported(&kvm, module).unwrap();
            let features = cpuid.as_slice().iter().find(|entry| entry.function == LEAF_KVM_FEATURES);
            let features = features.expect("every KVM has that leaf").eax;
            assert_eq!(features & KVM_ASYNC_FAULTS, 0, "{module:?}");
            // The clock, which every KVM has.
            assert_ne!(features & 1 << 3, 0, "{module:?}");
        }
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
