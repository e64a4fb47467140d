//! `vmm run`: a machine from start to end, with its console, its signals and its dirty memory on show.
//!
//! Threads: this one has standard input, signals and timers ([`control`](crate::control)); one is the device loop, where
//! there are virtio devices; one per vCPU; one observes ([`observe`](crate::observe)).

use std::error::Error;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::tracker::{Kind, TrackerError};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::api::{self, ApiError};
use crate::board::Board;
use crate::boot::Kernel;
use crate::control::{Control, Input};
use crate::devices::device_loop::{DeviceLoop, LoopError};
use crate::devices::virtio::disk::DiskConfig;
use crate::fault::{self, FaultConfig, WorkingSetError};
use crate::forecast::Link;
use crate::host::KvmModule;
use crate::live::{LiveError, Totals};
use crate::machine::{From, Machine, MachineConfig, MachineError};
use crate::memory::{Faults, MemoryConfig, Ram};
use crate::migrate::destination::Incoming;
use crate::migrate::lane::Cancel;
use crate::migrate::{Address, MigrateError};
use crate::observe::{Observers, Observing, Plan};
use crate::panel::{self, Subject};
use crate::show::{Show, Start, Summary, To};
use crate::snapshot::{self, Restore, Restored, Shape, SnapshotError};
use crate::sys::signals::{Signals, ignore};
use crate::sys::tty::RawMode;
use crate::terminal::{Terminal, restore_on_panic};
use crate::timing::Timing;
use crate::track::TrackConfig;
use crate::vcpu::{End, PVM_HINT};
use crate::working_set::WorkingSetConfig;

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
    /// Where to serve the control socket.
    pub api_socket: Option<PathBuf>,
    /// Go on from this snapshot, which says what the machine is made of.
    pub restore: Option<Restore>,
    /// Wait here for a machine that comes from elsewhere.
    pub incoming: Option<Address>,
    /// With TLS, by the certificates in this directory ([`tls`](crate::migrate::tls)).
    pub tls_dir: Option<PathBuf>,
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
    /// The control socket.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A machine that was to come.
    #[error("no machine came: {0}")]
    Migrate(#[from] MigrateError),
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

/// Runs a machine as `config` says, and says on the way what there is to say. `timing` started with the
/// process.
///
/// # Errors
/// See [`RunError`]. Whatever happens, the terminal is as it was.
pub fn run(mut config: RunConfig, timing: &Timing) -> Result<Outcome, RunError> {
    let signals = Signals::take(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGWINCH])
        .map_err(system("take over signals"))?;

    // Memory that is to be there is there before anybody waits for it; its size may turn out to be another.
    let prealloc = config.incoming.is_some() && config.memory.prealloc;
    let allocated = prealloc.then(|| Ram::new(config.memory)).transpose().map_err(MachineError::from)?;
    let mut incoming = match &config.incoming {
        Some(address) => {
            if !config.quiet {
                eprintln!("vmm: waiting for a machine at {address}");
                if address.is_open(config.tls_dir.as_deref()) {
                    eprintln!(
                        "vmm: warning: anybody who reaches that address can bring a machine, and its memory comes in the \
                         clear; --tls-dir asks for certificates"
                    );
                }
            }
            match Incoming::wait(address, config.tls_dir.as_deref(), &signals)? {
                Some(incoming) => Some(incoming),
                None => return Ok(Outcome::Done),
            }
        }
        None => None,
    };
    let restored =
        config.restore.as_ref().map(|restore| snapshot::open(restore, config.memory)).transpose()?;
    let shape = match (&mut incoming, &restored) {
        (Some(incoming), _) => incoming.shape(&config.disks, &config.memory)?,
        (None, Some(restored)) => restored.saved.shape.clone(),
        (None, None) => config.shape(),
    };
    let base = restored.as_ref().map(|restored| restored.base.clone());
    let held = restored.is_some();
    config.memory.size = shape.memory;
    let from = match restored {
        Some(Restored { saved, ram, chain, .. }) => {
            if ram.config().fault == Faults::Uffd {
                config.fault.source = Some(chain);
            }
            Some(From { ram, state: Some(saved.state) })
        }
        None if incoming.is_some() => {
            let allocated = allocated.filter(|ram| ram.config().size == config.memory.size);
            let ram = allocated.map_or_else(|| Ram::new(config.memory), Ok);
            let ram = or_refuse(&mut incoming, ram.map_err(MachineError::from))?;
            Some(From { ram, state: None })
        }
        None => None,
    };
    let builtin = shape.builtin;
    // A file that cannot become longer is an error of whoever writes it, and no reason to end.
    ignore(libc::SIGXFSZ).map_err(system("take over signals"))?;
    restore_on_panic();
    // A guest that does not listen to its console leaves Ctrl-C to the user.
    let stdin = io::stdin();
    let raw = (!builtin && stdin.is_terminal()).then(|| RawMode::enter(stdin.as_raw_fd()).ok()).flatten();
    let to = reader(&config);
    let terminal = to.terminal();

    let machine = Machine::new(MachineConfig {
        memory: config.memory,
        cpus: shape.cpus,
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone(),
        disks: shape.disks.clone(),
        rng: shape.rng,
        console: to.console(),
        timing: timing.clone(),
        doorman: None,
        fault: config.fault.clone(),
        from: from.map(Box::new),
        dirty_ring: (config.track.kind == Some(Kind::KvmRing)).then_some(config.track.ring_entries),
    });
    let machine = Arc::new(or_refuse(&mut incoming, machine)?);
    // It runs when this returns, and what is missing of its memory comes by and by.
    let filling = incoming.map(|incoming| incoming.receive(&machine, &signals)).transpose()?.flatten();
    let observers = Observers {
        machine: Arc::clone(&machine),
        fault: config.memory.fault,
        link: config.link,
        ledger: builtin && config.ledger,
        owners: config.owners,
        working_set: config.working_set,
        shape,
        base,
    };
    let eye = observers.eye(config.track)?;
    let chosen_because = eye.chosen_because;
    let show = Show::new(
        Subject {
            ram: config.memory.size,
            huge: config.memory.huge.to_string(),
            cpus: machine.cpus(),
            tracker: eye.name,
            chosen_because,
            bandwidth: config.link.bytes_per_s,
            colour: terminal.is_some() && std::env::var_os("NO_COLOR").is_none(),
        },
        to,
    );
    // Written to by the observer when it fails, and by a client that wants the end.
    let quit = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
    let another = |fd: &EventFd| fd.try_clone().map_err(system("copy an eventfd"));
    let input = if builtin {
        None
    } else {
        let file = stdin.as_fd().try_clone_to_owned().map_err(system("use standard input"))?;
        Some(Input::new(file.into(), raw.is_some()))
    };
    let control = Arc::new(Mutex::new(Control {
        machine: Arc::clone(&machine),
        signals,
        duration: timer(config.duration)?,
        input,
        terminal,
        quit: another(&quit)?,
        ended: false,
    }));
    let mut control_loop: EventManager<Arc<Mutex<dyn MutEventSubscriber>>> = EventManager::new()?;
    control_loop.add_subscriber(Arc::clone(&control) as Arc<Mutex<dyn MutEventSubscriber>>);
    let workers = machine.take_workers();
    let devices = if workers.is_empty() { None } else { Some(DeviceLoop::start(workers)?) };

    let (commands, orders) = mpsc::channel();
    let board = Board::default();
    let (migration, told) = (Arc::<Mutex<Cancel>>::default(), Arc::<AtomicBool>::default());
    let api = match &config.api_socket {
        Some(path) => {
            let subject = api::Subject {
                machine: Arc::clone(&machine),
                board: board.reader(),
                commands: commands.clone(),
                quit: another(&quit)?,
                began: Instant::now(),
                paused: Mutex::new(false),
                cut: Mutex::default(),
                asking: tokio::sync::Mutex::default(),
                migration: Arc::clone(&migration),
                told: Arc::clone(&told),
            };
            Some(api::Server::start(path, subject)?)
        }
        None => None,
    };
    if held {
        machine.hold_start();
    }
    machine.start()?;
    show.start(&Start {
        memory: config.memory,
        cpus: machine.cpus() as u8,
        track: show.tracker(),
        track_chosen_because: chosen_because,
        epoch_s: config.epoch.as_secs_f64(),
        builtin_guest: builtin,
    });
    if !builtin && machine.module() == KvmModule::Pvm {
        show.note(PVM_HINT);
    }
    let plan = Plan { builtin, epoch: config.epoch, wants_cost: !config.quiet, held };
    let observing = Observing::start((commands, orders), observers, eye, show, board, plan, another(&quit)?)
        .map_err(system("start the observer thread"))?;
    while !control.lock().unwrap_or_else(PoisonError::into_inner).ended {
        control_loop.run()?;
    }

    // One that has been given away is not ours to cancel.
    migration.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    if machine.end() == Some(End::Migrated) && api.is_some() {
        wait_until(FOR_A_CLIENT, || told.load(Ordering::Acquire));
    }
    let mut observed = observing.finish(&machine, || drop(api));
    if observed.told && machine.end().is_none() {
        wait_for_results(&machine);
    }
    machine.stop();
    if let (Some(path), Some(server)) = (&config.record_working_set, machine.fault()) {
        fault::record(server, path)?;
    }
    let host = machine.ram().host_pages().ok();
    let guest_status = machine.channel().status();
    let end = machine.end();
    observed.show.leave_terminal();
    drop(filling);
    drop(devices);
    drop(control_loop);
    drop(control);
    drop(raw);

    let show = &observed.show;
    if let Some(End::Crash(crash)) = &end {
        show.crash(crash);
    }
    let summary = Summary {
        end: match end {
            Some(End::Reset) => "reset",
            Some(End::PowerOff) => "power-off",
            Some(End::Crash(_)) => "crash",
            Some(End::Failed(_)) => "failed",
            Some(End::Migrated) => "migrated",
            Some(End::Stopped) | None => "stopped",
        },
        guest_status,
        totals: observed.totals.as_ref(),
        looks: observed.looks.as_ref(),
        fault_cost_ns: observed.cost_ns,
        host,
    };
    show.summary(&summary, config.memory);
    if config.timing {
        show.timing(timing);
    }
    if let Some(End::Failed(reason)) = end {
        return Err(RunError::Failed(reason));
    }
    if let Some(failure) = observed.failure {
        return Err(failure.into());
    }
    let contradicted = observed.totals.as_ref().is_some_and(Totals::contradicted);
    Ok(match end {
        Some(End::Crash(_)) => Outcome::Crashed,
        _ if contradicted || guest_status.is_some_and(|status| status != 0) => Outcome::CheckFailed,
        _ => Outcome::Done,
    })
}

