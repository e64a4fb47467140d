//! The trackers that write-protect by userfaultfd, over each kind of memory, on the real KVM of this host. What
//! they report is compared with what was written: no page less, and no page more than their granularity explains.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};

use dirty_track::addr::{Gfn, PAGE_SIZE, PageSize};
use dirty_track::fault::{Config, FaultTracker, Server, Source};
use dirty_track::tracker::{Exact, Tracker, TrackerError, UffdAsync, UffdSync};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::backing::{ALL, Backed, Backing, SLOTS};
use crate::copy::converge;
use crate::machine::{MAX_STORES, Machine, frames, kvm, skip};

/// How a test makes its tracker.
type Make = fn(&Machine) -> Result<Box<dyn Tracker>, TrackerError>;

const TRACKERS: [(&str, PageSize, Make); 5] = [
    ("uffd-async", PageSize::K4, |machine| Ok(Box::new(UffdAsync::new(machine.slots.clone())?))),
    ("uffd-sync", PageSize::K4, |machine| Ok(Box::new(UffdSync::new(machine.slots.clone(), PageSize::K4)?))),
    ("uffd-sync", PageSize::M2, |machine| Ok(Box::new(UffdSync::new(machine.slots.clone(), PageSize::M2)?))),
    ("uffd-serve", PageSize::K4, |machine| {
        let slots = machine.slots.iter().map(|slot| (slot.clone(), Source::Zero)).collect();
        Ok(Box::new(FaultTracker::new(Arc::new(Server::start(slots, Config::default())?))))
    }),
    ("exact", PageSize::K4, |machine| Ok(Box::new(Exact::new(machine.vm.clone(), machine.slots.clone())?))),
];

/// One test at a time borrows huge pages.
static POOL: Mutex<()> = Mutex::new(());

/// Runs `check` with every tracker over every backing that the host has.
fn everywhere(test: &str, mut check: impl FnMut(&mut Backed, &mut dyn Tracker, PageSize)) {
    let Some(kvm) = kvm(test) else { return };
    let _pool: MutexGuard<'_, ()> = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for (name, unit, make) in TRACKERS {
        for backing in ALL {
            each(test, &kvm, (name, unit, make), backing, &mut check);
        }
    }
}

fn each(
    test: &str,
    kvm: &Kvm,
    (name, unit, make): (&str, PageSize, Make),
    backing: Backing,
    check: &mut impl FnMut(&mut Backed, &mut dyn Tracker, PageSize),
) {
    let Some(mut backed) = backing.machine(kvm, test) else { return };
    let mut tracker = match make(&backed.machine) {
        Ok(tracker) => tracker,
        Err(TrackerError::Userfaultfd(why)) => {
            return skip(test, format_args!("{name}: {why}"));
        }
        Err(error) => panic!("{name} on {backing:?}: {error}"),
    };
    let guarantees = tracker.guarantees();
    assert_eq!(tracker.name(), name);
    assert_eq!(guarantees.granularity, unit.max(backing.page()), "{name} on {backing:?}");
    assert!(guarantees.sees_guest_writes && guarantees.sees_host_writes && !guarantees.may_report_reads);
    println!("{name} by {unit} on {backing:?}");
    check(&mut backed, &mut *tracker, guarantees.granularity);
}

/// Pages at the ends of slots, words and blocks, and some in between.
fn corners() -> Vec<Gfn> {
    SLOTS
        .iter()
        .flat_map(|&(first, pages)| {
            [0, 1, 31, 63, 64, 65, 300, 511, 512, 700, pages - 1]
                .into_iter()
                .map(move |page| Gfn(first.0 + page))
        })
        .collect()
}

/// What a tracker of this granularity reports when `pages` were written.
fn widened(pages: &[Gfn], granularity: PageSize) -> Vec<Gfn> {
    let leaves = granularity.leaves();
    let units: BTreeSet<_> = pages.iter().map(|gfn| gfn.0 / leaves).collect();
    units.into_iter().flat_map(|unit| unit * leaves..(unit + 1) * leaves).map(Gfn).collect()
}

