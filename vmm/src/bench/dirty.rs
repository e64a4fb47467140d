//! What it costs to know which pages a guest writes: every tracker, over the same guest, with as much of its memory written in
//! an epoch as is asked for.
//!
//! A turn of a contender is a machine of its own, in the phases of the kernel's `dirty_log_perf_test`
//! (tools/testing/selftests/kvm): Populate, Enabling dirty logging, and for each iteration Dirty memory, Get dirty log, Clear
//! dirty log; at last Disabling dirty logging. Passes before the log is enabled say what the guest's own work takes, so that what
//! tracking adds is told from it on the same machine, and the guest's ledger is held against every harvest.
//!
//! The limit is a loop of the two ioctls around the same guest, written here and sharing nothing with the trackers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dirty_track::addr::PAGE_SIZE;
use dirty_track::bitmap::words_for;
use dirty_track::fault::{Age, Policies, Prefault, Split};
use dirty_track::rearm::Rearm;
use dirty_track::sys::kvm::{self, LoggedSlot};
use dirty_track::tracker::{Kind, Tracker};

use super::results::{Bench, Better, Case, Unit};
use super::stage::{Stage, StageConfig};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan, Scale, stats};
use crate::fault::FaultConfig;
use crate::host;
use crate::ledger::Ledger;
use crate::machine::Machine;
use crate::memory::{Faults, HugePages, MemoryConfig};
use crate::options::human_size;
use crate::track::{RING_ENTRIES, TrackConfig};

static POPULATE: Quantity = Quantity::new("populate", Unit::Ms, Better::Lower);
static ENABLE: Quantity = Quantity::new("enable", Unit::Ms, Better::Lower);
static FIRST: Quantity = Quantity::new("first dirty memory", Unit::Ms, Better::Lower);
static DIRTY: Quantity = Quantity::decisive("dirty memory", Unit::Ms, Better::Lower);
static GET: Quantity = Quantity::decisive("get dirty log", Unit::Ms, Better::Lower);
static CLEAR: Quantity = Quantity::new("clear dirty log", Unit::Ms, Better::Lower);
static HARVEST: Quantity = Quantity::decisive("get and clear", Unit::Ms, Better::Lower);
static DISABLE: Quantity = Quantity::new("disable", Unit::Ms, Better::Lower);
static FIRST_WRITE: Quantity = Quantity::decisive("first write", Unit::Ns, Better::Lower);
static SLOWDOWN: Quantity = Quantity::new("slow-down", Unit::Percent, Better::Lower);
static SENT: Quantity = Quantity::new("sent", Unit::Mib, Better::Lower);
static READS: Quantity = Quantity::new("reads reported", Unit::Count, Better::Lower);
static BEFORE: Quantity = Quantity::new("huge before", Unit::Mib, Better::Neither);
static DURING: Quantity = Quantity::new("huge during", Unit::Mib, Better::Higher);
static AFTER: Quantity = Quantity::new("huge after", Unit::Mib, Better::Higher);
static HOST: Quantity = Quantity::new("host CPU", Unit::Ms, Better::Lower);
static P999: Quantity = Quantity::new("stall p99.9", Unit::Us, Better::Lower);
static MAX: Quantity = Quantity::new("stall max", Unit::Us, Better::Lower);

/// How often a pass is made without tracking.
const FREE: usize = 3;

/// Bytes of a guest's memory besides those that it works in.
const REST: u64 = 64 << 20;

/// The epoch that a slow-down is told for.
const SECOND: f64 = 1e3;

/// Who knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Nobody.
    Untracked,
    /// The limit.
    Bare,
    Tracker(Kind, Rearm),
    /// The fault server, with what a first write opens.
    Served(Split),
}

impl Way {
    fn all() -> Vec<Way> {
        let mut ways = vec![Way::Bare, Way::Untracked];
        let trackers = Kind::ALL.into_iter().filter(|kind| !matches!(kind, Kind::None | Kind::UffdServe));
        for kind in trackers {
            ways.push(Way::Tracker(kind, Rearm::All));
            if kind == Kind::KvmManual
                && let Ok(skip) = "dense-skip".parse()
            {
                ways.push(Way::Tracker(kind, skip));
            }
        }
        ways.extend(
            ["leaf", "block", "adaptive"].iter().filter_map(|split| split.parse().ok().map(Way::Served)),
        );
        ways
    }

