//! What the monitor says by way of PVH: the command line and the memory map.
//!
//! Both are copied into the kernel at once, so that the memory they lie in may be used for anything.
//! The format: `struct hvm_start_info` of Xen's public header `arch-x86/hvm/start_info.h`.

use core::ptr::read_unaligned;

use crate::layout::PAGE;

/// Bytes of a command line that count, and entries of a memory map.
const LENGTH: usize = 2048;
const RANGES: usize = 64;

const MAGIC: u32 = 0x336e_c578;
/// Memory map entry type of usable RAM.
const RAM: u32 = 1;

/// What a PC's firmware leaves of itself at the top of the memory below 4 GiB, which it calls usable: SeaBIOS
/// works 16 MiB below the end. Left out, since the region must be zero at first.
const FIRMWARE_SCRATCH: u64 = 32 << 20;
/// Where a PC with firmware begins, by a far jump; without one there is nothing.
const RESET_VECTOR: *const u8 = 0xf_fff0 as *const u8;
const FAR_JUMP: u8 = 0xea;

/// The copy.
pub(crate) struct Boot {
    command_line: [u8; LENGTH],
    length: usize,
    ranges: [(u64, u64); RANGES],
    count: usize,
}

static mut BOOT: Boot = Boot { command_line: [0; LENGTH], length: 0, ranges: [(0, 0); RANGES], count: 0 };

impl Boot {
    /// The command line, cut off where it is too long.
    pub(crate) fn command_line(&self) -> &[u8] {
        &self.command_line[..self.length]
    }

    /// Usable RAM in whole pages: (first byte, one past the last).
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + Clone {
        self.ranges[..self.count].iter().copied()
    }
}

/// Reads the start info at `address`.
///
/// # Safety
/// To be called once, by vCPU 0, with what the entry point got in ebx.
pub(crate) unsafe fn read(address: u64) -> Result<&'static Boot, &'static str> {
    // SAFETY: nobody else has a reference yet.
    let boot = unsafe { &mut *(&raw mut BOOT).cast::<Boot>() };
    // SAFETY: the first 4 GiB are mapped, and a monitor puts all of this there, as PVH wants it.
    let (u32_at, u64_at) =
        unsafe { (|at: u64| read_unaligned(at as *const u32), |at: u64| read_unaligned(at as *const u64)) };
    if address == 0 || u32_at(address) != MAGIC {
        return Err("not booted by PVH: no start info");
    }
    let (command_line, map, entries) = (u64_at(address + 24), u64_at(address + 40), u32_at(address + 48));
    if u32_at(address + 4) < 1 || map == 0 || entries == 0 {
        return Err("the monitor gives no memory map");
    }
    if command_line >> 32 != 0 || map >> 32 != 0 {
        return Err("the start info lies above 4 GiB");
    }
    while command_line != 0 && boot.length < LENGTH {
        // SAFETY: as above.
        let byte = unsafe { *((command_line as usize + boot.length) as *const u8) };
        if byte == 0 {
            break;
        }
        boot.command_line[boot.length] = byte;
        boot.length += 1;
    }
    // SAFETY: as above.
    let firmware = unsafe { RESET_VECTOR.read_volatile() } == FAR_JUMP;
    for entry in (0..u64::from(entries)).map(|index| map + 24 * index).take(RANGES) {
        let (start, size, kind) = (u64_at(entry), u64_at(entry + 8), u32_at(entry + 16));
        let end = start.saturating_add(size);
        let start = start.checked_next_multiple_of(PAGE).unwrap_or(end);
        let end = if firmware && end <= 1 << 32 {
            end - FIRMWARE_SCRATCH.min(end.saturating_sub(start) / 2)
        } else {
            end
        };
        if kind == RAM && start < end {
            boot.ranges[boot.count] = (start, end / PAGE * PAGE);
            boot.count += 1;
        }
    }
    Ok(boot)
}
