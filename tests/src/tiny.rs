//! Tiny PVH kernels made of a few bytes of 32-bit machine code, for tests of what a monitor does with guests
//! that behave oddly.

/// Where the code is loaded and entered.
pub const ENTRY: u32 = 0x10_0000;

/// An ELF that boots by PVH and runs `code` in flat 32-bit protected mode with paging off.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    // Note: name size 4, descriptor size 4, type XEN_ELFNOTE_PHYS32_ENTRY (18), "Xen\0", entry.
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = (note_at + note.len()).next_multiple_of(16);

    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend(u64::from(ENTRY).to_le_bytes());
    elf.extend((HEADER as u64).to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes()); // no section headers
    elf.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, flags: u32, offset: usize, address: u64, len: usize| {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        for value in [offset as u64, address, address, len as u64, len as u64, 4] {
            elf.extend(value.to_le_bytes());
        }
    };
    program_header(1, 5, code_at, u64::from(ENTRY), code.len()); // PT_LOAD
    program_header(4, 4, note_at, 0, note.len()); // PT_NOTE
    elf.extend(note);
    elf.resize(code_at, 0);
    elf.extend(code);
    elf
}

/// `out` of a byte to a port.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Says `text` on COM1.
pub fn say(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// An endless loop.
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
