//! The other vCPUs: how they are started, wait for the signal to work, and go to sleep.

use core::arch::asm;
use core::ptr::{copy_nonoverlapping, read_volatile, write_volatile};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use crate::abi::Doorbell;
use crate::{Machine, clock, entry, io};

/// The local APIC's interrupt command register, lower half: a write to it sends.
const COMMAND: *mut u32 = 0xfee0_0300 as *mut u32;
/// To all but the sender; level-triggered assert.
const INIT: u32 = 0x000c_4500;
/// Likewise; the low byte is the number of the page where execution begins.
const STARTUP: u32 = 0x000c_4600;
/// The command has not been taken yet.
const PENDING: u32 = 1 << 12;

/// Cycles to wait before a second start-up command, and before giving up: some milliseconds, then at least
/// some seconds at any clock rate that a TSC has.
const AGAIN: u64 = 20_000_000;
const PATIENCE: u64 = 40_000_000_000;

static ARRIVED: AtomicU32 = AtomicU32::new(0);
static GO: AtomicBool = AtomicBool::new(false);
static PREPARED: AtomicU32 = AtomicU32::new(0);
static BEGUN: AtomicBool = AtomicBool::new(false);

/// Starts as many vCPUs as are wanted and waits for them in ring 3. The error is how many there are in all.
pub(crate) fn start(machine: &Machine) -> Result<(), u32> {
    let others = machine.config.cpus - 1;
    if others == 0 {
        return Ok(());
    }
    // SAFETY: the page below 1 MiB is RAM, and what the monitor may have left there has been copied. The other
    // vCPUs are not running yet.
    unsafe {
        let (from, end) = (&raw const entry::trampoline_start, &raw const entry::trampoline_end);
        copy_nonoverlapping(from, entry::TRAMPOLINE as *mut u8, end as usize - from as usize);
        entry::cpus_wanted = machine.config.cpus;
    }
    send(INIT);
    let startup = STARTUP | (entry::TRAMPOLINE as u32 >> 12);
    send(startup);
    let begin = clock::now();
    let mut repeated = false;
    while ARRIVED.load(SeqCst) < others {
        let waited = clock::now() - begin;
        if waited > PATIENCE {
            return Err(1 + ARRIVED.load(SeqCst));
        }
        if waited > AGAIN && !repeated {
            repeated = true;
            send(startup);
        }
        core::hint::spin_loop();
    }
    Ok(())
}

fn send(command: u32) {
    // SAFETY: the local APIC's page is mapped, uncached, in both rings.
    unsafe {
        write_volatile(COMMAND, command);
        while read_volatile(COMMAND) & PENDING != 0 {
            core::hint::spin_loop();
        }
    }
}

/// Lets all vCPUs work.
pub(crate) fn go() {
    GO.store(true, SeqCst);
}

/// Called by a vCPU that has come; returns when it may work.
pub(crate) fn arrive() {
    ARRIVED.fetch_add(1, SeqCst);
    while !GO.load(SeqCst) {
        core::hint::spin_loop();
    }
}

/// Returns when all vCPUs have called it and the monitor has been told by vCPU 0.
pub(crate) fn begin_together(cpus: u32, cpu: u32) {
    PREPARED.fetch_add(1, SeqCst);
    if cpu == 0 {
        while PREPARED.load(SeqCst) < cpus {
            core::hint::spin_loop();
        }
        io::ring(Doorbell::Begin, 0);
        BEGUN.store(true, SeqCst);
    }
    while !BEGUN.load(SeqCst) {
        core::hint::spin_loop();
    }
}

/// The end of a vCPU other than 0.
pub(crate) fn sleep() -> ! {
    // SAFETY: nothing was ever allowed to interrupt, so nothing ends the halt but an NMI.
    unsafe {
        entry::enter_ring0();
        loop {
            asm!("hlt", options(nomem, nostack));
        }
    }
}
