//! Tables that a test builds, and hostile ones, against a translation written down a second time.

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::addr::LEAVES_PER_BLOCK;
use crate::walk::{Seen, Step, Walk, WalkError};

const BLOCK: u64 = LEAVES_PER_BLOCK;
const GIGA: u64 = PageSize::G1.leaves();
/// What tables are entered with.
const TABLE: u64 = PRESENT | WRITABLE | USER;

/// A guest's memory from address 0 on, and one address space in it.
pub(in crate::walk) struct Guest {
    pub(in crate::walk) memory: GuestMemoryMmap,
    pub(in crate::walk) paging: Paging,
    /// First page that is not yet a table.
    free: u64,
}

impl Guest {
    /// A guest with `pages` of memory; page 1 is the root. With 5 levels if `la57`.
    pub(in crate::walk) fn new(la57: bool, pages: usize) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), pages * PAGE_BYTES)]).unwrap();
        Guest { memory, paging: Paging { cr3: 0x1000, la57, nxe: true, maxphyaddr: 46 }, free: 2 }
    }

    pub(in crate::walk) fn set(&self, table: u64, index: u64, entry: u64) {
        self.memory.store(entry, GuestAddress(table + index * 8), Ordering::Relaxed).unwrap();
    }

    fn get(&self, table: u64, index: u64) -> u64 {
        self.memory.load(GuestAddress(table + index * 8), Ordering::Relaxed).unwrap()
    }

    /// Address of the table of `level` (0 is the last) that translates `page`. Makes those that are missing.
    pub(in crate::walk) fn table(&mut self, page: u64, level: u32) -> u64 {
        let mut table = self.paging.cr3 & ADDRESS;
        for above in (level + 1..self.paging.levels()).rev() {
            let index = page >> (9 * above) & 511;
            if self.get(table, index) & PRESENT == 0 {
                self.set(table, index, self.free << PAGE_SHIFT | TABLE);
                self.free += 1;
            }
            table = self.get(table, index) & ADDRESS;
        }
        table
    }

    /// Maps the page, block or GiB `page` to `gfn`, with the entry's other bits `flags`.
    pub(in crate::walk) fn map(&mut self, page: u64, size: PageSize, gfn: u64, flags: u64) {
        let (level, large) = match size {
            PageSize::K4 => (0, 0),
            PageSize::M2 => (1, LARGE),
            PageSize::G1 => (2, LARGE),
        };
        let table = self.table(page, level);
        self.set(table, page >> (9 * level) & 511, gfn << PAGE_SHIFT | PRESENT | large | flags);
    }

    fn walk(&self, pages: Range<u64>, looks: u64) -> Walked {
        let tables = GuestTables::new(&self.memory, self.paging, looks).unwrap();
        let told = RefCell::new(Vec::new());
        let outcome = Walk::new(&tables)
            .huge(|entry| {
                told.borrow_mut().push((entry.pages.clone(), Some((entry.size, entry.huge))));
                Ok::<_, Infallible>(Step::Handled)
            })
            .leaves(|pages, leaf| {
                told.borrow_mut().push((pages, Some((PageSize::K4, leaf))));
                Ok(Seen::All)
            })
            .holes(|pages| {
                told.borrow_mut().push((pages, None));
                Ok(Seen::All)
            })
            .run(pages);
        Walked { told: told.into_inner(), outcome, malformed: tables.malformed() }
    }

    /// All that is mapped.
    fn mapped(&self) -> Vec<(Range<u64>, PageSize, u64)> {
        let walked = self.walk(0..ALL_PAGES, 1 << 20);
        assert_eq!(walked.outcome, Ok(()));
        walked.check_coverage(0..ALL_PAGES);
        assert_eq!(walked.malformed, 0);
        let told = walked.told.into_iter();
        told.filter_map(|(pages, entry)| entry.map(|(size, entry)| (pages, size, entry.gfn.0))).collect()
    }
}

type Told = (Range<u64>, Option<(PageSize, Mapping)>);

#[derive(Debug)]
struct Walked {
    told: Vec<Told>,
    outcome: Result<(), WalkError<Infallible, X86Error>>,
    malformed: u64,
}

impl Walked {
    /// Each page of `pages` was handed out once, up to where the walk ended; that is returned.
    fn check_coverage(&self, pages: Range<u64>) -> u64 {
        let mut next = pages.start;
        for (run, _) in &self.told {
            assert_eq!(run.start, next, "each page once");
            assert!(!run.is_empty());
            next = run.end;
        }
        match self.outcome {
            Ok(()) => assert_eq!(next, pages.end),
            Err(WalkError::Table(X86Error::TooLong { page })) => assert_eq!(page, next),
            Err(error) => panic!("{error}"),
        }
        next
    }
}

