//! Figures as people read them: three digits, a unit, a mark on what is noisy.

use crate::bench::results::{Figure, Limit, Unit};

/// Stands where there is no figure.
pub(super) const MISSING: &str = "–";

/// Three digits or a few more; [`MISSING`] for what is no number.
pub(super) fn number(value: f64) -> String {
    if !value.is_finite() {
        return MISSING.to_owned();
    }
    match value.abs() {
        0.0 => "0".to_owned(),
        ..1e-3 | 1e7.. => format!("{value:.1e}"),
        size if size.fract() == 0.0 || size >= 100.0 => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// With its unit.
pub(super) fn quantity(value: f64, unit: Unit) -> String {
    if !value.is_finite() || unit == Unit::Count {
        return number(value);
    }
    format!("{} {unit}", number(value))
}

/// A part of one, in per cent.
pub(super) fn percent(part: f64) -> String {
    let percent = part * 100.0;
    match percent.abs() {
        _ if !percent.is_finite() => MISSING.to_owned(),
        ..0.05 => "0 %".to_owned(),
        ..10.0 => format!("{percent:.1} %"),
        _ => format!("{percent:.0} %"),
    }
}

/// What a figure is to what bounds it.
pub(super) fn ratio(limit: &Limit) -> Option<String> {
    let ratio = Some(limit.ratio).filter(|ratio| ratio.is_finite())?;
    Some(match ratio.abs() {
        ..1e-2 | 1e2.. => format!("{}x", number(ratio)),
        _ => format!("{ratio:.2}x"),
    })
}

/// Before what is noisy.
pub(super) fn mark(figure: &Figure) -> &'static str {
    if figure.noisy && figure.median.is_finite() { "~" } else { "" }
}

/// Everything that is known of a figure, in a line.
pub(super) fn detail(figure: &Figure) -> String {
    let Figure { unit, median, low, high, .. } = *figure;
    let mut text = format!("{}{}", mark(figure), quantity(median, unit));
    if low.is_finite() && high.is_finite() && low != high {
        text += &format!(", quartiles {} to {}", number(low), quantity(high, unit));
    }
    let plural = if figure.samples.len() == 1 { "" } else { "s" };
    text += &format!(", {} sample{plural}", figure.samples.len());
    if let Some(limit) = &figure.limit {
        let ratio = ratio(limit).map_or(String::new(), |ratio| format!(", {ratio}"));
        text += &format!("; {}: {}{ratio}", limit.name, quantity(limit.median, unit));
    }
    text
}

/// A time that a run took.
pub(super) fn took(seconds: f64) -> String {
    match seconds {
        _ if !seconds.is_finite() || seconds < 0.0 => MISSING.to_owned(),
        ..10.0 => format!("{seconds:.1} s"),
        ..60.0 => format!("{seconds:.0} s"),
        ..3600.0 => format!("{:.0} min {:.0} s", (seconds / 60.0).floor(), (seconds % 60.0).floor()),
        _ => format!("{:.0} h {:.0} min", (seconds / 3600.0).floor(), (seconds % 3600.0 / 60.0).floor()),
    }
}

/// Text from outside on one line, and without what a terminal would obey.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// At most so many letters of it.
pub(super) fn shortened(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return text.to_owned();
    }
    text.chars().take(letters.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Better;

    #[test]
    fn numbers_are_short_and_never_absurd() {
        let read = [
            (0.0, "0"),
            (-0.0, "0"),
            (0.1234, "0.123"),
            (1.0, "1"),
            (1.234, "1.23"),
            (12.345, "12.3"),
            (123.4, "123"),
            (-812.3, "-812"),
            (123_456.7, "123457"),
            (1.5e9, "1.5e9"),
            (0.000_21, "2.1e-4"),
            (f64::NAN, "–"),
            (f64::INFINITY, "–"),
        ];
        for (value, text) in read {
            assert_eq!(number(value), text, "{value}");
        }
        assert_eq!(quantity(1.5, Unit::Ms), "1.50 ms");
        assert_eq!(quantity(7.0, Unit::Count), "7");
        assert_eq!(quantity(f64::NAN, Unit::Ms), "–");
        assert_eq!(
            (percent(0.021).as_str(), percent(0.5).as_str(), percent(0.0).as_str()),
            ("2.1 %", "50 %", "0 %")
        );
        assert_eq!(percent(f64::NAN), "–");
    }

    #[test]
    fn times_are_told_in_two_units() {
        let read =
            [(0.25, "0.2 s"), (59.0, "59 s"), (725.9, "12 min 5 s"), (7384.0, "2 h 3 min"), (-1.0, "–")];
        for (seconds, text) in read {
            assert_eq!(took(seconds), text, "{seconds}");
        }
        assert_eq!(took(f64::NAN), "–");
    }

    #[test]
    fn all_of_a_figure_is_told() {
        let mut figure = Figure::of("first write", Unit::Ns, Better::Lower, vec![800.0, 812.0, 830.0]);
        assert_eq!(detail(&figure), "812 ns, quartiles 806 to 821 ns, 3 samples");
        figure.noisy = true;
        figure.limit = Some(Limit { name: "native fault".into(), median: 700.0, ratio: 1.16 });
        assert!(detail(&figure).starts_with("~812 ns"));
        assert!(detail(&figure).ends_with("; native fault: 700 ns, 1.16x"));
        let ratio_of = |of: f64| ratio(&Limit { name: String::new(), median: 1.0, ratio: of });
        assert_eq!(ratio_of(1.042).as_deref(), Some("1.04x"));
        assert_eq!(ratio_of(1234.5).as_deref(), Some("1234x"));
        assert_eq!(ratio_of(f64::NAN), None);
        let nothing = Figure { noisy: true, ..Figure::of("x", Unit::Ms, Better::Lower, Vec::new()) };
        assert_eq!(detail(&nothing), "–, 0 samples");
    }

    #[test]
    fn text_from_outside_obeys() {
        assert_eq!(plain("a\x1b[31mb\nc"), "a [31mb c");
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("äöüß", 4), "äöüß");
        assert_eq!(shortened("ab", 0), "…");
    }
}