/// Tells who brings a machine why there is none here for it.
fn or_refuse<T, E: Error>(incoming: &mut Option<Incoming>, outcome: Result<T, E>) -> Result<T, E> {
    if let (Err(error), Some(incoming)) = (&outcome, incoming) {
        incoming.refuse(error);
    }
    outcome
}

impl RunConfig {
    /// What the machine is made of, unless a snapshot says so.
    fn shape(&self) -> Shape {
        Shape {
            memory: self.memory.size,
            cpus: self.cpus,
            disks: self.disks.clone(),
            rng: self.rng,
            builtin: self.kernel == Kernel::BuiltIn,
        }
    }
}

/// Who reads what is said.
fn reader(config: &RunConfig) -> To {
    let observed = config.track.kind != Some(Kind::None) || config.track.sampled.is_some();
    if config.json {
        return To::Json;
    } else if config.quiet {
        return To::Nobody;
    }
    let terminal = if observed && io::stdout().is_terminal() {
        Terminal::open(panel::height(config.memory.fault, config.owners))
    } else {
        None
    };
    terminal.map_or(To::Lines, To::Terminal)
}

/// A timer that runs out after `duration`, if that is not zero.
fn timer(duration: Duration) -> Result<Option<TimerFd>, RunError> {
    if duration.is_zero() {
        return Ok(None);
    }
    let mut timer = TimerFd::new().map_err(|e| system("create a timer")(e.into()))?;
    timer.reset(duration, None).map_err(|e| system("set a timer")(e.into()))?;
    Ok(Some(timer))
}

/// How long who asked for a migration has to ask how it ended.
const FOR_A_CLIENT: Duration = Duration::from_secs(2);

/// Gives the built-in guest a moment to end by itself and print its results.
fn wait_for_results(machine: &Machine) {
    wait_until(Duration::from_secs(2), || machine.end().is_some());
}

fn wait_until(longest: Duration, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + longest;
    while !there() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
}
