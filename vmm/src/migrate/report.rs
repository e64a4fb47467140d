//! How a migration goes, and how it went.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::options::human_size;
use crate::panel::grouped;

/// One round of a precopy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Seconds that sending took.
    pub seconds: f64,
    /// Pages whose contents were sent.
    pub pages: u64,
    /// Pages of which it was said that they are all zeros.
    pub zero: u64,
    /// Pages that the guest wrote meanwhile.
    pub dirty: u64,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Connections are made.
    #[default]
    Connecting,
    /// Memory is copied while the guest runs here.
    Precopy,
    /// The guest stands still.
    Still,
    /// The guest runs at the destination, which asks for what it has not got.
    Postcopy,
    /// The guest runs at the destination, and nothing of it is needed here any more.
    Completed,
    /// It did not come about, and the guest goes on here.
    Failed,
    /// It was cancelled, and the guest goes on here.
    Cancelled,
    /// The guest was given away, and the destination has not said that it has it. It stands still here.
    InDoubt,
}

impl Phase {
    /// Whether it goes on.
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Completed | Phase::Failed | Phase::Cancelled | Phase::InDoubt)
    }
}

/// A migration, from the source's side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// How far it is.
    pub phase: Phase,
    /// Where it goes.
    pub to: String,
    /// Seconds since it was asked for, until its end.
    pub seconds: f64,
    /// Milliseconds from the last instruction here to the destination's word that the guest runs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub still_ms: Option<f64>,
    /// Rounds while the guest ran.
    pub rounds: Vec<Round>,
    /// What was sent while it stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Round>,
    /// Pages whose contents were sent in all.
    pub pages: u64,
    /// Pages of zeros, in all.
    pub zero: u64,
    /// Bytes that went over the connections.
    pub bytes: u64,
    /// Bytes per second of the last round that tells.
    pub bytes_per_s: f64,
    /// Pages that are owed.
    pub owed: u64,
    /// For how many milliseconds the guest would stand still now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// For how much of their time vCPUs are held back, in percent.
    pub slowed_percent: u8,
    /// Pages that the destination asked for after the switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_pages: Option<u64>,
    /// Connections.
    pub connections: usize,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl fmt::Display for MigrationReport {
    /// One line for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.rounds.len();
        match self.phase {
            Phase::Connecting => write!(f, "connecting to {}", self.to),
            Phase::Precopy => {
                write!(
                    f,
                    "round {}: {} sent at {}/s, {} pages owed",
                    rounds + 1,
                    human_size(self.bytes),
                    human_size(self.bytes_per_s as u64),
                    grouped(self.owed)
                )?;
                if let Some(ms) = self.downtime_ms {
                    write!(f, ", would stand still for {ms:.1} ms")?;
                }
                if self.slowed_percent > 0 {
                    write!(f, ", held back by {} %", self.slowed_percent)?;
                }
                Ok(())
            }
            Phase::Still => f.write_str("the guest stands still"),
            Phase::Postcopy => write!(
                f,
                "the guest runs at {}, which has asked for {} pages",
                self.to,
                grouped(self.postcopy_pages.unwrap_or(0))
            ),
            Phase::Completed => write!(
                f,
                "migrated to {} in {:.3} s: {} in {rounds} rounds ({} pages, {} more are all zeros), the guest stood still \
                 for {:.2} ms",
                self.to,
                self.seconds,
                human_size(self.bytes),
                grouped(self.pages),
                grouped(self.zero),
                self.still_ms.unwrap_or(0.0)
            ),
            Phase::Cancelled => f.write_str("the migration was cancelled; the guest goes on here"),
            Phase::Failed => write!(
                f,
                "the migration to {} failed, and the guest goes on here: {}",
                self.to,
                self.error.as_deref().unwrap_or("for no known reason")
            ),
            Phase::InDoubt => write!(f, "IN DOUBT: {}", self.error.as_deref().unwrap_or_default()),
        }
    }
}
