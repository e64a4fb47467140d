//! What is said of samples: medians, and how far the samples lie apart. Means are nobody's friend on a shared machine.

/// Lower quartile, median and upper quartile; NaN without samples.
pub(super) fn quartiles(samples: &[f64]) -> [f64; 3] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    [0.25, 0.5, 0.75].map(|part| quantile(&sorted, part))
}

/// The median; NaN without samples.
pub(super) fn median(samples: &[f64]) -> f64 {
    quartiles(samples)[1]
}

/// Of sorted samples, between two of them in proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (below, above) = (sorted[at as usize], sorted[(at.ceil() as usize).min(last)]);
    below + (above - below) * at.fract()
}

/// Half of what lies between the quartiles, as a part of the median; nothing for what is always nothing.
pub(super) fn spread(low: f64, median: f64, high: f64) -> f64 {
    if high == low { 0.0 } else { (high - low) / 2.0 / median.abs().max(f64::MIN_POSITIVE) }
}

/// How far the median of so many samples may be from the truth, as a part of it: one standard error, by the quartiles (for a
/// normal distribution the quartiles are 1.35 standard deviations apart, and the error of a median is 1.25 of a mean's).
pub(super) fn uncertainty(samples: &[f64]) -> f64 {
    let [low, median, high] = quartiles(samples);
    error_of_median(spread(low, median, high) * 2.0 / 1.35, samples.len())
}

/// How far the median of so many samples may be from the truth: one standard error, of samples with that standard `deviation`.
pub(super) fn error_of_median(deviation: f64, samples: usize) -> f64 {
    1.25 * deviation / (samples as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_where_they_should() {
        assert_eq!(quartiles(&[5.0, 1.0, 3.0, 2.0, 4.0]), [2.0, 3.0, 4.0]);
        assert_eq!(quartiles(&[1.0, 2.0]), [1.25, 1.5, 1.75]);
        assert_eq!(quartiles(&[7.0]), [7.0; 3]);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn more_of_the_same_is_more_certain() {
        let few = [9.0, 10.0, 11.0, 10.0];
        let many: Vec<f64> = few.iter().copied().cycle().take(400).collect();
        assert!(uncertainty(&many) < uncertainty(&few) / 5.0);
        assert_eq!(uncertainty(&[3.0; 4]), 0.0);
        assert_eq!(uncertainty(&[0.0; 4]), 0.0);
    }
}
