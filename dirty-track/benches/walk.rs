//! What the walk costs, for 1 GiB, beside its naive twins.
//!
//! `cargo bench -p dirty-track --bench walk`. Each group has its baseline in the same run: for cleaning, the same table
//! asked page by page; for the guest's page tables, a recursive descent that reads entry by entry and knows no races,
//! no limits and no malformed entries.

use std::cell::RefCell;
use std::convert::Infallible;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use dirty_track::addr::{Gfn, LEAVES_PER_BLOCK, PAGE_SHIFT, PAGE_SIZE, PageRange, PageSize};
use dirty_track::walk::sim::{Entry, Sim};
use dirty_track::walk::virt::{Limits, virtual_view};
use dirty_track::walk::x86::{GuestTables, Paging};
use dirty_track::walk::{Change, Dirty, HugeEntry, Look, Protect, Seen, Step, Table, Walk, clean_and_record};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Pages of 1 GiB.
const PAGES: u64 = PageSize::G1.leaves();

/// A small, well-mixed generator (xorshift64*): the bench needs the same pages in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % end
    }
}

/// `share` percent of all pages, at random.
fn some_pages(share: u64) -> Vec<u64> {
    let mut random = Random(1);
    (0..PAGES).filter(|_| random.below(100) < share).collect()
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// The baseline of [`clean_and_record`]: every page is asked for, and cleaned alone.
fn page_by_page(table: &Sim, pages: Range<u64>, mut dirty: impl FnMut(u64)) {
    let mut page = pages.start;
    while page < pages.end {
        match table.look(page..page + 1).unwrap() {
            Look::Leaves { leaf, .. } if leaf.dirty => {
                if table.change_leaves(page..page + 1, leaf, Change::Clean) == Ok(1) {
                    dirty(page);
                    page += 1;
                }
            }
            Look::Huge { size, huge } if huge.dirty => {
                let entry = HugeEntry { pages: page..page + size.leaves(), size, huge };
                if table.change_huge(&entry, Change::Clean) == Ok(true) {
                    entry.pages.clone().for_each(&mut dirty);
                    page = entry.pages.end;
                }
            }
            _ => page += 1,
        }
    }
}

/// Time of `iterations` runs of `clean` over `table`, which `write` makes dirty before each.
fn time_cleaning(iterations: u64, write: &dyn Fn(), clean: &dyn Fn() -> u64) -> Duration {
    (0..iterations)
        .map(|_| {
            write();
            let begin = Instant::now();
            black_box(clean());
            begin.elapsed()
        })
        .sum()
}

fn cleaning(criterion: &mut Criterion) {
    let mut group = group(criterion, "clean and record 1 GiB");
    for (name, size, share) in [
        ("2M, clean", PageSize::M2, 0),
        ("2M, all dirty", PageSize::M2, 100),
        ("4K, clean", PageSize::K4, 0),
        ("4K, 1 % dirty", PageSize::K4, 1),
        ("4K, 50 % dirty", PageSize::K4, 50),
        ("4K, all dirty", PageSize::K4, 100),
    ] {
        let table = Sim::new(1);
        for page in (0..PAGES).step_by(size.leaves() as usize) {
            table.map(page, size, Entry::WRITABLE).unwrap();
        }
        let pages = some_pages(share);
        let write = || pages.iter().for_each(|&page| table.write(page).unwrap());
        let walk = || {
            let mut dirty = Dirty::default();
            clean_and_record(&table, 0..PAGES, &mut dirty).unwrap();
            dirty.pages()
        };
        let naive = || {
            let mut count = 0;
            page_by_page(&table, 0..PAGES, |_| count += 1);
            count
        };
        write();
        let walked = walk();
        write();
        assert_eq!(naive(), walked, "both find the same pages");
        group.bench_function(BenchmarkId::new("walk", name), |bencher| {
            bencher.iter_custom(|iterations| time_cleaning(iterations, &write, &walk));
        });
        group.bench_function(BenchmarkId::new("page by page", name), |bencher| {
            bencher.iter_custom(|iterations| time_cleaning(iterations, &write, &naive));
        });
    }
    group.finish();
}

const PAGING: Paging = Paging { cr3: PAGE_SIZE, la57: false, nxe: true, maxphyaddr: 46 };

/// Guest memory that begins with page tables which map 1 GiB from virtual page 0 on: by pages of `size`, to the frames
/// that `frame` says.
fn guest(size: PageSize, mut frame: impl FnMut(u64) -> u64) -> GuestMemoryMmap {
    const PRESENT: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    let put = |table: u64, index: u64, entry: u64| {
        memory.write_obj(entry, GuestAddress(table * PAGE_SIZE + index * 8)).unwrap();
    };
    put(1, 0, (2 * PAGE_SIZE) | PRESENT);
    put(2, 0, (3 * PAGE_SIZE) | PRESENT);
    for block in 0..PAGES / LEAVES_PER_BLOCK {
        if size == PageSize::M2 {
            put(3, block, frame(block * LEAVES_PER_BLOCK) << PAGE_SHIFT | PRESENT | LARGE);
            continue;
        }
        put(3, block, ((4 + block) * PAGE_SIZE) | PRESENT);
        for leaf in 0..LEAVES_PER_BLOCK {
            let entry = frame(block * LEAVES_PER_BLOCK + leaf) << PAGE_SHIFT | PRESENT;
            put(4 + block, leaf, entry);
        }
    }
    memory
}

/// The baseline of the walk over [`GuestTables`]. `each` gets the first virtual page of an entry, how many, and the
/// first frame.
fn descend(
    memory: &GuestMemoryMmap,
    table: u64,
    level: u32,
    page: u64,
    each: &mut impl FnMut(u64, u64, u64),
) {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    for index in 0..512 {
        let entry: u64 = memory.read_obj(GuestAddress(table + index * 8)).unwrap();
        let page = page + (index << (9 * level));
        match entry {
            _ if entry & 1 == 0 => {}
            _ if level == 0 || entry & 1 << 7 != 0 => {
                each(page, 1 << (9 * level), (entry & ADDRESS) >> PAGE_SHIFT);
            }
            _ => descend(memory, entry & ADDRESS, level - 1, page, each),
        }
    }
}

/// What is done with a run: little, but something that depends on all of it.
fn digest(sum: &mut u64, page: u64, pages: u64, gfn: u64) {
    *sum = sum.wrapping_add(page.wrapping_mul(3) ^ gfn.wrapping_mul(pages));
}

fn walk_tables(memory: &GuestMemoryMmap, mut each: impl FnMut(u64, u64, u64)) {
    let tables = GuestTables::new(memory, PAGING, u64::MAX).unwrap();
    let each = RefCell::new(&mut each);
    Walk::new(&tables)
        .huge(|entry| {
            each.borrow_mut()(entry.pages.start, entry.pages.end - entry.pages.start, entry.huge.gfn.0);
            Ok::<_, Infallible>(Step::Handled)
        })
        .leaves(|pages, leaf| {
            each.borrow_mut()(pages.start, pages.end - pages.start, leaf.gfn.0);
            Ok(Seen::All)
        })
        .run(tables.pages())
        .unwrap();
}

fn guest_tables(criterion: &mut Criterion) {
    let dirty: Vec<_> =
        some_pages(1).into_iter().map(|page| PageRange { start: Gfn(page), pages: 1 }).collect();
    let mut bits = vec![false; PAGES as usize];
    dirty.iter().for_each(|range| bits[range.start.0 as usize] = true);

    for (name, size, scattered) in [
        ("2M", PageSize::M2, false),
        ("4K, neighbouring frames", PageSize::K4, false),
        ("4K, scattered frames", PageSize::K4, true),
    ] {
        // An odd factor scatters and loses no frame.
        let memory = guest(size, |page| if scattered { page * 12_345_677 % PAGES } else { page });
        let covered = || {
            let mut pages = 0;
            walk_tables(&memory, |_, count, _| pages += count);
            pages
        };
        assert_eq!(covered(), PAGES);
        let mut group = group(criterion, "page tables of 1 GiB");
        group.bench_function(BenchmarkId::new("walk", name), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                walk_tables(&memory, |page, pages, gfn| digest(&mut sum, page, pages, gfn));
                sum
            });
        });
        group.bench_function(BenchmarkId::new("descent", name), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                let mut each = |page, pages, gfn| digest(&mut sum, page, pages, gfn);
                descend(&memory, PAGING.cr3, 3, 0, &mut each);
                sum
            });
        });
        group.finish();

        let mut group = self::group(criterion, "virtual view of 1 GiB, 1 % dirty");
        let view = || virtual_view(&memory, PAGING, black_box(&dirty), Limits::default()).unwrap();
        let naive = || {
            let mut found = Vec::new();
            descend(&memory, PAGING.cr3, 3, 0, &mut |page, pages, gfn| {
                found.extend(
                    (0..pages).filter(|offset| bits[(gfn + offset) as usize]).map(|offset| page + offset),
                );
            });
            found
        };
        let pages: Vec<_> = view()
            .runs
            .iter()
            .flat_map(|run| (run.start >> PAGE_SHIFT..).take(run.frames.pages as usize))
            .collect();
        assert_eq!(naive(), pages, "both find the same pages");
        group.bench_function(BenchmarkId::new("view", name), |bencher| bencher.iter(view));
        group.bench_function(BenchmarkId::new("descent", name), |bencher| bencher.iter(naive));
        group.finish();
    }
}

criterion_group!(benches, cleaning, guest_tables);
criterion_main!(benches);
