//! `vmm run`: a machine from start to end, with its console, its signals and its dirty memory on show.
//!
//! Threads: this one has standard input, signals and timers; one is the device loop, where there are virtio
//! devices; one per vCPU; one observer that closes the epochs. What may print where:
//! * a terminal: the console above, the panel below, the summary at the end;
//! * `--json`: only JSON lines on standard output, the console on standard error;
//! * else: the console on standard output, a line per epoch and the summary on standard error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::tracker::{Kind, Tracker, TrackerError};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::boot::Kernel;
use crate::cost;
use crate::devices::device_loop::{DeviceLoop, LoopError};
use crate::devices::virtio::disk::DiskConfig;
use crate::fault::{self, FaultConfig, WorkingSetError};
use crate::forecast::Link;
use crate::host::KvmModule;
use crate::live::{Epoch, LiveError, Observer, Totals};
use crate::machine::{Machine, MachineConfig, MachineError};
use crate::memory::{HostPages, MemoryConfig};
use crate::options::human_size;
use crate::panel::{self, Picture, Subject};
use crate::sampled::{Look, Looker, Looks};
use crate::sys::signals::Signals;
use crate::sys::tty::RawMode;
use crate::terminal::{Console, Terminal, restore_on_panic};
use crate::timing::{Phase, Timing};
use crate::track::{SAMPLED, TrackConfig};
use crate::vcpu::{End, PVM_HINT};
use crate::working_set::{WorkingSetConfig, WorkingSetReport};

