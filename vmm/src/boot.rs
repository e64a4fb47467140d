//! Putting a kernel into guest memory, and the state that a vCPU enters it with.
//!
//! Two ways in, both to flat 32-bit protected mode with paging off, so that one register set serves:
//! * an ELF with a PVH note: `EBX` points to an `hvm_start_info` (Xen's docs/misc/pvh.pandoc);
//! * a bzImage: its 32-bit entry, `ESI` points to `boot_params` (Documentation/arch/x86/boot.rst).
//!
//! Kernels are hostile bytes: sizes and addresses are checked here or by linux-loader, and a bad one is an
//! error before a vCPU exists.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use crate::layout;
use crate::memory::{GuestRam, contiguous};
use crate::options::human_size;

/// The kernel to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// The guest that is built into the monitor.
    #[default]
    BuiltIn,
    /// An ELF with a PVH note, or a bzImage.
    File(PathBuf),
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} {}: {source}", .path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither format.
    #[error("{} is not a kernel: neither an ELF nor a bzImage; give a vmlinux or a bzImage", .0.display())]
    NotAKernel(PathBuf),
    /// An ELF without a PVH entry.
    #[error("{} has no PVH entry: build it with CONFIG_PVH=y, or give its bzImage", .0.display())]
    NoPvh(PathBuf),
    /// A file shorter than its own header says.
    #[error("{} is truncated: its header speaks of {need} bytes and {have} are there; copy it again", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes announced.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// linux-loader refused it.
    #[error("cannot load the kernel {} into {} of guest memory: {reason}", .path.display(), human_size(*.ram))]
    Load {
        /// The file.
        path: PathBuf,
        /// Bytes of guest RAM.
        ram: u64,
        /// What linux-loader said.
        reason: String,
    },
    /// The initrd does not fit.
    #[error(
        "the initrd {} of {} does not fit behind the kernel in {} of guest memory below 3 GiB: use a larger --memory",
        .path.display(), human_size(*.size), human_size(*.ram)
    )]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// RAM below the hole.
        ram: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line has {have} bytes and {max} fit")]
    CommandLine {
        /// Bytes given.
        have: usize,
        /// Most bytes.
        max: usize,
    },
    /// Boot data does not fit into guest memory.
    #[error("cannot write boot data to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// How the boot vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// PVH: address of `hvm_start_info`; else 0.
    pub rbx: u64,
    /// bzImage: address of `boot_params`; else 0.
    pub rsi: u64,
}

/// Loads `kernel` with its command line and initrd, and describes the machine to it.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    mem: &GuestRam,
    kernel: &Kernel,
    cmdline: &str,
    initrd: Option<&Path>,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let max = layout::CMDLINE_MAX - 1;
    if cmdline.len() > max {
        return Err(BootError::CommandLine { have: cmdline.len(), max });
    }
    match kernel {
        Kernel::BuiltIn => {
            let path = Path::new("(built-in guest)");
            let loaded = load_elf(mem, path, &mut Cursor::new(guest::ELF))?;
            finish_pvh(mem, path, loaded, cmdline, initrd, rsdp)
        }
        Kernel::File(path) => {
            let unreadable = |source| BootError::Read { what: "kernel", path: path.clone(), source };
            let mut file = File::open(path).map_err(unreadable)?;
            match format_of(&mut file).map_err(unreadable)? {
                Some(Format::Elf) => {
                    let loaded = load_elf(mem, path, &mut file)?;
                    finish_pvh(mem, path, loaded, cmdline, initrd, rsdp)
                }
                Some(Format::BzImage) => load_bzimage(mem, path, &mut file, cmdline, initrd, rsdp),
                None => Err(BootError::NotAKernel(path.clone())),
            }
        }
    }
}

enum Format {
    Elf,
    BzImage,
}

/// `HdrS` at 0x202 is the magic of the Linux boot protocol.
fn format_of(file: &mut File) -> io::Result<Option<Format>> {
    let mut head = Vec::with_capacity(0x206);
    file.by_ref().take(0x206).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(if head.starts_with(b"\x7fELF") {
        Some(Format::Elf)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        Some(Format::BzImage)
    } else {
        None
    })
}

fn ram_size(mem: &GuestRam) -> u64 {
    mem.iter().map(|region| region.len()).sum()
}

fn load_elf<F: Read + ReadVolatile + Seek>(
    mem: &GuestRam,
    path: &Path,
    image: &mut F,
) -> Result<KernelLoaderResult, BootError> {
    // No kernel belongs below 1 MiB: boot data and the legacy hole are there.
    Elf::load(mem, None, image, Some(GuestAddress(layout::HIGH_RAM))).map_err(|e| BootError::Load {
        path: path.into(),
        ram: ram_size(mem),
        reason: e.to_string(),
    })
}

fn finish_pvh(
    mem: &GuestRam,
    path: &Path,
    loaded: KernelLoaderResult,
    cmdline: &str,
    initrd: Option<&Path>,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh(path.into()));
    };
    write_cmdline(mem, cmdline)?;
    let initrd = load_initrd(mem, initrd, loaded.kernel_end)?;

    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: rsdp.0,
        ..Default::default()
    };
    let mut at = layout::PVH_INFO.unchecked_add(size_of::<hvm_start_info>() as u64);
    if let Some((addr, size)) = initrd {
        info.modlist_paddr = at.0;
        info.nr_modules = 1;
        mem.write_obj(hvm_modlist_entry { paddr: addr, size, ..Default::default() }, at)?;
        at = at.unchecked_add(size_of::<hvm_modlist_entry>() as u64);
    }
    info.memmap_paddr = at.0;
    for (addr, size, type_) in memory_map(mem) {
        mem.write_obj(hvm_memmap_table_entry { addr, size, type_, reserved: 0 }, at)?;
        at = at.unchecked_add(size_of::<hvm_memmap_table_entry>() as u64);
        info.memmap_entries += 1;
    }
    mem.write_obj(info, layout::PVH_INFO)?;
    Ok(Entry { rip: entry.0, rbx: layout::PVH_INFO.0, rsi: 0 })
}

