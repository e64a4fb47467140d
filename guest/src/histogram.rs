//! Latencies by their size, fine enough for percentiles: 16 buckets to the octave, so 6% off at most.

/// Counts of values of up to 2^40, in fixed space.
#[derive(Debug)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    largest: u64,
}

/// 16 exact values, then 16 buckets for each further octave.
const BUCKETS: usize = 16 * 37;

impl Histogram {
    /// One without values.
    pub const EMPTY: Histogram = Histogram { counts: [0; BUCKETS], largest: 0 };

    /// Counts `value`.
    pub fn add(&mut self, value: u64) {
        let count = &mut self.counts[bucket(value)];
        *count = count.saturating_add(1);
        self.largest = self.largest.max(value);
    }

    /// The greatest value so far.
    pub fn largest(&self) -> u64 {
        self.largest
    }

    /// The least value that at least `permille` of a thousand values do not exceed, by the upper end of its
    /// bucket; 0 without any values.
    pub fn quantile(&self, permille: u64) -> u64 {
        let total: u64 = self.counts.iter().map(|&count| u64::from(count)).sum();
        let wanted = (total * permille).div_ceil(1000);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if count > 0 && seen >= wanted {
                return upper_end(index).min(self.largest);
            }
        }
        0
    }
}

fn bucket(value: u64) -> usize {
    if value < 16 {
        return value as usize;
    }
    let octave = 63 - value.leading_zeros();
    let index = 16 * (octave as usize - 3) + (value >> (octave - 4)) as usize - 16;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

fn upper_end(index: usize) -> u64 {
    if index < 16 {
        return index as u64;
    }
    let shift = index / 16 - 1;
    ((16 + index as u64 % 16 + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_tight() {
        let mut last = 0;
        for value in (0..100_000).chain((17..40).flat_map(|bit| [(1 << bit) - 1, 1 << bit, 3 << (bit - 1)])) {
            let index = bucket(value);
            assert!(index < BUCKETS);
            assert!(upper_end(index) >= value, "{value}");
            assert!(upper_end(index) <= value + value / 16, "{value} counts as {}", upper_end(index));
            assert!(value > 100_000 || index >= last);
            last = index;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_a_known_set() {
        let mut histogram = Histogram::EMPTY;
        assert_eq!(histogram.quantile(500), 0);
        for value in 1..=1000 {
            histogram.add(value);
        }
        for (permille, exact) in [(500, 500), (990, 990), (999, 999), (1000, 1000)] {
            let found = histogram.quantile(permille);
            assert!(found >= exact && found <= exact + exact / 16, "{permille}: {found}");
        }
        assert_eq!(histogram.largest(), 1000);
    }

    #[test]
    fn one_slow_access_of_a_thousand_is_the_maximum_only() {
        let mut histogram = Histogram::EMPTY;
        for _ in 0..999 {
            histogram.add(10);
        }
        histogram.add(1 << 50);
        assert_eq!((histogram.quantile(500), histogram.quantile(999)), (10, 10));
        assert_eq!(histogram.largest(), 1 << 50);
    }
}
