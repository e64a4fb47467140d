//! The walk over how this process maps memory, against /proc/self/pagemap page by page and against smaps.

use std::convert::Infallible;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dirty_track::addr::{BLOCK_SIZE, Gpa, LEAVES_PER_BLOCK, PAGE_SIZE};
use dirty_track::sys::uffd::{Mode, Uffd};
use dirty_track::tracker::Slot;
use dirty_track::walk::host::{HostEntry, HostError, HostMap};
use dirty_track::walk::{Seen, Step, Walk, WalkError};
use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::backing::memfd;
use crate::machine::skip;
use crate::mapping::Mapping;

const BLOCK: u64 = LEAVES_PER_BLOCK;
const BLOCKS: u64 = 4;

/// What a walk tells of each page: whether its entry is huge, and what it is.
fn walk(map: &HostMap) -> Vec<Option<(bool, HostEntry)>> {
    let told = std::cell::RefCell::new(Vec::new());
    let tell = |pages: Range<u64>, entry: Option<(bool, HostEntry)>| {
        let mut told = told.borrow_mut();
        assert_eq!(map.pages().start + told.len() as u64, pages.start, "each page once");
        told.extend(pages.map(|_| entry));
    };
    Walk::new(map)
        .huge(|entry| {
            tell(entry.pages.clone(), Some((true, entry.huge)));
            Ok::<_, Infallible>(Step::Handled)
        })
        .leaves(|pages, leaf| {
            tell(pages, Some((false, leaf)));
            Ok(Seen::All)
        })
        .holes(|pages| {
            tell(pages, None);
            Ok(Seen::All)
        })
        .run(map.pages())
        .unwrap();
    let told = told.into_inner();
    assert_eq!(told.len() as u64, map.pages().end - map.pages().start);
    told
}

/// The same by /proc/self/pagemap, which has 8 bytes for each page and knows neither huge pages nor the zero page.
/// Source: Linux, Documentation/admin-guide/mm/pagemap.rst.
fn by_pagemap(pages: Range<u64>) -> Vec<Option<(bool, bool, bool)>> {
    let file = File::open("/proc/self/pagemap").unwrap();
    let entry = |page: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, page * 8).unwrap();
        let bit = |bit: u32| u64::from_le_bytes(bytes) >> bit & 1 != 0;
        let (present, swapped, file, protected) = (bit(63), bit(62), bit(61), bit(57));
        (present || swapped).then_some((!protected, file, swapped))
    };
    pages.map(entry).collect()
}

/// Bytes of `slot` that huge pages map, by /proc/self/smaps.
fn huge_bytes(slot: &Slot) -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        let bounds = first.split_once('-').and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        if let Some((start, end)) = bounds {
            inside = slot.hva() <= start && end <= slot.hva() + slot.len();
        } else if inside && ["AnonHugePages:", "ShmemPmdMapped:"].contains(&first) {
            sum += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
        }
    }
    sum
}

/// Takes a map, and compares it with what the kernel says in its other ways.
fn check(slot: &Slot, when: &str) -> Vec<Option<(bool, HostEntry)>> {
    let map = HostMap::of_slot(slot).unwrap();
    let told = walk(&map);
    let flags = |told: &Option<(bool, HostEntry)>| {
        told.map(|(_, entry)| (entry.written, entry.file && !entry.swapped, entry.swapped))
    };
    // Whether what is not there belongs to a file, the two tell differently.
    let expected = by_pagemap(map.pages())
        .into_iter()
        .map(|entry| entry.map(|(written, file, swapped)| (written, file && !swapped, swapped)));
    for (page, (told, expected)) in told.iter().map(flags).zip(expected).enumerate() {
        assert_eq!(told, expected, "{when}: page {page}");
    }
    let huge = told.iter().flatten().filter(|(huge, _)| *huge).count() as u64;
    assert_eq!(huge * PAGE_SIZE, huge_bytes(slot), "{when}");
    told
}

fn advise(slot: &Slot, blocks: Range<u64>, advice: libc::c_int) {
    let start = slot.hva() + blocks.start * BLOCK_SIZE;
    let len = (blocks.end - blocks.start) * BLOCK_SIZE;
    // SAFETY: the range is in the slot's own mapping; the advice is about page sizes, or drops contents that the
    // test does not need any more.
    let outcome = unsafe { libc::madvise(start as *mut libc::c_void, len as usize, advice) };
    // A kernel without huge pages refuses advice about them, and has small ones.
    assert!(outcome == 0 || advice == libc::MADV_HUGEPAGE || advice == libc::MADV_NOHUGEPAGE);
}

