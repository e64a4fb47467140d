//! What a vCPU finds behind ports and device memory.
//!
//! [`Platform`] answers an access on the thread of the vCPU that made it. A device has its own lock; there
//! is none around all of them. Queue notifications of virtio devices do not come here: KVM turns them into
//! eventfds for the device loop.

pub mod device_loop;
pub mod serial;
pub mod virtio;

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest::abi::{DOORBELL_PORT, Doorbell};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout;
use crate::state::StateError;
use crate::state::device::{ChannelState, DeviceState};
use crate::timing::{Phase, Timing};
use serial::Serial;
use virtio::MmioTransport;

/// What an access asks of the machine beyond the access itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Reset: i8042 or ACPI reset register.
    Reset,
    /// Power off: ACPI S5.
    PowerOff,
    /// The built-in guest rang.
    Doorbell(Doorbell, u32),
}

/// All devices of a machine.
pub struct Platform {
    serial: Serial,
    virtio: Vec<Mutex<MmioTransport>>,
    channel: GuestChannel,
    timing: Timing,
}

/// What the built-in guest has told us by its doorbell.
#[derive(Debug)]
pub struct GuestChannel {
    control: AtomicU64,
    status: AtomicU32,
    begun: EventFd,
}

/// [`GuestChannel::status`] while the guest has not said it is done.
const NOT_DONE: u32 = u32::MAX;

impl GuestChannel {
    fn new() -> std::io::Result<GuestChannel> {
        Ok(GuestChannel {
            control: AtomicU64::new(0),
            status: AtomicU32::new(NOT_DONE),
            begun: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Guest-physical address of the control block, once announced.
    pub fn control(&self) -> Option<u64> {
        Some(self.control.load(Ordering::Acquire)).filter(|gpa| *gpa != 0)
    }

    /// The status that the guest ended with.
    pub fn status(&self) -> Option<u32> {
        Some(self.status.load(Ordering::Acquire)).filter(|status| *status != NOT_DONE)
    }

    /// Readable once the workload runs.
    pub fn begun(&self) -> &EventFd {
        &self.begun
    }

    fn state(&self) -> ChannelState {
        // Reading takes the count away.
        let begun = self.begun.read().is_ok();
        if begun {
            let _ = self.begun.write(1);
        }
        ChannelState {
            control: self.control(),
            status: self.status(),
            begun: begun || self.control().is_some(),
        }
    }

    fn restore(&self, state: &ChannelState) {
        self.control.store(state.control.unwrap_or(0), Ordering::Release);
        self.status.store(state.status.unwrap_or(NOT_DONE), Ordering::Release);
        if state.begun {
            // An eventfd that cannot count on is readable already.
            let _ = self.begun.write(1);
        }
    }

    fn ring(&self, bell: Doorbell, payload: u32) {
        match bell {
            Doorbell::Announce => self.control.store(u64::from(payload) << 4, Ordering::Release),
            // An eventfd that cannot count on is readable already.
            Doorbell::Begin => drop(self.begun.write(1)),
            Doorbell::Ready | Doorbell::Pass => {}
            Doorbell::Done => self.status.store(payload, Ordering::Release),
        }
    }
}

impl Platform {
    /// Devices whose console writes to `console`, and these virtio devices, in the order of their windows.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(
        console: Box<dyn Write + Send>,
        virtio: Vec<MmioTransport>,
        timing: Timing,
    ) -> std::io::Result<Platform> {
        let virtio = virtio.into_iter().map(Mutex::new).collect();
        Ok(Platform { serial: Serial::new(console)?, virtio, channel: GuestChannel::new()?, timing })
    }

    /// Goes on from `state`: devices that nobody has used yet, and the same in kind and number. It may interrupt the guest,
    /// so KVM must have its interrupt controllers' state before.
    ///
    /// # Errors
    /// [`StateError::Device`].
    pub fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let broken = |device: String| move |why| StateError::Device { device, why };
        if self.virtio.len() != state.virtio.len() {
            return Err(broken("the machine".into())("it has another number of virtio devices"));
        }
        self.serial.restore(&state.serial).map_err(broken("the serial port".into()))?;
        self.channel.restore(&state.channel);
        for (index, (device, state)) in self.virtio.iter().zip(&state.virtio).enumerate() {
            let mut device = device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            device.restore(state).map_err(broken(format!("virtio device {index}")))?;
        }
        Ok(())
    }

    /// Keeps all devices from taking requests until the guards are dropped. See [`DeviceHandle::pause`](virtio::DeviceHandle::pause).
    pub fn pause(&self) -> Vec<virtio::Paused> {
        let lock = |device: &Mutex<MmioTransport>| {
            device.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).handle()
        };
        self.virtio.iter().map(|device| lock(device).pause()).collect()
    }

    /// The state of all devices, which are paused, of a machine whose vCPUs stand still.
    pub fn state(&self) -> DeviceState {
        let device = |device: &Mutex<MmioTransport>| {
            device.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).state()
        };
        DeviceState {
            serial: self.serial.state(),
            virtio: self.virtio.iter().map(device).collect(),
            channel: self.channel.state(),
        }
    }

    /// The serial port.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The built-in guest's side channel.
    pub fn channel(&self) -> &GuestChannel {
        &self.channel
    }

    /// An `out` of `data` to `port`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        match (port, data) {
            (layout::COM1..=0x3ff, _) => {
                if port == layout::COM1 {
                    self.timing.mark(Phase::FirstByte);
                }
                // A string output arrives as one exit with many bytes, all for the same register.
                for byte in data {
                    self.serial.write((port - layout::COM1) as u8, *byte);
                }
                None
            }
            (layout::I8042_COMMAND, [0xfe, ..]) => Some(Request::Reset),
            // SLP_EN (bit 5) with SLP_TYP (bits 4:2) of S5: ACPI 6.5, section 4.8.3.7.
            (layout::ACPI_SLEEP, [value, ..]) if *value == 1 << 5 | layout::ACPI_S5 << 2 => {
                Some(Request::PowerOff)
            }
            (DOORBELL_PORT, &[a, b, c, d]) => {
                let (bell, payload) = Doorbell::decode(u32::from_le_bytes([a, b, c, d]))?;
                if bell == Doorbell::Ready {
                    self.timing.mark(Phase::Ring3);
                }
                self.channel.ring(bell, payload);
                Some(Request::Doorbell(bell, payload))
            }
            _ => None,
        }
    }

    /// An `in` from `port`. What nobody answers reads as all ones, as on a PC.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::COM1..=0x3ff => {
                for byte in data {
                    *byte = self.serial.read((port - layout::COM1) as u8);
                }
            }
            // No output for the guest, ready for input: a driver that asks finds nothing behind it.
            layout::I8042_COMMAND | layout::I8042_DATA => data.fill(0),
            layout::ACPI_SLEEP..=0x605 => data.fill(0),
            _ => {}
        }
    }

    /// The virtio device behind `gpa`, and the offset in its window.
    fn virtio(&self, gpa: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = gpa.checked_sub(layout::VIRTIO_BASE)?;
        let device = self.virtio.get((offset / layout::VIRTIO_STRIDE) as usize)?;
        Some((device, offset % layout::VIRTIO_STRIDE))
    }

    /// A write to guest-physical memory that is not RAM.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio(gpa) {
            // Registers are consistent between any two accesses.
            device.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).write(offset, data);
        }
    }

    /// A read from guest-physical memory that is not RAM. What nobody answers reads as all ones.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.virtio(gpa) {
            device.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).read(offset, data);
        }
    }
}
