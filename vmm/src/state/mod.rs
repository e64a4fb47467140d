//! The state of a machine besides its memory: vCPUs, interrupt controllers, clock, devices.
//!
//! It is JSON in all, so that a later version can read it by names; KVM's own structures in it are bytes as KVM defines
//! them, which are the same for every kernel. Whoever reads one reads bytes from outside: what KVM is given it checks
//! itself, and devices check what they are given.

pub mod device;
pub mod parts;
pub mod vcpu;
pub mod vm;

pub use device::DeviceState;
pub use vcpu::{MsrNumbers, VcpuState};
pub use vm::VmState;

use serde::{Deserialize, Serialize};

/// Everything about a machine but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What KVM has.
    pub vm: VmState,
    /// In the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// What the monitor has.
    pub devices: DeviceState,
}

/// Why a machine's state could not be taken, or given.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A KVM call failed.
    #[error("cannot {what}: {source}")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// More entries than KVM takes.
    #[error(
        "a table of the machine's state has more entries than KVM takes: it is damaged, or of another program"
    )]
    TooMany,
    /// A register that this host refuses.
    #[error(
        "this host's KVM refuses the model-specific register {number:#x} with {value:#x}: it is not of the same kind as \
         the host that the state is from"
    )]
    Msr {
        /// Its number.
        number: u32,
        /// What it is to be.
        value: u64,
    },
    /// A frequency that this host cannot give.
    #[error(
        "this host cannot give the guest a time-stamp counter of {0} kHz: its processor has no TSC scaling"
    )]
    TscKhz(u32),
    /// A vCPU that has ended.
    #[error("vCPU {0} has ended: a machine that does not run any more has no state to go on from")]
    Ended(u8),
    /// A device's state makes no sense.
    #[error("the state of {device} makes no sense: {why}")]
    Device {
        /// Which.
        device: String,
        /// What is wrong.
        why: &'static str,
    },
}

impl StateError {
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
        move |source| StateError::Kvm { what, source }
    }
}
