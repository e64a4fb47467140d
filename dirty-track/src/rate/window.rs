//! The rate over the last epochs, and how sure it is.

use std::collections::VecDeque;

use crate::rate::{RateError, positive};

/// The last epochs of one source of dirty pages: their lengths and how many pages each found.
#[derive(Clone, Debug)]
pub struct Window {
    /// (seconds, pages), the latest last.
    epochs: VecDeque<(f64, u64)>,
    capacity: usize,
}

/// A rate with its error.
///
/// It is the rate of *distinct pages at this length of epoch*: shorter epochs show a higher one, because a page
/// written in each of them counts in each. A [`Curve`](crate::rate::Curve) has it for any length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Pages per second: all pages of the window over all of its time.
    pub pages_per_s: f64,
    /// Standard error of `pages_per_s`; `None` from a single epoch, which shows no spread.
    ///
    /// It is that of a ratio estimator: with *R* the rate, *n* epochs of *tᵢ* seconds and *pᵢ* pages, and
    /// *T* = Σ*tᵢ*, its square is *n*/(*n*-1) · Σ(*pᵢ* - *R* *tᵢ*)² / *T*². This takes the epochs for
    /// independent. A guest with slow phases (longer than an epoch) is less sure than it says; a longer
    /// window shows that.
    pub standard_error: Option<f64>,
    /// Epochs in the window.
    pub epochs: usize,
    /// Seconds that they cover.
    pub seconds: f64,
}

impl Estimate {
    /// The 95 % confidence interval in pages per second, by Student's distribution; `None` from a single epoch.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let half = self.standard_error? * student_95(self.epochs.checked_sub(1)?);
        Some(((self.pages_per_s - half).max(0.0), self.pages_per_s + half))
    }
}

impl Window {
    /// A window of the last `epochs` epochs; at least one.
    pub fn new(epochs: usize) -> Window {
        let capacity = epochs.max(1);
        Window { epochs: VecDeque::with_capacity(capacity), capacity }
    }

    /// Adds an epoch of `seconds` that found `pages`; the oldest one leaves a full window. Nothing is allocated.
    ///
    /// # Errors
    /// [`RateError::NotPositive`]; the window is unchanged.
    pub fn push(&mut self, seconds: f64, pages: u64) -> Result<(), RateError> {
        let seconds = positive("an epoch's length in seconds", seconds)?;
        if self.epochs.len() == self.capacity {
            self.epochs.pop_front();
        }
        self.epochs.push_back((seconds, pages));
        Ok(())
    }

    /// The rate; `None` from an empty window.
    pub fn estimate(&self) -> Option<Estimate> {
        let epochs = self.epochs.len();
        if epochs == 0 {
            return None;
        }
        let seconds: f64 = self.epochs.iter().map(|(seconds, _)| seconds).sum();
        let pages: f64 = self.epochs.iter().map(|&(_, pages)| pages as f64).sum();
        let rate = pages / seconds;
        let squares: f64 =
            self.epochs.iter().map(|&(seconds, pages)| (pages as f64 - rate * seconds).powi(2)).sum();
        let n = epochs as f64;
        let standard_error = (epochs > 1).then(|| (n / (n - 1.0) * squares).sqrt() / seconds);
        Some(Estimate { pages_per_s: rate, standard_error, epochs, seconds })
    }

    /// Forgets all epochs.
    pub fn clear(&mut self) {
        self.epochs.clear();
    }
}

/// The windows of a guest and of each of its vCPUs.
#[derive(Clone, Debug)]
pub struct Rates {
    total: Window,
    vcpus: Vec<Window>,
}

impl Rates {
    /// Windows of the last `epochs` epochs of a guest with `vcpus` vCPUs; 0 where the tracker does not know
    /// which vCPU wrote (see [`Guarantees::per_vcpu`](crate::tracker::Guarantees::per_vcpu)).
    pub fn new(epochs: usize, vcpus: usize) -> Rates {
        Rates { total: Window::new(epochs), vcpus: vec![Window::new(epochs); vcpus] }
    }

    /// Adds an epoch of `seconds` that found `pages`, and for each vCPU those that it wrote (first).
    ///
    /// # Errors
    /// [`RateError::NotPositive`], [`RateError::Vcpus`]; nothing is added then.
    pub fn push(&mut self, seconds: f64, pages: u64, vcpus: &[u64]) -> Result<(), RateError> {
        if vcpus.len() != self.vcpus.len() {
            return Err(RateError::Vcpus { expected: self.vcpus.len(), got: vcpus.len() });
        }
        self.total.push(seconds, pages)?;
        self.vcpus.iter_mut().zip(vcpus).try_for_each(|(window, &pages)| window.push(seconds, pages))
    }

