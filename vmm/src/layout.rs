//! Where things are in guest-physical memory and on the I/O bus.
//!
//! One table, so that memory, ACPI, boot and devices cannot disagree. RAM starts at 0, leaves the hole
//! [`HOLE_START`]`..`[`HOLE_END`] to devices, and goes on at 4 GiB.

use vm_memory::GuestAddress;

/// First byte of the 32-bit hole. RAM below it is at most 3 GiB.
pub const HOLE_START: u64 = 3 << 30;
/// One past the last byte of the 32-bit hole, where the rest of RAM goes on.
pub const HOLE_END: u64 = 4 << 30;

/// RAM below this address is the first memslot, RAM above it the second and, behind the hole, the third. A
/// kernel starts within the first; see [`crate::machine`] for why the others may come later.
pub const FIRST_SLOT: u64 = 64 << 20;

/// First virtio-mmio window; the others follow at [`VIRTIO_STRIDE`].
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance between virtio-mmio windows; a window uses the first 0x200 bytes of it.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// First interrupt line (GSI) of a virtio device; the others follow. 5..=23 are free of legacy devices.
pub const VIRTIO_GSI: u32 = 5;
/// Most virtio devices: the I/O APIC of KVM has 24 lines.
pub const VIRTIO_MAX: usize = 19;

/// Registers of the I/O APIC (KVM's own choice, arch/x86/kvm/ioapic.h).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Registers of the local APICs.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts for real mode (KVM_SET_TSS_ADDR), inside the hole.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page, likewise (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// GDT for the boot state, 32 bytes.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info`, with its module list and memory map behind it.
pub const PVH_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux `boot_params`, for a bzImage.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The kernel command line, at most [`CMDLINE_MAX`] bytes with its NUL.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// Start of the legacy area that a PC reserves for firmware. RAM there is not offered to the guest.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables: the RSDP is first, 16-byte aligned, in the area where a guest would also search for it.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// One past the last byte of the area of the ACPI tables and the firmware entry.
pub const ACPI_END: u64 = 0x10_0000;
/// Where a PC's firmware is entered in real mode to restart the machine, at F000:FFF0.
pub const FIRMWARE_ENTRY: GuestAddress = GuestAddress(0xf_fff0);
/// Where RAM goes on above the legacy area.
pub const HIGH_RAM: u64 = 0x10_0000;

/// COM1.
pub const COM1: u16 = 0x3f8;
/// GSI of COM1.
pub const COM1_GSI: u32 = 4;
/// i8042 data port.
pub const I8042_DATA: u16 = 0x60;
/// i8042 command port; command 0xfe resets the machine.
pub const I8042_COMMAND: u16 = 0x64;
/// ACPI sleep control register (hardware-reduced ACPI, one byte): power-off is written here.
pub const ACPI_SLEEP: u16 = 0x604;
/// Sleep type of S5 in our `_S5_` object.
pub const ACPI_S5: u8 = 5;
