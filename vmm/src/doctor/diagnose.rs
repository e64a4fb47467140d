//! From facts to findings: what each means for the user, and what to do about it.

use super::{Finding, Level};
use crate::host::{Device, Host, HugetlbPool, KvmFacts, KvmModule, Mmu};
use crate::machine::MAX_CPUS;
use crate::options::human_size;

const HOST: &str = "Host";
const KVM: &str = "KVM";
const CAPABILITIES: &str = "What KVM can do";
const OTHER: &str = "Kernel interfaces for other ways of tracking (`vmm run` does without)";
const PAGES: &str = "Huge pages";
const LIMITS: &str = "Limits";

/// How to run without KVM.
const RIG: &str =
    "Without any KVM, the rig has one inside an emulator: cargo run -p tests --bin rig -- vmm run";

/// The version of KVM's API; there has been no other since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Capabilities without which nothing goes, and what for.
const NEEDED: [(&str, &str); 6] = [
    ("USER_MEMORY", "guest RAM in this process's memory"),
    ("IRQCHIP", "interrupt controllers in the kernel"),
    ("IRQFD", "interrupts from devices"),
    ("IOEVENTFD", "notifications to devices"),
    ("EXT_CPUID", "CPUID of the guest"),
    ("IMMEDIATE_EXIT", "pausing a vCPU at any moment"),
];

/// Capabilities that it is a pity to be without: what for, and what it is like without.
const WANTED: [(&str, &str, &str); 5] = [
    (
        "TSC_DEADLINE_TIMER",
        "timer of a modern guest kernel",
        "The guest kernel uses a timer that costs more exits.",
    ),
    (
        "BINARY_STATS_FD",
        "sizes of mappings, page faults",
        "The live figures lack faults and the sizes of the guest's mappings (needs Linux 5.14).",
    ),
    ("READONLY_MEM", "read-only memslots", "Firmware images cannot be protected against the guest's writes."),
    (
        "PRE_FAULT_MEMORY",
        "mapping guest RAM ahead of time",
        "The guest takes a fault in KVM for each page or block that it touches first (needs Linux 6.11 and EPT \
         or NPT with the TDP MMU).",
    ),
    (
        "TSC_CONTROL",
        "the guest's own TSC frequency",
        "A guest sees its TSC change speed when it moves to a host with another frequency.",
    ),
];

/// Capabilities by which a machine's state is saved and restored.
const STATE: [&str; 7] =
    ["MP_STATE", "VCPU_EVENTS", "DEBUGREGS", "XSAVE", "XCRS", "ADJUST_CLOCK", "GET_TSC_KHZ"];

/// Features of userfaultfd: since which Linux, and what for.
const USERFAULT: [(&str, &str, &str); 12] = [
    ("PAGEFAULT_FLAG_WP", "5.7", "write-protection of anonymous memory"),
    ("WP_HUGETLBFS_SHMEM", "5.19", "write-protection of shared and hugetlb memory"),
    ("WP_UNPOPULATED", "6.4", "write-protection of pages that were never touched"),
    ("WP_ASYNC", "6.7", "write-protection that the kernel resolves itself"),
    ("MISSING_SHMEM", "4.11", "demand paging of shared memory"),
    ("MISSING_HUGETLBFS", "4.11", "demand paging of hugetlb memory"),
    ("MINOR_SHMEM", "5.14", "demand paging without a copy, shared memory"),
    ("MINOR_HUGETLBFS", "5.13", "demand paging without a copy, hugetlb memory"),
    ("MOVE", "6.8", "moving huge pages into the guest"),
    ("POISON", "6.6", "handing on memory errors"),
    ("EVENT_REMOVE", "4.11", "noticing ballooned memory"),
    ("THREAD_ID", "4.14", "faults by vCPU"),
];

