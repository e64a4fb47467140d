//! The state that all vCPUs of a machine share: interrupt controllers and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::StateError;

/// Everything that is KVM's and no vCPU's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// In the order of [`CHIPS`].
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// Takes the state of `vm`, whose vCPUs stand still.
    ///
    /// # Errors
    /// What KVM says.
    pub fn take(vm: &VmFd) -> Result<VmState, StateError> {
        let mut irqchips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            vm.get_irqchip(&mut chip).map_err(StateError::kvm("read an interrupt controller"))?;
            irqchips.push(chip);
        }
        let mut clock = vm.get_clock().map_err(StateError::kvm("read the guest's clock"))?;
        // What else is in it is this host's: it is not to be set elsewhere.
        clock.flags = 0;
        Ok(VmState { irqchips, clock })
    }

    /// Gives it to a VM with interrupt controllers, whose vCPUs have not run yet. The guest's clock goes on from where it
    /// was.
    ///
    /// # Errors
    /// What KVM says.
    pub fn give(&self, vm: &VmFd) -> Result<(), StateError> {
        for (chip, expected) in self.irqchips.iter().zip(CHIPS) {
            if chip.chip_id != expected {
                return Err(StateError::Device {
                    device: "the interrupt controllers".into(),
                    why: "they are not in their order",
                });
            }
            vm.set_irqchip(chip).map_err(StateError::kvm("set an interrupt controller"))?;
        }
        if self.irqchips.len() != CHIPS.len() {
            return Err(StateError::Device {
                device: "the interrupt controllers".into(),
                why: "there are three of them",
            });
        }
        vm.set_clock(&self.clock).map_err(StateError::kvm("set the guest's clock"))
    }
}
