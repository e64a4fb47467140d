//! On real memory: writers that never stop, and a copy that was made at the moment.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, RwLock};
use std::thread;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::addr::{Gfn, PAGE_BYTES, PAGE_SIZE, PageRange};
use crate::image::ImageReader;
use crate::log::StreamId;
use crate::mix::below;
use crate::region::RegionBitmap;

type Memory = GuestMemoryMmap<RegionBitmap>;

const ID: StreamId = StreamId(77);

/// Two slots with a hole between them; the second is not of whole words.
const FIRST: u64 = 5 << 20;
const SECOND: u64 = (3 << 20) + 5 * PAGE_SIZE;
const SECOND_AT: u64 = 16 << 20;

fn memory() -> Memory {
    let ranges = [(GuestAddress(0), FIRST as usize), (GuestAddress(SECOND_AT), SECOND as usize)];
    Memory::from_ranges(&ranges).unwrap()
}

fn slots(memory: &Memory) -> Vec<Slot> {
    memory.iter().enumerate().map(|(id, region)| Slot::of_region(id as u32, 0, region)).collect()
}

fn end() -> Gfn {
    crate::addr::Gpa(SECOND_AT + SECOND).gfn()
}

struct Home(PathBuf);

impl Home {
    fn new() -> Home {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cow-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Home(path)
    }

    fn image(&self) -> Arc<ImageWriter> {
        Arc::new(ImageWriter::create(&self.0.join("memory"), ID, end()).unwrap())
    }