/// The findings about `host`, in the order in which they are printed.
pub fn diagnose(host: &Host) -> Vec<Finding> {
    let mut findings = Findings::default();
    about_host(host, &mut findings);
    about_kvm(host, &mut findings);
    if let Some(facts) = &host.kvm.facts {
        about_capabilities(host.kvm.module, facts, &mut findings);
    }
    about_interfaces(host, &mut findings);
    about_pages(host, &mut findings);
    about_limits(host, &mut findings);
    findings.0
}

/// The findings so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, group: &'static str, what: &'static str, value: impl Into<String>) {
        let value = value.into();
        self.0.push(Finding { group, what, level: Level::Ok, value, meaning: None, remedy: None });
    }

    fn add(
        &mut self,
        (group, what): (&'static str, &'static str),
        level: Level,
        value: impl Into<String>,
        meaning: &str,
        remedy: &str,
    ) {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let value = value.into();
        self.0.push(Finding { group, what, level, value, meaning: some(meaning), remedy: some(remedy) });
    }
}

fn about_host(host: &Host, findings: &mut Findings) {
    let place = if host.in_vm { ", itself in a virtual machine" } else { "" };
    findings.ok(HOST, "processor", format!("{}, {} online{place}", host.cpu, host.cpus));
    findings.ok(HOST, "kernel", format!("Linux {}", host.kernel));
    findings.ok(
        HOST,
        "memory",
        format!("{}, {} available", human_size(host.memory.total), human_size(host.memory.available)),
    );
}

fn about_kvm(host: &Host, findings: &mut Findings) {
    let kvm = &host.kvm;
    let device = (KVM, "/dev/kvm");
    match &kvm.device {
        Device::Usable => {
            let version = kvm.facts.as_ref().map_or(0, |facts| facts.api_version);
            if version == API_VERSION {
                findings.ok(KVM, device.1, format!("opens, API version {version}"));
            } else {
                findings.add(
                    device,
                    Level::Fatal,
                    format!("API version {version}"),
                    "Version 12 is the one that the monitor speaks, and every Linux since 2.6.22.",
                    "Use a kernel that is newer.",
                );
            }
        }
        Device::Absent => findings.add(
            device,
            Level::Fatal,
            "absent",
            "No guest can run without it.",
            &format!("{}\n{RIG}", why_absent(host)),
        ),
        Device::NoPermission { group } => findings.add(
            device,
            Level::Fatal,
            "no permission",
            "It is there, but this user may not open it.",
            &match group {
                Some(group) => {
                    format!(
                        "Join its group and log in again, or run as root:\nsudo usermod -aG {group} $USER"
                    )
                }
                None => "Give it to a group that you are in, or run as root:\n\
                         sudo chgrp kvm /dev/kvm && sudo chmod g+rw /dev/kvm"
                    .to_owned(),
            },
        ),
        Device::Broken(error) => findings.add(
            device,
            Level::Fatal,
            format!("cannot be used: {error}"),
            "",
            "The kernel's log may say why: sudo dmesg | grep -i kvm",
        ),
    }
    if kvm.device == Device::Absent {
        return;
    }
    about_module(host, findings);
    match kvm.facts.as_ref().map(|facts| &facts.machine_error) {
        Some(None) => findings.ok(KVM, "a virtual machine", "can be made"),
        Some(Some(error)) => findings.add(
            (KVM, "a virtual machine"),
            Level::Fatal,
            error.clone(),
            "",
            "Another hypervisor may hold the processor (VirtualBox, VMware): end its guests, or unload its modules.",
        ),
        None => {}
    }
}

