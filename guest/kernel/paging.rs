//! The window through which the workloads see the region: a top-level page-table entry of its own.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::abi::shard;
use crate::cmdline::Mapping;
use crate::layout::{BLOCK, PAGE};
use crate::{CONTROL, MACHINE, Machine, entry};

/// Where the region's first page is mapped.
pub(crate) const WINDOW: u64 = 1 << 39;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const HUGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;
const LEAF: u64 = PRESENT | WRITABLE | USER;

/// Entry `index` of the page table, or of the run of tables of one level, at `table`.
fn entry(table: u64, index: u64) -> &'static AtomicU64 {
    // SAFETY: the tables lie in the kernel's part of RAM, which is mapped one to one and theirs alone.
    unsafe { &*((table + 8 * index) as *const AtomicU64) }
}

/// Builds the window's tables down to the level that is mapped from the start, and links them in.
pub(crate) fn open_window(machine: &Machine) {
    let layout = &machine.layout;
    let directories = layout.tables + PAGE;
    let blocks = layout.pages.div_ceil(512);
    for block in 0..blocks {
        let value = match machine.config.map {
            Mapping::Huge => layout.region + block * BLOCK + (LEAF | HUGE | ACCESSED | DIRTY),
            Mapping::Small | Mapping::Lazy => layout.leaves + block * PAGE + TABLE,
        };
        entry(directories, block).store(value, Relaxed);
    }
    for index in 0..blocks.div_ceil(512) {
        entry(layout.tables, index).store(directories + index * PAGE + TABLE, Relaxed);
    }
    if machine.config.map == Mapping::Lazy {
        // SAFETY: read by the fault handler, which has no fault to serve yet.
        unsafe { entry::lazy_bytes = layout.pages * PAGE };
    }
    entry(&raw const entry::pml4 as u64, WINDOW >> 39).store(layout.tables + TABLE, Relaxed);
}

/// Fills in the page tables of `cpu`'s shard, where small pages are mapped from the start.
pub(crate) fn map_shard(machine: &Machine, cpu: u64) {
    if machine.config.map != Mapping::Small {
        return;
    }
    let layout = &machine.layout;
    let (first, end) = shard(layout.pages, u64::from(machine.config.cpus), cpu);
    for page in first..end {
        entry(layout.leaves, page).store(layout.region + page * PAGE + LEAF, Relaxed);
    }
}

/// Serves the page fault at byte `offset` of the window: maps the page young and, around it, the others of
/// its aligned window that are not mapped yet, old. Called from [`entry`], on the stack of the code that
/// faulted.
#[unsafe(no_mangle)]
extern "C" fn serve_fault(offset: u64, stack: u64) {
    let Machine { config, layout, .. } = MACHINE.get();
    let page = offset / PAGE;
    let first = page & !(config.around - 1);
    for index in first..(first + config.around).min(layout.pages) {
        let age = if index == page { ACCESSED } else { 0 };
        // Another vCPU may be at it as well; whoever comes first is right.
        _ = entry(layout.leaves, index).compare_exchange(
            0,
            layout.region + index * PAGE + LEAF + age,
            Relaxed,
            Relaxed,
        );
    }
    let faults = &CONTROL.cpu[entry::cpu_of_stack(stack)].faults;
    faults.store(faults.load(Relaxed) + 1, Relaxed);
}
