//! The workloads: one loop for all of them, with the books kept as the `abi` module says.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst, compiler_fence};

use crate::abi::{CpuControl, Doorbell, MAX_CPUS, shard, stamp, stamp_offset};
use crate::cmdline::{Config, Workload};
use crate::histogram::Histogram;
use crate::layout::PAGE;
use crate::paging::{WINDOW, map_shard};
use crate::pattern::{Hot, Mixture, Pattern, Rng, Sequential, Strided, Uniform, Zipf};
use crate::serial::Line;
use crate::{CONTROL, Machine, clock, entry, io, serial, smp};

/// What a vCPU leaves for the report, beyond what it counts in the control block.
pub(crate) struct Figures {
    /// Cycles spent in passes, waiting for the rate limit not included.
    pub(crate) busy: AtomicU64,
    /// Accesses made in that time.
    pub(crate) accesses: AtomicU64,
    /// Percentiles 50, 99, 99.9 and 100 of an access's latency, in cycles.
    pub(crate) latency: [AtomicU64; 4],
}

pub(crate) static FIGURES: [Figures; MAX_CPUS] = [const {
    Figures {
        busy: AtomicU64::new(0),
        accesses: AtomicU64::new(0),
        latency: [const { AtomicU64::new(0) }; 4],
    }
}; MAX_CPUS];

struct Histograms(UnsafeCell<[Histogram; MAX_CPUS]>);

// SAFETY: each vCPU uses its own element alone.
unsafe impl Sync for Histograms {}

static LATENCIES: Histograms = Histograms(UnsafeCell::new([Histogram::EMPTY; MAX_CPUS]));

/// Runs the workload on `cpu` to its end, in the ring that the command line asks for.
pub(crate) fn run(machine: &Machine, cpu: u32) {
    map_shard(machine, u64::from(cpu));
    if machine.config.ring0 {
        // SAFETY: everything is mapped alike in both rings.
        unsafe { entry::enter_ring0() };
    }
    let mut worker = Worker::new(machine, cpu);
    if machine.config.populate || machine.config.nonzero {
        worker.populate();
    }
    smp::begin_together(machine.config.cpus, cpu);
    let (pages, config) = (worker.pages, &machine.config);
    match config.workload {
        Workload::Fill => worker.run(Sequential::new(pages, true)),
        Workload::Seq | Workload::Read => worker.run(Sequential::new(pages, false)),
        Workload::Verify => worker.run(Sequential::new(pages, true)),
        Workload::Rand => worker.run(Uniform { pages }),
        Workload::Zipf => worker.run(Zipf::new(pages)),
        Workload::Stride => worker.run(Strided::new(pages, config.stride)),
        Workload::Hot => worker.run(Hot::new(pages, config.hot)),
        Workload::Mixed => worker.run(Mixture::new(pages)),
    }
    if config.verify {
        worker.verify();
    }
    worker.leave_figures();
    if config.ring0 {
        // SAFETY: as above.
        unsafe { entry::enter_ring3() };
    }
}

struct Worker<'a> {
    config: &'a Config,
    tsc_khz: u64,
    cpu: u32,
    control: &'static CpuControl,
    /// The shard.
    first: u64,
    pages: u64,
    /// The ledger, indexed by region page.
    write_entries: *const AtomicU64,
    read_entries: *const AtomicU32,
    rng: Rng,
    pace: Option<Pace>,
    busy: u64,
    accesses: u64,
}

