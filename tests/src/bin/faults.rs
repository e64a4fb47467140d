//! What it costs a guest that the monitor serves its faults, on the host at hand: the built-in guest touches memory
//! that is not there, or writes to memory that is protected, under one policy after the other, in turns. Every figure
//! is the guest's own, and is compared with that of the first policy of its table.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use dirty_track::addr::PAGE_SIZE;
use dirty_track::fault::{Age, Policies, Prefault, WorkingSet};
use dirty_track::sys::uffd::{Mode, Uffd, Wait};
use dirty_track::tracker::{Kind, Slot, Tracker};
use guest::abi::Doorbell;
use tests::conformance::config;
use tests::skip;
use vmm::fault::FaultConfig;
use vmm::machine::{Machine, open_kvm};
use vmm::memory::{Faults, HugePages, MemoryConfig};
use vmm::track::TrackConfig;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Error = Box<dyn std::error::Error>;

/// Measure what serving the guest's faults costs it, under each policy
#[derive(Parser)]
struct Cli {
    /// What to measure; all of it if nothing is named
    #[arg(value_enum)]
    what: Vec<What>,
    /// Memory that the guest works in, in MiB
    #[arg(long, default_value_t = 256)]
    region: u64,
    /// Runs of each policy; medians of them are shown
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// First touches of all of memory, in order
    Cold,
    /// First touches here and there
    Sparse,
    /// A run over what an earlier one touched
    Recorded,
    /// Epochs, by what a first write opens
    Splits,
    /// Single first writes
    Writes,
}

