//! From the monitor's hands into ring 3, and the few things that ring 0 does afterwards.
//!
//! Ring 0 is kept to what only it can do, some sixty instructions, since one host emulates every one of them.
//! All memory below 4 GiB is mapped one to one, writable **and accessible from ring 3**: this kernel measures
//! memory and protects nothing. The page tables for that are data in the image, with their accessed and dirty
//! bits set, so that no boot writes to them.
//!
//! Ring 3 reaches ports through the I/O bitmap of its own TSS (never by IOPL, which not every host honours
//! and not every monitor's TSS allows) and the local APIC through its mapped page. `syscall` and `int` are
//! avoided: what ring 3 needs of ring 0, it gets by `ud2` at a known address ([`enter_ring0`]).
//!
//! Every exception runs on a stack of its own (IST 1), so it may come from either ring and from any state of
//! the stack. A page fault in the region's window is handed back to the ring that faulted, like a signal: the
//! page tables are mapped there too, and ring 3 fills them in at full speed.

use core::arch::global_asm;

/// Ports from 0 up that ring 3 may use: all of them below this one.
const PORTS: u16 = 0x600;
/// The hardware part of the 64-bit TSS; the I/O bitmap follows it.
const TSS_BYTES: u16 = 104;
/// Each vCPU's TSS, exception stack and ordinary stack, in this order.
pub(crate) const CPU_AREA_SHIFT: u32 = 13;
/// Where in the area the exception stack ends and the ordinary one begins.
const EXCEPTION_STACK_TOP: u16 = 0x800;
/// Where the code lands that application processors start at: a page below 1 MiB.
pub(crate) const TRAMPOLINE: usize = 0x8000;

unsafe extern "C" {
    /// Continues the caller in ring 0, whichever ring it is in.
    pub(crate) fn enter_ring0();
    /// Continues the caller in ring 3. To be called in ring 0.
    pub(crate) fn enter_ring3();
    /// The same with interrupts enabled. None is handled, so every source must be masked, as in a machine just made.
    pub(crate) fn enter_ring3_interruptible();
    /// First byte of the image.
    pub(crate) static image_start: u8;
    /// One past the last byte of the image, its zeroed part and stacks included.
    pub(crate) static image_end: u8;
    /// Top-level page table.
    pub(crate) static mut pml4: [u64; 512];
    /// Interrupt descriptor table, empty until ring 3 fills it.
    pub(crate) static mut idt: [[u64; 2]; 32];
    /// One 16-byte entry point per exception vector.
    pub(crate) static trap_entries: u8;
    /// The per-vCPU areas.
    pub(crate) static cpu_areas: u8;
    /// The code for [`TRAMPOLINE`], first byte and one past the last.
    pub(crate) static trampoline_start: u8;
    pub(crate) static trampoline_end: u8;
    /// Application processors that are wanted, plus one; those in excess halt.
    pub(crate) static mut cpus_wanted: u32;
    /// Bytes of the window in which a page fault is served, 0 for none.
    pub(crate) static mut lazy_bytes: u64;
}

/// The image's first byte and one past its last.
pub(crate) fn image() -> (u64, u64) {
    (&raw const image_start as u64, &raw const image_end as u64)
}

/// The vCPU whose stack (either of the two) `stack` points into.
pub(crate) fn cpu_of_stack(stack: u64) -> usize {
    let areas = &raw const cpu_areas as u64;
    (stack.wrapping_sub(areas) >> CPU_AREA_SHIFT) as usize % crate::abi::MAX_CPUS
}

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18                      // owner's and value's sizes, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot32, "ax", @progbits

    // 32-bit protected mode without paging, ebx: the start info.
    .code32
    .globl pvh_entry
pvh_entry:
    movw $0x3f8, %dx
    movb $'d', %al                      // the first letter of the greeting
    outb %al, %dx
    xorl %ebp, %ebp
enter_long_mode:
    lgdtl gdt_pointer
    movl $0x20, %eax                    // PAE
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              // EFER
    rdmsr
    orl $0x100, %eax                    // LME
    wrmsr
    movl $0x80010033, %eax              // PG WP NE ET MP PE
    movl %eax, %cr0
    ljmpl $0x08, $in_long_mode

    // 32-bit protected mode, from the trampoline.
secondary:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %ss
    movl $1, %ebp
    jmp enter_long_mode

    .text
    .code64
in_long_mode:
    testl %ebp, %ebp
    jz 2f
    lock xaddl %ebp, tickets
    cmpl cpus_wanted, %ebp
    jb 2f
1:  hlt
    jmp 1b
2:  movl %ebp, %eax                     // rax: this vCPU's area
    shll ${area_shift}, %eax
    addl $cpu_areas, %eax
    leaq {stack_top}(%rax), %rcx
    movq %rcx, 36(%rax)                 // IST 1
    movw ${tss_bytes}, 102(%rax)        // the I/O bitmap's offset
    movb $0xff, {tss_bytes}+{ports}/8(%rax)
    movq %rax, %rdx
    shlq $16, %rdx
    movabsq $0x890000000000 + {tss_bytes} + {ports}/8, %rcx
    orq %rcx, %rdx
    movl %ebp, %ecx
    shll $4, %ecx
    addl $0x30, %ecx
    movq %rdx, gdt(%rcx)
    ltr %cx
    lidt idt_pointer
    leaq 1 << {area_shift}(%rax), %rsp
    movq %rsp, %rcx
    pushq $0x23
    pushq %rcx
    pushq $2
    pushq $0x2b
    testl %ebp, %ebp
    jnz 3f
    movl %ebx, %edi
    pushq $primary_start
    iretq
