//! When the phases of a start were reached, for `--timing`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

/// A moment in the life of a machine. The order is the order in which they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The command line is understood.
    Parsed,
    /// Guest RAM is mapped.
    Memory,
    /// The VM exists, with its memslots and interrupt controllers.
    Vm,
    /// The vCPUs exist.
    Vcpus,
    /// Kernel, command line and tables are in guest memory, and the vCPUs have their state.
    Loaded,
    /// vCPU threads run.
    Started,
    /// The guest wrote its first byte to the serial port.
    FirstByte,
    /// The built-in guest's workload runs in ring 3.
    Ring3,
}

/// All phases, in order.
pub const PHASES: [Phase; 8] = [
    Phase::Parsed,
    Phase::Memory,
    Phase::Vm,
    Phase::Vcpus,
    Phase::Loaded,
    Phase::Started,
    Phase::FirstByte,
    Phase::Ring3,
];

/// A clock that every part of the monitor can mark phases on. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Timing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: Instant,
    /// Nanoseconds from `start`; 0: not reached.
    reached: [AtomicU64; PHASES.len()],
}

impl Timing {
    /// A clock that starts now.
    pub fn start() -> Timing {
        Timing(Arc::new(Inner { start: Instant::now(), reached: Default::default() }))
    }

    /// Notes that `phase` is reached. Only the first time counts; the check is one load, so a hot path may
    /// call it.
    pub fn mark(&self, phase: Phase) {
        let slot = &self.0.reached[phase as usize];
        if slot.load(Ordering::Relaxed) == 0 {
            let now = self.0.start.elapsed().as_nanos() as u64;
            // Whoever was first has the earlier time.
            let _ = slot.compare_exchange(0, now.max(1), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Microseconds from the start of the process's own code to each phase reached so far.
    pub fn report(&self) -> Vec<(Phase, f64)> {
        PHASES
            .iter()
            .filter_map(|phase| match self.0.reached[*phase as usize].load(Ordering::Relaxed) {
                0 => None,
                ns => Some((*phase, ns as f64 / 1000.0)),
            })
            .collect()
    }
}