impl<'a> Worker<'a> {
    fn new(machine: &'a Machine, cpu: u32) -> Worker<'a> {
        let Machine { config, layout, tsc_khz } = machine;
        let (first, end) = shard(layout.pages, u64::from(config.cpus), u64::from(cpu));
        Worker {
            config,
            tsc_khz: *tsc_khz,
            cpu,
            control: &CONTROL.cpu[cpu as usize],
            first,
            pages: end - first,
            write_entries: layout.writes as *const AtomicU64,
            read_entries: layout.reads as *const AtomicU32,
            rng: Rng::new(config.seed, u64::from(cpu)),
            pace: Pace::new(config, *tsc_khz),
            busy: 0,
            accesses: 0,
        }
    }

    /// Writes to every page of the shard what is there already, so that monitor and host map all of it.
    fn populate(&self) {
        for page in self.first..self.first + self.pages {
            if stopped() {
                return;
            }
            let (_, _, bytes) = self.page(page);
            // SAFETY: the first word of a page that nobody has written yet, so it is 0.
            unsafe { bytes.cast::<u64>().write_volatile(0) };
            if self.config.nonzero {
                // SAFETY: the last word of the same page.
                unsafe { bytes.add(4088).cast::<u64>().write_volatile(page + 1) };
            }
        }
    }

    fn run(&mut self, mut pattern: impl Pattern) {
        let per_pass = match self.config.pages {
            0 => self.pages,
            pages => pages.div_ceil(u64::from(self.config.cpus)),
        };
        let (passes, reads) = (self.config.passes(), self.config.reads());
        let mut lines = Lines::new(self);
        let beat = if self.cpu == 0 { self.config.beat } else { 0 };
        let mut to_beat = beat;
        let mut pass = 0;
        loop {
            pattern.restart(&mut self.rng);
            let (begin, waited) = (clock::now(), self.waited());
            let mut left = per_pass;
            while left > 0 && !stopped() {
                let page = self.first + pattern.next(&mut self.rng);
                let read = reads > 0 && (reads == 100 || self.rng.chance(reads));
                if let Some(pace) = &mut self.pace
                    && (!read || reads == 100)
                {
                    pace.wait();
                }
                let start = if self.config.latency { clock::now() } else { 0 };
                if read {
                    self.read(page);
                } else {
                    self.write(page);
                }
                if self.config.latency {
                    // SAFETY: this vCPU's own.
                    unsafe { (*LATENCIES.0.get())[self.cpu as usize].add(clock::now() - start) };
                }
                left -= 1;
                if beat > 0 {
                    to_beat -= 1;
                    if to_beat == 0 {
                        to_beat = beat;
                        serial::beat();
                    }
                }
            }
            self.busy += (clock::now() - begin).saturating_sub(self.waited() - waited);
            self.accesses += per_pass - left;
            if left > 0 {
                return;
            }
            pass += 1;
            if self.cpu == 0 {
                CONTROL.passes.store(pass, Relaxed);
                lines.pass(self, pass);
            }
            if self.config.barrier {
                io::ring(Doorbell::Pass, self.cpu);
            }
            if pass == passes {
                return;
            }
        }
    }

    /// The write entry, the read entry and the first byte of `page`.
    fn page(&self, page: u64) -> (&'a AtomicU64, &'a AtomicU32, *mut u8) {
        // SAFETY: `page` is in the region; ledger and window cover all of it.
        unsafe {
            let entries = (&*self.write_entries.add(page as usize), &*self.read_entries.add(page as usize));
            (entries.0, entries.1, (WINDOW + page * PAGE) as *mut u8)
        }
    }

    fn write(&self, page: u64) {
        let (entry, _, bytes) = self.page(page);
        let generation = ((entry.load(Relaxed) >> 32) as u32).wrapping_add(1);
        self.take_off(page);
        entry.store(u64::from(generation) << 32 | u64::from(CONTROL.epoch.load(Relaxed)), Relaxed);
        compiler_fence(SeqCst);
        // SAFETY: an aligned word of a page that this vCPU alone writes.
        unsafe { bytes.add(stamp_offset(generation)).cast::<u64>().write_volatile(stamp(page, generation)) };
        self.land();
        bump(&self.control.writes);
    }

    fn read(&self, page: u64) {
        let (_, entry, _) = self.page(page);
        self.take_off(page);
        entry.store(CONTROL.epoch.load(Relaxed).wrapping_add(1), Relaxed);
        compiler_fence(SeqCst);
        self.check(page);
        self.land();
        bump(&self.control.reads);
    }

    /// Compares the page with its write entry: its last stamp, or in a page never written its first word.
    fn check(&self, page: u64) {
        let (entry, _, bytes) = self.page(page);
        let generation = (entry.load(Relaxed) >> 32) as u32;
        let (offset, expected) = match generation {
            0 => (0, 0),
            _ => (stamp_offset(generation), stamp(page, generation)),
        };
        // SAFETY: an aligned word of a page that is mapped, or will be by its page fault.
        if unsafe { bytes.add(offset).cast::<u64>().read_volatile() } != expected {
            bump(&self.control.corrupt);
        }
    }

    /// The processor keeps stores in order, so what counts is that the compiler does.
    fn take_off(&self, page: u64) {
        self.control.in_flight.store(page + 1, Relaxed);
        compiler_fence(SeqCst);
    }

    fn land(&self) {
        compiler_fence(SeqCst);
        self.control.in_flight.store(0, Relaxed);
    }

    /// Checks the whole shard, whether a stop has been asked for or not.
    fn verify(&self) {
        for page in self.first..self.first + self.pages {
            self.read(page);
        }
    }

    fn waited(&self) -> u64 {
        self.pace.as_ref().map_or(0, |pace| pace.waited)
    }

    fn leave_figures(&self) {
        let figures = &FIGURES[self.cpu as usize];
        figures.busy.store(self.busy, Relaxed);
        figures.accesses.store(self.accesses, Relaxed);
        // SAFETY: this vCPU's own.
        let latencies = unsafe { &(*LATENCIES.0.get())[self.cpu as usize] };
        for (figure, permille) in figures.latency.iter().zip([500, 990, 999]) {
            figure.store(latencies.quantile(permille), Relaxed);
        }
        figures.latency[3].store(latencies.largest(), Relaxed);
    }
}

fn stopped() -> bool {
    CONTROL.stop.load(Relaxed) != 0
}

/// Adds one to a counter that one vCPU alone writes.
fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

/// The rate limit of one vCPU.
struct Pace {
    /// Cycles between two accesses.
    interval: u64,
    /// Cycles in a phase, calm and busy by turns, of a load that is not even; else 0.
    phase: u64,
    /// When the next access is due.
    due: u64,
    /// Arrears, in cycles, that are made up for; what is older is forgiven.
    slack: u64,
    /// Cycles spent waiting.
    waited: u64,
}

/// The rate of the mixed workload when none is asked for, in bytes per second, and the length of its phases.
const MIXED_RATE: u64 = 100 << 20;
const PHASE_MS: u64 = 3000;
const SLACK_MS: u64 = 10;

impl Pace {
    /// `None`: flat out.
    fn new(config: &Config, tsc_khz: u64) -> Option<Pace> {
        let uneven = config.rate.is_none() && config.workload == Workload::Mixed;
        let rate = config.rate.unwrap_or(if uneven { MIXED_RATE } else { 0 });
        if rate == 0 || tsc_khz == 0 {
            return None;
        }
        Some(Pace {
            interval: tsc_khz * 1000 * PAGE * u64::from(config.cpus) / rate,
            phase: if uneven { tsc_khz * PHASE_MS } else { 0 },
            due: clock::now(),
            slack: tsc_khz * SLACK_MS,
            waited: 0,
        })
    }