/// How long the guest may make no progress.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = open_kvm() {
        skip::skip("faults", &error.to_string());
        return ExitCode::SUCCESS;
    }
    let chosen = if cli.what.is_empty() { What::value_variants() } else { &cli.what };
    for what in chosen {
        let outcome = match what {
            What::Cold => cold(&cli),
            What::Sparse => sparse(&cli),
            What::Recorded => recorded(&cli, cli.region * 256 / 5),
            What::Splits => splits(&cli),
            What::Writes => first_writes(&cli),
        };
        if let Err(error) = outcome {
            eprintln!("faults: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// How a guest's memory is mapped.
#[derive(Clone, Debug)]
struct Way {
    name: String,
    faults: Faults,
    config: FaultConfig,
}

impl Way {
    fn kernel() -> Way {
        Way { name: "the host's kernel".into(), faults: Faults::Kernel, config: FaultConfig::default() }
    }

    fn served(name: &str, policies: Policies) -> Way {
        let config = FaultConfig { policies, ..FaultConfig::default() };
        Way { name: name.into(), faults: Faults::Uffd, config }
    }

    fn prefault(text: &str, age: Age) -> Result<Way, Error> {
        let policies = Policies { prefault: text.parse()?, age, ..Policies::default() };
        Ok(Way::served(&format!("prefault {text}, {age}"), policies))
    }
}

/// When what happened in a run.
type Bells = mpsc::Receiver<(Doorbell, Instant)>;

/// A guest that is to be started, and that waits at no doorbell unless `at` makes it.
fn build(
    cli: &Cli,
    cmdline: &str,
    way: &Way,
    at: impl Fn(Doorbell) + Send + Sync + 'static,
) -> Result<(Machine, Bells, Console), Error> {
    let memory = MemoryConfig {
        size: (cli.region + 64) << 20,
        huge: HugePages::None,
        fault: way.faults,
        ..MemoryConfig::default()
    };
    let (bells, heard) = mpsc::channel();
    let bells = Mutex::new(bells);
    let console = Console::default();
    let mut config = config(&format!("{cmdline} region={}M", cli.region), 1, memory);
    config.fault = way.config.clone();
    config.console = Box::new(console.clone());
    config.doorman = Some(Arc::new(move |_: u8, bell: Doorbell, _: u32| {
        let now = Instant::now();
        at(bell);
        // A guest that begins does so when this returns.
        let now = if bell == Doorbell::Begin { Instant::now() } else { now };
        // Nobody listens any more when this fails.
        let _ = lock(&bells).send((bell, now));
    }));
    Ok((Machine::new(config)?, heard, console))
}

fn wait_for(bells: &Bells, wanted: Doorbell) -> Result<Instant, Error> {
    loop {
        let (bell, at) = bells.recv_timeout(PATIENCE)?;
        if bell == wanted {
            return Ok(at);
        }
    }
}

/// A guest's first pass.
struct FirstPass {
    /// How long it takes, in milliseconds.
    ms: f64,
    /// The same from before there was a machine.
    from_nothing_ms: f64,
    /// What it touched, where that is known.
    touched: Option<WorkingSet>,
}

fn first_pass(cli: &Cli, workload: &str, way: &Way) -> Result<FirstPass, Error> {
    let nothing = Instant::now();
    let (machine, bells, _) = build(cli, &format!("{workload} passes=1 barrier=on"), way, |_| {})?;
    machine.start()?;
    let began = wait_for(&bells, Doorbell::Begin)?;
    let ended = wait_for(&bells, Doorbell::Pass)?;
    machine.stop();
    let touched = machine.fault().map(|server| WorkingSet::touched(server.stage2()));
    let ms = |since: Instant| (ended - since).as_secs_f64() * 1e3;
    Ok(FirstPass { ms: ms(began), from_nothing_ms: ms(nothing), touched })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures all ways in turns, and prints the median of each, next to that of the first.
fn in_turns(
    cli: &Cli,
    title: &str,
    unit: &str,
    ways: &[Way],
    measure: impl Fn(&Way) -> Result<f64, Error>,
) -> Result<(), Error> {
    println!("{title}:");
    let mut measured = vec![Vec::new(); ways.len()];
    for _ in 0..cli.runs {
        for (way, values) in ways.iter().zip(&mut measured) {
            values.push(measure(way)?);
        }
    }
    let medians: Vec<_> = measured.into_iter().map(median).collect();
    for (way, value) in ways.iter().zip(&medians) {
        println!("  {:<36} {value:>10.2} {unit}   {:>6.2}x", way.name, value / medians[0]);
    }
    Ok(())
}

fn cold(cli: &Cli) -> Result<(), Error> {
    for (what, workload) in [("reads", "workload=read"), ("writes", "workload=fill")] {
        let mut ways = vec![Way::prefault("none", Age::Old)?];
        for age in [Age::Old, Age::Young] {
            ways.push(Way::prefault("around=64K", age)?);
            ways.push(Way::prefault("block", age)?);
        }
        ways.push(Way::kernel());
        let title =
            format!("a guest of {} MiB that {what} all of it, in order, for the first time", cli.region);
        in_turns(cli, &title, "ms", &ways, |way| Ok(first_pass(cli, workload, way)?.ms))?;
    }
    Ok(())
}

fn sparse(cli: &Cli) -> Result<(), Error> {
    let touches = cli.region * 256 / 100;
    let ways = [Way::prefault("none", Age::Old)?, Way::prefault("around=64K", Age::Old)?, Way::kernel()];
    let workload = format!("workload=rand reads=100 pages={touches}");
    let title = format!("{touches} reads at random (1 %) of memory that is not there");
    in_turns(cli, &title, "us each", &ways, |way| {
        Ok(first_pass(cli, &workload, way)?.ms * 1e3 / touches as f64)
    })
}

/// A run that records, and one over what it recorded.
fn recorded(cli: &Cli, touches: u64) -> Result<(), Error> {
    let workload = format!("workload=zipf reads=100 pages={touches}");
    let none = Way::prefault("none", Age::Old)?;
    let set = first_pass(cli, &workload, &none)?.touched;
    let working_set = set.ok_or("nothing was recorded")?;
    // From before there is a machine, for the working set is brought in from then on.
    let title = format!(
        "{touches} reads, zipf, of a new machine: again over the {} pages that it touched",
        working_set.pages()
    );
    let policies = Policies { prefault: Prefault::Recorded, ..Policies::default() };
    let mut recorded = Way::served("prefault recorded", policies);
    recorded.config.working_set = working_set;
    in_turns(cli, &title, "ms", &[none, recorded, Way::kernel()], |way| {
        Ok(first_pass(cli, &workload, way)?.from_nothing_ms)
    })
}

/// Passes of a guest that is tracked, each of them an epoch.
fn splits(cli: &Cli) -> Result<(), Error> {
    const PASSES: usize = 6;
    let few = cli.region * 256 / 100;
    for (what, workload) in [
        ("writes everything", "workload=fill".to_owned()),
        ("writes 1 % at random", format!("workload=rand pages={few}")),
    ] {
        let mut ways = Vec::new();
        for split in ["block", "leaf", "adaptive"] {
            let policies =
                Policies { split: split.parse()?, prefault: Prefault::Block, ..Policies::default() };
            ways.push(Way::served(&format!("split {split}"), policies));
        }
        in_turns(cli, &format!("an epoch of a guest that {what}"), "ms", &ways, |way| {
            /// And whether it is armed.
            type Armed = (Box<dyn Tracker>, bool);
            let tracker: Arc<Mutex<Option<Armed>>> = Arc::default();
            let for_bell = Arc::clone(&tracker);
            let at = move |bell| {
                if bell == Doorbell::Pass
                    && let Some((tracker, armed)) = &mut *lock(&for_bell)
                {
                    // What fails here shows as an epoch without faults; the next call says so.
                    let _ = match std::mem::replace(armed, true) {
                        false => tracker.arm(),
                        true => tracker.harvest().map(|harvest| harvest.commit()),
                    };
                }
            };
            let cmdline = format!("{workload} passes=0 barrier=on populate=on");
            let (machine, bells, _) = build(cli, &cmdline, way, at)?;
            let mechanism = machine.tracker(Kind::UffdServe, &TrackConfig::default())?;
            *lock(&tracker) = Some((mechanism, false));
            machine.start()?;
            wait_for(&bells, Doorbell::Pass)?;
            let mut times = Vec::new();
            let mut before = wait_for(&bells, Doorbell::Pass)?;
            for _ in 0..PASSES {
                let now = wait_for(&bells, Doorbell::Pass)?;
                times.push((now - before).as_secs_f64() * 1e3);
                before = now;
            }
            machine.stop();
            lock(&tracker).take();
            Ok(median(times))
        })?;
    }
    Ok(())
}

/// What the first write to a protected page takes, as the guest sees it; next to the least that a handler can do.
fn first_writes(cli: &Cli) -> Result<(), Error> {
    let bare = Way { name: "a bare loop".into(), ..Way::kernel() };
    let served = Way::prefault("block", Age::Young)?;
    let served = Way { name: "served".into(), ..served };
    let (mut p99, mut worst) = (vec![Vec::new(); 2], vec![Vec::new(); 2]);
    println!("the first write to a protected page:");
    let mut p50 = vec![Vec::new(); 2];
    for _ in 0..cli.runs {
        for (index, way) in [&bare, &served].into_iter().enumerate() {
            let figures = first_write(cli, way)?;
            p50[index].push(figures[0]);
            p99[index].push(figures[1]);
            worst[index].push(figures[2]);
        }
    }
    let least = median(p50[0].clone());
    for (index, way) in [&bare, &served].into_iter().enumerate() {
        let figures = [&p50, &p99, &worst].map(|of| median(of[index].clone()) / 1e3);
        println!(
            "  {:<36} p50 {:>6.1} us   p99 {:>6.1} us   max {:>8.1} us   {:>6.2}x",
            way.name,
            figures[0],
            figures[1],
            figures[2],
            figures[0] * 1e3 / least
        );
    }
    Ok(())
}

/// p50, p99 and the largest, in nanoseconds.
fn first_write(cli: &Cli, way: &Way) -> Result<[f64; 3], Error> {
    type Hook = Box<dyn FnOnce() + Send>;
    let arm: Arc<Mutex<Option<Hook>>> = Arc::default();
    let for_bell = Arc::clone(&arm);
    let at = move |bell| {
        if bell == Doorbell::Begin
            && let Some(arm) = lock(&for_bell).take()
        {
            arm();
        }
    };
    let (machine, bells, console) = build(cli, "workload=fill passes=1 populate=on latency=on", way, at)?;
    let stop = EventFd::new(EFD_NONBLOCK)?;
    let tracker = match way.faults {
        Faults::Kernel => None,
        Faults::Uffd => {
            let tracker = machine.tracker(Kind::UffdServe, &TrackConfig::default())?;
            Some(Arc::new(Mutex::new(tracker)))
        }
    };
    let mut handler = None;
    let hook: Hook = match &tracker {
        Some(tracker) => {
            let tracker = Arc::clone(tracker);
            Box::new(move || lock(&tracker).arm().expect("it can be armed"))
        }
        None => {
            let uffd = Arc::new(Uffd::open(Mode::Sync)?);
            let slots: Vec<Slot> = machine.slots();
            let ranges: Vec<_> = slots.iter().map(|slot| (slot.hva(), slot.len())).collect();
            let (of_handler, stopped) = (Arc::clone(&uffd), stop.try_clone()?);
            handler = Some(thread::spawn(move || serve_barely(&of_handler, &stopped)));
            Box::new(move || {
                for (start, len) in ranges {
                    uffd.register(start, len).expect("nobody else has it");
                    uffd.protect(start, len).expect("it was just registered");
                }
            })
        }
    };
    *lock(&arm) = Some(hook);
    machine.start()?;
    wait_for(&bells, Doorbell::Done)?;
    machine.stop();
    stop.write(1)?;
    if let Some(handler) = handler {
        handler.join().map_err(|_| "the bare handler panicked")?;
    }
    if let Some(tracker) = tracker {
        lock(&tracker).disarm()?;
    }
    let text = String::from_utf8_lossy(&lock(&console.0)).into_owned();
    let result: serde_json::Value = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find(|line| line["p50_ns"].is_number())
        .ok_or("the guest reported no latencies")?;
    Ok(["p50_ns", "p99_ns", "max_ns"].map(|key| result[key].as_f64().unwrap_or(f64::NAN)))
}

/// The least that a handler can do: one message, one page.
fn serve_barely(uffd: &Uffd, stop: &EventFd) {
    while matches!(uffd.wait(stop), Ok(Wait::Faults)) {
        if let Ok(Some(address)) = uffd.fault() {
            // A page whose mapping is changing is asked for again.
            let _ = uffd.unprotect(address & !(PAGE_SIZE - 1), PAGE_SIZE);
        }
    }
}

/// What the guest prints.
#[derive(Clone, Debug, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
