//! The built-in guest's ledger, read from outside, and a harvest held against it.
//!
//! The guest enters every write with the epoch that the monitor has set ([`guest::abi`] has the layout and the
//! order of the guest's steps). With the vCPUs stopped at each boundary, the pages entered under epoch *e*
//! and the pages harvested for it are the same set, but for the one page per vCPU that was in flight at the
//! boundary before or after. So the comparison is exact, and one page lost or invented shows.
//!
//! What the guest says about itself is hostile like anything else that it writes: addresses are checked
//! before they are used, and an odd ledger is an error and nothing worse.

use std::ops::Range;
use std::sync::Arc;

use dirty_track::addr::{Gfn, PAGE_SIZE, PageRange, PageSize};
use dirty_track::bitmap::{self, PAGES_PER_WORD, words_for};
use dirty_track::tracker::Harvest;
use guest::abi::{Control, CpuControl, MAGIC, MAX_CPUS, page_holds};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::memory::{GuestRam, Ram};

/// Why a guest's ledger cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The control block is not one.
    #[error("the guest announced a control block at {0:#x} that is not one of this version")]
    NotOurs(u64),
    /// An address or size in the control block is not RAM.
    #[error(
        "the guest's control block says that {what} is at {gpa:#x} with {len:#x} bytes, which is not RAM"
    )]
    OutOfRam {
        /// Which part.
        what: &'static str,
        /// Its address.
        gpa: u64,
        /// Its size.
        len: u64,
    },
    /// Guest memory could not be accessed.
    #[error("cannot access the guest's ledger: {0}")]
    Access(#[from] GuestMemoryError),
}

/// How a harvest and the ledger compare, in pages of the workload region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    /// Pages that the guest wrote in the epoch, by its ledger.
    pub wrote: u64,
    /// Pages written and not reported. Anything but 0 is a lost write.
    pub missed: u64,
    /// Pages reported and not written.
    pub extra: u64,
    /// Those of `extra` that the guest only read in the epoch.
    pub extra_read: u64,
    /// Those of `extra` that the guest left alone, and which are reported because they are coarse, or because a
    /// page of the tracker's unit of report was written.
    pub extra_coarse: u64,
    /// Pages that were in flight at one of the epoch's ends and were left out of the comparison.
    pub in_flight: u64,
    /// Pages reported outside the region that are the guest kernel's own (image, stacks, page tables, ledger), that
    /// the host wrote, or that are coarse.
    pub kernel: u64,
    /// Pages reported outside both. The guest writes nothing there.
    pub stray: u64,
    /// The first page missed, extra or stray, if there is one.
    pub first_wrong: Option<u64>,
}

impl Agreement {
    /// Whether the harvest is just what the guest wrote.
    pub fn is_exact(&self) -> bool {
        self.missed == 0 && self.extra == 0 && self.stray == 0
    }
}

/// A guest's ledger.
#[derive(Debug)]
pub struct Ledger {
    ram: Arc<Ram>,
    control: u64,
    region: Range<u64>,
    kernel: Range<u64>,
    low_page: u64,
    writes: u64,
    reads: u64,
    cpus: usize,
    /// Pages in flight at the last boundary, as indices into the region.
    in_flight: Vec<u64>,
}

macro_rules! control_field {
    ($base:expr, $field:ident) => {
        control_field!($base, Control, $field)
    };
    ($base:expr, $of:ty, $field:ident) => {
        GuestAddress($base + std::mem::offset_of!($of, $field) as u64)
    };
}

