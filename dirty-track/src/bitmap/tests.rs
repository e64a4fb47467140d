//! The bitmap against a naive oracle: one bool a page.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::*;
use crate::sys::simd::MOST_WORDS;

/// The naive oracle: one bool a page.
fn to_words(pages: &[bool]) -> Vec<u64> {
    let mut words = vec![0; words_for(pages.len())];
    for (page, _) in pages.iter().enumerate().filter(|(_, dirty)| **dirty) {
        words[page / 64] |= 1 << (page % 64);
    }
    words
}

fn vec_of(run: Range<usize>) -> Vec<Range<usize>> {
    Vec::from([run])
}

fn naive_runs(pages: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in (0..pages.len()).filter(|&page| pages[page]) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

fn naive_blocks(pages: &[bool], first: u64) -> Vec<(u64, u64)> {
    let mut blocks = BTreeMap::new();
    for page in (0..pages.len()).filter(|&page| pages[page]) {
        *blocks.entry((first + page as u64) / 512).or_insert(0) += 1;
    }
    blocks.into_iter().collect()
}

fn snapshot(bitmap: &DirtyBitmap) -> Vec<bool> {
    (0..bitmap.pages()).map(|page| bitmap.get(page)).collect()
}

/// Page sets with the shapes that matter: long runs and gaps that end on, before and after word ends.
fn page_set() -> impl Strategy<Value = Vec<bool>> {
    let length = prop_oneof![Just(1), Just(63), Just(64), Just(65), 1..200usize, 400..1200usize];
    prop::collection::vec((any::<bool>(), length), 0..8).prop_map(|runs| {
        runs.into_iter().flat_map(|(dirty, length)| std::iter::repeat_n(dirty, length)).collect()
    })
}

#[derive(Clone, Debug)]
enum Op {
    Set(usize),
    SetRange(Range<usize>),
    ClearRange(Range<usize>),
    TestAndClear(usize),
    MergeWord(usize, u64),
    Drain,
}

fn op(pages: usize) -> impl Strategy<Value = Op> {
    let range = (0..pages + 70, 0..pages + 70).prop_map(|(start, end)| start..end);
    prop_oneof![
        (0..pages + 70).prop_map(Op::Set),
        range.clone().prop_map(Op::SetRange),
        range.prop_map(Op::ClearRange),
        (0..pages + 70).prop_map(Op::TestAndClear),
        (0..words_for(pages) + 1, any::<u64>()).prop_map(|(word, bits)| Op::MergeWord(word, bits)),
        Just(Op::Drain),
    ]
}

/// Words of all kinds: empty, full, with a few bits or many, and in stretches longer than what is looked at
/// at once.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1),
        Just(1 << 63),
        any::<u64>(),
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(a, b, c)| a & b & c),
        Just(0x5555_5555_5555_5555),
    ];
    let length = prop_oneof![1..4usize, 5..20usize, 60..70usize, 100..200usize];
    prop::collection::vec((word, length), 0..8).prop_map(|stretches| {
        stretches.into_iter().flat_map(|(word, length)| std::iter::repeat_n(word, length)).collect()
    })
}

fn to_pages(words: &[u64]) -> Vec<bool> {
    words.iter().flat_map(|word| (0..64).map(move |bit| word >> bit & 1 != 0)).collect()
}

