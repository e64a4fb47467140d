//! `kvm-ring` on the real KVM of this host: full rings, several vCPUs, who wrote what, and what can go wrong.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use dirty_track::addr::Gfn;
use dirty_track::tracker::{DirtyRings, Harvest, KvmBitmap, KvmManual, KvmRing, Tracker, TrackerError};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::machine::{Machine, Writer, frames, kvm};

/// Two slots with a hole between them; the second one is many times larger than a ring.
const SLOTS: [(Gfn, u64); 2] = [(Gfn(0x100), 70), (Gfn(0x200), 4000)];

/// The smallest ring, so that it is full soon.
const ENTRIES: u32 = 256;

fn tracker(machine: &Machine) -> KvmRing {
    KvmRing::new(machine.rings.as_ref().unwrap(), machine.slots.clone()).unwrap()
}

/// `count` pages, distinct and in no order, that depend on `seed`.
fn random_pages(seed: u64, count: usize) -> Vec<Gfn> {
    let total: u64 = SLOTS.iter().map(|slot| slot.1).sum();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut seen = BTreeSet::new();
    let mut pages = Vec::new();
    while pages.len() < count {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let page = (state >> 33) % total;
        if seen.insert(page) {
            pages.push(if page < SLOTS[0].1 {
                Gfn(SLOTS[0].0.0 + page)
            } else {
                Gfn(SLOTS[1].0.0 + page - SLOTS[0].1)
            });
        }
    }
    pages
}

fn written_by(harvest: &Harvest<'_>, vcpu: usize) -> Vec<Gfn> {
    harvest.written_by(vcpu).flat_map(|run| run.iter()).collect()
}

/// Each epoch writes more than fits into a ring. Whoever empties the rings, each page is reported, and no other.
#[test]
fn a_ring_that_is_full_loses_no_entry() {
    const NAME: &str = "a_ring_that_is_full_loses_no_entry";
    let Some(kvm) = kvm(NAME) else { return };
    for with_reaper in [false, true] {
        let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 1, ENTRIES) else { return };
        let guest = &mut guests[0];
        let entries = machine.rings.as_ref().unwrap().entries() as usize;
        let mut tracker = if with_reaper { tracker(&machine) } else { tracker(&machine).without_reaper() };
        tracker.arm().unwrap();
        let mut writes = 0;
        for round in 1..=40 {
            let pages = random_pages(round, 100 + 20 * round as usize);
            guest.write(&pages, round as u32);
            writes += pages.len();
            let harvest = tracker.harvest().unwrap();
            let expected: BTreeSet<_> = pages.iter().copied().collect();
            assert_eq!(frames(&harvest), expected.into_iter().collect::<Vec<_>>(), "round {round}");
            assert_eq!(written_by(&harvest, 0), frames(&harvest));
            assert_eq!((harvest.vcpus(), harvest.count_by(0)), (1, harvest.count()));
            assert_eq!(written_by(&harvest, 1), []);
            // What a page's contents are worth after a harvest: they are the newest.
            assert!(pages.iter().all(|&gfn| machine.stamp(gfn) == round as u32));
            harvest.commit();
            assert!(tracker.harvest().unwrap().is_empty());
        }
        if !with_reaper {
            // With a harvest every 500 writes on average, and nobody else to empty the ring.
            assert!(guest.fulls > writes / entries / 2, "{} times full in {writes} writes", guest.fulls);
        }
    }
}

/// Several vCPUs write at the same time, while harvests run and vCPUs and the reaper empty rings. What is
/// reported over a whole round is what was written, and by whom.
#[test]
fn several_vcpus_are_told_apart_while_they_run() {
    const NAME: &str = "several_vcpus_are_told_apart_while_they_run";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 3, ENTRIES) else { return };
    let mut tracker = tracker(&machine);
    tracker.arm().unwrap();
    let cpus = guests.len();
    for round in 1..=20 {
        // No page is written twice in a round, so that it is known who wrote it.
        let all = random_pages(round, 1500);
        let shares: Vec<&[Gfn]> = all.chunks(all.len() / cpus).collect();
        let running = AtomicUsize::new(cpus);
        let mut seen = vec![BTreeSet::new(); cpus];
        std::thread::scope(|scope| {
            for (guest, share) in guests.iter_mut().zip(&shares) {
                let running = &running;
                scope.spawn(move || {
                    guest.write(share, round as u32);
                    running.fetch_sub(1, Ordering::AcqRel);
                });
            }
            loop {
                // Looked at before the harvest: the last one finds all vCPUs at rest.
                let last = running.load(Ordering::Acquire) == 0;
                let harvest = tracker.harvest().unwrap();
                assert_eq!(harvest.vcpus(), cpus);
                for (vcpu, seen) in seen.iter_mut().enumerate() {
                    seen.extend(written_by(&harvest, vcpu));
                    assert_eq!(harvest.count_by(vcpu), written_by(&harvest, vcpu).len() as u64);
                }
                if harvest.count().is_multiple_of(2) || last {
                    harvest.commit();
                }
                if last {
                    break;
                }
                std::thread::yield_now();
            }
        });
        for (vcpu, share) in shares.iter().enumerate() {
            assert_eq!(seen[vcpu], share.iter().copied().collect(), "round {round}, vCPU {vcpu}");
        }
    }
}