#[test]
fn a_harvest_is_exactly_what_was_written_since_the_last() {
    everywhere(
        "uffd::a_harvest_is_exactly_what_was_written_since_the_last",
        |backed, tracker, granularity| {
            let corners = corners();
            backed.guest.write(&corners, 1);
            tracker.arm().unwrap();
            let harvest = tracker.harvest().unwrap();
            assert_eq!(frames(&harvest), [], "what was written before arming is not owed");
            harvest.commit();
            // Everything, then every third, then nothing but reads, then everything again.
            let third: Vec<_> = corners.iter().copied().step_by(3).collect();
            for (value, pages) in [(2, &corners), (3, &third), (4, &third), (5, &corners)] {
                backed.guest.write(pages, value);
                let harvest = tracker.harvest().unwrap();
                assert_eq!(frames(&harvest), widened(pages, granularity));
                assert_eq!(harvest.host_count(), 0);
                harvest.commit();
                backed.guest.read(&corners);
                let harvest = tracker.harvest().unwrap();
                assert!(harvest.is_empty(), "only read: {:?}", frames(&harvest));
                harvest.commit();
            }
        },
    );
}

#[test]
fn all_of_memory_written_is_all_of_memory_reported() {
    everywhere("uffd::all_of_memory_written_is_all_of_memory_reported", |backed, tracker, _| {
        let all: Vec<_> =
            SLOTS.iter().flat_map(|&(first, pages)| first.0..first.0 + pages).map(Gfn).collect();
        tracker.arm().unwrap();
        for value in 1..3 {
            backed.guest.write(&all, value);
            let harvest = tracker.harvest().unwrap();
            assert_eq!(frames(&harvest), all);
            harvest.commit();
            assert!(tracker.harvest().unwrap().is_empty());
        }
        // More runs than one look takes.
        let other: Vec<_> = all.iter().copied().step_by(2).collect();
        backed.guest.write(&other, 3);
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), widened(&other, tracker_unit(&harvest, &all)));
        harvest.commit();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

/// The granularity that shows in a harvest of every other page of `all`.
fn tracker_unit(harvest: &dirty_track::tracker::Harvest<'_>, all: &[Gfn]) -> PageSize {
    if harvest.count() == all.len() as u64 { PageSize::M2 } else { PageSize::K4 }
}

#[test]
fn a_dropped_harvest_is_owed_again() {
    everywhere("uffd::a_dropped_harvest_is_owed_again", |backed, tracker, granularity| {
        tracker.arm().unwrap();
        backed.guest.write(&[Gfn(0x400), Gfn(0x1300)], 1);
        drop(tracker.harvest().unwrap());
        backed.guest.write(&[Gfn(0x401)], 2);
        drop(tracker.harvest().unwrap());
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), widened(&[Gfn(0x400), Gfn(0x401), Gfn(0x1300)], granularity));
        harvest.commit();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

#[test]
fn what_the_host_writes_is_seen_past_vm_memory_too() {
    everywhere("uffd::what_the_host_writes_is_seen_past_vm_memory_too", |backed, tracker, granularity| {
        let tracker_name = tracker.name();
        tracker.arm().unwrap();
        backed.machine.memory.write_slice(&[1; 5000], GuestAddress(0x405 << 12)).unwrap();
        let address = (backed.machine.slots[1].hva() + 7 * PAGE_SIZE) as *mut u8;
        // SAFETY: the address is in a slot's memory, which is mapped for as long as the machine lives and which
        // nobody else accesses now.
        unsafe { address.write_volatile(1) };
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), widened(&[Gfn(0x405), Gfn(0x406), Gfn(0x1007)], granularity));
        assert!(harvest.from_host(Gfn(0x405)) && harvest.from_host(Gfn(0x406)));
        // Only a KVM log besides tells whose write it was when vm-memory knows nothing of it.
        assert_eq!(harvest.from_host(Gfn(0x1007)), tracker_name == "exact");
        harvest.commit();
        backed.machine.memory.read_obj::<u64>(GuestAddress(0x405 << 12)).unwrap();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

#[test]
fn memory_that_was_never_touched_is_tracked_from_its_first_write_on() {
    let test = "uffd::memory_that_was_never_touched_is_tracked_from_its_first_write_on";
    everywhere(test, |backed, tracker, granularity| {
        // Dropped again after the machine had it populated. Shared memory stays in its file; it is only unmapped.
        for slot in &backed.machine.slots {
            // SAFETY: the guest does not run, and whatever it had in its memory is of no interest here.
            let result = unsafe {
                libc::madvise(slot.hva() as *mut libc::c_void, slot.len() as usize, libc::MADV_DONTNEED)
            };
            assert_eq!(result, 0);
        }
        tracker.arm().unwrap();
        let corners = corners();
        backed.guest.read(&corners);
        assert_eq!(frames(&tracker.harvest().unwrap()), [], "only read");
        backed.guest.write(&corners, 1);
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), widened(&corners, granularity));
        harvest.commit();
        assert!(tracker.harvest().unwrap().is_empty());
    });
}

#[test]
fn memory_that_the_host_drops_and_marks_is_reported_and_protected_again() {
    let test = "uffd::memory_that_the_host_drops_and_marks_is_reported_and_protected_again";
    everywhere(test, |backed, tracker, granularity| {
        use vm_memory::bitmap::Bitmap;
        tracker.arm().unwrap();
        backed.guest.write(&[Gfn(0x400)], 1);
        tracker.harvest().unwrap().commit();
        let slot = &backed.machine.slots[0];
        // The second block: nothing was written there, so where there are huge pages it is one, and dropped as one.
        let block = 512 * PAGE_SIZE as usize;
        let start = slot.hva() + block as u64;
        // SAFETY: the guest does not run, and whatever it had in that memory is of no interest here.
        let dropped = unsafe { libc::madvise(start as *mut libc::c_void, block, libc::MADV_DONTNEED) };
        assert_eq!(dropped, 0);
        slot.host_writes().mark_dirty(block, block);
        let all: Vec<_> = (0x600..0x800).map(Gfn).collect();
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), all);
        harvest.commit();
        let harvest = tracker.harvest().unwrap();
        assert_eq!(frames(&harvest), []);
        harvest.commit();
        backed.guest.read(&[Gfn(0x630), Gfn(0x7f0)]);
        backed.guest.write(&[Gfn(0x7ff), Gfn(0x610)], 2);
        // SAFETY: the address is in a slot's memory, which nobody else accesses now.
        unsafe { ((start + 0x20 * PAGE_SIZE) as *mut u8).write_volatile(1) };
        let written = widened(&[Gfn(0x7ff), Gfn(0x610), Gfn(0x620)], granularity);
        assert_eq!(frames(&tracker.harvest().unwrap()), written);
    });
}

