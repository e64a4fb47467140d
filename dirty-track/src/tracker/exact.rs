//! `exact`: a KVM log and write-protection by userfaultfd together. No read is ever reported, and the guest's writes
//! are told from the host's.
//!
//! A KVM log alone may report what was only read: on a read fault KVM maps the page writable, and marks it dirty,
//! when the host's page may be written. With the host's page protected it cannot, so every bit of the log is a write.
//! [`uffd-async`](super::uffd_async) alone reports no reads either, and is cheaper. What the two have in addition:
//!
//! - **Who wrote it.** The log has the guest's writes, protection has everybody's. What is in the second and not in
//!   the first the *host* wrote, in whatever way, past vm-memory too. (A page that the host wrote and the guest then
//!   read may be in both; if the host's write went through vm-memory, it counts as the host's nevertheless. A page
//!   that a vCPU is about to write at the very moment of a harvest may be taken for the host's.)
//! - **Writes that no page table sees.** KVM itself writes to guest pages that it has mapped for longer (with nested
//!   guests above all) and puts them into its log when it lets go of them.
//!
//! # The order
//! A harvest looks at protection and renews it *first*, and reads and clears the log *second*. A bit that a read
//! set in the log stems from a time when the host's page could be written; that page was found by the look before,
//! and is reported for a good reason. From its new protection on only writes set bits. The other way round, a read
//! between the two would leave its bit to the next harvest, which would report it without a write.
//!
//! For the same reason arming begins with the log, protects, and then throws the log's first harvest away; but not
//! what the host has marked meanwhile, which is owed, and protected again.
//!
//! A page that is written between the two steps is in this harvest, by the log, and in the next one too, by its lost
//! protection.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::addr::PageSize;
use crate::bitmap::{self, PAGES_PER_WORD};
use crate::tracker::change::{Change, Tracked, carry};
use crate::tracker::harvest::OwedSet;
use crate::tracker::uffd_async::{AsyncLayer, HostWrites, UffdWp, guarantees};
use crate::tracker::wp_slot::{WpSlot, masks};
use crate::tracker::{Guarantees, Harvest, Kind, KvmManual, Slot, Tracker, TrackerError};

const NAME: &str = Kind::Exact.name();

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct Exact {
    wp: AsyncLayer<UffdWp>,
    log: KvmManual,
    log_armed: bool,
    /// Found by protection, and not yet held against the log.
    seen: OwedSet,
    owed: OwedSet,
    /// Of each slot: pages that the log had and that protection will yield in the next harvest.
    late: Vec<Vec<u64>>,
    /// One slot's log in the units that its backing is protected in.
    log_words: Vec<u64>,
}

impl Exact {
    /// A tracker of `slots`, which are registered in `vm`. It is not armed yet.
    ///
    /// # Errors
    /// Those of [`KvmManual::new`] and of [`UffdAsync::new`](super::UffdAsync::new).
    pub fn new(vm: Arc<VmFd>, slots: Vec<Slot>) -> Result<Exact, TrackerError> {
        let wp = AsyncLayer::open(slots.clone(), HostWrites::Elsewhere)?;
        let log = KvmManual::new(vm, slots)?;
        let late = wp.slots().iter().map(|slot| vec![0; slot.words()]).collect();
        let (seen, owed) = (wp.owed_set(), wp.owed_set());
        let mut exact = Exact { seen, owed, late, log_words: Vec::new(), wp, log, log_armed: false };
        exact.make_room();
        Ok(exact)
    }

    fn make_room(&mut self) {
        let words = self.late.iter().map(Vec::len).max().unwrap_or(0);
        self.log_words.resize(words, 0);
    }

