//! The way of a migration at the source, from the first round to the last note, by who observes the machine: it has the
//! tracker.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dirty_track::log::Span;
use dirty_track::refine::{Shadow, refine};
use dirty_track::tracker::Harvest;

use super::lane::Cancel;
use super::note::NoteError;
use super::report::{MigrationReport, Phase};
use super::rounds::{Next, Rounds};
use super::source::{Copying, Gone, Sent};
use super::{MigrateConfig, MigrateError, spans};
use crate::brake::Brake;
use crate::dump;
use crate::live::{Epoch, Observer};
use crate::machine::Machine;
use crate::memory::{self, Ram};
use crate::snapshot::Shape;
use crate::state::MsrNumbers;

/// A migration under way.
pub(crate) struct Drive<'a> {
    pub(crate) observer: &'a mut Observer,
    pub(crate) machine: &'a Arc<Machine>,
    pub(crate) config: &'a MigrateConfig,
    pub(crate) cancel: &'a Cancel,
    /// Told of each step.
    pub(crate) tell: &'a mut (dyn FnMut(&MigrationReport) + Send),
    /// Shown each epoch.
    pub(crate) show: &'a mut dyn FnMut(&Epoch),
    pub(crate) report: MigrationReport,
    pub(crate) began: Instant,
    /// What was sent of pages that may have been written, or not: begins with `None`.
    pub(crate) shadow: Option<Mutex<Shadow>>,
    /// Holds the guest back if need be.
    pub(crate) brake: Option<Brake>,
}

/// Begins one: the destination has been asked, and waits for memory.
pub(crate) fn begin(
    observer: &Observer,
    tracker: &'static str,
    machine: &Machine,
    shape: &Shape,
    config: &MigrateConfig,
    cancel: &Cancel,
) -> Result<Copying, MigrateError> {
    Copying::begin(config, shape, machine.ram(), (tracker, observer.guarantees()), cancel)
}