#[test]
fn arming_begins_anew_and_disarming_leaves_nothing_protected() {
    let test = "uffd::arming_begins_anew_and_disarming_leaves_nothing_protected";
    everywhere(test, |backed, tracker, granularity| {
        assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
        assert!(matches!(tracker.disarm(), Err(TrackerError::NotArmed)));
        for value in 1..4 {
            tracker.arm().unwrap();
            assert!(matches!(tracker.arm(), Err(TrackerError::AlreadyArmed)));
            backed.guest.write(&[Gfn(0x401)], value);
            assert_eq!(frames(&tracker.harvest().unwrap()), widened(&[Gfn(0x401)], granularity));
            tracker.disarm().unwrap();
            assert!(matches!(tracker.harvest(), Err(TrackerError::NotArmed)));
            backed.guest.write(&corners(), value);
        }
    });
}

#[test]
fn two_trackers_over_the_same_memory_are_an_error_that_says_so() {
    let test = "uffd::two_trackers_over_the_same_memory_are_an_error_that_says_so";
    everywhere(test, |backed, tracker, _| {
        if tracker.name() == "uffd-serve" {
            // Its memory is registered for as long as its faults are served.
            let mut other = UffdAsync::new(backed.machine.slots.clone()).unwrap();
            assert!(matches!(other.arm(), Err(TrackerError::Register { slot: 1, on: true, .. })));
            return;
        }
        let mut other = UffdAsync::new(backed.machine.slots.clone()).unwrap();
        tracker.arm().unwrap();
        let error = other.arm().unwrap_err();
        assert!(matches!(error, TrackerError::Register { slot: 1, on: true, .. }), "{error}");
        assert!(error.to_string().contains("one tracker at a time"), "{error}");
        tracker.disarm().unwrap();
        other.arm().unwrap();
        drop(other);
        tracker.arm().unwrap();
    });
}

