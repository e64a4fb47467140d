//! `vmm run` and `vmm restore`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use dirty_track::fault::{Age, Split};
use dirty_track::rearm::Rearm;
use dirty_track::tracker::Kind;
use vmm::boot::Kernel;
use vmm::devices::virtio::disk::DiskConfig;
use vmm::fault::{FaultConfig, PrefaultChoice, WorkingSetError};
use vmm::forecast::Link;
use vmm::memory::{Faults, MemoryConfig};
use vmm::migrate::Address;
use vmm::options;
use vmm::run::{self, Outcome, RunConfig};
use vmm::snapshot::{Mode, Restore};
use vmm::timing::Timing;
use vmm::track::TrackConfig;
use vmm::working_set::WorkingSetConfig;

use super::{bandwidth, said};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OnOff {
    On,
    Off,
}

#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0  the guest ended, its time was up, or you stopped it
  1  it could not be started, or tracking failed
  2  the command line is wrong
  3  the guest crashed: KVM could not go on with it
  4  a check failed: the built-in guest found its memory wrong, or its ledger contradicts the tracker

Keys, when a guest of yours runs on a terminal: Ctrl-A x quits, Ctrl-A a sends Ctrl-A.")]
pub(super) struct RunArgs {
    /// Kernel: an ELF with a PVH note (vmlinux) or a bzImage [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line; for the built-in guest its workload, as in "workload=rand region=256M"
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    cpus: u8,
    /// Guest RAM: size=1G,huge=none|thp|hugetlb-2m|hugetlb-1g,shared=on|off,fault=kernel|uffd,prealloc=on|off. With fault=uffd the
    /// monitor itself brings every page that the guest touches first
    #[arg(long, value_name = "SPEC", default_value = "size=1G")]
    memory: MemoryConfig,
    /// A disk: path=FILE,readonly=on|off. May be given many times
    #[arg(long, value_name = "SPEC")]
    disk: Vec<DiskConfig>,
    /// An entropy device (virtio-rng) [default: on with --kernel, else off]
    #[arg(long, value_name = "SWITCH", value_enum)]
    rng: Option<OnOff>,
    /// Wait for a machine that `vmm migrate` brings: unix:PATH, tcp:HOST:PORT or exec:COMMAND. It says how much memory it
    /// has, and how many vCPUs; its disks are those given here
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["kernel", "initrd", "cmdline", "cpus", "rng"])]
    incoming: Option<Address>,
    /// For --incoming tcp: TLS, by ca-cert.pem, server-cert.pem and server-key.pem in this directory
    #[arg(long, value_name = "DIR", requires = "incoming")]
    tls_dir: Option<PathBuf>,
    #[command(flatten)]
    watch: WatchArgs,
}

