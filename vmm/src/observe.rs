//! The thread that observes a running machine: it closes one epoch after the other, or looks at the sample once more,
//! shows and posts what it found, writes the dump if there is one, and obeys.

use std::io::{self, Write};
use std::panic;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dirty_track::log::End;
use dirty_track::tracker::{Kind, TrackerError};
use tokio::sync::oneshot;
use vmm_sys_util::eventfd::EventFd;

use crate::board::{Board, DumpStatus, Posted};
use crate::cost;
use crate::devices::virtio::disk::DiskError;
use crate::dump::{self, Dump, DumpConfig, DumpError};
use crate::forecast::Link;
use crate::live::{Epoch, LiveError, Observer, Totals};
use crate::machine::Machine;
use crate::memory::Faults;
use crate::migrate::drive::Drive;
use crate::migrate::lane::Cancel;
use crate::migrate::report::{MigrationReport, Phase};
use crate::migrate::{self, MigrateConfig, MigrateError};
use crate::sampled::{Looker, Looks};
use crate::show::Show;
use crate::snapshot::{self, Base, Shape, SnapshotError, SnapshotReport};
use crate::track::{SAMPLED, TrackConfig};
use crate::working_set::WorkingSetConfig;

/// Whom observers are made for, and what they look at.
pub(crate) struct Observers {
    pub(crate) machine: Arc<Machine>,
    pub(crate) fault: Faults,
    pub(crate) link: Link,
    /// Hold each epoch against the built-in guest's ledger.
    pub(crate) ledger: bool,
    pub(crate) owners: bool,
    pub(crate) working_set: Option<WorkingSetConfig>,
    /// What goes into a snapshot.
    pub(crate) shape: Shape,
    /// The snapshot that the machine goes on from, of which a first diff can be made.
    pub(crate) base: Option<Base>,
}

/// By what is observed.
pub(crate) struct Eye {
    /// Name of the tracker.
    pub(crate) name: &'static str,
    /// Why it was chosen, if nobody said which.
    pub(crate) chosen_because: Option<&'static str>,
    kind: Kind,
    track: TrackConfig,
    by: By,
}

enum By {
    /// Every epoch, by a tracker.
    Tracker(Box<Observer>),
    /// A sample of so many pages of each GiB, looked at from the beginning on.
    Sample(u64, Option<Looker>),
    /// Nothing.
    Nothing,
}

impl Observers {
    /// What observes by `track`.
    pub(crate) fn eye(&self, track: TrackConfig) -> Result<Eye, TrackerError> {
        let machine = &self.machine;
        let (kind, chosen_because) = track.choose(&machine.tracking_facts(), self.fault);
        let by = match (kind, track.sampled) {
            (Kind::None, None) => By::Nothing,
            (Kind::None, Some(per_gib)) => By::Sample(per_gib, None),
            (kind, _) => {
                let tracker = machine.tracker(kind, &track)?;
                let mut observer = Observer::new(Arc::clone(machine), tracker, self.ledger, self.link);
                if self.owners {
                    observer.show_owners();
                }
                if let Some(config) = self.working_set {
                    observer.watch_working_set(config);
                }
                By::Tracker(Box::new(observer))
            }
        };
        let name = if track.sampled.is_some() { SAMPLED } else { kind.name() };
        Ok(Eye { name, chosen_because, kind, track, by })
    }
}

/// How it is observed.
pub(crate) struct Plan {
    /// The built-in guest runs, and the first epoch begins with its workload.
    pub(crate) builtin: bool,
    pub(crate) epoch: Duration,
    /// Measure what a fault costs the guest.
    pub(crate) wants_cost: bool,
    /// The vCPUs are held until memory is tracked: nothing that they write is missed.
    pub(crate) held: bool,
}

/// Where a dump goes.
pub(crate) trait Sink: Write + Send {
    /// All of it was written.
    fn complete(self: Box<Self>) -> io::Result<()>;
}