    fn read(&self, image: Arc<ImageWriter>) -> ImageReader {
        let saved = Arc::into_inner(image).unwrap().finish(&self.0.join("sums")).unwrap();
        ImageReader::open(&self.0.join("memory"), &self.0.join("sums"), ID, end(), saved.digests).unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A host without it has nothing to test.
fn cow(test: &str, memory: &Memory, image: &Arc<ImageWriter>) -> Option<Cow> {
    match Cow::new(slots(memory), Arc::clone(image), true) {
        Ok(cow) => Some(cow),
        Err(error @ CowError::Userfaultfd(_)) => {
            eprintln!("SKIPPED: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn frames(memory: &Memory) -> Vec<PageRange> {
    slots(memory).iter().map(Slot::frames).collect()
}

fn copy(memory: &Memory) -> Vec<(PageRange, Vec<u8>)> {
    let read = |range: PageRange| {
        let mut bytes = vec![0; range.bytes() as usize];
        memory.read_slice(&mut bytes, GuestAddress(range.start.gpa().0)).unwrap();
        (range, bytes)
    };
    frames(memory).into_iter().map(read).collect()
}

/// Threads that write to random pages without end, with a gate as vCPUs have.
fn write_on<T>(memory: &Memory, during: impl FnOnce(&RwLock<()>) -> T) -> T {
    let (stop, gate, begun) = (AtomicBool::new(false), RwLock::new(()), Barrier::new(4));
    thread::scope(|scope| {
        for writer in 0..3u64 {
            let (stop, gate, begun) = (&stop, &gate, &begun);
            scope.spawn(move || {
                let all = frames(memory);
                begun.wait();
                for step in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let _open = gate.read().unwrap();
                    let range = all[(step % 2) as usize];
                    let page = below(step * 3 + writer, range.pages);
                    let at = range.start.gpa().0 + page * PAGE_SIZE + writer * 64;
                    memory.write_obj(step, GuestAddress(at)).unwrap();
                }
            });
        }
        begun.wait();
        let outcome = during(&gate);
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

#[test]
fn the_image_is_memory_as_it_was_at_the_moment() {
    for round in 0..12 {
        let (memory, home) = (memory(), Home::new());
        let image = home.image();
        let Some(cow) = cow("the_image_is_memory_as_it_was_at_the_moment", &memory, &image) else { return };
        let (then, report) = write_on(&memory, |gate| {
            if round % 3 > 0 {
                cow.protect(Wanted::All).unwrap();
            }
            let still = gate.write().unwrap();
            cow.freeze(Wanted::All).unwrap();
            let then = copy(&memory);
            drop(still);
            (then, cow.save(1 + round % 2).unwrap())
        });
        let read = home.read(image);
        for (range, bytes) in &then {
            let mut found = vec![0; bytes.len()];
            read.read(*range, &mut found).unwrap();
            let differs = (0..range.pages as usize).find(|page| {
                found[page * PAGE_BYTES..][..PAGE_BYTES] != bytes[page * PAGE_BYTES..][..PAGE_BYTES]
            });
            assert_eq!(differs, None, "round {round}: {report:?}");
        }
        assert!(copy(&memory) != then, "nobody wrote meanwhile: the test shows nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_marked_is_saved_and_nothing_else(
        touched in prop::collection::vec(0..2053usize, 0..40),
        known in prop::collection::vec(0..2053usize, 0..8),
        late in prop::collection::vec(0..2053usize, 0..40),
    ) {
        let (memory, home) = (memory(), Home::new());
        let image = home.image();
        let Some(cow) = cow("what_is_marked_is_saved_and_nothing_else", &memory, &image) else { return Ok(()) };
        // As slots are counted in marks: the first has 1280 pages, which are whole words.
        let frame = |page: usize| match page {
            0..1280 => Gfn(page as u64),
            _ => Gfn((SECOND_AT / PAGE_SIZE) + page as u64 - 1280),
        };
        let write = |page: usize, value: u64| {
            memory.write_obj(value, GuestAddress(frame(page).gpa().0 + 8)).unwrap();
        };
        touched.iter().for_each(|&page| write(page, 1));
        let marks = DirtyBitmap::new(2053);
        known.iter().for_each(|&page| marks.set(page));
        cow.protect(Wanted::Marked(&marks)).unwrap();
        // Some more, written and marked after that.
        late.iter().for_each(|&page| { write(page, 2); marks.set(page) });
        cow.freeze(Wanted::Marked(&marks)).unwrap();
        let then = copy(&memory);
        (0..2053).step_by(7).for_each(|page| write(page, 3));
        cow.save(1).unwrap();
        let read = home.read(image);
        let wanted: BTreeSet<_> = known.iter().chain(&late).copied().collect();
        for page in 0..2053 {
            let (gfn, mut found) = (frame(page), [0; PAGE_BYTES]);
            read.read(PageRange { start: gfn, pages: 1 }, &mut found).unwrap();
            let (range, bytes) = then.iter().find(|(range, _)| range.contains(gfn)).unwrap();
            let at = (gfn.0 - range.start.0) as usize * PAGE_BYTES;
            let expected = if wanted.contains(&page) { &bytes[at..at + PAGE_BYTES] } else { &[0; PAGE_BYTES][..] };
            prop_assert!(found[..] == *expected, "page {}", page);
        }
    }

    #[test]
    fn merged_runs_have_all_pages_and_no_longer_gaps(words in prop::collection::vec(any::<u64>(), 0..6), gap in 0..70usize) {
        let runs: Vec<_> = bitmap::runs(&words).collect();
        let merged: Vec<_> = merged(runs.iter().cloned(), gap).collect();
        prop_assert!(runs.iter().all(|run| merged.iter().any(|all| all.start <= run.start && run.end <= all.end)));
        prop_assert!(merged.windows(2).all(|two| two[1].start - two[0].end > gap));
        prop_assert!(merged.iter().all(|all| runs.iter().any(|run| run.start == all.start) && runs.iter().any(|run| run.end == all.end)));
    }
}

#[test]
fn a_copy_that_fails_leaves_memory_as_it_is_and_nobody_asleep() {
    let (memory, home) = (memory(), Home::new());
    // An image that is too small: a page cannot be saved.
    let image = Arc::new(ImageWriter::create(&home.0.join("memory"), ID, Gfn(1)).unwrap());
    let Some(cow) = cow("a_copy_that_fails_leaves_memory_as_it_is_and_nobody_asleep", &memory, &image) else {
        return;
    };
    write_on(&memory, |gate| {
        let still = gate.write().unwrap();
        cow.freeze(Wanted::All).unwrap();
        drop(still);
        assert!(matches!(cow.save(2), Err(CowError::Image(ImageError::Beyond { .. }))));
    });
    // And one that is given up before it was begun.
    let image = home_image(&home);
    let given_up = Cow::new(slots(&memory), image, true).unwrap();
    given_up.protect(Wanted::All).unwrap();
    given_up.freeze(Wanted::All).unwrap();
    drop(given_up);
    memory.write_obj(1u64, GuestAddress(64)).unwrap();
}

fn home_image(home: &Home) -> Arc<ImageWriter> {
    Arc::new(ImageWriter::create(&home.0.join("another"), ID, end()).unwrap())
}
