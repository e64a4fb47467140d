//! A driver for a machine's first virtio disk that lives in the test: through it the *device* writes to guest memory,
//! by a request in a queue, while the guest knows nothing of it.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dirty_track::addr::{Gfn, PAGE_SIZE};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm::devices::device_loop::{DeviceLoop, LoopError};
use vmm::devices::virtio::disk::DiskConfig;
use vmm::layout::VIRTIO_BASE;
use vmm::machine::Machine;

use crate::conformance::wait_until;

/// What lies where in the driver's page.
const AVAIL: u64 = 0x100;
const USED: u64 = 0x200;
const HEADER: u64 = 0x300;
const STATUS: u64 = 0x310;
/// Entries of the queue; a request takes three.
const ENTRIES: u16 = 4;

/// Why the disk could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file behind the disk.
    #[error("cannot use the disk's file: {0}")]
    File(#[from] io::Error),
    /// The driver's page.
    #[error("cannot reach the queue in guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The device's thread.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The device refused a request.
    #[error("the disk answered with status {0}")]
    Refused(u8),
}

/// A disk of one page, for the machine's configuration.
///
/// # Errors
/// When `path` cannot be written.
pub fn make(path: &Path) -> io::Result<DiskConfig> {
    std::fs::write(path, [0; PAGE_SIZE as usize])?;
    Ok(DiskConfig { path: path.into(), readonly: false })
}

/// The driver.
pub struct Driver<'a> {
    machine: &'a Machine,
    file: File,
    page: Gfn,
    /// Requests made.
    requests: Cell<u16>,
    _devices: DeviceLoop,
}

impl<'a> Driver<'a> {
    /// Starts the device whose file is at `path`, with its queue in the guest's `page`, which nobody else uses.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn start(machine: &'a Machine, path: &Path, page: Gfn) -> Result<Driver<'a>, Error> {
        let file = File::options().write(true).open(path)?;
        let _devices = DeviceLoop::start(machine.take_workers())?;
        let driver = Driver { machine, file, page, requests: Cell::new(0), _devices };
        let at = page.gpa().0;
        let low = |offset: u64| (at + offset) as u32;
        let mut status = 0;
        for bit in [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER] {
            status |= bit;
            driver.register(VIRTIO_MMIO_STATUS, status);
        }
        driver.register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.register(VIRTIO_MMIO_DRIVER_FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32));
        driver.register(VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_FEATURES_OK);
        driver.register(VIRTIO_MMIO_QUEUE_NUM, ENTRIES.into());
        driver.register(VIRTIO_MMIO_QUEUE_DESC_LOW, low(0));
        driver.register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, low(AVAIL));
        driver.register(VIRTIO_MMIO_QUEUE_USED_LOW, low(USED));
        driver.register(VIRTIO_MMIO_QUEUE_READY, 1);
        driver.put(AVAIL, VRING_AVAIL_F_NO_INTERRUPT as u16)?;
        driver.register(VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        Ok(driver)
    }

    /// The page of the queue.
    pub fn page(&self) -> Gfn {
        self.page
    }

    /// Has the device write `contents` to the guest's page `gfn`, and waits until it has.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read_into(&self, gfn: Gfn, contents: &[u8; PAGE_SIZE as usize]) -> Result<(), Error> {
        self.file.write_all_at(contents, 0)?;
        let at = self.page.gpa().0;
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        let descriptors = [
            (at + HEADER, 16, next, 1u16),
            (gfn.gpa().0, PAGE_SIZE as u32, next | write, 2),
            (at + STATUS, 1, write, 0),
        ];
        for (slot, (address, len, flags, follower)) in (0..).step_by(16).zip(descriptors) {
            self.put(slot, address)?;
            self.put(slot + 8, len)?;
            self.put(slot + 12, flags)?;
            self.put(slot + 14, follower)?;
        }
        // Type, priority, sector.
        self.put(HEADER, u64::from(VIRTIO_BLK_T_IN))?;
        self.put(HEADER + 8, 0u64)?;
        self.put(STATUS, 0xffu8)?;
        let request = self.requests.get();
        self.put(AVAIL + 4 + 2 * u64::from(request % ENTRIES), 0u16)?;
        let done = request.wrapping_add(1);
        self.put(AVAIL + 2, done)?;
        self.requests.set(done);
        self.register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        let mut used = Ok(request);
        wait_until("the disk has read", || {
            used = self.get::<u16>(USED + 2);
            !matches!(used, Ok(used) if used != done)
        });
        used?;
        match self.get(STATUS)? {
            status if u32::from(status) == VIRTIO_BLK_S_OK => Ok(()),
            status => Err(Error::Refused(status)),
        }
    }

    fn register(&self, offset: u32, value: u32) {
        self.machine.platform().mmio_write(VIRTIO_BASE + u64::from(offset), &value.to_le_bytes());
    }

    fn put<T: vm_memory::AtomicAccess>(&self, offset: u64, value: T) -> Result<(), Error> {
        let at = GuestAddress(self.page.gpa().0 + offset);
        Ok(self.machine.ram().mem().store(value, at, std::sync::atomic::Ordering::SeqCst)?)
    }

    fn get<T: vm_memory::AtomicAccess>(&self, offset: u64) -> Result<T, Error> {
        let at = GuestAddress(self.page.gpa().0 + offset);
        Ok(self.machine.ram().mem().load(at, std::sync::atomic::Ordering::SeqCst)?)
    }
}