/// What the observer is told to do.
pub(crate) enum Command {
    /// To observe by this, in epochs of this length (unchanged if none).
    Track(TrackConfig, Option<Duration>, Reply<()>),
    /// To begin a dump.
    Dump(Box<dyn Sink>, DumpConfig, Reply<()>),
    /// To end it with an epoch that is cut short.
    EndDump(Reply<DumpStatus>),
    /// To write a snapshot.
    Snapshot(snapshot::Request, Reply<SnapshotReport>),
    /// To begin a migration.
    Migrate(Box<MigrateConfig>, Cancel, Reply<()>),
    /// To run the guest here after all, of which it is not known whether it was taken.
    Reclaim(Reply<()>),
    /// To close the last epoch, and end.
    End,
}

/// Where the answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// Why a command was not obeyed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("a dump is being written: end it first")]
    Dumping,
    #[error("no dump is being written")]
    NotDumping,
    #[error("nothing is tracked: start a tracker first")]
    NotTracking,
    #[error("the guest's workload has not begun: try again in a moment")]
    NotBegun,
    #[error("cannot track dirty memory: {0}")]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Live(#[from] LiveError),
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error("the log cannot be completed: {0}")]
    Complete(#[source] io::Error),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("the machine is being migrated: cancel that first")]
    Migrating,
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    #[error("the guest is this side's: there is nothing to reclaim")]
    NotInDoubt,
    #[error(
        "the guest was given away, and it is in doubt whether it runs there: if it does not, resume it here first"
    )]
    InDoubt,
    #[error("the machine has gone elsewhere")]
    Gone,
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What was observed.
pub(crate) struct Observed {
    /// With a tracker.
    pub(crate) totals: Option<Totals>,
    /// With a sample.
    pub(crate) looks: Option<Looks>,
    /// The guest was told to end, and is going to print its results.
    pub(crate) told: bool,
    pub(crate) show: Show,
    pub(crate) cost_ns: Option<f64>,
    pub(crate) failure: Option<LiveError>,
}

/// An observer's thread.
pub(crate) struct Observing {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<Observed>,
}

/// The observer formats text and calls the tracker, none of it deep.
const STACK: usize = 256 << 10;

impl Observing {
    /// Begins, and obeys `orders`, whose other end is `commands`. `failed` is written to when observing ends by an error.
    pub(crate) fn start(
        (commands, orders): (mpsc::Sender<Command>, mpsc::Receiver<Command>),
        observers: Observers,
        eye: Eye,
        show: Show,
        board: Board,
        plan: Plan,
        failed: EventFd,
    ) -> io::Result<Observing> {
        let body = move || {
            let mut watch = Watch {
                observers,
                eye,
                show,
                board,
                plan,
                orders,
                looks: None,
                cost_ns: None,
                dump: None,
                next_epoch: 1,
            };
            let failure = watch.run().err();
            if failure.is_some() {
                // Only when its counter is full, and then it is readable.
                let _ = failed.write(1);
            }
            let (told, totals) = match &watch.eye.by {
                By::Tracker(observer) => (observer.ask_guest_to_stop(), Some(observer.totals())),
                By::Sample(..) | By::Nothing => (false, None),
            };
            Observed { totals, looks: watch.looks, told, show: watch.show, cost_ns: watch.cost_ns, failure }
        };
        let thread = thread::Builder::new().name("observer".into()).stack_size(STACK).spawn(body)?;
        Ok(Observing { commands, thread })
    }

