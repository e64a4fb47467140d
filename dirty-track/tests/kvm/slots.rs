//! Slots that come and go, and ranges that are chosen, on the real KVM of this host while a guest writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dirty_track::addr::{Gfn, PageRange, PageSize};
use dirty_track::fault::{Config, FaultTracker, Server, Source};
use dirty_track::rearm::{DenseSkip, Rearm};
use dirty_track::tracker::{
    Exact, KvmBitmap, KvmManual, KvmRing, Slot, Tracker, TrackerError, UffdAsync, UffdSync,
};

use crate::copy::Copy;
use crate::machine::{Machine, Writer, frames, in_rig, kvm, skip};

/// One that stays, one that goes and one that comes.
const SLOTS: [(Gfn, u64); 3] = [(Gfn(0x400), 0x400), (Gfn(0x1000), 0x210), (Gfn(0x2000), 0x250)];

type Make = fn(&Machine, Vec<Slot>) -> Result<Box<dyn Tracker>, TrackerError>;

const TRACKERS: [(&str, Make); 9] = [
    ("kvm-bitmap", |machine, slots| Ok(Box::new(KvmBitmap::new(machine.vm.clone(), slots)?))),
    ("kvm-manual", |machine, slots| Ok(Box::new(KvmManual::new(machine.vm.clone(), slots)?))),
    ("kvm-manual, dense-skip", |machine, slots| {
        let skip = Rearm::DenseSkip(DenseSkip::new(100, 3).unwrap());
        Ok(Box::new(KvmManual::new(machine.vm.clone(), slots)?.with_rearm(skip)))
    }),
    ("kvm-ring", |machine, slots| {
        Ok(Box::new(KvmRing::new(machine.rings.as_ref().ok_or(TrackerError::NoRings)?, slots)?))
    }),
    ("uffd-async", |_, slots| Ok(Box::new(UffdAsync::new(slots)?))),
    ("uffd-sync", |_, slots| Ok(Box::new(UffdSync::new(slots, PageSize::K4)?))),
    ("uffd-sync by blocks", |_, slots| Ok(Box::new(UffdSync::new(slots, PageSize::M2)?))),
    ("served", |machine, slots| {
        // All of memory is served, whatever of it is tracked.
        let served = machine.slots.iter().map(|slot| (slot.clone(), Source::Zero)).collect();
        let mut tracker = FaultTracker::new(Arc::new(Server::start(served, Config::default())?));
        tracker.set_slots(slots)?;
        Ok(Box::new(tracker))
    }),
    ("exact", |machine, slots| Ok(Box::new(Exact::new(machine.vm.clone(), slots)?))),
];

