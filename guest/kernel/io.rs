//! Port I/O, which ring 3 may do here as well as ring 0.

use core::arch::asm;

use crate::abi::{DOORBELL_PORT, Doorbell};

/// Writes a byte to a port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: no port that this kernel knows of makes a device touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from a port.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Rings the doorbell. All that was stored before is seen by a monitor that answers to it.
pub(crate) fn ring(bell: Doorbell, payload: u32) {
    // SAFETY: as above; not `nomem`, so the compiler finishes all stores first.
    unsafe {
        asm!("out dx, eax", in("dx") DOORBELL_PORT, in("eax") bell.encode(payload), options(nostack, preserves_flags));
    }
}