    /// Closes the last epoch, for which `machine` must still stand, and tells the guest to end. When whoever reads
    /// a dump has not taken the end of it after a while, `give_up` is to make sure that nobody waits for that. A guest that
    /// waits for pages which do not come is stopped then: KVM waits for its vCPUs whenever a memslot changes.
    pub(crate) fn finish(self, machine: &Machine, give_up: impl FnOnce()) -> Observed {
        // An observer that failed hears nothing any more.
        let _ = self.commands.send(Command::End);
        let mut before = served(machine);
        let mut give_up = Some(give_up);
        while !self.ends_within(FOR_READERS) {
            if let Some(give_up) = give_up.take() {
                give_up();
            }
            // A slow host is not the reason to give up a guest; that nothing comes any more is.
            let now = served(machine);
            let waits = machine.fault().is_some_and(|server| server.counts().waiting > 0);
            if waits && now == before {
                machine.give_up("the guest waits for pages that do not come");
                break;
            }
            before = now;
        }
        self.thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    }

    fn ends_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        self.thread.is_finished()
    }
}

/// How many pages the guest was given so far, or allowed to write.
fn served(machine: &Machine) -> u64 {
    machine.fault().map_or(0, |server| {
        let counts = server.counts();
        counts.installed + counts.opened
    })
}

/// How long the end of a dump waits for who reads it, and that of a guest for its pages.
const FOR_READERS: Duration = Duration::from_secs(5);

/// The observer.
struct Watch {
    observers: Observers,
    eye: Eye,
    show: Show,
    board: Board,
    plan: Plan,
    orders: mpsc::Receiver<Command>,
    looks: Option<Looks>,
    cost_ns: Option<f64>,
    dump: Option<Dump<Counted>>,
    /// Number that the next observer begins with.
    next_epoch: u32,
}

/// Why a wait ended.
enum Wait {
    Time,
    Command(Command),
    Over,
}

impl Watch {
    /// An epoch after the other, until it is over.
    fn run(&mut self) -> Result<(), LiveError> {
        if self.plan.builtin
            && !self.plan.held
            && !matches!(self.eye.by, By::Nothing)
            && !self.wait_for_workload()
        {
            return Ok(());
        }
        self.begin()?;
        let mut deadline = Instant::now() + self.epoch_length();
        loop {
            match self.wait(deadline) {
                Wait::Over => {
                    self.close(true)?;
                    return match &mut self.eye.by {
                        By::Tracker(observer) => observer.check_record(),
                        By::Sample(..) | By::Nothing => Ok(()),
                    };
                }
                Wait::Time => self.close(false)?,
                Wait::Command(command) => self.obey(command)?,
            }
            // From now, not from the last deadline: a harvest that is late must not be followed by a hasty
            // one, because harvests in a row starve the guest.
            deadline = Instant::now() + self.epoch_length();
        }
    }

    /// Begins to observe by a new eye.
    fn begin(&mut self) -> Result<(), LiveError> {
        match &mut self.eye.by {
            By::Tracker(observer) => {
                observer.count_from(self.next_epoch);
                observer.arm()?;
                if let Some(base) = self.observers.base.take() {
                    observer.set_base(base);
                }
                if std::mem::take(&mut self.plan.held) {
                    self.observers.machine.release();
                }
                if self.plan.wants_cost
                    && let Ok(Some(cost)) = cost::measure(self.eye.kind, &self.eye.track)
                {
                    self.cost_ns = Some(cost.ns);
                    observer.set_cost(cost);
                }
            }
            By::Sample(per_gib, looker) => {
                *looker = Some(Looker::new(Arc::clone(&self.observers.machine), *per_gib)?);
                self.looks = Some(Looks::default());
            }
            By::Nothing => {}
        }
        if std::mem::take(&mut self.plan.held) {
            self.observers.machine.release();
        }
        let (tracker, armed) = (self.eye.name, !matches!(self.eye.by, By::Nothing));
        let epoch_s = self.plan.epoch.as_secs_f64();
        self.board.post(|posted| (posted.tracker, posted.armed, posted.epoch_s) = (tracker, armed, epoch_s));
        Ok(())
    }

    fn epoch_length(&self) -> Duration {
        match &self.dump {
            Some(dump) if dump.config().interval_ms > 0 => Duration::from_millis(dump.config().interval_ms),
            _ => self.plan.epoch,
        }
    }

