//! What it costs a guest that the monitor serves its faults: first touches of memory that is not there, under each policy, next
//! to the host's kernel, which does the same for a guest of any monitor; and first writes to memory that is protected, next to
//! the least that a handler can do.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{Gfn, PAGE_SIZE};
use dirty_track::fault::{Age, FileRegion, PageSource, Policies, Prefault, WorkingSet};
use dirty_track::sys::uffd::lookout::Lookout;
use dirty_track::sys::uffd::{Mode, Uffd, Wait};
use dirty_track::tracker::Kind;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::results::{Bench, Better, Case, Unit};
use super::stage::{Stage, StageConfig};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan};
use crate::fault::FaultConfig;
use crate::memory::{Faults, HugePages, MemoryConfig};
use crate::sys::mmap::memfd;
use crate::track::TrackConfig;

static PASS: Quantity = Quantity::decisive("pass", Unit::Ms, Better::Lower);
static TOUCH: Quantity = Quantity::new("touch", Unit::Us, Better::Lower);
static THROUGHPUT: Quantity = Quantity::new("throughput", Unit::MibPerS, Better::Higher);
static HITS: Quantity = Quantity::new("hit rate", Unit::Percent, Better::Higher);
static P50: Quantity = Quantity::decisive("p50", Unit::Us, Better::Lower);
static P99: Quantity = Quantity::new("p99", Unit::Us, Better::Lower);
static MAX: Quantity = Quantity::new("max", Unit::Us, Better::Lower);

/// Where the pages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Zeros,
    /// A file in memory, page by page.
    Copied,
    /// The same, and blocks that come whole are huge pages.
    Moved,
    /// The memory's own memfd, which has them.
    Mapped,
}

impl From {
    fn name(self) -> &'static str {
        match self {
            From::Zeros => "zeros",
            From::Copied => "file, copied",
            From::Moved => "file, moved",
            From::Mapped => "memfd, mapped",
        }
    }

    /// What there is to fetch from, for a guest of so many bytes.
    fn source(self, bytes: u64) -> io::Result<Option<Arc<dyn PageSource>>> {
        if !matches!(self, From::Copied | From::Moved) {
            return Ok(None);
        }
        let file = memfd(c"bench", bytes, None)?;
        let zeros = vec![0; 1 << 20];
        (0..bytes >> 20).try_for_each(|mib| file.write_all_at(&zeros, mib << 20))?;
        Ok(Some(Arc::new(FileRegion::new(file, 0, Gfn(0)))))
    }
}

/// How a guest's memory is mapped.
#[derive(Clone, Debug)]
struct Way {
    policy: &'static str,
    age: &'static str,
    faults: Faults,
    from: From,
    policies: Policies,
}

impl Way {
    fn kernel() -> Way {
        let (faults, from) = (Faults::Kernel, From::Zeros);
        Way { policy: "host's kernel", age: "-", faults, from, policies: Policies::default() }
    }

    fn served(policy: &'static str, prefault: Prefault, age: Age) -> Way {
        let policies = Policies { prefault, age, ..Policies::default() };
        let age = if age == Age::Old { "old" } else { "young" };
        Way { policy, age, faults: Faults::Uffd, from: From::Zeros, policies }
    }

    fn case(&self, touch: Touch) -> Case {
        Case::of(&[
            ("policy", self.policy),
            ("age", self.age),
            ("access", touch.access),
            ("source", self.from.name()),
        ])
    }

    fn all() -> Vec<Way> {
        let mut ways = vec![Way::kernel(), Way::served("none", Prefault::None, Age::Old)];
        for age in [Age::Old, Age::Young] {
            ways.extend("around=64K".parse().map(|around| Way::served("around=64K", around, age)));
            ways.push(Way::served("block", Prefault::Block, age));
        }
        ways
    }
}

/// How a guest touches its memory.
#[derive(Clone, Copy, Debug)]
struct Touch {
    title: &'static str,
    access: &'static str,
    workload: &'static str,
    /// Part of its pages that it touches.
    part: f64,
}

pub(super) fn groups(plan: &Plan) -> Vec<Group<'static>> {
    let touches = [
        Touch { title: "reads of all of it, in order", access: "reads", workload: "read", part: 1.0 },
        Touch { title: "writes to all of it, in order", access: "writes", workload: "fill", part: 1.0 },
        Touch { title: "writes here and there", access: "writes", workload: "rand", part: 0.01 },
        Touch { title: "writes by Zipf's law", access: "writes", workload: "zipf", part: 0.2 },
    ];
    let mut groups: Vec<_> = touches.into_iter().map(|touch| cold(plan, touch)).collect();
    groups.push(sources(plan, touches[1]));
    groups.push(first_writes(plan));
    groups
}

