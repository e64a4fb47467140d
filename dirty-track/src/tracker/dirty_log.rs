//! What the trackers on KVM's dirty bitmap share: which slots are armed, what is owed, what is cleared when.
//!
//! `kvm-bitmap` and `kvm-manual` read the same log and differ in who clears it ([`Protocol`]). The policy,
//! [`Logged`], is generic over the mechanism, [`DirtyLog`], so that the tests can hold it against a model in
//! which writes race and calls fail; [`KvmLog`] is the mechanism that makes the ioctls.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use crate::bitmap::{self, PAGES_PER_WORD};
use crate::rearm::{Rearm, SlotRearm};
use crate::sys::kvm::{self, LoggedSlot};
use crate::tracker::change::{Change, Step, carry};
use crate::tracker::harvest::OwedSet;
use crate::tracker::wp_slot::masks;
use crate::tracker::{Harvest, Slot, TrackerError};

/// Pages that one KVM_CLEAR_DIRTY_LOG covers at most: 128 MiB. KVM holds its MMU lock, which every vCPU fault
/// needs, throughout the call; a whole GiB of dirty pages takes it more than a millisecond.
const CLEAR_CHUNK: usize = 1 << 15;

/// Words that are looked at together: a cache line of a log that is mostly clean.
const GROUP: usize = 8;

/// Who clears the log, and with that protects the pages again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// GET does, of all that it reports.
    ClearedByGet,
    /// CLEAR does, of what it is told to; GET changes nothing.
    Manual {
        /// Turning a slot's log on sets every bit and protects nothing.
        initially_set: bool,
    },
}

/// The switch of slots' dirty logging.
pub(crate) trait Logging: Send {
    /// Puts the VM into the mode that the tracker needs. It comes before any slot's log is turned on: KVM
    /// looks at the mode there, and with the wrong one it leaves pages writable that it does not report.
    fn prepare(&mut self) -> Result<(), errno::Error>;
    /// Turns a slot's log on or off; no change is no error.
    fn set_logging(&mut self, slot: &Slot, on: bool) -> Result<(), errno::Error>;
}

/// A dirty log: the mechanism.
pub(crate) trait DirtyLog: Logging {
    /// Copies a slot's log out. With [`Protocol::ClearedByGet`] it also clears it and protects the pages, and
    /// `EFAULT` means that it has done so and failed to copy.
    fn get(&mut self, slot: &Slot, words: &mut [u64]) -> Result<(), errno::Error>;
    /// Clears and protects those of the `pages` from `first` on that have a bit in `words`, whose bit 0 is
    /// page `first`. `first` is a multiple of 64, and so is `pages` unless it ends with the slot. Not called
    /// with [`Protocol::ClearedByGet`].
    fn clear(&mut self, slot: &Slot, first: usize, pages: usize, words: &[u64]) -> Result<(), errno::Error>;
}

/// KVM's own.
#[derive(Debug)]
pub(crate) struct KvmLog {
    vm: Arc<VmFd>,
    /// Those that are logged.
    slots: Vec<LoggedSlot>,
    mode: u64,
}

impl KvmLog {
    /// The logs of `vm`, to be used with `mode` of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0 is none.
    pub(crate) fn new(vm: &Arc<VmFd>, mode: u64) -> KvmLog {
        KvmLog { vm: vm.clone(), slots: Vec::new(), mode }
    }

    fn logged(&self, slot: &Slot) -> Result<&LoggedSlot, errno::Error> {
        // ENOENT is what KVM says of a slot that is not logged.
        let found = self.slots.iter().find(|logged| logged.slot().is(slot));
        found.ok_or(errno::Error::new(libc::ENOENT))
    }
}

impl Logging for KvmLog {
    fn prepare(&mut self) -> Result<(), errno::Error> {
        kvm::set_manual_protect(&self.vm, self.mode)
    }

    fn set_logging(&mut self, slot: &Slot, on: bool) -> Result<(), errno::Error> {
        let known = self.slots.iter().position(|logged| logged.slot().is(slot));
        let at = known.unwrap_or_else(|| {
            self.slots.push(LoggedSlot::new(self.vm.clone(), slot.clone()));
            self.slots.len() - 1
        });
        let outcome = self.slots[at].set_logging(on);
        self.slots.retain(LoggedSlot::is_logging);
        outcome
    }
}

impl DirtyLog for KvmLog {
    fn get(&mut self, slot: &Slot, words: &mut [u64]) -> Result<(), errno::Error> {
        self.logged(slot)?.get_dirty_log(words)
    }

    fn clear(&mut self, slot: &Slot, first: usize, pages: usize, words: &[u64]) -> Result<(), errno::Error> {
        self.logged(slot)?.clear_dirty_log(first as u64, pages as u32, words)
    }
}

/// The policy: what is armed, what is owed, what is cleared when.
#[derive(Debug)]
pub(crate) struct Logged<L: DirtyLog> {
    log: L,
    protocol: Protocol,
    slots: Vec<Slot>,
    owed: OwedSet,
    policy: Rearm,
    /// For each slot.
    rearm: Vec<SlotRearm>,
    /// One slot's log as it was read last; as large as the largest slot needs.
    buffer: Vec<u64>,
    armed: bool,
}

