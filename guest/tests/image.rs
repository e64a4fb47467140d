//! The kernel image itself: what a monitor needs to find in it, and what must not be in it.

use std::ops::Range;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

const MIB: u64 = 1 << 20;

/// A number of `size` bytes in the image.
fn number(at: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&guest::ELF[at..at + size]);
    u64::from_le_bytes(bytes)
}

/// The program headers: (type, file range, physical address, size in memory).
fn segments() -> Vec<(u64, Range<usize>, u64, u64)> {
    let (table, count) = (number(32, 8) as usize, number(56, 2) as usize);
    (0..count)
        .map(|index| table + 56 * index)
        .map(|at| {
            let (offset, size) = (number(at + 8, 8) as usize, number(at + 32, 8) as usize);
            (number(at, 4), offset..offset + size, number(at + 24, 8), number(at + 40, 8))
        })
        .collect()
}

/// The file range and address of a section.
fn section(name: &str) -> (Range<usize>, u64) {
    let (table, count, names) = (number(40, 8) as usize, number(60, 2) as usize, number(62, 2) as usize);
    let names = number(table + 64 * names + 24, 8) as usize;
    let found = (0..count).map(|index| table + 64 * index).find(|&at| {
        let text = &guest::ELF[names + number(at, 4) as usize..];
        text.split(|&byte| byte == 0).next() == Some(name.as_bytes())
    });
    let at = found.unwrap_or_else(|| panic!("no section {name}"));
    let (offset, size) = (number(at + 24, 8) as usize, number(at + 32, 8) as usize);
    (offset..offset + size, number(at + 16, 8))
}

fn instructions() -> Vec<Instruction> {
    let mut all = Vec::new();
    for (name, bits) in [(".boot32", 32), (".text", 64)] {
        let (range, address) = section(name);
        assert!(!range.is_empty());
        all.extend(&mut Decoder::with_ip(bits, &guest::ELF[range], address, DecoderOptions::NONE));
    }
    all
}

#[test]
fn it_is_an_elf_executable_for_x86_64() {
    assert_eq!(&guest::ELF[..6], b"\x7fELF\x02\x01");
    assert_eq!((number(16, 2), number(18, 2)), (2, 62));
    assert!(guest::ELF.len() < 128 << 10, "{} bytes", guest::ELF.len());
}

#[test]
fn it_loads_into_the_second_mib() {
    let loads: Vec<_> = segments().into_iter().filter(|segment| segment.0 == 1).collect();
    assert!(!loads.is_empty());
    for (_, file, address, size) in loads {
        assert!(address >= MIB && address + size <= 2 * MIB, "{address:#x} and {size:#x} bytes");
        assert!(file.len() as u64 <= size && file.end <= guest::ELF.len());
    }
}

#[test]
fn its_pvh_note_leads_to_the_entry() {
    let notes: Vec<_> = segments().into_iter().filter(|segment| segment.0 == 4).collect();
    let [(_, file, ..)] = &notes[..] else { panic!("{} note segments", notes.len()) };
    let at = file.start;
    assert_eq!((number(at, 4), number(at + 4, 4), number(at + 8, 4)), (4, 8, 18));
    assert_eq!(&guest::ELF[at + 12..at + 16], b"Xen\0");
    let entry = number(at + 16, 8);
    let (code, address) = section(".boot32");
    assert_eq!(entry, address);
    // The first act: `mov dx, 0x3f8`, `mov al, 'd'`, `out dx, al`.
    assert_eq!(guest::ELF[code][..7], [0x66, 0xba, 0xf8, 0x03, 0xb0, b'd', 0xee]);
}

/// Ring 0 is emulated on some hosts, by an emulator that knows the old instructions and, worse, takes some new
/// ones for old ones. So whatever is not on the list of the oldest x86-64 processors must not be there, in no
/// ring, since the workloads run in either.
#[test]
fn it_uses_no_instruction_that_a_host_cannot_emulate() {
    let allowed = [
        CpuidFeature::INTEL8086,
        CpuidFeature::INTEL8086_ONLY,
        CpuidFeature::INTEL186,
        CpuidFeature::INTEL286,
        CpuidFeature::INTEL386,
        CpuidFeature::INTEL486,
        CpuidFeature::X64,
        CpuidFeature::CMOV,
        CpuidFeature::CPUID,
        CpuidFeature::MSR,
        CpuidFeature::TSC,
        CpuidFeature::PAUSE,
        CpuidFeature::MULTIBYTENOP,
    ];
    let instructions = instructions();
    assert!(instructions.len() > 1000, "{} instructions", instructions.len());
    for instruction in &instructions {
        let at = instruction.ip();
        assert!(!instruction.is_invalid(), "not an instruction at {at:#x}");
        // Between functions, where nothing runs, there are int3; a real one is in the crash that asks for it.
        let features = instruction.cpuid_features();
        let known = features.iter().all(|feature| allowed.contains(feature));
        assert!(known, "{:?} needs {features:?} at {at:#x}", instruction.mnemonic());
        let forbidden = [Mnemonic::Int, Mnemonic::Syscall, Mnemonic::Sysenter];
        assert!(!forbidden.contains(&instruction.mnemonic()), "{:?} at {at:#x}", instruction.mnemonic());
    }
}
