//! The guest's own page tables: x86-64, 4 or 5 levels, as a table that is only read.
//!
//! They lie in guest memory, and the guest writes there what it likes: entries that point outside RAM, at each other or
//! at themselves, with reserved bits set. Nothing of that is an error. What the processor would not use as a
//! translation is a hole here too, and the malformed entries are [counted](GuestTables::malformed). Loops are legal
//! (operating systems map their own tables by one), and make an address space of up to 2^56 bytes out of one page, so
//! the number of looks is limited; beyond it the walk ends in [`X86Error::TooLong`], which says where.
//!
//! Every look begins at the root and reads one entry of each level, each in one load. A guest that runs may change them
//! in between, as it may between two steps of the processor's own walk.
//!
//! Not looked at: protection keys, shadow stacks, linear-address masking. 1 GiB entries are taken to be
//! supported by the guest's processor.
//!
//! Source: Intel SDM volume 3, chapter 4 (4.5, tables 4-14 to 4-20); AMD APM volume 2, chapter 5. Bit 8 of the upper
//! levels is reserved with AMD and ignored by Intel; here it is ignored.

use std::cell::Cell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::MS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{HugeEntry, Look, OutOfMemory, Table};
use crate::addr::{Gfn, PAGE_BYTES, PAGE_SHIFT, PageSize};

/// Pages of 64 bits of addresses.
const ALL_PAGES: u64 = 1 << (u64::BITS - PAGE_SHIFT);

/// Bits of an address that one level translates.
const LEVEL_BITS: u32 = 9;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51..12: where the entry points to. The largest physical address that the architecture has room for.
const ADDRESS: u64 = (1 << MOST_PHYS_BITS) - (1 << PAGE_SHIFT);
const MOST_PHYS_BITS: u32 = 52;

/// Why the guest's tables cannot be walked, or not to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum X86Error {
    /// No processor has such addresses.
    #[error(
        "{0} is no width of physical addresses: give the guest's MAXPHYADDR (CPUID 0x80000008), 32 to 52"
    )]
    PhysBits(u32),
    /// The limit on looks is used up.
    #[error(
        "the guest's page tables map too much to be walked with the looks that were allowed: \
             walk on from virtual page {page:#x}, or allow more"
    )]
    TooLong {
        /// Virtual page that would have been next: an address divided by 4096.
        page: u64,
    },
}

/// What a vCPU's registers say about paging. CR0.PG and EFER.LMA are taken to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR3. Flags and PCID in it are ignored.
    pub cr3: u64,
    /// CR4.LA57: 5 levels.
    pub la57: bool,
    /// EFER.NXE. Without it the no-execute bit is a reserved one.
    pub nxe: bool,
    /// MAXPHYADDR of the guest's CPUID: bits of a physical address, 32 to 52.
    pub maxphyaddr: u32,
}

/// What an entry of the guest's last level says, together with those above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Frame of its first page. It need not be RAM.
    pub gfn: Gfn,
    /// All levels allow writes.
    pub writable: bool,
    /// All levels allow user mode.
    pub user: bool,
    /// Some level forbids execution.
    pub no_execute: bool,
    /// The processor used it since the guest cleared this.
    pub accessed: bool,
    /// The processor wrote through it since the guest cleared this.
    pub dirty: bool,
}

/// The page tables of one address space of a guest. Pages are virtual addresses divided by 4096; those of the upper
/// half lie at the end of 52 bits, as their addresses at that of 64.
///
/// A look answers with what was there during the look.
#[derive(Debug)]
pub struct GuestTables<'m, M> {
    memory: &'m M,
    paging: Paging,
    looks_left: Cell<u64>,
    malformed: Cell<u64>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    NotPresent,
    /// The processor would fault on it because of a reserved bit.
    Malformed,
    Table(u64),
    /// Address of what it maps.
    Page(u64),
}

/// What the levels above an entry allow, in the entries' own bits.
#[derive(Clone, Copy)]
struct Rights(u64);

impl Rights {
    const ALL: Rights = Rights(WRITABLE | USER);

    /// Together with those of `entry`.
    fn below(self, entry: u64) -> Rights {
        Rights(self.0 & entry & (WRITABLE | USER) | (self.0 | entry) & NO_EXECUTE)
    }
}

impl Paging {
    /// First page that is not in the lower half.
    fn half(self) -> u64 {
        1 << (LEVEL_BITS * self.levels() - 1)
    }

    fn levels(self) -> u32 {
        if self.la57 { 5 } else { 4 }
    }

    /// Reads an entry of `level`; 0 is the last.
    fn decode(self, level: u32, entry: u64) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::NotPresent;
        }
        let is_page = level == 0 || entry & LARGE != 0 && level <= 2;
        let mut reserved = ADDRESS & !((1 << self.maxphyaddr) - 1);
        if !self.nxe {
            reserved |= NO_EXECUTE;
        }
        if level > 2 {
            reserved |= LARGE;
        }
        let size = 1u64 << (PAGE_SHIFT + LEVEL_BITS * level);
        if is_page && level > 0 {
            // Between the PAT bit (12) and the address.
            reserved |= size - (1 << 13);
        }
        match entry & reserved {
            0 if is_page => Entry::Page(entry & ADDRESS & !(size - 1)),
            0 => Entry::Table(entry & ADDRESS),
            _ => Entry::Malformed,
        }
    }
}

