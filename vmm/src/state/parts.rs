//! A machine's state as named records of a dirty log.

use std::io::Write;

use dirty_track::log::{LogWriter, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{DeviceState, MachineState, VcpuState, VmState};

pub(crate) const VM: &str = "vm";
const VCPU: &str = "vcpu";
pub(crate) const DEVICES: &str = "devices";

/// Why records are not a machine's state, or it cannot be made records.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// A record cannot be understood.
    #[error("the {part} of the machine's state cannot be understood: {source}")]
    Part {
        /// Which.
        part: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// One is missing.
    #[error("the machine's state has no {0}")]
    Missing(&'static str),
    /// The log.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writes `state` behind the epochs of `log`.
///
/// # Errors
/// What the log says.
pub fn write<W: Write>(log: &mut LogWriter<W>, state: &MachineState) -> Result<(), PartsError> {
    put(log, VM, &state.vm)?;
    state.vcpus.iter().try_for_each(|vcpu| put(log, VCPU, vcpu))?;
    put(log, DEVICES, &state.devices)
}

/// Reads the record `part`.
///
/// # Errors
/// [`PartsError::Part`].
pub fn parse<T: DeserializeOwned>(part: &str, bytes: &[u8]) -> Result<T, PartsError> {
    serde_json::from_slice(bytes).map_err(|source| PartsError::Part { part: part.to_owned(), source })
}

/// Writes the record `part`.
///
/// # Errors
/// What the log says.
pub fn put<W: Write>(log: &mut LogWriter<W>, part: &str, value: &impl Serialize) -> Result<(), PartsError> {
    let bytes =
        serde_json::to_vec(value).map_err(|source| PartsError::Part { part: part.to_owned(), source })?;
    Ok(log.state(part, &bytes)?)
}

/// What was found of a state so far.
#[derive(Debug, Default)]
pub struct Parts {
    vm: Option<VmState>,
    vcpus: Vec<VcpuState>,
    devices: Option<DeviceState>,
}

impl Parts {
    /// Takes a record. Those of other names are of later versions, or not of the machine's state.
    ///
    /// # Errors
    /// [`PartsError::Part`].
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), PartsError> {
        match name {
            VM => self.vm = Some(parse(name, bytes)?),
            // More than any machine has are noticed at the end.
            VCPU if self.vcpus.len() <= usize::from(u8::MAX) => self.vcpus.push(parse(name, bytes)?),
            DEVICES => self.devices = Some(parse(name, bytes)?),
            _ => {}
        }
        Ok(())
    }

    /// The state of a machine of `cpus` vCPUs.
    ///
    /// # Errors
    /// [`PartsError::Missing`].
    pub fn finish(self, cpus: u8) -> Result<MachineState, PartsError> {
        if self.vcpus.len() != usize::from(cpus) {
            return Err(PartsError::Missing("record of each vCPU"));
        }
        Ok(MachineState {
            vm: self.vm.ok_or(PartsError::Missing("interrupt controllers"))?,
            vcpus: self.vcpus,
            devices: self.devices.ok_or(PartsError::Missing("devices"))?,
        })
    }
}
