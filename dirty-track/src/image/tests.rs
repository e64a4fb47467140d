//! What is read is what was saved, or an error: against a list of pages, with every kind of damage.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::addr::{PAGE_BYTES, PAGE_SIZE};

const ID: StreamId = StreamId(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);

/// Two chunks and a bit.
const END: Gfn = Gfn(2 * CHUNK as u64 + 100);

/// A directory of its own.
struct Home(PathBuf);

impl Home {
    fn new() -> Home {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("image-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Home(path)
    }

    fn memory(&self) -> PathBuf {
        self.0.join("memory")
    }

    fn sums(&self) -> PathBuf {
        self.0.join("sums")
    }

    fn open(&self, id: StreamId, digests: &[u64]) -> Result<ImageReader, ImageError> {
        ImageReader::open(&self.memory(), &self.sums(), id, END, digests.to_vec())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn page(value: u8) -> Vec<u8> {
    let mut page = vec![0; PAGE_BYTES];
    page[4000] = value;
    page
}

fn write(home: &Home, saves: &[(u64, Vec<u8>)]) -> Saved {
    let image = ImageWriter::create(&home.memory(), ID, END).unwrap();
    for (first, values) in saves {
        let contents: Vec<u8> = values.iter().flat_map(|&value| page(value)).collect();
        image.save(Gfn(*first), &contents).unwrap();
    }
    image.finish(&home.sums()).unwrap()
}

/// Values around the ends of chunks.
fn saves() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
    let first = prop_oneof![0..20u64, 4080..4110u64, 8180..8260u64];
    prop::collection::vec((first, prop::collection::vec(0..3u8, 1..20)), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_was_saved_last_is_read(saves in saves(), start in 0..8290u64, pages in 1..60u64) {
        let home = Home::new();
        let saved = write(&home, &saves);
        let mut expected = vec![0u8; END.0 as usize];
        for (first, values) in &saves {
            expected[*first as usize..][..values.len()].copy_from_slice(values);
        }
        prop_assert_eq!(saved.pages as usize, expected.iter().filter(|value| **value != 0).count());
        let reader = home.open(ID, &saved.digests).unwrap();
        let range = PageRange { start: Gfn(start), pages };
        let mut found = vec![7; pages as usize * PAGE_BYTES];
        if start + pages > END.0 {
            let beyond = matches!(reader.read(range, &mut found), Err(ImageError::Beyond { .. }));
            prop_assert!(beyond);
        } else {
            reader.read(range, &mut found).unwrap();
            for (gfn, bytes) in range.iter().zip(found.chunks(PAGE_BYTES)) {
                prop_assert!(bytes == page(expected[gfn.0 as usize]));
            }
            reader.check(range, &found).unwrap();
            let filled: Vec<_> = reader.filled(range).unwrap().iter().flat_map(PageRange::iter).collect();
            let wanted: Vec<_> = range.iter().filter(|gfn| expected[gfn.0 as usize] != 0).collect();
            prop_assert_eq!(filled, wanted);
        }
    }
}

#[test]
fn holes_stay_holes() {
    use std::os::unix::fs::MetadataExt;
    let home = Home::new();
    write(&home, &[(0, vec![0; 4]), (4100, vec![1])]);
    assert!(fs::metadata(home.memory()).unwrap().blocks() * 512 <= 16 * PAGE_SIZE);
}

#[test]
fn whatever_was_changed_is_found_out() {
    let home = Home::new();
    let saved = write(&home, &[(10, vec![1, 2, 0, 2]), (4200, vec![5])]);
    let all = PageRange { start: Gfn(0), pages: 30 };
    let mut bytes = vec![0; 30 * PAGE_BYTES];
    let mut read = |digests: &[u64], id| home.open(id, digests).and_then(|image| image.read(all, &mut bytes));
    read(&saved.digests, ID).unwrap();

    // Another image's id: the digests are not its own.
    assert!(matches!(read(&saved.digests, StreamId(5)), Err(ImageError::Sums { .. })));
    assert!(matches!(read(&saved.digests[..1], ID), Err(ImageError::Sums { .. })));
    let swapped = [saved.digests[1], saved.digests[0], saved.digests[2]];
    assert!(matches!(read(&swapped, ID), Err(ImageError::Sums { .. })));

    let memory = File::options().write(true).read(true).open(home.memory()).unwrap();
    let sums = File::options().write(true).read(true).open(home.sums()).unwrap();
    let mut damage = |file: &File, at: u64, with: &[u8]| {
        let mut before = vec![0; with.len()];
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(with, at).unwrap();
        let outcome = read(&saved.digests, ID);
        file.write_all_at(&before, at).unwrap();
        read(&saved.digests, ID).unwrap();
        outcome.expect_err("damage")
    };
    // A bit; a page of zeros; a page moved from elsewhere, the same contents as it has itself but for the place.
    assert!(matches!(damage(&memory, 11 * PAGE_SIZE, &[1]), ImageError::Page { gfn: Gfn(11), .. }));
    assert!(matches!(damage(&memory, 13 * PAGE_SIZE, &page(0)), ImageError::Page { gfn: Gfn(13), .. }));
    assert!(matches!(damage(&memory, 10 * PAGE_SIZE, &page(2)), ImageError::Page { gfn: Gfn(10), .. }));
    // Sums: one lost, one moved with its page.
    assert!(matches!(damage(&sums, 10 * 8, &[0; 8]), ImageError::Sums { .. }));
    let mut moved = [0; 8];
    sums.read_exact_at(&mut moved, 11 * 8).unwrap();
    assert!(matches!(damage(&sums, 20 * 8, &moved), ImageError::Sums { .. }));

    // What is mapped as it is, is checked where it should be zero, too.
    let image = home.open(ID, &saved.digests).unwrap();
    let mut raw = vec![0; 30 * PAGE_BYTES];
    memory.write_all_at(&[9], 25 * PAGE_SIZE + 7).unwrap();
    image.read_raw(all, &mut raw).unwrap();
    assert!(matches!(image.check(all, &raw), Err(ImageError::Page { gfn: Gfn(25), .. })));

    memory.set_len(END.gpa().0 - 1).unwrap();
    assert!(matches!(read(&saved.digests, ID), Err(ImageError::Length { .. })));
    memory.set_len(END.gpa().0).unwrap();
    sums.set_len(8).unwrap();
    assert!(matches!(read(&saved.digests, ID), Err(ImageError::Length { .. })));
}

#[test]
fn a_page_beyond_the_end_cannot_be_saved() {
    let home = Home::new();
    let image = ImageWriter::create(&home.memory(), ID, END).unwrap();
    assert!(matches!(image.save(Gfn(END.0 - 1), &[0; 2 * PAGE_BYTES]), Err(ImageError::Beyond { .. })));
    assert!(matches!(image.save(Gfn(u64::MAX), &[0; PAGE_BYTES]), Err(ImageError::Beyond { .. })));
}
