//! `kvm-ring`: KVM's dirty rings (KVM_CAP_DIRTY_LOG_RING), one for each vCPU.
//!
//! A vCPU that writes a page for the first time puts (slot, page) into its own ring. Reading the rings costs in
//! proportion to what was written and not to the guest's size, and it tells **which vCPU** wrote a page. The
//! price is that a ring can fill up: the vCPU then leaves the guest (KVM_EXIT_DIRTY_RING_FULL) and cannot go on
//! before somebody has emptied it.
//!
//! # Who empties the rings
//! [`DirtyRings`] is made before the first vCPU and has all rings of a VM. Three parties read them, one at a
//! time, behind a mutex that no vCPU takes unless its ring is full: a harvest; the tracker's **reaper**, a thread
//! that looks at each ring now and then and empties those that are filling; and the vCPU's own thread through
//! its [`RingHandle`] when it came out because of a full ring.
//!
//! # Order
//! An entry that was read is noted first and marked as read then; KVM_RESET_DIRTY_RINGS protects the pages of
//! such entries again. A harvest reads all rings, resets, and hands the pages out *only when every entry that was
//! ever read has been reset*: contents that are copied from then on are newest, or their page gets a new entry.
//! A reset that fails keeps everything for the next attempt. So does one that KVM cuts short, which it does when a
//! signal is pending, since Linux 6.17; but then KVM forgets to protect the last up to 64 pages whose entries it
//! has given back. So signals wait while it resets. What cuts it short all the same (a freezer, a debugger) puts
//! the pages in question into every harvest from then on, as coarse ones, until the tracker is armed anew.
//! What is in the ring of a vCPU that has died is read like any other, because the mapping keeps the
//! ring alive.
//!
//! # What to know
//! - Hardware that logs by itself (PML) keeps up to 512 pages of a *running* vCPU until it leaves the guest for
//!   whatever reason. They are in a later harvest, then; nothing is lost. After a pause of all vCPUs a harvest is
//!   complete.
//! - A VM with rings has no dirty bitmaps: the trackers `kvm-bitmap` and `kvm-manual` cannot be armed.
//! - **kvm_pvm** (and any KVM that emulates long stretches of guest code in one go) writes more pages between two
//!   looks at the ring than the ring keeps in reserve, if the guest writes at CPL0. Entries are overwritten, and
//!   the vCPU hangs. There a ring is for guests that write at CPL3 only; nothing in the ring tells that it
//!   happened.
//!
//! Sources: Linux, Documentation/virt/kvm/api.rst (KVM_CAP_DIRTY_LOG_RING), virt/kvm/dirty_ring.c and
//! virt/kvm/kvm_main.c (`mark_page_dirty_in_slot`, `kvm_vm_ioctl_reset_dirty_pages`).

mod collect;

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;

use crate::sys::ring::{self, DirtyEntry, Ring};
use crate::tracker::dirty_log::KvmLog;
use crate::tracker::{Backing, Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};
use collect::{Collector, Ringed, Rings, lock};

const NAME: &str = Kind::KvmRing.name();

/// Exit reason of a vCPU whose ring is full; kvm-ioctls reports it as `VcpuExit::Unsupported`.
pub const FULL_EXIT: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// The dirty rings of a VM. They outlive trackers: a vCPU's ring is there, and may be full, whoever tracks.
#[derive(Clone, Debug)]
pub struct DirtyRings {
    vm: Arc<VmFd>,
    entries: u32,
    collector: Arc<Mutex<Collector<KvmRings>>>,
}

impl DirtyRings {
    /// Gives each vCPU that will be made in `vm` a dirty ring of `entries`, a power of two. A vCPU leaves the
    /// guest when all but some 64 of them (576 with PML) are in use; 4096 to 65536 are sensible sizes.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] before Linux 5.11, [`TrackerError::RingSize`], and [`TrackerError::Enable`]
    /// with `EINVAL` when a vCPU exists already or the host wants a larger ring.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<DirtyRings, TrackerError> {
        let (min, max) = (ring::MIN_ENTRIES, ring::max_entries(&vm));
        if max == 0 {
            return Err(TrackerError::Unsupported { capability: ring::DIRTY_RING, tracker: NAME });
        }
        if !entries.is_power_of_two() || !(min..=max).contains(&entries) {
            return Err(TrackerError::RingSize { asked: entries, min, max });
        }
        ring::enable(&vm, entries)
            .map_err(|source| TrackerError::Enable { capability: ring::DIRTY_RING, source })?;
        let rings = KvmRings { vm: Arc::clone(&vm), rings: Vec::new(), entries };
        Ok(DirtyRings { vm, entries, collector: Arc::new(Mutex::new(Collector::new(rings))) })
    }

    /// Adds the ring of `vcpu`, which was made in this VM. Its number, by which harvests know it, is the count of
    /// those added before. Add each vCPU once, and before it runs.
    ///
    /// # Errors
    /// [`TrackerError::MapRing`].
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<RingHandle, TrackerError> {
        let mut collector = lock(&self.collector);
        let number = collector.rings.rings.len();
        let ring =
            Ring::map(vcpu, self.entries).map_err(|source| TrackerError::MapRing { vcpu: number, source })?;
        collector.rings.rings.push(ring);
        collector.vcpu_added();
        Ok(RingHandle { collector: Arc::clone(&self.collector), vcpu: number })
    }

    /// Entries that each ring has room for.
    pub fn entries(&self) -> u32 {
        self.entries
    }
}

