//! A harvest, and a look at the statistics, allocate nothing: a monitor does both for as long as a guest runs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dirty_track::addr::Gfn;
use dirty_track::rearm::{DenseSkip, Rearm};
use dirty_track::sys::stats::Stats;
use dirty_track::tracker::{Exact, KvmBitmap, KvmManual, KvmRing, Tracker};
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{Machine, Writer, kvm, skip};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, with a count of allocations for each thread.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises about `layout` are the ones that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above; `block` came from `alloc`, so from the system's allocator.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn harvests_with_blocks_left_writable_allocate_nothing() {
    let Some(kvm) = kvm("harvests_with_blocks_left_writable_allocate_nothing") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &[(Gfn(0x200), 1000)]);
    let skip = Rearm::DenseSkip(DenseSkip::new(384, 2).unwrap());
    let mut tracker = KvmManual::new(machine.vm.clone(), machine.slots.clone()).unwrap().with_rearm(skip);
    let hot: Vec<_> = (0x200..0x400).map(Gfn).collect();
    tracker.arm().unwrap();
    for round in 0..8 {
        guest.write(&hot, round);
        let mut coarse = 0;
        let allocations = allocations_of(|| {
            let harvest = tracker.harvest().unwrap();
            coarse = harvest.coarse_runs().map(|run| run.pages).sum();
            harvest.commit();
        });
        assert_eq!((coarse > 500, allocations), (round > 0, 0));
    }
}

#[test]
fn harvests_and_statistics_allocate_nothing() {
    const NAME: &str = "harvests_and_statistics_allocate_nothing";
    let Some(kvm) = kvm(NAME) else { return };
    const SLOTS: [(Gfn, u64); 2] = [(Gfn(0x100), 1000), (Gfn(0x1000), 100)];
    let (machine, mut guest) = Machine::new(&kvm, &SLOTS);
    let mut manual = KvmManual::new(machine.vm.clone(), machine.slots.clone()).unwrap();
    allocate_nothing(&machine, &mut guest, &mut manual);
    manual.disarm().unwrap();
    let mut bitmap = KvmBitmap::new(machine.vm.clone(), machine.slots.clone()).unwrap();
    allocate_nothing(&machine, &mut guest, &mut bitmap);
    bitmap.disarm().unwrap();
    match Exact::new(machine.vm.clone(), machine.slots.clone()) {
        Ok(mut exact) => allocate_nothing(&machine, &mut guest, &mut exact),
        Err(error) => skip(NAME, format_args!("by write-protection: {error}")),
    }
    if let Some((machine, mut guests)) = Machine::with_rings(NAME, &kvm, &SLOTS, 2, 256) {
        let mut ring = KvmRing::new(machine.rings.as_ref().unwrap(), machine.slots.clone()).unwrap();
        allocate_nothing(&machine, &mut guests[0], &mut ring);
    }
    assert_ne!(allocations_of(|| drop(std::hint::black_box(Box::new(1)))), 0, "the count counts");
}

fn allocate_nothing(machine: &Machine, guest: &mut Writer, tracker: &mut dyn Tracker) {
    let mut stats = Stats::of_vm(&machine.vm).unwrap();
    tracker.arm().unwrap();
    for round in 0..3 {
        guest.write(&[Gfn(0x100), Gfn(0x1001), Gfn(0x1002)], round);
        machine.memory.write_obj(1u8, GuestAddress(0x103 << 12)).unwrap();
        let mut reported = 0;
        let allocations = allocations_of(|| {
            stats.refresh().unwrap();
            let harvest = tracker.harvest().unwrap();
            reported = harvest.runs().chain(harvest.host_runs()).map(|run| run.pages).sum();
            assert_eq!(harvest.dirty_blocks(), 2);
            harvest.commit();
        });
        assert_eq!((reported, allocations), (5, 0), "{}", tracker.name());
    }
}