    fn tracker(self) -> &'static str {
        match self {
            Way::Untracked => "untracked",
            Way::Bare => "bare ioctls",
            Way::Tracker(kind, _) => kind.name(),
            Way::Served(_) => Kind::UffdServe.name(),
        }
    }

    fn rearm(self) -> &'static str {
        match self {
            Way::Tracker(_, Rearm::All) | Way::Untracked | Way::Bare | Way::Served(_) => "all",
            Way::Tracker(..) => "dense-skip",
        }
    }

    fn split(self) -> &'static str {
        match self {
            Way::Served(Split::Leaf) => "leaf",
            Way::Served(Split::Block) => "block",
            Way::Served(_) => "adaptive",
            _ => "-",
        }
    }
}

/// What a guest does in a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Load {
    pattern: &'static str,
    /// Per cent of its memory that it writes.
    share: f64,
    memory: u64,
    cpus: u8,
    huge: HugePages,
    /// Per cent of its accesses that only read.
    reads: u8,
}

impl Load {
    fn pages(&self) -> u64 {
        self.memory / PAGE_SIZE
    }

    /// Epochs of a turn, the first one not counted. Where all is written each says enough, and takes long.
    fn epochs(&self) -> usize {
        if self.share < 100.0 { 4 } else { 1 }
    }

    /// What this host has not got for it.
    fn lacks(&self) -> Option<String> {
        if self.huge != HugePages::Hugetlb2M {
            return None;
        }
        let needed = (self.memory + REST) >> 21;
        let free = host::probe().memory.hugetlb_2m.map_or(0, |pool| pool.free);
        (free < needed).then(|| {
            format!("it takes {needed} free pages in the pool of huge pages, and there are {free} (vm.nr_hugepages)")
        })
    }

    /// The guest's command line.
    fn cmdline(&self) -> String {
        let region = self.memory >> 20;
        let accesses = (self.pages() as f64 * self.share / 100.0).round() as u64;
        let workload = match self.share {
            // Nothing is written, and something is done.
            ..=0.0 => "workload=read pages=64".to_owned(),
            // All of it, by whatever pattern, is all of it in order.
            100.0.. => "workload=fill".to_owned(),
            _ => format!("workload={} pages={} reads={}", self.pattern, accesses.max(1), self.reads),
        };
        format!("{workload} region={region}M populate=on cpus={}", self.cpus)
    }

    fn case(&self, way: Way) -> Case {
        Case::of(&[
            ("tracker", way.tracker()),
            ("rearm", way.rearm()),
            ("split", way.split()),
            ("dirty", &format!("{} %", self.share)),
            ("pattern", self.pattern),
            ("backing", &self.huge.to_string()),
            ("vcpus", &self.cpus.to_string()),
            ("memory", &human_size(self.memory)),
        ])
    }

    fn stage(&self, way: Way, cmdline: String, timed: bool) -> Result<Stage, BenchError> {
        let mut fault = FaultConfig::default();
        if let Way::Served(split) = way {
            fault.policies = Policies { split, prefault: Prefault::Block, age: Age::Young };
        }
        let served = matches!(way, Way::Served(_));
        Stage::start(StageConfig {
            cmdline,
            memory: MemoryConfig {
                size: self.memory + REST,
                huge: self.huge,
                fault: if served { Faults::Uffd } else { Faults::Kernel },
                ..MemoryConfig::default()
            },
            cpus: self.cpus,
            fault,
            dirty_ring: matches!(way, Way::Tracker(Kind::KvmRing, _)).then_some(RING_ENTRIES),
            timed,
        })
    }
}

/// What there is to measure.
pub(super) fn groups(plan: &Plan) -> Vec<Group<'static>> {
    let mut loads = Vec::new();
    let base =
        Load { pattern: "rand", share: 1.0, memory: plan.memory(), cpus: 1, huge: HugePages::Thp, reads: 0 };
    let shares =
        plan.scale.of(&[1.0, 100.0][..], &[0.0, 0.1, 1.0, 10.0, 100.0], &[0.0, 0.1, 1.0, 10.0, 100.0]);
    for &share in shares {
        loads.push(Load { share, ..base });
    }
    if plan.scale == Scale::Full {
        for share in [0.1, 1.0, 10.0, 100.0] {
            loads.push(Load { share, huge: HugePages::None, ..base });
        }
        for pattern in ["seq", "zipf", "hot"] {
            loads.push(Load { pattern, ..base });
            loads.push(Load { pattern, share: 10.0, ..base });
        }
        for share in [1.0, 10.0] {
            loads.push(Load { share, cpus: 2, ..base });
            loads.push(Load { share, huge: HugePages::Hugetlb2M, ..base });
        }
        loads.push(Load { memory: base.memory * 4, ..base });
    }
    let mut groups: Vec<_> = loads.into_iter().map(|load| group(plan, load)).collect();
    groups.push(group(plan, Load { reads: 50, ..base }));
    groups.push(stalls(plan, base));
    groups
}

