//! Guest RAM: how much, on which pages, and what the kernel really gave.
//!
//! RAM is up to three mappings, one per memslot ([`layout::FIRST_SLOT`]), each aligned so that a huge page of
//! the host can be a huge page of the guest. Nothing is touched here, so a guest of 64 GiB costs what one of
//! 64 MiB does.
//!
//! The first 2 MiB are kept on small pages even with `huge=thp`. A guest boots there and touches a few dozen
//! pages; clearing a whole huge page for them would be most of the time to its first instruction (0.3 ms to
//! 2.4 ms, measured on a nested host), and the legacy holes below 1 MiB would split the block anyway.

use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use dirty_track::addr::{Gpa, PAGE_SIZE, PageRange};
use dirty_track::region::RegionBitmap;
use dirty_track::sys::pagemap::{Found, Pagemap};
use serde::Serialize;
use vm_memory::bitmap::NewBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::layout;
use crate::options::{self, OptionError, human_size};
use crate::sys::mmap::{Backing, HugeAdvice, Mapping, memfd};

/// Guest memory as devices and loaders see it; what they write is marked in the bitmap of its region.
pub type GuestRam = GuestMemoryMmap<RegionBitmap>;

/// The unit in which huge pages come and RAM is sized.
const BLOCK: u64 = 2 << 20;
/// RAM below this address stays on small pages (see the module).
const LOW_MEMORY: u64 = BLOCK;
/// Smallest guest: room for a kernel image and its boot data.
const MIN_SIZE: u64 = 16 << 20;
/// Largest guest: what 4-level page tables of the host can map beside everything else.
const MAX_SIZE: u64 = 64 << 40;

/// Which pages back guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// 4 KiB pages only.
    None,
    /// Transparent huge pages where the kernel has them.
    #[default]
    Thp,
    /// 2 MiB pages of the hugetlb pool.
    #[serde(rename = "hugetlb-2m")]
    Hugetlb2M,
    /// 1 GiB pages of the hugetlb pool.
    #[serde(rename = "hugetlb-1g")]
    Hugetlb1G,
}

impl HugePages {
    /// log2 of the page size, for the hugetlb kinds.
    pub fn hugetlb_shift(self) -> Option<u32> {
        match self {
            HugePages::None | HugePages::Thp => None,
            HugePages::Hugetlb2M => Some(21),
            HugePages::Hugetlb1G => Some(30),
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HugePages::None => "none",
            HugePages::Thp => "thp",
            HugePages::Hugetlb2M => "hugetlb-2m",
            HugePages::Hugetlb1G => "hugetlb-1g",
        })
    }
}

/// Who answers when the guest touches a page that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Faults {
    /// The host's kernel.
    #[default]
    Kernel,
    /// The monitor, by userfaultfd; see [`crate::fault`].
    Uffd,
}

/// What `--memory` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryConfig {
    /// Bytes of RAM.
    pub size: u64,
    /// Backing pages.
    pub huge: HugePages,
    /// Whether the memory is a memfd that others can map too.
    pub shared: bool,
    /// Who brings the pages that are not there.
    pub fault: Faults,
    /// All of it is there before the guest starts.
    pub prealloc: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig {
            size: 1 << 30,
            huge: HugePages::default(),
            shared: false,
            fault: Faults::default(),
            prealloc: false,
        }
    }
}

impl FromStr for MemoryConfig {
    type Err = OptionError;

