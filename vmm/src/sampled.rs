//! The dirty rate from a sample: some pages of guest memory are read and hashed, and an epoch later once more. The
//! guest is neither write-protected nor stopped, so it costs it next to nothing and tells a rate and no pages.

use std::sync::Arc;
use std::time::Instant;

use dirty_track::addr::PAGE_SIZE;
use dirty_track::rate::{RateError, Sampler};
use serde::{Deserialize, Serialize};

use crate::forecast::RateReport;
use crate::machine::Machine;

/// What a look at the sample found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Number, from 1.
    pub epoch: u32,
    /// Seconds from the first look to this one.
    pub at_s: f64,
    /// Seconds from the look before.
    pub seconds: f64,
    /// Pages in the sample.
    pub sampled: u64,
    /// Those of them that changed.
    pub changed: u64,
    /// What that makes of all of guest memory; with the 95 % confidence interval.
    pub rate: RateReport,
    /// Microseconds that the look took.
    pub look_us: f64,
}

/// All looks of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Looks {
    /// Number of looks after the first.
    pub epochs: u32,
    /// Seconds from the first look to the last.
    pub seconds: f64,
    /// Pages in the sample.
    pub sampled: u64,
    /// Mean rate of change, bytes per second.
    pub mean_bytes_per_s: f64,
    /// Highest rate between two looks, bytes per second.
    pub peak_bytes_per_s: f64,
}

impl Looks {
    /// Adds a look.
    pub fn add(&mut self, look: &Look) {
        let before = self.mean_bytes_per_s * self.seconds;
        self.epochs += 1;
        self.seconds += look.seconds;
        self.sampled = look.sampled;
        self.mean_bytes_per_s = (before + look.rate.bytes_per_s * look.seconds) / self.seconds;
        self.peak_bytes_per_s = self.peak_bytes_per_s.max(look.rate.bytes_per_s);
    }
}

/// Looks at a machine's memory from time to time.
pub struct Looker {
    machine: Arc<Machine>,
    sampler: Sampler,
    epoch: u32,
    began: Instant,
    last: Instant,
}

impl Looker {
    /// Chooses `per_gib` pages of each GiB of guest memory, and looks at them for the first time.
    ///
    /// # Errors
    /// See [`Sampler::new`].
    pub fn new(machine: Arc<Machine>, per_gib: u64) -> Result<Looker, RateError> {
        let ranges: Vec<_> = machine.slots().iter().map(|slot| slot.frames()).collect();
        let now = Instant::now();
        let sampler = Sampler::new(machine.ram().mem(), &ranges, per_gib)?;
        Ok(Looker { machine, sampler, epoch: 0, began: now, last: now })
    }

    /// Looks again.
    ///
    /// # Errors
    /// See [`Sampler::look`].
    pub fn look(&mut self) -> Result<Look, RateError> {
        let now = Instant::now();
        let change = self.sampler.look(self.machine.ram().mem())?;
        let seconds = now.duration_since(self.last).as_secs_f64();
        let (pages_per_s, (low, high)) = change.rate(seconds)?;
        let bytes = |pages: f64| pages * PAGE_SIZE as f64;
        self.epoch += 1;
        self.last = now;
        Ok(Look {
            epoch: self.epoch,
            at_s: now.duration_since(self.began).as_secs_f64(),
            seconds,
            sampled: change.sampled,
            changed: change.changed,
            rate: RateReport {
                bytes_per_s: bytes(pages_per_s),
                low: Some(bytes(low)),
                high: Some(bytes(high)),
            },
            look_us: now.elapsed().as_secs_f64() * 1e6,
        })
    }
}
