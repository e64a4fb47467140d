//! What the built-in guest and its monitor agree on: one port, one control block, one ledger.
//!
//! This file is compiled twice, into the `guest` library that the monitor links and into the guest kernel
//! itself, so both sides read the same definitions. Everything is little-endian x86-64 memory, `repr(C)`.
//!
//! # How a run goes
//! 1. The kernel boots by PVH and writes one byte to COM1 (0x3f8) as its first act.
//! 2. It fills in the [`Control`] block and rings [`DOORBELL_PORT`] with [`Doorbell::Announce`]. A monitor
//!    that is not ours ignores the port; the guest does not depend on an answer.
//! 3. Every vCPU enters its workload; vCPU 0 rings [`Doorbell::Ready`] when it is in ring 3.
//! 4. Passes run. A pass may end with [`Doorbell::Pass`] (`barrier=on`): the vCPU stops in that exit for as
//!    long as the monitor likes, which makes a moment without a write in flight.
//! 5. The monitor may raise [`Control::stop`]; the guest then ends after the write in progress.
//! 6. The guest prints its results and rings [`Doorbell::Done`], then resets the machine through the i8042.
//!
//! # The ledger
//! Page `i` of the workload region has a write entry and a read entry:
//! * `writes[i]`, a `u64`: `generation << 32 | epoch`, where `generation` counts the writes to the page
//!   (0: never written) and `epoch` is the value of [`Control::epoch`] at its last write.
//! * `reads[i]`, a `u32`: the epoch of the page's last read *by a workload that reads*, plus one (0: never
//!   read). A write is not a read.
//!
//! The order of one write, by the one vCPU that owns the page (pages are sharded over the vCPUs, in
//! contiguous runs, so no page has two writers):
//! `cpu.in_flight = i + 1` → `epoch` is read → `writes[i] = new entry` → the stamp goes to the page →
//! `cpu.in_flight = 0`. The epoch is read while the page is in flight, never before: otherwise a vCPU that is
//! stopped in between would enter a write under an epoch that is over. A monitor that stops the vCPU anywhere
//! therefore knows that every page but the one in flight is truthfully entered, and of the one in flight that
//! its entry and its write may lie on either side of the stop.
//! A read goes the same way, with `reads[i]` in the place of `writes[i]`.
//!
//! # The stamp
//! Write number `g` of page `i` stores [`stamp`]`(i, g)` as a `u64` at byte [`stamp_offset`]`(g)` of the page.
//! A page that was never written is zero. So any copy of a page can be checked against its ledger entry.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// I/O port (32-bit writes) by which the guest speaks to its monitor. Unassigned on a PC, so any other
/// monitor drops the write.
pub const DOORBELL_PORT: u16 = 0x5d0;

/// What a doorbell write means: the low 4 bits of the value; the other 28 are its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Doorbell {
    /// The value with its low 4 bits cleared is the guest-physical address of the [`Control`] block
    /// ([`Doorbell::decode`] gives it shifted right by 4).
    Announce = 1,
    /// vCPU 0 is in ring 3, and all vCPUs are there. No payload.
    Ready = 2,
    /// A vCPU ended a pass. Payload: the vCPU's number.
    Pass = 3,
    /// The run is over. Payload: one of the [`status`] values.
    Done = 4,
    /// All vCPUs have touched their pages, if they were to, and begin their workloads when this exit returns.
    /// No payload.
    Begin = 5,
}

impl Doorbell {
    /// The kind of a value written to [`DOORBELL_PORT`]; `None` for one that no guest of ours writes.
    pub fn decode(value: u32) -> Option<(Doorbell, u32)> {
        let kind = match value & 0xf {
            1 => Doorbell::Announce,
            2 => Doorbell::Ready,
            3 => Doorbell::Pass,
            4 => Doorbell::Done,
            5 => Doorbell::Begin,
            _ => return None,
        };
        Some((kind, value >> 4))
    }

    /// The value to write for this kind with `payload` (28 bits; higher ones are lost).
    pub const fn encode(self, payload: u32) -> u32 {
        (payload << 4) | self as u32
    }
}