    /// Returns when the next access is due, or the run is to stop.
    fn wait(&mut self) {
        let begin = clock::now();
        let mut now = begin;
        while now < self.due && !stopped() {
            core::hint::spin_loop();
            now = clock::now();
        }
        self.waited += now - begin;
        let interval = match now.checked_div(self.phase) {
            None => self.interval,
            // Half the rate, then three halves of it.
            Some(phase) if phase % 2 == 0 => self.interval * 2,
            Some(_) => self.interval * 2 / 3,
        };
        self.due = (self.due + interval).max(now.saturating_sub(self.slack));
    }
}

/// Which passes get a line: one a second at most or, where seconds are unknown, numbers 1, 2, 4, 8 and so on.
struct Lines {
    last: u64,
}

impl Lines {
    fn new(worker: &Worker) -> Lines {
        Lines { last: if worker.tsc_khz > 0 { clock::now() } else { 0 } }
    }

    fn pass(&mut self, worker: &Worker, pass: u32) {
        let due = match worker.tsc_khz {
            0 => pass.is_power_of_two(),
            khz => clock::now() - self.last >= khz * 1000,
        };
        if due && !worker.config.quiet {
            self.last = clock::now();
            let line = Line::new("pass").number("pass", u64::from(pass));
            line.number("writes", worker.control.writes.load(Relaxed)).end();
        }
    }
}