    /// Has both track `slots`, in the order that leaves no trace of reads, as when arming; or neither, if one cannot.
    fn gain(&mut self, slots: &[Slot]) -> Result<(), TrackerError> {
        let before = self.log.slots().to_vec();
        let outcome = self.log.set_slots(slots.to_vec()).and_then(|()| {
            self.wp.set_slots(WpSlot::all(slots.to_vec())?)?;
            self.forget_reads(&before)
        });
        outcome.inspect_err(|_| {
            // Both let go of what they had gained. If that fails too, the first error is the one to know.
            let _ = WpSlot::all(before.clone()).and_then(|slots| self.wp.set_slots(slots));
            let _ = self.log.set_slots(before);
        })
    }

    /// Throws away what the log has of the pages that are tracked now and were not `before`, but for what the host has
    /// marked: that is owed, and the next harvest protects it.
    fn forget_reads(&mut self, before: &[Slot]) -> Result<(), TrackerError> {
        let change = Change::new(before, self.log.slots().to_vec())?;
        let mut harvest = self.log.harvest()?;
        for (slot, pages) in change.gained() {
            harvest.discard_guests(slot, pages);
        }
        Ok(())
    }

    fn arm_both(&mut self) -> Result<(), TrackerError> {
        self.log.arm()?;
        self.log_armed = true;
        self.wp.arm()?;
        let harvest = self.log.harvest()?;
        for (index, slot) in harvest.slots().iter().enumerate() {
            for run in bitmap::runs(slot.host_words()) {
                let run = self.wp.slots()[index].widen(run, PageSize::K4);
                masks(run.clone(), |word, bits| self.owed.slot(index).add_host(word, bits));
                self.wp.protect(index, run)?;
            }
        }
        harvest.commit();
        Ok(())
    }

    /// Ends what is begun.
    fn stop(&mut self) -> Result<(), TrackerError> {
        let mut outcome = Ok(());
        if self.wp.armed() {
            outcome = self.wp.disarm();
        }
        if self.log_armed {
            let log = self.log.disarm();
            self.log_armed = log.is_err();
            outcome = outcome.and(log);
        }
        if outcome.is_ok() {
            self.seen.clear();
            self.owed.clear();
            self.late.iter_mut().for_each(|words| words.fill(0));
        }
        outcome
    }
}

impl Tracker for Exact {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        guarantees(Kind::Exact, self.wp.slots())
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.log_armed || self.wp.armed() {
            return Err(TrackerError::AlreadyArmed);
        }
        self.arm_both().inspect_err(|_| {
            // If that fails too, the first error is the one to know.
            let _ = self.stop();
        })
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if !self.log_armed {
            return Err(TrackerError::NotArmed);
        }
        // Should anything fail from here on: what protection has yielded stays in `seen`, and what the log has
        // stays with the log's own tracker until it is committed.
        self.wp.collect(&mut self.seen)?;
        let harvest = self.log.harvest()?;
        // By number: the log may have slots besides that it could not be made to let go.
        let log_of = |id: u32| harvest.slots().iter().find(|log| log.id() == id);
        for index in 0..self.wp.slots().len() {
            let Some(log) = log_of(self.wp.slots()[index].id()) else { continue };
            // What the host has marked and protection has not seen: dropped, or written through another mapping.
            let seen = self.seen.slot(index).words();
            for (word, &marked) in log.host_words().iter().enumerate() {
                for run in bitmap::runs(&[marked & !seen[word]]) {
                    let base = word * PAGES_PER_WORD;
                    let run = self.wp.slots()[index].widen(base + run.start..base + run.end, PageSize::K4);
                    self.wp.protect(index, run)?;
                }
            }
        }
        for (index, slot) in self.wp.slots().iter().enumerate() {
            let Some(log) = log_of(slot.id()) else { continue };
            let logged: &[u64] = if slot.page() == PageSize::K4 {
                log.words()
            } else {
                let words = &mut self.log_words[..slot.words()];
                words.fill(0);
                bitmap::runs(log.words()).for_each(|run| {
                    masks(slot.widen(run, PageSize::K4), |word, bits| words[word] |= bits);
                });
                words
            };
            let (seen, owed) = (self.seen.slot(index), self.owed.slot(index));
            let late = &mut self.late[index];
            for (word, (&seen, &logged)) in seen.words().iter().zip(logged).enumerate() {
                let marked = log.host_words()[word];
                if seen | logged | late[word] != 0 {
                    let settled = settle(seen, logged, marked, late[word]);
                    owed.add(word, settled.written);
                    owed.add_host(word, settled.by_host);
                    late[word] = settled.late;
                }
            }
        }
        harvest.commit();
        self.seen.clear();
        Ok(self.owed.lend())
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        let before = self.wp.slots().to_vec();
        let next = WpSlot::all(slots)?;
        let mut outcome = Ok(());
        if self.log_armed {
            // First all that both lists have, then what is to stay of it.
            let both: Vec<_> = Change::new(&before, next.clone())?.slots();
            self.gain(&both.iter().map(|slot| slot.slot().clone()).collect::<Vec<_>>())?;
            outcome = self.wp.set_slots(next);
            let left = self.wp.slots().iter().map(|slot| slot.slot().clone()).collect();
            outcome = outcome.and(self.log.set_slots(left));
        } else {
            self.log.set_slots(next.iter().map(|slot| slot.slot().clone()).collect())?;
            self.wp.set_slots(next)?;
        }
        let now = self.wp.slots();
        self.seen.set_slots(now.iter().map(WpSlot::slot));
        self.owed.set_slots(now.iter().map(WpSlot::slot));
        carry(&before, now, &mut self.late, |slot| vec![0; slot.words()]);
        self.make_room();
        outcome
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        if !self.log_armed && !self.wp.armed() {
            return Err(TrackerError::NotArmed);
        }
        self.stop()
    }
}

