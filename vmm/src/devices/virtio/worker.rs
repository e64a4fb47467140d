//! The queue side of a device: takes requests from the queues, hands them to the device, gives the results
//! back, tells the driver. Runs on the device loop.
//!
//! A wake-up serves everything that is available before it looks at anything else, with the driver's
//! notifications off meanwhile, and ends in at most one interrupt per pass. So a burst of requests costs the
//! guest one exit to start it and one interrupt to end it, and the monitor one `epoll_wait`, the file I/O and
//! one `write` to the irqfd. Queue eventfds are watched edge-triggered, so they need not be read.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{BrokenChain, Chain, GuestRam, VirtioDevice};

/// Passes over a queue in one wake-up before other devices of the loop get their turn.
const MAX_PASSES: usize = 8;

/// What the registers, the worker and whoever pauses the device share.
pub(super) struct Shared {
    /// One eventfd per queue: the driver has something for us. Signalled by KVM, by the QueueNotify register,
    /// and by ourselves.
    pub(super) kicks: Vec<EventFd>,
    irq: EventFd,
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    /// Non-zero: somebody waits for the mutex or has paused the device; take no further request.
    holds: AtomicU32,
    core: Mutex<Core>,
}

/// What only the holder of the mutex touches.
struct Core {
    mem: GuestRam,
    device: Box<dyn VirtioDevice>,
    /// Queues in service, by number. Empty while the device is not active.
    queues: Vec<Option<Queue>>,
    /// Whether a broken queue has been reported on stderr.
    complained: bool,
}

impl Shared {
    pub(super) fn new(
        mem: GuestRam,
        device: Box<dyn VirtioDevice>,
        irq: EventFd,
        kicks: Vec<EventFd>,
    ) -> Shared {
        Shared {
            kicks,
            irq,
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            holds: AtomicU32::new(0),
            core: Mutex::new(Core { mem, device, queues: Vec::new(), complained: false }),
        }
    }

    /// A panic under this lock leaves nothing half-done that the next holder could not deal with: queues are
    /// validated on every access.
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the request in service, if there is one, keeps further ones from being taken, and runs `f`.
    fn hold<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        self.holds.fetch_add(1, Ordering::SeqCst);
        let result = f(&mut self.core());
        self.holds.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Puts queues into service. `queues` has an entry for each queue of the device, `None` for unused ones.
    pub(super) fn activate(
        &self,
        queues: impl FnOnce(&GuestRam) -> Result<Vec<Option<Queue>>, BrokenChain>,
        features: u64,
    ) {
        self.hold(|core| match queues(&core.mem) {
            Ok(queues) => {
                core.device.activate(features);
                core.queues = queues;
            }
            Err(broken) => self.fail(core, broken),
        });
        self.kick_all();
    }

