//! `--working-set`: how much of guest memory is in use, read or written, over and over for some time.

use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;
use std::time::{Duration, Instant};

use dirty_track::addr::PAGE_SIZE;
use dirty_track::touched::{Touched, TouchedError};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::options::{self, OptionError};

/// What `--working-set` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSetConfig {
    /// Length of an interval; it ends with the epoch in which it is over.
    pub every: Duration,
    /// Look at so many pages of each GiB only.
    pub per_gib: Option<u64>,
}

impl FromStr for WorkingSetConfig {
    type Err = OptionError;

    /// A time, and perhaps a sample: `10s`, `10s,per-gib=512`.
    fn from_str(text: &str) -> Result<WorkingSetConfig, OptionError> {
        let (every, rest) = text.split_once(',').map_or((text, None), |(every, rest)| (every, Some(rest)));
        let mut config = WorkingSetConfig { every: options::duration(every)?, per_gib: None };
        for (key, value) in rest.map_or(Ok(Vec::new()), |rest| options::key_values(rest, &["per-gib"]))? {
            let pages = value.parse().ok().filter(|pages| (1..=1 << 18).contains(pages));
            config.per_gib = Some(pages.ok_or_else(|| OptionError::Value {
                key: key.into(),
                value: value.into(),
                expected: "pages of each GiB, 1 to 262144".into(),
            })?);
        }
        Ok(config)
    }
}

/// What was touched in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkingSetReport {
    /// Its length in seconds.
    pub seconds: f64,
    /// Pages that were touched; an estimate, if just some were looked at.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Share of guest memory, in percent.
    pub percent: f64,
    /// Ends of the 95 % confidence interval in pages, where it is an estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(u64, u64)>,
    /// Microseconds that it took to look, and to begin anew.
    pub took_us: f64,
}

/// Looks from time to time.
#[derive(Debug)]
pub struct Watch {
    config: WorkingSetConfig,
    touched: Touched,
    began: Instant,
}

impl Watch {
    /// Begins the first interval. A tracker by userfaultfd has to be armed before.
    ///
    /// # Errors
    /// See [`TouchedError`].
    pub fn begin(machine: &Machine, config: WorkingSetConfig) -> Result<Watch, TouchedError> {
        let mut touched = match config.per_gib {
            None => Touched::new(machine.slots())?,
            Some(per_gib) => {
                Touched::sampled(machine.slots(), per_gib, RandomState::new().hash_one("which pages"))?
            }
        };
        touched.begin()?;
        Ok(Watch { config, touched, began: Instant::now() })
    }

    /// What was touched, if the interval is over; the next begins then.
    ///
    /// # Errors
    /// See [`TouchedError`].
    pub fn look(&mut self) -> Result<Option<WorkingSetReport>, TouchedError> {
        let now = Instant::now();
        let seconds = now.duration_since(self.began).as_secs_f64();
        if seconds < self.config.every.as_secs_f64() {
            return Ok(None);
        }
        let change = self.touched.look(|_| {})?;
        self.touched.begin()?;
        self.began = Instant::now();
        let pages = change.changed_pages().round() as u64;
        let (low, high) = change.interval();
        Ok(Some(WorkingSetReport {
            seconds,
            pages,
            bytes: pages * PAGE_SIZE,
            percent: pages as f64 / change.pages as f64 * 100.0,
            interval: self.config.per_gib.map(|_| (low.floor() as u64, high.ceil() as u64)),
            took_us: now.elapsed().as_secs_f64() * 1e6,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read() {
        let parse = |text: &str| text.parse::<WorkingSetConfig>();
        let every = Duration::from_secs(10);
        assert_eq!(parse("10s"), Ok(WorkingSetConfig { every, per_gib: None }));
        assert_eq!(parse("10s,per-gib=512"), Ok(WorkingSetConfig { every, per_gib: Some(512) }));
        // As with all options, what is between commas may be nothing.
        assert_eq!(parse("10s,"), parse("10s"));
        for bad in ["", "x", "10s,per-gib=0", "10s,per-gib=x", "10s,more=1", "per-gib=3"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