/// One word of pages, with what both sources say put together.
#[derive(Debug, PartialEq, Eq)]
struct Settled {
    written: u64,
    by_host: u64,
    /// Reported now, by the log; protection will say so in the next harvest, and the log will not.
    late: u64,
}

/// Puts together what protection has `seen`, what the log has `logged` (the `marked` ones included), and what is still
/// to be seen of the last harvest's log.
fn settle(seen: u64, logged: u64, marked: u64, late: u64) -> Settled {
    Settled {
        written: seen | logged,
        by_host: marked | seen & !logged & !late,
        late: logged & !marked & !seen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_are_told_apart() {
        // Bit 0: by the guest. 1: by the host, unmarked. 2: by the host, marked. 3: marked, and protection lost
        // nothing. 4: by the guest, between the two looks. 5: nobody.
        let settled = settle(0b00_0111, 0b01_1101, 0b00_1100, 0);
        assert_eq!(settled, Settled { written: 0b01_1111, by_host: 0b00_1110, late: 0b01_0000 });
    }

    #[test]
    fn a_guest_write_between_the_looks_is_never_taken_for_the_hosts() {
        let first = settle(0, 1, 0, 0);
        assert_eq!(first, Settled { written: 1, by_host: 0, late: 1 });
        // Protection says it a harvest later; the log has been cleared.
        let second = settle(1, 0, 0, first.late);
        assert_eq!(second, Settled { written: 1, by_host: 0, late: 0 });
        // A mark is a mark.
        assert_eq!(settle(1, 0, 1, first.late).by_host, 1);
        // From then on it can be the host's again.
        assert_eq!(settle(1, 0, 0, second.late).by_host, 1);
    }

    #[test]
    fn no_page_of_either_is_left_out() {
        for bits in 0..16u64 {
            let [seen, logged, late, marked] = [0, 1, 2, 3].map(|bit| bits >> bit & 1);
            let settled = settle(seen, logged | marked, marked, late);
            assert_eq!(settled.written, seen | logged | marked);
            assert_eq!(settled.by_host & !settled.written, 0);
        }
    }
}
