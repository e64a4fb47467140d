//! KVM's dirty logs on the real KVM of this host, each in turn. The sets they report are compared with what the
//! guest was told to write: no page more, no page less.

use std::collections::BTreeSet;

use crate::copy::converge;
use crate::machine::{MAX_STORES, Machine, Writer, frames, kvm};
use dirty_track::addr::{Gfn, PAGE_SIZE};
use dirty_track::tracker::{Guarantees, Harvest, KvmBitmap, KvmManual, KvmRing, Slot, Tracker, TrackerError};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

/// Slots of sizes that are no multiples of 64 pages; the third one needs two CLEAR chunks and a bit.
const SLOTS: [(Gfn, u64); 4] =
    [(Gfn(0x100), 1), (Gfn(0x200), 63), (Gfn(0x1234), (1 << 15) + 65), (Gfn(0x2_0000), 1000)];

/// Pages at the ends of slots, words and chunks, and some in between.
fn corners() -> Vec<Gfn> {
    SLOTS
        .iter()
        .flat_map(|&(first, pages)| {
            [0, 1, 31, 62, 63, 64, 65, 500, (1 << 15) - 1, 1 << 15, pages - 1]
                .into_iter()
                .filter(move |&page| page < pages)
                .map(move |page| Gfn(first.0 + page))
        })
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// The logs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Log {
    Bitmap,
    Manual,
    Ring,
}

impl Log {
    fn tracker_of(self, machine: &Machine, slots: Vec<Slot>) -> Box<dyn Tracker> {
        match self {
            Log::Bitmap => Box::new(KvmBitmap::new(machine.vm.clone(), slots).unwrap()),
            Log::Manual => Box::new(KvmManual::new(machine.vm.clone(), slots).unwrap()),
            Log::Ring => Box::new(KvmRing::new(machine.rings.as_ref().unwrap(), slots).unwrap()),
        }
    }

    fn tracker(self, machine: &Machine) -> Box<dyn Tracker> {
        self.tracker_of(machine, machine.slots.clone())
    }
}

/// Runs `test` with a machine for each of the logs.
fn each(name: &str, test: impl Fn(&Kvm, Log, Machine, Writer)) {
    let Some(kvm) = kvm(name) else { return };
    for log in [Log::Bitmap, Log::Manual] {
        let (machine, guest) = Machine::new(&kvm, &SLOTS);
        test(&kvm, log, machine, guest);
    }
    if let Some((machine, mut guests)) = Machine::with_rings(name, &kvm, &SLOTS, 1, 256) {
        test(&kvm, Log::Ring, machine, guests.remove(0));
    }
}

#[test]
fn a_harvest_is_exactly_what_was_written_since_the_last() {
    each("a_harvest_is_exactly_what_was_written_since_the_last", |_, log, machine, mut guest| {
        let mut tracker = log.tracker(&machine);
        let corners = corners();

        guest.write(&corners, 1);
        tracker.arm().unwrap();
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), [], "what was written before arming is not owed");
        harvest.commit();

        // Everything, then every third, then nothing, then everything again: re-protection works each time.
        let third: Vec<_> = corners.iter().copied().step_by(3).collect();
        for (value, pages) in [(2, &corners), (3, &third), (4, &third), (5, &corners)] {
            guest.write(pages, value);
            let harvest = tracker.harvest().unwrap();
            assert_eq!(&frames(&harvest), pages);
            assert_eq!(harvest.count(), pages.len() as u64);
            assert_eq!(harvest.host_count(), 0);
            harvest.commit();
            let harvest = tracker.harvest().unwrap();
            assert!(harvest.is_empty(), "{:?}", frames(&harvest));
            harvest.commit();
        }
    });
}

