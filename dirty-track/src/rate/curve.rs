//! Distinct pages as a function of time.

use crate::rate::{RateError, positive};
use crate::tracker::Harvest;

/// A measurement: in `seconds` the guest wrote `pages` different pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Length of the time that was looked at.
    pub seconds: f64,
    /// Different pages written in it.
    pub pages: u64,
}

/// Measures how the number of distinct pages grows with time: over one epoch, over two, and so on.
///
/// What is taken from unions of epochs is how far the epochs overlap; how much an epoch has is the mean of all of them. So
/// a guest that writes faster and faster is measured by all of its epochs at every length.
///
/// The union of the epochs is kept in a bitmap of the guest's size, which is made once.
#[derive(Debug)]
pub struct Growth {
    union: Vec<u64>,
    /// Since the union was empty: epochs, pages of each epoch added up, pages of the union.
    epochs: usize,
    added: u64,
    united: u64,
    /// Of all epochs.
    total: Total,
    /// For each length, over all unions of it: pages of the epochs added up, and of their union.
    overlaps: Vec<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Total {
    epochs: u64,
    seconds: f64,
    pages: u64,
}

impl Growth {
    /// Measures over unions of 1 to `span` epochs (at least 1).
    pub fn new(span: usize) -> Growth {
        Growth {
            union: Vec::new(),
            epochs: 0,
            added: 0,
            united: 0,
            total: Total::default(),
            overlaps: vec![(0, 0); span.max(1)],
        }
    }

    /// Adds an epoch of `seconds` that yielded `harvest`. It allocates at the first call, and when the guest
    /// has grown.
    ///
    /// # Errors
    /// [`RateError::NotPositive`]; nothing is added then.
    pub fn add(&mut self, harvest: &Harvest<'_>, seconds: f64) -> Result<(), RateError> {
        self.add_words(harvest.slots().iter().flat_map(|slot| slot.words().iter().copied()), seconds)
    }

    /// As [`add`](Growth::add), with the set as words of a bitmap.
    ///
    /// # Errors
    /// As [`add`](Growth::add).
    pub fn add_words(&mut self, set: impl Iterator<Item = u64>, seconds: f64) -> Result<(), RateError> {
        self.total.seconds += positive("an epoch's length in seconds", seconds)?;
        let mut pages = 0;
        for (index, word) in set.enumerate() {
            if index == self.union.len() {
                self.union.push(0);
            }
            if word != 0 {
                pages += u64::from(word.count_ones());
                self.united += u64::from((word & !self.union[index]).count_ones());
                self.union[index] |= word;
            }
        }
        self.total.epochs += 1;
        self.total.pages += pages;
        self.added += pages;
        let (added, united) = &mut self.overlaps[self.epochs];
        *added += self.added;
        *united += self.united;
        self.epochs += 1;
        if self.epochs == self.overlaps.len() {
            self.union.fill(0);
            (self.epochs, self.added, self.united) = (0, 0, 0);
        }
        Ok(())
    }

    /// What was measured, from one epoch on upwards.
    pub fn points(&self) -> impl Iterator<Item = Point> + '_ {
        let Total { epochs, seconds, pages } = self.total;
        let measured = (1..=epochs).zip(&self.overlaps);
        measured.map(move |(length, &(added, united))| {
            let part = length as f64 / epochs as f64;
            let distinct = if added > 0 { united as f64 / added as f64 } else { 1.0 };
            Point { seconds: seconds * part, pages: (pages as f64 * part * distinct).round() as u64 }
        })
    }
}

/// A guest's dirtying as a curve of one of two shapes, whichever fits better: *u*(*t*) different pages in *t*
/// seconds.
///
/// - *u* = *A* (1 - e^(-*k t*)) + *s t*. The first term is a working set of *A* pages that are written again and
///   again in random order, for which it is exact; the second is what the guest writes once and leaves behind.
///   Together they follow skewed guests to a few percent inside the times that were measured, and bend the
///   right way outside.
/// - *u* = min(*k A t*, *A*): a guest that sweeps over *A* pages in order, again and again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    working_set: f64,
    /// *k*, per second.
    turnover: f64,
    stream: f64,
    sweeps: bool,
    error: f64,
}