fn mib(plan: &Plan) -> u64 {
    plan.memory() >> 20
}

/// Memory of which a guest's workload takes so many MiB.
fn memory(mib: u64, faults: Faults) -> MemoryConfig {
    MemoryConfig { size: (mib + 64) << 20, huge: HugePages::None, fault: faults, ..MemoryConfig::default() }
}

fn stage(
    memory: MemoryConfig,
    cmdline: String,
    fault: FaultConfig,
    timed: bool,
) -> Result<Stage, BenchError> {
    Stage::start(StageConfig { cmdline, memory, cpus: 1, fault, dirty_ring: None, timed })
}

fn cold(plan: &Plan, touch: Touch) -> Group<'static> {
    let mib = mib(plan);
    let mut contenders: Vec<Contender<'static>> = Vec::new();
    for way in Way::all() {
        let case = way.case(touch);
        let limit = (way.faults == Faults::Uffd).then_some((0, "the host's kernel"));
        contenders.push(Contender {
            case,
            limit,
            measure: Box::new(move |readings| {
                first_pass(mib, touch, &way, WorkingSet::default(), readings).map(drop)
            }),
        });
    }
    // Over what the turn's first run touched, which is recorded once.
    let mut recorded: Option<WorkingSet> = None;
    let none = Way::served("none", Prefault::None, Age::Old);
    let again = Way::served("recorded", Prefault::Recorded, Age::Old);
    contenders.push(Contender {
        case: again.case(touch),
        limit: Some((0, "the host's kernel")),
        measure: Box::new(move |readings| {
            let set = match &recorded {
                Some(set) => set.clone(),
                None => {
                    let set = first_pass(mib, touch, &none, WorkingSet::default(), &mut Readings::default())?;
                    recorded.insert(set).clone()
                }
            };
            first_pass(mib, touch, &again, set, readings).map(drop)
        }),
    });
    let pages = ((mib << 8) as f64 * touch.part) as u64;
    let turn = Duration::from_millis(30) + Duration::from_nanos(pages * 4000);
    let expected = turn * contenders.len() as u32 * plan.turns();
    let title = format!("first {} of {mib} MiB, memory that is not there", touch.title);
    Group { bench: Bench::Fault, title, lacks: None, expected, effort: plan.effort(), contenders }
}

/// By what a block is filled with. A file's other blocks are brought in meanwhile, as they are for a guest that is restored.
fn sources(plan: &Plan, touch: Touch) -> Group<'static> {
    let mib = mib(plan);
    let all = [From::Zeros, From::Copied, From::Moved, From::Mapped];
    let served = all.map(|from| Way { from, ..Way::served("block", Prefault::Block, Age::Young) });
    let contenders = [Way::kernel()].into_iter().chain(served).map(|way| Contender::<'static> {
        case: way.case(touch),
        limit: (way.faults == Faults::Uffd).then_some((0, "the host's kernel")),
        measure: Box::new(move |readings: &mut Readings| {
            first_pass(mib, touch, &way, WorkingSet::default(), readings).map(drop)
        }),
    });
    let contenders: Vec<_> = contenders.collect();
    let turn = Duration::from_millis(40) + Duration::from_nanos((mib << 8) * 3000);
    let expected = turn * contenders.len() as u32 * plan.turns();
    let title = format!("first {} of {mib} MiB, by where its pages come from", touch.title);
    Group { bench: Bench::Fault, title, lacks: None, expected, effort: plan.effort(), contenders }
}

/// Makes one pass over memory of which nothing is there, and returns what was touched.
fn first_pass(
    mib: u64,
    touch: Touch,
    way: &Way,
    working_set: WorkingSet,
    readings: &mut Readings,
) -> Result<WorkingSet, BenchError> {
    let accesses = ((mib << 8) as f64 * touch.part).max(1.0) as u64;
    let cmdline = format!("workload={} region={mib}M pages={accesses}", touch.workload);
    let mut memory = memory(mib, way.faults);
    memory.shared = way.from == From::Mapped;
    if way.from == From::Moved {
        memory.huge = HugePages::Thp;
    }
    let source = way.from.source(memory.size);
    let source = source.map_err(|source| BenchError::System { what: "make a file to read from", source })?;
    let fault = FaultConfig { policies: way.policies, working_set, source };
    let began = Instant::now();
    let mut stage = stage(memory, cmdline, fault, false)?;
    let pass = stage.pass()?;
    // What a recorded set brings in is under way from before the guest's first instruction.
    let time = if way.policies.prefault == Prefault::Recorded { began.elapsed() } else { pass.wall };
    let seconds = time.as_secs_f64();
    readings.add(&PASS, seconds * 1e3);
    readings.add(&TOUCH, seconds * 1e6 / accesses as f64);
    readings.add(&THROUGHPUT, (accesses * PAGE_SIZE) as f64 / f64::from(1 << 20) / seconds);
    let Some(server) = stage.fault() else { return Ok(WorkingSet::default()) };
    let touched = WorkingSet::touched(server.stage2());
    // Nobody sees an old page being read.
    if way.policies.age == Age::Old && touch.access == "writes" {
        readings.add(&HITS, touched.pages() as f64 / server.counts().installed as f64 * 100.0);
    }
    Ok(touched)
}

