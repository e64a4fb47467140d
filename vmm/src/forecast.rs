//! What the epochs so far tell of the guest: its rate and how sure that is, what it would dirty if nobody looked,
//! and what a live migration of it would take.
//!
//! The estimates are `dirty_track::rate`'s; here they are fed epoch by epoch and put into bytes. They stand for the
//! whole run so far: a guest that changes its ways is told by its epochs, not by this.

use dirty_track::addr::PAGE_SIZE;
use dirty_track::rate::{
    Curve, Estimate, FaultCost, Growth, Precopy, RateError, Rates, Tracked, Window, untracked,
};
use serde::{Deserialize, Serialize};

/// The link that a migration would have, and what it may cost the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes per second.
    pub bytes_per_s: u64,
    /// Seconds that the guest may stand still.
    pub downtime_s: f64,
}

/// A rate in bytes per second; with the 95 % confidence interval, if there is enough to tell.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateReport {
    /// The rate.
    pub bytes_per_s: f64,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
}

/// How a migration by precopy would go; see [`Precopy`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecopyReport {
    /// Whether the guest stands still no longer than it may.
    pub converges: bool,
    /// Rounds while the guest runs.
    pub rounds: u32,
    /// Seconds in all.
    pub total_s: f64,
    /// Seconds of them in which the guest stands still.
    pub downtime_s: f64,
    /// Bytes sent.
    pub bytes: f64,
}

/// What can be said after an epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Rate of the last [`WINDOW`] epochs.
    pub rate: Option<RateReport>,
    /// The same for each vCPU, with a tracker that tells them apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpu_rates: Vec<RateReport>,
    /// What the guest would dirty without the log, in epochs of the same length and if its vCPUs are busy.
    pub untracked: Option<RateReport>,
    /// A migration of the guest as it runs now, under the log.
    pub precopy: Option<PrecopyReport>,
}

/// Epochs that a rate is taken over.
pub const WINDOW: usize = 16;

/// Longest union of epochs that is looked at, to see how the guest saturates.
const SPAN: usize = 16;

/// Bytes that a page takes on the link: its contents and a header of 8.
const BYTES_PER_PAGE: f64 = PAGE_SIZE as f64 + 8.0;

/// After this many rounds a migration gives up.
const MAX_ROUNDS: u32 = 30;

/// The figures of an epoch.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Its length.
    pub seconds: f64,
    /// Dirty pages.
    pub pages: u64,
    /// Those of each vCPU, if they are told apart.
    pub vcpu_pages: &'a [u64],
    /// Write faults that the log caused.
    pub faults: u64,
}

/// Is told the epochs, and makes the forecast.
#[derive(Debug)]
pub struct Forecaster {
    cpus: usize,
    /// Pages of guest RAM.
    pages: u64,
    link: Link,
    rates: Option<Rates>,
    growth: Growth,
    epochs: u32,
    seconds: f64,
    faults: u64,
}

impl Forecaster {
    /// For a guest of `cpus` vCPUs and `pages` pages of RAM.
    pub fn new(cpus: usize, pages: u64, link: Link) -> Forecaster {
        let growth = Growth::new(SPAN);
        Forecaster { cpus, pages, link, rates: None, growth, epochs: 0, seconds: 0.0, faults: 0 }
    }

    /// Adds an epoch: `dirty` are all of its words, slot after slot, as a harvest has them.
    ///
    /// # Errors
    /// [`RateError::NotPositive`] for an epoch of no length; it is left out then.
    pub fn add(&mut self, seen: Seen<'_>, dirty: impl Iterator<Item = u64>) -> Result<(), RateError> {
        self.growth.add_words(dirty, seen.seconds)?;
        let vcpus = seen.vcpu_pages.len();
        let known = self.rates.take().filter(|rates| rates.vcpus().len() == vcpus);
        let rates = self.rates.insert(known.unwrap_or_else(|| Rates::new(WINDOW, vcpus)));
        rates.push(seen.seconds, seen.pages, seen.vcpu_pages)?;
        self.epochs += 1;
        self.seconds += seen.seconds;
        self.faults += seen.faults;
        Ok(())
    }

    /// The forecast, for a log whose faults cost `cost`. What cannot be told is left out.
    pub fn forecast(&self, cost: Option<FaultCost>) -> Forecast {
        let Some(rates) = &self.rates else { return Forecast::default() };
        let report = |window: &Window| window.estimate().map(RateReport::from);
        Forecast {
            rate: report(rates.total()),
            vcpu_rates: rates.vcpus().iter().filter_map(report).collect(),
            untracked: cost.and_then(|cost| self.untracked(cost).ok()),
            precopy: self.precopy().ok(),
        }
    }