    /// `size=1G,huge=none|thp|hugetlb-2m|hugetlb-1g,shared=on|off,fault=kernel|uffd,prealloc=on|off`, or just a size.
    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut config = MemoryConfig::default();
        if !text.contains('=') {
            config.size = options::size(text)?;
            return Ok(config);
        }
        for (key, value) in options::key_values(text, &["size", "huge", "shared", "fault", "prealloc"])? {
            match key {
                "size" => config.size = options::size(value)?,
                "shared" => config.shared = options::on_off(key, value)?,
                "prealloc" => config.prealloc = options::on_off(key, value)?,
                "fault" => {
                    config.fault = match value {
                        "kernel" => Faults::Kernel,
                        "uffd" => Faults::Uffd,
                        _ => {
                            return Err(OptionError::Value {
                                key: key.into(),
                                value: value.into(),
                                expected: "kernel or uffd".into(),
                            });
                        }
                    }
                }
                _ => {
                    config.huge = match value {
                        "none" => HugePages::None,
                        "thp" => HugePages::Thp,
                        "hugetlb-2m" => HugePages::Hugetlb2M,
                        "hugetlb-1g" => HugePages::Hugetlb1G,
                        _ => {
                            return Err(OptionError::Value {
                                key: key.into(),
                                value: value.into(),
                                expected: "none, thp, hugetlb-2m or hugetlb-1g".into(),
                            });
                        }
                    }
                }
            }
        }
        Ok(config)
    }
}

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that makes no guest.
    #[error("guest memory of {}: give between {} and {}", human_size(*.0), human_size(MIN_SIZE), human_size(MAX_SIZE))]
    Size(u64),
    /// A size that the pages do not divide.
    #[error("guest memory of {size} bytes is not a whole number of {} pages: round it to a multiple of {}", human_size(*.page), human_size(*.page))]
    Unaligned {
        /// What was asked for.
        size: u64,
        /// The page size.
        page: u64,
    },
    /// The hugetlb pool is too small or absent.
    #[error(
        "the host has no {need} free {} huge pages for {}: as root, `echo {need} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages`, or use huge=thp ({source})",
        human_size(*.page), human_size(*.size), .page / 1024
    )]
    Hugetlb {
        /// Bytes that were to be mapped.
        size: u64,
        /// The page size.
        page: u64,
        /// Pages that were to be mapped.
        need: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The mapping failed.
    #[error("cannot map {} of guest memory: {source}; ask for less, or look at `ulimit -v` and /proc/sys/vm/overcommit_memory", human_size(*.size))]
    Map {
        /// Bytes that were to be mapped.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be had at once.
    #[error("cannot allocate {} of guest memory: {source}; ask for less, or leave prealloc off", human_size(*.size))]
    Populate {
        /// Bytes that were to be there.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// vm-memory refused a region; the layout is ours, so it is a fault of ours.
    #[error("guest memory layout refused: {0}")]
    Layout(String),
}

/// A contiguous part of RAM: one memslot.
#[derive(Debug)]
pub struct RamRegion {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    mapping: Mapping,
}

impl RamRegion {
    /// Appends what of it is mapped, or swapped out, and is not the zero page. False: the kernel does not tell.
    fn touched(&self, pagemap: &Pagemap, touched: &mut Vec<PageRange>) -> bool {
        let (start, end) = (self.hva() as u64, self.hva() as u64 + self.len);
        let (mut at, mut found) = (start, [Found::NOTHING; 64]);
        while at < end {
            let Ok((runs, next)) = pagemap.mapped(at, end, &mut found) else { return false };
            for run in found[..runs].iter().filter(|run| !run.is_zero()) {
                let addresses = run.addresses();
                touched.push(PageRange {
                    start: Gpa(self.gpa + addresses.start - start).gfn(),
                    pages: (addresses.end - addresses.start) / PAGE_SIZE,
                });
            }
            if next <= at {
                return false;
            }
            at = next;
        }
        true
    }

    /// Where the monitor sees the region.
    pub fn hva(&self) -> usize {
        self.mapping.addr() as usize
    }
}

/// All of a guest's RAM. Keep it for as long as the VM that uses it.
///
/// Views of it ([`GuestRam`] and its clones, which devices and trackers keep) do not own the memory. If one is
/// left when this is dropped, the mapping stays for ever rather than vanish under it.
#[derive(Debug)]
pub struct Ram {
    mem: GuestRam,
    regions: Vec<RamRegion>,
    config: MemoryConfig,
    anonymous: bool,
}

impl Ram {
    /// Maps RAM as `config` says. Touches none of it, unless it is to be there at once.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(config: MemoryConfig) -> Result<Ram, MemoryError> {
        Ram::made_of(config, None)
    }

    /// RAM that begins as what is in `file`, which has the byte of each guest-physical address at that offset. What is
    /// written to it stays its own.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn of_file(config: MemoryConfig, file: &File) -> Result<Ram, MemoryError> {
        Ram::made_of(config, Some(file))
    }

    fn made_of(config: MemoryConfig, file: Option<&File>) -> Result<Ram, MemoryError> {
        if config.size < MIN_SIZE || config.size > MAX_SIZE {
            return Err(MemoryError::Size(config.size));
        }
        let page = 1 << config.huge.hugetlb_shift().unwrap_or(21);
        if !config.size.is_multiple_of(page) {
            return Err(MemoryError::Unaligned { size: config.size, page });
        }
        let low = config.size.min(layout::HOLE_START);
        // A memslot that ends inside a huge page would cost the guest that page.
        let first = low.min(layout::FIRST_SLOT.next_multiple_of(page));
        let ranges = [(0, first), (first, low - first), (layout::HOLE_END, config.size - low)];
        let ranges = ranges.into_iter().filter(|(_, len)| *len > 0);
        let (mut regions, mut views) = (Vec::with_capacity(3), Vec::with_capacity(3));
        for (gpa, len) in ranges {
            let mapping = match file {
                Some(file) => {
                    let backing = Backing::Private { file, offset: gpa };
                    let mapped = Mapping::new(len as usize, BLOCK as usize, backing);
                    mapped.map_err(|source| MemoryError::Map { size: config.size, source })?
                }
                None => map(config, len)?,
            };
            if config.huge.hugetlb_shift().is_none() {
                let advice = match config.huge {
                    HugePages::Thp => HugeAdvice::Huge,
                    _ => HugeAdvice::Small,
                };
                let low = if gpa == 0 { LOW_MEMORY as usize } else { 0 };
                // A kernel without THP says EINVAL to both; then small pages are what there is, and the
                // report says so.
                let _ = mapping.advise(0, low, HugeAdvice::Small);
                let _ = mapping.advise(low, len as usize - low, advice);
            }
            // With faults served here, what is there is nobody's fault any more.
            if config.prealloc {
                mapping.populate().map_err(|source| MemoryError::Populate { size: len, source })?;
            }
            views.push(view(&mapping, gpa)?);
            regions.push(RamRegion { gpa, len, mapping });
        }
        let mem = GuestRam::from_regions(views).map_err(|e| MemoryError::Layout(e.to_string()))?;
        Ok(Ram { mem, regions, config, anonymous: file.is_none() && !config.shared })
    }

    /// From now on a thread of this process brings every page that is not there yet. The kernel would still clear a huge
    /// page at each first fault of a block, only to find that the fault is not its own (mm/huge_memory.c,
    /// `__do_huge_pmd_anonymous_page`), unless it is told that there are to be none. Those that are there stay.
    pub fn expect_service(&self) {
        if self.config.huge.hugetlb_shift().is_none() {
            for region in &self.regions {
                // A kernel without THP says EINVAL.
                let _ = region.mapping.advise(0, region.len as usize, HugeAdvice::Small);
            }
        }
    }

    /// Memory by guest-physical address.
    pub fn mem(&self) -> &GuestRam {
        &self.mem
    }

    /// The parts, in order of address; their index is their memslot.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// What was asked for.
    pub fn config(&self) -> MemoryConfig {
        self.config
    }

    /// What of memory may be anything but zeros: all that somebody has touched; everything, where that is not known, because
    /// there is another source of pages than the kernel's zeros, or the kernel does not tell (before Linux 6.7).
    pub fn maybe_nonzero(&self) -> Vec<PageRange> {
        let mut touched = Vec::new();
        let zeros = self.anonymous && self.config.fault == Faults::Kernel;
        match Pagemap::open() {
            Ok(pagemap)
                if zeros && self.regions.iter().all(|region| region.touched(&pagemap, &mut touched)) =>
            {
                touched
            }
            _ => self
                .regions
                .iter()
                .map(|region| PageRange { start: Gpa(region.gpa).gfn(), pages: region.len / PAGE_SIZE })
                .collect(),
        }
    }

    /// Drops the contents of `range`, which is in one memslot of private memory: its pages are missing from then on, until
    /// somebody touches them.
    ///
    /// # Errors
    /// What the system says, or that there is no such memory.
    pub fn discard(&self, range: PageRange) -> io::Result<()> {
        let start = range.start.gpa().0;
        let has = |region: &&RamRegion| start >= region.gpa && start - region.gpa < region.len;
        let region = self.regions.iter().find(has).ok_or(io::ErrorKind::InvalidInput)?;
        region.mapping.discard((start - region.gpa) as usize, range.bytes() as usize)
    }

    /// Whether what is not there is zeros, and in no file.
    pub fn is_anonymous(&self) -> bool {
        self.anonymous
    }

    /// Host address of the byte at `gpa`, if it is RAM.
    pub fn hva(&self, gpa: u64) -> Option<usize> {
        self.mem.get_host_address(GuestAddress(gpa)).ok().map(|ptr| ptr as usize)
    }

    /// How the host backs RAM at this moment, from /proc/self/smaps.
    ///
    /// # Errors
    /// When /proc is not to be read.
    pub fn host_pages(&self) -> Result<HostPages, procfs::ProcError> {
        let mut pages = HostPages::default();
        for map in procfs::process::Process::myself()?.smaps()? {
            let inside = self.regions.iter().any(|region| {
                let start = region.hva() as u64;
                map.address.0 < start + region.len && map.address.1 > start
            });
            if !inside {
                continue;
            }
            let field = |name: &str| map.extension.map.get(name).copied().unwrap_or(0);
            pages.resident += field("Rss") + field("Private_Hugetlb") + field("Shared_Hugetlb");
            pages.thp += field("AnonHugePages") + field("ShmemPmdMapped") + field("FilePmdMapped");
            pages.hugetlb += field("Private_Hugetlb") + field("Shared_Hugetlb");
        }
        Ok(pages)
    }
}

