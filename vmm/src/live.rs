//! Live dirty memory: closes an epoch after the other and says what happened in each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dirty_track::addr::{BLOCK_SIZE, PAGE_SIZE};
use dirty_track::bitmap::DirtyBitmap;
use dirty_track::fault::{Counts, FaultError};
use dirty_track::rate::{FaultCost, RateError};
use dirty_track::stage2::SecondLevel;
use dirty_track::sys::stats::{StatId, Stats};
use dirty_track::touched::TouchedError;
use dirty_track::tracker::{Guarantees, Harvest, Tracker, TrackerError};
use dirty_track::walk::x86::X86Error;
use serde::{Deserialize, Serialize};

use crate::fault::{RecordReport, Served};
use crate::forecast::{Forecast, Forecaster, Link, Seen};
use crate::host::Mmu;
use crate::ledger::{Agreement, Ledger, LedgerError};
use crate::machine::{Machine, Paused};
use crate::owners::{Owners, Space};
use crate::snapshot::Base;
use crate::working_set::{Watch, WorkingSetConfig, WorkingSetReport};

/// Columns of the picture of guest memory in each [`Epoch`].
pub const COLUMNS: usize = 64;

/// Why an epoch could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The tracker.
    #[error("dirty tracking: {0}")]
    Tracker(#[from] TrackerError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The record of how RAM is mapped.
    #[error("looking how guest memory is mapped: {0}")]
    Record(#[from] FaultError),
    /// The sample.
    #[error("sampling guest memory: {0}")]
    Sample(#[from] RateError),
    /// The working set.
    #[error("--working-set: {0}")]
    WorkingSet(#[from] TouchedError),
    /// The guest's page tables.
    #[error("--owners: {0}")]
    Owners(#[from] X86Error),
}

/// What happened in one epoch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Epoch {
    /// Number, from 1; with another tracker they go on.
    pub epoch: u32,
    /// Seconds from arming to the epoch's end.
    pub at_s: f64,
    /// Its length in seconds.
    pub seconds: f64,
    /// Pages of 4 KiB reported dirty.
    pub dirty_pages: u64,
    /// Those of them that the monitor's devices wrote.
    pub host_pages: u64,
    /// Those of them that are coarse: left writable, so that it is not known whether they were written.
    pub coarse_pages: u64,
    /// Pages that each vCPU wrote, with a tracker that tells them apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpu_pages: Vec<u64>,
    /// Dirty bytes per second.
    pub dirty_bytes_per_s: f64,
    /// Blocks of 2 MiB with a dirty page.
    pub dirty_blocks: u64,
    /// Second-level mappings of 4 KiB, 2 MiB and 1 GiB at the epoch's end, where KVM says so.
    pub pages_4k: Option<u64>,
    /// See `pages_4k`.
    pub pages_2m: Option<u64>,
    /// See `pages_4k`.
    pub pages_1g: Option<u64>,
    /// Bytes of guest RAM in transparent huge pages of the host (AnonHugePages, ShmemPmdMapped) at its end.
    pub host_huge_bytes: Option<u64>,
    /// Page faults that KVM took for the guest in the epoch.
    pub faults: Option<u64>,
    /// Share of the vCPUs' time that their write faults took, in percent: dirty pages times the cost of one
    /// such fault, as measured on this host.
    pub slowdown_percent: Option<f64>,
    /// Microseconds that the harvest took.
    pub harvest_us: f64,
    /// Microseconds that the vCPUs stood still for the boundary.
    pub stall_us: f64,
    /// What follows from the epochs so far.
    #[serde(flatten)]
    pub forecast: Forecast,
    /// What the monitor served in the epoch, where it serves the guest's faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served: Option<Served>,
    /// Address spaces of the guest that map dirty pages, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owners: Option<Vec<Space>>,
    /// What was touched in the interval that ended with this epoch, if one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetReport>,
    /// How the report compares with the guest's own ledger.
    pub ledger: Option<Agreement>,
    /// Guest memory from left to right in [`COLUMNS`] parts: share of dirty pages, 0 to 255, rounded up, so
    /// that 0 means none.
    pub map: Vec<u8>,
}

/// Everything from arming to the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Epochs closed.
    pub epochs: u32,
    /// Seconds from arming to the end of the last epoch.
    pub seconds: f64,
    /// Sum of dirty pages over the epochs.
    pub dirty_pages: u64,
    /// Those of them that were coarse.
    pub coarse_pages: u64,
    /// Different pages that were dirty at least once.
    pub distinct_pages: u64,
    /// Highest rate of an epoch, bytes per second.
    pub peak_bytes_per_s: f64,
    /// Mean rate, bytes per second.
    pub mean_bytes_per_s: f64,
    /// Page faults that KVM took.
    pub faults: u64,
    /// Longest stand-still of the vCPUs, microseconds.
    pub worst_stall_us: f64,
    /// Mean of the epochs' slow-downs, percent.
    pub slowdown_percent: Option<f64>,
    /// What follows from them.
    #[serde(flatten)]
    pub forecast: Forecast,
    /// Epochs that were held against the ledger.
    pub checked: u32,
    /// Pages written by the ledger, over the epochs checked.
    pub wrote: u64,
    /// Pages missed over the epochs checked.
    pub missed: u64,
    /// Pages extra over the epochs checked, `extra_read` included.
    pub extra: u64,
    /// Those of `extra` that the guest had only read.
    pub extra_read: u64,
    /// Those of `extra` that are coarse, or in one unit of report with a page that was written.
    pub extra_coarse: u64,
    /// Pages reported where the guest writes nothing.
    pub stray: u64,
    /// What the monitor served from the machine's start on, where it serves the guest's faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served: Option<Served>,
    /// The record of how RAM is mapped, held against the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record: Option<RecordReport>,
}

struct Counters {
    vm: Option<VmCounters>,
    /// Per vCPU: the statistics and the counter of faults.
    faults: Vec<(Stats, StatId)>,
    last_faults: u64,
}

struct VmCounters {
    stats: Stats,
    pages: [StatId; 3],
}

impl Counters {
    fn new(machine: &Machine) -> Counters {
        let vm = machine.vm_stats().ok().and_then(|stats| {
            let pages = [stats.find("pages_4k")?, stats.find("pages_2m")?, stats.find("pages_1g")?];
            Some(VmCounters { stats, pages })
        });
        let faults = machine.take_vcpu_stats().into_iter();
        let faults = faults.filter_map(|stats| stats.find("pf_taken").map(|id| (stats, id))).collect();
        let mut counters = Counters { vm, faults, last_faults: 0 };
        counters.faults();
        counters
    }

    /// What KVM maps now.
    fn maps(&mut self) -> Option<SecondLevel> {
        let VmCounters { stats, pages } = self.vm.as_mut()?;
        stats.refresh().ok()?;
        let [pages_4k, pages_2m, pages_1g] = pages.map(|id| stats.get(id));
        Some(SecondLevel { pages_4k, pages_2m, pages_1g })
    }

    /// Faults since the last call.
    fn faults(&mut self) -> Option<u64> {
        if self.faults.is_empty() {
            return None;
        }
        let mut sum = 0;
        for (stats, id) in &mut self.faults {
            stats.refresh().ok()?;
            sum += stats.get(*id);
        }
        let since = sum.saturating_sub(self.last_faults);
        self.last_faults = sum;
        Some(since)
    }
}

/// Observes one machine through one tracker.
pub struct Observer {
    machine: Arc<Machine>,
    tracker: Box<dyn Tracker>,
    /// `None`: not asked for, or not announced yet.
    ledger: Option<Ledger>,
    wants_ledger: bool,
    cost: Option<FaultCost>,
    forecaster: Forecaster,
    counters: Counters,
    /// When the epoch began.
    served: Counts,
    owners: Option<Owners>,
    wants_working_set: Option<WorkingSetConfig>,
    watch: Option<Watch>,
    ever: DirtyBitmap,
    /// What was dirty since the last snapshot, or since arming.
    since: Arc<DirtyBitmap>,
    base: Option<Base>,
    /// An epoch is closed without looking how the host backs memory.
    brief: bool,
    first: u32,
    epoch: u32,
    armed: Instant,
    began: Instant,
    totals: Totals,
}

impl Observer {
    /// An observer that will arm `tracker`. With `check_ledger` the guest is the built-in one, and every epoch
    /// is held against its ledger, for which the vCPUs are stopped for a moment at each boundary. Migrations are
    /// foretold for `link`.
    pub fn new(machine: Arc<Machine>, tracker: Box<dyn Tracker>, check_ledger: bool, link: Link) -> Observer {
        let pages = machine.ram().config().size / PAGE_SIZE;
        let counters = Counters::new(&machine);
        let now = Instant::now();
        Observer {
            tracker,
            ledger: None,
            wants_ledger: check_ledger,
            cost: None,
            forecaster: Forecaster::new(machine.cpus(), pages, link),
            counters,
            served: machine.fault().map(|server| server.counts()).unwrap_or_default(),
            owners: None,
            wants_working_set: None,
            watch: None,
            ever: DirtyBitmap::new(pages as usize),
            since: Arc::new(DirtyBitmap::new(pages as usize)),
            base: None,
            brief: false,
            first: 1,
            epoch: 0,
            armed: now,
            began: now,
            totals: Totals::default(),
            machine,
        }
    }

    /// Numbers epochs from `first` on: a guest's ledger knows epochs by their numbers, so they must not come again with
    /// another observer.
    pub fn count_from(&mut self, first: u32) {
        self.first = first;
    }

    /// Number of the epoch that is under way; 0 before it is armed.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Uses `cost` for the slow-down estimate from now on.
    pub fn set_cost(&mut self, cost: FaultCost) {
        self.cost = Some(cost);
    }

    /// Looks from now on which address spaces of the guest map dirty pages. The vCPUs are stopped for a moment at each
    /// boundary.
    pub fn show_owners(&mut self) {
        self.owners = Some(Owners::new(self.machine.physical_bits()));
    }

    /// Looks what is touched from arming on.
    pub fn watch_working_set(&mut self, config: WorkingSetConfig) {
        self.wants_working_set = Some(config);
    }

    /// Begins to track. For a sharp first epoch against the ledger, call it when the guest has announced one.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn arm(&mut self) -> Result<(), LiveError> {
        let machine = Arc::clone(&self.machine);
        machine.wait_for_ram();
        let _still = self.wants_ledger.then(|| machine.pause());
        self.tracker.arm()?;
        self.watch = self.wants_working_set.map(|config| Watch::begin(&machine, config)).transpose()?;
        self.epoch = self.first;
        if self.attach_ledger()?
            && let Some(ledger) = &mut self.ledger
        {
            // A guest that was restored knows epochs of its former life.
            self.epoch = self.epoch.max(ledger.epoch()?.saturating_add(1));
            ledger.begin(self.epoch)?;
        }
        self.armed = Instant::now();
        self.began = self.armed;
        Ok(())
    }

    /// Attaches to the ledger if it has been announced and we have not yet. True: now.
    fn attach_ledger(&mut self) -> Result<bool, LiveError> {
        if self.ledger.is_some() || !self.wants_ledger {
            return Ok(false);
        }
        let Some(control) = self.machine.channel().control() else { return Ok(false) };
        self.ledger = Some(Ledger::attach(Arc::clone(self.machine.ram()), control)?);
        Ok(true)
    }

    /// Closes the epoch and begins the next.
    ///
    /// # Errors
    /// See [`LiveError`]. The pages stay with the tracker, for the next call.
    pub fn close_epoch(&mut self) -> Result<Epoch, LiveError> {
        self.close_epoch_with(false, |_, _| ())
    }

    /// As [`close_epoch`](Observer::close_epoch), and shows the harvest and the epoch's length in seconds to `look`
    /// before it is committed; if `still`, no vCPU runs from the harvest until `look` has seen it.
    ///
    /// # Errors
    /// See [`LiveError`]; nothing was shown then.
    pub fn close_epoch_with(
        &mut self,
        still: bool,
        look: impl FnOnce(&mut Harvest<'_>, f64),
    ) -> Result<Epoch, LiveError> {
        let machine = Arc::clone(&self.machine);
        let boundary = Instant::now();
        let held = still.then(|| machine.pause());
        let stops = self.wants_ledger || self.owners.is_some();
        let still: Option<Paused<'_>> = stops.then(|| machine.pause());
        // The guest has entered the writes of this epoch only if it knew of it from its beginning.
        let just_attached = self.attach_ledger()?;
        let unit = self.tracker.guarantees().granularity;
        let harvesting = Instant::now();
        let mut harvest = self.tracker.harvest()?;
        let ended = Instant::now();
        let mut agreement = None;
        if let Some(ledger) = &mut self.ledger {
            if !just_attached {
                agreement = Some(ledger.check(&harvest, self.epoch, unit)?);
            }
            ledger.begin(self.epoch + 1)?;
        }
        let registers = still.as_ref().filter(|_| self.owners.is_some()).map(Paused::system_registers);
        drop(still);
        let stall = if stops { boundary.elapsed() } else { Duration::ZERO };

        let seconds = ended.duration_since(self.began).as_secs_f64();
        let dirty_pages = harvest.count();
        let host_pages = harvest.host_count();
        let coarse_pages = harvest.coarse_count();
        let vcpu_pages: Vec<u64> = (0..harvest.vcpus()).map(|vcpu| harvest.count_by(vcpu)).collect();
        // Coarse pages took no fault.
        let write_faults = dirty_pages.saturating_sub(host_pages + coarse_pages);
        let seen = Seen { seconds, pages: dirty_pages, vcpu_pages: &vcpu_pages, faults: write_faults };
        // An epoch of no length tells nothing.
        let _ =
            self.forecaster.add(seen, harvest.slots().iter().flat_map(|slot| slot.words().iter().copied()));
        let owners = match (&mut self.owners, registers) {
            (Some(owners), Some(registers)) => {
                let dirty: Vec<_> = harvest.runs().collect();
                Some(owners.look(machine.ram().mem(), &registers, &dirty)?)
            }
            _ => None,
        };
        let dirty_blocks = harvest.dirty_blocks();
        let map = picture(&harvest);
        remember(&self.ever, &harvest);
        remember(&self.since, &harvest);
        look(&mut harvest, seconds);
        let stall = if held.is_some() { boundary.elapsed() } else { stall };
        drop(held);
        harvest.commit();

        let maps = self.counters.maps();
        let faults = self.counters.faults();
        let slowdown_percent = self.cost.map(|cost| {
            let available = seconds * 1e9 * machine.cpus() as f64;
            (write_faults as f64 * cost.ns / available * 100.0).min(100.0)
        });
        let epoch = Epoch {
            epoch: self.epoch,
            at_s: ended.duration_since(self.armed).as_secs_f64(),
            seconds,
            dirty_pages,
            host_pages,
            coarse_pages,
            vcpu_pages,
            dirty_bytes_per_s: (dirty_pages * PAGE_SIZE) as f64 / seconds,
            dirty_blocks,
            pages_4k: maps.map(|maps| maps.pages_4k),
            pages_2m: maps.map(|maps| maps.pages_2m),
            pages_1g: maps.map(|maps| maps.pages_1g),
            host_huge_bytes: (!self.brief)
                .then(|| machine.ram().host_pages().ok())
                .flatten()
                .map(|pages| pages.thp),
            faults,
            slowdown_percent,
            harvest_us: micros(ended - harvesting),
            stall_us: micros(stall),
            forecast: self.forecaster.forecast(self.cost),
            served: self.served(),
            owners,
            working_set: self.watch.as_mut().map(Watch::look).transpose()?.flatten(),
            ledger: agreement,
            map,
        };
        self.epoch += 1;
        self.began = ended;
        self.totals.add(&epoch);
        Ok(epoch)
    }

    /// What was served since the last call.
    fn served(&mut self) -> Option<Served> {
        let server = self.machine.fault()?;
        let counts = server.counts();
        let since = counts.since(&self.served);
        self.served = counts;
        Some(Served::new(&since, server.failure().map(|failure| failure.to_string())))
    }

    /// Holds the record of how RAM is mapped against the kernel, with the vCPUs at a stand-still. Nothing to do where
    /// the kernel handles faults, or nobody any more.
    ///
    /// # Errors
    /// [`LiveError::Record`].
    pub fn check_record(&mut self) -> Result<(), LiveError> {
        let machine = Arc::clone(&self.machine);
        let Some(server) = machine.fault() else { return Ok(()) };
        let _still = machine.pause();
        if machine.is_stopped() {
            return Ok(());
        }
        let once = matches!(Mmu::of(machine.module()), Mmu::Ept | Mmu::Npt);
        self.totals.record = Some(RecordReport::new(server, self.counters.maps(), once)?);
        self.totals.served = Some(Served::new(&server.counts(), None));
        Ok(())
    }

    /// The totals up to the last epoch closed.
    pub fn totals(&self) -> Totals {
        let mut totals = self.totals.clone();
        totals.distinct_pages = self.ever.count() as u64;
        if totals.seconds > 0.0 {
            totals.mean_bytes_per_s = (totals.dirty_pages * PAGE_SIZE) as f64 / totals.seconds;
        }
        totals
    }

    /// What the tracker's harvests can be relied on for.
    pub fn guarantees(&self) -> Guarantees {
        self.tracker.guarantees()
    }

    /// Whether epochs are closed from now on without [`Epoch::host_huge_bytes`], which takes a look at every page. Where an epoch is
    /// closed to make the next one short, that would make it long.
    pub fn be_brief(&mut self, brief: bool) {
        self.brief = brief;
    }

    /// The snapshot that memory was the same as when tracking began, or that was taken since.
    pub fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// What was dirty since then, the epoch under way not counted: the pages of the memslots one after the other.
    pub fn since_base(&self) -> &Arc<DirtyBitmap> {
        &self.since
    }

    /// From the end of the last epoch on it is `base` that memory differs from.
    pub fn set_base(&mut self, base: Base) {
        self.base = Some(base);
        self.since.drain(|_, _| {});
    }

    /// The tracker's name.
    pub fn tracker_name(&self) -> &'static str {
        self.tracker.name()
    }

    /// The guest's ledger, once attached.
    pub fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// Whether the built-in guest's workload runs.
    pub fn guest_has_begun(&self) -> bool {
        self.machine.channel().begun().read().is_ok()
    }

    /// Tells the built-in guest to end, if it has announced itself. Whether it was told.
    pub fn ask_guest_to_stop(&self) -> bool {
        // A guest that does not hear is stopped anyway.
        self.ledger.as_ref().is_some_and(|ledger| ledger.stop().is_ok())
    }

    /// Stops tracking.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn disarm(&mut self) -> Result<(), LiveError> {
        Ok(self.tracker.disarm()?)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let faults = std::mem::take(&mut self.counters.faults);
        self.machine.give_vcpu_stats(faults.into_iter().map(|(stats, _)| stats).collect());
    }
}

