//! Emptying the rings: which are read, when they are reset, and which pages that yields. The policy of
//! `kvm-ring`, apart from the kernel.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmm_sys_util::errno;

use crate::bitmap::PAGES_PER_WORD;
use crate::sys::ring::DirtyEntry;
use crate::tracker::change::{Change, carry};
use crate::tracker::dirty_log::{self, Logging};
use crate::tracker::harvest::OwedSet;
use crate::tracker::{Harvest, Slot, TrackerError};

/// Resets in a row that give no place back before it is an error. One is common, when a signal is pending; the
/// next finds it delivered.
const IDLE_RESETS: usize = 1000;

/// Of a ring of `entries`, how many are waiting when it is worth being emptied: a quarter. The smallest ring of a
/// host with PML counts as full when it is not even half full, because KVM keeps 576 entries in reserve.
pub(super) fn filling(entries: u32) -> u32 {
    entries / 4
}

/// The rings of a VM's vCPUs: the mechanism.
pub(crate) trait Rings: Send {
    /// Number of vCPUs.
    fn vcpus(&self) -> usize;
    /// Entries that each ring has room for.
    fn entries(&self) -> u32;
    /// Whether at least `entries` of a vCPU's ring are dirty and not taken.
    fn holds(&self, vcpu: usize, entries: u32) -> bool;
    /// Takes the oldest entry of a vCPU's ring.
    fn take(&mut self, vcpu: usize) -> Option<DirtyEntry>;
    /// Protects the pages of entries that were taken, in all rings, and returns how many entries that were;
    /// there may be more.
    fn reset(&mut self) -> Result<u32, errno::Error>;
}

/// The pages that were collected since the last harvest.
#[derive(Debug)]
struct Collected {
    set: OwedSet,
    /// Slot number, index in the set and number of pages, in the order of the numbers.
    slots: Vec<(u32, usize, u64)>,
    /// Nothing was collected; the set need not be looked at.
    empty: bool,
    /// A reset was cut short: pages of the set may be unprotected although their entries are gone.
    in_doubt: bool,
}

impl Collected {
    /// Of each slot all pages, whatever is chosen: a page that is not chosen loses its protection too.
    fn new(slots: &[Slot]) -> Collected {
        let mut by_id: Vec<_> =
            slots.iter().enumerate().map(|(index, slot)| (slot.id(), index, slot.frames().pages)).collect();
        by_id.sort_unstable();
        let whole: Vec<_> = slots.iter().map(Slot::whole).collect();
        Collected { set: OwedSet::new(&whole), slots: by_id, empty: true, in_doubt: false }
    }

    fn clear(&mut self) {
        self.set.clear();
        self.empty = true;
        self.in_doubt = false;
    }

    /// Notes the entries that vCPU number `vcpu` wrote, for as long as `take` has any. One of a slot that nobody
    /// tracks, or beyond its slot, is nobody's: whoever turned the log of that slot on has to read it.
    fn note(&mut self, vcpu: usize, mut take: impl FnMut() -> Option<DirtyEntry>) {
        let mut next = take();
        while let Some(first) = next {
            self.empty = false;
            let found = self.slots.binary_search_by_key(&first.slot, |slot| slot.0);
            let Ok(found) = found else {
                next = take();
                continue;
            };
            let (id, index, pages) = self.slots[found];
            let mut marks = self.set.slot(index).marks_of(vcpu);
            // Entries come in long runs of one slot, so that is what is looked up once.
            while let Some(entry) = next.filter(|entry| entry.slot == id) {
                if entry.page < pages {
                    let page = entry.page as usize;
                    marks.add(page / PAGES_PER_WORD, 1 << (page % PAGES_PER_WORD));
                }
                next = take();
            }
        }
    }
}

/// The rings of a VM and what was read from them. It exists once for each VM, behind a mutex; the tracker, its
/// reaper and the vCPUs whose ring is full take turns.
#[derive(Debug)]
pub(crate) struct Collector<R> {
    pub(super) rings: R,
    /// Entries that were taken and not reset: pages that may be written without a new entry. Nothing is handed
    /// out while there are any.
    unreset: u64,
    /// None while nobody tracks: what is in the rings is dropped then.
    collected: Option<Collected>,
}

impl<R: Rings> Collector<R> {
    pub(super) fn new(rings: R) -> Collector<R> {
        Collector { rings, unreset: 0, collected: None }
    }

    /// Adopts a vCPU that was added to the rings.
    pub(super) fn vcpu_added(&mut self) {
        if let Some(collected) = &mut self.collected {
            collected.set.tell_apart(self.rings.vcpus());
        }
    }