impl Drive<'_> {
    /// Sees it through. Unless it says that it is completed, or in doubt, the guest runs on.
    pub(crate) fn run(mut self, copying: Copying) -> MigrationReport {
        // A look at how the host backs memory would make each round longer.
        self.observer.be_brief(true);
        let outcome = self.precopy(copying);
        self.observer.be_brief(false);
        self.brake = None;
        let report = &mut self.report;
        match outcome {
            Ok(()) => {}
            Err(MigrateError::Cancelled) => report.phase = Phase::Cancelled,
            Err(error) => {
                report.phase = if self.cancel.is_cancelled() { Phase::Cancelled } else { Phase::Failed };
                report.error = Some(error.to_string());
            }
        }
        report.seconds = self.began.elapsed().as_secs_f64();
        (self.tell)(report);
        self.report
    }

    /// Closes an epoch, and returns what was written in it, and how much by each vCPU if that is known.
    fn owed(&mut self) -> Result<(Vec<Span>, Vec<u64>), MigrateError> {
        let mut runs = Vec::new();
        let (ram, shadow) = (self.machine.ram(), &mut self.shadow);
        let mut refined = Ok(());
        let epoch = self.observer.close_epoch_with(false, |harvest, _| {
            if harvest.coarse_count() > 0 && shadow.is_none() && has_room(ram) {
                let frames = harvest.slots().iter().map(|slot| slot.frames());
                *shadow = Some(Mutex::new(Shadow::new(frames)));
            }
            refined = refined_by(harvest, ram, shadow);
            runs.extend(harvest.slots().iter().flat_map(dump::spans));
        });
        refined?;
        let epoch = epoch.map_err(|error| MigrateError::Machine(error.to_string()))?;
        (self.show)(&epoch);
        Ok((runs, epoch.vcpu_pages))
    }

    /// Sends `runs` in parts, with an epoch after each: what is written before its turn comes goes with it, and is not owed.
    /// Returns what was sent, what is owed then, and how much each vCPU wrote.
    fn round(
        &mut self,
        copying: &mut Copying,
        runs: &[Span],
    ) -> Result<(Sent, Vec<Span>, Vec<u64>), MigrateError> {
        let ram = Arc::clone(self.machine.ram());
        let (mut total, mut owed, mut written_by) = (Sent::default(), Vec::new(), Vec::new());
        let mut part = runs.to_vec();
        loop {
            // What may have been written is compared with what was sent, which takes too long to be done often.
            let most = if self.shadow.is_none() { PART_PAGES } else { u64::MAX };
            let rest = spans::split(&mut part, most);
            let sent = copying.send(&ram, &part, self.shadow.as_ref())?;
            self.sent(&sent);
            total.add(&sent);
            let (written, by) = self.owed()?;
            owed.extend(spans::without(&written, &rest));
            written_by.resize(by.len(), 0);
            written_by.iter_mut().zip(by).for_each(|(sum, pages)| *sum += pages);
            if rest.is_empty() {
                return Ok((total, spans::union(owed), written_by));
            }
            part = rest;
            // Of what is owed already, some may be counted twice.
            self.report.owed = pages(&part) + pages(&owed);
            (self.tell)(&self.report);
        }
    }

    fn sent(&mut self, sent: &Sent) {
        self.report.pages += sent.pages;
        self.report.zero += sent.zero;
        self.report.bytes += sent.bytes;
        self.report.seconds = self.began.elapsed().as_secs_f64();
    }

    fn precopy(&mut self, mut copying: Copying) -> Result<(), MigrateError> {
        self.report.phase = Phase::Precopy;
        // So that it need not be asked for when the guest stands still.
        MsrNumbers::of_host().map_err(|error| MigrateError::Machine(error.to_string()))?;
        let ram = Arc::clone(self.machine.ram());
        let mut rounds = Rounds::default();
        // What is written from here on is owed after the first round.
        self.owed()?;
        let untold = |range| Span { range, flags: 0 };
        let mut runs: Vec<Span> = ram.maybe_nonzero().into_iter().map(untold).collect();
        loop {
            self.report.owed = pages(&runs);
            (self.tell)(&self.report);
            let (sent, written_by);
            (sent, runs, written_by) = self.round(&mut copying, &runs)?;
            let owed = pages(&runs);
            self.report.rounds.push(sent.round(owed));
            let next = rounds.next(sent.bytes, sent.seconds, owed, &self.config.limits());
            self.report.bytes_per_s = rounds.rate();
            self.report.downtime_ms = rounds.downtime(owed).map(|seconds| seconds * 1e3);
            match next {
                Next::Again => {}
                Next::Slow(percent) => {
                    self.report.slowed_percent = percent;
                    self.brake = None;
                    let vcpus = writers(&written_by, self.machine.cpus());
                    let brake = Brake::start(self.machine, vcpus, percent).map_err(MigrateError::System)?;
                    self.brake = Some(brake);
                }
                Next::Stop => return self.stop(copying, &runs, false),
                Next::Postcopy => return self.stop(copying, &runs, true),
                Next::GiveUp => return Err(MigrateError::Diverges),
            }
        }
    }

    /// The guest stands still, `owed` and what it wrote since is sent, or left for `later`, and it is given away.
    fn stop(&mut self, copying: Copying, owed: &[Span], later: bool) -> Result<(), MigrateError> {
        self.report.phase = Phase::Still;
        (self.tell)(&self.report);
        let machine = Arc::clone(self.machine);
        let ram = machine.ram();
        let stopped = Instant::now();
        // What devices wrote is in the last epoch, and they write nothing after it.
        let devices = machine.platform().pause();
        let mut outcome = Err(MigrateError::Cancelled);
        let mut last = Sent::default();
        let cancel = self.cancel;
        let last_step = LastStep { machine: &machine, owed, later, shadow: &self.shadow, cancel };
        let mut still = Duration::ZERO;
        let closed = self.observer.close_epoch_with(true, |harvest, _| {
            outcome = last_step.take(copying, harvest, &mut last);
            still = stopped.elapsed();
        });
        drop(devices);
        self.sent(&last);
        self.report.last = Some(last.round(0));
        let said = outcome?;
        self.report.still_ms = Some(still.as_secs_f64() * 1e3);
        if let Ok(epoch) = closed {
            (self.show)(&epoch);
        }
        let gone = match said {
            Ok(gone) => gone,
            Err(error) => {
                self.in_doubt(&error);
                return Ok(());
            }
        };
        self.report.bytes = gone.bytes();
        if later {
            self.report.phase = Phase::Postcopy;
            self.report.postcopy_pages = Some(0);
            (self.tell)(&self.report);
            let told = Mutex::new((&mut self.tell, &mut self.report));
            let served = gone.serve(ram, self.config, cancel, |pages| {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                let (tell, report) = &mut *told;
                // Not each time: whoever asks waits.
                if pages >= report.postcopy_pages.unwrap_or(0) + TELL {
                    report.postcopy_pages = Some(pages);
                    tell(report);
                }
            });
            match served {
                Ok(pages) => self.report.postcopy_pages = Some(pages),
                Err(error) => {
                    self.in_doubt(&error);
                    return Ok(());
                }
            }
        }
        self.report.owed = 0;
        self.report.phase = Phase::Completed;
        Ok(())
    }

    /// The guest is given away, and by `error` nobody here knows what has become of it.
    fn in_doubt(&mut self, error: &dyn std::error::Error) {
        let what = match self.report.phase {
            Phase::Postcopy => {
                "after the guest ran there: what it did since is not here, and what it wrote to its disks stays. \
                 Resuming it here takes it back to when it was given away"
            }
            _ => {
                "after the guest was given away: it may be running there. If it is not, resuming it here is safe: here \
                 it is as it was when it was given away"
            }
        };
        self.report.phase = Phase::InDoubt;
        self.report.error = Some(format!("{error}, {what}"));
    }
}