3:  movl %ebp, %edi
    pushq $secondary_start
    iretq

    .globl enter_ring0
enter_ring0:
    ud2
    ret

    .globl enter_ring3_interruptible
enter_ring3_interruptible:
    movl $0x202, %edx
    jmp 1f
    .globl enter_ring3
enter_ring3:
    movl $2, %edx
1:  popq %rax
    movq %rsp, %rcx
    pushq $0x23
    pushq %rcx
    pushq %rdx
    pushq $0x2b
    pushq %rax
    iretq

    .balign 16
    .globl trap_entries
trap_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if vector == 6
    jmp undefined_opcode
    .elseif vector == 14
    jmp page_fault
    .elseif (0x60227d00 >> vector) & 1  // these push an error code
    pushq $vector
    jmp deadly
    .else
    pushq $0
    pushq $vector
    jmp deadly
    .endif
    .set vector, vector + 1
    .endr

    // Below: the stack holds vector, error code, rip, cs, rflags, rsp, ss.
deadly:
    movq %rsp, %rdi
    cld
    call exception

undefined_opcode:
    cmpq $enter_ring0, (%rsp)
    jne 1f
    addq $2, (%rsp)
    movq $0x08, 8(%rsp)
    movq $0x10, 32(%rsp)
    iretq
1:  pushq $0
    pushq $6
    jmp deadly

page_fault:
    pushq %rax
    pushq %rcx
    testb $1, 16(%rsp)                  // a page that is there: not ours to serve
    jnz 1f
    movq %cr2, %rax
    movabsq ${window}, %rcx
    subq %rcx, %rax
    cmpq lazy_bytes, %rax
    jae 1f
    movq 48(%rsp), %rcx                 // the interrupted stack gets the offset and the way back
    subq $16, %rcx
    movq %rax, (%rcx)
    movq 24(%rsp), %rax
    movq %rax, 8(%rcx)
    movq %rcx, 48(%rsp)
    movq $serve, 24(%rsp)
    popq %rcx
    popq %rax
    addq $8, %rsp
    iretq
1:  popq %rcx
    popq %rax
    pushq $14
    jmp deadly

    // In the ring that faulted, on its stack, as if called from the faulting instruction.
serve:
    pushfq
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    movq 80(%rsp), %rdi
    movq %rsp, %rsi
    cld
    call serve_fault
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    popfq
    leaq 8(%rsp), %rsp
    ret

    // Copied to {trampoline}, where an application processor starts in real mode.
    .section .rodata
    .code16
    .globl trampoline_start, trampoline_end
trampoline_start:
    lgdtl %cs:gdt_pointer_low - trampoline_start
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $0x18, $secondary
gdt_pointer_low:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
    .code64

    // The boot page tables: 4 GiB in 2 MiB pages, all bits preset; the local APIC's page is uncached.
    .section .data.tables, "aw", @progbits
    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .set table, 0
    .rept 4
    .quad directories + table + 0x27
    .set table, table + 4096
    .endr
    .fill 508, 8, 0
directories:
    .set page, 0
    .rept 2048
    .if page == 0xfee00000
    .quad page + 0xff
    .else
    .quad page + 0xe7
    .endif
    .set page, page + 0x200000
    .endr

    .data
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            // 08 ring 0 code, 64 bits
    .quad 0x00cf93000000ffff            // 10 ring 0 data
    .quad 0x00cf9b000000ffff            // 18 ring 0 code, 32 bits
    .quad 0x00cff3000000ffff            // 20 ring 3 data
    .quad 0x00affb000000ffff            // 28 ring 3 code, 64 bits
    .fill 2 * {max_cpus}, 8, 0          // 30 the TSSs
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 32 * 16 - 1
    .quad idt
    .balign 8
    .globl cpus_wanted
cpus_wanted:
    .long 1
tickets:
    .long 1
    .globl lazy_bytes
lazy_bytes:
    .quad 0

    .bss
    .balign 1 << {area_shift}
    .globl cpu_areas, idt
cpu_areas:
    .skip {max_cpus} << {area_shift}
idt:
    .skip 32 * 16
    .text
"#,
    area_shift = const CPU_AREA_SHIFT,
    tss_bytes = const TSS_BYTES,
    ports = const PORTS,
    stack_top = const EXCEPTION_STACK_TOP,
    trampoline = const TRAMPOLINE,
    window = const crate::paging::WINDOW,
    max_cpus = const crate::abi::MAX_CPUS,
    options(att_syntax)
);

// What compiled code calls for memory it moves; `core` expects somebody to provide them. String instructions
// are short, and one instruction each even where ring 0 is emulated.
global_asm!(
    r#"
    .section .text.memory, "ax", @progbits
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    movq %rdi, %rax
    subq %rsi, %rax
    cmpq %rdx, %rax
    jb 1f
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
1:  movq %rdi, %rax                     // the target begins inside the source: from the end down
    movq %rdx, %rcx
    leaq -1(%rdi,%rdx), %rdi
    leaq -1(%rsi,%rdx), %rsi
    std
    rep movsb
    cld
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
memcmp:
bcmp:
    xorl %eax, %eax
    movq %rdx, %rcx
    cmpq %rcx, %rcx                     // equal, should there be nothing to compare
    repe cmpsb
    je 2f
    movzbl -1(%rdi), %eax
    movzbl -1(%rsi), %ecx
    subl %ecx, %eax
2:  ret
"#,
    options(att_syntax)
);