proptest! {
    /// Portable, AVX2 and AVX-512, as far as this processor has them; by `next`, by `fold`, and by both.
    #[test]
    fn every_path_finds_the_runs_of_the_oracle(words in words(), by_next in 0..400usize) {
        let expected = naive_runs(&to_pages(&words));
        let set: usize = expected.iter().map(|run| run.len()).sum();
        for path in Path::all() {
            let mut runs = Runs::new(&words, path);
            let mut found: Vec<_> = runs.by_ref().take(by_next).collect();
            let left = runs.clone().fold(Vec::new(), |mut found, run| {
                found.push(run);
                found
            });
            let mut one_by_one = Vec::new();
            for run in runs.by_ref() {
                one_by_one.push(run);
            }
            prop_assert_eq!(runs.next(), None, "{:?} stays at its end", path);
            prop_assert_eq!(&one_by_one, &left, "{:?}", path);
            found.extend(left);
            prop_assert_eq!(&found, &expected, "{:?}", path);
            prop_assert_eq!(path.count(&words), set, "{:?}", path);
        }
        prop_assert_eq!(LiveRuns::new(words.iter().copied()).collect::<Vec<_>>(), expected);
    }

    /// A slice may begin and end anywhere; nothing outside of it may show.
    #[test]
    fn no_path_looks_beyond_the_slice(words in words(), cut in any::<(usize, usize)>()) {
        let start = cut.0 % (words.len() + 1);
        let end = start + cut.1 % (words.len() - start + 1);
        let part = &words[start..end];
        for path in Path::all() {
            prop_assert_eq!(Runs::new(part, path).collect::<Vec<_>>(), naive_runs(&to_pages(part)), "{:?}", path);
        }
    }

    /// vm-memory's marks, in bytes and through slices of slices.
    #[test]
    fn marks_of_vm_memory_cover_every_byte(
        len in 1..40_000usize,
        base in 0..50_000usize,
        offset in 0..50_000usize,
        size in 0..50_000usize,
    ) {
        let bitmap = DirtyBitmap::with_len(len);
        bitmap.slice_at(base / 2).slice_at(base - base / 2).mark_dirty(offset, size);
        let written = base + offset..base + offset + size;
        for page in 0..len.div_ceil(4096) {
            let dirty = size > 0 && written.start < (page + 1) * 4096 && written.end > page * 4096;
            prop_assert_eq!(bitmap.dirty_at(page * 4096), dirty);
            prop_assert_eq!(bitmap.slice_at(4096).dirty_at(page * 4096), bitmap.get(page + 1));
        }
    }

    #[test]
    fn the_bitmap_does_what_bools_do(
        (pages, ops) in (1..300usize)
            .prop_flat_map(|pages| (Just(pages), prop::collection::vec(op(pages), 0..40))),
    ) {
        let bitmap = DirtyBitmap::new(pages);
        let mut oracle = vec![false; pages];
        for op in ops {
            match op {
                Op::Set(page) => {
                    bitmap.set(page);
                    if let Some(dirty) = oracle.get_mut(page) {
                        *dirty = true;
                    }
                }
                Op::SetRange(range) => {
                    range.clone().filter(|&page| page < pages).for_each(|page| oracle[page] = true);
                    bitmap.set_range(range);
                }
                Op::ClearRange(range) => {
                    range.clone().filter(|&page| page < pages).for_each(|page| oracle[page] = false);
                    bitmap.clear_range(range);
                }
                Op::TestAndClear(page) => {
                    let was = oracle.get_mut(page).is_some_and(std::mem::take);
                    prop_assert_eq!(bitmap.test_and_clear(page), was);
                }
                Op::MergeWord(word, bits) => {
                    bitmap.merge_word(word, bits);
                    for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                        if let Some(dirty) = oracle.get_mut(word * 64 + bit) {
                            *dirty = true;
                        }
                    }
                }
                Op::Drain => {
                    let mut words = vec![0; words_for(pages)];
                    bitmap.drain(|word, bits| words[word] = bits);
                    prop_assert_eq!(words, to_words(&oracle));
                    oracle.fill(false);
                }
            }
            prop_assert_eq!(snapshot(&bitmap), &oracle[..]);
            prop_assert_eq!(bitmap.count(), oracle.iter().filter(|dirty| **dirty).count());
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), naive_runs(&oracle));
        }
    }

    #[test]
    fn runs_and_blocks_are_those_of_the_oracle(pages in page_set(), first in 0..2000u64) {
        let words = to_words(&pages);
        prop_assert_eq!(runs(&words).collect::<Vec<_>>(), naive_runs(&pages));
        prop_assert_eq!(count(&words), pages.iter().filter(|dirty| **dirty).count());
        prop_assert_eq!(
            block_counts(&words, Gfn(first)).collect::<Vec<_>>(),
            naive_blocks(&pages, first)
        );
    }

    #[test]
    fn a_merge_is_a_union(left in page_set(), right in page_set()) {
        let (a, b) = (DirtyBitmap::new(left.len()), DirtyBitmap::new(right.len()));
        naive_runs(&left).into_iter().for_each(|run| a.set_range(run));
        naive_runs(&right).into_iter().for_each(|run| b.set_range(run));
        a.merge(&b);
        let union: Vec<_> = left
            .iter()
            .enumerate()
            .map(|(page, dirty)| *dirty || right.get(page).copied().unwrap_or(false))
            .collect();
        prop_assert_eq!(snapshot(&a), union);
        prop_assert_eq!(snapshot(&b), right);
    }
}

