//! Which pages a guest touched, on the real KVM of this host.

use dirty_track::addr::{Gfn, PageRange};
use dirty_track::touched::{Touched, TouchedError};
use dirty_track::tracker::{KvmManual, Tracker, UffdAsync};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::backing::{Backed, Backing};
use crate::machine::{kvm, skip};

/// Prepares, or says that the host cannot.
fn touched(test: &str, machine: &crate::machine::Machine) -> Option<Touched> {
    match Touched::new(machine.slots.clone()) {
        Ok(touched) => Some(touched),
        Err(why @ (TouchedError::Userfaultfd(_) | TouchedError::Look { .. } | TouchedError::Proc(_))) => {
            skip(test, why);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn list(touched: &Touched) -> Vec<Gfn> {
    let mut pages: Vec<Gfn> = Vec::new();
    let change = touched.look(|range: PageRange| pages.extend(range.iter())).unwrap();
    assert_eq!((change.changed, change.sampled), (pages.len() as u64, change.pages));
    pages
}

fn shared(kvm: &Kvm, test: &str) -> Vec<Backed> {
    [Backing::Memfd, Backing::HugeMemfd]
        .into_iter()
        .filter_map(|backing| backing.machine(kvm, test))
        .collect()
}

#[test]
fn it_is_exactly_what_was_read_or_written() {
    let test = "touched::it_is_exactly_what_was_read_or_written";
    let Some(kvm) = kvm(test) else { return };
    for Backed { machine, guest, .. } in &mut shared(&kvm, test) {
        let Some(mut touched) = touched(test, machine) else { return };
        let read: Vec<_> = (0..60).map(|page| Gfn(0x400 + page * 17)).collect();
        let written: Vec<_> = [0x401, 0x7fe, 0x1000, 0x1234, 0x15ff].map(Gfn).into();
        guest.write(&read, 1);
        for value in 2..5 {
            touched.begin().unwrap();
            assert_eq!(list(&touched), []);
            guest.read(&read);
            assert_eq!(list(&touched), read);
            guest.write(&written, value);
            // The host touches as well.
            machine.memory.write_obj(value, GuestAddress(0x1111 << 12)).unwrap();
            let mut all = [&read[..], &written, &[Gfn(0x1111)]].concat();
            all.sort_unstable();
            assert_eq!(list(&touched), all);
        }
        // Nothing was lost.
        assert!(read.iter().all(|gfn| machine.stamp(*gfn) == 1));
        assert!(written.iter().all(|gfn| machine.stamp(*gfn) == 4));
    }
}

/// Unmapping takes nothing from those who track, and they tell read pages from written ones.
#[test]
fn trackers_go_on_beside_it() {
    let test = "touched::trackers_go_on_beside_it";
    let Some(kvm) = kvm(test) else { return };
    for Backed { machine, guest, .. } in &mut shared(&kvm, test) {
        let slots = machine.slots.clone();
        let mut trackers: Vec<Box<dyn Tracker>> =
            vec![Box::new(KvmManual::new(machine.vm.clone(), slots.clone()).unwrap())];
        match UffdAsync::new(slots) {
            Ok(uffd) => trackers.push(Box::new(uffd)),
            Err(why) => skip(test, why),
        }
        for tracker in &mut trackers {
            tracker.arm().unwrap();
            let Some(mut touched) = touched(test, machine) else { return };
            let written: Vec<_> = (0..40).map(|page| Gfn(0x410 + page * 9)).collect();
            for value in 1..6 {
                touched.begin().unwrap();
                guest.write(&written, value);
                touched.begin().unwrap();
                guest.read(&[Gfn(0x405), written[7]]);
                let reported = crate::machine::frames(&tracker.harvest().unwrap());
                assert!(
                    written.iter().all(|gfn| reported.contains(gfn)),
                    "{}: a write is missing",
                    tracker.name()
                );
                if !tracker.guarantees().may_report_reads {
                    assert_eq!(reported, written);
                }
                let mut seen = list(&touched);
                seen.retain(|gfn| !written.contains(gfn));
                assert_eq!(seen, [Gfn(0x405)]);
                tracker.harvest().unwrap().commit();
            }
            tracker.disarm().unwrap();
        }
    }
}

#[test]
fn a_sample_stands_for_all() {
    let test = "touched::a_sample_stands_for_all";
    let Some(kvm) = kvm(test) else { return };
    let Some(mut backed) = Backing::Memfd.machine(&kvm, test) else { return };
    let Backed { machine, guest, .. } = &mut backed;
    if touched(test, machine).is_none() {
        return;
    }
    // Every second page of the first slot, and nothing of the other, which is larger.
    let pages: Vec<_> = (0x400..0x800).step_by(2).map(Gfn).collect();
    let mut inside = 0;
    for seed in 0..20 {
        let mut touched = Touched::sampled(machine.slots.clone(), 1 << 15, seed).unwrap();
        touched.begin().unwrap();
        guest.read(&pages);
        let mut seen = Vec::new();
        let change = touched.look(|range| seen.extend(range.iter())).unwrap();
        assert_eq!((change.sampled, change.pages), (0x400 / 8 + 0x600 / 8, 0xa00));
        assert!(seen.iter().all(|gfn| pages.contains(gfn)));
        let (low, high) = change.interval();
        inside += u32::from((low..=high).contains(&(pages.len() as f64)));
    }
    assert!(inside >= 17, "{inside} of 20 intervals have the truth in them");
}

#[test]
fn memory_that_would_be_lost_is_refused() {
    let test = "touched::memory_that_would_be_lost_is_refused";
    let Some(kvm) = kvm(test) else { return };
    for backing in [Backing::Small, Backing::Thp, Backing::Hugetlb] {
        let Some(Backed { machine, .. }) = &backing.machine(&kvm, test) else { continue };
        match Touched::new(machine.slots.clone()) {
            Err(TouchedError::NotShared(1)) => {}
            Err(why @ TouchedError::Userfaultfd(_)) => return skip(test, why),
            other => panic!("{backing:?}: {other:?}"),
        }
    }
}
