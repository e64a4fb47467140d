//! The server as a tracker: what was opened since the last harvest is what was written.
//!
//! It is exact where the [policy of splitting](crate::fault::Split) is: a write to a protected page is a fault, and
//! pages that are installed are protected from the start, those that come along with another included. No second
//! userfaultfd can be registered over memory whose faults are served, so this is the tracker to take there.
//!
//! # Why no write is lost
//! What is present and not protected is dirty in the [record](crate::stage2); a handler opens and records, and a
//! harvest takes and protects, with the block held. Who is opening a page when a harvest begins has recorded it before
//! the harvest looks for blocks that have something dirty. So a write that was complete before the harvest began went through a page that the harvest takes;
//! and one that comes after its block's turn sleeps until a handler has recorded it for the next.
//!
//! Contents that are dropped are dirty. The news of it comes *before* the drop: a page that is dropped and still
//! mapped when a harvest looks stays dirty for the next, and one that was brought again between the news and the drop may
//! be reported when it is missed: nobody can tell that it was not written. (Not so for what is dropped from a file and was not mapped: who
//! punches holes into a file that others read meanwhile marks them as host writes.)

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::errno;

use crate::addr::PageSize;
use crate::fault::serve::{Kernel, Pager};
use crate::fault::{FaultError, Server, Split};
use crate::stage2::{Block, Leaves, Spare};
use crate::tracker::change::Tracked;
use crate::tracker::harvest::OwedSet;
use crate::tracker::uffd_async::guarantees;
use crate::tracker::wp_slot::{WpSlot, masks};
use crate::tracker::{Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};

/// Mappings change until a handler has read of it, which is a matter of microseconds; on a host with more to do than it
/// has processors, of many milliseconds. A handler that has not come to that after this time does not run at all.
const PATIENCE: Duration = Duration::from_secs(10);
const BETWEEN_ATTEMPTS: Duration = Duration::from_micros(100);

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct FaultTracker {
    server: Arc<Server>,
    /// Those of the server's that are tracked, in the order of `owed`.
    slots: Vec<WpSlot>,
    owed: OwedSet,
    armed: bool,
}

impl FaultTracker {
    /// A tracker of all memory whose faults `server` serves. It is not armed yet.
    pub fn new(server: Arc<Server>) -> FaultTracker {
        let slots = server.slots().to_vec();
        let mut owed = OwedSet::new(slots.iter().map(Tracked::slot));
        owed.allow_coarse();
        FaultTracker { server, slots, owed, armed: false }
    }

    /// For each slot of the server, which one it is of those that are tracked.
    fn tracked(&self) -> Vec<Option<usize>> {
        let tracked = |slot: &WpSlot| self.slots.iter().position(|other| other.slot().is(slot.slot()));
        self.server.slots().iter().map(tracked).collect()
    }

    fn collect(&mut self) -> Result<(), FaultError> {
        for (index, slot) in self.slots.iter().enumerate() {
            let owed = self.owed.slot(index);
            slot.take_host_writes(PageSize::K4, |word, bits| owed.add_host(word, bits));
        }
        let (tracked, owed) = (self.tracked(), &mut self.owed);
        self.server.pager().harvest(&mut Spare::default(), |index, block, dirty, coarse| {
            let Some(index) = tracked[index] else { return };
            let owed = owed.slot(index);
            let start = owed.frames().start;
            let pages = |run: Range<usize>| {
                let first = (block.frames(run.clone()).start.0 - start.0) as usize;
                first..first + run.len()
            };
            for run in (dirty & !coarse).runs() {
                masks(pages(run), |word, bits| owed.add(word, bits));
            }
            for run in coarse.runs() {
                masks(pages(run), |word, bits| owed.add_coarse(word, bits));
            }
        })
    }
}

fn record_host_writes(slots: &[WpSlot], on: bool) {
    let records = slots.iter().map(|slot| slot.slot().host_writes());
    records.for_each(|record| if on { record.start() } else { record.stop() });
}

