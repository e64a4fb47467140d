//! KVM: the device, the module, its parameters, its capabilities, and whether a machine can be made.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::module::{KvmModule, Mmu, kvm_module};
use super::text;

const DEVICE: &str = "/dev/kvm";

/// What can be said about KVM on this host.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KvmHost {
    /// The device file.
    pub device: Device,
    /// The module behind it.
    pub module: KvmModule,
    /// How guest memory is mapped.
    pub mmu: Mmu,
    /// Parameter `tdp_mmu` of the module `kvm`: the newer MMU for EPT and NPT.
    pub tdp_mmu: Option<bool>,
    /// Parameter `eager_page_split`: huge mappings are split when logging starts, not at the first write.
    pub eager_page_split: Option<bool>,
    /// What KVM itself says, if it may be asked.
    pub facts: Option<KvmFacts>,
}

/// State of /dev/kvm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// It is not there.
    #[default]
    Absent,
    /// It is there, and this user may not open it.
    NoPermission {
        /// The group that may, if any.
        group: Option<String>,
    },
    /// It is there and cannot be opened for another reason.
    Broken(String),
    /// It opens.
    Usable,
}

/// What KVM says about itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION; 12 on every kernel since 2.6.22.
    pub api_version: i32,
    /// Why a virtual machine with interrupt controllers and a vCPU cannot be made; `None`: it can.
    pub machine_error: Option<String>,
    /// Most vCPUs of a machine.
    pub max_vcpus: usize,
    /// Most memslots of a machine.
    pub max_memslots: usize,
    /// Value of each capability that is asked for, 0 when it is missing.
    pub capabilities: Vec<Capability>,
}

/// One capability.
#[derive(Clone, Debug, Serialize)]
pub struct Capability {
    /// Its name without `KVM_CAP_`.
    pub name: &'static str,
    /// What KVM_CHECK_EXTENSION returns; 0 when it is missing.
    pub value: u32,
}

impl KvmFacts {
    /// Value of the capability `name` (without `KVM_CAP_`); 0 when it is missing or not asked for.
    pub fn capability(&self, name: &str) -> u32 {
        self.capabilities.iter().find(|cap| cap.name == name).map_or(0, |cap| cap.value)
    }
}

/// The capabilities that are asked for.
const CAPABILITIES: [(&str, u32); 25] = [
    ("USER_MEMORY", kvm::KVM_CAP_USER_MEMORY),
    ("IRQCHIP", kvm::KVM_CAP_IRQCHIP),
    ("IRQFD", kvm::KVM_CAP_IRQFD),
    ("IOEVENTFD", kvm::KVM_CAP_IOEVENTFD),
    ("EXT_CPUID", kvm::KVM_CAP_EXT_CPUID),
    ("IMMEDIATE_EXIT", kvm::KVM_CAP_IMMEDIATE_EXIT),
    ("TSC_DEADLINE_TIMER", kvm::KVM_CAP_TSC_DEADLINE_TIMER),
    ("MANUAL_DIRTY_LOG_PROTECT2", kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
    ("DIRTY_LOG_RING", kvm::KVM_CAP_DIRTY_LOG_RING),
    ("DIRTY_LOG_RING_ACQ_REL", kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
    ("BINARY_STATS_FD", kvm::KVM_CAP_BINARY_STATS_FD),
    ("PRE_FAULT_MEMORY", kvm::KVM_CAP_PRE_FAULT_MEMORY),
    ("READONLY_MEM", kvm::KVM_CAP_READONLY_MEM),
    ("GUEST_MEMFD", kvm::KVM_CAP_GUEST_MEMFD),
    ("MP_STATE", kvm::KVM_CAP_MP_STATE),
    ("VCPU_EVENTS", kvm::KVM_CAP_VCPU_EVENTS),
    ("DEBUGREGS", kvm::KVM_CAP_DEBUGREGS),
    ("XSAVE", kvm::KVM_CAP_XSAVE),
    ("XSAVE2", kvm::KVM_CAP_XSAVE2),
    ("XCRS", kvm::KVM_CAP_XCRS),
    ("ADJUST_CLOCK", kvm::KVM_CAP_ADJUST_CLOCK),
    ("GET_TSC_KHZ", kvm::KVM_CAP_GET_TSC_KHZ),
    ("TSC_CONTROL", kvm::KVM_CAP_TSC_CONTROL),
    ("NR_MEMSLOTS", kvm::KVM_CAP_NR_MEMSLOTS),
    ("NR_VCPUS", kvm::KVM_CAP_NR_VCPUS),
];

/// The names of the capabilities that are asked for, without `KVM_CAP_`.
#[cfg(test)]
pub(crate) fn capability_names() -> Vec<&'static str> {
    CAPABILITIES.iter().map(|(name, _)| *name).collect()
}

/// Looks.
pub(super) fn probe() -> KvmHost {
    let module = kvm_module();
    let flag = |name: &str| {
        text(format!("/sys/module/kvm/parameters/{name}")).map(|value| matches!(value.as_str(), "Y" | "1"))
    };
    let (device, facts) = match Kvm::new() {
        // Something else may stand where the device should be; it opens, and knows no ioctl of KVM.
        Ok(kvm) if kvm.get_api_version() < 0 => {
            (Device::Broken(format!("not KVM ({})", io::Error::last_os_error())), None)
        }
        Ok(kvm) => (Device::Usable, Some(ask(&kvm))),
        Err(error) => (why_not(io::Error::from_raw_os_error(error.errno())), None),
    };
    KvmHost {
        device,
        module,
        mmu: Mmu::of(module),
        tdp_mmu: flag("tdp_mmu"),
        eager_page_split: flag("eager_page_split"),
        facts,
    }
}

fn why_not(error: io::Error) -> Device {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Device::Absent,
        Some(libc::EACCES | libc::EPERM) => Device::NoPermission { group: group() },
        _ => Device::Broken(error.to_string()),
    }
}

/// The group that may use the device, when it is not root's alone.
fn group() -> Option<String> {
    let device = fs::metadata(DEVICE).ok().filter(|device| device.file_type().is_char_device())?;
    let group_may = device.mode() & 0o060 == 0o060 && device.gid() != 0;
    let groups = group_may.then(|| text("/etc/group"))??;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(device.gid())).then(|| name.to_owned())
    })
}

fn ask(kvm: &Kvm) -> KvmFacts {
    KvmFacts {
        api_version: kvm.get_api_version(),
        machine_error: make_machine(kvm).err().map(|(what, error)| format!("cannot {what}: {error}")),
        max_vcpus: kvm.get_max_vcpus(),
        max_memslots: kvm.get_nr_memslots(),
        capabilities: CAPABILITIES
            .iter()
            .map(|&(name, number)| {
                let value = kvm.check_extension_raw(number.into());
                Capability { name, value: u32::try_from(value).unwrap_or(0) }
            })
            .collect(),
    }
}

/// What `vmm run` does first, without memory. A host may have /dev/kvm and still refuse this: when another
/// hypervisor holds the processor's extension, when file descriptors or memory run out.
fn make_machine(kvm: &Kvm) -> Result<(), (&'static str, kvm_ioctls::Error)> {
    let vm = kvm.create_vm().map_err(|error| ("create a virtual machine", error))?;
    vm.create_irq_chip().map_err(|error| ("create interrupt controllers", error))?;
    vm.create_vcpu(0).map_err(|error| ("create a vCPU", error))?;
    Ok(())
}