    /// Serves a vCPU that left the guest because its ring is full: when this returns, it can go on.
    pub(super) fn serve_full(&mut self, vcpu: usize) -> Result<(), TrackerError> {
        self.empty_rings(|this, other| other == vcpu || this.is_filling(other)).map(drop)
    }

    /// Empties the rings that are filling, so that their vCPUs need not wait for it. Costs one look at each
    /// ring where there is nothing to do.
    pub(super) fn relieve(&mut self) -> Result<(), TrackerError> {
        // A reset has its price also for the guest: pages that it still writes to cost it another fault. So it
        // is left alone as long as there is room.
        if (0..self.rings.vcpus()).any(|vcpu| self.is_filling(vcpu)) {
            self.empty_rings(Collector::is_filling)?;
        }
        Ok(())
    }

    fn is_filling(&self, vcpu: usize) -> bool {
        self.rings.holds(vcpu, filling(self.rings.entries()))
    }

    /// Takes what the `chosen` rings hold, and has the pages protected again. Returns how long the latter took.
    fn empty_rings(&mut self, chosen: impl Fn(&Self, usize) -> bool) -> Result<Duration, TrackerError> {
        for vcpu in 0..self.rings.vcpus() {
            if !chosen(self, vcpu) {
                continue;
            }
            let Collector { rings, unreset, collected } = self;
            // A ring is finite, and KVM gets no place back before the reset: this ends, however fast the vCPU.
            let mut take = || rings.take(vcpu).inspect(|_| *unreset += 1);
            match collected {
                Some(collected) => collected.note(vcpu, take),
                None => while take().is_some() {},
            }
        }
        let began = Instant::now();
        self.reset()?;
        Ok(began.elapsed())
    }

    fn reset(&mut self) -> Result<(), TrackerError> {
        let mut idle = 0;
        while self.unreset > 0 {
            let failed = |source| TrackerError::ResetRings { left: self.unreset, source };
            let count = self.rings.reset().map_err(failed)?;
            if let Some(collected) = &mut self.collected {
                // See the kernel's flaw that `sys::ring::reset` tells of.
                collected.in_doubt |= 0 < count && u64::from(count) < self.unreset;
            }
            idle = if count == 0 { idle + 1 } else { 0 };
            if idle == IDLE_RESETS {
                return Err(failed(errno::Error::new(libc::EINTR)));
            }
            self.unreset = self.unreset.saturating_sub(count.into());
        }
        Ok(())
    }
}

/// Takes the lock. A panic elsewhere leaves the collector as it was between two entries, which is whole.
pub(crate) fn lock<R>(collector: &Mutex<Collector<R>>) -> MutexGuard<'_, Collector<R>> {
    collector.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What is armed, what is owed, and when the rings are emptied for it.
#[derive(Debug)]
pub(crate) struct Ringed<L: Logging> {
    log: L,
    slots: Vec<Slot>,
    owed: OwedSet,
    /// Pages that may be unprotected without an entry, word by word for each slot: they are in every harvest.
    /// Empty unless a reset was cut short.
    doubtful: Vec<Vec<u64>>,
    /// The set that the collector fills while the tracker is armed.
    spare: Option<Collected>,
}

impl<L: Logging> Ringed<L> {
    /// `slots` are those of `log`, in the order of their addresses.
    pub(super) fn new(log: L, slots: Vec<Slot>) -> Ringed<L> {
        Ringed {
            owed: OwedSet::new(&slots),
            doubtful: Vec::new(),
            spare: Some(Collected::new(&slots)),
            log,
            slots,
        }
    }

    /// The slots that are tracked.
    #[cfg(test)]
    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(super) fn is_armed(&self) -> bool {
        self.spare.is_none()
    }

    /// See [`Tracker::arm`](crate::tracker::Tracker::arm).
    pub(super) fn arm<R: Rings>(&mut self, collector: &mut Collector<R>) -> Result<(), TrackerError> {
        if collector.collected.is_some() {
            return Err(TrackerError::AlreadyArmed);
        }
        let Some(mut spare) = self.spare.take() else { return Err(TrackerError::AlreadyArmed) };
        self.owed.tell_apart(collector.rings.vcpus());
        spare.set.tell_apart(collector.rings.vcpus());
        spare.clear();
        collector.collected = Some(spare);
        let outcome = self.begin(collector);
        if outcome.is_err() {
            // What was turned on goes off again. If that fails too, the first error is the one to know.
            let _ = dirty_log::stop(&mut self.log, &self.slots);
            self.spare = collector.collected.take();
        }
        outcome
    }

    fn begin<R: Rings>(&mut self, collector: &mut Collector<R>) -> Result<(), TrackerError> {
        // What an earlier tracker left behind. It would not be wrong to report, but nobody wrote it just now.
        collector.empty_rings(|_, _| true)?;
        if let Some(collected) = &mut collector.collected {
            collected.clear();
        }
        dirty_log::prepare(&mut self.log)?;
        self.slots.iter().try_for_each(|slot| dirty_log::start(&mut self.log, slot))
    }

