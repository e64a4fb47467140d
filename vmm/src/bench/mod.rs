//! `vmm bench`: what knowing which memory is dirty costs on the host at hand, and what this program is worth next to what
//! bounds it, and next to another monitor that runs the same guest.
//!
//! [`turns`] has the method, [`results`] the document that everything is made from. What is measured is a list of groups of
//! contenders: [`dirty`] and [`fault`] have machines in this process and see what a guest sees, [`restore`], [`migrate`] and
//! [`boot`] start monitors as a user does and measure from outside.

pub mod auto;
mod boot;
mod compare;
mod dirty;
mod fault;
mod limits;
mod migrate;
mod monitors;
mod progress;
pub mod report;
mod restore;
pub mod results;
mod stage;
mod stats;
mod turns;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use dirty_track::tracker::{Kind, TrackerError};

pub use compare::{Change, Comparison, compare};
use monitors::Monitors;
use progress::{Interrupt, Progress};
use report::ReportError;
use results::{Bench, HostFacts, Results, ResultsError, SCHEMA, Skipped, Table};
use turns::{Contender, Effort, in_turns};

use crate::doctor;
use crate::host::{self, Host};
use crate::ledger::LedgerError;
use crate::machine::{MachineError, open_kvm};

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The tracker.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// What the guest wrote.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// What was measured cannot be kept.
    #[error(transparent)]
    Results(#[from] ResultsError),
    /// Nor shown.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The guest did something else.
    #[error("the guest that was to be measured: {0}")]
    Guest(String),
    /// Another process did.
    #[error("{who}: {why}")]
    Process {
        /// Which.
        who: String,
        /// What it said.
        why: String,
    },
    /// Nothing is measured by that name.
    #[error("no table has {only:?} in its title; there are:\n  {titles}")]
    NoSuchTable {
        /// What was asked for.
        only: String,
        /// A line each.
        titles: String,
    },
    /// A tracker is broken.
    #[error(
        "{tracker} missed {pages} pages that the guest wrote: that is a bug, and its figures mean nothing"
    )]
    Missed {
        /// How many.
        pages: u64,
        /// Which.
        tracker: &'static str,
    },
    /// A system resource.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What is to be measured, and what becomes of it.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// In this order; all of it if nothing is named.
    pub what: Vec<Bench>,
    /// Less memory, fewer cases, fewer turns.
    pub quick: bool,
    /// Part of the titles of the tables to measure; the limits are measured always.
    pub only: Option<String>,
    /// Memory that a tracked guest works in, in bytes, if not what suits.
    pub memory: Option<u64>,
    /// Where to write the results, after every table.
    pub json: Option<PathBuf>,
    /// The directory of the report.
    pub report: Option<PathBuf>,
    /// The other monitor, if not the `qemu-system-x86_64` of the search path.
    pub qemu: Option<PathBuf>,
}

/// How much is measured, as groups see it.
#[derive(Clone, Copy, Debug)]
struct Plan {
    scale: Scale,
    /// If not what suits.
    memory: Option<u64>,
}

impl Plan {
    /// Bytes of memory of guests that are tracked.
    fn memory(&self) -> u64 {
        self.memory.unwrap_or(self.scale.of(8, 64, 256) << 20)
    }

    /// Turns that are expected.
    fn turns(&self) -> u32 {
        self.scale.of(1, 2, 4)
    }

    fn effort(&self) -> Effort {
        match self.scale {
            // So much work, however long it takes.
            Scale::Work => Effort { least: 1, most: 1, time: Duration::MAX, certain: 0.0 },
            Scale::Quick => Effort { least: 2, most: 3, time: Duration::from_secs(4), certain: 0.05 },
            Scale::Full => Effort { least: 3, most: 9, time: Duration::from_secs(20), certain: 0.03 },
        }
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    /// Everything once, and little of it.
    Work,
    Quick,
    Full,
}

impl Scale {
    /// The value for this scale.
    fn of<T>(self, work: T, quick: T, full: T) -> T {
        match self {
            Scale::Work => work,
            Scale::Quick => quick,
            Scale::Full => full,
        }
    }
}

/// Contenders that are measured in turns.
struct Group<'a> {
    bench: Bench,
    title: String,
    /// Why this host cannot measure any of it.
    lacks: Option<String>,
    /// How long it should take.
    expected: Duration,
    effort: Effort,
    contenders: Vec<Contender<'a>>,
}

/// How a run went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All was measured.
    Complete,
    /// Somebody ended it; what was measured is kept.
    Interrupted,
}