impl Ledger {
    /// Reads the control block at `control`.
    ///
    /// # Errors
    /// [`LedgerError`], when it does not describe a ledger inside RAM.
    pub fn attach(ram: Arc<Ram>, control: u64) -> Result<Ledger, LedgerError> {
        let mem = ram.mem();
        let field = |at: GuestAddress| mem.read_obj::<u64>(at);
        let not_ours = || LedgerError::NotOurs(control);
        let whole = mem.check_range(GuestAddress(control), size_of::<Control>());
        if !whole || !control.is_multiple_of(PAGE_SIZE) || field(control_field!(control, magic))? != MAGIC {
            return Err(not_ours());
        }
        let pages = field(control_field!(control, region_pages))?;
        let part = |what, gpa: u64, len: Option<u64>| {
            let out = |len| LedgerError::OutOfRam { what, gpa, len };
            let len = len.ok_or(out(u64::MAX))?;
            let end = gpa.checked_add(len).ok_or(out(len))?;
            let inside = gpa.is_multiple_of(PAGE_SIZE) && mem.check_range(GuestAddress(gpa), len as usize);
            if inside { Ok(gpa..end) } else { Err(out(len)) }
        };
        let region =
            part("the region", field(control_field!(control, region_gpa))?, pages.checked_mul(PAGE_SIZE))?;
        let writes = part("writes", field(control_field!(control, writes_gpa))?, pages.checked_mul(8))?.start;
        let reads = part("reads", field(control_field!(control, reads_gpa))?, pages.checked_mul(4))?.start;
        let kernel =
            field(control_field!(control, kernel_start))?..field(control_field!(control, kernel_end))?;
        let low_page = field(control_field!(control, low_page))?;
        let cpus: u32 = mem.read_obj(control_field!(control, cpus))?;
        let cpus = (cpus as usize).min(MAX_CPUS);
        let mut ledger =
            Ledger { control, region, kernel, low_page, writes, reads, cpus, in_flight: Vec::new(), ram };
        ledger.in_flight = ledger.read_in_flight()?;
        Ok(ledger)
    }

    /// The epoch that the guest was told last; 0 if none.
    ///
    /// # Errors
    /// When the control block is not to be read.
    pub fn epoch(&self) -> Result<u32, LedgerError> {
        Ok(self.ram.mem().read_obj(control_field!(self.control, epoch))?)
    }

    /// Pages of the workload region.
    pub fn pages(&self) -> u64 {
        (self.region.end - self.region.start) / PAGE_SIZE
    }

    /// Tells the guest that epoch `epoch` begins. Stop the vCPUs for it, or the boundary is not sharp.
    ///
    /// # Errors
    /// When the control block is not to be written.
    pub fn begin(&mut self, epoch: u32) -> Result<(), LedgerError> {
        self.in_flight = self.read_in_flight()?;
        Ok(self.ram.mem().write_obj(epoch, control_field!(self.control, epoch))?)
    }

    /// Tells the guest to end its run.
    ///
    /// # Errors
    /// When the control block is not to be written.
    pub fn stop(&self) -> Result<(), LedgerError> {
        Ok(self.ram.mem().write_obj(1u32, control_field!(self.control, stop))?)
    }

    /// Accesses that the guest has made so far, reads and writes: how far it has come.
    ///
    /// # Errors
    /// When the control block is not to be read.
    pub fn accesses(&self) -> Result<u64, LedgerError> {
        let mut sum = 0;
        for cpu in 0..self.cpus {
            let at =
                self.control + (std::mem::offset_of!(Control, cpu) + cpu * size_of::<CpuControl>()) as u64;
            sum += self.ram.mem().read_obj::<u64>(control_field!(at, CpuControl, writes))?;
            sum += self.ram.mem().read_obj::<u64>(control_field!(at, CpuControl, reads))?;
        }
        Ok(sum)
    }

    /// Pages of the region that do not hold what the ledger says that they hold, by their frame numbers. The
    /// vCPUs must stand still; pages in flight are left out.
    ///
    /// # Errors
    /// When guest memory is not to be read.
    pub fn corrupt(&self) -> Result<Vec<u64>, LedgerError> {
        let in_flight = self.read_in_flight()?;
        let mut writes = Entries::<8>::new(self.ram.mem(), self.writes);
        let mut corrupt = Vec::new();
        let mut page = [0; PAGE_SIZE as usize];
        for index in 0..self.pages() {
            let generation = (u64::from_le_bytes(writes.get(index, self.pages())?) >> 32) as u32;
            if generation == 0 || in_flight.contains(&index) {
                continue;
            }
            let gpa = self.region.start + index * PAGE_SIZE;
            self.ram.mem().read_slice(&mut page, GuestAddress(gpa))?;
            if !page_holds(index, generation, &page) {
                corrupt.push(gpa / PAGE_SIZE);
            }
        }
        Ok(corrupt)
    }