/// Signals that the harvester has got.
static DELIVERED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    DELIVERED.fetch_add(1, Ordering::Relaxed);
}

/// KVM cuts a reset short when a signal is pending (since Linux 6.17), and a monitor sends signals to its threads.
/// A harvest goes on until all is protected again: the same pages are reported when they are written again, and
/// their places in the ring are free.
#[test]
fn signals_do_not_leave_a_harvest_incomplete() {
    const NAME: &str = "signals_do_not_leave_a_harvest_incomplete";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 1, 4096) else { return };
    register_signal_handler(SIGRTMIN() + 1, count).unwrap();
    let mut tracker = tracker(&machine).without_reaper();
    tracker.arm().unwrap();
    // More than half of a ring, and less than one.
    let pages = random_pages(5, 3000);
    let expected: Vec<_> = BTreeSet::from_iter(pages.iter().copied()).into_iter().collect();
    for round in 0..40 {
        guests[0].write(&pages, round);
        let harvester = std::thread::spawn(move || {
            let harvest = tracker.harvest().unwrap();
            let reported = frames(&harvest);
            harvest.commit();
            (tracker, reported)
        });
        while !harvester.is_finished() {
            let before = DELIVERED.load(Ordering::Relaxed);
            // It may have ended just now.
            let _ = harvester.kill(SIGRTMIN() + 1);
            // One at a time: such signals queue up, and on one CPU they would be all that the harvester does.
            while DELIVERED.load(Ordering::Relaxed) == before && !harvester.is_finished() {
                std::thread::yield_now();
            }
        }
        let reported;
        (tracker, reported) = harvester.join().unwrap();
        assert_eq!(reported, expected, "round {round}");
    }
    assert_eq!(guests[0].fulls, 0, "places were not given back");
}

#[test]
fn a_vcpu_that_dies_takes_nothing_with_it() {
    const NAME: &str = "a_vcpu_that_dies_takes_nothing_with_it";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 2, ENTRIES) else { return };
    let mut tracker = tracker(&machine).without_reaper();
    tracker.arm().unwrap();
    guests[1].write(&[Gfn(0x100), Gfn(0x2ff)], 1);
    drop(guests.pop());
    guests[0].write(&[Gfn(0x101)], 1);
    let harvest = tracker.harvest().unwrap();
    assert_eq!(frames(&harvest), [Gfn(0x100), Gfn(0x101), Gfn(0x2ff)]);
    assert_eq!(written_by(&harvest, 1), [Gfn(0x100), Gfn(0x2ff)]);
    harvest.commit();
    guests[0].write(&[Gfn(0x100)], 2);
    let harvest = tracker.harvest().unwrap();
    assert_eq!(frames(&harvest), [Gfn(0x100)], "it was protected again");
    assert_eq!((written_by(&harvest, 0), written_by(&harvest, 1)), (vec![Gfn(0x100)], vec![]));
}

/// Pages of one run of the guest, few enough for what a ring keeps in reserve.
const RUN: usize = 32;

/// Writes `runs` times `RUN` pages and says how often the ring was full.
fn fulls(guest: &mut Writer, runs: usize) -> usize {
    let before = guest.fulls;
    random_pages(7, runs * RUN).chunks(RUN).for_each(|pages| guest.write(pages, 9));
    guest.fulls - before
}

/// Has the guest write until its ring is full, in the middle of something.
fn fill(guest: &mut Writer) {
    for pages in random_pages(8, 100 * RUN).chunks(RUN) {
        guest.begin(pages, 8);
        if !guest.go_on() {
            return;
        }
    }
    panic!("the ring is never full");
}