/// What one virtual page is translated to: size of the entry, frame, and the entries met, the last one first.
fn translate(memory: &GuestMemoryMmap, paging: Paging, page: u64) -> Option<(PageSize, u64, Vec<u64>)> {
    let address = page << 12;
    let unused = if paging.la57 { 7 } else { 16 };
    if (address << unused) as i64 >> unused != address as i64 {
        return None;
    }
    let above_ram = |entry: u64| entry >> paging.maxphyaddr & ((1 << (52 - paging.maxphyaddr)) - 1) != 0;
    let mut table = paging.cr3 & ((1 << paging.maxphyaddr) - 1) & !0xfff;
    let mut met = Vec::new();
    let shifts: &[u32] = if paging.la57 { &[48, 39, 30, 21, 12] } else { &[39, 30, 21, 12] };
    for &shift in shifts {
        let at = table + (address >> shift & 0x1ff) * 8;
        // A table that is not whole is none.
        memory.get_slice(GuestAddress(table), 4096).ok()?;
        let entry: u64 = memory.read_obj(GuestAddress(at)).ok()?;
        met.insert(0, entry);
        let large = entry & 0x80 != 0;
        let no_such_bits = above_ram(entry) || (entry >> 63 != 0 && !paging.nxe);
        if entry & 1 == 0 || no_such_bits || (large && shift > 30) {
            return None;
        }
        let size = match shift {
            12 => PageSize::K4,
            21 if large => PageSize::M2,
            30 if large => PageSize::G1,
            _ => {
                table = entry & 0x000f_ffff_ffff_f000;
                continue;
            }
        };
        let offset_bits = (1u64 << shift) - 1;
        if size != PageSize::K4 && entry & offset_bits & !0x1fff != 0 {
            return None;
        }
        let frame = (entry & 0x000f_ffff_ffff_f000 & !offset_bits | address & offset_bits) >> 12;
        return Some((size, frame, met));
    }
    None
}

fn expected(memory: &GuestMemoryMmap, paging: Paging, page: u64) -> Option<(PageSize, Mapping)> {
    let (size, frame, met) = translate(memory, paging, page)?;
    let all = |bit: u32| met.iter().all(|entry| entry >> bit & 1 != 0);
    let mapping = Mapping {
        gfn: Gfn(frame),
        writable: all(1),
        user: all(2),
        no_execute: met.iter().any(|entry| entry >> 63 != 0),
        accessed: met[0] >> 5 & 1 != 0,
        dirty: met[0] >> 6 & 1 != 0,
    };
    Some((size, mapping))
}

#[test]
fn every_size_at_every_level_is_found() {
    for la57 in [false, true] {
        let mut guest = Guest::new(la57, 64);
        let half = guest.paging.half();
        let top = ALL_PAGES - half;
        guest.map(0, PageSize::K4, 0x77, 0);
        guest.map(2 * BLOCK, PageSize::M2, 4 * BLOCK, 0);
        guest.map(5 * GIGA, PageSize::G1, GIGA, 0);
        guest.map(half - 1, PageSize::K4, 1, 0);
        guest.map(top, PageSize::K4, 2, 0);
        guest.map(ALL_PAGES - BLOCK, PageSize::M2, 8 * BLOCK, 0);
        assert_eq!(
            guest.mapped(),
            [
                (0..1, PageSize::K4, 0x77),
                (2 * BLOCK..3 * BLOCK, PageSize::M2, 4 * BLOCK),
                (5 * GIGA..6 * GIGA, PageSize::G1, GIGA),
                (half - 1..half, PageSize::K4, 1),
                (top..top + 1, PageSize::K4, 2),
                (ALL_PAGES - BLOCK..ALL_PAGES, PageSize::M2, 8 * BLOCK),
            ]
        );
    }
}

#[test]
fn neighbouring_frames_are_one_run_as_long_as_they_are_alike() {
    let mut guest = Guest::new(false, 16);
    for page in 0..BLOCK {
        let dirty = if (100..200).contains(&page) { DIRTY } else { 0 };
        let gfn = if page < 300 { 0x1000 + page } else { 0x9000 + page };
        guest.map(page, PageSize::K4, gfn, dirty);
    }
    let runs: Vec<_> = guest.mapped().into_iter().map(|(pages, _, gfn)| (pages, gfn)).collect();
    assert_eq!(runs, [(0..100, 0x1000), (100..200, 0x1064), (200..300, 0x10c8), (300..512, 0x912c)]);
}