/// `mem` as ranges (address, length) without a gap inside, in order: two memslots side by side are one range.
pub fn contiguous(mem: &GuestRam) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(2);
    for region in mem.iter() {
        match ranges.last_mut() {
            Some((start, len)) if *start + *len == region.start_addr().0 => *len += region.len(),
            _ => ranges.push((region.start_addr().0, region.len())),
        }
    }
    ranges
}

impl Drop for Ram {
    fn drop(&mut self) {
        let views: Vec<_> = self.mem.iter().map(|region| Arc::downgrade(&region.get_mmap())).collect();
        self.mem = GuestRam::default();
        for (view, region) in views.iter().zip(self.regions.drain(..)) {
            if view.strong_count() > 0 {
                std::mem::forget(region);
            }
        }
    }
}

/// What backs guest RAM in the host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostPages {
    /// Resident in all.
    pub resident: u64,
    /// Mapped by transparent huge pages.
    pub thp: u64,
    /// In pages of the hugetlb pool.
    pub hugetlb: u64,
}

/// Bytes of memory that the host can give without swapping, if it says.
pub fn available() -> Option<u64> {
    use procfs::Current;
    procfs::Meminfo::current().ok()?.mem_available
}

fn map(config: MemoryConfig, len: u64) -> Result<Mapping, MemoryError> {
    let shift = config.huge.hugetlb_shift();
    let align = 1usize << shift.unwrap_or(21);
    let mapped = if config.shared {
        memfd(c"guest-ram", len, shift)
            .and_then(|file| Mapping::new(len as usize, align, Backing::Shared(&file)))
    } else {
        let backing = shift.map_or(Backing::Anonymous, |shift| Backing::Hugetlb { shift });
        Mapping::new(len as usize, align, backing)
    };
    mapped.map_err(|source| match shift {
        Some(shift) => {
            let page = 1 << shift;
            MemoryError::Hugetlb { size: config.size, page, need: config.size / page, source }
        }
        None => MemoryError::Map { size: config.size, source },
    })
}

