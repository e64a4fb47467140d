//! Where a value lies between the ends of an axis, and the round values that are written at it.

use crate::bench::report::words::number;

/// Largest part of the smallest for which an axis counts in steps and not in powers.
const DECADE: f64 = 10.0;

/// The part of a logarithmic axis that is given to what is not positive, if there is such.
const BELOW: f64 = 0.14;

/// An axis that has a place for each of the values that it was made for. They are [drawable](super::drawable).
#[derive(Clone, Debug)]
pub(super) enum Axis {
    /// In equal steps.
    Linear { low: f64, high: f64, step: f64 },
    /// In powers: from and to a logarithm. Nothing, and less, is at its beginning, apart from the rest.
    Log { low: f64, high: f64, below: Option<&'static str> },
}

impl Axis {
    /// Logarithmic if the values span a decade.
    pub(super) fn fit(values: &[f64]) -> Axis {
        let (low, high) = positive(values);
        if high >= low * DECADE { Axis::log(values) } else { Axis::linear(values) }
    }

    /// From zero.
    pub(super) fn linear(values: &[f64]) -> Axis {
        let low = values.iter().copied().fold(0.0, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let high = if high > low { high } else { low + 1.0 };
        let raw = (high - low) / 5.0;
        let step = over(raw);
        Axis::Linear { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    /// Logarithmic, if any value is positive.
    pub(super) fn log(values: &[f64]) -> Axis {
        let (low, high) = positive(values);
        if low > high {
            return Axis::linear(values);
        }
        let below = match values.iter().copied().fold(1.0, f64::min) {
            ..0.0 => Some("≤ 0"),
            0.0 => Some("0"),
            _ => None,
        };
        let (low, high) = (under(low), over(high));
        Axis::Log { low: low.log10(), high: high.max(low * 2.0).log10(), below }
    }

    /// From 0 to 1.
    pub(super) fn place(&self, value: f64) -> f64 {
        match *self {
            Axis::Linear { low, high, .. } => (value - low) / (high - low),
            Axis::Log { .. } if value <= 0.0 => 0.0,
            Axis::Log { low, high, below } => {
                let apart = if below.is_some() { BELOW } else { 0.0 };
                apart + (1.0 - apart) * (value.log10() - low) / (high - low)
            }
        }
    }

    pub(super) fn is_log(&self) -> bool {
        matches!(self, Axis::Log { .. })
    }

    /// Where it is broken, if it is: between nothing and the least.
    pub(super) fn gap(&self) -> Option<f64> {
        matches!(self, Axis::Log { below: Some(_), .. }).then_some(BELOW / 2.0)
    }

    /// Places of round values, and how they are written.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        match *self {
            Axis::Linear { low, high, step } => {
                let ticks = (0..=((high - low) / step).round().clamp(0.0, 100.0) as u32)
                    // Steps of tenths add up to what is not quite zero.
                    .map(|tick| ((low / step).round() + f64::from(tick)) * step);
                ticks.map(|value| (self.place(value), written(value))).collect()
            }
            Axis::Log { low, high, below } => {
                let decades = high - low;
                let every = (decades / 6.0).ceil().max(1.0) as i32;
                let between: &[f64] = if decades <= 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let zero = below.map(|text| (0.0, text.to_owned()));
                let powers = (low.floor() as i32..=high.ceil() as i32)
                    .filter(|power| power.rem_euclid(every) == 0)
                    .flat_map(|power| between.iter().map(move |digit| digit * 10f64.powi(power)));
                let inside = powers.filter(|value| (low - 1e-6..=high + 1e-6).contains(&value.log10()));
                zero.into_iter().chain(inside.map(|value| (self.place(value), written(value)))).collect()
            }
        }
    }
}

/// The least and the most of what is positive; if nothing is, the least is more.
fn positive(values: &[f64]) -> (f64, f64) {
    let positive = values.iter().copied().filter(|value| *value > 0.0);
    positive.fold((f64::MAX, 0.0), |(low, high), value| (value.min(low), value.max(high)))
}

/// The round values about `value`, which is positive: from the power of ten before it to the one after it.
fn rounds(value: f64) -> [f64; 4] {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power)
}

/// The last that is not above `value`, or hardly.
fn under(value: f64) -> f64 {
    rounds(value).into_iter().rfind(|round| *round <= value * 1.001).unwrap_or(value)
}

/// The first that is not below `value`, or hardly.
fn over(value: f64) -> f64 {
    rounds(value).into_iter().find(|round| *round >= value * 0.999).unwrap_or(value)
}

/// A round value, with its thousands apart.
fn written(value: f64) -> String {
    // Steps of 0.2 are not quite tenths.
    let value = (value * 1e9).round() / 1e9;
    if value.abs() < 1e4 || value.abs() >= 1e9 {
        let text = number(value);
        return match text.contains(['.']) && !text.contains('e') {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text,
        };
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{2009}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis) -> Vec<String> {
        axis.ticks().into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round_and_values_lie_between_them() {
        assert_eq!(texts(&Axis::linear(&[3.0, 9.3])), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(texts(&Axis::linear(&[0.9, 0.3])), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(texts(&Axis::linear(&[-15.0, 30.0])), ["-20", "-10", "0", "10", "20", "30"]);
        assert_eq!(texts(&Axis::fit(&[120.0, 900.0, 1500.0])), ["100", "200", "500", "1000", "2000"]);
        assert_eq!(texts(&Axis::log(&[0.0, 0.1, 1.0, 10.0, 100.0])), ["0", "0.1", "1", "10", "100"]);
        assert_eq!(texts(&Axis::fit(&[-2.0, 0.1, 300.0])).first().map(String::as_str), Some("≤ 0"));
        assert_eq!(texts(&Axis::fit(&[9000.0, 90_000.0])).last().map(String::as_str), Some("100\u{2009}000"));
        assert!(texts(&Axis::fit(&[1e-9, 1e12])).len() < 10);
        for values in
            [vec![7.0], vec![0.0], vec![], vec![-3.0], vec![1e12, 1e-9, -1e12], vec![5.0, 5e7], vec![1e3; 2]]
        {
            for axis in [Axis::fit(&values), Axis::linear(&values), Axis::log(&values)] {
                assert!(axis.ticks().len() > 1, "{axis:?}");
                let ticks = axis.ticks().into_iter().map(|(place, _)| place);
                for place in values.iter().map(|value| axis.place(*value)).chain(ticks) {
                    assert!((-1e-3..=1.001).contains(&place), "{axis:?}: {place}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_apart_from_the_least() {
        let axis = Axis::log(&[0.0, 0.1, 100.0]);
        assert_eq!(axis.place(0.0), 0.0);
        assert!((axis.place(0.1) - BELOW).abs() < 1e-9 && (axis.place(100.0) - 1.0).abs() < 1e-9);
        assert!(axis.gap().is_some_and(|gap| gap < BELOW));
        assert_eq!(Axis::log(&[0.1, 100.0]).gap(), None);
        assert!(matches!(Axis::fit(&[1.0, 9.0]), Axis::Linear { .. }));
        assert!(matches!(Axis::fit(&[1.0, 10.0]), Axis::Log { .. }));
    }
}
