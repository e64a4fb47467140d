//! Time, by the TSC.

use core::arch::x86_64::{__cpuid, _rdtsc};

use crate::cmdline::Config;
use crate::io::{in8, out8};

/// Now, in TSC cycles.
pub(crate) fn now() -> u64 {
    // SAFETY: the TSC is readable in ring 3 unless CR4.TSD is set, which nobody does.
    unsafe { _rdtsc() }
}

/// Cycles in a millisecond: as the command line says, else as the processor says, else measured against the
/// PIT where something depends on it. 0 when none of them knows.
pub(crate) fn tsc_khz(config: &Config) -> u64 {
    if config.tsc_khz > 0 {
        return config.tsc_khz;
    }
    let hypervisor = __cpuid(1).ecx >> 31 & 1 == 1;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = u64::from(__cpuid(0x4000_0010).eax);
        if khz > 0 {
            return khz;
        }
    }
    if __cpuid(0).eax >= 0x15 {
        let ratio = __cpuid(0x15);
        let (denominator, numerator, crystal) = (ratio.eax, ratio.ebx, ratio.ecx);
        if denominator > 0 && numerator > 0 && crystal > 0 {
            return u64::from(crystal) * u64::from(numerator) / u64::from(denominator) / 1000;
        }
    }
    measure()
}

/// Counts cycles while channel 2 of the PIT (1193182 Hz) counts down 10 ms.
fn measure() -> u64 {
    const TICKS: u16 = 11932;
    let gate = in8(0x61);
    // Gate on, speaker off; channel 2, both bytes, mode 0 (output rises at the end of the count).
    out8(0x61, gate & !2 | 1);
    out8(0x43, 0xb0);
    out8(0x42, TICKS as u8);
    let start = now();
    out8(0x42, (TICKS >> 8) as u8);
    let mut polls = 0;
    while in8(0x61) & 0x20 == 0 {
        polls += 1;
        if polls == 1_000_000 {
            return 0;
        }
    }
    let cycles = now() - start;
    out8(0x61, gate);
    // Without a PIT the output reads as high at once.
    if polls < 10 { 0 } else { cycles / 10 }
}
