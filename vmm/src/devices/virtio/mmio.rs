//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2.2): the registers of one device.
//!
//! The transport keeps what the driver writes and judges it at two moments: FEATURES_OK, when the feature
//! set must be acceptable, and DRIVER_OK, when every queue that was made ready must be well-formed and lie in
//! RAM. A driver that fails the second gets DEVICE_NEEDS_RESET. What the specification forbids a driver to do
//! (accesses of another width than 32 bits, clearing status bits, changing a queue in use) is ignored; a
//! forbidden read gives 0.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::Shared;
use super::{BrokenChain, DeviceHandle, GuestRam, QueueWorker, VirtioDevice};
use crate::state::device::{QueueState, TransportState};

/// Offset of the QueueNotify register, for the ioeventfds: a 32-bit write of a queue's number there is what
/// [`MmioTransport::queue_events`] of that number is to be signalled by.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// The specification leaves it open; drivers only show it.
const VENDOR: u32 = u32::from_le_bytes(*b"dtvm");

/// Features that are the transport's and the ring's, offered by every device.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Status bits that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What can keep a device from being made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No eventfd for a queue.
    #[error("cannot create an eventfd for a virtio queue: {0}; raise the limit of open files (ulimit -n)")]
    EventFd(#[source] std::io::Error),
}

/// The registers of one device.
pub struct MmioTransport {
    shared: Arc<Shared>,
    device_id: u32,
    device_features: u64,
    config: Vec<u8>,
    /// As the driver set it, without NEEDS_RESET, which is the worker's to set.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// What the driver wrote about one queue.
#[derive(Clone, Copy)]
struct QueueRegisters {
    max: u16,
    num: u32,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> QueueRegisters {
        QueueRegisters { max, num: u32::from(max), ready: false, desc: 0, driver: 0, device: 0 }
    }

    fn build(&self, mem: &GuestRam, event_idx: bool) -> Result<Queue, BrokenChain> {
        const BAD_SIZE: BrokenChain = BrokenChain("a queue's size is not a power of two within its maximum");
        const BAD_ALIGNMENT: BrokenChain = BrokenChain("an address of a queue is not aligned");
        let mut queue = Queue::new(self.max).map_err(|_| BAD_SIZE)?;
        let num = u16::try_from(self.num).map_err(|_| BAD_SIZE)?;
        queue.try_set_size(num).map_err(|_| BAD_SIZE)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc)).map_err(|_| BAD_ALIGNMENT)?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).map_err(|_| BAD_ALIGNMENT)?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).map_err(|_| BAD_ALIGNMENT)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(mem) {
            return Err(BrokenChain("a queue does not lie in RAM"));
        }
        Ok(queue)
    }
}

impl MmioTransport {
    /// Makes the two halves of a device that works on `mem`: its registers, for the MMIO bus, and its
    /// worker, for the device loop. `irq` is what interrupts the guest (an irqfd, edge-triggered); it should
    /// be non-blocking.
    ///
    /// # Errors
    /// [`TransportError::EventFd`] when the process is out of file descriptors.
    pub fn new(
        mem: GuestRam,
        device: Box<dyn VirtioDevice>,
        irq: EventFd,
    ) -> Result<(MmioTransport, QueueWorker), TransportError> {
        let queues: Vec<_> = device.queue_sizes().iter().map(|&max| QueueRegisters::new(max)).collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()
            .map_err(TransportError::EventFd)?;
        let device_id = device.id();
        let device_features = device.features() | RING_FEATURES;
        let config = device.config().to_vec();
        let shared = Arc::new(Shared::new(mem, device, irq, kicks));
        let transport = MmioTransport {
            shared: Arc::clone(&shared),
            device_id,
            device_features,
            config,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
        };
        Ok((transport, QueueWorker(shared)))
    }

    /// The eventfds that notify the device, by queue number. Signalling one is the same as writing its number
    /// to QueueNotify.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    /// A handle to pause the device with.
    pub fn handle(&self) -> DeviceHandle {
        DeviceHandle(Arc::clone(&self.shared))
    }

    /// The state of the device, which is [paused](DeviceHandle::pause), and whose registers nobody writes.
    pub fn state(&self) -> TransportState {
        let at = self.shared.positions();
        let queue = |(index, queue): (usize, &QueueRegisters)| QueueState {
            num: queue.num,
            ready: queue.ready,
            desc: queue.desc,
            driver: queue.driver,
            device: queue.device,
            at: at.get(index).copied().flatten(),
        };
        TransportState {
            device_id: self.device_id,
            device_features: self.device_features,
            driver_features: self.driver_features,
            status: self.status,
            needs_reset: self.shared.needs_reset(),
            interrupt_status: self.shared.interrupt_status(),
            features_sel: (self.device_features_sel, self.driver_features_sel),
            queue_sel: self.queue_sel,
            queues: self.queues.iter().enumerate().map(queue).collect(),
        }
    }