#[test]
fn a_run_ends_with_the_last_physical_page() {
    let mut guest = Guest::new(false, 16);
    guest.paging.maxphyaddr = 52;
    let last = (1 << 40) - 1;
    guest.map(0, PageSize::K4, last, 0);
    guest.map(1, PageSize::K4, 0, 1 << 52);
    let runs: Vec<_> = guest.mapped().into_iter().map(|(pages, _, gfn)| (pages, gfn)).collect();
    assert_eq!(runs, [(0..1, last), (1..2, 0)]);
}

#[test]
fn a_part_of_an_entry_is_told_as_that() {
    let mut guest = Guest::new(false, 16);
    guest.map(BLOCK, PageSize::M2, 4 * BLOCK, 0);
    guest.map(0, PageSize::K4, 3, 0);
    let walked = guest.walk(BLOCK + 5..BLOCK + 9, 9);
    walked.check_coverage(BLOCK + 5..BLOCK + 9);
    let (pages, entry) = walked.told[0].clone();
    assert_eq!(pages, BLOCK + 5..BLOCK + 9);
    // The frame is that of the entry's first page.
    assert_eq!(entry.map(|(size, mapping)| (size, mapping.gfn)), Some((PageSize::M2, Gfn(4 * BLOCK))));
    assert!(guest.walk(7..7, 0).told.is_empty());
    assert_eq!(guest.walk(0..BLOCK, 9).told.len(), 2, "a leaf and a hole");
}

#[test]
fn what_a_mapping_allows_is_what_all_levels_allow() {
    for (bit, get) in [
        (WRITABLE, (|mapping| mapping.writable) as fn(Mapping) -> bool),
        (USER, |mapping| mapping.user),
        (NO_EXECUTE, |mapping| !mapping.no_execute),
    ] {
        for level in 0..5 {
            let mut guest = Guest::new(true, 16);
            guest.map(0, PageSize::K4, 9, WRITABLE | USER);
            let allowed = |guest: &Guest| get(guest.walk(0..1, 1).told[0].1.unwrap().1);
            assert!(allowed(&guest));
            let table = guest.table(0, level);
            guest.set(table, 0, guest.get(table, 0) ^ bit);
            assert!(!allowed(&guest), "bit {bit:#x} of level {level}");
        }
    }
}

#[test]
fn accessed_and_dirty_are_those_of_the_last_level() {
    let mut guest = Guest::new(false, 16);
    guest.map(0, PageSize::K4, 9, ACCESSED);
    guest.map(1, PageSize::K4, 10, ACCESSED | DIRTY);
    guest.map(2, PageSize::K4, 11, 0);
    let table = guest.table(0, 1);
    guest.set(table, 0, guest.get(table, 0) | ACCESSED | DIRTY);
    let told = guest.walk(0..3, 3).told;
    let flags: Vec<_> = told.iter().map(|(_, entry)| entry.unwrap().1).collect();
    assert_eq!(
        flags.iter().map(|mapping| (mapping.accessed, mapping.dirty)).collect::<Vec<_>>(),
        [(true, false), (true, true), (false, false)]
    );
}