impl Curve {
    /// The curve that fits `points` best, in the sense of least squares of relative errors.
    ///
    /// A single time tells nothing about saturation: the curve is a straight line then. Two give a working
    /// set, three a stream besides, or a sweep; times that span a factor of 8 or more are worth having.
    ///
    /// # Errors
    /// [`RateError::NoData`], [`RateError::NotPositive`].
    pub fn fit(points: &[Point]) -> Result<Curve, RateError> {
        let mut sums = Vec::with_capacity(points.len());
        for point in points {
            sums.push((positive("a measurement's length in seconds", point.seconds)?, point.pages as f64));
        }
        let shortest = sums.iter().map(|(t, _)| *t).fold(f64::INFINITY, f64::min);
        let longest = sums.iter().map(|(t, _)| *t).fold(0.0, f64::max);
        if sums.is_empty() {
            return Err(RateError::NoData("measurements"));
        }
        let mut times: Vec<f64> = sums.iter().map(|(t, _)| *t).collect();
        times.sort_by(f64::total_cmp);
        // What differs by less than a tenth is one time with noise.
        times.dedup_by(|later, earlier| *later < *earlier * 1.1);
        let line = Curve::linear(&sums);
        if times.len() == 1 {
            return Ok(line);
        }
        let stream = times.len() > 2;
        let at = |log_k: f64| Curve::with_turnover(&sums, log_k.exp(), stream);
        // Slower than a hundredth of the longest time is a straight line, faster than a hundred in the
        // shortest a constant. The error may have several valleys: a grid, then a search around its best.
        let (low, high) = ((0.01 / longest).ln(), (100.0 / shortest).ln());
        const GRID: u32 = 96;
        let step = (high - low) / f64::from(GRID);
        let best = (0..=GRID).map(|index| low + step * f64::from(index));
        let best = best.min_by(|a, b| at(*a).error.total_cmp(&at(*b).error)).unwrap_or(low);
        let (mut from, mut to) = (best - step, best + step);
        for _ in 0..40 {
            let (left, right) = (from + 0.382 * (to - from), from + 0.618 * (to - from));
            if at(left).error <= at(right).error {
                to = right;
            } else {
                from = left;
            }
        }
        let curve = at((from + to) / 2.0);
        // Two points fit any sweep.
        let sweep = if stream { Curve::sweep(&sums) } else { Curve::NOTHING };
        Ok([line, sweep]
            .into_iter()
            .fold(curve, |best, curve| if curve.error <= best.error { curve } else { best }))
    }

    /// The best sweep: it rises up to some measurement and is level after it.
    fn sweep(points: &[(f64, f64)]) -> Curve {
        let mut points = points.to_vec();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let curves = (1..points.len()).map(|corner| {
            let (rising, level) = points.split_at(corner);
            let rise = Curve::with_turnover(rising, 0.0, true).stream;
            let (mut weights, mut pages) = (0.0, 0.0);
            for (_, u) in level {
                let weight = 1.0 / (u * u).max(1.0);
                weights += weight;
                pages += weight * u;
            }
            let working_set = pages / weights;
            let turnover = if working_set > 0.0 { rise / working_set } else { 0.0 };
            Curve { working_set, turnover, stream: 0.0, sweeps: true, error: 0.0 }.measured(&points)
        });
        curves.min_by(|a, b| a.error.total_cmp(&b.error)).unwrap_or(Curve::NOTHING)
    }

    /// No curve at all: any other one is better.
    const NOTHING: Curve =
        Curve { working_set: 0.0, turnover: 0.0, stream: 0.0, sweeps: false, error: f64::INFINITY };

    /// The curve with its error over `points`.
    fn measured(mut self, points: &[(f64, f64)]) -> Curve {
        let squares: f64 = points.iter().map(|&(t, u)| ((self.pages_in(t) - u) / u.max(1.0)).powi(2)).sum();
        self.error = (squares / points.len() as f64).sqrt();
        self
    }

    fn linear(points: &[(f64, f64)]) -> Curve {
        Curve::with_turnover(points, 0.0, true)
    }

