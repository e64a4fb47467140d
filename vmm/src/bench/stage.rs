//! A guest that is measured: it makes passes over its memory, and between two of them all its vCPUs wait at the doorbell, for as
//! long as what is looked at in between takes. So a pass has the guest's own work in it, and what tracking adds to that.

use std::cell::Cell;
use std::io::{self, Write};
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::Doorbell;

use super::BenchError;
use crate::boot::Kernel;
use crate::fault::FaultConfig;
use crate::ledger::Ledger;
use crate::machine::{Machine, MachineConfig};
use crate::memory::MemoryConfig;
use crate::sys::{affinity, cpu_time};
use crate::timing::Timing;

/// How long a guest may make no progress.
const PATIENCE: Duration = Duration::from_secs(120);

/// What kind of guest.
#[derive(Clone, Debug, Default)]
pub(super) struct StageConfig {
    /// Its command line, but for what a stage adds.
    pub(super) cmdline: String,
    pub(super) memory: MemoryConfig,
    pub(super) cpus: u8,
    pub(super) fault: FaultConfig,
    pub(super) dirty_ring: Option<u32>,
    /// The guest makes its passes in a row, [started](Stage::go) by one word, and says at its end how long each access took.
    pub(super) timed: bool,
}

/// The guest, its vCPUs waiting.
pub(super) struct Stage {
    machine: Machine,
    wings: Arc<Wings>,
    console: Console,
    /// From before there was a machine to the guest's begin.
    pub(super) populate: Duration,
}

/// One pass of all vCPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    /// From its begin to the end of the last vCPU.
    pub(super) wall: Duration,
    /// Processor time of all in this process but the vCPUs.
    pub(super) host: Duration,
}

/// Where vCPUs wait for their pass.
struct Wings {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Who is here.
    arrived: usize,
    /// When the last of them came.
    last: Option<Instant>,
    /// Number of the pass that may be made.
    pass: u64,
    /// Processor time of vCPUs in the pass that was made last.
    guest: Duration,
    /// The run is over: nobody waits any more.
    over: bool,
    /// The guest has said all.
    done: bool,
}

