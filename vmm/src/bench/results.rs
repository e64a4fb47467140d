//! What a run of `vmm bench` measured: the document that `--json` writes and that everything else is made from.
//!
//! # The form
//! A JSON object: `schema` ([`SCHEMA`]; a reader refuses others), `vmm` (version), `began` (RFC 3339), `seconds`, `quick`,
//! `complete` (false if it was interrupted: what was measured until then is there), `host`, `tables`, and `skipped`, a list
//! of what this host cannot do and why. A table is what was measured in turns, one row for each contender; a row has its
//! `case`, an object of what makes it different, `yardstick` (whether it is there for others to be held against), and its
//! `figures`. A figure has its `samples` in the order in which they
//! were taken, and what follows from them; its `limit`, where something bounds it, was measured in the same turns.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::stats;
use crate::beside;

/// Version of the form.
pub const SCHEMA: u32 = 1;

/// Why results cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// The file.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something else.
    #[error("{} is not what `vmm bench --json` writes: {source}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Where it differs.
        source: serde_json::Error,
    },
    /// Another version's.
    #[error("{} has form {found}, and this vmm reads {SCHEMA}: use the vmm that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its form.
        found: u32,
    },
}

/// Everything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of the program that measured.
    pub vmm: String,
    /// When, in UTC.
    pub began: String,
    /// How long it took.
    pub seconds: f64,
    /// Whether it was to be over soon.
    pub quick: bool,
    /// Whether it came to its end.
    pub complete: bool,
    /// Where.
    pub host: HostFacts,
    /// What.
    pub tables: Vec<Table>,
    /// What could not be measured here.
    pub skipped: Vec<Skipped>,
}

/// The host that it was measured on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostFacts {
    /// The processor's name.
    pub cpu: String,
    /// Processors online.
    pub cpus: usize,
    /// RAM in bytes.
    pub memory: u64,
    /// Kernel release.
    pub kernel: String,
    /// KVM's module.
    pub kvm: String,
    /// How KVM maps guest memory.
    pub mmu: String,
    /// Whether it is itself a virtual machine.
    pub in_vm: bool,
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub thp: Option<String>,
    /// The governor of the processors' frequency.
    pub governor: Option<String>,
    /// How much the same work took longer than at its fastest, half of the time at least: 0.05 is 5 %.
    pub noise: f64,
    /// Load average over a minute when it began.
    pub load: f64,
    /// Whether threads had processors of their own.
    pub pinned: bool,
    /// Whether it is emulated: its times mean little then.
    #[serde(default)]
    pub emulated: bool,
    /// The tracker that `--track auto` takes here.
    #[serde(default)]
    pub auto: String,
    /// The trackers that miss nothing here, whatever the guest is.
    #[serde(default)]
    pub sound: Vec<String>,
}

/// Something that this host cannot do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What was to be measured.
    pub what: String,
    /// Why it was not.
    pub why: String,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Bench {
    /// What the host itself can do.
    #[value(skip)]
    Limits,
    /// What tracking costs.
    Dirty,
    /// What serving a guest's faults costs.
    Fault,
    /// How soon a snapshot runs.
    Restore,
    /// How fast a guest is moved.
    Migrate,
    /// How fast a guest starts.
    Boot,
}

impl fmt::Display for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Bench::Limits => "limits",
            Bench::Dirty => "dirty",
            Bench::Fault => "fault",
            Bench::Restore => "restore",
            Bench::Migrate => "migrate",
            Bench::Boot => "boot",
        })
    }
}

/// What was measured in turns.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Table {
    /// Which bench it belongs to.
    pub bench: Bench,
    /// What it shows, in a few words.
    pub title: String,
    /// The contenders.
    pub rows: Vec<Row>,
}

/// A contender.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// What makes it different.
    pub case: Case,
    /// It is what others are held against: a property of the host, and not of this program.
    #[serde(default)]
    pub yardstick: bool,
    /// What it showed.
    pub figures: Vec<Figure>,
}

impl Row {
    /// The figure of this name.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }
}

/// What makes a contender different: names and values, in an order that reads well. In another order it is the same.
#[derive(Clone, Debug, Default)]
pub struct Case(pub Vec<(String, String)>);

