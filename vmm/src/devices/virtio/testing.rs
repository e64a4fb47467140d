//! A driver for tests: it drives a device as a guest would, by registers and by queue memory, and nothing
//! else. Guest memory is 64 pages from 0 on: descriptors, the available ring, the used ring and indirect tables
//! of queue 0 on pages of their own, with room for 512 entries, and from [`DATA`] on pages for buffers.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{GuestRam, MmioTransport, QueueWorker, VirtioDevice};

pub(super) const RAM: u64 = 64 << 12;
pub(super) const DESC: u64 = 0x1000;
pub(super) const AVAIL: u64 = 0x3000;
pub(super) const USED: u64 = 0x4000;
pub(super) const INDIRECT: u64 = 0x6000;
/// First of the pages that are free for buffers.
pub(super) const DATA: u64 = 0x8000;

pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const INDIRECT_FLAG: u16 = VRING_DESC_F_INDIRECT as u16;

pub(super) const V1: u64 = 1 << VIRTIO_F_VERSION_1;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK; and with DRIVER_OK.
pub(super) const NEGOTIATED: u32 = 1 | 2 | 8;
pub(super) const RUNNING: u32 = NEGOTIATED | 4;
pub(super) const NEEDS_RESET: u32 = 64;

/// A descriptor: address, length, flags, next.
pub(super) type Descriptor = (u64, u32, u16, u16);

/// A buffer of a request: address, length, whether the device may write it.
pub(super) type Buffer = (u64, u32, bool);

pub(super) struct Driver {
    pub(super) mem: GuestRam,
    pub(super) device: MmioTransport,
    pub(super) worker: QueueWorker,
    irq: EventFd,
    size: u16,
    next_desc: u16,
    avail: u16,
    used: u16,
}

impl Driver {
    /// A device just after power-on.
    pub(super) fn new(device: impl VirtioDevice + 'static) -> Driver {
        Driver::boxed(Box::new(device))
    }

    pub(super) fn boxed(device: Box<dyn VirtioDevice>) -> Driver {
        let mem = GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (device, worker) = MmioTransport::new(mem.clone(), device, irq.try_clone().unwrap()).unwrap();
        Driver { mem, device, worker, irq, size: 16, next_desc: 0, avail: 0, used: 0 }
    }

    /// A device that runs with queue 0 of 16 entries and `features` besides VERSION_1.
    pub(super) fn running(device: impl VirtioDevice + 'static, features: u64) -> Driver {
        let mut driver = Driver::new(device);
        driver.start(features);
        driver
    }

    /// Resets the device and brings it up again with queue 0 of `size` entries.
    pub(super) fn restart(&mut self, size: u16, features: u64) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.size = size;
        self.start(features);
    }

    /// Brings the device from reset to DRIVER_OK.
    pub(super) fn start(&mut self, features: u64) {
        self.negotiate(features | V1);
        self.set_up_queue(self.size, DESC, AVAIL, USED);
        (self.next_desc, self.avail, self.used) = (0, 0, 0);
        self.store(AVAIL, 0u32);
        self.store(USED, 0u32);
        self.set(VIRTIO_MMIO_STATUS, RUNNING);
    }

    pub(super) fn negotiate(&mut self, features: u64) {
        self.set(VIRTIO_MMIO_STATUS, 1);
        self.set(VIRTIO_MMIO_STATUS, 1 | 2);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
        self.set(VIRTIO_MMIO_STATUS, NEGOTIATED);
    }

    pub(super) fn set_up_queue(&mut self, size: u16, desc: u64, avail: u64, used: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.set(VIRTIO_MMIO_QUEUE_NUM, u32::from(size));
        self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, desc as u32);
        self.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, (desc >> 32) as u32);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail as u32);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, (avail >> 32) as u32);
        self.set(VIRTIO_MMIO_QUEUE_USED_LOW, used as u32);
        self.set(VIRTIO_MMIO_QUEUE_USED_HIGH, (used >> 32) as u32);
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(super) fn get(&mut self, register: u32) -> u32 {
        let mut value = [0xaa; 4];
        self.device.read(u64::from(register), &mut value);
        u32::from_le_bytes(value)
    }

    pub(super) fn set(&mut self, register: u32, value: u32) {
        self.device.write(u64::from(register), &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    /// A field of the configuration space.
    pub(super) fn config<const N: usize>(&mut self, offset: usize) -> [u8; N] {
        let mut value = [0xaa; N];
        self.device.read(u64::from(VIRTIO_MMIO_CONFIG) + offset as u64, &mut value);
        value
    }

    pub(super) fn store<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(super) fn load<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.mem.read_obj(GuestAddress(address)).unwrap()
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(super) fn describe(&self, table: u64, index: u16, (address, length, flags, next): Descriptor) {
        let at = table + 16 * u64::from(index);
        self.store(at, address);
        self.store(at + 8, length);
        self.store(at + 12, flags);
        self.store(at + 14, next);
    }

    /// Writes descriptors for `buffers` into the table at `table` from `first` on, wrapping at `size`.
    pub(super) fn chain(&self, table: u64, first: u16, size: u16, buffers: &[Buffer]) {
        for (i, &(address, length, writable)) in (0..).zip(buffers) {
            let more = usize::from(i) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.describe(table, (first + i) % size, (address, length, flags, (first + i + 1) % size));
        }
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub(super) fn offer(&mut self, head: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.store(AVAIL + 2, self.avail);
        fence(Ordering::SeqCst);
    }

    /// Makes a request of `buffers` available; returns its head.
    pub(super) fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        self.chain(DESC, head, self.size, buffers);
        self.next_desc = (head + buffers.len() as u16) % self.size;
        self.offer(head);
        head
    }

    /// Requests made available so far, modulo 2^16.
    pub(super) fn offered(&self) -> u16 {
        self.avail
    }

    /// What the device loop does when queue 0 has been kicked.
    pub(super) fn serve(&self) {
        self.worker.0.serve(0);
    }

    /// Entries of the used ring that have been added since the last call: head and length.
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.used != self.load::<u16>(USED + 2) {
            let at = USED + 4 + 8 * u64::from(self.used % self.size);
            entries.push((self.load(at), self.load(at + 4)));
            self.used = self.used.wrapping_add(1);
        }
        entries
    }

    /// Interrupts since the last call.
    pub(super) fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }

    /// Whether queue `index` has been kicked since the last call.
    pub(super) fn kicked(&self, index: usize) -> bool {
        self.device.queue_events()[index].read().is_ok()
    }
}
