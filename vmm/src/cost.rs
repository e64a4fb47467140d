//! What a tracked write costs the guest on this host: measured, because it differs by a factor of ten
//! between MMUs and trackers, and is what the slow-down estimate is made of.
//!
//! A scratch machine with the built-in guest writes the same pages again and again: once with every page
//! write-protected, once with none. The difference per page is the cost of one write fault.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dirty_track::rate::FaultCost;
use dirty_track::rearm::Rearm;
use dirty_track::tracker::{Kind, Tracker};
use guest::abi::Doorbell;

use crate::boot::Kernel;
use crate::fault::FaultConfig;
use crate::machine::{Machine, MachineConfig, MachineError};
use crate::memory::{Faults, HugePages, MemoryConfig};
use crate::timing::Timing;
use crate::track::TrackConfig;

/// Pages written per round: enough to drown the exits at its ends.
const PAGES: u64 = 1024;
/// Rounds measured.
const ROUNDS: usize = 16;
/// What fewer rounds say is worth nothing.
const FEWEST: usize = 4;
/// How long that may take: nothing is observed meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

enum Step {
    /// The next pass runs over protected pages.
    Protect,
    /// A pass over protected pages runs since.
    Tracked(Instant),
    /// A pass over free pages runs since; the pass before took this.
    Free(Instant, Duration),
}

/// Measures what a write under the tracker `kind`, made as `config` says, costs on this host; takes some hundred
/// milliseconds. It is the lower quartile of some rounds, since whatever disturbs a round only adds to it; its error
/// is taken from how far apart the quartiles are. `None` when the host cannot track, or when the result makes no
/// sense, or when the host is too slow to tell.
///
/// # Errors
/// When the scratch machine cannot be made.
pub fn measure(kind: Kind, config: &TrackConfig) -> Result<Option<FaultCost>, MachineError> {
    // Blocks that are left writable cost nothing; what is asked for is the cost of one that is not.
    let unskipped = TrackConfig { rearm: Rearm::All, ..*config };
    let (report, results) = mpsc::channel();
    let tracker: Arc<Mutex<Option<Box<dyn Tracker>>>> = Arc::default();
    let for_bell = Arc::clone(&tracker);
    let state = Mutex::new((Step::Protect, false));
    let doorman = move |_: u8, bell: Doorbell, _: u32| {
        if bell != Doorbell::Pass {
            return;
        }
        let now = Instant::now();
        let mut tracker = for_bell.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut state = state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(tracker) = tracker.as_mut() else { return };
        let (step, armed) = &mut *state;
        *step = match *step {
            Step::Protect => {
                let protected = if *armed {
                    tracker.harvest().map(|harvest| harvest.commit())
                } else {
                    *armed = true;
                    tracker.arm()
                };
                if protected.is_err() {
                    // Nobody listens any more when this fails.
                    let _ = report.send(None);
                }
                Step::Tracked(Instant::now())
            }
            Step::Tracked(since) => Step::Free(Instant::now(), now - since),
            Step::Free(since, tracked) => {
                let fault = tracked.saturating_sub(now - since);
                let _ = report.send(Some(fault.as_nanos() as f64 / PAGES as f64));
                Step::Protect
            }
        };
    };
    let fault = if kind == Kind::UffdServe { Faults::Uffd } else { Faults::Kernel };
    let machine = Machine::new(MachineConfig {
        memory: MemoryConfig { size: 32 << 20, huge: HugePages::None, fault, ..MemoryConfig::default() },
        cpus: 1,
        kernel: Kernel::BuiltIn,
        initrd: None,
        disks: Vec::new(),
        rng: false,
        cmdline: format!("workload=fill region={}K passes=0 barrier=on quiet=on", PAGES * 4),
        console: Box::new(io::sink()),
        timing: Timing::start(),
        doorman: Some(Arc::new(doorman)),
        fault: FaultConfig::default(),
        from: None,
        dirty_ring: (kind == Kind::KvmRing).then_some(config.ring_entries),
    })?;
    let Ok(mechanism) = machine.tracker(kind, &unskipped) else { return Ok(None) };
    *tracker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(mechanism);
    machine.start()?;
    let deadline = Instant::now() + PATIENCE;
    let mut rounds = Vec::with_capacity(ROUNDS);
    while rounds.len() < ROUNDS {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Some(ns)) => rounds.push(ns),
            Ok(None) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    machine.stop();
    // The tracker keeps a view of the scratch machine's RAM, which goes only when nobody does.
    *tracker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    rounds.sort_by(f64::total_cmp);
    let measured = rounds.len();
    if measured < FEWEST {
        return Ok(None);
    }
    let (ns, median) = (rounds[measured / 4], rounds[measured / 2]);
    Ok((ns > 0.0).then(|| FaultCost { ns, relative_error: (median / ns - 1.0) / (measured as f64).sqrt() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_fault_costs_something_on_a_host_that_can_track() {
        if crate::machine::open_kvm().is_err() {
            eprintln!("SKIPPED: a_write_fault_costs_something_on_a_host_that_can_track: no KVM here");
            return;
        }
        let cost =
            measure(Kind::KvmBitmap, &TrackConfig::default()).unwrap().expect("it works wherever KVM does");
        assert!(cost.ns > 0.0, "{cost:?}");
    }
}