/// Why there may be no /dev/kvm, and what brings it.
fn why_absent(host: &Host) -> String {
    let container = "In a container, pass the device in (--device /dev/kvm).";
    if host.kvm.module != KvmModule::Unknown {
        return format!(
            "The kernel has KVM ({}); only the device file is missing here. {container}\nElse create it:\n\
             sudo mknod /dev/kvm c 10 232",
            host.kvm.module
        );
    }
    match (host.virtualization, host.in_vm) {
        (Some("vmx"), _) => format!("{container}\nElse load the module:\nsudo modprobe kvm_intel"),
        (Some(_), _) => format!("{container}\nElse load the module:\nsudo modprobe kvm_amd"),
        (None, true) => {
            "This is a virtual machine, and its hypervisor shows it no virtualization extension: turn \
                         on nested virtualization there, or use a machine of another kind."
                .to_owned()
        }
        (None, false) => {
            "The processor shows no virtualization extension: turn on VT-x or SVM in the firmware's setup."
                .to_owned()
        }
    }
}

fn about_module(host: &Host, findings: &mut Findings) {
    let kvm = &host.kvm;
    match kvm.module {
        KvmModule::Pvm => findings.add(
            (KVM, "module"),
            Level::Note,
            "kvm_pvm (out of tree, without VMX or SVM)",
            "The guest's ring 3 runs at full speed; its ring 0 is emulated, some 0.6 us an instruction, and not \
             every instruction is known. The built-in guest is made for that. A stock Linux kernel does not get \
             through its boot. The dirty ring loses pages that ring 0 writes: leave it to guests that write in \
             ring 3 only.",
            "Boot stock kernels in the rig:\ncargo run -p tests --bin rig -- vmm run --kernel PATH",
        ),
        KvmModule::Unknown => findings.add(
            (KVM, "module"),
            Level::Note,
            "none that is known (kvm_intel, kvm_amd, kvm_pvm)",
            "What is known about hosts may not hold here.",
            "",
        ),
        module => findings.ok(KVM, "module", module.name()),
    }
    let mmu = (KVM, "MMU");
    match (kvm.mmu, kvm.module) {
        (Mmu::Shadow, KvmModule::Pvm) => {
            findings.ok(KVM, mmu.1, "shadow page tables, in pages of 4K and 2M (all that kvm_pvm has)");
        }
        (Mmu::Shadow, module) => {
            let parameter = if module == KvmModule::Intel { "ept" } else { "npt" };
            findings.add(
                mmu,
                Level::Note,
                format!("shadow page tables ({parameter} is off)"),
                "Every change that the guest makes to its page tables costs an exit.",
                &format!("Reload the module with {parameter}:\nsudo modprobe -r {module} && sudo modprobe {module} {parameter}=1"),
            );
        }
        (Mmu::Unknown, _) => findings.add(mmu, Level::Note, "not to be seen in /sys/module", "", ""),
        (mmu_kind, _) if kvm.tdp_mmu == Some(false) => findings.add(
            mmu,
            Level::Note,
            format!("{mmu_kind}, but without the TDP MMU"),
            "The older MMU takes one lock for all vCPUs and does not split huge mappings ahead of time.",
            "Boot the kernel with kvm.tdp_mmu=1 (Linux 5.15 and later has it by default).",
        ),
        (mmu_kind, _) if kvm.eager_page_split == Some(false) => findings.add(
            mmu,
            Level::Note,
            format!("{mmu_kind} with the TDP MMU, without eager splitting"),
            "When tracking starts, the guest's first write to each huge mapping pays for its splitting.",
            "echo Y | sudo tee /sys/module/kvm/parameters/eager_page_split",
        ),
        (mmu_kind, _) => findings.ok(KVM, mmu.1, format!("{mmu_kind} with the TDP MMU")),
    }
}