/// How a machine runs and is observed, whatever it is made of.
#[derive(Args)]
pub(super) struct WatchArgs {
    /// With fault=uffd, what comes along with a page that is missing: none, around=64K, block, or recorded=FILE, the
    /// pages that a run with --record-working-set touched [default: around=64K]
    #[arg(long, value_name = "POLICY")]
    prefault: Option<PrefaultChoice>,
    /// With fault=uffd, whether what came along counts as touched: old (not until it is written) or young
    /// [default: old; young for a restore without --record-working-set]
    #[arg(long, value_name = "AGE")]
    prefault_age: Option<Age>,
    /// With fault=uffd, what the first write to a protected page opens: leaf, block or adaptive[,threshold=64]
    /// [default: leaf]
    #[arg(long, value_name = "POLICY")]
    split: Option<Split>,
    /// With fault=uffd, write the pages that the guest touched to this file at the end
    #[arg(long, value_name = "FILE")]
    record_working_set: Option<PathBuf>,
    /// How to know which pages the guest writes: auto, none, kvm-bitmap, kvm-manual, kvm-ring[,entries=4096],
    /// uffd-sync[,unit=4k|2m], uffd-async, exact; with fault=uffd just none, KVM's own, and uffd-serve, which exact
    /// means there. `vmm doctor` tells what each is good for. Or sampled[,per-gib=512]: just the rate, from a sample of
    /// pages, at next to no cost to the guest
    #[arg(long, value_name = "TRACKER", default_value = "auto")]
    track: TrackConfig,
    /// What is write-protected again at the end of an epoch: all, or dense-skip[,threshold=75%][,for-epochs=16],
    /// which leaves blocks writable that were dense, and reports them whole
    #[arg(long, value_name = "POLICY", default_value = "all")]
    rearm: Rearm,
    /// Link of the live migration that is foretold from what the guest dirties: bytes per second, as in 1250M
    #[arg(long, value_name = "SIZE", default_value = "1250M", value_parser = bandwidth)]
    bandwidth: u64,
    /// How long the guest may stand still for that migration
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = options::duration)]
    downtime: Duration,
    /// Length of an epoch
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = options::epoch)]
    epoch: Duration,
    /// Stop after this time, 0 for never [default: 30s for the built-in guest, 0 with --kernel]
    #[arg(long, value_name = "TIME", value_parser = options::duration)]
    duration: Option<Duration>,
    /// Tell which address spaces of the guest map the dirty pages, and at which virtual addresses; stops the vCPUs for
    /// a moment at each boundary
    #[arg(long, value_name = "SWITCH", value_enum, default_value = "off")]
    owners: OnOff,
    /// Tell how much of guest memory is touched, read or written, in intervals of this time: 10s. Needs
    /// --memory shared=on, and costs the guest a fault for each page that it touches again; 10s,per-gib=512 estimates
    /// it from a sample at next to no cost
    #[arg(long, value_name = "TIME")]
    working_set: Option<WorkingSetConfig>,
    /// Hold every epoch against the built-in guest's own ledger of its writes, which stops the vCPUs for a
    /// moment at each boundary
    #[arg(long, value_name = "SWITCH", value_enum, default_value = "on")]
    ledger: OnOff,
    /// One line of JSON per epoch on standard output; the console goes to standard error
    #[arg(long)]
    json: bool,
    /// Show nothing but the console
    #[arg(long, conflicts_with = "json")]
    quiet: bool,
    /// Report how long each phase of the start took
    #[arg(long)]
    timing: bool,
    /// Serve HTTP with JSON at this Unix socket: state, pause, dirty memory, dumps, metrics (`vmm dirty`, curl)
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct RestoreArgs {
    /// The snapshot
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    /// When the memory is read, and what it is made of: mode=lazy|eager|map,huge=none|thp|hugetlb-2m|hugetlb-1g,
    /// shared=on|off. lazy: when the guest touches it, and behind its back; eager: before it goes on; map: the kernel maps
    /// the file of a full snapshot [default: mode=lazy where the monitor may serve its guest's faults, else eager]
    #[arg(long, value_name = "SPEC", default_value = "huge=thp", value_parser = restore_memory)]
    memory: RestoreMemory,
    /// Check all contents before the guest goes on; without it they are checked when they are read, and with mode=map never
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    watch: WatchArgs,
}

/// What `vmm restore --memory` says.
#[derive(Clone, Copy)]
pub(super) struct RestoreMemory {
    mode: Option<Mode>,
    memory: MemoryConfig,
}

/// A snapshot says how much memory there is, and the mode who answers faults.
fn restore_memory(text: &str) -> Result<RestoreMemory, String> {
    let (modes, rest): (Vec<&str>, Vec<&str>) = text.split(',').partition(|part| part.starts_with("mode="));
    if rest.iter().any(|part| !part.contains('=') || part.starts_with("size=")) {
        return Err("the snapshot says how much memory there is".into());
    }
    if rest.iter().any(|part| part.starts_with("fault=")) {
        return Err("mode= says who answers faults: lazy is by the monitor, the others by the kernel".into());
    }
    let mode = match modes[..] {
        [] => None,
        [mode] => Some(mode["mode=".len()..].parse()?),
        _ => return Err("mode= is given twice".into()),
    };
    let rest = rest.join(",");
    let memory = if rest.is_empty() { Ok(MemoryConfig::default()) } else { rest.parse() };
    Ok(RestoreMemory { mode, memory: memory.map_err(|error: options::OptionError| error.to_string())? })
}

/// What the first argument-less run shows: a busy guest with a shape to its writes.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);

/// The built-in guest's first act is to touch its memory, so that there are huge mappings to split, unless that
/// would take more than half of what the host has to give.
fn default_cmdline(builtin: bool, ram: u64) -> &'static str {
    match builtin {
        false => "console=ttyS0",
        true if vmm::memory::available().is_some_and(|available| ram <= available / 2) => "populate=on",
        true => "",
    }
}

/// Options that need, or exclude, that the monitor serves the guest's faults.
fn fault_options(args: &WatchArgs, memory: &MemoryConfig) -> Result<(), String> {
    let given = [
        ("--prefault", args.prefault.is_some()),
        ("--prefault-age", args.prefault_age.is_some()),
        ("--split", args.split.is_some()),
        ("--record-working-set", args.record_working_set.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) if memory.fault == Faults::Kernel => {
            Err(format!("{option} is for memory whose faults are served here: use --memory fault=uffd"))
        }
        _ => args.track.refused(memory.fault).map_or(Ok(()), |why| Err(why.into())),
    }
}

