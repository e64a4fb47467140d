//! `dense-skip` on the real KVM of this host: what is left writable is reported in each epoch and said to be
//! coarse, everything else stays exact, and what cools is exact again.

use std::collections::BTreeSet;

use crate::copy::converge;
use crate::machine::{Machine, frames, kvm};
use dirty_track::addr::{Gfn, PAGE_BYTES};
use dirty_track::bitmap;
use dirty_track::rearm::{DenseSkip, PROBES, Rearm};
use dirty_track::refine::{Shadow, refine};
use dirty_track::tracker::{Harvest, KvmManual, Slot, Tracker};
use vm_memory::{Bytes, GuestAddress};

/// One slot of 8 blocks that begins with a block, and one that does not and ends in the middle of one.
const SLOTS: [(Gfn, u64); 2] = [(Gfn(0x400), 8 * 512), (Gfn(0x2010), 700)];
const FOR_EPOCHS: u64 = 4;

fn tracker(machine: &Machine) -> KvmManual {
    let skip = DenseSkip::new(384, FOR_EPOCHS).unwrap();
    let tracker = KvmManual::new(machine.vm.clone(), machine.slots.clone()).unwrap();
    tracker.with_rearm(Rearm::DenseSkip(skip))
}

/// `pages` pages of block `block` of the slot that begins at `first`.
fn leaves(first: Gfn, block: u64, pages: u64) -> BTreeSet<Gfn> {
    (0..pages).map(|page| Gfn(first.0 + block * 512 + page)).collect()
}

fn reported(harvest: &Harvest<'_>) -> BTreeSet<Gfn> {
    frames(harvest).into_iter().collect()
}

fn coarse(harvest: &Harvest<'_>) -> BTreeSet<Gfn> {
    let coarse: BTreeSet<_> = harvest.coarse_runs().flat_map(|run| run.iter()).collect();
    assert_eq!(harvest.coarse_count(), coarse.len() as u64);
    assert!(coarse.iter().all(|&gfn| harvest.contains(gfn) && harvest.is_coarse(gfn)));
    coarse
}

/// Pages of a slot whose log bit is set, as KVM says itself.
fn log(machine: &Machine, slot: &Slot) -> BTreeSet<Gfn> {
    let words = machine.vm.get_dirty_log(slot.id(), slot.len() as usize).unwrap();
    bitmap::runs(&words).flatten().map(|page| Gfn(slot.frames().start.0 + page as u64)).collect()
}

#[test]
fn dense_blocks_are_left_writable_and_everything_else_is_exact() {
    let Some(kvm) = kvm("dense_blocks_are_left_writable_and_everything_else_is_exact") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut tracker = tracker(&machine);
    // Blocks 1 and 5 of the first slot and the first of the second are dense, 3 is not quite.
    let dense = [leaves(SLOTS[0].0, 1, 512), leaves(SLOTS[0].0, 5, 400), leaves(SLOTS[1].0, 0, 384)];
    let dense: BTreeSet<_> = dense.into_iter().flatten().collect();
    let sparse = leaves(SLOTS[0].0, 3, 383);
    let all: Vec<_> = (&dense | &sparse).into_iter().collect();
    tracker.arm().unwrap();
    let mut coarse_epochs = 0;
    for epoch in 0..20u32 {
        // A page in an exact block, a different one each time.
        let lone = Gfn(SLOTS[0].0.0 + 7 * 512 + u64::from(epoch));
        guest.write(&all, epoch + 1);
        guest.write(&[lone], epoch + 1);
        let open = tracker.open_blocks();
        let harvest = tracker.harvest().unwrap();
        let expected = &(&dense | &sparse) | &BTreeSet::from([lone]);
        assert_eq!(reported(&harvest), expected, "epoch {epoch}");
        let coarse = coarse(&harvest);
        if epoch == 0 {
            assert_eq!((open, coarse.len()), (0, 0), "the first epoch is exact");
        } else {
            assert_eq!(open, 3, "dense blocks never go back to being tracked page by page");
            assert!(coarse.is_subset(&dense) && coarse.len() >= dense.len() - 3 * PROBES);
            coarse_epochs += usize::from(coarse == dense);
        }
        harvest.commit();
        // What was not re-protected has its bit still, and nothing else has.
        let left: BTreeSet<_> = machine.slots.iter().flat_map(|slot| log(&machine, slot)).collect();
        assert!(left.is_subset(&dense) && left.len() >= dense.len() - 3 * PROBES, "epoch {epoch}");
    }
    assert!((1..19).contains(&coarse_epochs), "some epochs have probes, some have none: {coarse_epochs}");
}

#[test]
fn what_cools_is_exact_again() {
    let Some(kvm) = kvm("what_cools_is_exact_again") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut tracker = tracker(&machine);
    let hot: Vec<_> = leaves(SLOTS[0].0, 2, 512).into_iter().collect();
    tracker.arm().unwrap();
    for value in 1..4 {
        guest.write(&hot, value);
        tracker.harvest().unwrap().commit();
    }
    assert_eq!(tracker.open_blocks(), 1);
    let mut epochs = 0;
    while tracker.open_blocks() > 0 {
        epochs += 1;
        assert!(epochs <= FOR_EPOCHS + 1, "the block stays open");
        guest.write(&hot[..3], 10 + epochs as u32);
        let harvest = tracker.harvest().unwrap();
        assert!(hot[..3].iter().all(|&gfn| harvest.contains(gfn)));
        harvest.commit();
    }
    for (value, pages) in [(20, &hot[10..20]), (21, &hot[..1]), (22, &hot[500..])] {
        guest.write(pages, value);
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), pages);
        assert_eq!(harvest.coarse_count(), 0);
        harvest.commit();
    }
}