    /// Where the device is in the available and the used ring of each queue that it serves.
    pub(super) fn positions(&self) -> Vec<Option<(u16, u16)>> {
        let core = self.core();
        core.queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| (queue.next_avail(), queue.next_used())))
            .collect()
    }

    /// Goes on from where a device with the same registers was. What the driver has been told may be told again.
    #[allow(clippy::type_complexity)]
    pub(super) fn restore(
        &self,
        active: Option<(impl FnOnce(&GuestRam) -> Result<Vec<Option<Queue>>, BrokenChain>, u64)>,
        needs_reset: bool,
        interrupt_status: u32,
    ) -> Result<(), BrokenChain> {
        self.hold(|core| -> Result<(), BrokenChain> {
            if let Some((queues, features)) = active {
                core.queues = queues(&core.mem)?;
                core.device.activate(features);
            }
            self.needs_reset.store(needs_reset, Ordering::SeqCst);
            self.interrupt_status.store(interrupt_status, Ordering::SeqCst);
            Ok(())
        })?;
        // A notification may have been under way to the device, and an interrupt to the driver.
        if interrupt_status != 0 {
            signal(&self.irq);
        }
        self.kick_all();
        Ok(())
    }

    /// Takes all queues out of service. When this returns no request is in flight and none will be taken.
    pub(super) fn stop(&self) {
        self.hold(|core| core.queues.clear());
    }

    /// [`Self::stop`], and back to the state before the driver came.
    pub(super) fn reset(&self) {
        self.hold(|core| {
            core.queues.clear();
            self.needs_reset.store(false, Ordering::SeqCst);
            self.interrupt_status.store(0, Ordering::SeqCst);
        });
    }

    /// Takes one queue out of service.
    pub(super) fn disable_queue(&self, index: usize) {
        self.hold(|core| {
            if let Some(queue) = core.queues.get_mut(index) {
                *queue = None;
            }
        });
        // Another queue may have been interrupted by the hold.
        self.kick_all();
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge_interrupt(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn kick(&self, queue: usize) {
        if let Some(event) = self.kicks.get(queue) {
            signal(event);
        }
    }

    fn kick_all(&self) {
        self.kicks.iter().for_each(signal);
    }

    fn interrupt(&self, reason: u32) {
        self.interrupt_status.fetch_or(reason, Ordering::SeqCst);
        signal(&self.irq);
    }

    /// Takes all queues out of service and shows the driver that only a reset helps.
    fn fail(&self, core: &mut Core, broken: BrokenChain) {
        core.queues.clear();
        self.needs_reset.store(true, Ordering::SeqCst);
        // Once per device: a guest may do this as often as it likes.
        if !core.complained {
            core.complained = true;
            eprintln!(
                "vmm: virtio device {}: {broken}; it stops until its driver resets it",
                core.device.id()
            );
        }
        // The used ring may hold results that no interrupt has announced yet.
        self.interrupt(VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING);
    }

    /// Serves queue number `index` until it is empty, held, or has had its turn.
    pub(super) fn serve(&self, index: usize) {
        let mut core = self.core();
        let Core { mem, device, queues, .. } = &mut *core;
        let Some(Some(queue)) = queues.get_mut(index) else { return };
        match self.drain(mem, device.as_mut(), queue, index) {
            Ok(Drained::Empty | Drained::Held) => {}
            Ok(Drained::TurnOver) => self.kick(index),
            Err(broken) => self.fail(&mut core, broken),
        }
    }

    fn drain(
        &self,
        mem: &GuestRam,
        device: &mut dyn VirtioDevice,
        queue: &mut Queue,
        index: usize,
    ) -> Result<Drained, BrokenChain> {
        for _ in 0..MAX_PASSES {
            queue.disable_notification(mem).map_err(|_| RING_UNREACHABLE)?;
            let mut served = 0;
            let mut held = self.held();
            // More requests than this in one pass means that the driver adds while we serve: it must hear of
            // the first ones at some time.
            while !held && served < queue.size() {
                let Some(descriptors) = next_chain(queue, mem)? else { break };
                let head = descriptors.head_index();
                let chain = Chain::map(mem, descriptors, queue.size())?;
                let written = device.handle(index, chain)?;
                queue.add_used(mem, head, written).map_err(|_| RING_UNREACHABLE)?;
                served += 1;
                held = self.held();
            }
            if served > 0 && wants_interrupt(queue, mem)? {
                self.interrupt(VIRTIO_MMIO_INT_VRING);
            }
            if held {
                // Whoever lets go kicks the queues, so notifications can stay off.
                return Ok(Drained::Held);
            }
            if !queue.enable_notification(mem).map_err(|_| RING_UNREACHABLE)? {
                return Ok(Drained::Empty);
            }
        }
        Ok(Drained::TurnOver)
    }

    fn held(&self) -> bool {
        self.holds.load(Ordering::SeqCst) != 0
    }
}

enum Drained {
    Empty,
    Held,
    TurnOver,
}

const RING_UNREACHABLE: BrokenChain = BrokenChain("a ring cannot be accessed");

/// The next available chain, `None` if there is none.
fn next_chain<'m>(
    queue: &mut Queue,
    mem: &'m GuestRam,
) -> Result<Option<DescriptorChain<&'m GuestRam>>, BrokenChain> {
    let available = queue.avail_idx(mem, Ordering::Acquire).map_err(|_| RING_UNREACHABLE)?.0;
    if available == queue.next_avail() {
        return Ok(None);
    }
    let mut chains = queue
        .iter(mem)
        .map_err(|_| BrokenChain("the available index is further ahead than the queue is long"))?;
    chains.next().map(Some).ok_or(RING_UNREACHABLE)
}