/// Runs `check` with a machine for each tracker that the host has; it makes the tracker.
fn each(test: &str, check: impl Fn(&str, &Machine, &mut Writer, &dyn Fn(Vec<Slot>) -> Box<dyn Tracker>)) {
    let Some(kvm) = kvm(test) else { return };
    for (name, make) in TRACKERS {
        let (machine, mut guest) = if name == "kvm-ring" {
            let Some((machine, mut guests)) = Machine::with_rings(test, &kvm, &SLOTS, 1, 256) else {
                continue;
            };
            (machine, guests.remove(0))
        } else {
            Machine::new(&kvm, &SLOTS)
        };
        match make(&machine, machine.slots.clone()) {
            Ok(_) => {}
            Err(why @ (TrackerError::Userfaultfd(_) | TrackerError::Unsupported { .. })) => {
                skip(test, format_args!("{name}: {why}"));
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        }
        println!("{name}");
        check(name, &machine, &mut guest, &|slots| make(&machine, slots).unwrap());
    }
}

/// `pages` pages of slot `slot` from page `first` on.
fn part(slot: usize, first: u64, pages: u64) -> PageRange {
    PageRange { start: Gfn(SLOTS[slot].0.0 + first), pages }
}

fn list(ranges: &[PageRange]) -> Vec<Gfn> {
    ranges.iter().flat_map(PageRange::iter).collect()
}

/// What of a harvest's report is certain: without what is coarse.
fn certain(tracker: &mut dyn Tracker) -> Vec<Gfn> {
    let harvest = tracker.harvest().unwrap();
    let pages = frames(&harvest).into_iter().filter(|&gfn| !harvest.is_coarse(gfn)).collect();
    harvest.commit();
    pages
}

#[test]
fn a_slot_goes_and_another_one_comes_while_the_guest_writes() {
    each("a_slot_goes_and_another_one_comes_while_the_guest_writes", |name, machine, guest, make| {
        let slots = &machine.slots;
        machine.unplug(&slots[2]);
        let mut tracker = make(slots[..2].to_vec());
        // What the guest writes, over and over: a part of the slot that stays, and one of another one.
        let stays = [part(0, 0, 60), part(0, 0x1f0, 100), part(0, 0x3ff, 1)].to_vec();
        let phases = [
            list(&[stays.clone(), vec![part(1, 0, 30), part(1, 0x20f, 1)]].concat()),
            list(&stays),
            list(&[stays.clone(), vec![part(2, 0, 40), part(2, 0x1f0, 0x60)]].concat()),
        ];
        const END: u32 = 3;
        let (phase, done) = (AtomicU32::new(0), AtomicU32::new(END));
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                for round in 1.. {
                    let now = phase.load(Ordering::Acquire);
                    let Some(pages) = phases.get(now as usize) else { break };
                    guest.write(pages, round);
                    done.store(now, Ordering::Release);
                }
            });
            // A guest that is still in another phase has not begun the last whole round of this one.
            let enter = |next: u32| {
                phase.store(next, Ordering::Release);
                while done.load(Ordering::Acquire) != next {
                    std::thread::yield_now();
                }
            };
            let harvest = |tracker: &mut dyn Tracker, copy: &mut Copy<'_>| {
                for round in 0..8 {
                    // One whole round at least.
                    done.store(END, Ordering::Release);
                    while done.load(Ordering::Acquire) == END {
                        std::thread::yield_now();
                    }
                    let harvest = tracker.harvest().unwrap();
                    copy.update(&harvest);
                    if round % 3 != 1 {
                        harvest.commit();
                    }
                }
            };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                tracker.arm().unwrap();
                let mut copy = Copy::new(machine, &slots[..2]);
                harvest(&mut *tracker, &mut copy);
                for _ in 0..if in_rig() { 1 } else { 3 } {
                    // The guest's part first, then the tracker's, then KVM's; and the other way round.
                    enter(1);
                    tracker.set_slots(slots[..1].to_vec()).unwrap();
                    machine.unplug(&slots[1]);
                    copy.set_slots(&slots[..1]);
                    harvest(&mut *tracker, &mut copy);
                    machine.plug(&slots[2]);
                    enter(2);
                    let two = [slots[2].clone(), slots[0].clone()];
                    tracker.set_slots(two.to_vec()).unwrap();
                    copy.set_slots(&two);
                    harvest(&mut *tracker, &mut copy);
                    // Less of both, and more again.
                    let ranges = [part(0, 0x200, 0x200), part(2, 10, 0x200)];
                    let less = Slot::choose(two.to_vec(), &ranges).unwrap();
                    tracker.set_slots(less.clone()).unwrap();
                    copy.set_slots(&less);
                    harvest(&mut *tracker, &mut copy);
                    tracker.set_slots(two.to_vec()).unwrap();
                    copy.set_slots(&two);
                    harvest(&mut *tracker, &mut copy);
                    enter(1);
                    tracker.set_slots(slots[..1].to_vec()).unwrap();
                    machine.unplug(&slots[2]);
                    machine.plug(&slots[1]);
                    tracker.set_slots(slots[..2].to_vec()).unwrap();
                    copy.set_slots(&slots[..2]);
                    enter(0);
                    harvest(&mut *tracker, &mut copy);
                }
                copy
            }));
            phase.store(END, Ordering::Release);
            let mut copy = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            vcpu.join().unwrap();
            let last = tracker.harvest().unwrap();
            copy.update(&last);
            last.commit();
            assert!(copy.reported > 0, "{name}");
            copy.check();
        });
    });
}

/// What `tracker` reports of `written` when `ranges` are tracked.
fn expected(name: &str, written: &[Gfn], ranges: &[PageRange]) -> Vec<Gfn> {
    let opened = |gfn: Gfn| {
        let written = |leaf: u64| written.contains(&Gfn(leaf));
        if name == "uffd-sync by blocks" {
            (gfn.0 / 512 * 512..).take(512).any(written)
        } else {
            written(gfn.0)
        }
    };
    // A block is opened as far as it is in the same range as the page that was written.
    let of = |range: &PageRange| {
        let inside = |gfn: &Gfn| {
            let block = (gfn.0 / 512 * 512).max(range.start.0)..(gfn.0 / 512 * 512 + 512).min(range.end().0);
            opened(*gfn) && written.iter().any(|page| block.contains(&page.0))
        };
        range.iter().filter(inside).collect::<Vec<_>>()
    };
    ranges.iter().flat_map(of).collect()
}

