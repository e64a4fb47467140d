//! The `vmm` command: reads the command line and calls the library.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use dirty_track::fault::{Age, Split};
use dirty_track::log::Compression;
use dirty_track::rearm::Rearm;
use dirty_track::tracker::Kind;
use vmm::api::client::ClientError;
use vmm::bench::results::{Bench, Results, ResultsError};
use vmm::bench::{self, BenchConfig, Ended};
use vmm::boot::Kernel;
use vmm::devices::virtio::disk::DiskConfig;
use vmm::dirty;
use vmm::dump::DumpConfig;
use vmm::fault::{FaultConfig, PrefaultChoice, WorkingSetError};
use vmm::forecast::Link;
use vmm::logfile::{self, Export, LogfileError};
use vmm::memory::{Faults, MemoryConfig};
use vmm::migrate::{self, Address, MAX_CONNECTIONS, MigrateConfig};
use vmm::options;
use vmm::run::{Outcome, RunConfig, run};
use vmm::snapshot::{Mode, Restore};
use vmm::timing::{Phase, Timing};
use vmm::track::TrackConfig;
use vmm::working_set::WorkingSetConfig;

/// A virtual machine monitor that knows which memory its guest touched.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a guest and show its dirty memory live. Without arguments: the built-in guest for 30 s
    Run(Box<RunArgs>),
    /// Write a snapshot of the machine of a running monitor, which goes on
    Snapshot(SnapshotArgs),
    /// Go on from a snapshot
    Restore(Box<RestoreArgs>),
    /// Move the machine of a running monitor to another one, while it runs
    Migrate(MigrateArgs),
    /// Ask a running monitor about dirty memory
    Dirty(DirtyArgs),
    /// Read, apply and draw dirty logs
    #[command(subcommand)]
    Log(LogVerb),
    /// Measure what tracking costs on this host, and what this program is worth next to its limits and to QEMU
    #[command(subcommand)]
    Bench(BenchVerb),
    /// Say what this host can do for virtual machines and for tracking their memory
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum BenchVerb {
    /// Everything
    All(BenchArgs),
    /// What every tracker costs, by how much a guest writes
    Dirty(BenchArgs),
    /// What serving a guest's faults costs, by policy
    Fault(BenchArgs),
    /// How soon a snapshot runs
    Restore(BenchArgs),
    /// How fast a guest is moved, and how long it stands still for that
    Migrate(BenchArgs),
    /// How fast a guest starts
    Boot(BenchArgs),
    /// What got faster or slower from one run to another, by more than chance
    #[command(after_help = "\
Exit codes:
  0  nothing got worse
  1  the runs cannot be compared
  2  the command line is wrong
  6  something got worse")]
    Compare {
        /// What `--json` wrote before
        before: std::path::PathBuf,
        /// And after
        after: std::path::PathBuf,
        /// Differences below this many per cent are none
        #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
        threshold: f64,
    },
}

#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0  all was measured, or skipped with a reason
  1  nothing can be measured here
  2  the command line is wrong
  7  interrupted; what was measured until then is kept")]
struct BenchArgs {
    /// Over in minutes: less memory, fewer cases, fewer turns
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON, after every table
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
    /// Write a report to this directory: report.html, Markdown, CSV, plots
    #[arg(long, value_name = "DIR")]
    report: Option<std::path::PathBuf>,
    /// Memory that a tracked guest works in [default: 256M, 64M if quick]
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    memory: Option<u64>,
    /// The QEMU to compare with [default: qemu-system-x86_64, if it is there]
    #[arg(long, value_name = "FILE")]
    qemu: Option<std::path::PathBuf>,
}

#[derive(Args)]
struct SnapshotArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    #[arg(long, value_name = "PATH")]
    api_socket: std::path::PathBuf,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
    /// Just what was written since the last snapshot, or since the one that the machine was restored from
    #[arg(long)]
    diff: bool,
    /// The snapshot: a directory, which is there when it is whole. One that is there is replaced by it
    #[arg(value_name = "DIR")]
    output: std::path::PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0  the guest runs at the destination
  1  it does not: it goes on where it was
  2  the command line is wrong
  5  it was given away, and the destination has not said that it runs: look there")]
struct MigrateArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    #[arg(long, value_name = "PATH")]
    api_socket: std::path::PathBuf,
    /// Where `vmm run --incoming` waits: unix:PATH, tcp:HOST:PORT, or exec:COMMAND, whose input and output carry it
    #[arg(value_name = "DEST")]
    to: Address,
    /// How long the guest may stand still
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = options::duration)]
    downtime: Duration,
    /// Connections, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// How contents are compressed: none, lz4 or zstd
    #[arg(long, value_name = "HOW", default_value = "none")]
    compress: Compression,
    /// Hold those vCPUs back that write most, more and more, if the guest writes faster than can be sent
    #[arg(long)]
    auto_converge: bool,
    /// Switch if the guest writes faster than can be sent: it runs at the destination, which asks for what it has not got.
    /// Needs `--memory fault=uffd` there
    #[arg(long)]
    postcopy: bool,
    /// Most bytes per second, as in 1250M [default: as fast as it goes]
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    bandwidth: Option<u64>,
    /// For tcp: TLS, by ca-cert.pem, client-cert.pem and client-key.pem in this directory of the monitor's
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<std::path::PathBuf>,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DirtyArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    // Before the verb or behind it, which clap offers for options only that need not be given.
    #[arg(long, value_name = "PATH", global = true)]
    api_socket: Option<std::path::PathBuf>,
    /// JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: DirtyVerb,
}