#[test]
fn a_reserved_bit_makes_a_hole() {
    let beyond = |guest: &mut Guest| guest.paging.maxphyaddr = 40;
    let no_nxe = |guest: &mut Guest| guest.paging.nxe = false;
    let nothing = |_: &mut Guest| ();
    type Setup = fn(&mut Guest);
    let cases: [(&str, u32, u64, Setup); 14] = [
        ("an address beyond MAXPHYADDR", 0, 1 << 40, beyond),
        ("a table beyond MAXPHYADDR", 3, 1 << 45, beyond),
        ("no-execute without NXE, page", 0, NO_EXECUTE, no_nxe),
        ("no-execute without NXE, table", 4, NO_EXECUTE, no_nxe),
        ("a large page of 512 GiB", 3, LARGE, nothing),
        ("a large page of 256 TiB", 4, LARGE, nothing),
        ("bit 13 of 2 MiB", 1, LARGE | 1 << 13, nothing),
        ("bit 20 of 2 MiB", 1, LARGE | 1 << 20, nothing),
        ("bit 13 of 1 GiB", 2, LARGE | 1 << 13, nothing),
        ("bit 21 of 1 GiB", 2, LARGE | 1 << 21, nothing),
        ("bit 29 of 1 GiB", 2, LARGE | 1 << 29, nothing),
        ("2 MiB beyond MAXPHYADDR", 1, LARGE | 1 << 41, beyond),
        ("1 GiB beyond MAXPHYADDR", 2, LARGE | 1 << 51, beyond),
        ("no-execute without NXE, 2 MiB", 1, LARGE | NO_EXECUTE, no_nxe),
    ];
    for (what, level, bits, setup) in cases {
        let mut guest = Guest::new(true, 16);
        guest.map(0, PageSize::K4, 9, 0);
        setup(&mut guest);
        assert_eq!(guest.walk(0..1, 1).malformed, 0);
        let table = guest.table(0, level);
        // Large entries get an address that is fine but for the bits in question.
        let entry = if bits & LARGE != 0 && level <= 2 { PRESENT } else { guest.get(table, 0) };
        guest.set(table, 0, entry | bits);
        let walked = guest.walk(0..1, 1);
        assert_eq!((walked.told, walked.malformed), (vec![(0..1, None)], 1), "{what}");
    }
}

#[test]
fn bits_that_are_ignored_or_mean_caching_do_no_harm() {
    // PWT, PCD, global, 9..11, 52..62; in the last level also PAT, which is where others have their size; in a large
    // entry PAT is bit 12.
    let ignored = 0x7ff << 52 | 7 << 9 | 1 << 8 | 3 << 3;
    let mut guest = Guest::new(false, 16);
    guest.map(0, PageSize::K4, 9, ignored | LARGE);
    guest.map(BLOCK, PageSize::M2, BLOCK, ignored | 1 << 12);
    guest.map(GIGA, PageSize::G1, GIGA, ignored | 1 << 12);
    for level in 1..4 {
        let table = guest.table(0, level);
        guest.set(table, 0, guest.get(table, 0) | ignored);
    }
    guest.paging.cr3 |= 0xfff | 1 << 63;
    let frames: Vec<_> = guest.mapped().into_iter().map(|(_, _, gfn)| gfn).collect();
    assert_eq!(frames, [9, BLOCK, GIGA]);
}

#[test]
fn tables_that_are_not_in_ram_are_holes() {
    let mut guest = Guest::new(false, 16);
    for (index, table) in [(3, 16 << PAGE_SHIFT), (4, ADDRESS & ((1 << 46) - 1))] {
        guest.set(0x1000, index, table | TABLE);
    }
    guest.map(0, PageSize::K4, 1 << 30, 0);
    let walked = guest.walk(0..ALL_PAGES, 1000);
    walked.check_coverage(0..ALL_PAGES);
    let mapped: Vec<_> = walked.told.iter().filter(|(_, entry)| entry.is_some()).collect();
    assert_eq!(mapped.len(), 1, "a page need not be RAM");
    assert_eq!(walked.malformed, 2);

    for cr3 in [16 << PAGE_SHIFT, ADDRESS] {
        guest.paging.cr3 = cr3;
        let walked = guest.walk(0..ALL_PAGES, 1000);
        walked.check_coverage(0..ALL_PAGES);
        assert!(walked.told.iter().all(|(_, entry)| entry.is_none()));
        assert!(walked.malformed > 0);
    }

    // RAM that ends within a table.
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1800)]).unwrap();
    let tables = GuestTables::new(&memory, Guest::new(false, 2).paging, 1).unwrap();
    assert_eq!(tables.look(0..1), Ok(Look::Hole { end: 1 }));
    assert_eq!(tables.malformed(), 1);
}

#[test]
fn a_table_that_maps_itself_is_found_as_pages() {
    let mut guest = Guest::new(false, 16);
    guest.map(7, PageSize::K4, 0x99, 0);
    let own = 300;
    guest.set(0x1000, own, 0x1000 | TABLE);
    let frames: Vec<_> = guest.mapped().into_iter().map(|(_, _, gfn)| gfn).collect();
    // The mapping, and the tables of four levels, the root's entry for itself among them.
    for frame in [0x99, 1, 2, 3, 4] {
        assert!(frames.contains(&frame), "{frames:x?}");
    }
}