/// What `vmm run` is asked to do.
#[derive(Debug)]
pub struct RunConfig {
    /// What to boot.
    pub kernel: Kernel,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u8,
    /// RAM.
    pub memory: MemoryConfig,
    /// How its faults are served, if they are.
    pub fault: FaultConfig,
    /// Where to write which pages the guest touched.
    pub record_working_set: Option<PathBuf>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Tracker.
    pub track: TrackConfig,
    /// Link that a migration is foretold for.
    pub link: Link,
    /// Length of an epoch.
    pub epoch: Duration,
    /// Stop after this time; zero: never.
    pub duration: Duration,
    /// Tell which address spaces map dirty pages.
    pub owners: bool,
    /// Tell what is touched.
    pub working_set: Option<WorkingSetConfig>,
    /// Hold every epoch against the built-in guest's ledger.
    pub ledger: bool,
    /// JSON lines on standard output.
    pub json: bool,
    /// Nothing but the console.
    pub quiet: bool,
    /// Report the phases of the start.
    pub timing: bool,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No tracker.
    #[error("cannot track dirty memory: {0}; use --track none to run without")]
    Tracker(#[from] TrackerError),
    /// Tracking broke down.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// The file of touched pages.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
    /// A system resource.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The machine broke down, for this reason.
    #[error("{0}")]
    Failed(String),
    /// The device loop.
    #[error(transparent)]
    Devices(#[from] LoopError),
    /// The event loop.
    #[error("the event loop failed: {0}")]
    Loop(#[from] event_manager::Error),
}

fn system(what: &'static str) -> impl Fn(io::Error) -> RunError {
    move |source| RunError::System { what, source }
}

/// How a run that took place ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// As it should: the guest powered off or reset, its time was up, or the user stopped it.
    Done,
    /// KVM could not go on with the guest.
    Crashed,
    /// The built-in guest found its memory wrong, or its ledger contradicts the tracker.
    CheckFailed,
}

/// What the control loop hears.
struct Control {
    machine: Arc<Machine>,
    signals: Signals,
    duration: Option<TimerFd>,
    /// Standard input goes to the guest, with `Ctrl-A` as escape when it is a raw terminal.
    input: Option<Input>,
    terminal: Option<Arc<Terminal>>,
    observer_failed: EventFd,
    ended: bool,
}

struct Input {
    /// Standard input without the buffer of `io::stdin`, which epoll knows nothing of.
    file: File,
    escapes: bool,
    escaped: bool,
}

const SIGNALS: u32 = 0;
const ENDED: u32 = 1;
const TIMER: u32 = 2;
const STDIN: u32 = 3;
const ROOM: u32 = 4;
const OBSERVER: u32 = 5;

impl Control {
    fn key(&mut self, bytes: &[u8]) {
        let Some(input) = &mut self.input else { return };
        if !input.escapes {
            self.machine.platform().serial().input(bytes);
            return;
        }
        let mut typed = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match (input.escaped, byte) {
                (false, 0x01) => input.escaped = true,
                (true, b'x' | b'X') => self.ended = true,
                // Ctrl-A twice is one Ctrl-A.
                (true, 0x01 | b'a') => {
                    input.escaped = false;
                    typed.push(0x01);
                }
                (true, _) => input.escaped = false,
                (false, byte) => typed.push(*byte),
            }
        }
        self.machine.platform().serial().input(&typed);
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |events: Events| {
            if let Err(error) = ops.add(events) {
                eprintln!("vmm: cannot watch an event source: {error}");
            }
        };
        watch(Events::with_data(&self.signals, SIGNALS, EventSet::IN));
        watch(Events::with_data(self.machine.ended(), ENDED, EventSet::IN));
        watch(Events::with_data(self.machine.platform().serial().room(), ROOM, EventSet::IN));
        watch(Events::with_data(&self.observer_failed, OBSERVER, EventSet::IN));
        if let Some(timer) = &self.duration {
            watch(Events::with_data(timer, TIMER, EventSet::IN));
        }
        if let Some(input) = &self.input
            && ops.add(Events::with_data(&input.file, STDIN, EventSet::IN)).is_err()
        {
            // A regular file or /dev/null cannot be polled, and need not be.
            let mut text = Vec::new();
            if (&input.file).take(1 << 20).read_to_end(&mut text).is_ok() {
                self.key(&text);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            SIGNALS => {
                while let Some(signal) = self.signals.next() {
                    match signal {
                        libc::SIGWINCH => {
                            if let Some(terminal) = &self.terminal {
                                terminal.resized();
                            }
                        }
                        _ => self.ended = true,
                    }
                }
            }
            STDIN => {
                let Some(input) = &self.input else { return };
                let mut buffer = [0; 1024];
                match (&input.file).read(&mut buffer) {
                    Ok(n @ 1..) => self.key(&buffer[..n]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    _ => {
                        // End of input: the guest goes on without.
                        let _ = ops.remove(Events::empty(&input.file));
                    }
                }
            }
            ROOM => self.machine.platform().serial().feed(),
            _ => self.ended = true,
        }
    }
}

/// Where epochs and the summary go.
struct Show {
    subject: Subject,
    json: bool,
    quiet: bool,
    terminal: Option<Arc<Terminal>>,
    rates: VecDeque<f64>,
    /// Of the interval that ended last.
    working_set: Option<WorkingSetReport>,
    picture: Picture,
}

#[derive(Serialize)]
struct Event<'a, T: Serialize> {
    event: &'a str,
    #[serde(flatten)]
    body: T,
}

fn print_json(event: &str, body: impl Serialize) {
    if let Ok(line) = serde_json::to_string(&Event { event, body }) {
        // A reader that has gone does not want the rest.
        let _ = writeln!(io::stdout(), "{line}");
    }
}

impl Show {
    /// Says why there are no epochs yet.
    fn waiting(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.draw(vec!["── the guest touches its memory before its workload begins".into()]);
        } else if !self.quiet && !self.json {
            eprintln!("the guest touches its memory before its workload begins");
        }
    }

    fn epoch(&mut self, epoch: &Epoch) {
        self.picture.add(&epoch.map);
        if self.rates.len() == 16 {
            self.rates.pop_front();
        }
        self.rates.push_back(epoch.dirty_bytes_per_s);
        self.working_set = epoch.working_set.or(self.working_set);
        if self.json {
            print_json("epoch", epoch);
        } else if self.quiet {
        } else if let Some(terminal) = &self.terminal {
            let rates = self.rates.make_contiguous();
            terminal.draw(panel::panel(
                &self.subject,
                epoch,
                rates,
                self.working_set.as_ref(),
                terminal.width(),
            ));
        } else {
            eprintln!("{}", panel::line(&self.subject, epoch));
        }
    }
}

impl Show {
    fn look(&mut self, look: &Look) {
        if self.json {
            print_json("look", look);
        } else if self.quiet {
        } else if let Some(terminal) = &self.terminal {
            if self.rates.len() == 16 {
                self.rates.pop_front();
            }
            self.rates.push_back(look.rate.bytes_per_s);
            let rates = self.rates.make_contiguous();
            terminal.draw(panel::sampled_panel(&self.subject, look, rates, terminal.width()));
        } else {
            eprintln!("{}", panel::sampled_line(look));
        }
    }
}

/// What the observer leaves behind.
struct Observed {
    /// With a tracker.
    totals: Option<Totals>,
    /// With a sample.
    looks: Option<Looks>,
    show: Show,
    cost_ns: Option<f64>,
    failure: Option<LiveError>,
}

#[derive(Serialize)]
struct StartReport {
    memory: MemoryConfig,
    cpus: u8,
    track: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    track_chosen_because: Option<&'static str>,
    epoch_s: f64,
    builtin_guest: bool,
}

#[derive(Serialize)]
struct SummaryReport {
    end: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_status: Option<u32>,
    #[serde(flatten)]
    totals: Option<Totals>,
    #[serde(flatten)]
    looks: Option<Looks>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault_cost_ns: Option<f64>,
    host: Option<HostPages>,
}

/// Runs a machine as `config` says, and says on the way what there is to say. `timing` started with the
/// process.
///
/// # Errors
/// See [`RunError`]. Whatever happens, the terminal is as it was.
pub fn run(config: RunConfig, timing: &Timing) -> Result<Outcome, RunError> {
    let builtin = config.kernel == Kernel::BuiltIn;
    let observed = config.track.kind != Some(Kind::None) || config.track.sampled.is_some();
    let panel_wanted = !config.json && !config.quiet && observed;
    let signals = Signals::take(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGWINCH])
        .map_err(system("take over signals"))?;