fn write(region: &GuestRegionMmap<dirty_track::region::RegionBitmap>, pages: Range<u64>) {
    for page in pages {
        region.write_obj(1u8, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
    }
}

fn all_of(
    told: &[Option<(bool, HostEntry)>],
    pages: Range<u64>,
    what: impl Fn(bool, HostEntry) -> bool,
) -> bool {
    told[pages.start as usize..pages.end as usize]
        .iter()
        .all(|told| told.is_some_and(|(huge, entry)| what(huge, entry)))
}

/// Whether the kernel can be asked; if not, says on the terminal that `test` is skipped.
fn has_scan(test: &str) -> bool {
    match HostMap::take(1..2) {
        Err(HostError::Scan { source, .. }) if source.errno() == libc::ENOTTY => {
            skip(test, "this host lacks PAGEMAP_SCAN, which came with Linux 6.7");
            false
        }
        _ => true,
    }
}

fn follow(test: &str, file: Option<File>) {
    if !has_scan(test) {
        return;
    }
    let len = BLOCKS * BLOCK_SIZE;
    let shared = file.is_some();
    let mapping = Mapping::new(Gpa(0), len as usize, file.as_ref());
    let region = mapping.region(Gpa(0));
    let slot = Slot::of_region(0, 0, &region);
    let uffd = match Uffd::open(Mode::Async) {
        Ok(uffd) => uffd,
        Err(error) => return skip(test, error),
    };
    let nothing = check(&slot, "untouched");
    assert!(nothing.iter().all(Option::is_none));

    // A block that is huge if the host has one, one of small pages, one that is only read, one that is left alone.
    advise(&slot, 0..1, libc::MADV_HUGEPAGE);
    advise(&slot, 1..3, libc::MADV_NOHUGEPAGE);
    write(&region, 0..1);
    write(&region, BLOCK..BLOCK + 3);
    write(&region, BLOCK + 64..BLOCK + 100);
    for page in 2 * BLOCK..2 * BLOCK + 5 {
        let _: u8 = region.read_obj(MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
    }
    let touched = check(&slot, "touched");
    assert!(all_of(&touched, BLOCK..BLOCK + 3, |huge, entry| !huge && entry.file == shared && !entry.zero));
    if !shared {
        assert!(all_of(&touched, 2 * BLOCK..2 * BLOCK + 5, |_, entry| entry.zero));
    }
    // If the host had a huge page to give.
    let was_huge = all_of(&touched, 0..BLOCK, |huge, _| huge);

    uffd.register(slot.hva(), len).unwrap();
    uffd.protect(slot.hva(), 2 * BLOCK_SIZE).unwrap();
    let protected = check(&slot, "protected");
    assert!(all_of(&protected, BLOCK..BLOCK + 3, |_, entry| !entry.written));
    if was_huge && !shared {
        assert!(all_of(&protected, 0..BLOCK, |huge, entry| huge && !entry.written), "it stays huge");
    }
    write(&region, 3..4);
    write(&region, BLOCK + 1..BLOCK + 2);
    let written = check(&slot, "written");
    assert!(all_of(&written, 3..4, |huge, entry| !huge && entry.written), "a write splits");
    assert!(all_of(&written, BLOCK + 1..BLOCK + 2, |_, entry| entry.written));
    assert!(all_of(&written, BLOCK + 2..BLOCK + 3, |_, entry| !entry.written));

    advise(&slot, 1..2, libc::MADV_DONTNEED);
    let dropped = check(&slot, "dropped");
    let gone = &dropped[BLOCK as usize + 2];
    if shared {
        // What was protected keeps a marker, that is all there is.
        assert!(gone.is_some_and(|(_, entry)| entry.swapped && !entry.written));
    } else {
        assert_eq!(*gone, None);
    }

    // Parts of entries.
    let start = slot.hva() / PAGE_SIZE;
    let part = HostMap::take(start + 2..start + BLOCK + 2).unwrap();
    assert_eq!(walk(&part), dropped[2..BLOCK as usize + 2]);
}

#[test]
fn private_memory_is_told_as_it_is_mapped() {
    follow("host_map::private_memory_is_told_as_it_is_mapped", None);
}

#[test]
fn shared_memory_is_told_as_it_is_mapped() {
    let file = memfd(0);
    file.set_len(BLOCKS * BLOCK_SIZE).unwrap();
    follow("host_map::shared_memory_is_told_as_it_is_mapped", Some(file));
}

#[test]
fn more_runs_than_are_asked_for_at_a_time() {
    if !has_scan("host_map::more_runs_than_are_asked_for_at_a_time") {
        return;
    }
    let len = BLOCKS * BLOCK_SIZE;
    let mapping = Mapping::new(Gpa(0), len as usize, None);
    let region = mapping.region(Gpa(0));
    let slot = Slot::of_region(0, 0, &region);
    advise(&slot, 0..BLOCKS, libc::MADV_NOHUGEPAGE);
    (0..BLOCKS * BLOCK).step_by(2).for_each(|page| write(&region, page..page + 1));
    let told = check(&slot, "every second page");
    assert!(told.iter().enumerate().all(|(page, told)| told.is_some() == page.is_multiple_of(2)));
}

#[test]
fn what_was_not_taken_is_an_error() {
    if !has_scan("host_map::what_was_not_taken_is_an_error") {
        return;
    }
    let mapping = Mapping::new(Gpa(0), BLOCK_SIZE as usize, None);
    let region = mapping.region(Gpa(0));
    let slot = Slot::of_region(0, 0, &region);
    assert_eq!(region.len(), BLOCK_SIZE);
    let map = HostMap::of_slot(&slot).unwrap();
    let Range { start, end } = map.pages();
    for (pages, missing) in [(start - 1..end, start - 1), (start..end + 1, end), (end + 7..end + 9, end + 7)]
    {
        let outcome = Walk::new(&map).holes(|_| Ok::<_, Infallible>(Seen::All)).run(pages);
        let Err(WalkError::Table(HostError::NotTaken { page })) = outcome else { panic!("{outcome:?}") };
        assert_eq!(page, missing);
    }
    // Addresses that no process has, and such as are no addresses.
    for pages in [1 << 40..(1 << 40) + 1, 5..u64::MAX, u64::MAX - 5..u64::MAX] {
        let error = HostMap::take(pages).map(|map| map.pages());
        assert!(
            matches!(&error, Err(HostError::Scan { source, .. }) if source.errno() == libc::EFAULT),
            "{error:?}"
        );
    }
}