fn about_capabilities(module: KvmModule, facts: &KvmFacts, findings: &mut Findings) {
    for (name, what_for) in NEEDED {
        if facts.capability(name) != 0 {
            findings.ok(CAPABILITIES, name, what_for);
        } else {
            let meaning = "The monitor does not work without it.";
            findings.add(
                (CAPABILITIES, name),
                Level::Fatal,
                format!("missing: {what_for}"),
                meaning,
                "Use a newer kernel.",
            );
        }
    }
    findings.ok(
        CAPABILITIES,
        "size of a machine",
        format!("{} vCPUs and {} memslots at most", facts.max_vcpus.min(MAX_CPUS.into()), facts.max_memslots),
    );
    about_logs(module, facts, findings);
    for (name, what_for, without) in WANTED {
        if facts.capability(name) != 0 {
            findings.ok(CAPABILITIES, name, what_for);
        } else {
            findings.add((CAPABILITIES, name), Level::Missing, format!("missing: {what_for}"), without, "");
        }
    }
    let missing: Vec<_> = STATE.into_iter().filter(|name| facts.capability(name) == 0).collect();
    if missing.is_empty() {
        findings.ok(CAPABILITIES, "state of a vCPU", "can be saved and restored in full");
    } else {
        findings.add(
            (CAPABILITIES, "state of a vCPU"),
            Level::Missing,
            format!("missing: {}", missing.join(", ")),
            "A machine cannot be saved and restored in full.",
            "Use a newer kernel.",
        );
    }
    let guest_memfd = if facts.capability("GUEST_MEMFD") != 0 { "present" } else { "absent" };
    findings.ok(CAPABILITIES, "GUEST_MEMFD", format!("{guest_memfd}, not used: KVM logs no writes to it"));
}

/// KVM's ways of logging writes.
fn about_logs(module: KvmModule, facts: &KvmFacts, findings: &mut Findings) {
    let manual = (CAPABILITIES, "MANUAL_DIRTY_LOG_PROTECT2");
    match facts.capability(manual.1) & 3 {
        3 => findings.ok(manual.0, manual.1, "tracker kvm-manual, armed at little cost (INITIALLY_SET)"),
        1 => findings.add(
            manual,
            Level::Note,
            "tracker kvm-manual, without INITIALLY_SET",
            "Arming stops the guest for as long as it takes to protect all its memory.",
            "Linux 5.7 and later has INITIALLY_SET.",
        ),
        _ => findings.add(
            manual,
            Level::Missing,
            "missing: tracker kvm-manual",
            "The guest's writes cannot be tracked.",
            "Use Linux 5.2 or later, or run with --track none.",
        ),
    }
    let ring = (CAPABILITIES, "DIRTY_LOG_RING");
    // The capability's value is the largest ring in bytes; an entry has 16.
    let bytes = facts.capability("DIRTY_LOG_RING_ACQ_REL").max(facts.capability("DIRTY_LOG_RING"));
    match (bytes, module) {
        (0, _) => findings.add(
            ring,
            Level::Missing,
            "missing: a log for each vCPU",
            "Writes are not told apart by vCPU (needs Linux 5.11).",
            "",
        ),
        (bytes, KvmModule::Pvm) => findings.add(
            ring,
            Level::Note,
            format!("a log for each vCPU, up to {} entries", bytes / 16),
            "Not with this module and a guest that writes in ring 0: entries are lost, and the vCPU hangs.",
            "",
        ),
        (bytes, _) => {
            findings.ok(ring.0, ring.1, format!("a log for each vCPU, up to {} entries", bytes / 16));
        }
    }
}

fn about_interfaces(host: &Host, findings: &mut Findings) {
    let interfaces = &host.interfaces;
    if interfaces.pagemap_scan {
        findings.ok(OTHER, "PAGEMAP_SCAN", "finds written pages in the host's page tables");
    } else {
        findings.add(
            (OTHER, "PAGEMAP_SCAN"),
            Level::Missing,
            "missing",
            "Written pages cannot be found in the host's page tables.",
            "Use Linux 6.7 or later.",
        );
    }
    let Some(features) = &interfaces.userfaultfd else {
        let error = interfaces.userfaultfd_error.as_deref().unwrap_or("unknown reason");
        let remedy = match interfaces.userfaultfd_device {
            Some(_) => {
                "Run as root, or give the device to a group that you are in:\n\
                 sudo chgrp kvm /dev/userfaultfd && sudo chmod g+rw /dev/userfaultfd"
            }
            None if interfaces.unprivileged_userfaultfd.is_some() => {
                "Run as root, or let everybody use it:\nsudo sysctl vm.unprivileged_userfaultfd=1"
            }
            None => "The kernel is built without it (CONFIG_USERFAULTFD).",
        };
        findings.add(
            (OTHER, "userfaultfd"),
            Level::Missing,
            format!("not to be used: {error}"),
            "Writes by the host itself, exact sets without reads, and demand paging need it.",
            remedy,
        );
        return;
    };
    findings.ok(OTHER, "userfaultfd", format!("can be used, {} features known", features.len()));
    for (name, since, what_for) in USERFAULT {
        if !interfaces.has_userfault(name) {
            let value = format!("missing: {what_for}");
            findings.add(
                (OTHER, name),
                Level::Missing,
                value,
                "",
                &format!("Linux {since} and later may have it."),
            );
        }
    }
}

