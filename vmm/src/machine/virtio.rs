//! The virtio devices of a machine.

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{MachineError, kvm_error, system_error};
use crate::acpi::VirtioSlot;
use crate::devices::virtio::blk::Blk;
use crate::devices::virtio::disk::Disk;
use crate::devices::virtio::mmio::NOTIFY_OFFSET;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::{MmioTransport, QueueWorker, VirtioDevice};
use crate::layout;
use crate::memory::Ram;

/// What the guest sees, who works on the queues, and what the firmware's tables say.
pub(super) type Connected = (Vec<MmioTransport>, Vec<QueueWorker>, Vec<VirtioSlot>);

/// Makes the devices and connects their interrupts and notifications to `vm`.
pub(super) fn connect(vm: &VmFd, ram: &Ram, disks: Vec<Disk>, rng: bool) -> Result<Connected, MachineError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::with_capacity(disks.len() + 1);
    for disk in disks {
        devices.push(Box::new(Blk::new(disk)));
    }
    if rng {
        devices.push(Box::new(Rng));
    }
    if devices.len() > layout::VIRTIO_MAX {
        return Err(MachineError::Devices { asked: devices.len(), max: layout::VIRTIO_MAX });
    }
    let (mut transports, mut workers, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    for (index, device) in devices.into_iter().enumerate() {
        let base = layout::VIRTIO_BASE + index as u64 * layout::VIRTIO_STRIDE;
        let gsi = layout::VIRTIO_GSI + index as u32;
        let irq = EventFd::new(EFD_NONBLOCK).map_err(system_error("create an eventfd"))?;
        vm.register_irqfd(&irq, gsi).map_err(kvm_error("connect a virtio device's interrupt"))?;
        let (transport, worker) = MmioTransport::new(ram.mem().clone(), device, irq)?;
        for (queue, event) in transport.queue_events().iter().enumerate() {
            let notify = IoEventAddress::Mmio(base + NOTIFY_OFFSET);
            vm.register_ioevent(event, &notify, queue as u32)
                .map_err(kvm_error("connect a virtio queue's notification"))?;
        }
        transports.push(transport);
        workers.push(worker);
        slots.push(VirtioSlot { base, gsi });
    }
    Ok((transports, workers, slots))
}
