//! What the dirty bitmap costs: marking it, and reading runs out of that of a large guest.
//!
//! `cargo bench -p dirty-track --bench bitmap`. Each group has its baseline in the same run: a plain word scan
//! for the runs, vm-memory's own bitmap (a read-modify-write for each bit) for the marks.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use dirty_track::bitmap::{self, DirtyBitmap};
use vm_memory::bitmap::AtomicBitmap;

const PAGE_SIZE: usize = 4096;

/// A guest of 12 TiB: 384 MiB of bitmap.
const LARGE_GUEST: usize = (12 << 40) / PAGE_SIZE;

/// A small, well-mixed generator (xorshift64*): the bench needs the same pages in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// How far it is to the next page, when every page is dirty with probability `share`.
    fn gap(&mut self, share: f64) -> usize {
        let uniform = ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        (uniform.ln() / (1.0 - share).ln()) as usize + 1
    }
}

/// Makes `share` of all pages dirty, at random. All of `words` is written, so that none of it is the kernel's
/// zero page.
fn fill(words: &mut [u64], share: f64) {
    words.fill(u64::MAX);
    words.fill(0);
    if share == 0.0 {
        return;
    }
    let mut random = Random(1);
    let mut page = random.gap(share) - 1;
    while page < words.len() * 64 {
        words[page / 64] |= 1 << (page % 64);
        page += random.gap(share);
    }
}

/// The baseline: word by word, bit by bit, a run that ends with its word going on in the next.
fn plain_scan(words: &[u64], mut each: impl FnMut(Range<usize>)) {
    let mut open: Option<usize> = None;
    for (index, &word) in words.iter().enumerate() {
        let base = index * 64;
        let mut left = word;
        if let Some(start) = open {
            let ones = left.trailing_ones() as usize;
            if ones == 64 {
                continue;
            }
            each(start..base + ones);
            open = None;
            left &= u64::MAX << ones;
        }
        while left != 0 {
            let low = left.trailing_zeros() as usize;
            let ones = (left >> low).trailing_ones() as usize;
            if low + ones == 64 {
                open = Some(base + low);
                break;
            }
            each(base + low..base + low + ones);
            left &= u64::MAX << (low + ones);
        }
    }
    if let Some(start) = open {
        each(start..words.len() * 64);
    }
}

/// What is done with a run: little, but something that depends on both of its ends.
fn digest(sum: u64, run: &Range<usize>) -> u64 {
    sum.wrapping_mul(3).wrapping_add((run.start ^ run.end << 1) as u64)
}

fn runs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("runs of a 12 TiB guest");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(2));
    let mut words = bitmap::clean_words(LARGE_GUEST);
    for percent in [0.0, 0.1, 1.0, 5.0] {
        fill(&mut words, percent / 100.0);
        let by_iterator = bitmap::runs(&words).fold(0, |sum, run| digest(sum, &run));
        let mut by_scan = 0;
        plain_scan(&words, |run| by_scan = digest(by_scan, &run));
        assert_eq!(by_iterator, by_scan, "both find the same runs");

        group.bench_function(BenchmarkId::new("for_each", percent), |bencher| {
            bencher.iter(|| bitmap::runs(black_box(&words)).fold(0, |sum, run| digest(sum, &run)));
        });
        group.bench_function(BenchmarkId::new("next", percent), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                for run in bitmap::runs(black_box(&words)) {
                    sum = digest(sum, &run);
                }
                sum
            });
        });
        group.bench_function(BenchmarkId::new("plain scan", percent), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                plain_scan(black_box(&words), |run| sum = digest(sum, &run));
                sum
            });
        });
    }
    group.bench_function("count", |bencher| bencher.iter(|| bitmap::count(black_box(&words))));
    group.finish();
}

/// Pages of the bitmap that is marked: 16 KiB of words, which stay in the nearest cache.
const MARKED: usize = 1 << 17;

/// Time of `iterations` marks of `len` pages each, spread over a bitmap that is made clean, out of the
/// measurement, whenever all of it is marked. Ranges begin `shift` pages after a word does.
fn time_marks(
    iterations: u64,
    len: usize,
    shift: usize,
    mark: impl Fn(Range<usize>),
    clean: impl Fn(),
) -> Duration {
    let step = (len + shift).next_multiple_of(64);
    let mut left = iterations as usize;
    let mut spent = Duration::ZERO;
    while left > 0 {
        clean();
        let ranges = left.min(MARKED / step);
        let begin = Instant::now();
        for index in 0..ranges {
            let start = index * step + shift;
            mark(black_box(start..start + len));
        }
        spent += begin.elapsed();
        left -= ranges;
    }
    spent
}

fn marks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mark");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let ours = DirtyBitmap::new(MARKED);
    let theirs = AtomicBitmap::new(MARKED * PAGE_SIZE, NonZeroUsize::new(PAGE_SIZE).unwrap());
    let drain = || ours.drain(|_, _| {});
    for (len, shift) in [(1, 7), (64, 0), (64, 7), (512, 0), (512, 7)] {
        let name =
            if shift == 0 { format!("{len} pages, aligned") } else { format!("{len} pages, unaligned") };
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("set_range", &name), |bencher| {
            bencher.iter_custom(|n| time_marks(n, len, shift, |pages| ours.set_range(pages), drain));
        });
        group.bench_function(BenchmarkId::new("bit by bit", &name), |bencher| {
            let mark =
                |pages: Range<usize>| theirs.set_addr_range(pages.start * PAGE_SIZE, pages.len() * PAGE_SIZE);
            bencher.iter_custom(|n| time_marks(n, len, shift, mark, || theirs.reset()));
        });
    }
    group.finish();
}

criterion_group!(benches, runs, marks);
criterion_main!(benches);