fn group(plan: &Plan, load: Load) -> Group<'static> {
    let Load { pattern, share, memory, cpus, huge, reads } = load;
    let reads = if reads > 0 { format!(", {reads} % of its accesses reads") } else { String::new() };
    let title = format!(
        "{share} % of {} dirty in an epoch, {pattern}, {huge}, {cpus} vCPU{}{reads}",
        human_size(memory),
        if cpus == 1 { "" } else { "s" },
    );
    let ways = Way::all();
    let untracked = ways.iter().position(|way| *way == Way::Untracked);
    let bare = ways.iter().position(|way| *way == Way::Bare);
    let contenders = ways.into_iter().map(|way| Contender {
        case: load.case(way),
        limit: match way {
            Way::Bare => untracked.map(|index| (index, "untracked")),
            Way::Untracked => None,
            _ => bare.map(|index| (index, "bare ioctls")),
        },
        measure: Box::new(move |readings| measure(load, way, readings)),
    });
    let contenders: Vec<_> = contenders.collect();
    // A machine, its passes, and a few trackers that serve each write by a thread.
    let written = (load.pages() as f64 * share / 100.0) as u64 * (load.epochs() as u64 + 1);
    let turn = Duration::from_millis(40) + Duration::from_nanos(load.pages() * 150 + written * 15_000);
    let mut effort = plan.effort();
    if load.epochs() == 1 {
        effort.least = effort.least.min(2);
    }
    Group {
        bench: Bench::Dirty,
        title,
        lacks: load.lacks(),
        expected: turn * contenders.len() as u32 * plan.turns(),
        effort,
        contenders,
    }
}

/// What one epoch showed.
struct Epoch {
    get: Duration,
    clear: Duration,
    /// Pages that it reported.
    reported: u64,
    /// Pages that the guest wrote.
    wrote: u64,
    /// Pages that were reported and only read, where somebody looked.
    reads: Option<u64>,
}

