//! What re-arming, refining and sampling cost the host, for 1 GiB of guest memory.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dirty_track::addr::{Gfn, PAGE_BYTES, PageRange};
use dirty_track::rate::Sampler;
use dirty_track::rearm::{DenseSkip, Rearm, SlotRearm};
use dirty_track::refine::{LastSent, Shadow};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Pages of 1 GiB.
const PAGES: usize = 1 << 18;

/// A log with `per_word` of 64 pages dirty; 0.64 is 1 %.
fn log(per_word: f64) -> Vec<u64> {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..PAGES / 64)
        .map(|_| (0..64).fold(0, |word, bit| word | u64::from(random() * 64.0 < per_word) << bit))
        .collect()
}

fn plan(bencher: &mut Criterion) {
    let mut group = bencher.benchmark_group("plan");
    for (name, per_word) in [("0%", 0.0), ("1%", 0.64), ("50%", 32.0), ("100%", 64.0)] {
        let log = log(per_word);
        for (policy_name, policy) in
            [("all", Rearm::All), ("dense-skip", Rearm::DenseSkip(DenseSkip::default()))]
        {
            let mut rearm = SlotRearm::new(policy, PAGES);
            let mut words = log.clone();
            group.bench_function(format!("{policy_name}/{name}"), |bencher| {
                // Copying the log is what KVM_GET_DIRTY_LOG does; it is in the figure: that is all there is to `all`.
                bencher.iter(|| {
                    words.copy_from_slice(&log);
                    let mut coarse = 0;
                    rearm.coarse(&words, |_, bits| coarse |= bits);
                    rearm.plan(&mut words);
                    black_box((&words, coarse));
                });
            });
        }
    }
    group.finish();
}

/// Comparing pages with what was sent: the part of `refine` that is not bookkeeping.
fn compare(bencher: &mut Criterion) {
    const BYTES: usize = 256 << 20;
    let frames = PageRange { start: Gfn(0), pages: (BYTES / PAGE_BYTES) as u64 };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap();
    let mut shadow = Shadow::new([frames]);
    for gfn in frames.iter() {
        let contents = [gfn.0 as u8; PAGE_BYTES];
        memory.get_slice(GuestAddress(gfn.gpa().0), PAGE_BYTES).unwrap().copy_from(&contents[..]);
        shadow.record(gfn, &contents);
    }
    let copy: Vec<u8> = frames.iter().flat_map(|gfn| [gfn.0 as u8; PAGE_BYTES]).collect();
    let mut group = bencher.benchmark_group("refine");
    group.sample_size(10).throughput(Throughput::Bytes(BYTES as u64));
    // What the memory of this host can do: two plain buffers, page by page.
    group.bench_function("memcmp", |bencher| {
        bencher.iter(|| {
            let pages = frames.iter().zip(copy.as_chunks::<PAGE_BYTES>().0);
            let same = pages.filter(|(gfn, page)| shadow.page(*gfn) == Some(page));
            assert_eq!(same.count() as u64, frames.pages);
        });
    });
    group.bench_function("compare", |bencher| {
        bencher.iter(|| {
            let mut page = [0; PAGE_BYTES];
            let same = frames.iter().filter(|gfn| {
                let slice = memory.get_slice(GuestAddress(gfn.gpa().0), PAGE_BYTES).unwrap();
                slice.copy_to(&mut page[..]);
                shadow.page(*gfn) == Some(&page)
            });
            assert_eq!(same.count() as u64, frames.pages);
        });
    });
    group.finish();
}

fn sample(bencher: &mut Criterion) {
    let frames = PageRange { start: Gfn(0), pages: PAGES as u64 };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGES * PAGE_BYTES)]).unwrap();
    let sampler = || Sampler::new(&memory, &[frames], Sampler::PER_GIB).unwrap();
    bencher.bench_function("sample/look", |bencher| {
        bencher.iter_batched_ref(sampler, |sampler| sampler.look(&memory).unwrap(), BatchSize::LargeInput);
    });
}

criterion_group!(benches, plan, compare, sample);
criterion_main!(benches);