/// Measures what `config` says. Says on standard error how it goes, and on standard output what came out.
///
/// # Errors
/// When nothing can be measured here, or nothing be kept. What single contenders cannot do is among the results.
pub fn run(config: &BenchConfig) -> Result<Ended, BenchError> {
    let interrupt =
        Interrupt::by_signals().map_err(|source| BenchError::System { what: "take over signals", source })?;
    drop(open_kvm()?);
    let began = Instant::now();
    let host = facts(&host::probe());
    let scale = match (host.emulated, config.quick) {
        (true, _) => Scale::Work,
        (false, true) => Scale::Quick,
        (false, false) => Scale::Full,
    };
    let plan = &Plan { scale, memory: config.memory };
    if scale == Scale::Work {
        eprintln!("vmm: this host is emulated: everything is measured once, and times mean little");
    }
    let mut results = Results {
        schema: SCHEMA,
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
        began: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        seconds: 0.0,
        quick: config.quick,
        complete: false,
        host,
        tables: Vec::new(),
        skipped: Vec::new(),
    };
    let monitors = Monitors::find(config.qemu.as_deref())?;
    if let Some(why) = monitors.no_qemu() {
        results.skipped.push(Skipped { what: "QEMU".into(), why });
    }
    let all = [Bench::Dirty, Bench::Fault, Bench::Restore, Bench::Migrate, Bench::Boot];
    let what = if config.what.is_empty() { &all[..] } else { &config.what };
    let mut chosen: Vec<_> = what
        .iter()
        .flat_map(|bench| match bench {
            Bench::Limits => Vec::new(),
            Bench::Dirty => dirty::groups(plan),
            Bench::Fault => fault::groups(plan),
            Bench::Restore => restore::groups(plan, &monitors),
            Bench::Migrate => migrate::groups(plan, &monitors),
            Bench::Boot => boot::groups(plan, &monitors),
        })
        .collect();
    if let Some(only) = &config.only {
        let titles = chosen.iter().map(|group| group.title.as_str()).collect::<Vec<_>>().join("\n  ");
        let none = BenchError::NoSuchTable { only: only.clone(), titles };
        chosen.retain(|group| group.title.contains(only.as_str()));
        if chosen.is_empty() {
            return Err(none);
        }
    }
    let mut groups = limits::groups(plan);
    groups.extend(chosen);
    let progress = Progress::new(groups.iter().map(|group| group.expected).sum());
    for group in groups {
        if interrupt.seen() {
            break;
        }
        let Group { bench, title, lacks, expected, effort, contenders } = group;
        if let Some(why) = lacks {
            results.skipped.push(Skipped { what: format!("{bench}: {title}"), why });
            progress.done(expected);
            continue;
        }
        let rows = in_turns(contenders, effort, &progress, &interrupt, |case, error| {
            let name = case.0.first().map_or("", |(_, value)| value.as_str());
            let skipped = Skipped { what: format!("{bench}: {name}"), why: error.to_string() };
            if !results.skipped.contains(&skipped) {
                progress.say(&format!("vmm: {} cannot be measured: {}", skipped.what, skipped.why));
                results.skipped.push(skipped);
            }
        });
        progress.done(expected);
        if !rows.is_empty() {
            results.tables.push(Table { bench, title, rows });
        }
        results.seconds = began.elapsed().as_secs_f64();
        if let Some(path) = &config.json {
            results.write(path)?;
        }
    }
    drop(progress);
    results.complete = !interrupt.seen();
    results.seconds = began.elapsed().as_secs_f64();
    finish(config, &results)?;
    Ok(if results.complete { Ended::Complete } else { Ended::Interrupted })
}

fn finish(config: &BenchConfig, results: &Results) -> Result<(), BenchError> {
    if let Some(path) = &config.json {
        results.write(path)?;
    }
    // A reader that has gone does not want the rest.
    let _ = io::Write::write_all(&mut io::stdout(), report::terminal(results).as_bytes());
    if results.tables.iter().any(|table| table.bench == Bench::Dirty) {
        println!("--track auto is {}; another is better: {}", results.host.auto, auto::summary(results));
    }
    if let Some(directory) = &config.report {
        let files = report::write(results, directory)?;
        eprintln!("vmm: {} files in {}; begin with report.html", files.len(), directory.display());
    }
    Ok(())
}

/// MiB that even a slow host copies in a second: what copies less is emulated, whatever it calls itself.
const EMULATED: f64 = 1000.0;

/// What a reader has to know of this host.
fn facts(host: &Host) -> HostFacts {
    let (noise, throughput) = limits::steadiness();
    let trackers = doctor::rows(host);
    // A ring that has one loses writes here.
    let is_sound = |row: &&doctor::Row| {
        row.works && row.sees_guest_writes && !(row.name == Kind::KvmRing.name() && row.caveat.is_some())
    };
    HostFacts {
        cpu: host.cpu.clone(),
        cpus: host.cpus,
        memory: host.memory.total,
        kernel: host.kernel.clone(),
        kvm: host::kvm_module().name().to_owned(),
        mmu: host::Mmu::of(host::kvm_module()).to_string(),
        in_vm: host.in_vm,
        thp: host.memory.thp.clone(),
        governor: host::text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        noise,
        emulated: host.emulated || throughput < EMULATED,
        auto: trackers.iter().find(|row| row.auto).map_or(String::new(), |row| row.name.to_owned()),
        sound: trackers.iter().filter(is_sound).map(|row| row.name.to_owned()).collect(),
        load: host::text("/proc/loadavg")
            .and_then(|load| load.split(' ').next()?.parse().ok())
            .unwrap_or(0.0),
        pinned: stage::pins(),
    }
}
