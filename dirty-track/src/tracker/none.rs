//! The tracker that tracks nothing: what every other one is measured against.

use crate::tracker::harvest::OwedSet;
use crate::tracker::{Backing, Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

/// Tracks nothing and costs nothing. Its harvests are empty, and its [`Guarantees`] say that this means
/// nothing.
#[derive(Debug)]
pub struct Untracked {
    armed: bool,
    owed: OwedSet,
}

impl Untracked {
    /// A tracker that watches none of `slots`.
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`], as with any tracker.
    pub fn new(slots: Vec<Slot>) -> Result<Untracked, TrackerError> {
        Ok(Untracked { armed: false, owed: OwedSet::new(&Slot::sorted(slots)?) })
    }
}

impl Tracker for Untracked {
    fn name(&self) -> &'static str {
        Kind::None.name()
    }

    fn guarantees(&self) -> Guarantees {
        Kind::None.guarantees(Backing::Private)
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.armed {
            return Err(TrackerError::AlreadyArmed);
        }
        self.armed = true;
        Ok(())
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        Ok(self.owed.lend())
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.owed.set_slots(&Slot::sorted(slots)?);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        self.armed = false;
        Ok(())
    }
}