#[derive(Subcommand)]
enum DirtyVerb {
    /// Write the dirty log while the guest runs. Ctrl-C ends it as it should be
    Dump {
        /// Length of an epoch [default: that of the run]
        #[arg(long, value_name = "TIME", value_parser = options::epoch)]
        interval: Option<Duration>,
        /// End after so many epochs [default: at Ctrl-C, or when the guest ends]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        epochs: Option<u64>,
        /// The contents of dirty pages, too; the guest stands still for those of the last epoch
        #[arg(long)]
        pages: bool,
        /// All of memory first, so that the log stands for itself
        #[arg(long, requires = "pages")]
        full: bool,
        /// How contents are compressed: none, lz4 or zstd
        #[arg(long, value_name = "HOW", default_value = "none")]
        compress: Compression,
        /// Where to: a file, which is there when it is whole, or - for standard output
        #[arg(short, long, value_name = "FILE")]
        output: std::path::PathBuf,
    },
    /// A line for each epoch
    Watch,
    /// How fast the guest dirties memory, and what follows for a migration
    Rate,
}

#[derive(Subcommand)]
enum LogVerb {
    /// What is in a log or a snapshot, and whether it is whole
    Info {
        /// The log, - for standard input; or the directory of a snapshot
        log: std::path::PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List dirty ranges
    Ranges {
        /// The log; - for standard input
        log: std::path::PathBuf,
        /// Just this epoch
        #[arg(long, value_name = "N")]
        epoch: Option<u64>,
    },
    /// Print all ranges, and which vCPU wrote them, for programs
    #[command(group(clap::ArgGroup::new("form").required(true)))]
    Export {
        /// The log; - for standard input
        log: std::path::PathBuf,
        /// A JSON object a line
        #[arg(long, group = "form")]
        json: bool,
        /// Comma-separated values
        #[arg(long, group = "form")]
        csv: bool,
    },
    /// Make one full snapshot of a snapshot and all that it builds on
    Merge {
        /// The snapshot
        #[arg(value_name = "DIR")]
        snapshot: std::path::PathBuf,
        /// The snapshot to make. One that is there is replaced
        #[arg(short, long, value_name = "DIR")]
        output: std::path::PathBuf,
    },
    /// Make an image of memory as it was at the log's end
    Apply {
        /// A log with contents; - for standard input
        log: std::path::PathBuf,
        /// Image of memory as it was when the log began [default: nothing but zeros, as for a log of --full]
        #[arg(long, value_name = "IMAGE")]
        base: Option<std::path::PathBuf>,
        /// The image to make: the byte of each guest-physical address at that offset. It may be the base
        #[arg(short, long, value_name = "IMAGE")]
        output: std::path::PathBuf,
    },
    /// Check that a log or a snapshot is whole, and that an image is what the log says
    Verify {
        /// The log, - for standard input; or the directory of a snapshot, with all that it builds on
        log: std::path::PathBuf,
        /// Image of memory as it was at the log's end
        #[arg(long)]
        image: Option<std::path::PathBuf>,
    },
    /// Draw dirty memory over time
    Heatmap {
        /// The log; - for standard input
        log: std::path::PathBuf,
        /// A .png or .svg [default: as text]
        #[arg(short, long, value_name = "FILE")]
        output: Option<std::path::PathBuf>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
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
struct RunArgs {
    /// Kernel: an ELF with a PVH note (vmlinux) or a bzImage [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<std::path::PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<std::path::PathBuf>,
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
    tls_dir: Option<std::path::PathBuf>,
    #[command(flatten)]
    watch: WatchArgs,
}

/// How a machine runs and is observed, whatever it is made of.
#[derive(Args)]
struct WatchArgs {
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
    record_working_set: Option<std::path::PathBuf>,
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
    api_socket: Option<std::path::PathBuf>,
}

#[derive(Args)]
struct RestoreArgs {
    /// The snapshot
    #[arg(value_name = "DIR")]
    snapshot: std::path::PathBuf,
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
struct RestoreMemory {
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

fn bandwidth(text: &str) -> Result<u64, String> {
    match options::size(text) {
        Ok(0) => Err("nothing can be sent over that".into()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
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

fn dirty_verb(args: DirtyArgs) -> Result<(), ClientError> {
    let Some(socket) = &args.api_socket else {
        let missing = "--api-socket <PATH> is missing: give what `vmm run --api-socket` was given";
        Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, missing).exit();
    };
    match args.verb {
        DirtyVerb::Dump { interval, epochs, pages, full, compress, output } => {
            let interval_ms = interval.map_or(0, |interval| interval.as_millis() as u64);
            let config = DumpConfig { pages, full, compress, epochs: epochs.unwrap_or(0), interval_ms };
            dirty::dump(socket, config, &output, args.json)
        }
        DirtyVerb::Watch => dirty::watch(socket, args.json),
        DirtyVerb::Rate => dirty::rate(socket, args.json),
    }
}

fn log_verb(verb: LogVerb) -> Result<(), LogfileError> {
    match verb {
        LogVerb::Info { log, json } => logfile::info(&log, json),
        LogVerb::Ranges { log, epoch } => logfile::ranges(&log, epoch),
        LogVerb::Export { log, csv, .. } => {
            logfile::export(&log, if csv { Export::Csv } else { Export::Json })
        }
        LogVerb::Merge { snapshot, output } => logfile::merge(&snapshot, &output),
        LogVerb::Apply { log, base, output } => logfile::apply(&log, base.as_deref(), &output),
        LogVerb::Verify { log, image } => logfile::verify(&log, image.as_deref()),
        LogVerb::Heatmap { log, output } => logfile::heatmap(&log, output.as_deref()),
    }
}

fn migrate_verb(args: MigrateArgs) -> ExitCode {
    let most = if matches!(args.to, Address::Exec(_)) { 1 } else { MAX_CONNECTIONS };
    if !(1..=most).contains(&args.connections) {
        eprintln!("vmm: {} connections to {}: there can be 1 to {most}", args.connections, args.to);
        return ExitCode::from(2);
    }
    let config = MigrateConfig {
        to: args.to,
        downtime: args.downtime,
        connections: args.connections,
        compress: args.compress,
        auto_converge: args.auto_converge,
        postcopy: args.postcopy,
        bandwidth: args.bandwidth,
        tls_dir: args.tls_dir,
    };
    match migrate::client::migrate(&args.api_socket, &config, args.json) {
        Ok(report) if report.phase == migrate::report::Phase::Completed => ExitCode::SUCCESS,
        Ok(report) if report.phase == migrate::report::Phase::InDoubt => ExitCode::from(5),
        Ok(_) => ExitCode::FAILURE,
        Err(error) => said(Err(error)),
    }
}

fn said(outcome: Result<(), impl std::fmt::Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
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

fn run_verb(config: Result<RunConfig, Refused>, timing: &Timing) -> ExitCode {
    let config = match config {
        Ok(config) => config,
        Err(Refused::Usage(why)) => {
            eprintln!("vmm: {why}");
            return ExitCode::from(2);
        }
        Err(Refused::File(error)) => {
            eprintln!("vmm: {error}");
            return ExitCode::FAILURE;
        }
    };
    match run(config, timing) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Crashed) => ExitCode::from(3),
        Ok(Outcome::CheckFailed) => ExitCode::from(4),
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let timing = Timing::start();
    match Cli::parse().verb {
        Verb::Run(args) => {
            timing.mark(Phase::Parsed);
            run_verb(run_config(*args), &timing)
        }
        Verb::Restore(args) => {
            timing.mark(Phase::Parsed);
            run_verb(restore_config(*args), &timing)
        }
        Verb::Snapshot(args) => said(dirty::snapshot(&args.api_socket, &args.output, args.diff, args.json)),
        Verb::Migrate(args) => migrate_verb(args),
        Verb::Dirty(args) => said(dirty_verb(args)),
        Verb::Log(verb) => said(log_verb(verb)),
        Verb::Bench(verb) => bench_verb(verb),
        Verb::Doctor { json } => vmm::doctor::run(json),
    }
}

fn bench_verb(verb: BenchVerb) -> ExitCode {
    let (what, args) = match verb {
        BenchVerb::All(args) => (Vec::new(), args),
        BenchVerb::Dirty(args) => (vec![Bench::Dirty], args),
        BenchVerb::Fault(args) => (vec![Bench::Fault], args),
        BenchVerb::Restore(args) => (vec![Bench::Restore], args),
        BenchVerb::Migrate(args) => (vec![Bench::Migrate], args),
        BenchVerb::Boot(args) => (vec![Bench::Boot], args),
        BenchVerb::Compare { before, after, threshold } => return compare_verb(&before, &after, threshold),
    };
    let BenchArgs { quick, json, report, memory, qemu } = args;
    match bench::run(&BenchConfig { what, quick, memory, json, report, qemu, emulated: false }) {
        Ok(Ended::Complete) => ExitCode::SUCCESS,
        Ok(Ended::Interrupted) => ExitCode::from(7),
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare_verb(before: &std::path::Path, after: &std::path::Path, threshold: f64) -> ExitCode {
    let read = || Ok::<_, ResultsError>((Results::read(before)?, Results::read(after)?));
    match read() {
        Ok((before, after)) => {
            let comparison = bench::compare(&before, &after, threshold / 100.0);
            print!("{comparison}");
            if comparison.got_worse() { ExitCode::from(6) } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
    }
}