/// What there is to be done while the guest stands still.
struct LastStep<'a> {
    machine: &'a Machine,
    /// What it had written before.
    owed: &'a [Span],
    /// Nothing of it is sent, but asked for later.
    later: bool,
    shadow: &'a Option<Mutex<Shadow>>,
    cancel: &'a Cancel,
}

impl LastStep<'_> {
    /// Sends what is left, and the state, and gives the guest away. An error of the outer kind: it is still this side's.
    fn take(
        &self,
        copying: Copying,
        harvest: &mut Harvest<'_>,
        last: &mut Sent,
    ) -> Result<Result<Gone, NoteError>, MigrateError> {
        let ram = self.machine.ram();
        refined_by(harvest, ram, self.shadow)?;
        let runs: Vec<Span> = harvest.slots().iter().flat_map(dump::spans).collect();
        let mut still = copying.stand_still();
        for runs in [self.owed, &runs] {
            match self.later {
                true => still.leave(runs)?,
                false => last.add(&still.send(ram, runs)?),
            }
        }
        let state = self.machine.pause().state();
        let (state, _devices_rest) = state.map_err(|error| MigrateError::Machine(error.to_string()))?;
        let complete = still.send_state(&state)?;
        if !self.cancel.too_late() {
            return Err(MigrateError::Cancelled);
        }
        self.machine.give_disks().map_err(|error| MigrateError::Machine(error.to_string()))?;
        // It stays so, whatever happens now.
        self.machine.hold();
        Ok(complete.give_away())
    }
}

/// Pages that are sent between two looks at what was written: 32 MiB. Each look costs a harvest, and the guest a fault for
/// each page that it writes again.
const PART_PAGES: u64 = 8192;

/// So many pages that were asked for are worth telling of.
const TELL: u64 = 1024;

/// The vCPUs that write most: those with at least half of what the busiest has; all, if nobody knows.
fn writers(written_by: &[u64], cpus: usize) -> Vec<u8> {
    let most = written_by.iter().max().copied().unwrap_or(0);
    let busy =
        |vcpu: &u8| most == 0 || written_by.get(usize::from(*vcpu)).is_none_or(|pages| pages * 2 >= most);
    (0..cpus as u8).filter(busy).collect()
}

/// Whether what was sent of all of `ram` can be kept beside it.
fn has_room(ram: &Ram) -> bool {
    memory::available().is_some_and(|available| ram.config().size <= available / 2)
}

/// Takes out of `harvest` what may have been written and has not changed since it was sent.
fn refined_by(
    harvest: &mut Harvest<'_>,
    ram: &Ram,
    shadow: &Option<Mutex<Shadow>>,
) -> Result<(), MigrateError> {
    let Some(shadow) = shadow else { return Ok(()) };
    let shadow = shadow.lock().unwrap_or_else(PoisonError::into_inner);
    let refined = refine(harvest, ram.mem(), &*shadow);
    refined.map(drop).map_err(|error| MigrateError::Machine(error.to_string()))
}

fn pages(runs: &[Span]) -> u64 {
    runs.iter().map(|run| run.range.pages).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_write_most_are_held_back() {
        assert_eq!(writers(&[10, 100, 50, 49], 4), [1, 2]);
        assert_eq!(writers(&[], 2), [0, 1]);
        assert_eq!(writers(&[0, 0], 2), [0, 1]);
    }
}
