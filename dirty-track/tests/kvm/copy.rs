//! A copy of guest memory that is brought up to date by harvests alone: in the end it must be equal.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use dirty_track::addr::{Gfn, PageRange};
use dirty_track::tracker::{Harvest, Slot, Tracker};

use crate::machine::{Machine, Writer, frames};

/// Of each page that is tracked, the `u32` that the guest's stores go to.
pub(crate) struct Copy<'a> {
    machine: &'a Machine,
    stamps: BTreeMap<Gfn, u32>,
    /// Pages that harvests have named so far, coarse ones too; and the coarse ones.
    pub(crate) reported: u64,
    pub(crate) coarse: u64,
}

impl<'a> Copy<'a> {
    /// A copy of what is tracked of `slots`, as it is now.
    pub(crate) fn new(machine: &'a Machine, slots: &[Slot]) -> Copy<'a> {
        let mut copy = Copy { machine, stamps: BTreeMap::new(), reported: 0, coarse: 0 };
        copy.set_slots(slots);
        copy
    }

    /// After a tracker's slots were changed: what is new is copied, what is gone is forgotten.
    pub(crate) fn set_slots(&mut self, slots: &[Slot]) {
        let tracked = || slots.iter().flat_map(Slot::tracked);
        self.stamps.retain(|gfn, _| tracked().any(|range: PageRange| range.contains(*gfn)));
        for gfn in tracked().flat_map(|range| range.iter()) {
            self.stamps.entry(gfn).or_insert_with(|| self.machine.stamp(gfn));
        }
    }

    /// Copies what `harvest` names; it names nothing else than what is tracked.
    pub(crate) fn update(&mut self, harvest: &Harvest<'_>) {
        self.reported += harvest.count();
        self.coarse += harvest.coarse_count();
        for gfn in frames(harvest) {
            *self.stamps.get_mut(&gfn).expect("not tracked") = self.machine.stamp(gfn);
        }
    }

    /// Everybody is at rest, and the last harvest was copied.
    pub(crate) fn check(&self) {
        let old = self.stamps.iter().filter(|(gfn, stamp)| self.machine.stamp(**gfn) != **stamp);
        assert_eq!(old.map(|(gfn, _)| gfn).collect::<Vec<_>>(), Vec::<&Gfn>::new(), "writes are missing");
    }
}

/// Arms `tracker` and keeps a copy while the guest writes the `pages` of each of so many rounds, all the time: during
/// arming, during harvests and during the copying. Returns the copy, which has been checked.
pub(crate) fn converge<'a>(
    machine: &'a Machine,
    guest: &mut Writer,
    tracker: &mut dyn Tracker,
    rounds: u32,
    pages: impl Fn(u32) -> Vec<Gfn> + Sync,
) -> Copy<'a> {
    let (armed, done) = (AtomicBool::new(false), AtomicU32::new(0));
    let copy = std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            for round in 1..=rounds {
                // It may be far ahead where arming is slow; half of its rounds are for the harvests.
                while round > rounds / 2 && !armed.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                guest.write(&pages(round), round);
                done.store(round, Ordering::Release);
            }
        });
        tracker.arm().unwrap();
        let mut copy = Copy::new(machine, &machine.slots);
        armed.store(true, Ordering::Release);
        let (mut harvests, mut seen) = (0, 0);
        loop {
            // Harvests without a pause starve the vCPU on some MMUs: each waits for a round of the guest's. The last
            // one waits for all of them, so it finds the guest at rest.
            while done.load(Ordering::Acquire) == seen && !vcpu.is_finished() {
                std::thread::yield_now();
            }
            let last = vcpu.is_finished();
            seen = done.load(Ordering::Acquire);
            let harvest = tracker.harvest().unwrap();
            harvests += 1;
            copy.update(&harvest);
            // Every third one fails, as far as the tracker is concerned: that loses nothing.
            if harvests % 3 != 0 || last {
                harvest.commit();
            }
            if last {
                break;
            }
        }
        vcpu.join().unwrap();
        copy
    });
    assert_eq!(machine.stamp(pages(rounds)[0]), rounds, "the guest wrote to its end");
    assert!(copy.reported > 0);
    copy.check();
    copy
}