#[test]
fn a_dropped_harvest_owes_coarse_pages_too_and_all_closes_what_is_open() {
    let Some(kvm) = kvm("a_dropped_harvest_owes_coarse_pages_too_and_all_closes_what_is_open") else {
        return;
    };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut tracker = tracker(&machine);
    let hot = leaves(SLOTS[0].0, 2, 512);
    let list: Vec<_> = hot.iter().copied().collect();
    tracker.arm().unwrap();
    guest.write(&list, 1);
    drop(tracker.harvest().unwrap());
    tracker.set_rearm(Rearm::All);
    // The host writes to a page that is writable for the guest.
    machine.memory.write_obj(1u8, GuestAddress(list[9].gpa().0)).unwrap();
    let harvest = tracker.harvest().unwrap();
    assert_eq!(reported(&harvest), hot);
    assert_eq!(harvest.coarse_count(), 0, "owed since they were known to be written");
    assert!(harvest.from_host(list[9]));
    harvest.commit();
    assert_eq!(tracker.open_blocks(), 0);
    assert!(tracker.harvest().unwrap().is_empty());

    tracker.set_rearm(Rearm::DenseSkip(DenseSkip::default()));
    guest.write(&list, 2);
    tracker.harvest().unwrap().commit();
    machine.memory.write_obj(1u8, GuestAddress(list[9].gpa().0)).unwrap();
    let harvest = tracker.harvest().unwrap();
    assert_eq!(coarse(&harvest), &hot - &BTreeSet::from([list[9]]), "the host's write is known");
    drop(harvest);
    tracker.set_rearm(Rearm::All);
    let mut harvest = tracker.harvest().unwrap();
    assert_eq!(reported(&harvest), hot);
    assert_eq!(harvest.coarse_count(), 511);
    assert!(harvest.discard(list[0]) && !harvest.is_coarse(list[0]));
    harvest.commit();
    assert!(tracker.harvest().unwrap().is_empty());
}

/// Whoever copies what each harvest reports ends with the guest's memory, if the last harvest finds the guest
/// at rest, although blocks were writable while they were copied.
#[test]
fn a_copy_converges_although_blocks_stay_writable() {
    let Some(kvm) = kvm("a_copy_converges_although_blocks_stay_writable") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    // Which block is hot changes, so blocks open and close all the time.
    let pages = |round: u32| {
        let hot = leaves(SLOTS[0].0, u64::from(round / 12 % 8), 450);
        hot.into_iter().chain(leaves(SLOTS[1].0, 1, 20)).collect()
    };
    let copy = converge(&machine, &mut guest, &mut tracker(&machine), 120, pages);
    assert!(copy.coarse > 0, "nothing was ever left writable");
}

/// With what was sent at hand, only pages that changed are sent again, and the receiver ends with the guest's
/// memory: the guest rewrites whole blocks, most pages with what they hold already.
#[test]
fn refined_harvests_send_what_changed_and_lose_nothing() {
    let Some(kvm) = kvm("refined_harvests_send_what_changed_and_lose_nothing") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut tracker = tracker(&machine);
    let hot: Vec<_> = leaves(SLOTS[0].0, 1, 512).into_iter().chain(leaves(SLOTS[1].0, 0, 512)).collect();
    tracker.arm().unwrap();
    let mut shadow = Shadow::new(machine.slots.iter().map(Slot::frames));
    let mut receiver = machine.stamps();
    let read = |gfn: Gfn| {
        let mut page = [0; PAGE_BYTES];
        machine.memory.read_slice(&mut page, GuestAddress(gfn.gpa().0)).unwrap();
        page
    };
    for epoch in 0..24u32 {
        guest.write(&hot, 1);
        let changed: BTreeSet<_> = hot.iter().copied().skip(epoch as usize).step_by(40).collect();
        if epoch > 0 {
            guest.write(&changed.iter().copied().collect::<Vec<_>>(), 100 + epoch);
        }
        let mut harvest = tracker.harvest().unwrap();
        let (count, coarse) = (harvest.count(), harvest.coarse_count());
        let refined = refine(&mut harvest, &machine.memory, &shadow).unwrap();
        assert_eq!(refined.unknown, 0, "whatever is coarse was sent in the first epoch");
        assert_eq!((refined.compared, harvest.count()), (coarse, count - refined.dropped));
        if epoch > 0 {
            let sent: BTreeSet<_> = reported(&harvest);
            assert!(changed.is_subset(&sent), "epoch {epoch}");
            // Those of the epoch before are back at what they were; probes are written and unchanged.
            assert!(sent.len() <= 2 * changed.len() + 2 * PROBES, "epoch {epoch}: {}", sent.len());
        }
        for gfn in frames(&harvest) {
            assert!(shadow.record(gfn, &read(gfn)));
            let at = receiver.binary_search_by_key(&gfn, |(gfn, _)| *gfn).unwrap();
            receiver[at].1 = machine.stamp(gfn);
        }
        // What was sent is with the receiver even if the harvest is owed again.
        if epoch % 3 != 1 {
            harvest.commit();
        }
        assert_eq!(receiver, machine.stamps(), "epoch {epoch}");
    }
}