    /// Makes a device that no driver has come to yet one with this state. What the device is must be the same.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), &'static str> {
        if state.device_id != self.device_id {
            return Err("it is of another kind");
        }
        if state.driver_features & !self.device_features != 0 {
            return Err("its driver uses features that the device does not have here");
        }
        if state.queues.len() != self.queues.len() {
            return Err("it has another number of queues");
        }
        self.driver_features = state.driver_features;
        self.status = state.status & DRIVER_STATUS;
        (self.device_features_sel, self.driver_features_sel) = state.features_sel;
        self.queue_sel = state.queue_sel;
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            let &QueueState { num, ready, desc, driver, device, .. } = state;
            *queue = QueueRegisters { num, ready, desc, driver, device, ..*queue };
        }
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        // A queue without a position is not served: the driver has not come so far, or the device waits for a reset.
        let build = |mem: &GuestRam| {
            let queues = self.queues.iter().zip(&state.queues);
            let one = |(queue, state): (&QueueRegisters, &QueueState)| -> Result<Option<Queue>, BrokenChain> {
                let Some((avail, used)) = state.at else { return Ok(None) };
                let mut queue = queue.build(mem, event_idx)?;
                queue.set_next_avail(avail);
                queue.set_next_used(used);
                Ok(Some(queue))
            };
            queues.map(one).collect()
        };
        let served = state.queues.iter().any(|queue| queue.at.is_some());
        let active = served.then_some((build, self.driver_features));
        self.shared.restore(active, state.needs_reset, state.interrupt_status).map_err(|broken| broken.0)
    }

    /// The guest reads `data.len()` bytes at `offset` into the register block.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let rest = usize::try_from(start).ok().and_then(|start| self.config.get(start..));
            for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
                *to = *from;
            }
        } else if let (Ok(data), Ok(offset)) = (<&mut [u8; 4]>::try_from(data), u32::try_from(offset)) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// The guest writes `data` at `offset` into the register block.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // No configuration field of these devices can be written: all that lies at or after it is ignored.
        if let (Ok(data), Ok(offset)) = (<[u8; 4]>::try_from(data), u32::try_from(offset)) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device_features as u32,
                1 => (self.device_features >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| u32::from(queue.max)),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt_status(),
            VIRTIO_MMIO_STATUS => {
                self.status | if self.shared.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
            }
            // There are no shared memory regions; a length of all ones says so.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes, so neither does its generation.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM => self.configure_queue(|queue| queue.num = value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.configure_queue(|queue| set_low(&mut queue.desc, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.configure_queue(|queue| set_high(&mut queue.desc, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.configure_queue(|queue| set_low(&mut queue.driver, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.configure_queue(|queue| set_high(&mut queue.driver, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.configure_queue(|queue| set_low(&mut queue.device, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.configure_queue(|queue| set_high(&mut queue.device, value)),
            VIRTIO_MMIO_QUEUE_READY => match value {
                0 => self.disable_queue(),
                1 => self.configure_queue(|queue| queue.ready = true),
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_NOTIFY => self.shared.kick(value as usize),
            VIRTIO_MMIO_INTERRUPT_ACK => self.shared.acknowledge_interrupt(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => {}
        }
    }

    fn has_status(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn set_driver_features(&mut self, value: u32) {
        if !self.has_status(VIRTIO_CONFIG_S_DRIVER) || self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    /// Changes the selected queue, if it exists and this is the time: between FEATURES_OK and DRIVER_OK, and
    /// before the queue was made ready.
    fn configure_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if !self.has_status(VIRTIO_CONFIG_S_FEATURES_OK)
            || self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED) != 0
        {
            return;
        }
        match self.queues.get_mut(self.queue_sel as usize) {
            Some(queue) if !queue.ready => change(queue),
            _ => {}
        }
    }

    /// Stopping a queue is allowed at any time, in use or not; when this returns it is not served any more.
    fn disable_queue(&mut self) {
        let index = self.queue_sel as usize;
        if let Some(queue) = self.queues.get_mut(index)
            && queue.ready
        {
            queue.ready = false;
            self.shared.disable_queue(index);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & DRIVER_STATUS;
        if value & self.status != self.status || self.has_status(VIRTIO_CONFIG_S_FAILED) {
            return;
        }
        let new = value & !self.status;
        if new & VIRTIO_CONFIG_S_FAILED != 0 {
            // The driver has given up; so do we, until it resets us.
            self.status |= VIRTIO_CONFIG_S_FAILED;
            return self.shared.stop();
        }
        // One step at a time, each only after the one before, also when one write makes several.
        if new & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if new & VIRTIO_CONFIG_S_DRIVER != 0 && self.has_status(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            self.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.has_status(VIRTIO_CONFIG_S_DRIVER)
            && self.features_acceptable()
        {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.activate();
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = &self.queues;
        let build = |mem: &GuestRam| {
            queues.iter().map(|queue| queue.ready.then(|| queue.build(mem, event_idx)).transpose()).collect()
        };
        self.shared.activate(build, self.driver_features);
    }

    fn reset(&mut self) {
        self.shared.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
