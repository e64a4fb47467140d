//! The thread that observes a running machine: it closes one epoch after the other, or looks at the sample once more,
//! and shows it.

use std::io;
use std::panic;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dirty_track::tracker::Kind;
use vmm_sys_util::eventfd::EventFd;

use crate::cost;
use crate::live::{LiveError, Observer, Totals};
use crate::machine::Machine;
use crate::sampled::{Looker, Looks};
use crate::show::Show;
use crate::track::TrackConfig;

/// What is observed.
pub(crate) enum By {
    /// Every epoch, by a tracker.
    Tracker(Box<Observer>),
    /// A sample of so many pages of each GiB.
    Sample(Arc<Machine>, u64),
    /// Nothing.
    Nothing,
}

/// How it is observed.
pub(crate) struct Plan {
    /// The built-in guest runs, and the first epoch begins with its workload.
    pub(crate) builtin: bool,
    pub(crate) epoch: Duration,
    /// Measure what a fault costs the guest.
    pub(crate) wants_cost: bool,
    pub(crate) kind: Kind,
    pub(crate) track: TrackConfig,
}

/// What was observed.
pub(crate) struct Observed {
    /// With a tracker.
    pub(crate) totals: Option<Totals>,
    /// With a sample.
    pub(crate) looks: Option<Looks>,
    pub(crate) show: Show,
    pub(crate) cost_ns: Option<f64>,
    pub(crate) failure: Option<LiveError>,
}

impl Observed {
    fn nothing(show: Show) -> Observed {
        Observed { totals: None, looks: None, show, cost_ns: None, failure: None }
    }
}

/// An observer's thread.
pub(crate) struct Observing {
    /// Hung up when it is to end.
    go_on: mpsc::Sender<()>,
    thread: JoinHandle<Observed>,
}

/// The observer formats text and calls the tracker, none of it deep.
const STACK: usize = 256 << 10;

impl Observing {
    /// Begins. `failed` is written to when observing ends by an error.
    pub(crate) fn start(by: By, show: Show, plan: Plan, failed: EventFd) -> io::Result<Observing> {
        let (go_on, over) = mpsc::channel();
        let body = move || {
            let observed = match by {
                By::Tracker(observer) => observe(*observer, show, &plan, &over),
                By::Sample(machine, per_gib) => look(machine, per_gib, show, &plan, &over),
                By::Nothing => Observed::nothing(show),
            };
            if observed.failure.is_some() {
                // Only when its counter is full, and then it is readable.
                let _ = failed.write(1);
            }
            observed
        };
        let thread = thread::Builder::new().name("observer".into()).stack_size(STACK).spawn(body)?;
        Ok(Observing { go_on, thread })
    }

    /// Closes the last epoch, for which the machine must still stand, and tells the guest to end.
    pub(crate) fn finish(self) -> Observed {
        drop(self.go_on);
        self.thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    }
}

/// Waits for so long, unless it is over.
fn is_over(over: &mpsc::Receiver<()>, wait: Duration) -> bool {
    !matches!(over.recv_timeout(wait), Err(mpsc::RecvTimeoutError::Timeout))
}

/// An epoch after the other, until it is over.
fn observe(mut observer: Observer, mut show: Show, plan: &Plan, over: &mpsc::Receiver<()>) -> Observed {
    let mut cost_ns = None;
    let result = (|| -> Result<(), LiveError> {
        if plan.builtin && !wait_for_workload(|| observer.guest_has_begun(), &show, over) {
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
            let last = is_over(over, deadline.saturating_duration_since(Instant::now()));
            let epoch = observer.close_epoch()?;
            // The last epoch is cut short; a sliver of one says nothing about rates.
            if !last || epoch.seconds * 10.0 > plan.epoch.as_secs_f64() {
                show.epoch(&epoch);
            }
            if last {
                return observer.check_record();
            }
            // From now, not from the last deadline: a harvest that is late must not be followed by a hasty
            // one, because harvests in a row starve the guest.
            deadline = Instant::now() + plan.epoch;
        }
    })();
    observer.ask_guest_to_stop();
    let totals = Some(observer.totals());
    Observed { totals, cost_ns, failure: result.err(), ..Observed::nothing(show) }
}

/// A look at the sample after the other, until it is over.
fn look(
    machine: Arc<Machine>,
    per_gib: u64,
    mut show: Show,
    plan: &Plan,
    over: &mpsc::Receiver<()>,
) -> Observed {
    let mut looks = Looks::default();
    let result = (|| -> Result<(), LiveError> {
        if plan.builtin && !wait_for_workload(|| machine.channel().begun().read().is_ok(), &show, over) {
            return Ok(());
        }
        let mut looker = Looker::new(Arc::clone(&machine), per_gib)?;
        while !is_over(over, plan.epoch) {
            let look = looker.look()?;
            looks.add(&look);
            show.look(&look);
        }
        Ok(())
    })();
    Observed { looks: Some(looks), failure: result.err(), ..Observed::nothing(show) }
}

/// Waits until the built-in guest's workload begins, so that the first epoch begins with it. A guest that does
/// not get there is armed anyway after a while, to be seen as well. False: the run is over.
fn wait_for_workload(has_begun: impl Fn() -> bool, show: &Show, over: &mpsc::Receiver<()>) -> bool {
    let begin = Instant::now();
    let mut said = false;
    while !has_begun() && begin.elapsed() < WORKLOAD_PATIENCE {
        if is_over(over, Duration::from_millis(1)) {
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