impl<L: DirtyLog> Logged<L> {
    /// `slots` are in the order of their addresses.
    pub(crate) fn new(log: L, protocol: Protocol, slots: Vec<Slot>) -> Logged<L> {
        let mut logged = Logged {
            log,
            protocol,
            owed: OwedSet::new(&[]),
            slots: Vec::new(),
            policy: Rearm::All,
            rearm: Vec::new(),
            buffer: Vec::new(),
            armed: false,
        };
        logged.adopt(slots);
        logged
    }

    /// What is protected again when an epoch ends. Not with [`Protocol::ClearedByGet`], where GET protects all.
    pub(crate) fn set_rearm(&mut self, policy: Rearm) {
        if policy != Rearm::All {
            self.owed.allow_coarse();
        }
        self.policy = policy;
        self.rearm.iter_mut().for_each(|slot| slot.set_policy(policy));
    }

    /// Blocks that the guest can write in this epoch without being seen.
    pub(crate) fn open_blocks(&self) -> usize {
        self.rearm.iter().map(SlotRearm::open_blocks).sum()
    }

    /// The slots that are tracked, in the order of their addresses.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// See [`Tracker::arm`](super::Tracker::arm).
    pub(crate) fn arm(&mut self) -> Result<(), TrackerError> {
        if self.armed {
            return Err(TrackerError::AlreadyArmed);
        }
        prepare(&mut self.log)?;
        for index in 0..self.slots.len() {
            self.rearm[index].reset();
            if let Err(error) = self.arm_slot(&self.slots[index].clone()) {
                // What was turned on goes off again. If that fails too, the first error is the one to know.
                let _ = self.stop();
                return Err(error);
            }
        }
        self.armed = true;
        Ok(())
    }

    /// Begins to log `slot`, with the pages that are tracked protected.
    fn arm_slot(&mut self, slot: &Slot) -> Result<(), TrackerError> {
        start(&mut self.log, slot)?;
        match self.protocol {
            Protocol::Manual { initially_set: true } => self.protect(slot, slot.chosen().ranges()),
            Protocol::Manual { initially_set: false } => Ok(()),
            // The log is empty. Reading it finds out here, and not at the first harvest, that it can be read:
            // it cannot where the VM has dirty rings.
            Protocol::ClearedByGet => self
                .log
                .get(slot, &mut self.buffer[..words_of(slot)])
                .map_err(|source| TrackerError::GetLog { slot: slot.id(), source }),
        }
    }

    /// Clears and protects the pages of `ranges`, whether they have a bit or not.
    fn protect(&mut self, slot: &Slot, ranges: &[Range<usize>]) -> Result<(), TrackerError> {
        let words = words_of(slot);
        self.buffer[..words].fill(0);
        for range in ranges {
            masks(range.clone(), |word, bits| self.buffer[word] |= bits);
        }
        clear_reported(&mut self.log, slot, &self.buffer, 0..words)
    }