/// Whether the driver asked to be told about what has been added to the used ring since the last call.
fn wants_interrupt(queue: &mut Queue, mem: &GuestRam) -> Result<bool, BrokenChain> {
    if queue.event_idx_enabled() {
        return queue.needs_notification(mem).map_err(|_| RING_UNREACHABLE);
    }
    // The flag must be read after the used index has become visible (virtio 1.2, section 2.7.7.2).
    fence(Ordering::SeqCst);
    let flags: u16 =
        mem.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_err(|_| RING_UNREACHABLE)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Adding 1 to an eventfd fails only when its counter is full: then it is signalled as much as it can be.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

/// Serves a device's queues; to be added to the device loop's event manager.
pub struct QueueWorker(pub(super) Arc<Shared>);

impl MutEventSubscriber for QueueWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, kick) in (0..).zip(&self.0.kicks) {
            let events = Events::with_data(kick, index, EventSet::IN | EventSet::EDGE_TRIGGERED);
            if let Err(error) = ops.add(events) {
                eprintln!("vmm: virtio: cannot watch queue {index}, it will not be served: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        self.0.serve(events.data() as usize);
    }
}

/// A way to a device for those who are not its guest.
#[derive(Clone)]
pub struct DeviceHandle(pub(super) Arc<Shared>);

impl DeviceHandle {
    /// Waits until no request is in flight and keeps the device from taking another until the returned guard
    /// is dropped. While it is held, the device writes neither guest memory nor its disk, and the queues in
    /// guest memory tell all that there is to know about its requests. Pauses may overlap. Waits for at most
    /// one request; safe on any thread, but not from within a device.
    pub fn pause(&self) -> Paused {
        self.0.holds.fetch_add(1, Ordering::SeqCst);
        drop(self.0.core());
        Paused(Arc::clone(&self.0))
    }
}

/// A device that is paused; it goes on when this is dropped.
#[must_use = "the device goes on as soon as this is dropped"]
pub struct Paused(Arc<Shared>);

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.holds.fetch_sub(1, Ordering::SeqCst);
        // Notifications may have come and gone unheeded.
        self.0.kick_all();
    }
}

#[cfg(test)]
mod tests {
    use std::hint::spin_loop;
    use std::thread;

    use event_manager::{EventManager, SubscriberOps};
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS};

    use super::super::rng::Rng;
    use super::super::testing::*;
    use super::*;

    /// Runs `test` against a device whose worker is on a loop in another thread.
    fn with_loop(test: impl FnOnce(&mut Driver)) {
        let mut driver = Driver::running(Rng, 1 << 29);
        let worker = QueueWorker(Arc::clone(&driver.worker.0));
        let stop = Arc::new(AtomicBool::new(false));
        let device_loop = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut manager = EventManager::new().unwrap();
                manager.add_subscriber(worker);
                while !stop.load(Ordering::SeqCst) {
                    manager.run_with_timeout(10).unwrap();
                }
            })
        };
        test(&mut driver);
        stop.store(true, Ordering::SeqCst);
        device_loop.join().unwrap();
    }

    fn wait_for(driver: &mut Driver, requests: usize) {
        let mut done = 0;
        while done < requests {
            done += driver.used().len();
            spin_loop();
        }
    }

    #[test]
    fn every_notification_is_heeded() {
        with_loop(|driver| {
            for i in 0..20_000 {
                for _ in 0..i % 3 + 1 {
                    driver.submit(&[(DATA, 64, true)]);
                }
                // As a driver with EVENT_IDX does: notify only if the device asks for it.
                let asked: u16 = driver.load(USED + 4 + 8 * 16);
                if driver.offered().wrapping_sub(asked).wrapping_sub(1) < i % 3 + 1 {
                    driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
                }
                wait_for(driver, usize::from(i % 3 + 1));
            }
        });
    }

    #[test]
    fn after_a_reset_or_during_a_pause_memory_is_left_alone() {
        with_loop(|driver| {
            for i in 0..2_000 {
                for _ in 0..8 {
                    driver.submit(&[(DATA, 4096, true)]);
                }
                driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
                for _ in 0..i % 50 * 20 {
                    spin_loop();
                }
                let paused = if i % 2 == 0 {
                    driver.set(VIRTIO_MMIO_STATUS, 0);
                    assert_eq!(driver.status(), 0);
                    None
                } else {
                    Some(driver.device.handle().pause())
                };
                let before = driver.bytes(0, RAM as usize);
                driver.put(DATA, &[0; 4096]);
                thread::yield_now();
                assert_eq!(driver.bytes(DATA, 4096), [0; 4096]);
                driver.put(DATA, &before[DATA as usize..DATA as usize + 4096]);
                assert!(driver.bytes(0, RAM as usize) == before);
                drop(paused);
                if i % 2 == 0 {
                    driver.start(1 << 29);
                } else {
                    let done = driver.used().len();
                    wait_for(driver, 8 - done);
                }
            }
        });
    }
}