fn about_pages(host: &Host, findings: &mut Findings) {
    let memory = &host.memory;
    const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    const SHMEM: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let small = "Guest RAM is mapped in pages of 4K: slower, and the guest takes more faults.";
    let thp = (PAGES, "transparent (THP)");
    match memory.thp.as_deref() {
        Some("never") => {
            let remedy = format!("echo madvise | sudo tee {ENABLED}");
            findings.add(thp, Level::Missing, "turned off", small, &remedy);
        }
        Some(mode) => findings.ok(thp.0, thp.1, format!("{mode}: guest RAM gets them")),
        None => {
            findings.add(thp, Level::Missing, "not in this kernel", small, "Use --memory huge=hugetlb-2m.");
        }
    }
    let shmem = (PAGES, "transparent, shared memory");
    match memory.thp_shmem.as_deref() {
        Some(mode @ ("always" | "within_size" | "advise" | "force")) => {
            findings.ok(shmem.0, shmem.1, format!("{mode}: --memory shared=on gets them"));
        }
        mode => findings.add(
            shmem,
            Level::Missing,
            mode.unwrap_or("not in this kernel"),
            "With --memory shared=on, guest RAM is mapped in pages of 4K.",
            &mode.map_or(String::new(), |_| format!("echo advise | sudo tee {SHMEM}")),
        ),
    }
    let pools = [
        (
            "hugetlb pool, 2M",
            memory.hugetlb_2m,
            "hugetlb-2m",
            "echo 512 | sudo tee /proc/sys/vm/nr_hugepages",
        ),
        (
            "hugetlb pool, 1G",
            memory.hugetlb_1g,
            "hugetlb-1g",
            "echo 1 | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
        ),
    ];
    for (what, pool, option, one_gib) in pools {
        let meaning = format!("--memory huge={option} has no pages to take.");
        let fill = format!("Fill the pool, here with 1 GiB:\n{one_gib}");
        match pool {
            None => findings.add((PAGES, what), Level::Missing, "not in this kernel", &meaning, ""),
            Some(HugetlbPool { total: 0, .. }) => {
                findings.add((PAGES, what), Level::Missing, "empty", &meaning, &fill);
            }
            Some(HugetlbPool { total, free: 0 }) => {
                findings.add((PAGES, what), Level::Note, format!("{total} pages, all taken"), &meaning, "");
            }
            Some(HugetlbPool { total, free }) => {
                findings.ok(PAGES, what, format!("{total} pages, {free} free"));
            }
        }
    }
}