/// Threads mark while another drains: every mark comes out exactly once.
#[test]
fn no_mark_is_lost_or_doubled_under_concurrency() {
    const PAGES: usize = 4096;
    const THREADS: usize = 3;
    let bitmap = DirtyBitmap::new(PAGES);
    let mut seen = vec![0u32; PAGES];
    let mut take = |word: usize, bits: u64| {
        (0..64).filter(|bit| bits >> bit & 1 != 0).for_each(|bit| seen[word * 64 + bit] += 1);
    };
    std::thread::scope(|scope| {
        // Each page is marked by one thread, once; neighbours in a word belong to different threads.
        let markers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let bitmap = &bitmap;
                scope.spawn(move || (thread..PAGES).step_by(THREADS).for_each(|page| bitmap.set(page)))
            })
            .collect();
        while markers.iter().any(|marker| !marker.is_finished()) {
            bitmap.drain(&mut take);
        }
    });
    bitmap.drain(&mut take);
    assert!(seen.iter().all(|&times| times == 1));
}

/// The buffer for positions fills up and is filled again many times, and a run may be open when it is.
#[test]
fn every_path_goes_through_words_that_change_at_every_bit() {
    for word in [0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 0x8000_0000_0000_0001] {
        let words = vec![word; 1000];
        let expected = naive_runs(&to_pages(&words));
        for path in Path::all() {
            assert_eq!(Runs::new(&words, path).collect::<Vec<_>>(), expected, "{path:?}");
        }
    }
}

/// More words than one call of the search looks at, and one run through nearly all of them.
#[test]
fn every_path_goes_on_after_its_longest_call() {
    // In tests that is a thousand words.
    let mut words = vec![0u64; 3 * MOST_WORDS + 100];
    let last = words.len() - 1;
    words[last] = 1 << 63;
    for path in Path::all() {
        let far = last * 64 + 63..last * 64 + 64;
        assert_eq!(Runs::new(&words, path).collect::<Vec<_>>(), vec_of(far.clone()), "{path:?}");
    }
    words.fill(u64::MAX);
    words[0] = u64::MAX - 1;
    for path in Path::all() {
        let end = words.len() * 64;
        assert_eq!(Runs::new(&words, path).collect::<Vec<_>>(), vec_of(1..end), "{path:?}");
        assert_eq!(path.count(&words), end - 1);
    }
}

#[test]
fn pages_at_the_end_of_the_address_space_are_ignored() {
    let bitmap = DirtyBitmap::new(100);
    bitmap.set(usize::MAX);
    bitmap.set_range(usize::MAX - 1..usize::MAX);
    bitmap.slice_at(usize::MAX).mark_dirty(usize::MAX, usize::MAX);
    bitmap.merge_word(usize::MAX, u64::MAX);
    assert_eq!(
        (bitmap.count(), bitmap.get(usize::MAX), bitmap.test_and_clear(usize::MAX)),
        (0, false, false)
    );
    bitmap.set_range(98..usize::MAX);
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), vec_of(98..100));
    bitmap.clear_range(99..usize::MAX);
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), vec_of(98..99));
}

#[test]
fn memory_of_vm_memory_can_have_it_as_its_bitmap() {
    let memory = GuestMemoryMmap::<DirtyBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    memory.write_obj(1u64, GuestAddress(0x5ffc)).unwrap();
    memory.read_obj::<u64>(GuestAddress(0x8000)).unwrap();
    let region = memory.iter().next().unwrap();
    assert_eq!(region.get_mmap().bitmap().count(), 2);
    assert!(region.bitmap().dirty_at(0x5000) && region.bitmap().dirty_at(0x6000));
}

#[test]
fn words_of_a_large_guest_are_as_many_and_as_clean_as_those_of_a_small_one() {
    for pages in [0, 1, 64, 65, 3 << 24] {
        let words = clean_words(pages);
        assert_eq!((words.len(), count(&words)), (words_for(pages), 0));
        let bitmap = DirtyBitmap::new(pages);
        bitmap.set_range(pages.saturating_sub(70)..pages);
        assert_eq!(bitmap.count(), pages.min(70));
    }
}
