//! Values of command-line options: sizes with K/M/G, and `key=value,key=value` lists.

use std::time::Duration;

/// Why an option's value was refused. The message names the value and what would do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OptionError {
    /// Not a size.
    #[error("'{0}' is not a size: give a number of bytes with K, M, G or T if you like, as in 512M")]
    Size(String),
    /// Not a duration.
    #[error("'{0}' is not a duration: give a number with ms, s, m or h, as in 250ms")]
    Duration(String),
    /// An element of a list without `=`.
    #[error("'{0}' is not of the form key=value (keys: {1})")]
    NotKeyValue(String, String),
    /// A key that the option does not have.
    #[error("no key '{0}' here (keys: {1})")]
    UnknownKey(String, String),
    /// A key given twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A value that its key does not take.
    #[error("'{value}' will not do for {key}: {expected}")]
    Value {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What would do.
        expected: String,
    },
}

/// The longest epoch: a day.
pub const LONGEST_EPOCH: Duration = Duration::from_secs(86400);

/// Parses the length of an epoch that leaves the guest time to run: harvests in a row starve it.
///
/// # Errors
/// Why it will not do.
pub fn epoch(text: &str) -> Result<Duration, String> {
    let epoch = duration(text).map_err(|error| error.to_string())?;
    if epoch < Duration::from_millis(1) || epoch > LONGEST_EPOCH {
        return Err(format!("'{text}' will not do: give 1ms to 24h"));
    }
    Ok(epoch)
}

/// Parses a size in bytes: a number, binary suffix K, M, G or T optional.
pub fn size(text: &str) -> Result<u64, OptionError> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text.trim())
        .map_err(|_| OptionError::Size(text.to_owned()))
}

/// Parses a duration: a number with `ms`, `s` (default), `m` or `h`. Zero is a duration.
pub fn duration(text: &str) -> Result<Duration, OptionError> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|_| OptionError::Duration(text.to_owned()));
    }
    humantime::parse_duration(text).map_err(|_| OptionError::Duration(text.to_owned()))
}

/// Splits `key=value,key=value`, each key one of `keys` and at most once.
pub fn key_values<'a>(text: &'a str, keys: &[&str]) -> Result<Vec<(&'a str, &'a str)>, OptionError> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            return Err(OptionError::NotKeyValue(part.to_owned(), keys.join(", ")));
        };
        if !keys.contains(&key) {
            return Err(OptionError::UnknownKey(key.to_owned(), keys.join(", ")));
        }
        if pairs.iter().any(|(seen, _)| *seen == key) {
            return Err(OptionError::Twice(key.to_owned()));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Parses `on` or `off`.
pub fn on_off(key: &str, value: &str) -> Result<bool, OptionError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionError::Value { key: key.into(), value: value.into(), expected: "on or off".into() }),
    }
}

/// `bytes` for people: three digits and a binary unit.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_absurd_ones_are_refused() {
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("64m"), Ok(64 << 20));
        assert_eq!(size("4096"), Ok(4096));
        for bad in ["", "G", "-1", "1X", "99999999999999999999T", "one"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "-1", "soon", "1e400", "NaN"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_name_what_is_wrong() {
        assert_eq!(key_values("a=1,b=2", &["a", "b"]), Ok(vec![("a", "1"), ("b", "2")]));
        assert!(matches!(key_values("c=1", &["a"]), Err(OptionError::UnknownKey(..))));
        assert!(matches!(key_values("a", &["a"]), Err(OptionError::NotKeyValue(..))));
        assert!(matches!(key_values("a=1,a=2", &["a"]), Err(OptionError::Twice(..))));
    }

    #[test]
    fn human_sizes() {
        assert_eq!(human_size(0), "0 B");
        assert_eq!(human_size(1 << 30), "1 GiB");
        assert_eq!(human_size(1536), "1.5 KiB");
    }
}
