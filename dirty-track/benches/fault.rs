//! What serving faults costs whoever waits for a page: first touches under each policy of prefaulting, and first writes
//! to protected pages next to a bare loop that reads a message and lifts the protection.

use std::sync::Arc;
use std::thread;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dirty_track::addr::PAGE_SIZE;
use dirty_track::fault::{Config, FaultTracker, Policies, Server, Source};
use dirty_track::region::RegionBitmap;
use dirty_track::sys::uffd::lookout::Lookout;
use dirty_track::sys::uffd::{Mode, Uffd, Wait};
use dirty_track::tracker::{Slot, Tracker};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Region = GuestRegionMmap<RegionBitmap>;

/// 16 MiB.
const PAGES: u64 = 4096;

fn region() -> Region {
    Region::from_range(GuestAddress(0), (PAGES * PAGE_SIZE) as usize, None).unwrap()
}

fn serve(region: &Region, prefault: &str) -> Server {
    let policies = Policies { prefault: prefault.parse().unwrap(), ..Policies::default() };
    let config = Config { policies, ..Config::default() };
    Server::start(vec![(Slot::of_region(0, 0, region), Source::Zero)], config).unwrap()
}

fn touch(region: &Region, page: u64) {
    region.read_obj::<u64>(MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
}

fn write(region: &Region, page: u64) {
    region.write_obj(page, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
}

fn cold(bencher: &mut Criterion) {
    let mut group = bencher.benchmark_group("cold");
    group.sample_size(10).throughput(Throughput::Elements(PAGES));
    for prefault in ["none", "around=64K", "block"] {
        let setup = || {
            let region = region();
            let server = serve(&region, prefault);
            (region, server)
        };
        group.bench_function(format!("sequential/{prefault}"), |bencher| {
            bencher.iter_batched_ref(
                setup,
                |(region, _)| (0..PAGES).for_each(|page| touch(region, page)),
                BatchSize::PerIteration,
            );
        });
    }
    // One page of a hundred, each in a window of its own.
    group.throughput(Throughput::Elements(PAGES / 100));
    for prefault in ["none", "around=64K"] {
        let setup = || {
            let region = region();
            let server = serve(&region, prefault);
            (region, server)
        };
        group.bench_function(format!("sparse/{prefault}"), |bencher| {
            bencher.iter_batched_ref(
                setup,
                |(region, _)| (0..PAGES / 100).for_each(|page| touch(region, page * 37 % 41 * 99)),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn first_write(bencher: &mut Criterion) {
    const WRITES: u64 = 512;
    let mut group = bencher.benchmark_group("first write");
    group.sample_size(20).throughput(Throughput::Elements(WRITES));

    let memory = region();
    let server = Arc::new(serve(&memory, "block"));
    let mut tracker = FaultTracker::new(Arc::clone(&server));
    tracker.arm().unwrap();
    (0..WRITES).for_each(|page| touch(&memory, page));
    group.bench_function("served", |bencher| {
        bencher.iter_batched(
            || tracker.harvest().unwrap().commit(),
            |()| (0..WRITES).for_each(|page| write(&memory, page)),
            BatchSize::PerIteration,
        );
    });

    let bare = region();
    (0..WRITES).for_each(|page| write(&bare, page));
    let slot = Slot::of_region(0, 0, &bare);
    let uffd = Uffd::open(Mode::Sync).unwrap();
    uffd.register(slot.hva(), slot.len()).unwrap();
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            while uffd.wait(&stop, &mut Lookout::default()).unwrap() == Wait::Faults {
                if let Some(address) = uffd.fault().unwrap() {
                    uffd.unprotect(address & !(PAGE_SIZE - 1), PAGE_SIZE).unwrap();
                }
            }
        });
        group.bench_function("bare loop", |bencher| {
            bencher.iter_batched(
                || uffd.protect(slot.hva(), WRITES * PAGE_SIZE).unwrap(),
                |()| (0..WRITES).for_each(|page| write(&bare, page)),
                BatchSize::PerIteration,
            );
        });
        stop.write(1).unwrap();
    });
    group.finish();
}

criterion_group!(benches, cold, first_write);
criterion_main!(benches);