fn view(mapping: &Mapping, gpa: u64) -> Result<GuestRegionMmap<RegionBitmap>, MemoryError> {
    let region = crate::sys::mmap::view(mapping, RegionBitmap::with_len(mapping.len()))
        .map_err(|e| MemoryError::Layout(e.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(gpa))
        .ok_or_else(|| MemoryError::Layout(format!("region at {gpa:#x} overflows")))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn config(text: &str) -> MemoryConfig {
        text.parse().unwrap()
    }

    #[test]
    fn the_option_is_read_as_its_peers_read_it() {
        assert_eq!(config("2G").size, 2 << 30);
        assert_eq!(
            config("size=64M,huge=hugetlb-2m,shared=on"),
            MemoryConfig {
                size: 64 << 20,
                huge: HugePages::Hugetlb2M,
                shared: true,
                ..MemoryConfig::default()
            }
        );
        for bad in ["size=", "huge=big", "shared=maybe", "size=1G,size=2G", "pages=4", "1Q"] {
            assert!(bad.parse::<MemoryConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn absurd_sizes_are_refused_with_a_reason() {
        for bad in ["0", "1", "4096", "1M", "100T"] {
            assert!(matches!(Ram::new(config(bad)), Err(MemoryError::Size(_))), "{bad}");
        }
        assert!(matches!(Ram::new(config("16777217")), Err(MemoryError::Unaligned { .. })));
    }

    #[test]
    fn ram_leaves_the_hole_and_huge_pages_can_be_huge_on_both_sides_of_it() {
        let ram = Ram::new(config("size=64G,huge=thp")).unwrap();
        let ranges: Vec<_> = ram.regions().iter().map(|r| (r.gpa, r.len)).collect();
        let first = layout::FIRST_SLOT;
        assert_eq!(ranges, [(0, first), (first, (3 << 30) - first), (4 << 30, 61 << 30)]);
        assert_eq!(contiguous(ram.mem()), [(0, 3 << 30), (4 << 30, 61 << 30)]);
        for region in ram.regions() {
            assert_eq!(region.hva() as u64 % BLOCK, region.gpa % BLOCK);
        }
        assert!(ram.hva(layout::HOLE_START).is_none());
        ram.mem().write_obj(7u8, GuestAddress(64 << 30)).unwrap();
        assert!(ram.mem().write_obj(7u8, GuestAddress(65 << 30)).is_err());
    }

    #[test]
    fn what_was_touched_may_be_anything() {
        let pages = |ram: &Ram| ram.maybe_nonzero().iter().map(|range| range.pages).sum::<u64>();
        let ram = Ram::new(config("size=64M,huge=none")).unwrap();
        let all = (64 << 20) / PAGE_SIZE;
        let untouched = pages(&ram);
        assert!(untouched == 0 || untouched == all, "{untouched}");
        ram.mem().write_obj(7u8, GuestAddress(3 << 20)).unwrap();
        let mut byte = [1];
        ram.mem().read_slice(&mut byte, GuestAddress(5 << 20)).unwrap();
        if untouched == 0 {
            // What was only read is the zero page still.
            assert_eq!(ram.maybe_nonzero(), [PageRange { start: Gpa(3 << 20).gfn(), pages: 1 }]);
        }
        // A memfd may have what this process has not mapped.
        assert_eq!(pages(&Ram::new(config("size=64M,shared=on")).unwrap()), all);
    }

    #[test]
    fn a_view_that_outlives_ram_still_points_to_memory() {
        let ram = Ram::new(config("16M")).unwrap();
        let view = ram.mem().clone();
        view.write_obj(0x5au8, GuestAddress(1 << 20)).unwrap();
        drop(ram);
        assert_eq!(view.read_obj::<u8>(GuestAddress(1 << 20)).unwrap(), 0x5a);
    }

    #[test]
    fn hugetlb_pages_that_are_not_there_are_an_error_that_says_how_many_are_needed() {
        let error = Ram::new(config("size=4T,huge=hugetlb-2m")).unwrap_err();
        assert!(error.to_string().contains("2097152 free 2 MiB huge pages"), "{error}");
    }
}
