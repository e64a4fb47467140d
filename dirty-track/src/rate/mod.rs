//! How fast a guest dirties memory, how sure that is, and what follows from it.
//!
//! # Why
//! "300 MB/s" answers no question by itself. The number of *distinct* pages that an epoch finds grows more
//! slowly than the epoch, because a guest writes many pages again; a log that works by faults holds the guest
//! back, so that it counts a slower guest than the one that will run; and a figure from five epochs has an
//! error. So there is:
//!
//! - [`Window`]: the rate over the last epochs, with its standard error and an interval; [`Rates`] for each
//!   vCPU as well.
//! - [`Growth`] and [`Curve`]: distinct pages as a function of time, measured over unions of epochs and fitted.
//! - [`Precopy`]: rounds, total time, downtime of a live migration over a link, and whether it ends.
//! - [`untracked`]: what the guest would dirty if the log's faults did not hold it back.
//! - [`Sampler`]: the share of pages that change between two looks, from a random sample. It costs the guest
//!   nothing and needs no log.
//!
//! # Contract
//! Everything here but [`Sampler`], which reads guest memory, is a function of what it is given: counts and
//! seconds. No clock is read. Rates are in pages of 4 KiB per second.

mod curve;
mod precopy;
mod sample;
mod untracked;
mod window;

#[cfg(test)]
mod guest;

pub use curve::{Curve, Growth, Point};
pub use precopy::{Precopy, Prediction};
pub use sample::{Change, Sampler};
pub use untracked::{FaultCost, Tracked, Untracked, untracked};
pub use window::{Estimate, Rates, Window};

/// Why there is no estimate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RateError {
    /// A time, cost or bandwidth that is none.
    #[error("{what} is {value}: it must be a finite number above zero")]
    NotPositive {
        /// What.
        what: &'static str,
        /// What was given.
        value: f64,
    },
    /// Nothing to estimate from.
    #[error("there are no {0} to estimate from: harvest first")]
    NoData(&'static str),
    /// Counts of another number of vCPUs than before.
    #[error("counts of {got} vCPUs, where there were {expected}: make a new window when vCPUs come or go")]
    Vcpus {
        /// As many as the window has.
        expected: usize,
        /// As many as were given.
        got: usize,
    },
    /// The faults, at their cost, take longer than the vCPUs ran.
    #[error(
        "{faults} faults at {ns} ns take more than the {seconds} s that the vCPUs ran: the cost is too high, \
         or measured on a busier host; measure it again"
    )]
    CostExceedsTime {
        /// Number of faults.
        faults: u64,
        /// Cost of one.
        ns: f64,
        /// What the vCPUs had.
        seconds: f64,
    },
    /// Guest memory could not be read.
    #[error("cannot read page {gfn} of guest memory: {source}")]
    Memory {
        /// The page.
        gfn: crate::addr::Gfn,
        /// What vm-memory says.
        source: vm_memory::GuestMemoryError,
    },
}

/// `value`, if it is a finite number above zero.
fn positive(what: &'static str, value: f64) -> Result<f64, RateError> {
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(RateError::NotPositive { what, value }) }
}
