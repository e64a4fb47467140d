//! What a guest would dirty if the log did not hold it back.
//!
//! Under a log the first write to a page in an epoch costs a fault of known cost. The time of the faults is
//! time in which the guest did nothing else. So an epoch of *V* vCPU-seconds with *F* faults of *c* seconds
//! shows what the guest does in *g* = *V* - *F c* seconds of its own: *u*(*g*) different pages, a point of its
//! undisturbed [`Curve`]. Untracked, it has all of *V*, and dirties *u*(*V*): more than it did, but, where it
//! writes the same pages again, less than *V*/*g* times as much.
//!
//! What this needs to be true: the vCPUs were busy (a guest that waits for a clock or a disk does not get
//! faster without faults, and the truth lies between the tracked and the untracked figure), and the cost is
//! that of this host as loaded as it is.

use crate::rate::{Curve, Point, RateError, positive};

/// Cost of one write fault under the log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FaultCost {
    /// Nanoseconds, from the guest's point of view.
    pub ns: f64,
    /// Its relative standard error; 0 when unknown.
    pub relative_error: f64,
}

/// What was seen under the log over one epoch, or over several together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tracked {
    /// Seconds that the vCPUs ran, added up: the time times the number of busy vCPUs.
    pub vcpu_seconds: f64,
    /// Write faults that the log caused: first writes, counted in each epoch.
    pub faults: u64,
    /// Different pages written in all of that time: for one epoch the number of faults, for several that of
    /// their union.
    pub pages: u64,
}

impl Tracked {
    /// Seconds in which the vCPUs did the guest's own work.
    ///
    /// # Errors
    /// [`RateError::CostExceedsTime`], [`RateError::NotPositive`].
    pub fn productive_seconds(&self, cost: FaultCost) -> Result<f64, RateError> {
        let seconds = positive("the vCPUs' time in seconds", self.vcpu_seconds)?;
        if !(cost.ns >= 0.0 && cost.ns.is_finite()) {
            return Err(RateError::NotPositive { what: "a fault's cost in nanoseconds", value: cost.ns });
        }
        let productive = seconds - self.faults as f64 * cost.ns * 1e-9;
        if productive > 0.0 {
            Ok(productive)
        } else {
            Err(RateError::CostExceedsTime { faults: self.faults, ns: cost.ns, seconds })
        }
    }
}

/// A guest without its log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Untracked {
    /// Distinct pages as a function of vCPU-seconds.
    pub curve: Curve,
    /// Pages per vCPU-second over one epoch of the length that was given; at least what was seen in the shortest.
    pub pages_per_s: f64,
    /// The same with the cost two standard errors lower and higher, and the fit off by two of its own. The more of the time went into faults, the
    /// further these are apart: what is left for the guest is a small difference of large numbers. `high` is
    /// infinite when the faults may have taken all of the time.
    pub low: f64,
    /// See `low`.
    pub high: f64,
    /// How many times faster the guest gets on with its work without the log.
    pub speedup: f64,
}