    /// See [`Tracker::set_slots`](crate::tracker::Tracker::set_slots). `slots` are in the order of their addresses.
    pub(super) fn set_slots<R: Rings>(
        &mut self,
        collector: &mut Collector<R>,
        slots: Vec<Slot>,
    ) -> Result<(), TrackerError> {
        if !self.is_armed() {
            self.adopt(slots);
            self.spare = Some(Collected::new(&self.slots));
            return Ok(());
        }
        let mut change = Change::new(&self.slots, slots)?;
        // Entries are read under the slots that they were written under. And from here on every page is protected,
        // chosen or not, or will be read when the change is made: nobody else reads rings meanwhile.
        self.collect(collector)?;
        let new = || change.steps().iter().filter(|step| step.new).map(|step| &step.slot);
        if let Err(error) = new().try_for_each(|slot| dirty_log::start(&mut self.log, slot)) {
            // If that fails too, the first error is the one to know.
            let _ = dirty_log::stop(&mut self.log, new());
            return Err(error);
        }
        let outcome = change.let_slots_go(|slot| dirty_log::stop(&mut self.log, [slot]));
        self.adopt(change.slots());
        let mut collected = Collected::new(&self.slots);
        collected.set.tell_apart(collector.rings.vcpus());
        collector.collected = Some(collected);
        self.owed.tell_apart(collector.rings.vcpus());
        outcome
    }

    /// Makes `slots` those that are tracked. What is known of the ones that stay is kept.
    fn adopt(&mut self, slots: Vec<Slot>) {
        self.owed.set_slots(&slots);
        if !self.doubtful.is_empty() {
            self.owed.allow_coarse();
            carry(&self.slots, &slots, &mut self.doubtful, |_| Vec::new());
        }
        self.slots = slots;
    }

    /// Collects what was written, and has it protected again: after this, and before it is
    /// [handed out](Ringed::hand_out), a page is written with a new entry or not at all.
    pub(super) fn collect<R: Rings>(&mut self, collector: &mut Collector<R>) -> Result<(), TrackerError> {
        if !self.is_armed() {
            return Err(TrackerError::NotArmed);
        }
        // What is collected stays where it is when this fails.
        let reset = collector.empty_rings(|_, _| true)?;
        self.owed.protected_for(reset);
        match &mut collector.collected {
            Some(collected) if !collected.empty => {
                if std::mem::take(&mut collected.in_doubt) {
                    self.doubt(&mut collected.set);
                }
                self.owed.absorb(&mut collected.set);
                collected.empty = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// Remembers the pages of `set` as doubtful: nothing tells which of them they are.
    fn doubt(&mut self, set: &mut OwedSet) {
        self.owed.allow_coarse();
        self.doubtful.resize_with(self.slots.len(), Vec::new);
        for (index, doubtful) in self.doubtful.iter_mut().enumerate() {
            let words = set.slot(index).words();
            doubtful.resize(words.len(), 0);
            doubtful.iter_mut().zip(words).for_each(|(doubtful, bits)| *doubtful |= bits);
        }
    }

    /// Adds what the host wrote to what was collected, and lends it out.
    pub(super) fn hand_out(&mut self) -> Harvest<'_> {
        for (index, doubtful) in self.doubtful.iter().enumerate() {
            let owed = self.owed.slot(index);
            for (word, &bits) in doubtful.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                owed.add_coarse(word, bits);
            }
        }
        for (index, slot) in self.slots.iter().enumerate() {
            let owed = self.owed.slot(index);
            slot.host_writes().drain(|word, bits| owed.add_host(word, bits));
        }
        self.owed.lend()
    }

    /// See [`Tracker::disarm`](crate::tracker::Tracker::disarm).
    pub(super) fn disarm<R: Rings>(&mut self, collector: &mut Collector<R>) -> Result<(), TrackerError> {
        if !self.is_armed() {
            return Err(TrackerError::NotArmed);
        }
        dirty_log::stop(&mut self.log, &self.slots)?;
        // A vCPU that stands still because its ring is full goes on although nobody tracks.
        collector.empty_rings(|_, _| true)?;
        self.spare = collector.collected.take();
        self.owed.clear();
        self.doubtful.clear();
        Ok(())
    }

    /// Disarms as far as possible, for a tracker that goes away.
    pub(super) fn abandon<R: Rings>(&mut self, collector: &mut Collector<R>) {
        // Nobody is left to tell; logging that stays on costs the guest faults and loses nothing.
        if self.is_armed() && self.disarm(collector).is_err() {
            collector.collected = None;
        }
    }
}