    /// The best curve with the turnover `k`; neither term is negative.
    fn with_turnover(points: &[(f64, f64)], k: f64, stream: bool) -> Curve {
        // Normal equations of two unknowns, weighted by 1 / pages².
        let (mut ff, mut ft, mut tt, mut fu, mut tu) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for &(t, u) in points {
            let (f, weight) = (-(-k * t).exp_m1(), 1.0 / (u * u).max(1.0));
            ff += weight * f * f;
            ft += weight * f * t;
            tt += weight * t * t;
            fu += weight * f * u;
            tu += weight * t * u;
        }
        let only_set = if ff > 0.0 { fu / ff } else { 0.0 };
        let determinant = ff * tt - ft * ft;
        let both = if stream && determinant > 1e-12 * ff * tt {
            ((fu * tt - tu * ft) / determinant, (tu * ff - fu * ft) / determinant)
        } else {
            (-1.0, -1.0)
        };
        let candidates = [both, (only_set, 0.0), (0.0, if stream { tu / tt } else { 0.0 })];
        let curves = candidates.into_iter().filter(|(set, stream)| *set >= 0.0 && *stream >= 0.0);
        let curves = curves.map(|(working_set, stream)| {
            Curve { working_set, turnover: k, stream, sweeps: false, error: 0.0 }.measured(points)
        });
        curves.min_by(|a, b| a.error.total_cmp(&b.error)).unwrap_or(Curve::NOTHING)
    }

    /// Different pages that the guest writes in `seconds`.
    pub fn pages_in(&self, seconds: f64) -> f64 {
        let seconds = seconds.max(0.0);
        if self.sweeps {
            return self.working_set * (self.turnover * seconds).min(1.0);
        }
        self.working_set * -(-self.turnover * seconds).exp_m1() + self.stream * seconds
    }

    /// Pages that are written again and again.
    pub fn working_set(&self) -> f64 {
        self.working_set
    }

    /// Pages per second that are written once and left behind.
    pub fn stream(&self) -> f64 {
        self.stream
    }

    /// Relative error of the fit: root mean square over the points.
    pub fn error(&self) -> f64 {
        self.error
    }

