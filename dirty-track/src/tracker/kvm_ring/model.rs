//! The hand-over of entries between a vCPU, whoever empties its ring, and KVM's reset, under every order of events that
//! the memory model allows (loom tries them all).
//!
//! The code under test is the real one: [`ring::take`] on loom's atomics, and [`Collector`] and [`Ringed`] with rings
//! that a model of KVM fills and resets. The ring has one entry, so that each place is used again and a vCPU that
//! finds it taken empties the ring itself. In the end a copy that was made from harvests alone must be equal to memory.

use std::sync::atomic::Ordering;

use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::sync::{Arc, Mutex};
use loom::thread;
use vmm_sys_util::errno;

use super::collect::{Collector, Ringed, Rings};
use crate::sys::ring::{self, DIRTY, DirtyEntry, RESET, Words};
use crate::tracker::dirty_log::Logging;
use crate::tracker::sim::Layout;
use crate::tracker::{Slot, TrackerError};

const LAYOUT: Layout = Layout { ids: &[5], sizes: &[2] };
const PAGES: usize = LAYOUT.sizes[0];

/// An entry on loom's atomics. With `ACQUIRE` false what the contract needs is left out: then the model must fail.
struct Entry<const ACQUIRE: bool> {
    flags: AtomicU32,
    slot: AtomicU32,
    page: AtomicU64,
}

impl<const ACQUIRE: bool> Words for Entry<ACQUIRE> {
    fn flags(&self, order: Ordering) -> u32 {
        self.flags.load(if ACQUIRE { order } else { Ordering::Relaxed })
    }

    fn set_flags(&self, flags: u32, order: Ordering) {
        self.flags.store(flags, order);
    }

    fn slot(&self) -> u32 {
        self.slot.load(Ordering::Relaxed)
    }

    fn page(&self) -> u64 {
        self.page.load(Ordering::Relaxed)
    }
}

/// KVM and the guest's memory. With `PROTECT` false a reset gives places back and protects nothing.
struct Kvm<const ACQUIRE: bool, const PROTECT: bool> {
    entry: Entry<ACQUIRE>,
    /// Which pages can be written without a fault. Its lock is KVM's MMU lock, and the flush of the TLBs.
    writable: Mutex<[bool; PAGES]>,
    contents: [AtomicU64; PAGES],
}

impl<const ACQUIRE: bool, const PROTECT: bool> Kvm<ACQUIRE, PROTECT> {
    /// A vCPU writes. False: its ring is full, and it has to come out of the guest.
    fn write(&self, page: usize, value: u64) -> bool {
        let mut writable = self.writable.lock().unwrap();
        if !writable[page] {
            if self.entry.flags.load(Ordering::Acquire) != 0 {
                return false;
            }
            // As `kvm_dirty_ring_push`.
            self.entry.slot.store(LAYOUT.ids[0], Ordering::Relaxed);
            self.entry.page.store(page as u64, Ordering::Relaxed);
            self.entry.flags.store(DIRTY, Ordering::Release);
            writable[page] = true;
        }
        self.contents[page].store(value, Ordering::Relaxed);
        true
    }
}

/// What user space sees of it.
struct Model<const ACQUIRE: bool, const PROTECT: bool>(Arc<Kvm<ACQUIRE, PROTECT>>);

impl<const ACQUIRE: bool, const PROTECT: bool> Rings for Model<ACQUIRE, PROTECT> {
    fn vcpus(&self) -> usize {
        1
    }

    fn entries(&self) -> u32 {
        1
    }

    fn holds(&self, _: usize, _: u32) -> bool {
        ring::is_dirty(&self.0.entry)
    }

    fn take(&mut self, _: usize) -> Option<DirtyEntry> {
        ring::take(&self.0.entry)
    }

    /// As `kvm_dirty_ring_reset`: a place is given back first, its page is protected afterwards.
    fn reset(&mut self) -> Result<u32, errno::Error> {
        let entry = &self.0.entry;
        if entry.flags.load(Ordering::Acquire) & RESET == 0 {
            return Ok(0);
        }
        let page = entry.page.load(Ordering::Relaxed) as usize;
        entry.flags.store(0, Ordering::Release);
        self.0.writable.lock().unwrap()[page] &= !PROTECT;
        Ok(1)
    }
}

#[derive(Debug)]
struct AlwaysOn;

impl Logging for AlwaysOn {
    fn prepare(&mut self) -> Result<(), errno::Error> {
        Ok(())
    }

    fn set_logging(&mut self, _: &Slot, _: bool) -> Result<(), errno::Error> {
        Ok(())
    }
}

/// A thread with room for frames that were not optimized: loom's own have less.
fn spawn(run: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    thread::Builder::new().stack_size(1 << 16).spawn(run).expect("loom always has a thread")
}

/// A vCPU writes both pages, and one of them again, while a harvester harvests.
fn race<const ACQUIRE: bool, const PROTECT: bool>() {
    loom::model(|| spawn(model::<ACQUIRE, PROTECT>).join().unwrap());
}

fn model<const ACQUIRE: bool, const PROTECT: bool>() {
    let kvm = Arc::new(Kvm::<ACQUIRE, PROTECT> {
        entry: Entry { flags: AtomicU32::new(0), slot: AtomicU32::new(0), page: AtomicU64::new(0) },
        writable: Mutex::new([false; PAGES]),
        contents: std::array::from_fn(|_| AtomicU64::new(0)),
    });
    let mut collector = Collector::new(Model(Arc::clone(&kvm)));
    let mut tracker = Ringed::new(AlwaysOn, LAYOUT.slots());
    tracker.arm(&mut collector).unwrap();
    let collector = Arc::new(Mutex::new(collector));
    let vcpu = {
        let (kvm, collector) = (Arc::clone(&kvm), Arc::clone(&collector));
        spawn(move || {
            for (page, value) in [(1, 1), (0, 2), (1, 3)] {
                if !kvm.write(page, value) {
                    collector.lock().unwrap().serve_full(0).unwrap();
                    assert!(kvm.write(page, value), "a vCPU was served and cannot go on");
                }
            }
        })
    };
    let mut copy = [0; PAGES];
    let mut harvest = || -> Result<(), TrackerError> {
        tracker.collect(&mut collector.lock().unwrap())?;
        let harvest = tracker.hand_out();
        for (_, page) in LAYOUT.pages(harvest.runs()) {
            copy[page] = kvm.contents[page].load(Ordering::Relaxed);
        }
        harvest.commit();
        Ok(())
    };
    harvest().unwrap();
    vcpu.join().unwrap();
    harvest().unwrap();
    let memory = std::array::from_fn(|page| kvm.contents[page].load(Ordering::Relaxed));
    assert_eq!(copy, memory, "a write was lost");
    tracker.disarm(&mut collector.lock().unwrap()).unwrap();
}

#[test]
fn loom_entries_are_handed_over() {
    race::<true, true>();
}

#[test]
#[should_panic(expected = "a write was lost")]
fn loom_finds_out_when_an_entry_is_read_before_its_flag() {
    race::<false, true>();
}

#[test]
#[should_panic(expected = "a write was lost")]
fn loom_finds_out_when_pages_are_handed_out_unprotected() {
    race::<true, false>();
}