#[test]
fn loops_end_with_the_looks() {
    let guest = Guest::new(true, 2);
    (0..512).for_each(|index| guest.set(0x1000, index, 0x1000 | TABLE));
    for looks in [0, 1, 1000] {
        let walked = guest.walk(0..ALL_PAGES, looks);
        let page = walked.check_coverage(0..ALL_PAGES);
        assert_eq!(walked.outcome, Err(WalkError::Table(X86Error::TooLong { page })));
        assert_eq!(walked.told.len() as u64, looks);
        // One can go on from there.
        let on = guest.walk(page..ALL_PAGES, 10);
        on.check_coverage(page..ALL_PAGES);
    }
}

#[test]
fn there_are_widths_that_no_processor_has() {
    let guest = Guest::new(false, 2);
    for bits in [0, 31, 53, u32::MAX] {
        let paging = Paging { maxphyaddr: bits, ..guest.paging };
        let error = GuestTables::new(&guest.memory, paging, 1).err();
        assert_eq!(error, Some(X86Error::PhysBits(bits)));
    }
}

#[test]
fn a_guest_that_changes_its_tables_meanwhile_is_seen_as_it_was_or_is() {
    let mut guest = Guest::new(false, 16);
    guest.map(0, PageSize::K4, 9, 0);
    let (table, above) = (guest.table(0, 0), guest.table(0, 1));
    let small = guest.get(above, 0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for entry in [PRESENT | 8 << PAGE_SHIFT, 0, u64::MAX] {
                    guest.set(table, 0, entry);
                }
                for entry in [PRESENT | LARGE, small] {
                    guest.set(above, 0, entry);
                }
            }
        });
        for _ in 0..2000 {
            let walked = guest.walk(0..2 * BLOCK, 10_000);
            walked.check_coverage(0..2 * BLOCK);
            for (_, entry) in walked.told {
                let told = entry.map(|(size, mapping)| (size, mapping.gfn.0));
                assert!(
                    matches!(told, None | Some((PageSize::K4, 8 | 9) | (PageSize::M2, 0))),
                    "{told:x?} never was"
                );
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Something that a hostile guest writes into its tables.
#[derive(Clone, Debug)]
pub(in crate::walk) enum Write {
    /// One entry.
    Entry { table: u64, index: u64, entry: u64 },
    /// Entries of neighbouring pages, up to `end`.
    Run { table: u64, start: u64, end: u64, entry: u64 },
    /// The entries on the way to the virtual page `page`, from the root on.
    Path { page: u64, entries: Vec<u64> },
}

pub(in crate::walk) const HOSTILE_PAGES: u64 = 12;

/// Indices that are met often.
fn index() -> impl Strategy<Value = u64> {
    prop_oneof![4 => prop::sample::select(vec![0, 1, 255, 256, 511]), 1 => 0..512u64]
}

/// A virtual page that is canonical with 5 levels, and mostly with 4.
fn page() -> impl Strategy<Value = u64> {
    (prop::collection::vec(index(), 5), prop::bool::weighted(0.8)).prop_map(|(indices, short)| {
        let page = indices.iter().fold(0, |page, index| page << 9 | index);
        let bits = if short { 36 } else { 45 };
        let upper = ALL_PAGES - (1 << bits);
        if page >> (bits - 1) & 1 != 0 { page | upper } else { page & ((1 << bits) - 1) }
    })
}

/// An entry that is a table in RAM, or nearly so.
fn table_entry() -> impl Strategy<Value = u64> {
    let flags = any::<u64>().prop_map(|some| some & (WRITABLE | USER | ACCESSED | DIRTY));
    let page = prop_oneof![20 => 2..HOSTILE_PAGES, 1 => 0..HOSTILE_PAGES + 2];
    (page, flags).prop_map(|(page, flags)| page << PAGE_SHIFT | flags | PRESENT)
}

/// Any entry: tables, pages of all sizes, some with bits that are reserved, and whatever 64 bits may be.
fn entry() -> impl Strategy<Value = u64> {
    let bit = (0..64u32).prop_map(|bit| 1u64 << bit);
    let large = (0..1u64 << 25, any::<bool>(), any::<u64>()).prop_map(|(block, giga, some)| {
        PRESENT
            | LARGE
            | block << if giga { 30 } else { 21 } & ADDRESS
            | some & (WRITABLE | USER | NO_EXECUTE)
    });
    prop_oneof![
        8 => table_entry(),
        2 => (table_entry(), bit).prop_map(|(entry, bit)| entry ^ bit),
        4 => large,
        1 => any::<u64>(),
    ]
}

/// A guest that writes what it likes, and where its address space is walked.
#[derive(Debug)]
pub(in crate::walk) struct Hostile {
    pub(in crate::walk) writes: Vec<Write>,
    pub(in crate::walk) paging: Paging,
    /// Virtual pages at which something may be mapped.
    pub(in crate::walk) pages: Vec<u64>,
}

pub(in crate::walk) fn hostile() -> impl Strategy<Value = Hostile> {
    let table = 0..HOSTILE_PAGES;
    let write = prop_oneof![
        1 => (table.clone(), index(), entry())
            .prop_map(|(table, index, entry)| Write::Entry { table, index, entry }),
        1 => (table, index(), index(), entry()).prop_map(|(table, a, b, entry)| {
            Write::Run { table, start: a.min(b), end: a.max(b), entry }
        }),
    ];
    let cr3 = prop_oneof![8 => Just(0x1000), 1 => entry(), 1 => any::<u64>()];
    let paging =
        (cr3, any::<bool>(), prop::bool::weighted(0.8), prop_oneof![3 => Just(46u32), 1 => 32..=52u32])
            .prop_map(|(cr3, la57, nxe, maxphyaddr)| Paging { cr3, la57, nxe, maxphyaddr });
    let above = prop_oneof![12 => table_entry().boxed(), 1 => entry().boxed()];
    let path = (page(), prop::collection::vec(above, 4), entry()).prop_map(|(page, mut entries, last)| {
        entries.push(last);
        Write::Path { page, entries }
    });
    (
        prop::collection::vec(path, 1..8),
        prop::collection::vec(write, 0..4),
        paging,
        prop::collection::vec(page(), 2),
    )
        .prop_map(|(mut writes, more, paging, mut pages)| {
            pages.extend(writes.iter().filter_map(|write| match write {
                Write::Path { page, .. } => Some(*page),
                _ => None,
            }));
            writes.extend(more);
            Hostile { writes, paging, pages }
        })
}

impl Hostile {
    pub(in crate::walk) fn guest(&self) -> Guest {
        let guest = Guest { paging: self.paging, ..Guest::new(false, HOSTILE_PAGES as usize) };
        for write in &self.writes {
            match *write {
                Write::Path { page, ref entries } => {
                    let mut table = 0x1000;
                    let levels = self.paging.levels();
                    for (level, &entry) in (0..levels).rev().zip(&entries[5 - levels as usize..]) {
                        if table < HOSTILE_PAGES << PAGE_SHIFT {
                            guest.set(table, page >> (9 * level) & 511, entry);
                        }
                        table = entry & ADDRESS;
                    }
                }
                Write::Entry { table, index, entry } => guest.set(table << PAGE_SHIFT, index, entry),
                Write::Run { table, start, end, entry } => (start..end).for_each(|index| {
                    guest.set(table << PAGE_SHIFT, index, entry.wrapping_add((index - start) << PAGE_SHIFT));
                }),
            }
        }
        guest
    }
}

/// What the guest itself would find at `page`.
pub(in crate::walk) fn naive(guest: &Guest, page: u64) -> Option<(PageSize, Mapping)> {
    expected(&guest.memory, guest.paging, page)
}

proptest! {
    #[test]
    fn whatever_a_guest_writes_is_translated_as_its_processor_would(
        hostile in hostile(),
        len in prop_oneof![Just(1u64), 2..2000u64, Just(GIGA + 7), Just(u64::MAX)],
        looks in 0..200u64,
    ) {
        let guest = hostile.guest();
        for &start in &hostile.pages {
            let pages = start..start.saturating_add(len);
            let walked = guest.walk(pages.clone(), looks);
            walked.check_coverage(pages);
            prop_assert!(walked.told.len() as u64 <= looks, "bounded");
            prop_assert!(walked.malformed <= looks);
            for (run, told) in walked.told {
                for page in [run.start, run.start + (run.end - run.start) / 2, run.end - 1] {
                    if page >= ALL_PAGES {
                        prop_assert_eq!(told, None);
                        continue;
                    }
                    // The frame that is told is that of the first page: of the run, or of the entry.
                    let told = told.map(|(size, mapping)| {
                        let first = if size == PageSize::K4 { run.start } else { page - page % size.leaves() };
                        (size, Mapping { gfn: Gfn(mapping.gfn.0 + (page - first)), ..mapping })
                    });
                    prop_assert_eq!(told, naive(&guest, page), "page {:#x}", page);
                }
            }
        }
    }
}