    fn wait(&self, until: Instant) -> Wait {
        match self.orders.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Command::End) | Err(mpsc::RecvTimeoutError::Disconnected) => Wait::Over,
            Ok(command) => Wait::Command(command),
            Err(mpsc::RecvTimeoutError::Timeout) => Wait::Time,
        }
    }

    /// Closes the epoch, which may be the last one: that is cut short.
    fn close(&mut self, last: bool) -> Result<(), LiveError> {
        match &mut self.eye.by {
            By::Tracker(observer) => {
                let ram = Arc::clone(self.observers.machine.ram());
                let dump = &mut self.dump;
                let ends = dump.as_ref().is_some_and(|dump| last || dump.is_at_last());
                let still = ends && dump.as_ref().is_some_and(|dump| dump.config().pages);
                let (mut written, mut ranges) = (Ok(()), Vec::new());
                let is_read = self.board.is_read();
                let epoch = observer.close_epoch_with(still, |harvest, seconds| {
                    if is_read {
                        ranges.extend(harvest.slots().iter().flat_map(dump::spans));
                    }
                    if let Some(dump) = dump {
                        written = dump.epoch(harvest, &ram, seconds);
                    }
                })?;
                // A sliver of an epoch says nothing about rates.
                if !last || epoch.seconds * 10.0 > self.plan.epoch.as_secs_f64() {
                    self.show.epoch(&epoch);
                }
                if is_read {
                    // It counts all of memory.
                    let totals = observer.totals();
                    self.board.post(|posted| {
                        posted.last = Some(Arc::new(epoch));
                        posted.ranges = Arc::new(ranges);
                        posted.totals = Some(Arc::new(totals));
                    });
                }
                self.after_epoch(written, ends);
            }
            By::Sample(_, Some(looker)) if !last => {
                let look = looker.look()?;
                let looks = self.looks.get_or_insert_default();
                looks.add(&look);
                let looks = *looks;
                self.show.look(&look);
                self.board.post(|posted| (posted.look, posted.looks) = (Some(look), Some(looks)));
            }
            By::Sample(..) | By::Nothing => {}
        }
        Ok(())
    }

    /// Looks after the dump, whose epoch was `written` and that may end now.
    fn after_epoch(&mut self, written: Result<(), DumpError>, ends: bool) {
        let Some(dump) = self.dump.take() else { return };
        let so_far = (dump.so_far(), dump.bytes());
        let status = match written {
            Ok(()) if ends => complete(dump).map(|(end, bytes)| DumpStatus::new(false, &end, bytes)),
            Ok(()) => {
                self.dump = Some(dump);
                Ok(DumpStatus::new(true, &so_far.0, so_far.1))
            }
            Err(error) => Err(error.into()),
        };
        let status = status.unwrap_or_else(|error: Refusal| DumpStatus {
            error: Some(error.to_string()),
            ..DumpStatus::new(false, &so_far.0, so_far.1)
        });
        self.board.post(|posted| posted.dump = Some(status));
    }

    /// Does as it is told. An asker who has gone needs no answer.
    fn obey(&mut self, command: Command) -> Result<(), LiveError> {
        match command {
            Command::Track(track, epoch, reply) => {
                let outcome = self.track(track, epoch);
                let _ = reply.send(outcome);
            }
            Command::Dump(sink, config, reply) => {
                let full = config.full;
                let outcome = self.begin_dump(sink, config);
                let begun = outcome.is_ok();
                // Before much is written: who asked has to read it.
                let _ = reply.send(outcome);
                if begun && full {
                    let written = self.dump.as_mut().map(|dump| dump.all(self.observers.machine.ram()));
                    self.after_epoch(written.unwrap_or(Ok(())), false);
                }
            }
            Command::EndDump(reply) => {
                if self.dump.is_none() {
                    let _ = reply.send(Err(Refusal::NotDumping));
                    return Ok(());
                }
                self.close(true)?;
                let _ = reply.send(Ok(self.board.posted().dump.clone().unwrap_or_default()));
            }
            Command::Snapshot(request, reply) => {
                let outcome = self.snapshot(&request);
                let _ = reply.send(outcome);
            }
            Command::Migrate(config, cancel, reply) => self.migrate(&config, &cancel, reply),
            Command::Reclaim(reply) => {
                let outcome = self.reclaim();
                let _ = reply.send(outcome);
            }
            Command::End => {}
        }
        Ok(())
    }

    /// Has the machine go elsewhere, and answers when it is on its way.
    fn migrate(&mut self, config: &MigrateConfig, cancel: &Cancel, reply: Reply<()>) {
        let began = Instant::now();
        let before = self.board.posted().migration.as_ref().map(|report| report.phase);
        let By::Tracker(observer) = &mut self.eye.by else {
            let _ = reply.send(Err(Refusal::NotTracking));
            return;
        };
        // Whatever the server saw when it was asked: a guest is given away once.
        let refusal = match before {
            Some(Phase::InDoubt) => Some(Refusal::InDoubt),
            Some(Phase::Completed) => Some(Refusal::Gone),
            _ if self.dump.is_some() => Some(Refusal::Dumping),
            _ => None,
        };
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(refusal));
            return;
        }
        let Watch { board, show, observers, .. } = self;
        let machine = &observers.machine;
        let report = MigrationReport {
            to: config.to.to_string(),
            connections: config.connections,
            ..MigrationReport::default()
        };
        let mut tell =
            |report: &MigrationReport| board.post(|posted| posted.migration = Some(Arc::new(report.clone())));
        tell(&report);
        let copying =
            migrate::drive::begin(observer, self.eye.name, machine, &observers.shape, config, cancel);
        let copying = match copying {
            Ok(copying) => copying,
            Err(error) => {
                let (phase, error) = match cancel.is_cancelled() {
                    true => (Phase::Cancelled, MigrateError::Cancelled),
                    false => (Phase::Failed, error),
                };
                let seconds = began.elapsed().as_secs_f64();
                tell(&MigrationReport { phase, seconds, error: Some(error.to_string()), ..report });
                let _ = reply.send(Err(error.into()));
                return;
            }
        };
        let _ = reply.send(Ok(()));
        let report = MigrationReport { connections: copying.connections(), ..report };
        let drive = Drive {
            observer,
            machine,
            config,
            cancel,
            tell: &mut tell,
            show: &mut |epoch| show.epoch(epoch),
            report,
            began,
            brake: None,
            shadow: None,
        };
        let report = drive.run(copying);
        show.migrated(&report);
        if report.phase == Phase::Completed {
            machine.gone();
        }
    }

    fn reclaim(&mut self) -> Result<(), Refusal> {
        let posted = self.board.posted();
        let in_doubt = |report: &&Arc<MigrationReport>| report.phase == Phase::InDoubt;
        let Some(report) = posted.migration.as_ref().filter(in_doubt) else {
            return Err(Refusal::NotInDoubt);
        };
        // If somebody else has them, it runs there.
        self.observers.machine.take_disks()?;
        let report = MigrationReport { phase: Phase::Failed, ..(**report).clone() };
        self.board.post(|posted| posted.migration = Some(Arc::new(report)));
        self.observers.machine.release();
        Ok(())
    }

    fn track(&mut self, track: TrackConfig, epoch: Option<Duration>) -> Result<(), Refusal> {
        if self.dump.is_some() {
            return Err(Refusal::Dumping);
        }
        // The one before gives up what it has: a memslot has one log, and memory one userfaultfd.
        if let By::Tracker(observer) = &mut self.eye.by {
            observer.disarm()?;
            self.next_epoch = observer.epoch() + 1;
        }
        // If the new one cannot be had there is none, and that is what is told.
        self.eye.by = By::Nothing;
        self.board.post(|posted| {
            // Whose the guest is does not change by it.
            let migration = posted.migration.take();
            *posted = Posted { tracker: Kind::None.name(), migration, ..Posted::default() };
        });
        self.eye = self.observers.eye(track)?;
        self.plan.epoch = epoch.unwrap_or(self.plan.epoch);
        self.show.track(self.eye.name, self.eye.chosen_because);
        if let Err(error) = self.begin() {
            self.eye.by = By::Nothing;
            return Err(error.into());
        }
        Ok(())
    }

    fn begin_dump(&mut self, sink: Box<dyn Sink>, config: DumpConfig) -> Result<(), Refusal> {
        if self.dump.is_some() {
            return Err(Refusal::Dumping);
        }
        if !matches!(self.eye.by, By::Tracker(_)) {
            return Err(Refusal::NotTracking);
        }
        // The log's first epoch begins here.
        self.close(false)?;
        let By::Tracker(observer) = &self.eye.by else { return Err(Refusal::NotTracking) };
        let ram = self.observers.machine.ram();
        let out = Counted { sink, bytes: 0 };
        let dump = Dump::begin(out, ram, self.eye.name, observer.guarantees(), config)?;
        let status = DumpStatus::new(true, &dump.so_far(), 0);
        self.board.post(|posted| posted.dump = Some(status));
        self.dump = Some(dump);
        Ok(())
    }

    fn snapshot(&mut self, request: &snapshot::Request) -> Result<SnapshotReport, Refusal> {
        if self.dump.is_some() {
            return Err(Refusal::Dumping);
        }
        let Observers { machine, shape, .. } = &self.observers;
        let observer = match &mut self.eye.by {
            By::Tracker(observer) => Some(&mut **observer),
            By::Sample(..) | By::Nothing => None,
        };
        let show = &mut self.show;
        let mut show = |epoch: &Epoch| show.epoch(epoch);
        Ok(snapshot::take(machine, shape, observer, self.eye.kind, request, &mut show)?)
    }

    /// Waits until the built-in guest's workload begins, so that the first epoch begins with it. A guest that does
    /// not get there is observed anyway after a while, to be seen as well. False: the run is over.
    fn wait_for_workload(&mut self) -> bool {
        let begin = Instant::now();
        let begun = |watch: &Watch| watch.observers.machine.channel().begun().read().is_ok();
        let mut said = false;
        while !begun(self) && begin.elapsed() < WORKLOAD_PATIENCE {
            match self.wait(Instant::now() + Duration::from_millis(1)) {
                Wait::Time => {}
                Wait::Over => return false,
                Wait::Command(command) => refuse(command),
            }
            if !said && begin.elapsed() > Duration::from_millis(300) {
                said = true;
                self.show.waiting();
            }
        }
        true
    }
}

/// Touching all of a large guest's memory takes its time.
const WORKLOAD_PATIENCE: Duration = Duration::from_secs(120);

/// Answers that it is too early.
fn refuse(command: Command) {
    match command {
        Command::Track(_, _, reply) | Command::Dump(_, _, reply) => drop(reply.send(Err(Refusal::NotBegun))),
        Command::EndDump(reply) => drop(reply.send(Err(Refusal::NotDumping))),
        Command::Snapshot(_, reply) => drop(reply.send(Err(Refusal::NotBegun))),
        Command::Migrate(_, _, reply) => drop(reply.send(Err(Refusal::NotBegun))),
        Command::Reclaim(reply) => drop(reply.send(Err(Refusal::NotInDoubt))),
        Command::End => {}
    }
}

/// A sink that counts.
struct Counted {
    sink: Box<dyn Sink>,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl Dump<Counted> {
    fn bytes(&self) -> u64 {
        self.out().bytes
    }
}

/// Ends the log, and says how much it is.
fn complete(dump: Dump<Counted>) -> Result<(End, u64), Refusal> {
    let (out, end) = dump.finish()?;
    let Counted { sink, bytes } = out;
    sink.complete().map_err(Refusal::Complete)?;
    Ok((end, bytes))
}
