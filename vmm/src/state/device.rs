//! The state of the devices that are the monitor's own.

use serde::{Deserialize, Serialize};

/// All devices of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The serial port.
    pub serial: SerialPortState,
    /// The virtio devices, in the order of their windows.
    pub virtio: Vec<TransportState>,
    /// What the built-in guest has told.
    pub channel: ChannelState,
}

/// The serial port: the UART's registers, and input that waits for room in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    /// DLL, DLM, IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 9],
    /// In the receive FIFO.
    pub fifo: Vec<u8>,
    /// Typed, and not in the FIFO yet.
    pub waiting: Vec<u8>,
}

/// The built-in guest's side channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Address of its control block.
    pub control: Option<u64>,
    /// The status that it ended with.
    pub status: Option<u32>,
    /// Its workload runs.
    pub begun: bool,
}

/// The registers of a virtio device, and its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Its device type.
    pub device_id: u32,
    /// What it offers.
    pub device_features: u64,
    /// What the driver accepted.
    pub driver_features: u64,
    /// As the driver set it.
    pub status: u32,
    /// The device waits for a reset.
    pub needs_reset: bool,
    /// What the driver has not acknowledged.
    pub interrupt_status: u32,
    /// Which half of the features the driver looks at, and which it writes.
    pub features_sel: (u32, u32),
    /// Which queue it looks at.
    pub queue_sel: u32,
    /// Its queues.
    pub queues: Vec<QueueState>,
}

/// What the driver wrote about a queue, and how far the device is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Size.
    pub num: u32,
    /// In use.
    pub ready: bool,
    /// Address of the descriptors.
    pub desc: u64,
    /// Address of the available ring.
    pub driver: u64,
    /// Address of the used ring.
    pub device: u64,
    /// Where the device goes on in the available ring and in the used ring, if it serves the queue.
    pub at: Option<(u16, u16)>,
}