/// xen/include/public/arch-x86/hvm/start_info.h
const XEN_HVM_START_MAGIC: u32 = 0x336e_c578;

fn load_bzimage(
    mem: &GuestRam,
    path: &Path,
    file: &mut File,
    cmdline: &str,
    initrd: Option<&Path>,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let have = file
        .metadata()
        .map_err(|source| BootError::Read { what: "kernel", path: path.into(), source })?
        .len();
    let loaded = BzImage::load(mem, None, file, Some(GuestAddress(layout::HIGH_RAM)))
        .map_err(|e| BootError::Load { path: path.into(), ram: ram_size(mem), reason: e.to_string() })?;
    let Some(mut header) = loaded.setup_header else {
        return Err(BootError::NotAKernel(path.into()));
    };
    // linux-loader loads what there is; the header says what there should be, in paragraphs of 16 bytes.
    let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
    let need = setup + u64::from(header.syssize) * 16;
    if have < need {
        return Err(BootError::Truncated { path: path.into(), need, have });
    }

    write_cmdline(mem, cmdline)?;
    // The kernel unpacks itself above its load address, or at the address that it prefers, and uses
    // `init_size` bytes there before it looks at any memory map.
    let unpacked = header.pref_address.max(loaded.kernel_load.0) + u64::from(header.init_size);
    let initrd = load_initrd(mem, initrd, loaded.kernel_end.max(unpacked))?;

    header.type_of_loader = 0xff;
    header.cmd_line_ptr = layout::CMDLINE.0 as u32;
    header.cmdline_size = cmdline.len() as u32;
    if let Some((addr, size)) = initrd {
        header.ramdisk_image = addr as u32;
        header.ramdisk_size = size as u32;
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp.0, ..Default::default() };
    for (addr, size, type_) in memory_map(mem) {
        params.e820_table[usize::from(params.e820_entries)] = boot_e820_entry { addr, size, r#type: type_ };
        params.e820_entries += 1;
    }
    mem.write_obj(params, layout::ZERO_PAGE)?;
    Ok(Entry { rip: loaded.kernel_load.0, rbx: 0, rsi: layout::ZERO_PAGE.0 })
}

fn write_cmdline(mem: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    mem.write_slice(cmdline.as_bytes(), layout::CMDLINE)?;
    mem.write_obj(0u8, layout::CMDLINE.unchecked_add(cmdline.len() as u64))?;
    Ok(())
}

/// Loads the initrd as high as it goes below the hole, out of the way of a kernel that unpacks itself.
fn load_initrd(
    mem: &GuestRam,
    initrd: Option<&Path>,
    kernel_end: u64,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(path) = initrd else { return Ok(None) };
    let unreadable = |source| BootError::Read { what: "initrd", path: path.into(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(unreadable(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let size = meta.len();
    let low_end = contiguous(mem).first().map_or(0, |(_, len)| *len);
    let too_large = || BootError::InitrdTooLarge { path: path.into(), size, ram: low_end };
    let addr = low_end.checked_sub(size).ok_or_else(too_large)? & !0xfff;
    if addr < kernel_end {
        return Err(too_large());
    }
    mem.read_exact_volatile_from(GuestAddress(addr), &mut file, size as usize)?;
    Ok(Some((addr, size)))
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The guest's memory as e820 entries (address, size, type), in order.
fn memory_map(mem: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = Vec::with_capacity(4);
    for (start, len) in contiguous(mem) {
        if start == 0 {
            map.push((0, layout::EBDA_START, E820_RAM));
            let tables = layout::ACPI_TABLES.0;
            map.push((tables, layout::ACPI_END - tables, E820_RESERVED));
            map.push((layout::HIGH_RAM, len - layout::HIGH_RAM, E820_RAM));
        } else {
            map.push((start, len, E820_RAM));
        }
    }
    map
}

/// Segment selectors of the boot GDT; the numbers are those of the Linux boot protocol (`__BOOT_CS`,
/// `__BOOT_DS`), which PVH does not care about.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// Writes the GDT that [`set_entry`]'s segments stand for, in case a kernel reloads one before it has its
/// own.
///
/// # Errors
/// When there is no guest memory at [`layout::BOOT_GDT`].
pub fn write_gdt(mem: &GuestRam) -> Result<(), BootError> {
    // Null, unused, flat 4 GiB code, flat 4 GiB data, and a TSS of 0x67 bytes at 0.
    let gdt: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (index, entry) in gdt.iter().enumerate() {
        mem.write_obj(*entry, layout::BOOT_GDT.unchecked_add(index as u64 * 8))?;
    }
    Ok(())
}

/// The boot vCPU's registers for `entry`: flat 32-bit protected mode, paging off, interrupts off.
pub fn set_entry(entry: Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = flat(BOOT_CS, 0xb);
    let data = flat(BOOT_DS, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: BOOT_TSS, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = layout::BOOT_GDT.0;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    sregs.efer = 0;
    // Bit 1 of RFLAGS is always set.
    kvm_regs { rip: entry.rip, rbx: entry.rbx, rsi: entry.rsi, rflags: 2, ..Default::default() }
}