    /// The guest's window.
    pub fn total(&self) -> &Window {
        &self.total
    }

    /// The vCPUs' windows.
    pub fn vcpus(&self) -> &[Window] {
        &self.vcpus
    }
}

/// The 97.5 % quantile of Student's distribution with `freedom` degrees of freedom.
fn student_95(freedom: usize) -> f64 {
    const TABLE: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    match freedom {
        0 => f64::INFINITY,
        1..=10 => TABLE[freedom - 1],
        _ => {
            // The expansion around the normal quantile; good to 0.002 from here on.
            let (z, n) = (1.959_964_f64, freedom as f64);
            z + (z.powi(3) + z) / (4.0 * n) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n * n)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mix::mix;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (freedom, quantile) in
            [(1, 12.706), (5, 2.571), (11, 2.201), (15, 2.131), (30, 2.042), (60, 2.000), (1000, 1.962)]
        {
            assert!((student_95(freedom) - quantile).abs() < 0.003, "{freedom}: {}", student_95(freedom));
        }
    }

    #[test]
    fn a_steady_guest_has_no_error_and_one_epoch_says_nothing_about_it() {
        let mut window = Window::new(3);
        assert_eq!(window.estimate(), None);
        window.push(0.5, 1000).unwrap();
        let one = window.estimate().unwrap();
        assert_eq!((one.pages_per_s, one.standard_error, one.interval()), (2000.0, None, None));
        for seconds in [0.1, 0.2, 0.3] {
            window.push(seconds, (seconds * 5000.0) as u64).unwrap();
        }
        let three = window.estimate().unwrap();
        assert_eq!(three.epochs, 3, "the first has left");
        assert!((three.pages_per_s - 5000.0).abs() < 1e-6 && three.standard_error.unwrap() < 1e-6);
        window.clear();
        assert_eq!(window.estimate(), None);
    }

    #[test]
    fn bad_input_is_refused() {
        let mut rates = Rates::new(4, 2);
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(rates.push(seconds, 1, &[1, 0]), Err(RateError::NotPositive { .. })));
        }
        assert!(matches!(rates.push(1.0, 1, &[1]), Err(RateError::Vcpus { expected: 2, got: 1 })));
        assert!(rates.total().estimate().is_none());
        rates.push(2.0, 30, &[10, 20]).unwrap();
        let of = |window: &Window| window.estimate().unwrap().pages_per_s;
        assert_eq!(of(rates.total()), 15.0);
        assert_eq!(rates.vcpus().iter().map(of).collect::<Vec<_>>(), [5.0, 10.0]);
    }

    /// The 95 % interval holds the true rate about 95 times of 100. The noise is a sum of uniform ones.
    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        let mut random = (0u64..).map(|index| mix(index) as f64 / u64::MAX as f64);
        let (mut covered, runs) = (0, 2000);
        for _ in 0..runs {
            let mut window = Window::new(8);
            for _ in 0..8 {
                let seconds = 0.05 + 0.1 * random.next().unwrap();
                let noise: f64 = (0..6).map(|_| random.next().unwrap() - 0.5).sum();
                window.push(seconds, (seconds * 100_000.0 + 700.0 * noise) as u64).unwrap();
            }
            let (low, high) = window.estimate().unwrap().interval().unwrap();
            covered += u32::from((low..high).contains(&100_000.0));
        }
        let share = f64::from(covered) / f64::from(runs);
        assert!((0.93..0.97).contains(&share), "{share}");
    }

    proptest! {
        #[test]
        fn estimates_are_sane(
            capacity in 0..10usize,
            epochs in prop::collection::vec((1e-3..10.0f64, 0..1u64 << 40), 1..20),
        ) {
            let mut window = Window::new(capacity);
            epochs.iter().for_each(|&(seconds, pages)| window.push(seconds, pages).unwrap());
            let estimate = window.estimate().unwrap();
            let rates = epochs.iter().map(|&(seconds, pages)| pages as f64 / seconds);
            let highest = rates.fold(0.0, f64::max);
            prop_assert!(estimate.pages_per_s >= 0.0 && estimate.pages_per_s <= highest * 1.000_001);
            prop_assert_eq!(estimate.epochs, epochs.len().min(capacity.max(1)));
            if let Some((low, high)) = estimate.interval() {
                prop_assert!(0.0 <= low && low <= estimate.pages_per_s && estimate.pages_per_s <= high);
            }
        }
    }
}
