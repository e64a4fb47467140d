//! Exceptions: the table of entry points, and the end of a run by one that nobody expected. No interrupt is handled.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::abi::status;
use crate::cmdline::Crash;
use crate::serial::Line;
use crate::{entry, finish, smp};

/// Fills in the interrupt descriptor table, which ring 0 has loaded empty.
pub(crate) fn install() {
    let first = &raw const entry::trap_entries as u64;
    for vector in 0..32u64 {
        let address = first + 16 * vector;
        // An interrupt gate to ring 0 code, for ring 0 alone, on IST 1. The image lies below 4 GiB.
        let gate = address & 0xffff | 0x08 << 16 | 1 << 32 | 0x8e << 40 | (address >> 16 & 0xffff) << 48;
        // SAFETY: only vCPU 0 runs yet, and no exception can come while the table changes.
        unsafe { entry::idt[vector as usize] = [gate, 0] };
    }
}

/// What the entry point of an exception leaves on the stack.
#[repr(C)]
pub(crate) struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Says what happened, in ring 0, and ends the run.
#[unsafe(no_mangle)]
extern "C" fn exception(frame: &Frame) -> ! {
    static DYING: AtomicBool = AtomicBool::new(false);
    if DYING.swap(true, SeqCst) {
        triple_fault();
    }
    let cr2: u64;
    // SAFETY: reading CR2 in ring 0 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) };
    let line = Line::new("exception").number("vector", frame.vector).hex("error", frame.error);
    let line = line.hex("rip", frame.rip).hex("cr2", cr2).hex("rsp", frame.rsp);
    line.number("ring", frame.cs & 3)
        .number("cpu", entry::cpu_of_stack(&raw const *frame as u64) as u64)
        .end();
    finish(status::EXCEPTION)
}

/// Enables interrupts on this vCPU, in ring 3 and whenever it goes to ring 0 from there.
pub(crate) fn enable_interrupts() {
    // SAFETY: everything is mapped alike in both rings, and nothing was ever allowed to interrupt.
    unsafe {
        entry::enter_ring0();
        entry::enter_ring3_interruptible();
    }
}

/// Comes to grief as asked.
pub(crate) fn crash(crash: Crash) {
    match crash {
        // SAFETY: nothing is mapped there, nor anywhere near.
        Crash::Fault => unsafe { (0x7000_0000_0000 as *mut u8).write_volatile(1) },
        Crash::Triple => triple_fault(),
        // SAFETY: ends in an exception, or in KVM's giving up.
        Crash::Emulation => unsafe {
            entry::enter_ring0();
            asm!("int3");
        },
        Crash::Halt => smp::sleep(),
    }
}

/// Stops the machine by the one way that every monitor must notice.
pub(crate) fn triple_fault() -> ! {
    // SAFETY: with an empty IDT the next exception is the last.
    unsafe {
        entry::enter_ring0();
        asm!("lidt [{}]", "ud2", in(reg) &[0u8; 10], options(noreturn))
    }
}