    fn read_in_flight(&self) -> Result<Vec<u64>, LedgerError> {
        let first = std::mem::offset_of!(Control, cpu) + std::mem::offset_of!(CpuControl, in_flight);
        let mut pages = Vec::with_capacity(self.cpus);
        for cpu in 0..self.cpus {
            let at = self.control + (first + cpu * size_of::<CpuControl>()) as u64;
            let page: u64 = self.ram.mem().read_obj(GuestAddress(at))?;
            if page != 0 {
                pages.push(page - 1);
            }
        }
        Ok(pages)
    }

    /// What the guest entered under `epoch`, the one begun last. The vCPUs must stand still.
    ///
    /// # Errors
    /// When the ledger is not to be read.
    pub fn entered(&self, epoch: u32) -> Result<Entered, LedgerError> {
        let mut writes = Entries::<8>::new(self.ram.mem(), self.writes);
        let mut reads = Entries::<4>::new(self.ram.mem(), self.reads);
        let words = words_for(self.pages() as usize);
        let (mut wrote, mut read) = (vec![0; words], vec![0; words]);
        for page in 0..self.pages() {
            let (word, bit) = (page as usize / PAGES_PER_WORD, page as usize % PAGES_PER_WORD);
            wrote[word] |= u64::from(is_write_of(writes.get(page, self.pages())?, epoch)) << bit;
            let read_in = u32::from_le_bytes(reads.get(page, self.pages())?);
            read[word] |= u64::from(read_in == epoch.wrapping_add(1)) << bit;
        }
        let first = self.region.start / PAGE_SIZE;
        let mut in_flight = self.read_in_flight()?;
        in_flight.extend(&self.in_flight);
        in_flight.sort_unstable();
        in_flight.dedup();
        let mut own = vec![frames(&self.kernel)];
        if self.low_page != 0 {
            own.push(PageRange { start: Gfn(self.low_page / PAGE_SIZE), pages: 1 });
        }
        Ok(Entered {
            region: frames(&self.region),
            wrote,
            read,
            in_flight: in_flight.into_iter().map(|page| Gfn(first + page)).collect(),
            own,
        })
    }

    /// Holds `harvest` against what the guest entered under `epoch`. The vCPUs must have stood still since
    /// before the harvest. `unit` is the granularity that the harvest's tracker guarantees.
    ///
    /// # Errors
    /// When the ledger is not to be read.
    pub fn check(&self, harvest: &Harvest<'_>, epoch: u32, unit: PageSize) -> Result<Agreement, LedgerError> {
        let entered = self.entered(epoch)?;
        let excused = |gfn: &Gfn| entered.in_flight.contains(gfn);
        let mut found = Agreement { in_flight: entered.in_flight.len() as u64, ..Agreement::default() };
        for gfn in entered.written().flat_map(|run| run.iter()) {
            found.wrote += 1;
            if !harvest.contains(gfn) && !excused(&gfn) {
                found.missed += 1;
                found.first_wrong.get_or_insert(gfn.0);
            }
        }
        for gfn in harvest.runs().flat_map(|run| run.iter()) {
            if entered.region.contains(gfn) {
                if entered.holds(&entered.wrote, gfn) || excused(&gfn) {
                    continue;
                }
                found.extra += 1;
                if entered.holds(&entered.read, gfn) {
                    found.extra_read += 1;
                } else if harvest.is_coarse(gfn) || entered.wrote_near(gfn, unit) {
                    found.extra_coarse += 1;
                } else {
                    found.first_wrong.get_or_insert(gfn.0);
                }
            } else if entered.own.iter().any(|own| own.contains(gfn))
                || harvest.from_host(gfn)
                || harvest.is_coarse(gfn)
                || entered.wrote_near(gfn, unit)
            {
                found.kernel += 1;
            } else {
                found.stray += 1;
                found.first_wrong.get_or_insert(gfn.0);
            }
        }
        Ok(found)
    }
}