impl Wings {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Numbers, all of them true at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU waits for the next pass. Returns when it may make it.
    fn wait(&self, began: Duration) {
        let mut waiting = self.lock();
        waiting.guest += cpu_time::of_thread().saturating_sub(began);
        waiting.arrived += 1;
        waiting.last = Some(Instant::now());
        let pass = waiting.pass;
        self.changed.notify_all();
        drop(
            self.changed
                .wait_while(waiting, |waiting| waiting.pass == pass && !waiting.over)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

thread_local! {
    /// Processor time of this vCPU when its pass began.
    static BEGAN: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    /// Whether it has been given a processor.
    static PINNED: Cell<bool> = const { Cell::new(false) };
}

/// Whether vCPUs are given processors of their own: where there are some.
pub(super) fn pins() -> bool {
    thread::available_parallelism().is_ok_and(|processors| processors.get() >= 4)
}

impl Stage {
    /// Starts the guest, and returns when all its memory is touched.
    pub(super) fn start(config: StageConfig) -> Result<Stage, BenchError> {
        let began = Instant::now();
        let wings = Arc::new(Wings { state: Mutex::default(), changed: Condvar::new() });
        let for_bell = Arc::clone(&wings);
        let pin = pins();
        let doorman = move |vcpu: u8, bell: Doorbell, _: u32| {
            if pin && !PINNED.replace(true) {
                // The first one is for everything else. Where it cannot be done it is not.
                affinity::pin(1 + usize::from(vcpu));
            }
            match bell {
                Doorbell::Begin | Doorbell::Pass => {
                    for_bell.wait(BEGAN.get());
                    BEGAN.set(cpu_time::of_thread());
                }
                Doorbell::Done => {
                    for_bell.lock().done = true;
                    for_bell.changed.notify_all();
                }
                Doorbell::Announce | Doorbell::Ready => {}
            }
        };
        let console = Console::default();
        let machine = Machine::new(MachineConfig {
            memory: config.memory,
            cpus: config.cpus,
            kernel: Kernel::BuiltIn,
            initrd: None,
            cmdline: format!(
                "{} {} quiet=on",
                config.cmdline,
                if config.timed { "latency=on" } else { "passes=0 barrier=on" }
            ),
            disks: Vec::new(),
            rng: false,
            console: Box::new(console.clone()),
            timing: Timing::start(),
            doorman: Some(Arc::new(doorman)),
            fault: config.fault,
            from: None,
            dirty_ring: config.dirty_ring,
        })?;
        let mut stage = Stage { machine, wings, console, populate: Duration::ZERO };
        stage.machine.start()?;
        // Its first vCPU waits for all of them.
        drop(stage.until(|waiting| waiting.arrived == 1)?);
        stage.machine.wait_for_ram();
        stage.populate = began.elapsed();
        Ok(stage)
    }

    /// Waits until it has come to that.
    fn until(&self, there: impl Fn(&Waiting) -> bool) -> Result<MutexGuard<'_, Waiting>, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = self.wings.lock();
        while !there(&waiting) {
            // Often enough to hear of its end.
            let look = Duration::from_millis(100);
            waiting =
                self.wings.changed.wait_timeout(waiting, look).unwrap_or_else(PoisonError::into_inner).0;
            let end = self.machine.end();
            if (end.is_some() && !there(&waiting)) || Instant::now() > deadline {
                let why = end.map_or("it makes no progress".to_owned(), |end| format!("{end:?}"));
                return Err(BenchError::Guest(format!("{why} {}", self.console.text())));
            }
        }
        Ok(waiting)
    }

    /// Lets all vCPUs go on.
    pub(super) fn go(&mut self) -> Instant {
        let mut waiting = self.wings.lock();
        waiting.arrived = 0;
        waiting.guest = Duration::ZERO;
        waiting.pass += 1;
        let began = Instant::now();
        self.wings.changed.notify_all();
        began
    }

    /// What a guest that times its accesses prints when its passes are done, or when it is `stopped`.
    pub(super) fn results(&self, stopped: bool) -> Result<serde_json::Value, BenchError> {
        if stopped {
            self.ledger()?.stop()?;
        }
        drop(self.until(|waiting| waiting.done)?);
        let said = self.console.text();
        let lines = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let results = lines.into_iter().find(|line| line["p50_ns"].is_number());
        results.ok_or_else(|| BenchError::Guest(format!("it says no latencies: {said}")))
    }

    /// Has all vCPUs make a pass, and waits for the last.
    pub(super) fn pass(&mut self) -> Result<Pass, BenchError> {
        let of_process = cpu_time::of_process();
        let began = self.go();
        let vcpus = self.machine.cpus();
        let waiting = self.until(|waiting| waiting.arrived == vcpus)?;
        let (guest, last) = (waiting.guest, waiting.last.unwrap_or(began));
        drop(waiting);
        let all = cpu_time::of_process().saturating_sub(of_process);
        Ok(Pass { wall: last - began, host: all.saturating_sub(guest) })
    }

    /// The guest's ledger.
    pub(super) fn ledger(&self) -> Result<Ledger, BenchError> {
        let control = self.machine.channel().control();
        let control = control.ok_or_else(|| BenchError::Guest("it has announced no ledger".into()))?;
        Ok(Ledger::attach(Arc::clone(self.machine.ram()), control)?)
    }
}

impl Deref for Stage {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Who waits here hears nothing of a machine that stops.
        self.wings.lock().over = true;
        self.wings.changed.notify_all();
        self.machine.stop();
    }
}

/// What a guest prints.
#[derive(Clone, Debug, Default)]
pub(super) struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// So far.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