impl PartialEq for Case {
    fn eq(&self, other: &Case) -> bool {
        self.0.len() == other.0.len() && self.0.iter().all(|pair| other.0.contains(pair))
    }
}

impl Case {
    /// Of these names and values.
    pub fn of(pairs: &[(&str, &str)]) -> Case {
        Case(pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// The value of this name; empty if it has none.
    pub fn get(&self, key: &str) -> &str {
        self.0.iter().find(|(name, _)| name == key).map_or("", |(_, value)| value)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        f.pad(&pairs.join(" "))
    }
}

impl Serialize for Case {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Case {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Case, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Case;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Case, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Case(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// In what a figure is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Milliseconds.
    #[serde(rename = "ms")]
    Ms,
    /// Microseconds.
    #[serde(rename = "us")]
    Us,
    /// Nanoseconds.
    #[serde(rename = "ns")]
    Ns,
    /// Mebibytes.
    #[serde(rename = "MiB")]
    Mib,
    /// Mebibytes in a second.
    #[serde(rename = "MiB/s")]
    MibPerS,
    /// Per cent.
    #[serde(rename = "%")]
    Percent,
    /// Things.
    #[serde(rename = "")]
    Count,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Unit::Ms => "ms",
            Unit::Us => "us",
            Unit::Ns => "ns",
            Unit::Mib => "MiB",
            Unit::MibPerS => "MiB/s",
            Unit::Percent => "%",
            Unit::Count => "",
        })
    }
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is.
    Lower,
    /// More is.
    Higher,
    /// It is just so.
    Neither,
}

/// One thing that was measured of one contender.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What.
    pub name: String,
    /// In what.
    pub unit: Unit,
    /// Which way is good.
    pub better: Better,
    /// The median of the samples.
    pub median: f64,
    /// Their lower quartile.
    pub low: f64,
    /// Their upper quartile.
    pub high: f64,
    /// Half of what lies between the quartiles, as a part of the median.
    pub spread: f64,
    /// Whether that is too much for what it says to be taken at its word.
    pub noisy: bool,
    /// What bounds it, where something does.
    pub limit: Option<Limit>,
    /// As they were taken.
    pub samples: Vec<f64>,
}

/// The spread from which on a figure is called noisy.
pub const NOISY: f64 = 0.10;

impl Figure {
    /// Of these samples, of which there is one at least.
    pub(super) fn of(name: &str, unit: Unit, better: Better, samples: Vec<f64>) -> Figure {
        let [low, median, high] = stats::quartiles(&samples);
        let spread = stats::spread(low, median, high);
        let noisy = spread > NOISY;
        Figure { name: name.to_owned(), unit, better, median, low, high, spread, noisy, limit: None, samples }
    }
}

/// What bounds a figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// What it is.
    pub name: String,
    /// The median of its samples, in the figure's unit.
    pub median: f64,
    /// The median of what the figure is to it, turn by turn.
    pub ratio: f64,
}

impl Results {
    /// Writes them to `path`, whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, path: &Path) -> Result<(), ResultsError> {
        let failed = |source| ResultsError::File { what: "write", path: path.to_owned(), source };
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        beside::write(path, &text).map_err(failed)
    }

    /// Reads them from `path`.
    ///
    /// # Errors
    /// See [`ResultsError`].
    pub fn read(path: &Path) -> Result<Results, ResultsError> {
        #[derive(Deserialize)]
        struct Form {
            schema: u32,
        }
        let failed = |source| ResultsError::File { what: "read", path: path.to_owned(), source };
        let form = |source| ResultsError::Form { path: path.to_owned(), source };
        let text = std::fs::read(path).map_err(failed)?;
        let Form { schema: found } = serde_json::from_slice(&text).map_err(form)?;
        if found != SCHEMA {
            return Err(ResultsError::Version { path: path.to_owned(), found });
        }
        serde_json::from_slice(&text).map_err(form)
    }

    /// All rows, with the tables that they are in.
    pub fn rows(&self) -> impl Iterator<Item = (&Table, &Row)> {
        self.tables.iter().flat_map(|table| table.rows.iter().map(move |row| (table, row)))
    }
}