impl<'m, M: GuestMemoryBackend> GuestTables<'m, M> {
    /// The tables that `paging` points to in `memory`. A walk over them may take `looks` looks: one for each huge
    /// entry, each run of leaves that map neighbouring frames and each run of holes, of one table each.
    ///
    /// # Errors
    /// [`X86Error::PhysBits`].
    pub fn new(memory: &'m M, paging: Paging, looks: u64) -> Result<GuestTables<'m, M>, X86Error> {
        if !(32..=MOST_PHYS_BITS).contains(&paging.maxphyaddr) {
            return Err(X86Error::PhysBits(paging.maxphyaddr));
        }
        Ok(GuestTables { memory, paging, looks_left: Cell::new(looks), malformed: Cell::new(0) })
    }

    /// All pages that there are.
    pub fn pages(&self) -> Range<u64> {
        0..ALL_PAGES
    }

    /// Entries that were met until now and that are present but not valid: a reserved bit is set in them, or they
    /// point to a table that is not in RAM. The same entry counts each time that it is met.
    pub fn malformed(&self) -> u64 {
        self.malformed.get()
    }

    fn count_malformed(&self) {
        self.malformed.set(self.malformed.get() + 1);
    }

    /// The table at `address`; `None` when not all of it is in RAM.
    fn table(&self, address: u64) -> Option<Entries<'m, M>> {
        self.memory.get_slice(GuestAddress(address), PAGE_BYTES).ok().map(Entries)
    }
}

/// A page table in guest memory.
struct Entries<'m, M: GuestMemoryBackend + ?Sized>(VolatileSlice<'m, MS<'m, M>>);

impl<M: GuestMemoryBackend> Entries<'_, M> {
    /// Entry `index`, below 512, in one load. `None` only where the monitor mapped guest memory out of alignment.
    fn get(&self, index: u64) -> Option<u64> {
        self.0.load(index as usize * size_of::<u64>(), Ordering::Relaxed).ok()
    }

    /// Index after the last of the entries from `index` on, below `end`, for which `go_on` holds; the one at `index`
    /// is not asked.
    fn run(&self, index: u64, end: u64, go_on: impl Fn(u64, u64) -> bool) -> u64 {
        (index + 1..end).find(|&next| !self.get(next).is_some_and(|entry| go_on(next, entry))).unwrap_or(end)
    }
}

impl<M: GuestMemoryBackend> Table for GuestTables<'_, M> {
    type Huge = Mapping;
    type Leaf = Mapping;
    type Descend = Infallible;
    type Error = X86Error;

    fn look(&self, pages: Range<u64>) -> Result<Look<Mapping, Mapping>, X86Error> {
        let page = pages.start;
        let left = self.looks_left.get().checked_sub(1).ok_or(X86Error::TooLong { page })?;
        self.looks_left.set(left);

        let half = self.paging.half();
        if page >= ALL_PAGES {
            return Ok(Look::Hole { end: u64::MAX });
        }
        if (half..ALL_PAGES - half).contains(&page) {
            return Ok(Look::Hole { end: ALL_PAGES - half });
        }
        // A hole of the root's table may reach from the lower half into what no address is canonical in: a hole too.
        let most = pages.end.min(ALL_PAGES);

        let mut table = self.paging.cr3 & ADDRESS & ((1 << self.paging.maxphyaddr) - 1);
        let mut rights = Rights::ALL;
        let mut level = self.paging.levels();
        loop {
            level -= 1;
            let span = 1u64 << (LEVEL_BITS * level);
            let index = page / span % (1 << LEVEL_BITS);
            // First page of entry 0 of this table, and the entry that `most` is in or at the end of.
            let base = page - page % span - index * span;
            let last = ((most - base).div_ceil(span)).min(1 << LEVEL_BITS);
            let entries = self.table(table);
            let Some((entries, entry)) = entries.and_then(|all| all.get(index).map(|entry| (all, entry)))
            else {
                self.count_malformed();
                return Ok(Look::Hole { end: (base + (span << LEVEL_BITS)).min(most) });
            };
            match self.paging.decode(level, entry) {
                Entry::Table(below) => {
                    table = below;
                    rights = rights.below(entry);
                }
                Entry::Page(gpa) => {
                    let rights = rights.below(entry);
                    let mapping = Mapping {
                        gfn: Gfn(gpa >> PAGE_SHIFT),
                        writable: rights.0 & WRITABLE != 0,
                        user: rights.0 & USER != 0,
                        no_execute: rights.0 & NO_EXECUTE != 0,
                        accessed: entry & ACCESSED != 0,
                        dirty: entry & DIRTY != 0,
                    };
                    let size = match level {
                        0 => {
                            // Bit for bit the same but for the address, which goes up by a page each time.
                            let end = entries.run(index, last, |next, other| {
                                let follows = Entry::Page(gpa + ((next - index) << PAGE_SHIFT));
                                other & !ADDRESS == entry & !ADDRESS
                                    && self.paging.decode(0, other) == follows
                            });
                            return Ok(Look::Leaves { end: base + end, leaf: mapping });
                        }
                        1 => PageSize::M2,
                        _ => PageSize::G1,
                    };
                    return Ok(Look::Huge { size, huge: mapping });
                }
                empty @ (Entry::NotPresent | Entry::Malformed) => {
                    if empty == Entry::Malformed {
                        self.count_malformed();
                    }
                    let not_present = |_, other| self.paging.decode(level, other) == Entry::NotPresent;
                    let end = entries.run(index, last, not_present);
                    return Ok(Look::Hole { end: (base + end * span).min(most) });
                }
            }
        }
    }

    fn split(&self, _: &HugeEntry<Mapping>, how: Infallible) -> Result<(), OutOfMemory> {
        match how {}
    }
}

#[cfg(test)]
pub(super) mod tests;