fn measure(load: Load, way: Way, readings: &mut Readings) -> Result<(), BenchError> {
    let mut stage = load.stage(way, load.cmdline(), false)?;
    readings.add(&POPULATE, ms(stage.populate));
    // Twice: what touched it read it.
    stage.pass()?;
    let free = (0..FREE).map(|_| stage.pass()).collect::<Result<Vec<_>, _>>()?;
    let free = stats::median(&free.iter().map(|pass| ms(pass.wall)).collect::<Vec<_>>());
    readings.add(&BEFORE, huge(&stage));
    let mut log: Box<dyn Log> = match way {
        Way::Untracked => {
            readings.add(&DIRTY, free);
            return Ok(());
        }
        Way::Bare => Box::new(Bare::of(&stage)?),
        Way::Tracker(kind, rearm) => {
            let config = TrackConfig { rearm, ..TrackConfig::default() };
            Box::new(Tracked { tracker: stage.tracker(kind, &config)? })
        }
        Way::Served(_) => {
            Box::new(Tracked { tracker: stage.tracker(Kind::UffdServe, &TrackConfig::default())? })
        }
    };
    let mut ledger = stage.ledger()?;
    let mut number = 1;
    ledger.begin(number)?;
    let began = Instant::now();
    log.arm()?;
    readings.add(&ENABLE, ms(began.elapsed()));
    for epoch in 0..=load.epochs() {
        let pass = stage.pass()?;
        let seen = log.harvest(&ledger, number)?;
        number += 1;
        ledger.begin(number)?;
        if epoch == 0 {
            // Huge pages are split in it, and some trackers protect nothing before.
            readings.add(&FIRST, ms(pass.wall));
            continue;
        }
        readings.add(&DIRTY, ms(pass.wall));
        readings.add(&GET, ms(seen.get));
        if !seen.clear.is_zero() {
            readings.add(&CLEAR, ms(seen.clear));
        }
        readings.add(&HARVEST, ms(seen.get + seen.clear));
        let extra = ms(pass.wall) - free;
        if seen.wrote > 0 {
            // On a machine that is not quiet less than nothing may come out.
            readings.add(&FIRST_WRITE, (extra * 1e6 / seen.wrote as f64).max(0.0));
            readings.add(&SLOWDOWN, (extra / SECOND * 100.0).max(0.0));
        }
        readings.add(&SENT, (seen.reported * PAGE_SIZE) as f64 / f64::from(1 << 20));
        if let Some(reads) = seen.reads.filter(|_| load.reads > 0) {
            readings.add(&READS, reads as f64);
        }
        readings.add(&HOST, ms(pass.host + seen.get + seen.clear));
    }
    readings.add(&DURING, huge(&stage));
    let began = Instant::now();
    log.disarm()?;
    readings.add(&DISABLE, ms(began.elapsed()));
    stage.pass()?;
    readings.add(&AFTER, huge(&stage));
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// MiB that KVM maps by huge pages; NaN where it does not say.
fn huge(machine: &Machine) -> f64 {
    let mapped = || {
        let mut stats = machine.vm_stats().ok()?;
        stats.refresh().ok()?;
        let [small, large] = ["pages_2m", "pages_1g"].map(|name| stats.find(name).map(|id| stats.get(id)));
        Some((small? * 2 + large.unwrap_or(0) * 1024) as f64)
    };
    mapped().unwrap_or(f64::NAN)
}

/// What knows.
trait Log {
    fn arm(&mut self) -> Result<(), BenchError>;
    fn harvest(&mut self, ledger: &Ledger, epoch: u32) -> Result<Epoch, BenchError>;
    fn disarm(&mut self) -> Result<(), BenchError>;
}

/// A tracker of the library.
struct Tracked {
    tracker: Box<dyn Tracker>,
}

impl Log for Tracked {
    fn arm(&mut self) -> Result<(), BenchError> {
        Ok(self.tracker.arm()?)
    }

    fn harvest(&mut self, ledger: &Ledger, epoch: u32) -> Result<Epoch, BenchError> {
        let unit = self.tracker.guarantees().granularity;
        let began = Instant::now();
        let harvest = self.tracker.harvest()?;
        let took = began.elapsed();
        let (protecting, reported) = (harvest.protecting(), harvest.count());
        let found = ledger.check(&harvest, epoch, unit)?;
        let began = Instant::now();
        harvest.commit();
        let took = took + began.elapsed();
        if found.missed > 0 {
            return Err(BenchError::Missed { pages: found.missed, tracker: self.tracker.name() });
        }
        Ok(Epoch {
            get: took.saturating_sub(protecting),
            clear: protecting,
            reported,
            wrote: found.wrote,
            reads: Some(found.extra_read),
        })
    }

    fn disarm(&mut self) -> Result<(), BenchError> {
        Ok(self.tracker.disarm()?)
    }
}

/// The ioctls, and nothing else.
struct Bare {
    vm: Arc<kvm_ioctls::VmFd>,
    slots: Vec<(LoggedSlot, Vec<u64>, usize)>,
}

/// Pages that one KVM_CLEAR_DIRTY_LOG covers: it holds KVM's lock meanwhile.
const CHUNK: usize = 1 << 15;

impl Bare {
    fn of(machine: &Machine) -> Result<Bare, BenchError> {
        if kvm::manual_protect_modes(machine.vm()) & 1 == 0 {
            return Err(BenchError::Guest("this host's KVM has no KVM_CLEAR_DIRTY_LOG (Linux 5.2)".into()));
        }
        let slots = machine.slots().into_iter().map(|slot| {
            let pages = slot.frames().pages as usize;
            (LoggedSlot::new(Arc::clone(machine.vm()), slot), vec![0; words_for(pages)], pages)
        });
        Ok(Bare { vm: Arc::clone(machine.vm()), slots: slots.collect() })
    }

    /// Clears and protects what has a bit in `words`.
    fn clear(slot: &LoggedSlot, words: &[u64], pages: usize) -> Result<(), BenchError> {
        for (chunk, bits) in words.chunks(CHUNK / 64).enumerate() {
            if bits.iter().any(|word| *word != 0) {
                let first = chunk * CHUNK;
                slot.clear_dirty_log(first as u64, CHUNK.min(pages - first) as u32, bits)
                    .map_err(ioctl("KVM_CLEAR_DIRTY_LOG"))?;
            }
        }
        Ok(())
    }
}

fn ioctl(what: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> BenchError {
    move |source| BenchError::System { what, source: source.into() }
}

impl Log for Bare {
    fn arm(&mut self) -> Result<(), BenchError> {
        let mode = kvm::manual_protect_modes(&self.vm);
        kvm::set_manual_protect(&self.vm, mode).map_err(ioctl("enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        for (slot, words, pages) in &mut self.slots {
            slot.set_logging(true).map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
            if mode & 2 != 0 {
                // Every bit is set, and nothing protected.
                slot.get_dirty_log(words).map_err(ioctl("KVM_GET_DIRTY_LOG"))?;
                Bare::clear(slot, words, *pages)?;
            }
        }
        Ok(())
    }

    fn harvest(&mut self, ledger: &Ledger, epoch: u32) -> Result<Epoch, BenchError> {
        let (mut get, mut clear, mut reported) = (Duration::ZERO, Duration::ZERO, 0);
        for (slot, words, pages) in &mut self.slots {
            let began = Instant::now();
            slot.get_dirty_log(words).map_err(ioctl("KVM_GET_DIRTY_LOG"))?;
            let got = Instant::now();
            Bare::clear(slot, words, *pages)?;
            get += got - began;
            clear += got.elapsed();
            reported += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        let wrote = ledger.entered(epoch)?.wrote.iter().map(|word| u64::from(word.count_ones())).sum();
        Ok(Epoch { get, clear, reported, wrote, reads: None })
    }

    fn disarm(&mut self) -> Result<(), BenchError> {
        self.slots
            .iter_mut()
            .try_for_each(|(slot, ..)| slot.set_logging(false))
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// What a harvest holds up: a guest that times each of its writes while another thread harvests.
fn stalls(plan: &Plan, load: Load) -> Group<'static> {
    let time = Duration::from_millis(plan.scale.of(500, 250, 1000));
    let ways: Vec<_> = Way::all().into_iter().filter(|way| *way != Way::Bare).collect();
    let untracked = ways.iter().position(|way| *way == Way::Untracked);
    let contenders = ways.into_iter().map(|way| Contender {
        case: Case::of(&[("tracker", way.tracker()), ("rearm", way.rearm()), ("split", way.split())]),
        limit: untracked.filter(|_| way != Way::Untracked).map(|index| (index, "untracked")),
        measure: Box::new(move |readings| stall(load, way, time, readings)),
    });
    let contenders: Vec<_> = contenders.collect();
    let title = "what a harvest holds up: single writes of a guest that is harvested every 20 ms".to_owned();
    let expected = (time + Duration::from_millis(60)) * contenders.len() as u32 * plan.turns();
    Group { bench: Bench::Dirty, title, lacks: None, expected, effort: plan.effort(), contenders }
}

fn stall(load: Load, way: Way, time: Duration, readings: &mut Readings) -> Result<(), BenchError> {
    const INTERVAL: Duration = Duration::from_millis(20);
    let region = load.memory >> 20;
    let cmdline = format!("workload=rand region={region}M rate=100M passes=0 populate=on");
    let mut stage = load.stage(way, cmdline, true)?;
    let mut log = match way {
        Way::Untracked | Way::Bare => None,
        Way::Tracker(kind, rearm) => {
            Some(stage.tracker(kind, &TrackConfig { rearm, ..TrackConfig::default() })?)
        }
        Way::Served(_) => Some(stage.tracker(Kind::UffdServe, &TrackConfig::default())?),
    };
    if let Some(tracker) = &mut log {
        tracker.arm()?;
    }
    let end = stage.go() + time;
    while Instant::now() < end {
        std::thread::sleep(INTERVAL);
        if let Some(tracker) = &mut log {
            tracker.harvest()?.commit();
        }
    }
    let result = stage.results(true)?;
    for (quantity, key) in [(&P999, "p999_ns"), (&MAX, "max_ns")] {
        readings.add(quantity, result[key].as_f64().unwrap_or(f64::NAN) / 1e3);
    }
    if let Some(mut tracker) = log {
        tracker.disarm()?;
    }
    Ok(())
}