fn first_writes(plan: &Plan) -> Group<'static> {
    let mib = mib(plan);
    let case = |policy: &str| Case::of(&[("policy", policy), ("access", "writes")]);
    let contenders = vec![
        Contender {
            case: case("bare loop"),
            limit: None,
            measure: Box::new(move |readings| bare_first_writes(mib, false, readings)),
        },
        Contender {
            case: case("bare loop that sleeps"),
            limit: Some((0, "a bare loop")),
            measure: Box::new(move |readings| bare_first_writes(mib, true, readings)),
        },
        Contender {
            case: case("served"),
            limit: Some((0, "a bare loop")),
            measure: Box::new(move |readings| served_first_writes(mib, readings)),
        },
    ];
    let turn = Duration::from_millis(60) + Duration::from_nanos((mib << 8) * 12_000);
    let expected = turn * 3 * plan.turns();
    let title = format!("first writes to {mib} MiB that are protected, one page each");
    Group { bench: Bench::Fault, title, lacks: None, expected, effort: plan.effort(), contenders }
}

fn writes(mib: u64) -> String {
    format!("workload=fill region={mib}M passes=1 populate=on")
}

fn latencies(stage: &Stage, readings: &mut Readings) -> Result<(), BenchError> {
    let results = stage.results(false)?;
    for (quantity, key) in [(&P50, "p50_ns"), (&P99, "p99_ns"), (&MAX, "max_ns")] {
        readings.add(quantity, results[key].as_f64().unwrap_or(f64::NAN) / 1e3);
    }
    Ok(())
}

fn served_first_writes(mib: u64, readings: &mut Readings) -> Result<(), BenchError> {
    let policies = Policies { prefault: Prefault::Block, age: Age::Young, ..Policies::default() };
    let fault = FaultConfig { policies, ..FaultConfig::default() };
    let mut stage = stage(memory(mib, Faults::Uffd), writes(mib), fault, true)?;
    let mut tracker = stage.tracker(Kind::UffdServe, &TrackConfig::default())?;
    tracker.arm()?;
    stage.go();
    latencies(&stage, readings)?;
    Ok(tracker.disarm()?)
}

/// The least that a handler can do: one message, one page. It looks for the next one all the time, or sleeps each time.
fn bare_first_writes(mib: u64, sleeps: bool, readings: &mut Readings) -> Result<(), BenchError> {
    let failed = |what| move |source| BenchError::System { what, source };
    let mut stage = stage(memory(mib, Faults::Kernel), writes(mib), FaultConfig::default(), true)?;
    let uffd = Uffd::open(Mode::Sync).map_err(dirty_track::tracker::TrackerError::from)?;
    let uffd = Arc::new(uffd);
    let stop = EventFd::new(EFD_NONBLOCK).map_err(failed("create an eventfd"))?;
    let stopped = stop.try_clone().map_err(failed("copy an eventfd"))?;
    let (of_handler, ended) = (Arc::clone(&uffd), Arc::new(AtomicBool::new(false)));
    let end = Arc::clone(&ended);
    let handler = thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            if sleeps && !matches!(of_handler.wait(&stopped, &mut Lookout::default()), Ok(Wait::Faults)) {
                return;
            }
            if let Ok(Some(address)) = of_handler.fault() {
                // A page whose mapping is changing is asked for again.
                let _ = of_handler.unprotect(address & !(PAGE_SIZE - 1), PAGE_SIZE);
            }
        }
    });
    let outcome = stage
        .slots()
        .iter()
        .try_for_each(|slot| {
            uffd.register(slot.hva(), slot.len())?;
            uffd.protect(slot.hva(), slot.len())
        })
        .map_err(|error| failed("protect memory by userfaultfd")(error.into()))
        .and_then(|()| {
            stage.go();
            latencies(&stage, readings)
        });
    // Nobody waits for the handler any more.
    end.store(true, Ordering::Relaxed);
    let _ = stop.write(1);
    let _ = handler.join();
    outcome
}