/// What a vCPU's thread needs when the vCPU's ring is full.
#[derive(Clone, Debug)]
pub struct RingHandle {
    collector: Arc<Mutex<Collector<KvmRings>>>,
    vcpu: usize,
}

impl RingHandle {
    /// Makes room in the vCPU's ring, after it left the guest with [`FULL_EXIT`]. Then it can be run again.
    ///
    /// # Errors
    /// [`TrackerError::ResetRings`]: the vCPU cannot go on. What was in its ring is not lost.
    pub fn serve_full(&self) -> Result<(), TrackerError> {
        lock(&self.collector).serve_full(self.vcpu)
    }

    /// Number of the vCPU, as harvests know it.
    pub fn vcpu(&self) -> usize {
        self.vcpu
    }
}

/// The tracker; see the [module](self).
#[derive(Debug)]
pub struct KvmRing {
    with_reaper: bool,
    reaper: Option<Reaper>,
    ringed: Ringed<KvmLog>,
    rings: DirtyRings,
}

impl KvmRing {
    /// A tracker of `slots`, which are registered in the VM of `rings`. It is not armed yet. Of several trackers
    /// on the same rings one can be armed at a time.
    ///
    /// The tracker owns the KVM_MEM_LOG_DIRTY_PAGES flag of the slots for as long as it lives. Entries of other
    /// slots are dropped.
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`].
    pub fn new(rings: &DirtyRings, slots: Vec<Slot>) -> Result<KvmRing, TrackerError> {
        let slots = Slot::sorted(slots)?;
        // Manual mode with INITIALLY_SET relies on a bitmap that a VM with rings does not have: it would leave
        // every page writable and unreported.
        let log = KvmLog::new(&rings.vm, 0);
        Ok(KvmRing { with_reaper: true, reaper: None, ringed: Ringed::new(log, slots), rings: rings.clone() })
    }

    /// The same tracker without its reaper: rings are emptied by harvests, and by vCPUs that have to wait for it
    /// themselves. For guests that write less between two harvests than a ring holds; it spares them a thread.
    pub fn without_reaper(mut self) -> KvmRing {
        self.with_reaper = false;
        self
    }
}

impl Tracker for KvmRing {
    fn name(&self) -> &'static str {
        NAME
    }

    fn guarantees(&self) -> Guarantees {
        Kind::KvmRing.guarantees(Backing::Private)
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.ringed.is_armed() {
            return Err(TrackerError::AlreadyArmed);
        }
        let reaper = if self.with_reaper { Some(Reaper::start(&self.rings)?) } else { None };
        // A reaper that is not needed after all is waited for without the lock, which it may be waiting for.
        let outcome = self.ringed.arm(&mut lock(&self.rings.collector));
        outcome?;
        self.reaper = reaper;
        Ok(())
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        self.ringed.collect(&mut lock(&self.rings.collector))?;
        Ok(self.ringed.hand_out())
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.ringed.set_slots(&mut lock(&self.rings.collector), Slot::sorted(slots)?)
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.ringed.disarm(&mut lock(&self.rings.collector))?;
        self.reaper = None;
        Ok(())
    }
}

impl Drop for KvmRing {
    fn drop(&mut self) {
        self.ringed.abandon(&mut lock(&self.rings.collector));
    }
}

/// KVM's own.
#[derive(Debug)]
struct KvmRings {
    vm: Arc<VmFd>,
    rings: Vec<Ring>,
    entries: u32,
}

impl Rings for KvmRings {
    fn vcpus(&self) -> usize {
        self.rings.len()
    }

    fn entries(&self) -> u32 {
        self.entries
    }

    fn holds(&self, vcpu: usize, entries: u32) -> bool {
        self.rings[vcpu].holds(entries)
    }

    fn take(&mut self, vcpu: usize) -> Option<DirtyEntry> {
        self.rings[vcpu].take()
    }

    fn reset(&mut self) -> Result<u32, errno::Error> {
        ring::reset(&self.vm)
    }
}

/// The thread that empties rings before they are full. Without it nothing is lost, but vCPUs come out of the
/// guest for it more often.
#[derive(Debug)]
struct Reaper {
    /// Dropped to have the thread end.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    fn start(rings: &DirtyRings) -> Result<Reaper, TrackerError> {
        /// A first write to a page costs the guest this at least, wherever it faults.
        const FAULT: Duration = Duration::from_micros(1);
        // As long as it takes a ring to fill, within reason: a look costs next to nothing, waking up does not.
        let pause = (FAULT * collect::filling(rings.entries))
            .clamp(Duration::from_millis(1), Duration::from_millis(20));
        let collector = Arc::clone(&rings.collector);
        let (stop, stopped) = mpsc::channel();
        let body = move || {
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                // A reset that fails is tried again by whoever comes next, and told by a harvest.
                let _ = lock(&collector).relieve();
            }
        };
        let thread = thread::Builder::new()
            .name("reaper".into())
            .spawn(body)
            .map_err(|source| TrackerError::Thread { source })?;
        Ok(Reaper { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, it has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
