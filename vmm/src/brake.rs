//! Holds vCPUs back for a part of their time, so that they write less.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::machine::Machine;

/// How often a vCPU that is held back comes to run, if it does not have to run for less than [`SLICE`] then.
const PERIOD: Duration = Duration::from_millis(10);

/// For how long it runs at least: a shorter time would become longer by what it takes to hold a vCPU.
const SLICE: Duration = Duration::from_millis(1);

/// Holds vCPUs back until it is dropped.
#[derive(Debug)]
pub(crate) struct Brake {
    ended: Arc<AtomicBool>,
}

impl Brake {
    /// Holds `vcpus` back for `percent` of their time, 99 at most.
    pub(crate) fn start(machine: &Arc<Machine>, vcpus: Vec<u8>, percent: u8) -> io::Result<Brake> {
        let brake = Brake { ended: Arc::default() };
        let ended = Arc::clone(&brake.ended);
        let machine: Weak<Machine> = Arc::downgrade(machine);
        let percent = u32::from(percent.min(99));
        let period = PERIOD.max(SLICE * 100 / (100 - percent));
        let held = period * percent / 100;
        thread::Builder::new().name("brake".into()).spawn(move || {
            while !ended.load(Ordering::Relaxed)
                && let Some(machine) = machine.upgrade()
            {
                machine.hold_back(&vcpus, true);
                thread::sleep(held);
                machine.hold_back(&vcpus, false);
                drop(machine);
                thread::sleep(period - held);
            }
        })?;
        Ok(brake)
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}