    fn untracked(&self, cost: FaultCost) -> Result<RateReport, RateError> {
        let (cpus, epochs) = (self.cpus as f64, f64::from(self.epochs));
        let seen: Vec<_> = (1..)
            .zip(self.growth.points())
            .map(|(span, point)| Tracked {
                vcpu_seconds: point.seconds * cpus,
                faults: (self.faults as f64 / epochs * f64::from(span)) as u64,
                pages: point.pages,
            })
            .collect();
        let found = untracked(&seen, cost, self.seconds / epochs * cpus)?;
        let bytes = |pages_per_s: f64| pages_per_s * cpus * PAGE_SIZE as f64;
        Ok(RateReport {
            bytes_per_s: bytes(found.pages_per_s),
            low: Some(bytes(found.low)),
            high: Some(bytes(found.high)).filter(|high| high.is_finite()),
        })
    }

    fn precopy(&self) -> Result<PrecopyReport, RateError> {
        let points: Vec<_> = self.growth.points().collect();
        let plan = Precopy {
            pages: self.pages,
            bytes_per_s: self.link.bytes_per_s as f64,
            bytes_per_page: BYTES_PER_PAGE,
            downtime_s: self.link.downtime_s,
            max_rounds: MAX_ROUNDS,
        };
        let found = plan.predict(&Curve::fit(&points)?)?;
        Ok(PrecopyReport {
            converges: found.converges,
            rounds: found.rounds,
            total_s: found.total_s,
            downtime_s: found.downtime_s,
            bytes: found.pages_sent * BYTES_PER_PAGE,
        })
    }
}

impl From<Estimate> for RateReport {
    fn from(estimate: Estimate) -> RateReport {
        let bytes = |pages: f64| pages * PAGE_SIZE as f64;
        let interval = estimate.interval();
        RateReport {
            bytes_per_s: bytes(estimate.pages_per_s),
            low: interval.map(|(low, _)| bytes(low)),
            high: interval.map(|(_, high)| bytes(high)),
        }
    }
}

impl RateReport {
    /// Half of the interval, as a share of the rate in percent.
    pub fn percent(&self) -> Option<f64> {
        let half = (self.high? - self.low?) / 2.0;
        (self.bytes_per_s > 0.0).then(|| half / self.bytes_per_s * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { bytes_per_s: 4104 * 10_000, downtime_s: 0.02 };
    const PAGES: u64 = 1024;

    /// Epochs of a second, each of which dirties the pages that `pages` says.
    fn forecaster(epochs: u64, pages: impl Fn(u64) -> std::ops::Range<u64>) -> Forecaster {
        let mut forecaster = Forecaster::new(1, PAGES, LINK);
        for epoch in 0..epochs {
            let range = pages(epoch);
            let count = range.end - range.start;
            let seen = Seen { seconds: 1.0, pages: count, vcpu_pages: &[count], faults: count };
            let word = |word: u64| {
                (0..64).fold(0, |bits, bit| bits | u64::from(range.contains(&(word * 64 + bit))) << bit)
            };
            forecaster.add(seen, (0..PAGES / 64).map(word)).unwrap();
        }
        forecaster
    }

    #[test]
    fn nothing_is_told_before_the_first_epoch() {
        let cost = FaultCost { ns: 1.0, relative_error: 0.0 };
        assert_eq!(forecaster(0, |_| 0..0).forecast(Some(cost)), Forecast::default());
    }

    #[test]
    fn a_steady_guest_has_a_sure_rate_and_a_migration_that_ends() {
        let forecast = forecaster(20, |_| 0..100).forecast(None);
        let rate = forecast.rate.unwrap();
        assert_eq!(rate.bytes_per_s, 100.0 * 4096.0);
        assert_eq!(rate.percent(), Some(0.0));
        assert_eq!(forecast.vcpu_rates, [rate]);
        assert_eq!(forecast.untracked, None, "the cost is not known");
        let precopy = forecast.precopy.unwrap();
        // A round of all pages takes a tenth of a second, which leaves 100 pages at most: 10 ms.
        assert!(precopy.converges && precopy.downtime_s <= 0.02, "{precopy:?}");
        assert!(precopy.bytes >= 1024.0 * 4104.0 && precopy.total_s >= 0.1, "{precopy:?}");
    }

    #[test]
    fn a_guest_that_outruns_the_link_does_not_converge() {
        let slow = Link { bytes_per_s: 4104 * 100, ..LINK };
        let mut forecaster = forecaster(20, |epoch| {
            let start = epoch % 2 * 500;
            start..start + 500
        });
        forecaster.link = slow;
        let precopy = forecaster.forecast(None).precopy.unwrap();
        assert!(!precopy.converges, "{precopy:?}");
    }

    #[test]
    fn half_of_the_time_in_faults_is_half_of_the_rate() {
        // 500 new pages a second, at a millisecond each.
        let forecaster = forecaster(2, |epoch| epoch * 500..(epoch + 1) * 500);
        let cost = FaultCost { ns: 1e6, relative_error: 0.1 };
        let found = forecaster.forecast(Some(cost)).untracked.unwrap();
        assert!((found.bytes_per_s / (1000.0 * 4096.0) - 1.0).abs() < 0.01, "{found:?}");
        assert!(found.low.unwrap() < found.bytes_per_s && found.bytes_per_s < found.high.unwrap());
        let whole = FaultCost { ns: 2.1e6, relative_error: 0.0 };
        assert_eq!(forecaster.forecast(Some(whole)).untracked, None, "no time is left for the guest");
    }
}
