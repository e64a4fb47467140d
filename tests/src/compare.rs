//! `vmm` beside QEMU's microvm machine: the same kernel and initramfs, in one L1, in alternating runs.
//!
//! Times are taken on this machine, when a line arrives from L1's console: neither guest's clock is trusted.
//! A run is launch to a line of the guest's own script (boot), or between two of its lines (disk).

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use serde::Serialize;

use crate::e2e;
use crate::rig::{self, Host, Payload};
use crate::store::Store;
use crate::{cargo, peer, recipe};

/// What to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Comparison {
    /// From the launch of the monitor to the first line of the guest's userland.
    Boot,
    /// Reading the virtio disk once from its start to its end.
    Disk,
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rig failed.
    #[error(transparent)]
    Rig(#[from] rig::Error),
    /// An executable could not be built.
    #[error(transparent)]
    Cargo(#[from] cargo::Error),
    /// The Linux guest could not be made.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// QEMU could not be placed in L1.
    #[error("cannot place QEMU in the rig: {0}")]
    Peer(#[from] std::io::Error),
    /// A package is missing.
    #[error(transparent)]
    Store(#[from] crate::store::Error),
    /// A monitor did not get to the end of a run.
    #[error("{monitor} came to the end of {found} measurements of {wanted}; the console:\n{console}")]
    Incomplete {
        /// The monitor.
        monitor: String,
        /// Measurements that there are.
        found: usize,
        /// Measurements that there should be.
        wanted: usize,
        /// All of L1's console.
        console: String,
    },
}

/// Size of the disk that is read, by direct I/O: the guest's page cache has no part in it.
const DISK_MIB: u64 = 256;

/// How often a guest reads it; each time counts.
const DISK_READS: usize = 3;

/// One monitor's measurements.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Milliseconds of each, in order.
    pub runs_ms: Vec<f64>,
    /// Milliseconds, the median of these.
    pub median_ms: f64,
    /// For the disk: MiB per second at the median.
    pub mib_per_s: Option<f64>,
}

/// The outcome.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was compared.
    pub comparison: Comparison,
    /// The guest's kernel.
    pub guest_kernel: String,
    /// The emulator, which is also the peer.
    pub qemu: String,
    /// By monitor.
    pub monitors: BTreeMap<String, Figures>,
}

/// The monitors by name, and how each boots the guest with one disk and the kernel command line `$1`.
const MONITORS: [(&str, &str); 2] = [
    (
        "vmm",
        "vmm run --quiet --track none --memory size=512M --cpus 1 --kernel /images/vmlinux \
         --initrd /images/initramfs --disk path=/tmp/disk,readonly=on --cmdline \"$1\"",
    ),
    (
        "qemu-microvm",
        "qemu-microvm -m 512 -smp 1 -kernel /images/vmlinux -initrd /images/initramfs \
         -drive file=/tmp/disk,format=raw,if=none,id=disk,readonly=on -device virtio-blk-device,drive=disk \
         -append \"$1\"",
    ),
];

/// Runs the comparison: `runs` runs of each monitor, in turn, in one L1.
pub fn run(
    store: &Store,
    host: &Host,
    series: &str,
    comparison: Comparison,
    runs: usize,
) -> Result<Report, Error> {
    let guest_script = match comparison {
        Comparison::Boot => "echo measured to".to_owned(),
        // A read that fails has no end, and is missed.
        Comparison::Disk => {
            let read =
                "echo measured from; dd if=/dev/vda of=/dev/null bs=1M iflag=direct && echo measured to";
            [read; DISK_READS].join("; ")
        }
    };
    let wanted = match comparison {
        Comparison::Boot => runs,
        Comparison::Disk => runs * DISK_READS,
    };
    let mut script = format!("dd if=/dev/urandom of=/tmp/disk bs=1M count={DISK_MIB} 2>/dev/null\n");
    for (name, command) in MONITORS {
        script += &format!("run_{}() {{ {command}; }}\n", name.replace('-', "_"));
    }
    // The first round warms the page cache of L1 and is not counted.
    for round in 0..=runs {
        for (name, _) in MONITORS {
            let from = if comparison == Comparison::Boot { "; echo measured from" } else { "" };
            script += &format!(
                "echo 'round {round} of {name}'{from}\nrun_{} 'console=ttyS0 quiet panic=-1 RUN=\"{guest_script}\"'\n",
                name.replace('-', "_")
            );
        }
    }
    let qemu = store.qemu()?;
    let payload = peer::with_qemu(e2e::with_vmm(Payload::script(script))?, &qemu)?;
    let payload = recipe::with_linux_guest(payload, store, series)?;

    let mut measured: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut current: Option<(usize, String)> = None;
    let mut from: Option<Instant> = None;
    let outcome = host.run(store, &payload, |at, line| {
        if let Some((round, name)) = line.strip_prefix("round ").and_then(|rest| rest.split_once(" of ")) {
            current = round.parse().ok().map(|round| (round, name.to_owned()));
            from = None;
        } else if line.ends_with("measured from") {
            from = Some(at);
        } else if line.ends_with("measured to")
            && let (Some((round, name)), Some(from)) = (&current, from.take())
            && *round > 0
        {
            measured.entry(name.clone()).or_default().push((at - from).as_secs_f64() * 1e3);
        }
    })?;
    let mut monitors = BTreeMap::new();
    for (name, _) in MONITORS {
        let runs_ms = measured.remove(name).unwrap_or_default();
        if runs_ms.len() != wanted || wanted == 0 {
            let console = outcome.console;
            return Err(Error::Incomplete { monitor: name.into(), found: runs_ms.len(), wanted, console });
        }
        let median_ms = median(&runs_ms);
        let mib_per_s = (comparison == Comparison::Disk).then(|| DISK_MIB as f64 / (median_ms / 1e3));
        monitors.insert(name.into(), Figures { runs_ms, median_ms, mib_per_s });
    }
    Ok(Report { comparison, guest_kernel: store.kernel(series)?.version, qemu: qemu.version, monitors })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.comparison {
            Comparison::Boot => "launch to userland",
            Comparison::Disk => "sequential read of the disk",
        };
        writeln!(out, "{what}, guest {}, peer {}", self.guest_kernel, self.qemu)?;
        writeln!(out, "{:<14}{:>11}{:>11}{:>11}{:>9}", "", "median ms", "least ms", "most ms", "MiB/s")?;
        for (name, figures) in &self.monitors {
            let least = figures.runs_ms.iter().copied().fold(f64::INFINITY, f64::min);
            let most = figures.runs_ms.iter().copied().fold(0.0, f64::max);
            let rate = figures.mib_per_s.map_or(String::new(), |rate| format!("{rate:.0}"));
            writeln!(out, "{name:<14}{:>11.0}{least:>11.0}{most:>11.0}{rate:>9}", figures.median_ms)?;
        }
        Ok(())
    }
}