/// How a run ended: the payload of [`Doorbell::Done`].
pub mod status {
    /// All is well.
    pub const GOOD: u32 = 0;
    /// A page did not hold what the ledger says.
    pub const CORRUPT: u32 = 1;
    /// The command line, or the machine, does not allow what was asked for.
    pub const UNABLE: u32 = 2;
    /// The processor raised an exception that the guest did not expect.
    pub const EXCEPTION: u32 = 3;
}

/// [`Control::magic`] of a guest that speaks this version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"DTGUEST1");

/// Most vCPUs that the guest starts; more are left asleep.
pub const MAX_CPUS: usize = 64;

/// The block in guest memory, 4 KiB aligned, through which monitor and guest see each other's state.
/// The monitor writes `epoch` and `stop` only; everything else is the guest's.
#[repr(C, align(4096))]
pub struct Control {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// Current epoch, set by the monitor; 0 until it does.
    pub epoch: AtomicU32,
    /// Non-zero: end the run after the write in progress. Set by the monitor.
    pub stop: AtomicU32,
    /// vCPUs that run workloads.
    pub cpus: AtomicU32,
    /// Passes completed by vCPU 0.
    pub passes: AtomicU32,
    /// Guest-physical address of the workload region, 2 MiB aligned and contiguous below or above the
    /// 32-bit hole, never across it.
    pub region_gpa: AtomicU64,
    /// Pages of 4 KiB in the region.
    pub region_pages: AtomicU64,
    /// Guest-physical address of the ledger's `writes` array, 4 KiB aligned.
    pub writes_gpa: AtomicU64,
    /// Guest-physical address of the ledger's `reads` array, 4 KiB aligned.
    pub reads_gpa: AtomicU64,
    /// First byte and one past the last byte of all memory besides the region that the guest writes (image,
    /// stacks, page tables, ledger). What is dirty outside the region lies in here.
    pub kernel_start: AtomicU64,
    /// See `kernel_start`.
    pub kernel_end: AtomicU64,
    /// Guest-physical address of the one page below 1 MiB that the guest writes as well, to start its other
    /// vCPUs; 0 when it does not.
    pub low_page: AtomicU64,
    /// Per vCPU.
    pub cpu: [CpuControl; MAX_CPUS],
}

/// One vCPU's part of [`Control`], on a cache line of its own.
#[repr(C, align(64))]
pub struct CpuControl {
    /// Index of the region page being written or read, plus one; 0 when none is.
    pub in_flight: AtomicU64,
    /// Pages written so far (each write counts).
    pub writes: AtomicU64,
    /// Pages read so far.
    pub reads: AtomicU64,
    /// Page faults that the guest's own handler has served.
    pub faults: AtomicU64,
    /// Pages found not to hold what the ledger says.
    pub corrupt: AtomicU64,
}

/// A well-mixed function of `x` (the finaliser of SplitMix64).
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What write number `generation` (from 1) stores in page `page` of the region. Never 0.
pub const fn stamp(page: u64, generation: u32) -> u64 {
    mix(page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((generation as u64) << 40)) | 1
}

/// Words of 8 bytes in a page, each the place of one stamp.
pub const WORDS: usize = 512;

/// Where in the page write number `generation` stores its stamp: a byte offset, a multiple of 8 below 4096.
/// It moves from write to write, so that a stale part of a page cannot pass for a fresh one, and takes all
/// [`WORDS`] places before it comes to one again.
pub const fn stamp_offset(generation: u32) -> usize {
    (generation.wrapping_mul(0x9e37_79b1) as usize % WORDS) * 8
}

/// Whether `bytes` are the whole and exact content of page `page` after write number `generation` (0: never
/// written). False when they are not 4096 bytes.
pub fn page_holds(page: u64, generation: u32, bytes: &[u8]) -> bool {
    let mut expected = [0u64; WORDS];
    for g in generation.saturating_sub(WORDS as u32 - 1).max(1)..=generation {
        expected[stamp_offset(g) / 8] = stamp(page, g);
    }
    bytes.len() == 8 * WORDS && bytes.chunks_exact(8).zip(expected).all(|(word, e)| word == e.to_le_bytes())
}