#[test]
fn a_file_on_a_disk_is_tracked_or_refused_with_a_reason() {
    let test = "uffd::a_file_on_a_disk_is_tracked_or_refused_with_a_reason";
    let Some(kvm) = kvm(test) else { return };
    let path = std::env::current_exe().unwrap().with_extension("slot");
    let file = || File::options().read(true).write(true).create(true).truncate(false).open(&path).ok();
    let (machine, mut guest) = Machine::over(&kvm, &[(Gfn(0x400), 16)], file);
    let on_tmpfs = is_tmpfs(&path);
    std::fs::remove_file(&path).unwrap();
    if on_tmpfs {
        return skip(test, format_args!("{path:?} is on a tmpfs"));
    }
    match UffdSync::new(machine.slots.clone(), PageSize::K4) {
        Ok(mut tracker) => {
            let error = tracker.arm().unwrap_err();
            assert!(matches!(error, TrackerError::Register { slot: 1, on: true, .. }), "{error}");
            assert!(error.to_string().contains("a file on a disk only by uffd-async"), "{error}");
            assert!(matches!(tracker.disarm(), Err(TrackerError::NotArmed)));
        }
        Err(error) => return skip(test, error),
    }
    // It is any memory's page tables that the other one protects.
    let Ok(mut tracker) = UffdAsync::new(machine.slots.clone()) else { return };
    tracker.arm().unwrap();
    guest.write(&[Gfn(0x403)], 1);
    guest.read(&[Gfn(0x404)]);
    let harvest = tracker.harvest().unwrap();
    assert_eq!(frames(&harvest), [Gfn(0x403)]);
    harvest.commit();
    assert!(tracker.harvest().unwrap().is_empty());
}

fn is_tmpfs(path: &std::path::Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: statfs is a plain struct of integers, for which zeros are a value; the call fills it, and both it and
    // the path outlive the call.
    unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        assert_eq!(libc::statfs(path.as_ptr(), &mut found), 0);
        found.f_type == libc::TMPFS_MAGIC
    }
}

#[test]
fn huge_pages_that_writes_have_split_come_back_when_asked_for() {
    use dirty_track::collapse::{Collapsed, collapse};
    let test = "uffd::huge_pages_that_writes_have_split_come_back_when_asked_for";
    let Some(kvm) = kvm(test) else { return };
    for backing in [Backing::Thp, Backing::HugeMemfd] {
        let Some(mut backed) = backing.machine(&kvm, test) else { return };
        let slots = backed.machine.slots.clone();
        let blocks = collapse(&slots);
        if blocks.huge == 0 || blocks.small > 0 {
            skip(test, format_args!("{backing:?}: no huge pages here: {blocks:?}"));
            continue;
        }
        let Ok(mut tracker) = UffdAsync::new(slots.clone()) else {
            return skip(test, "no userfaultfd");
        };
        tracker.arm().unwrap();
        backed.guest.write(&corners(), 1);
        tracker.harvest().unwrap().commit();
        assert_eq!(collapse(&slots).huge, 0, "what is protected stays as it is on {backing:?}");
        tracker.disarm().unwrap();
        assert_eq!(collapse(&slots), Collapsed { huge: blocks.huge, small: 0 }, "on {backing:?}");
        let corners = corners();
        assert!(corners.iter().all(|&gfn| backed.machine.stamp(gfn) == 1), "collapsing keeps the contents");
    }
}

/// Nobody sleeps for good: the guest gets to its end however often it is armed and disarmed meanwhile.
#[test]
fn a_guest_runs_on_through_arming_and_disarming() {
    everywhere("uffd::a_guest_runs_on_through_arming_and_disarming", |backed, tracker, _| {
        let Backed { machine, guest, .. } = backed;
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| (1..=40).for_each(|round| guest.write(&corners(), round)));
            let mut times = 0;
            while !vcpu.is_finished() || times == 0 {
                tracker.arm().unwrap();
                tracker.harvest().unwrap().commit();
                tracker.disarm().unwrap();
                times += 1;
                std::thread::yield_now();
            }
            vcpu.join().unwrap();
        });
        assert!(corners().iter().all(|&gfn| machine.stamp(gfn) == 40));
    });
}

/// Whoever copies what each harvest reports ends with the guest's memory, although the guest writes all the
/// time: during arming, during harvests and during the copying.
#[test]
fn a_copy_converges_to_the_memory_of_a_running_guest() {
    everywhere("uffd::a_copy_converges_to_the_memory_of_a_running_guest", |backed, tracker, _| {
        let pages: Vec<_> = corners().into_iter().chain((0x1100..0x1200).map(Gfn)).collect();
        assert!(pages.len() <= MAX_STORES);
        converge(&backed.machine, &mut backed.guest, tracker, 60, |_| pages.clone());
    });
}