impl Tracker for FaultTracker {
    fn name(&self) -> &'static str {
        Kind::UffdServe.name()
    }

    fn guarantees(&self) -> Guarantees {
        let guarantees = guarantees(Kind::UffdServe, &self.slots);
        let unit = match self.server.policies().split {
            Split::Leaf => PageSize::K4,
            Split::Block | Split::Adaptive(_) => PageSize::M2,
        };
        Guarantees {
            granularity: guarantees.granularity.max(unit),
            may_report_reads: self.server.moves(),
            ..guarantees
        }
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.armed {
            return Err(TrackerError::AlreadyArmed);
        }
        record_host_writes(&self.slots, true);
        match self.server.pager().track() {
            Ok(()) => self.armed = true,
            Err(error) => {
                record_host_writes(&self.slots, false);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// All of the server's memory is protected while it is armed; what is tracked is what is handed out.
    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        let slots = WpSlot::all(slots)?;
        let served = |slot: &&WpSlot| !self.server.slots().iter().any(|other| other.slot().is(slot.slot()));
        if let Some(slot) = slots.iter().find(served) {
            let why = "its faults are not served by this tracker's server";
            return Err(TrackerError::BadSlot { id: slot.id(), why });
        }
        if self.armed {
            let other = |a: &[WpSlot], b: &[WpSlot]| {
                a.iter().filter(|slot| !b.iter().any(|other| other.slot().is(slot.slot()))).cloned().collect()
            };
            let (new, gone): (Vec<_>, Vec<_>) = (other(&slots, &self.slots), other(&self.slots, &slots));
            record_host_writes(&new, true);
            record_host_writes(&gone, false);
        }
        self.owed.set_slots(slots.iter().map(Tracked::slot));
        self.owed.allow_coarse();
        self.slots = slots;
        Ok(())
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        self.collect()?;
        Ok(self.owed.lend())
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        self.server.pager().untrack()?;
        record_host_writes(&self.slots, false);
        self.owed.clear();
        self.armed = false;
        Ok(())
    }
}

impl Drop for FaultTracker {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to tell.
            let _ = self.disarm();
        }
    }
}

impl<K: Kernel> Pager<K> {
    /// From now on every first write is seen. What was written before is forgotten.
    pub(super) fn track(&self) -> Result<(), FaultError> {
        if self.track.swap(true, Ordering::AcqRel) {
            return Err(TrackerError::AlreadyArmed.into());
        }
        let mut spare = Spare::default();
        drop(self.news());
        let outcome = patiently(|| {
            self.each_block(|index, block| {
                spare.fill()?;
                let open = block.present() & !block.protected();
                self.protect(block, index, &open)?;
                block.clean(&block.own(), &mut spare)?;
                Ok(())
            })
        });
        outcome.inspect_err(|_| self.track.store(false, Ordering::Release))
    }

    /// Writes need not be seen any more, but for those to old pages.
    pub(super) fn untrack(&self) -> Result<(), FaultError> {
        let mut spare = Spare::default();
        self.track.store(false, Ordering::Release);
        let outcome = patiently(|| {
            self.each_block(|index, block| {
                spare.fill()?;
                let closed = block.protected() & !block.old();
                for run in closed.runs() {
                    let pages = self.slots[index].pages(block.first(), &run);
                    let range = block.frames(run);
                    self.kernel.open(index, pages).map_err(|source| FaultError::Protect { range, source })?;
                }
                Ok(block.open(&closed, &mut spare)?)
            })
        });
        // Tracked still: what is protected is seen, and what is installed is to be as well.
        outcome.inspect_err(|_| self.track.store(true, Ordering::Release))
    }

    /// Takes the leaves that are dirty, protects them, and hands each block's to `take`, those that are coarse a second
    /// time by themselves. What it has handed out it does not hand out again, even if it fails.
    pub(super) fn harvest(
        &self,
        spare: &mut Spare,
        mut take: impl FnMut(usize, &Block<'_>, Leaves, Leaves),
    ) -> Result<(), FaultError> {
        // What was dropped or made writable before this call is recorded after it.
        drop(self.news());
        patiently(|| {
            self.stage2.each_dirty(|block| {
                spare.fill()?;
                let Some(index) = self.slot_of(block) else { return Ok(()) };
                let (mut dirty, mut coarse) = (block.dirty(), block.coarse());
                if self.slots[index].huge {
                    coarse = if dirty == coarse { block.own() } else { Leaves::NONE };
                    dirty = block.own();
                }
                self.protect(block, index, &(dirty & block.present()))?;
                let dropped = dirty & block.dropped();
                let still = match dropped.is_empty() {
                    true => Leaves::NONE,
                    false => self.seen(block, index)?.present & dropped,
                };
                take(index, block, dirty, coarse);
                let number = block.first().block();
                block.set_heat(self.policies.split.remembers(number, block.heat(), &dirty, &coarse));
                block.clean(&(dirty & !still), spare)?;
                Ok(())
            })
        })
    }

    fn protect(&self, block: &Block<'_>, index: usize, leaves: &Leaves) -> Result<(), FaultError> {
        for run in leaves.runs() {
            let pages = self.slots[index].pages(block.first(), &run);
            let range = block.frames(run);
            self.kernel.protect(index, pages).map_err(|source| FaultError::Protect { range, source })?;
        }
        Ok(())
    }
}

/// Tries again as long as mappings change. A handler has to read of it first, and may be waiting for a block: nothing
/// is held meanwhile.
fn patiently(mut attempt: impl FnMut() -> Result<(), FaultError>) -> Result<(), FaultError> {
    let changing = |error: &FaultError| matches!(error, FaultError::Protect { source, .. } if *source == errno::Error::new(libc::EAGAIN));
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if changing(&error) && Instant::now() < deadline => thread::sleep(BETWEEN_ATTEMPTS),
            outcome => return outcome,
        }
    }
}