/// The pages of the region that vCPU `cpu` of `cpus` owns, as a half-open range: contiguous, in whole 2 MiB
/// blocks where there are enough of them, and empty only if there are fewer pages than vCPUs.
pub const fn shard(pages: u64, cpus: u64, cpu: u64) -> (u64, u64) {
    let unit = if pages / 512 >= cpus { 512 } else { 1 };
    let end = if cpu + 1 == cpus { pages } else { pages / unit * (cpu + 1) / cpus * unit };
    (pages / unit * cpu / cpus * unit, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells_survive_the_port() {
        for bell in [Doorbell::Announce, Doorbell::Ready, Doorbell::Pass, Doorbell::Done] {
            assert_eq!(Doorbell::decode(bell.encode(0xfff_ffff)), Some((bell, 0xfff_ffff)));
        }
        assert_eq!(Doorbell::decode(0), None);
        assert_eq!(Doorbell::decode(0xffff_ffff), None);
    }

    #[test]
    fn the_control_block_is_laid_out_as_documented() {
        assert_eq!(align_of::<Control>(), 4096);
        assert_eq!(size_of::<CpuControl>(), 64);
        assert_eq!(core::mem::offset_of!(Control, epoch), 8);
        assert_eq!(core::mem::offset_of!(Control, region_gpa), 24);
        assert_eq!(core::mem::offset_of!(Control, low_page), 72);
        assert_eq!(core::mem::offset_of!(Control, cpu), 128);
    }

    #[test]
    fn stamps_are_distinct_and_never_zero() {
        let mut seen = std::collections::HashSet::new();
        for page in [0, 1, 2, 511, 512, (1 << 24) - 1, 1 << 40] {
            for generation in 1..2000 {
                assert_ne!(stamp(page, generation), 0);
                assert!(seen.insert(stamp(page, generation)), "page {page} generation {generation}");
            }
        }
    }

    #[test]
    fn stamps_go_through_all_places_of_a_page() {
        for start in [1, 77, u32::MAX - 600] {
            let places: std::collections::HashSet<_> = (start..start + 512).map(stamp_offset).collect();
            assert_eq!(places.len(), WORDS);
            assert!(places.iter().all(|place| place % 8 == 0 && *place < 4096));
        }
    }

    #[test]
    fn a_page_holds_its_content_and_nothing_else() {
        for last in [0, 1, 2, 511, 512, 513, 3000] {
            // What a guest does, write by write.
            let mut page = vec![0u8; 4096];
            for generation in 1..=last {
                let place = stamp_offset(generation);
                page[place..place + 8].copy_from_slice(&stamp(9, generation).to_le_bytes());
            }
            assert!(page_holds(9, last, &page));
            assert!(!page_holds(9, last + 1, &page), "a lost write must show");
            assert!(last == 0 || !page_holds(10, last, &page));
            assert!(!page_holds(9, last, &page[..4088]));
            for byte in [0, 8, 2048, 4095] {
                page[byte] ^= 0x40;
                assert!(!page_holds(9, last, &page), "generation {last}, byte {byte}");
                page[byte] ^= 0x40;
            }
        }
    }

    #[test]
    fn shards_tile_the_region() {
        for pages in [1, 2, 63, 64, 511, 512, 513, 4096, 260_608, 15_990_784] {
            for cpus in 1..=MAX_CPUS as u64 {
                let mut next = 0;
                for cpu in 0..cpus {
                    let (first, end) = shard(pages, cpus, cpu);
                    assert_eq!(first, next);
                    assert!(end > first || pages < cpus, "{pages} pages, vCPU {cpu} of {cpus}");
                    assert!(pages < 512 * cpus || first % 512 == 0);
                    next = end;
                }
                assert_eq!(next, pages);
            }
        }
    }
}
