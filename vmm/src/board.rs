//! What is known of a machine's dirty memory at the moment, posted by who observes it, for whoever asks.
//!
//! Whoever asks never waits for the observer, and the observer never waits for whoever asks.

use std::sync::Arc;

use dirty_track::log::{End, Span};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::live::{Epoch, Totals};
use crate::migrate::report::MigrationReport;
use crate::sampled::{Look, Looks};

/// What is posted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Posted {
    /// Name of the tracker.
    pub(crate) tracker: &'static str,
    /// Pages are being tracked, or looked at.
    pub(crate) armed: bool,
    /// Length of an epoch in seconds.
    pub(crate) epoch_s: f64,
    /// The last epoch, and what was dirty in it.
    pub(crate) last: Option<Arc<Epoch>>,
    pub(crate) ranges: Arc<Vec<Span>>,
    pub(crate) totals: Option<Arc<Totals>>,
    /// The same of a sample.
    pub(crate) look: Option<Look>,
    pub(crate) looks: Option<Looks>,
    pub(crate) dump: Option<DumpStatus>,
    /// The migration that is under way, or the last one.
    pub(crate) migration: Option<Arc<MigrationReport>>,
}

/// How a dump is getting on, or how the last one did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DumpStatus {
    /// It has not ended yet.
    pub running: bool,
    /// Epochs written.
    pub epochs: u64,
    /// Pages reported dirty in them.
    pub dirty: u64,
    /// Pages whose contents were written.
    pub pages: u64,
    /// Pages that were all zeros.
    pub zero: u64,
    /// Bytes of the log.
    pub bytes: u64,
    /// Why it ended before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl DumpStatus {
    /// With what is in the log `so_far`.
    pub(crate) fn new(running: bool, so_far: &End, bytes: u64) -> DumpStatus {
        DumpStatus {
            running,
            epochs: so_far.epochs,
            dirty: so_far.total.dirty,
            pages: so_far.total.pages,
            zero: so_far.total.zero,
            bytes,
            error: None,
        }
    }
}

/// The observer's side.
#[derive(Debug, Default)]
pub(crate) struct Board(watch::Sender<Arc<Posted>>);

/// The other side. Cloning it is cheap.
pub(crate) type Reader = watch::Receiver<Arc<Posted>>;

impl Board {
    pub(crate) fn reader(&self) -> Reader {
        self.0.subscribe()
    }

    /// Changes what is posted.
    pub(crate) fn post(&self, change: impl FnOnce(&mut Posted)) {
        self.0.send_modify(|posted| change(Arc::make_mut(posted)));
    }

    /// What is posted now.
    pub(crate) fn posted(&self) -> Arc<Posted> {
        Arc::clone(&self.0.borrow())
    }

    /// Whether anybody could ask.
    pub(crate) fn is_read(&self) -> bool {
        self.0.receiver_count() > 0
    }
}