    /// The curve of a guest that dirties `factor` times as many pages in any time: for the ends of an interval.
    pub fn scaled(&self, factor: f64) -> Curve {
        Curve { working_set: self.working_set * factor, stream: self.stream * factor, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rate::guest::{Guest, Writer};

    fn words(dirty: &[bool]) -> impl Iterator<Item = u64> + '_ {
        dirty.chunks(64).map(|chunk| {
            chunk.iter().enumerate().fold(0, |word, (bit, &dirty)| word | u64::from(dirty) << bit)
        })
    }

    /// Measures a guest over unions of up to 8 epochs and holds the curve against the guest itself, at times
    /// that were not measured.
    fn fitted(writer: Writer, tolerance: f64) {
        let mut guest = Guest::new(writer, 200_000.0, 1);
        let mut growth = Growth::new(8);
        for _ in 0..32 {
            let epoch = guest.epoch(0.05, 0.0);
            growth.add_words(words(&epoch.dirty), epoch.seconds).unwrap();
        }
        let points: Vec<_> = growth.points().collect();
        assert_eq!(points.len(), 8);
        let curve = Curve::fit(&points).unwrap();
        for seconds in [0.05, 0.07, 0.13, 0.29, 0.4] {
            let truth = guest.epoch(seconds, 0.0).faults as f64;
            let error = curve.pages_in(seconds) / truth - 1.0;
            assert!(error.abs() < tolerance, "{writer:?}: {error:+.3} at {seconds} s, {curve:?}");
        }
    }

    #[test]
    fn curves_follow_guests() {
        fitted(Writer::Uniform { pages: 10_000 }, 0.02);
        fitted(Writer::Uniform { pages: 1_000_000 }, 0.02);
        fitted(Writer::Zipf { pages: 50_000 }, 0.03);
        fitted(Writer::Sequential { pages: 1_000_000 }, 0.01);
        // A sharp corner between two measurements, which is found to within their distance.
        fitted(Writer::Sequential { pages: 30_000 }, 0.03);
        fitted(Writer::Sequential { pages: 33_000 }, 0.03);
    }

    #[test]
    fn few_points_give_what_they_can() {
        assert!(matches!(Curve::fit(&[]), Err(RateError::NoData(_))));
        let point = |seconds, pages| Point { seconds, pages };
        assert!(matches!(Curve::fit(&[point(0.0, 1)]), Err(RateError::NotPositive { .. })));
        let line = Curve::fit(&[point(0.1, 1000)]).unwrap();
        assert!((line.pages_in(1.0) - 10_000.0).abs() < 1.0 && line.working_set() == 0.0);
        // W = 2000, k = 10 / s, exactly.
        let two = Curve::fit(&[point(0.1, 1264), point(0.2, 1729)]).unwrap();
        assert!((two.working_set() - 2000.0).abs() < 10.0 && two.stream() == 0.0, "{two:?}");
        let idle = Curve::fit(&[point(0.1, 0), point(0.2, 0), point(0.4, 0)]).unwrap();
        assert!(idle.pages_in(10.0) < 1.0, "{idle:?}");
        assert!((two.scaled(1.5).pages_in(0.1) - 1.5 * two.pages_in(0.1)).abs() < 1e-6);
    }

    proptest! {
        /// Whatever the measurements, a curve rises, bends down and is finite.
        #[test]
        fn curves_are_sane(points in prop::collection::vec((1e-3..10.0f64, 0..1u64 << 32), 1..12)) {
            let points: Vec<_> = points.into_iter().map(|(seconds, pages)| Point { seconds, pages }).collect();
            let curve = Curve::fit(&points).unwrap();
            let at: Vec<_> = (0..50).map(|index| curve.pages_in(f64::from(index) * 0.3)).collect();
            prop_assert_eq!(at[0], 0.0);
            prop_assert!(at.iter().all(|pages| pages.is_finite()));
            prop_assert!(at.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(at.windows(3).all(|trio| trio[2] - trio[1] <= (trio[1] - trio[0]) * 1.000_001 + 1e-3));
        }

        /// At every length, pages of the mean epoch times the share of them that is not there twice.
        #[test]
        fn growth_counts_unions(
            epochs in prop::collection::vec(prop::collection::vec(any::<bool>(), 200), 1..12),
            span in 1..5usize,
        ) {
            let count = |set: &[bool]| set.iter().filter(|&&dirty| dirty).count() as f64;
            let mut growth = Growth::new(span);
            let mut unions = vec![(0.0, 0.0); span];
            for (index, epoch) in epochs.iter().enumerate() {
                growth.add_words(words(epoch), 0.5).unwrap();
                let length = index % span + 1;
                let together = &epochs[index + 1 - length..=index];
                let union: Vec<_> = (0..200).map(|page| together.iter().any(|epoch| epoch[page])).collect();
                unions[length - 1].0 += together.iter().map(|epoch| count(epoch)).sum::<f64>();
                unions[length - 1].1 += count(&union);
            }
            let mean = epochs.iter().map(|epoch| count(epoch)).sum::<f64>() / epochs.len() as f64;
            let points: Vec<_> = growth.points().collect();
            prop_assert_eq!(points.len(), epochs.len().min(span));
            for (length, (point, (added, united))) in (1..).zip(points.iter().zip(unions)) {
                let length = f64::from(length);
                prop_assert!((point.pages as f64 - mean * length * united / added).abs() <= 0.5 + 1e-6);
                prop_assert!((point.seconds - 0.5 * length).abs() < 1e-9);
            }
        }
    }

    /// A guest that speeds up is measured by all of its epochs, not by the first.
    #[test]
    fn an_epoch_has_the_mean_of_all_epochs() {
        let mut growth = Growth::new(8);
        for pages in [10, 20, 60] {
            growth.add_words(std::iter::once((1u64 << pages) - 1), 1.0).unwrap();
        }
        let points: Vec<_> = growth.points().collect();
        let point = |seconds, pages| Point { seconds, pages };
        assert_eq!(points, [point(1.0, 30), point(2.0, 40), point(3.0, 60)]);
    }
}