    restore_on_panic();
    // A guest that does not listen to its console leaves Ctrl-C to the user.
    let stdin = io::stdin();
    let raw = (!builtin && stdin.is_terminal()).then(|| RawMode::enter(stdin.as_raw_fd()).ok()).flatten();
    let terminal = if panel_wanted && io::stdout().is_terminal() {
        Terminal::open(panel::height(config.memory.fault, config.owners))
    } else {
        None
    };
    let console: Box<dyn Write + Send> = match &terminal {
        Some(terminal) => Box::new(Console(Arc::clone(terminal))),
        None if config.json => Box::new(io::stderr()),
        None => Box::new(Unbuffered),
    };

    let machine = Arc::new(Machine::new(MachineConfig {
        memory: config.memory,
        cpus: config.cpus,
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone(),
        disks: config.disks.clone(),
        rng: config.rng,
        console,
        timing: timing.clone(),
        doorman: None,
        fault: config.fault.clone(),
        dirty_ring: (config.track.kind == Some(Kind::KvmRing)).then_some(config.track.ring_entries),
    })?);
    let (kind, chosen_because) = config.track.choose(&machine.tracking_facts(), config.memory.fault);
    let tracker_name = if config.track.sampled.is_some() { SAMPLED } else { kind.name() };
    let tracker: Option<Box<dyn Tracker>> = match kind {
        Kind::None => None,
        kind => Some(machine.tracker(kind, &config.track)?),
    };

    let mut duration = None;
    if !config.duration.is_zero() {
        let mut timer = TimerFd::new().map_err(|e| system("create a timer")(e.into()))?;
        timer.reset(config.duration, None).map_err(|e| system("set a timer")(e.into()))?;
        duration = Some(timer);
    }
    let input = if builtin {
        None
    } else {
        let file = stdin.as_fd().try_clone_to_owned().map_err(system("use standard input"))?;
        Some(Input { file: file.into(), escapes: raw.is_some(), escaped: false })
    };
    let observer_failed = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
    let control = Arc::new(Mutex::new(Control {
        machine: Arc::clone(&machine),
        signals,
        duration,
        input,
        terminal: terminal.clone(),
        observer_failed: observer_failed.try_clone().map_err(system("copy an eventfd"))?,
        ended: false,
    }));
    let mut control_loop: EventManager<Arc<Mutex<dyn MutEventSubscriber>>> = EventManager::new()?;
    control_loop.add_subscriber(Arc::clone(&control) as Arc<Mutex<dyn MutEventSubscriber>>);
    let workers = machine.take_workers();
    let devices = if workers.is_empty() { None } else { Some(DeviceLoop::start(workers)?) };

