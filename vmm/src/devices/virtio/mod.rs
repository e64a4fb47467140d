//! Virtio devices behind the MMIO transport (virtio 1.2, <https://docs.oasis-open.org/virtio/virtio/v1.2/>).
//!
//! A device is three things, on two kinds of threads:
//! * [`MmioTransport`]: the registers. vCPU threads read and write them; nothing in them is hot.
//! * [`QueueWorker`]: serves the queues. It is a subscriber of the device loop and runs on that thread only,
//!   woken by one eventfd per queue, which KVM signals itself (ioeventfd) without an exit to user space.
//! * a [`VirtioDevice`] (block, entropy): answers one request at a time, called by the worker.
//!
//! # Locks
//! Queues and device sit behind one mutex per device. The loop thread takes it once per wake-up and is alone
//! with it as long as the guest works; a vCPU thread takes it to activate, to disable a queue and to reset,
//! and then waits for at most the one request that is being served. Interrupt status and NEEDS_RESET are
//! atomics. So no path that a request takes ever waits for a lock.
//!
//! # What a hostile guest can do
//! Every byte in registers, queues and buffers is the guest's. A chain that cannot be answered (it loops, it
//! leaves the table, it has no room for a status) breaks the device: it serves nothing more and shows
//! NEEDS_RESET until the driver resets it. A request that is merely wrong fails with an error status. Work
//! per wake-up, memory per request and lines on stderr are bounded.

pub mod blk;
mod chain;
pub mod disk;
#[cfg(test)]
mod hostile;
pub mod mmio;
pub mod rng;
#[cfg(test)]
mod testing;
mod worker;

pub use chain::{BrokenChain, Buffers, Chain, RamSlice};
pub use mmio::MmioTransport;
pub use worker::{DeviceHandle, Paused, QueueWorker};

use crate::memory::GuestRam;

/// What a kind of device adds to the transport: its identity, and answers to requests.
///
/// Identity (`id`, `features`, `config`, `queue_sizes`) is asked for once, when the transport is made, and
/// must not change afterwards.
pub trait VirtioDevice: Send {
    /// Device type number (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// Feature bits of the device type (bits 0 to 23 and 50 to 127 of the specification; only the first 64
    /// exist here). The transport adds those of ring and transport.
    fn features(&self) -> u64;

    /// Device configuration space, little-endian. What the driver reads beyond it is 0; it cannot be written.
    fn config(&self) -> &[u8];

    /// Largest size of each queue, each a power of two of at most 32768. The length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// The driver is ready (DRIVER_OK), having accepted `features` of those that were offered.
    fn activate(&mut self, features: u64);

    /// Answers the request in `chain`, taken from queue number `queue`. Returns how many bytes have been
    /// written to its device-writable part, counted from its start without a gap.
    ///
    /// # Errors
    /// [`BrokenChain`] if there is no way to tell the driver about a result; the device is then stopped.
    fn handle(&mut self, queue: usize, chain: Chain<'_>) -> Result<u32, BrokenChain>;
}
