//! ACPI tables: how a stock kernel finds its CPUs, its serial port and its virtio devices.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, section 4.1): no SCI, no PM timer, no PIC and no PIT. A
//! kernel takes its processors from the MADT, its devices from the DSDT, power-off from the sleep control
//! register and reset from the reset register. Interrupts of virtio devices are edge-triggered, because that
//! is what an irqfd without a resampler delivers.
//!
//! On such a platform Linux resets through EFI, and where there is no EFI it does not try the reset register
//! but enters the firmware in real mode (`native_machine_emergency_restart`, arch/x86/kernel/reboot.c). So
//! there is a firmware entry: it does what the reset register does.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"DTRACK";
const OEM_TABLE: [u8; 8] = *b"DTVMM   ";
/// IA-PC boot flags of the FADT (ACPI 6.5, table 5.10): do not look for VGA, for MSI... and for a CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// A virtio-mmio device as the DSDT names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Base of the register window.
    pub base: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are larger than the area kept for them.
    #[error(
        "the ACPI tables for {cpus} CPUs need {need} bytes, and there are {room}: use fewer CPUs or devices"
    )]
    Room {
        /// vCPUs described.
        cpus: u8,
        /// Bytes of all tables.
        need: usize,
        /// Bytes there are.
        room: usize,
    },
    /// Guest memory does not reach that far.
    #[error("cannot write the ACPI tables to guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// `mov al, 0xfe; out 0x64, al; hlt`: the i8042's reset.
const FIRMWARE_CODE: [u8; 5] = [0xb0, 0xfe, 0xe6, layout::I8042_COMMAND as u8, 0xf4];

/// Writes the tables for `cpus` processors and these devices; returns the address of the RSDP.
///
/// # Errors
/// See [`AcpiError`].
pub fn write(mem: &GuestRam, cpus: u8, virtio: &[VirtioSlot]) -> Result<GuestAddress, AcpiError> {
    let base = layout::ACPI_TABLES.0;
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let append = |image: &mut Vec<u8>, table: &dyn Aml| -> u64 {
        let at = image.len();
        table.to_aml_bytes(image);
        image.resize(image.len().next_multiple_of(16), 0);
        base + at as u64
    };

    let dsdt = append(&mut image, &Raw(dsdt(virtio).as_slice()));
    let mut builder = FADTBuilder::new(OEM_ID, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    builder.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    builder.reset_reg = io_byte(layout::I8042_COMMAND);
    builder.reset_value = 0xfe;
    builder.sleep_control_reg = io_byte(layout::ACPI_SLEEP);
    builder.sleep_status_reg = io_byte(layout::ACPI_SLEEP + 1);
    let fadt = append(&mut image, &builder.finalize());

    let lapic = LocalInterruptController::Address(layout::LAPIC_BASE as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE, 1, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, 0));
    let madt = append(&mut image, &madt);

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut image, &xsdt);

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);

    let room = (layout::FIRMWARE_ENTRY.0 - base) as usize;
    if image.len() > room {
        return Err(AcpiError::Room { cpus, need: image.len(), room });
    }
    mem.write_slice(&image, layout::ACPI_TABLES)?;
    mem.write_slice(&FIRMWARE_CODE, layout::FIRMWARE_ENTRY)?;
    Ok(layout::ACPI_TABLES)
}

/// A byte-wide register in I/O space.
fn io_byte(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// Bytes that are AML already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0);
    }
}

fn dsdt(virtio: &[VirtioSlot]) -> Sdt {
    let mut aml = Vec::new();
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::COM1_GSI),
                    &aml::IO::new(layout::COM1, layout::COM1, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    for (index, slot) in virtio.iter().enumerate() {
        let path = format!("_SB_.VR{index:02X}");
        aml::Device::new(
            path.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &(index as u32)),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, slot.base as u32, layout::VIRTIO_STRIDE as u32),
                        &aml::Interrupt::new(true, true, false, false, slot.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut aml);
    }
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&layout::ACPI_S5])).to_aml_bytes(&mut aml);

    // Revision 2: integers of the DSDT are 64 bits wide (ACPI 6.5, section 5.2.11.1).
    let mut sdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, 1);
    sdt.append_slice(&aml);
    sdt
}