    machine.start()?;
    if config.json {
        print_json(
            "start",
            StartReport {
                memory: config.memory,
                cpus: config.cpus,
                track: tracker_name,
                track_chosen_because: chosen_because,
                epoch_s: config.epoch.as_secs_f64(),
                builtin_guest: builtin,
            },
        );
    }
    if !builtin && machine.module() == KvmModule::Pvm {
        if config.json {
            print_json("note", serde_json::json!({ "text": PVM_HINT }));
        } else if !config.quiet {
            eprintln!("vmm: note: {PVM_HINT}");
        }
    }
    let show = Show {
        subject: Subject {
            ram: config.memory.size,
            huge: config.memory.huge.to_string(),
            cpus: machine.cpus(),
            tracker: tracker_name,
            chosen_because,
            bandwidth: config.link.bytes_per_s,
            colour: terminal.is_some() && std::env::var_os("NO_COLOR").is_none(),
        },
        json: config.json,
        quiet: config.quiet,
        terminal: terminal.clone(),
        working_set: None,
        rates: VecDeque::with_capacity(16),
        picture: Picture::default(),
    };
    let (finish, finished) = mpsc::channel::<()>();
    let plan = Plan { builtin, epoch: config.epoch, wants_cost: !config.quiet, kind, track: config.track };
    let body: Option<Box<dyn FnOnce() -> Observed + Send>> = match (tracker, config.track.sampled) {
        (Some(tracker), _) => {
            let ledger = builtin && config.ledger;
            let mut observer = Observer::new(Arc::clone(&machine), tracker, ledger, config.link);
            if config.owners {
                observer.show_owners();
            }
            if let Some(config) = config.working_set {
                observer.watch_working_set(config);
            }
            Some(Box::new(move || observe(observer, show, &plan, &finished, &observer_failed)))
        }
        (None, Some(per_gib)) => {
            let machine = Arc::clone(&machine);
            Some(Box::new(move || look(machine, per_gib, show, &plan, &finished, &observer_failed)))
        }
        (None, None) => None,
    };
    let observer = body
        .map(|body| thread::Builder::new().name("observer".into()).stack_size(OBSERVER_STACK).spawn(body))
        .transpose()
        .map_err(system("start the observer thread"))?;

    while !control.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).ended {
        control_loop.run()?;
    }

    // The observer closes the last epoch while the machine still stands, then tells the guest to end.
    drop(finish);
    let observed = observer.and_then(|thread| thread.join().ok());
    if builtin && machine.end().is_none() {
        wait_for_results(&machine);
    }
    machine.stop();
    if let (Some(path), Some(server)) = (&config.record_working_set, machine.fault()) {
        fault::record(server, path)?;
    }
    let host = machine.ram().host_pages().ok();
    drop(devices);
    drop(control_loop);
    drop(control);
    let guest_status = machine.channel().status();
    let end = machine.end();
    // The screen is whole again before the last words.
    let mut observed = observed;
    if let Some(observed) = &mut observed {
        observed.show.terminal = None;
    }
    drop(terminal);
    drop(raw);

    if let Some(End::Crash(crash)) = &end {
        if config.json {
            print_json("crash", crash);
        }
        eprintln!("vmm: the guest stopped: {crash}");
    }
    if config.json {
        print_json(
            "summary",
            SummaryReport {
                end: match end {
                    Some(End::Reset) => "reset",
                    Some(End::PowerOff) => "power-off",
                    Some(End::Crash(_)) => "crash",
                    Some(End::Failed(_)) => "failed",
                    Some(End::Stopped) | None => "stopped",
                },
                guest_status,
                totals: observed.as_ref().and_then(|o| o.totals.clone()),
                looks: observed.as_ref().and_then(|o| o.looks),
                fault_cost_ns: observed.as_ref().and_then(|o| o.cost_ns),
                host,
            },
        );
    } else if !config.quiet
        && let Some(observed) = &observed
    {
        let host = host.map(|host| describe(host, config.memory));
        let show = &observed.show;
        let text = match (&observed.totals, &observed.looks) {
            (Some(totals), _) => panel::summary(&show.subject, totals, &show.picture, host.as_deref()),
            (None, Some(looks)) => panel::sampled_summary(&show.subject, looks, host.as_deref()),
            (None, None) => String::new(),
        };
        eprint!("\n{text}");
    }
    if config.timing {
        report_timing(timing, config.json);
    }
    let contradicted = observed.as_ref().and_then(|o| o.totals.as_ref()).is_some_and(Totals::contradicted);
    if let Some(End::Failed(reason)) = end {
        return Err(RunError::Failed(reason));
    }
    if let Some(failure) = observed.and_then(|o| o.failure) {
        return Err(failure.into());
    }
    Ok(match end {
        Some(End::Crash(_)) => Outcome::Crashed,
        _ if contradicted || guest_status.is_some_and(|status| status != 0) => Outcome::CheckFailed,
        _ => Outcome::Done,
    })
}

/// The observer formats text and calls the tracker, none of it deep.
const OBSERVER_STACK: usize = 256 << 10;

struct Plan {
    builtin: bool,
    epoch: Duration,
    wants_cost: bool,
    kind: Kind,
    track: TrackConfig,
}