impl Totals {
    fn add(&mut self, epoch: &Epoch) {
        self.epochs += 1;
        self.seconds = epoch.at_s;
        self.dirty_pages += epoch.dirty_pages;
        self.coarse_pages += epoch.coarse_pages;
        self.peak_bytes_per_s = self.peak_bytes_per_s.max(epoch.dirty_bytes_per_s);
        self.faults += epoch.faults.unwrap_or(0);
        self.forecast = epoch.forecast.clone();
        self.worst_stall_us = self.worst_stall_us.max(epoch.stall_us);
        if let Some(percent) = epoch.slowdown_percent {
            let before = self.slowdown_percent.unwrap_or(percent);
            self.slowdown_percent = Some(before + (percent - before) / f64::from(self.epochs));
        }
        if let Some(agreement) = &epoch.ledger {
            self.checked += 1;
            self.wrote += agreement.wrote;
            self.missed += agreement.missed;
            self.extra += agreement.extra;
            self.extra_read += agreement.extra_read;
            self.extra_coarse += agreement.extra_coarse;
            self.stray += agreement.stray;
        }
    }

    /// Whether the ledger contradicts the tracker: a page missed, or one reported that the guest neither wrote
    /// nor read and that no guarantee covers. Or the kernel contradicts the record of how RAM is mapped.
    pub fn contradicted(&self) -> bool {
        self.record.as_ref().is_some_and(RecordReport::contradicted)
            || self.missed > 0
            || self.extra > self.extra_read + self.extra_coarse
            || self.stray > 0
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

/// Blocks in `bytes` of RAM.
pub fn blocks(bytes: u64) -> u64 {
    bytes / BLOCK_SIZE
}

/// Share of dirty pages in each of [`COLUMNS`] equal parts of RAM.
fn picture(harvest: &Harvest<'_>) -> Vec<u8> {
    let total: u64 = harvest.slots().iter().map(|slot| slot.frames().pages).sum();
    let mut dirty = [0u64; COLUMNS];
    let column = |page: u64| (page * COLUMNS as u64 / total.max(1)) as usize;
    let mut before = 0;
    for slot in harvest.slots() {
        let first = slot.frames().start.0;
        for run in slot.runs() {
            let mut page = before + run.start.0 - first;
            let end = page + run.pages;
            while page < end {
                let col = column(page);
                let next = ((col as u64 + 1) * total).div_ceil(COLUMNS as u64).min(end);
                dirty[col] += next - page;
                page = next;
            }
        }
        before += slot.frames().pages;
    }
    let pages = (total / COLUMNS as u64).max(1);
    dirty.iter().map(|count| (count * 255).div_ceil(pages).min(255) as u8).collect()
}

/// Adds a harvest to the pages that were ever dirty.
fn remember(ever: &DirtyBitmap, harvest: &Harvest<'_>) {
    let mut word = 0;
    for slot in harvest.slots() {
        for bits in slot.words() {
            ever.merge_word(word, *bits);
            word += 1;
        }
    }
}
