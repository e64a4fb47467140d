//! Which module stands behind /dev/kvm, and how it maps guest memory.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::processor::Processor;
use super::text;

/// The module that stands behind /dev/kvm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmModule {
    /// `kvm_intel`: VMX.
    #[serde(rename = "kvm_intel")]
    Intel,
    /// `kvm_amd`: SVM.
    #[serde(rename = "kvm_amd")]
    Amd,
    /// `kvm_pvm`, out of tree: needs no virtualization extension. A guest's ring 3 runs natively on shadow
    /// page tables; its ring 0 is emulated, instruction by instruction.
    #[serde(rename = "kvm_pvm")]
    Pvm,
    /// None that we know of, or none at all.
    #[default]
    Unknown,
}

impl KvmModule {
    /// Its name, as in /sys/module.
    pub fn name(self) -> &'static str {
        match self {
            KvmModule::Intel => "kvm_intel",
            KvmModule::Amd => "kvm_amd",
            KvmModule::Pvm => "kvm_pvm",
            KvmModule::Unknown => "unknown",
        }
    }
}

impl fmt::Display for KvmModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How KVM translates guest-physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mmu {
    /// Intel's extended page tables.
    Ept,
    /// AMD's nested page tables.
    Npt,
    /// Shadow page tables: KVM follows the guest's own.
    Shadow,
    /// Not to be seen.
    #[default]
    Unknown,
}

impl fmt::Display for Mmu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mmu::Ept => "EPT",
            Mmu::Npt => "NPT",
            Mmu::Shadow => "shadow page tables",
            Mmu::Unknown => "unknown",
        })
    }
}

/// The module behind this host's /dev/kvm, as /sys tells it. A few system calls, so fit for `vmm run`'s start.
pub fn kvm_module() -> KvmModule {
    module_in(Path::new("/sys/module"), &mut |flag| Processor::current().has(flag))
}

/// One vendor module is active at a time. A loadable one that cannot be is not loaded either, so the directory
/// of one that is (it has `initstate`) settles it. One that is built in has a directory whether it is active or
/// not, and no `initstate`. `kvm_pvm` asks nothing of the processor: it is the answer where no other is built
/// in, or none that this processor could run.
fn module_in(modules: &Path, processor_has: &mut dyn FnMut(&str) -> bool) -> KvmModule {
    const KNOWN: [KvmModule; 3] = [KvmModule::Intel, KvmModule::Amd, KvmModule::Pvm];
    let loaded = |module: &KvmModule| modules.join(module.name()).join("initstate").exists();
    if let Some(module) = KNOWN.into_iter().find(loaded) {
        return module;
    }
    let built_in = |module: &KvmModule| modules.join(module.name()).exists();
    let possible = |module: &KvmModule| match module {
        KvmModule::Intel => processor_has("vmx"),
        KvmModule::Amd => processor_has("svm"),
        _ => true,
    };
    KNOWN.into_iter().filter(built_in).find(possible).unwrap_or_default()
}

impl Mmu {
    /// The MMU that `module` uses on this host.
    pub fn of(module: KvmModule) -> Mmu {
        Mmu::in_modules(Path::new("/sys/module"), module)
    }

    fn in_modules(modules: &Path, module: KvmModule) -> Mmu {
        let parameter = |name: &str| {
            let path = modules.join(module.name()).join("parameters").join(name);
            text(path).map(|value| matches!(value.as_str(), "Y" | "1"))
        };
        match module {
            KvmModule::Intel => {
                parameter("ept").map_or(Mmu::Unknown, |on| if on { Mmu::Ept } else { Mmu::Shadow })
            }
            KvmModule::Amd => {
                parameter("npt").map_or(Mmu::Unknown, |on| if on { Mmu::Npt } else { Mmu::Shadow })
            }
            KvmModule::Pvm => Mmu::Shadow,
            KvmModule::Unknown => Mmu::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A /sys/module with `files`.
    fn modules(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let (file, contents) = file.split_once('=').unwrap_or((file, ""));
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        dir
    }

    fn module(files: &[&str], flags: &[&str]) -> KvmModule {
        module_in(modules(files).path(), &mut |flag| flags.contains(&flag))
    }

    #[test]
    fn the_active_module_is_told_from_those_that_are_only_built_in() {
        let (intel, amd, pvm) =
            ("kvm_intel/parameters/ept", "kvm_amd/parameters/npt", "kvm_pvm/parameters/force");
        assert_eq!(module(&["kvm/parameters/tdp_mmu"], &["vmx"]), KvmModule::Unknown);
        assert_eq!(module(&[pvm], &[]), KvmModule::Pvm);
        assert_eq!(module(&[intel, amd], &["svm"]), KvmModule::Amd);
        assert_eq!(module(&[intel, amd], &["vmx"]), KvmModule::Intel);
        assert_eq!(module(&[intel, amd, pvm], &[]), KvmModule::Pvm);
        assert_eq!(module(&["kvm_pvm/initstate", amd], &["svm"]), KvmModule::Pvm);
        assert_eq!(module(&["kvm_amd/initstate", pvm], &["svm"]), KvmModule::Amd);
    }

    #[test]
    fn the_mmu_is_what_the_modules_parameters_say() {
        let mmu = |file: &str, module| Mmu::in_modules(modules(&[file]).path(), module);
        assert_eq!(mmu("kvm_intel/parameters/ept=Y\n", KvmModule::Intel), Mmu::Ept);
        assert_eq!(mmu("kvm_intel/parameters/ept=N\n", KvmModule::Intel), Mmu::Shadow);
        assert_eq!(mmu("kvm_amd/parameters/npt=1\n", KvmModule::Amd), Mmu::Npt);
        assert_eq!(mmu("kvm_amd/parameters/npt=0\n", KvmModule::Amd), Mmu::Shadow);
        assert_eq!(mmu("kvm_amd/parameters/avic=0\n", KvmModule::Amd), Mmu::Unknown);
        assert_eq!(mmu("kvm_pvm/parameters/force=N\n", KvmModule::Pvm), Mmu::Shadow);
    }
}