    /// See [`Tracker::set_slots`](super::Tracker::set_slots). `slots` are in the order of their addresses.
    pub(crate) fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        if !self.armed {
            self.adopt(slots);
            return Ok(());
        }
        let mut change = Change::new(&self.slots, slots)?;
        self.make_room(&change.slots());
        for (number, step) in change.steps().iter().enumerate() {
            if let Err(error) = self.gain(step) {
                let begun = change.steps()[..=number].iter().filter(|step| step.new);
                // If that fails too, the first error is the one to know.
                let _ = stop(&mut self.log, begun.map(|step| &step.slot));
                return Err(error);
            }
        }
        let outcome = change.let_slots_go(|slot| stop(&mut self.log, [slot]));
        self.adopt(change.slots());
        outcome
    }

    /// Begins to track the pages that `step` gains.
    fn gain(&mut self, step: &Step<Slot>) -> Result<(), TrackerError> {
        match self.protocol {
            _ if step.new => self.arm_slot(&step.slot),
            _ if step.gained.is_empty() => Ok(()),
            Protocol::Manual { .. } => self.protect(&step.slot, &step.gained),
            // It protects all that it reports. What it reports of pages that were tracked before is owed.
            Protocol::ClearedByGet => match self.slots.iter().position(|slot| slot.is(&step.slot)) {
                Some(index) => self.collect(index),
                None => Ok(()),
            },
        }
    }

    fn make_room(&mut self, slots: &[Slot]) {
        let words = slots.iter().map(words_of).max().unwrap_or(0);
        if self.buffer.len() < words {
            self.buffer = bitmap::clean_words(words * PAGES_PER_WORD);
        }
    }

    /// Makes `slots` those that are tracked. What is known of the ones that stay is kept.
    fn adopt(&mut self, slots: Vec<Slot>) {
        self.make_room(&slots);
        self.owed.set_slots(&slots);
        if self.policy != Rearm::All {
            self.owed.allow_coarse();
        }
        let policy = self.policy;
        carry(&self.slots, &slots, &mut self.rearm, |slot| {
            SlotRearm::new(policy, slot.frames().pages as usize)
        });
        self.slots = slots;
    }

    /// See [`Tracker::harvest`](super::Tracker::harvest).
    pub(crate) fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        for index in 0..self.slots.len() {
            self.collect(index)?;
            let owed = self.owed.slot(index);
            self.slots[index].host_writes().drain(|word, bits| owed.add_host(word, bits));
        }
        Ok(self.owed.lend())
    }

    /// Adds what slot `index` has logged to what is owed, and clears it.
    fn collect(&mut self, index: usize) -> Result<(), TrackerError> {
        let slot = &self.slots[index];
        let words = words_of(slot);
        if let Err(source) = self.log.get(slot, &mut self.buffer[..words]) {
            if self.protocol == Protocol::ClearedByGet && source.errno() == libc::EFAULT {
                // What was dirty is known to nobody any more.
                self.owed.slot(index).add_all();
            }
            return Err(TrackerError::GetLog { slot: slot.id(), source });
        }
        // Pages that are not tracked are not cleared either: once written they stay writable.
        slot.chosen().mask(&mut self.buffer[..words]);
        // Noted before anything else: should a CLEAR or the next slot's GET fail, nothing is lost.
        let owed = self.owed.slot(index);
        self.rearm[index].coarse(&self.buffer[..words], |word, bits| owed.add_coarse(word, bits));
        let mut dirty = words..0;
        for (group, bits) in self.buffer[..words].chunks(GROUP).enumerate() {
            if bits.iter().fold(0, |all, bits| all | bits) == 0 {
                continue;
            }
            let first = group * GROUP;
            dirty = dirty.start.min(first)..first + bits.len();
            for (word, &bits) in (first..).zip(bits).filter(|(_, bits)| **bits != 0) {
                owed.add(word, bits);
            }
        }
        if self.protocol == Protocol::ClearedByGet {
            return Ok(());
        }
        self.rearm[index].plan(&mut self.buffer[..words]);
        let began = Instant::now();
        clear_reported(&mut self.log, slot, &self.buffer, dirty)?;
        self.owed.protected_for(began.elapsed());
        Ok(())
    }

    /// See [`Tracker::disarm`](super::Tracker::disarm).
    pub(crate) fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.armed {
            return Err(TrackerError::NotArmed);
        }
        self.stop()?;
        self.owed.clear();
        self.armed = false;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        stop(&mut self.log, &self.slots)
    }
}

/// Clears the pages of `slot` that have a bit in the words `dirty` of `buffer`, in chunks.
fn clear_reported(
    log: &mut impl DirtyLog,
    slot: &Slot,
    buffer: &[u64],
    dirty: Range<usize>,
) -> Result<(), TrackerError> {
    const CHUNK: usize = CLEAR_CHUNK / PAGES_PER_WORD;
    let slot_pages = slot.frames().pages as usize;
    let mut next = dirty.start;
    while next < dirty.end {
        // Up to the end of the chunk that it is in.
        let start = next;
        next = (start - start % CHUNK + CHUNK).min(dirty.end);
        let words = &buffer[start..next];
        let Some(low) = words.iter().position(|&word| word != 0) else { continue };
        let high = words.iter().rposition(|&word| word != 0).map_or(low, |last| last) + 1;
        let first = (start + low) * PAGES_PER_WORD;
        let pages = ((start + high) * PAGES_PER_WORD).min(slot_pages) - first;
        log.clear(slot, first, pages, &words[low..high]).map_err(|source| TrackerError::ClearLog {
            slot: slot.id(),
            first,
            pages,
            source,
        })?;
    }
    Ok(())
}

/// Puts the VM into the tracker's mode; it comes before any [`start`].
pub(crate) fn prepare(log: &mut impl Logging) -> Result<(), TrackerError> {
    log.prepare().map_err(|source| TrackerError::Enable { capability: kvm::MANUAL_PROTECT, source })
}

/// Turns the log of `slot` on, and the record of the host's writes with it.
pub(crate) fn start(log: &mut impl Logging, slot: &Slot) -> Result<(), TrackerError> {
    slot.host_writes().start();
    log.set_logging(slot, true).map_err(|source| TrackerError::SetLogging {
        slot: slot.id(),
        on: true,
        source,
    })
}

/// Turns the logs of `slots` off. A slot that refuses does not keep the others from being turned off.
pub(crate) fn stop<'a>(
    log: &mut impl Logging,
    slots: impl IntoIterator<Item = &'a Slot>,
) -> Result<(), TrackerError> {
    let mut outcome = Ok(());
    for slot in slots {
        match log.set_logging(slot, false) {
            Ok(()) => slot.host_writes().stop(),
            Err(source) => {
                outcome = outcome.and(Err(TrackerError::SetLogging { slot: slot.id(), on: false, source }));
            }
        }
    }
    outcome
}

impl<L: DirtyLog> Drop for Logged<L> {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to tell; logging that stays on costs the guest faults and loses nothing.
            let _ = self.stop();
        }
    }
}

/// Words of a slot's bitmap.
fn words_of(slot: &Slot) -> usize {
    bitmap::words_for(slot.frames().pages as usize)
}

#[cfg(test)]
mod tests;
