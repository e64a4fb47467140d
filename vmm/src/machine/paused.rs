//! What can be known of a machine while it stands still.

use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_sregs;
use kvm_ioctls::VcpuFd;

use super::Machine;
use crate::devices::virtio;
use crate::state::{MachineState, MsrNumbers, StateError, VcpuState, VmState};

/// All vCPUs stand still while this lives.
pub struct Paused<'a> {
    pub(super) machine: &'a Machine,
}

impl Paused<'_> {
    /// The control registers and segments of each vCPU that has not ended, with its number, in the order of these.
    pub fn system_registers(&self) -> Vec<(u8, kvm_sregs)> {
        let found = Arc::new(Mutex::new(Vec::new()));
        let errand = {
            let found = Arc::clone(&found);
            Arc::new(move |id: u8, fd: &VcpuFd| {
                // KVM never refuses this for a vCPU that exists.
                if let Ok(registers) = fd.get_sregs() {
                    found.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((id, registers));
                }
            })
        };
        self.machine.gate.send(errand);
        let mut found = std::mem::take(&mut *found.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        found.sort_unstable_by_key(|(id, _)| *id);
        found
    }

    /// The state of the machine besides its memory. Its devices take no request meanwhile; what of memory they wrote
    /// before is there, and nothing more is written as long as the returned guards live.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn state(&self) -> Result<(MachineState, Vec<virtio::Paused>), StateError> {
        let machine = self.machine;
        let devices = machine.platform.pause();
        let numbers = MsrNumbers::of_host()?;
        let taken = Arc::new(Mutex::new(Vec::new()));
        let errand = {
            let taken = Arc::clone(&taken);
            Arc::new(move |id: u8, fd: &VcpuFd| {
                let state = VcpuState::take(id, fd, numbers);
                taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(state);
            })
        };
        machine.gate.send(errand);
        let taken = std::mem::take(&mut *taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        let mut vcpus = taken.into_iter().collect::<Result<Vec<_>, _>>()?;
        vcpus.sort_unstable_by_key(|vcpu| vcpu.id);
        if let Some(ended) =
            (0..machine.cpus as u8).find(|&id| vcpus.get(usize::from(id)).is_none_or(|vcpu| vcpu.id != id))
        {
            return Err(StateError::Ended(ended));
        }
        let vm = VmState::take(&machine.vm)?;
        Ok((MachineState { vm, vcpus, devices: machine.platform.state() }, devices))
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.machine.gate.open();
    }
}