/// The observer's thread: an epoch after the other until `finished` hangs up.
fn observe(
    mut observer: Observer,
    mut show: Show,
    plan: &Plan,
    finished: &mpsc::Receiver<()>,
    failed: &EventFd,
) -> Observed {
    let mut cost_ns = None;
    let result = (|| -> Result<(), LiveError> {
        if plan.builtin && !wait_for_workload(|| observer.guest_has_begun(), &show, finished) {
            return Ok(());
        }
        observer.arm()?;
        let mut deadline = Instant::now() + plan.epoch;
        if plan.wants_cost
            && let Ok(Some(cost)) = cost::measure(plan.kind, &plan.track)
        {
            cost_ns = Some(cost.ns);
            observer.set_cost(cost);
        }
        loop {
            let wait = deadline.saturating_duration_since(Instant::now());
            let over = !matches!(finished.recv_timeout(wait), Err(mpsc::RecvTimeoutError::Timeout));
            let epoch = observer.close_epoch()?;
            // The last epoch is cut short; a sliver of one says nothing about rates.
            if !over || epoch.seconds * 10.0 > plan.epoch.as_secs_f64() {
                show.epoch(&epoch);
            }
            if over {
                return observer.check_record();
            }
            // From now, not from the last deadline: a harvest that is late must not be followed by a hasty
            // one, because harvests in a row starve the guest.
            deadline = Instant::now() + plan.epoch;
        }
    })();
    observer.ask_guest_to_stop();
    if result.is_err() {
        // Only when its counter is full, and then it is readable.
        let _ = failed.write(1);
    }
    Observed { totals: Some(observer.totals()), looks: None, show, cost_ns, failure: result.err() }
}

/// The observer's thread without a tracker: a look at the sample after the other until `finished` hangs up.
fn look(
    machine: Arc<Machine>,
    per_gib: u64,
    mut show: Show,
    plan: &Plan,
    finished: &mpsc::Receiver<()>,
    failed: &EventFd,
) -> Observed {
    let mut looks = Looks::default();
    let result = (|| -> Result<(), LiveError> {
        if plan.builtin && !wait_for_workload(|| machine.channel().begun().read().is_ok(), &show, finished) {
            return Ok(());
        }
        let mut looker = Looker::new(Arc::clone(&machine), per_gib)?;
        while let Err(mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(plan.epoch) {
            let look = looker.look()?;
            looks.add(&look);
            show.look(&look);
        }
        Ok(())
    })();
    if result.is_err() {
        // Only when its counter is full, and then it is readable.
        let _ = failed.write(1);
    }
    Observed { totals: None, looks: Some(looks), show, cost_ns: None, failure: result.err() }
}

/// Waits until the built-in guest's workload begins, so that the first epoch begins with it. A guest that does
/// not get there is armed anyway after a while, to be seen as well. False: the run is over.
fn wait_for_workload(has_begun: impl Fn() -> bool, show: &Show, finished: &mpsc::Receiver<()>) -> bool {
    let begin = Instant::now();
    let mut said = false;
    while !has_begun() && begin.elapsed() < WORKLOAD_PATIENCE {
        if !matches!(finished.recv_timeout(Duration::from_millis(1)), Err(mpsc::RecvTimeoutError::Timeout)) {
            return false;
        }
        if !said && begin.elapsed() > Duration::from_millis(300) {
            said = true;
            show.waiting();
        }
    }
    true
}

/// Touching all of a large guest's memory takes its time.
const WORKLOAD_PATIENCE: Duration = Duration::from_secs(120);

/// Gives the built-in guest a moment to end by itself and print its results.
fn wait_for_results(machine: &Machine) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while machine.end().is_none() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
}

fn describe(host: HostPages, memory: MemoryConfig) -> String {
    let mut text = format!("{} resident", human_size(host.resident));
    if host.hugetlb > 0 {
        text.push_str(&format!(", {} of it in hugetlb pages", human_size(host.hugetlb)));
    }
    text.push_str(&format!(", {} of it in transparent huge pages", human_size(host.thp)));
    text.push_str(&format!(" (asked for: huge={})", memory.huge));
    text
}

fn report_timing(timing: &Timing, json: bool) {
    let phases = timing.report();
    if json {
        let phases: serde_json::Map<_, _> =
            phases.iter().filter_map(|(phase, us)| Some((name(*phase)?, (*us).into()))).collect();
        print_json("timing", serde_json::json!({ "microseconds_since_main": phases }));
        return;
    }
    eprintln!("\n  phases of the start, ms since main");
    for (phase, us) in phases {
        eprintln!("  {:>9.3}  {}", us / 1000.0, name(phase).unwrap_or_default());
    }
}

fn name(phase: Phase) -> Option<String> {
    serde_json::to_value(phase).ok()?.as_str().map(str::to_owned)
}

/// Standard output without a buffer, because a console shows every byte as it comes.
struct Unbuffered;

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