#[test]
fn a_dropped_harvest_is_owed_again() {
    each("a_dropped_harvest_is_owed_again", |_, log, machine, mut guest| {
        let mut tracker = log.tracker(&machine);
        tracker.arm().unwrap();
        guest.write(&[Gfn(0x200), Gfn(0x1300)], 1);
        drop(tracker.harvest().unwrap());
        guest.write(&[Gfn(0x100)], 2);
        drop(tracker.harvest().unwrap());
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), [Gfn(0x100), Gfn(0x200), Gfn(0x1300)]);
        harvest.commit();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

#[test]
fn what_the_host_writes_is_merged_and_told_apart() {
    each("what_the_host_writes_is_merged_and_told_apart", |_, log, machine, mut guest| {
        let mut tracker = log.tracker(&machine);
        machine.memory.write_obj(1u8, GuestAddress(0x20f << 12)).unwrap();
        tracker.arm().unwrap();
        guest.write(&[Gfn(0x200), Gfn(0x205)], 1);
        machine.memory.write_slice(&[1; 5000], GuestAddress(0x205 << 12)).unwrap();
        machine.memory.write_obj(1u8, GuestAddress(0x1234 << 12)).unwrap();

        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), [Gfn(0x200), Gfn(0x205), Gfn(0x206), Gfn(0x1234)]);
        let host: Vec<_> = harvest.host_runs().collect();
        assert_eq!(
            host.iter().map(|run| (run.start, run.pages)).collect::<Vec<_>>(),
            [(Gfn(0x205), 2), (Gfn(0x1234), 1)]
        );
        assert!(harvest.from_host(Gfn(0x205)) && !harvest.from_host(Gfn(0x200)));
        harvest.commit();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

#[test]
fn arming_begins_anew_and_disarming_leaves_nothing_on() {
    each("arming_begins_anew_and_disarming_leaves_nothing_on", |_, log, machine, mut guest| {
        // With a ring there is no log to be read; `ring` has a test of its own for that.
        let logging = |on: bool| {
            let logs = |slot: &Slot| machine.vm.get_dirty_log(slot.id(), slot.len() as usize).is_ok();
            assert!(log == Log::Ring || machine.slots.iter().all(|slot| logs(slot) == on), "{log:?}");
        };
        let mut tracker = log.tracker(&machine);
        assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
        assert!(matches!(tracker.disarm(), Err(TrackerError::NotArmed)));
        for value in 1..4 {
            tracker.arm().unwrap();
            assert!(matches!(tracker.arm(), Err(TrackerError::AlreadyArmed)));
            logging(true);
            guest.write(&[Gfn(0x201)], value);
            assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x201)]);
            tracker.disarm().unwrap();
            logging(false);
            guest.write(&[Gfn(0x202)], value);
        }
        tracker.arm().unwrap();
        // Dropping a tracker disarms it.
        drop(tracker);
        logging(false);
    });
}

#[test]
fn a_slot_of_the_wrong_size_is_refused_before_its_log_is_read() {
    each("a_slot_of_the_wrong_size_is_refused_before_its_log_is_read", |kvm, log, machine, _guest| {
        let (other, _) = Machine::new(kvm, &[(Gfn(0x100), 1), (Gfn(0x200), 10)]);
        let slots = vec![machine.slots[0].clone(), other.slots[1].clone()];
        let mut tracker = log.tracker_of(&machine, slots);
        let error = tracker.arm().unwrap_err();
        assert!(matches!(error, TrackerError::SetLogging { slot: 2, on: true, .. }), "{error}");
        assert!(machine.vm.get_dirty_log(1, PAGE_SIZE as usize).is_err(), "slot 1 is off again");
        assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
    });
}

/// Whoever copies what each harvest reports ends with the guest's memory, although the guest writes all the
/// time: during arming, during harvests and during the copying.
#[test]
fn a_copy_converges_to_the_memory_of_a_running_guest() {
    each("a_copy_converges_to_the_memory_of_a_running_guest", |_, log, machine, mut guest| {
        let pages: Vec<_> = corners().into_iter().chain((0x1300..0x1400).map(Gfn)).collect();
        assert!(pages.len() <= MAX_STORES);
        converge(&machine, &mut guest, &mut *log.tracker(&machine), 200, |_| pages.clone());
    });
}

/// A tracker that loses a page: the fault that tests must be able to detect.
struct Forgetful(Box<dyn Tracker>, Gfn);

impl Tracker for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }

    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        self.0.arm()
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        let mut harvest = self.0.harvest()?;
        harvest.discard(self.1);
        Ok(harvest)
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.0.set_slots(slots)
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.0.disarm()
    }
}

#[test]
fn a_tracker_can_wrap_another() {
    each("a_tracker_can_wrap_another", |_, log, machine, mut guest| {
        let inner = log.tracker(&machine);
        let mut tracker = Forgetful(inner, Gfn(0x203));
        tracker.arm().unwrap();
        guest.write(&[Gfn(0x202), Gfn(0x203), Gfn(0x204)], 1);
        assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x202), Gfn(0x204)]);
    });
}

/// KVM's bitmap is used in two modes, which one VM can be put into one after the other. A tracker that was made
/// before the mode changed is exact as well.
#[test]
fn trackers_in_different_modes_take_turns_on_one_vm() {
    let Some(kvm) = kvm("trackers_in_different_modes_take_turns_on_one_vm") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut trackers = [Log::Bitmap, Log::Manual].map(|log| log.tracker(&machine));
    let corners = corners();
    for value in 1..=4 {
        for tracker in &mut trackers {
            tracker.arm().unwrap();
            for pages in [&corners[..5], &corners[..]] {
                guest.write(pages, value);
                let harvest = tracker.harvest().unwrap();
                assert_eq!(frames(&harvest), pages, "{}", tracker.name());
                harvest.commit();
            }
            assert!(tracker.harvest().unwrap().is_empty(), "{}", tracker.name());
            tracker.disarm().unwrap();
        }
    }
}