#[test]
fn just_the_chosen_ranges_are_reported() {
    each("just_the_chosen_ranges_are_reported", |name, machine, guest, make| {
        let first = [part(0, 0x10, 0x21), part(0, 0x200, 0x200), part(1, 0, 1), part(1, 0x20f, 1)];
        let second = [part(0, 0x20, 0x200), part(2, 100, 200)];
        let written = [part(0, 0, 0x41), part(0, 0x1f0, 0x40), part(0, 0x3ff, 1), part(1, 0, 2)];
        let written = list(&[&written[..], &[part(1, 0x20e, 2), part(2, 50, 80)]].concat());
        let choose = |ranges: &[PageRange]| Slot::choose(machine.slots.clone(), ranges).unwrap();
        let mut tracker = make(choose(&first));
        for value in 1..3 {
            tracker.arm().unwrap();
            guest.write(&written, value);
            assert_eq!(certain(&mut *tracker), expected(name, &written, &first), "{name}");
            guest.write(&written, value);
            guest.write(&written, value);
            // What is owed of pages that stay is owed still, and what is new is protected.
            tracker.set_slots(choose(&second)).unwrap();
            let stay = [part(0, 0x20, 0x11), part(0, 0x200, 0x20)];
            let reported = certain(&mut *tracker);
            let owed = expected(name, &written, &stay);
            if !name.ends_with("dense-skip") {
                assert!(owed.iter().all(|gfn| reported.contains(gfn)), "{name}: owed");
                let within = |gfn: &Gfn| second.iter().any(|range| range.contains(*gfn));
                assert!(reported.iter().all(within), "{name}: not asked for");
            }
            guest.write(&written, value);
            let seen = certain(&mut *tracker);
            let wanted = expected(name, &written, &second);
            if name.ends_with("dense-skip") {
                assert!(seen.iter().all(|gfn| wanted.contains(gfn)), "{name}");
            } else {
                assert_eq!(seen, wanted, "{name}");
            }
            tracker.disarm().unwrap();
            // Unarmed, it is what the next arming begins with.
            tracker.set_slots(choose(&first)).unwrap();
        }
    });
}

/// What cannot be had is refused, and what is tracked is tracked on as if nothing had been asked for.
#[test]
fn a_change_that_fails_loses_nothing() {
    each("a_change_that_fails_loses_nothing", |name, machine, guest, make| {
        let (kvm, slots) = (kvm("a_change_that_fails_loses_nothing").unwrap(), &machine.slots);
        let mut tracker = make(slots[..2].to_vec());
        tracker.arm().unwrap();
        let pages = [Gfn(0x400), Gfn(0x5ff), Gfn(0x1000)];
        let ranges: Vec<_> = slots[..2].iter().map(Slot::frames).collect();
        guest.write(&pages, 1);
        // The same numbers over other memory.
        let (other, _guest) = Machine::new(&kvm, &SLOTS);
        let error = tracker.set_slots(other.slots[..2].to_vec()).unwrap_err();
        assert!(matches!(error, TrackerError::BadSlot { id: 1, .. }), "{name}: {error}");
        // A slot that KVM knows with another address, or memory that another userfaultfd has.
        let (mut rival, mut refused) = (None, other.slots[2].clone());
        if name.starts_with("uffd") {
            let mut uffd = UffdAsync::new(slots[2..].to_vec()).unwrap();
            uffd.arm().unwrap();
            (rival, refused) = (Some(uffd), slots[2].clone());
        }
        let error = tracker.set_slots(vec![slots[0].clone(), refused]).unwrap_err();
        assert!(
            matches!(
                error,
                TrackerError::SetLogging { slot: 3, on: true, .. }
                    | TrackerError::Register { slot: 3, on: true, .. }
                    | TrackerError::BadSlot { id: 3, .. }
            ),
            "{name}: {error}"
        );
        drop(rival);
        assert_eq!(certain(&mut *tracker), expected(name, &pages, &ranges), "{name}");
        guest.write(&pages[..2], 2);
        tracker.set_slots(slots[..1].to_vec()).unwrap();
        assert_eq!(certain(&mut *tracker), expected(name, &pages[..2], &ranges[..1]), "{name}");
    });
}

#[test]
fn ranges_that_cannot_be_tracked_are_refused() {
    let Some(kvm) = kvm("ranges_that_cannot_be_tracked_are_refused") else { return };
    let (machine, _guest) = Machine::new(&kvm, &SLOTS);
    let why = |ranges: &[PageRange]| match Slot::choose(machine.slots.clone(), ranges) {
        Err(TrackerError::BadRange { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(why(&[part(0, 0, 0)]).contains("no pages"));
    assert!(why(&[part(0, 5, 3), part(0, 0, 6)]).contains("overlaps"));
    assert!(why(&[part(0, 0x3ff, 2)]).contains("in no memslot"));
    assert!(why(&[PageRange { start: Gfn(0), pages: 1 }]).contains("in no memslot"));
    assert!(why(&[PageRange { start: Gfn(u64::MAX), pages: 2 }]).contains("beyond all addresses"));
}
