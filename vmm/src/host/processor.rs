//! The processor as the kernel sees it: a flag that the firmware has turned off is not in /proc/cpuinfo.

use procfs::Current;

/// The first processor of this host.
#[derive(Debug, Default)]
pub(super) struct Processor {
    pub(super) model: String,
    flags: Vec<String>,
}

impl Processor {
    /// Reads /proc/cpuinfo; a processor without name and flags when that cannot be done.
    pub(super) fn current() -> Processor {
        let Ok(info) = procfs::CpuInfo::current() else { return Processor::default() };
        Processor {
            model: info.model_name(0).unwrap_or_default().to_owned(),
            flags: info.flags(0).unwrap_or_default().into_iter().map(str::to_owned).collect(),
        }
    }

    pub(super) fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|have| have == flag)
    }
}