fn about_limits(host: &Host, findings: &mut Findings) {
    let overcommit = (LIMITS, "overcommit");
    match host.memory.overcommit {
        Some(2) => findings.add(
            overcommit,
            Level::Note,
            "never (2)",
            "All of a guest's RAM counts against the host's commit limit, touched or not, so large guests are \
             refused.",
            "sudo sysctl vm.overcommit_memory=0",
        ),
        Some(1) => findings.ok(overcommit.0, overcommit.1, "always (1)"),
        _ => findings.ok(overcommit.0, overcommit.1, "by guess (0): untouched guest RAM costs nothing"),
    }
    let memlock = host.memory.memlock.map_or("unlimited".to_owned(), human_size);
    findings.ok(LIMITS, "locked memory", format!("{memlock} (RLIMIT_MEMLOCK)"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::runs;
    use crate::host::{Capability, KvmHost, MemoryHost};

    /// A host on which nothing is wrong: bare metal, kvm_intel, a recent kernel.
    fn healthy() -> Host {
        let wanted = WANTED.iter().map(|(name, ..)| *name);
        let mut capabilities: Vec<_> = NEEDED
            .iter()
            .map(|(name, _)| *name)
            .chain(wanted)
            .chain(STATE)
            .chain(["GUEST_MEMFD"])
            .map(|name| Capability { name, value: 1 })
            .collect();
        capabilities.push(Capability { name: "MANUAL_DIRTY_LOG_PROTECT2", value: 3 });
        capabilities.push(Capability { name: "DIRTY_LOG_RING_ACQ_REL", value: 1 << 20 });
        Host {
            virtualization: Some("vmx"),
            kvm: KvmHost {
                device: Device::Usable,
                module: KvmModule::Intel,
                mmu: Mmu::Ept,
                tdp_mmu: Some(true),
                eager_page_split: Some(true),
                facts: Some(KvmFacts { api_version: 12, capabilities, ..KvmFacts::default() }),
            },
            interfaces: crate::host::Interfaces {
                pagemap_scan: true,
                userfaultfd: Some(
                    USERFAULT
                        .iter()
                        .map(|&(name, ..)| crate::host::UserfaultFeature { name, available: true })
                        .collect(),
                ),
                ..Default::default()
            },
            memory: MemoryHost {
                thp: Some("always".into()),
                thp_shmem: Some("advise".into()),
                hugetlb_2m: Some(HugetlbPool { total: 2, free: 1 }),
                hugetlb_1g: Some(HugetlbPool { total: 2, free: 1 }),
                ..Default::default()
            },
            ..Host::default()
        }
    }

    /// The findings that are not as they should be, after `change` to a healthy host.
    fn trouble(change: impl FnOnce(&mut Host)) -> Vec<Finding> {
        let mut host = healthy();
        change(&mut host);
        diagnose(&host).into_iter().filter(|finding| finding.level != Level::Ok).collect()
    }

    fn lose(host: &mut Host, name: &str) {
        let facts = host.kvm.facts.as_mut().unwrap();
        facts.capabilities.iter_mut().filter(|cap| cap.name == name).for_each(|cap| cap.value = 0);
    }

    #[test]
    fn a_healthy_host_is_healthy() {
        assert_eq!(trouble(|_| {}), []);
    }

    #[test]
    fn every_feature_that_is_judged_is_probed_and_the_other_way_round() {
        let judged: Vec<_> = USERFAULT.iter().map(|(name, ..)| *name).collect();
        let probed: Vec<_> = crate::host::UFFD_FEATURES.iter().map(|(name, _)| *name).collect();
        assert_eq!(judged, probed);
        let known = crate::host::capability_names();
        for cap in &healthy().kvm.facts.unwrap().capabilities {
            assert!(known.contains(&cap.name), "{} is judged but never asked for", cap.name);
        }
    }

    #[test]
    fn what_is_fatal_is_what_run_needs() {
        for (name, _) in NEEDED {
            let found = trouble(|host| lose(host, name));
            assert_eq!(found.len(), 1, "{name}");
            assert!(found[0].level == Level::Fatal && found[0].what == name && !runs(&found));
        }
        for name in WANTED.iter().map(|(name, ..)| *name).chain(STATE).chain(["MANUAL_DIRTY_LOG_PROTECT2"]) {
            let found = trouble(|host| lose(host, name));
            assert!(
                found.len() == 1 && found[0].level == Level::Missing && runs(&found),
                "{name}: {found:?}"
            );
        }
        let found = trouble(|host| host.kvm.facts.as_mut().unwrap().machine_error = Some("EBUSY".into()));
        assert!(!runs(&found) && found[0].value == "EBUSY" && found[0].remedy.is_some());
        assert!(!runs(&trouble(|host| host.kvm.facts.as_mut().unwrap().api_version = 11)));
    }

    /// The remedy of the only fatal finding of a host without a usable KVM.
    fn remedy(device: Device, virtualization: Option<&'static str>, in_vm: bool) -> String {
        remedy_with(KvmHost { device, mmu: Mmu::Ept, ..KvmHost::default() }, virtualization, in_vm)
    }

    fn remedy_with(kvm: KvmHost, virtualization: Option<&'static str>, in_vm: bool) -> String {
        let found = trouble(|host| {
            host.kvm = kvm;
            (host.virtualization, host.in_vm) = (virtualization, in_vm);
        });
        assert!(!runs(&found));
        let fatal: Vec<_> = found.iter().filter(|finding| finding.level == Level::Fatal).collect();
        assert_eq!(fatal.len(), 1, "one cause is one finding: {found:?}");
        fatal[0].remedy.clone().unwrap()
    }

    #[test]
    fn a_host_without_kvm_is_told_what_would_bring_it() {
        assert!(remedy(Device::Absent, Some("vmx"), false).contains("modprobe kvm_intel"));
        assert!(remedy(Device::Absent, Some("svm"), true).contains("modprobe kvm_amd"));
        assert!(remedy(Device::Absent, None, true).contains("nested virtualization"));
        assert!(remedy(Device::Absent, None, false).contains("firmware"));
        let hidden = KvmHost { module: KvmModule::Pvm, mmu: Mmu::Shadow, ..KvmHost::default() };
        assert!(remedy_with(hidden, None, true).contains("mknod"));
        for (virtualization, in_vm) in [(Some("vmx"), false), (None, true), (None, false)] {
            let remedy = remedy(Device::Absent, virtualization, in_vm);
            assert!(remedy.contains("cargo run -p tests --bin rig -- vmm run"), "{remedy}");
        }
        let group = Some("virt".to_owned());
        assert!(remedy(Device::NoPermission { group }, None, false).contains("usermod -aG virt"));
        assert!(remedy(Device::NoPermission { group: None }, None, false).contains("chgrp"));
        assert!(remedy(Device::Broken("odd".into()), None, false).contains("dmesg"));
    }

    #[test]
    fn what_slows_a_guest_is_noted_with_its_remedy() {
        let notes = [
            trouble(|host| host.kvm.tdp_mmu = Some(false)),
            trouble(|host| host.kvm.eager_page_split = Some(false)),
            trouble(|host| host.kvm.mmu = Mmu::Shadow),
            trouble(|host| host.memory.overcommit = Some(2)),
            trouble(|host| host.memory.thp = Some("never".into())),
            trouble(|host| host.memory.thp_shmem = Some("deny".into())),
            trouble(|host| host.memory.hugetlb_2m = Some(HugetlbPool::default())),
            trouble(|host| host.memory.hugetlb_1g = Some(HugetlbPool::default())),
            trouble(|host| host.interfaces.pagemap_scan = false),
            trouble(|host| host.interfaces.userfaultfd = None),
        ];
        for found in notes {
            assert!(found.len() == 1 && runs(&found) && found[0].remedy.is_some(), "{found:?}");
        }
    }

    #[test]
    fn kvm_pvm_is_explained_and_its_ring_warned_of() {
        let found = trouble(|host| {
            (host.kvm.module, host.kvm.mmu, host.kvm.tdp_mmu) = (KvmModule::Pvm, Mmu::Shadow, Some(false));
        });
        let whats: Vec<_> = found.iter().map(|finding| finding.what).collect();
        assert_eq!(whats, ["module", "DIRTY_LOG_RING"]);
        assert!(found.iter().all(|finding| finding.level == Level::Note && finding.meaning.is_some()));
    }
}