#[test]
fn a_full_ring_holds_nobody_up_when_nobody_tracks() {
    const NAME: &str = "a_full_ring_holds_nobody_up_when_nobody_tracks";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 1, ENTRIES) else { return };
    let guest = &mut guests[0];
    let mut tracker = tracker(&machine).without_reaper();
    assert_eq!(fulls(guest, 100), 0, "nothing is logged before arming");
    for _ in 0..3 {
        tracker.arm().unwrap();
        assert!(tracker.harvest().unwrap().is_empty(), "what is left in the rings is nobody's");
        fill(guest);
        assert!(!guest.go_on(), "a full ring stays full");
        assert!(!tracker.harvest().unwrap().is_empty());
        assert!(guest.go_on(), "a harvest makes room");
        fill(guest);
        tracker.disarm().unwrap();
        assert!(guest.go_on(), "room was made");
        assert_eq!(fulls(guest, 100), 0, "nothing is logged after disarming");
    }
    tracker.arm().unwrap();
    fill(guest);
    drop(tracker);
    assert!(guest.go_on(), "dropping a tracker disarms it");
    assert_eq!(fulls(guest, 100), 0);
}

#[test]
fn rings_that_cannot_be_are_typed_errors() {
    const NAME: &str = "rings_that_cannot_be_are_typed_errors";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, _guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 1, ENTRIES) else { return };
    let vm = || std::sync::Arc::new(kvm.create_vm().unwrap());
    for entries in [0, 1, 128, 255, 257, 1000, 3 << 10, 1 << 20, u32::MAX] {
        let error = DirtyRings::enable(vm(), entries).unwrap_err();
        assert!(matches!(error, TrackerError::RingSize { asked, .. } if asked == entries), "{error}");
    }
    let late = vm();
    let vcpu = late.create_vcpu(0).unwrap();
    let error = DirtyRings::enable(late.clone(), 4096).unwrap_err();
    assert!(
        matches!(&error, TrackerError::Enable { source, .. } if source.errno() == libc::EINVAL),
        "{error}"
    );
    let rings = machine.rings.as_ref().unwrap();
    let error = rings.add_vcpu(&vcpu).unwrap_err();
    assert!(matches!(error, TrackerError::MapRing { vcpu: 1, .. }), "a vCPU of another VM: {error}");

    let (mut one, mut other) = (tracker(&machine), tracker(&machine));
    one.arm().unwrap();
    assert!(matches!(other.arm(), Err(TrackerError::AlreadyArmed)), "two trackers on the same rings");
    assert!(matches!(other.harvest(), Err(TrackerError::NotArmed)));
    one.disarm().unwrap();
    other.arm().unwrap();
    assert!(one.guarantees().per_vcpu);
}

/// A VM with rings has no bitmaps. Trackers of bitmaps find that out when they are armed, and leave neither
/// logging nor their mode behind: in that of `kvm-manual`, a ring would report nothing.
#[test]
fn a_bitmap_cannot_be_had_besides_a_ring() {
    const NAME: &str = "a_bitmap_cannot_be_had_besides_a_ring";
    let Some(kvm) = kvm(NAME) else { return };
    let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 1, ENTRIES) else { return };
    let guest = &mut guests[0];
    let bitmap = KvmBitmap::new(machine.vm.clone(), machine.slots.clone()).unwrap();
    let manual = KvmManual::new(machine.vm.clone(), machine.slots.clone()).unwrap();
    let trackers: [Box<dyn Tracker>; 2] = [Box::new(bitmap), Box::new(manual)];
    for mut refused in trackers {
        let source = match refused.arm().unwrap_err() {
            TrackerError::GetLog { source, .. } | TrackerError::ClearLog { source, .. } => source,
            other => panic!("{other}"),
        };
        assert_eq!(source.errno(), libc::ENXIO);
        assert!(matches!(refused.harvest(), Err(TrackerError::NotArmed)));
        assert_eq!(fulls(guest, 100), 0, "its logging is off again");
        let mut tracker = tracker(&machine);
        tracker.arm().unwrap();
        guest.write(&[Gfn(0x100), Gfn(0x201)], 3);
        assert_eq!(frames(&tracker.harvest().unwrap()), [Gfn(0x100), Gfn(0x201)]);
    }
}