/// What the guest did in one epoch, by its ledger.
#[derive(Clone, Debug)]
pub struct Entered {
    /// The workload's pages.
    pub region: PageRange,
    /// Those of them that were written: one bit a page, counted from the region's first.
    pub wrote: Vec<u64>,
    /// Those that were read, likewise.
    pub read: Vec<u64>,
    /// Those that were in flight at one of the epoch's ends.
    pub in_flight: Vec<Gfn>,
    /// Pages outside the region that the guest kernel writes without an entry.
    pub own: Vec<PageRange>,
}

impl Entered {
    fn holds(&self, words: &[u64], gfn: Gfn) -> bool {
        let page = (gfn.0 - self.region.start.0) as usize;
        words[page / PAGES_PER_WORD] >> (page % PAGES_PER_WORD) & 1 != 0
    }

    /// Whether the unit of report that `gfn` is in has a page that the guest wrote, or may have written.
    fn wrote_near(&self, gfn: Gfn, unit: PageSize) -> bool {
        let leaves = unit.leaves();
        if leaves == 1 {
            return false;
        }
        let first = gfn.0 - gfn.0 % leaves;
        let shared = |range: &PageRange| range.start.0 < first + leaves && range.end().0 > first;
        let written = |page: Gfn| self.region.contains(page) && self.holds(&self.wrote, page);
        self.own.iter().any(shared)
            || self.in_flight.iter().any(|page| (first..first + leaves).contains(&page.0))
            || (first..first + leaves).map(Gfn).any(written)
    }

    fn written(&self) -> impl Iterator<Item = PageRange> + '_ {
        let first = self.region.start.0;
        bitmap::runs(&self.wrote)
            .map(move |run| PageRange { start: Gfn(first + run.start as u64), pages: run.len() as u64 })
    }
}

/// The frames of a range of addresses, the first of which is a page's.
fn frames(bytes: &Range<u64>) -> PageRange {
    PageRange {
        start: Gfn(bytes.start / PAGE_SIZE),
        pages: bytes.end.div_ceil(PAGE_SIZE).saturating_sub(bytes.start / PAGE_SIZE),
    }
}

/// Whether an entry of `writes` is of a write in `epoch` (see [`guest::abi`]).
fn is_write_of(entry: [u8; 8], epoch: u32) -> bool {
    let entry = u64::from_le_bytes(entry);
    entry as u32 == epoch && entry >> 32 != 0
}

/// An array of `N`-byte entries in guest memory, read a window at a time, so that the ledger of a large guest
/// takes no memory of the monitor.
struct Entries<'a, const N: usize> {
    mem: &'a GuestRam,
    base: u64,
    window: Vec<u8>,
    /// Index of the first entry in the window.
    start: u64,
}

/// Entries in a window.
const WINDOW: u64 = 4096;

impl<'a, const N: usize> Entries<'a, N> {
    fn new(mem: &'a GuestRam, base: u64) -> Self {
        Entries { mem, base, window: Vec::new(), start: 0 }
    }

    /// Entry `index` of `count`; fast when the indices ascend.
    fn get(&mut self, index: u64, count: u64) -> Result<[u8; N], GuestMemoryError> {
        let loaded = (self.window.len() / N) as u64;
        if index < self.start || index >= self.start + loaded {
            self.start = index - index % WINDOW;
            self.window.resize(WINDOW.min(count - self.start) as usize * N, 0);
            self.mem.read_slice(&mut self.window, GuestAddress(self.base + self.start * N as u64))?;
        }
        let (entries, _) = self.window.as_chunks::<N>();
        Ok(entries[(index - self.start) as usize])
    }
}