/// Estimates what a guest of which `seen` was seen under a log would do without it, for an epoch of
/// `epoch_vcpu_seconds`.
///
/// `seen` has at least one epoch; with unions of several epochs (see [`Growth`](crate::rate::Growth)) the
/// estimate knows how the guest saturates. They should reach to about `epoch_vcpu_seconds` of *productive* time:
/// under a log that takes nine tenths of the time, that is a union of ten epochs.
///
/// # Errors
/// [`RateError::NoData`], [`RateError::CostExceedsTime`], [`RateError::NotPositive`].
pub fn untracked(seen: &[Tracked], cost: FaultCost, epoch_vcpu_seconds: f64) -> Result<Untracked, RateError> {
    let epoch = positive("the epoch's vCPU time in seconds", epoch_vcpu_seconds)?;
    let at = |ns: f64| {
        let mut points = Vec::with_capacity(seen.len());
        for tracked in seen {
            let seconds = tracked.productive_seconds(FaultCost { ns, ..cost })?;
            points.push(Point { seconds, pages: tracked.pages });
        }
        Curve::fit(&points)
    };
    // Nobody is slower for not being held up: where the fit says so, it is the fit that is off.
    let least = seen.first().map_or(0.0, |first| first.pages as f64 / first.vcpu_seconds);
    let per_s = |curve: &Curve, sign: f64| {
        (curve.pages_in(epoch) / epoch * (1.0 + sign * 2.0 * curve.error().min(0.5))).max(least)
    };
    let curve = at(cost.ns)?;
    let margin = 2.0 * cost.relative_error.clamp(0.0, 0.5);
    let low = per_s(&at(cost.ns * (1.0 - margin))?, -1.0);
    let high = match at(cost.ns * (1.0 + margin)) {
        Ok(curve) => per_s(&curve, 1.0),
        Err(RateError::CostExceedsTime { .. }) => f64::INFINITY,
        Err(error) => return Err(error),
    };
    let (mut all, mut productive) = (0.0, 0.0);
    for tracked in seen {
        all += tracked.vcpu_seconds;
        productive += tracked.productive_seconds(cost)?;
    }
    Ok(Untracked { curve, pages_per_s: per_s(&curve, 0.0), low, high, speedup: all / productive })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::guest::{Guest, Writer};

    /// Measures `guest` under a log over unions of 1 to `span` epochs.
    fn observe(guest: &mut Guest, epoch: f64, cost: f64, span: usize, spans: usize) -> Vec<Tracked> {
        let mut seen = vec![Tracked { vcpu_seconds: 0.0, faults: 0, pages: 0 }; span];
        for _ in 0..spans {
            let mut union = vec![false; guest.pages() as usize];
            let (mut seconds, mut faults) = (0.0, 0);
            for tracked in &mut seen {
                let shown = guest.epoch(epoch, cost);
                seconds += shown.seconds;
                faults += shown.faults;
                union.iter_mut().zip(&shown.dirty).for_each(|(all, &new)| *all |= new);
                tracked.vcpu_seconds += seconds / spans as f64;
                tracked.faults += faults / spans as u64;
                tracked.pages += union.iter().filter(|&&dirty| dirty).count() as u64 / spans as u64;
            }
        }
        seen
    }

    /// The estimate is within 5 % of what the guest does when nobody looks.
    fn within_5_percent(writer: Writer, writes_per_s: f64, cost_ns: f64, span: usize) {
        const EPOCH: f64 = 0.1;
        let mut guest = Guest::new(writer, writes_per_s, 9);
        let seen = observe(&mut guest, EPOCH, cost_ns * 1e-9, span, 6);
        let cost = FaultCost { ns: cost_ns, relative_error: 0.01 };
        let estimate = untracked(&seen, cost, EPOCH).unwrap();
        let truth = (0..6).map(|_| guest.epoch(EPOCH, 0.0).faults).sum::<u64>() as f64 / 6.0 / EPOCH;
        let tracked = seen[0].pages as f64 / EPOCH;
        let error = estimate.pages_per_s / truth - 1.0;
        assert!(
            error.abs() < 0.05,
            "{writer:?} at {cost_ns} ns: {error:+.3}, {truth} {tracked} {estimate:?}"
        );
        assert!(
            estimate.low <= estimate.pages_per_s * 1.001 && estimate.pages_per_s <= estimate.high * 1.001
        );
        assert!(estimate.speedup > 1.0);
    }

    #[test]
    fn the_estimate_is_within_5_percent_of_the_truth() {
        for cost in [500.0, 1500.0, 5000.0] {
            // 100 000 writes a second: 5 us a fault hold it back by up to a half.
            within_5_percent(Writer::Uniform { pages: 100_000 }, 100_000.0, cost, 8);
            within_5_percent(Writer::Uniform { pages: 4_000 }, 100_000.0, cost, 8);
            within_5_percent(Writer::Zipf { pages: 50_000 }, 100_000.0, cost, 8);
            within_5_percent(Writer::Sequential { pages: 500_000 }, 100_000.0, cost, 8);
            within_5_percent(Writer::Sequential { pages: 8_000 }, 100_000.0, cost, 8);
        }
        // Held back by a quarter, as by a log that shows 774 of 1012 MiB/s.
        within_5_percent(Writer::Sequential { pages: 1_000_000 }, 259_000.0, 1190.0, 2);
        // Five sixths of the time go into faults; the union must reach further.
        within_5_percent(Writer::Uniform { pages: 100_000 }, 1_000_000.0, 5000.0, 16);
    }

    #[test]
    fn a_guest_that_is_not_held_back_is_what_was_seen() {
        let mut guest = Guest::new(Writer::Uniform { pages: 100_000 }, 100_000.0, 2);
        let seen = observe(&mut guest, 0.1, 0.0, 1, 4);
        let estimate =
            untracked(&seen, FaultCost { ns: 0.0, relative_error: 0.0 }, seen[0].vcpu_seconds).unwrap();
        let tracked = seen[0].pages as f64 / seen[0].vcpu_seconds;
        assert!((estimate.pages_per_s / tracked - 1.0).abs() < 1e-9);
        assert_eq!(estimate.speedup, 1.0);
    }

    #[test]
    fn what_cannot_be_is_a_typed_error() {
        let cost = FaultCost { ns: 5000.0, relative_error: 0.1 };
        let seen = |seconds, faults| [Tracked { vcpu_seconds: seconds, faults, pages: faults }];
        assert!(matches!(untracked(&[], cost, 1.0), Err(RateError::NoData(_))));
        assert!(matches!(untracked(&seen(1.0, 1), cost, 0.0), Err(RateError::NotPositive { .. })));
        assert!(matches!(untracked(&seen(-1.0, 1), cost, 1.0), Err(RateError::NotPositive { .. })));
        let nan = FaultCost { ns: f64::NAN, relative_error: 0.0 };
        assert!(matches!(untracked(&seen(1.0, 1), nan, 1.0), Err(RateError::NotPositive { .. })));
        let error = untracked(&seen(1.0, 200_001), cost, 1.0).unwrap_err();
        assert!(matches!(error, RateError::CostExceedsTime { faults: 200_001, .. }), "{error}");
        // Possible at this cost, impossible at a cost two standard errors higher.
        let estimate = untracked(&seen(1.0, 190_000), cost, 1.0).unwrap();
        assert!(estimate.high.is_infinite() && estimate.low < estimate.pages_per_s);
    }
}