/// Options that are about epochs, or about the memory that they need.
fn epoch_options(args: &WatchArgs, memory: &MemoryConfig) -> Result<(), String> {
    let tracks = args.track.sampled.is_none() && args.track.kind != Some(Kind::None);
    match (args.owners, args.working_set) {
        (OnOff::On, _) | (_, Some(_)) if !tracks => {
            Err("--owners and --working-set are told with each epoch: they need a tracker".into())
        }
        (_, Some(_)) if memory.fault == Faults::Uffd => Err(
            "--working-set is for --memory fault=kernel; with fault=uffd the end of the run tells what was touched, \
             and --record-working-set writes it to a file"
                .into(),
        ),
        (_, Some(_)) if !memory.shared => Err(
            "--working-set unmaps guest memory to see what comes back: that needs --memory shared=on".into(),
        ),
        _ => Ok(()),
    }
}

/// What can keep a run from being asked for.
enum Refused {
    /// The command line.
    Usage(String),
    /// A file that it names.
    File(WorkingSetError),
}

/// What `args` say of a run; the rest is that of the built-in guest.
fn watched(args: WatchArgs, memory: MemoryConfig) -> Result<RunConfig, Refused> {
    let track = TrackConfig { rearm: args.rearm, ..args.track };
    track.check_rearm().map_err(Refused::Usage)?;
    fault_options(&args, &memory).map_err(Refused::Usage)?;
    epoch_options(&args, &memory).map_err(Refused::Usage)?;
    let fault = FaultConfig::new(args.prefault, args.prefault_age, args.split).map_err(Refused::File)?;
    Ok(RunConfig {
        kernel: Kernel::BuiltIn,
        initrd: None,
        cmdline: String::new(),
        cpus: 1,
        memory,
        fault,
        record_working_set: args.record_working_set,
        disks: Vec::new(),
        rng: false,
        track,
        link: Link { bytes_per_s: args.bandwidth, downtime_s: args.downtime.as_secs_f64() },
        epoch: args.epoch,
        duration: args.duration.unwrap_or(DEFAULT_DURATION),
        owners: args.owners == OnOff::On,
        working_set: args.working_set,
        ledger: args.ledger == OnOff::On,
        json: args.json,
        quiet: args.quiet,
        timing: args.timing,
        api_socket: args.api_socket,
        restore: None,
        incoming: None,
        tls_dir: None,
    })
}

fn run_config(args: RunArgs) -> Result<RunConfig, Refused> {
    let builtin = args.kernel.is_none();
    if args.tls_dir.is_some() && !matches!(args.incoming, Some(Address::Tcp(_))) {
        return Err(Refused::Usage("TLS is for --incoming tcp:HOST:PORT".into()));
    }
    let endless = args.watch.duration.is_none() && (!builtin || args.incoming.is_some());
    let config = watched(args.watch, args.memory)?;
    Ok(RunConfig {
        kernel: args.kernel.map_or(Kernel::BuiltIn, Kernel::File),
        initrd: args.initrd,
        cmdline: args.cmdline.unwrap_or_else(|| default_cmdline(builtin, args.memory.size).to_owned()),
        cpus: args.cpus,
        incoming: args.incoming,
        tls_dir: args.tls_dir,
        disks: args.disk,
        rng: args.rng.map_or(!builtin, |rng| rng == OnOff::On),
        duration: if endless { Duration::ZERO } else { config.duration },
        ..config
    })
}

fn restore_config(args: RestoreArgs) -> Result<RunConfig, Refused> {
    let duration = args.watch.duration.unwrap_or(Duration::ZERO);
    let RestoreMemory { mode, memory } = args.memory;
    let mode = mode.unwrap_or_else(|| {
        let best = Mode::best();
        if best != Mode::Lazy {
            eprintln!("vmm: this process may not serve its guest's faults: memory is read before it goes on (mode={best})");
        }
        best
    });
    let mut watch = args.watch;
    if mode == Mode::Lazy && watch.record_working_set.is_none() {
        // Who goes on should not pay for each page once more. A working set is exact with old pages only.
        watch.prefault_age.get_or_insert(Age::Young);
    }
    let config = watched(watch, MemoryConfig { fault: mode.faults(), ..memory })?;
    let restore = Restore { path: args.snapshot, mode, verify: args.verify };
    Ok(RunConfig { restore: Some(restore), duration, ..config })
}

fn run_as(config: Result<RunConfig, Refused>, timing: &Timing) -> ExitCode {
    let config = match config {
        Ok(config) => config,
        Err(Refused::Usage(why)) => {
            eprintln!("vmm: {why}");
            return ExitCode::from(2);
        }
        Err(Refused::File(error)) => return said(Err(error)),
    };
    match run::run(config, timing) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Crashed) => ExitCode::from(3),
        Ok(Outcome::CheckFailed) => ExitCode::from(4),
        Err(error) => said(Err(error)),
    }
}

pub(super) fn run(args: RunArgs, timing: &Timing) -> ExitCode {
    run_as(run_config(args), timing)
}

pub(super) fn restore(args: RestoreArgs, timing: &Timing) -> ExitCode {
    run_as(restore_config(args), timing)
}
