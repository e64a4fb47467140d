//! The contract of [`Marks`], under every order of events that the memory model allows (loom tries them all).
//!
//! Guest pages are atomics that are written and read without any order of their own, as guest memory is. Each
//! model ends with what the whole library is for: a copy that was brought up to date from the taken marks
//! alone is equal to the memory.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use loom::thread;

use super::marks::{Marks, Word};

const PAGES: usize = 2;

/// A word as C++20 describes it, on top of loom's atomics.
///
/// Loom's own do not keep a plain store from coming between the two halves of an earlier read-modify-write, so
/// it finds executions that cannot be as soon as one word has both. Here every change of the word is a relaxed
/// read-modify-write of loom's, which puts all changes in one order, and what each of them *synchronizes with*
/// is kept by hand: a change with release order has a channel of its own, a read-modify-write also has those
/// of the change that it follows (it goes on with their release sequences), a plain store has not.
///
/// With `FENCE` or `SWAP` false, one of the two things is left out that the contract needs: then models must
/// fail.
#[derive(Debug)]
struct Checked<const FENCE: bool, const SWAP: bool> {
    /// Number of the last change.
    last: AtomicU64,
    changes: Mutex<Vec<Change>>,
    /// One channel for each change; made beforehand, for all threads to know.
    channels: [AtomicU64; MOST_CHANGES],
}

/// More than any model makes of one word.
const MOST_CHANGES: usize = 10;

/// What a change of a word left behind.
#[derive(Clone, Debug, Default)]
struct Change {
    bits: u64,
    /// The channels of those who are released by it.
    channels: Vec<usize>,
}

type Correct = Checked<true, true>;
type WithoutFence = Checked<false, true>;
type WithoutSwap = Checked<true, false>;

impl<const FENCE: bool, const SWAP: bool> Checked<FENCE, SWAP> {
    /// Changes the word, and returns what was there.
    fn change(&self, order: Ordering, goes_on: bool, to: impl Fn(u64) -> u64) -> Change {
        let number = {
            let mut changes = self.changes.lock().unwrap();
            changes.push(Change::default());
            changes.len() - 1
        };
        let mut channels = Vec::new();
        if matches!(order, Ordering::Release | Ordering::AcqRel) {
            self.channels[number].fetch_add(1, Ordering::Release);
            channels.push(number);
        }
        let before = self.last.swap(number as u64, Ordering::Relaxed);
        // Loom lets other threads run at operations on its own types only: nobody is between the swap and this.
        let mut changes = self.changes.lock().unwrap();
        let before = changes[before as usize].clone();
        if goes_on {
            channels.extend(&before.channels);
        }
        changes[number] = Change { bits: to(before.bits), channels };
        before
    }

    fn modify(&self, order: Ordering, to: impl Fn(u64) -> u64) -> u64 {
        let before = self.change(order, true, to);
        self.acquire(&before, order);
        before.bits
    }

    /// Sees what the threads that are released by `change` had done.
    fn acquire(&self, change: &Change, order: Ordering) {
        if matches!(order, Ordering::Acquire | Ordering::AcqRel) {
            for &channel in &change.channels {
                self.channels[channel].fetch_add(0, Ordering::Acquire);
            }
        }
    }
}

impl<const FENCE: bool, const SWAP: bool> Word for Checked<FENCE, SWAP> {
    fn zeroed(len: usize) -> Box<[Self]> {
        let word = || Checked {
            last: AtomicU64::new(0),
            changes: Mutex::new(vec![Change::default()]),
            channels: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        (0..len).map(|_| word()).collect()
    }

    fn load(&self, order: Ordering) -> u64 {
        let last = self.last.load(Ordering::Relaxed);
        let change = self.changes.lock().unwrap()[last as usize].clone();
        self.acquire(&change, order);
        change.bits
    }

    fn store(&self, bits: u64, order: Ordering) {
        self.change(order, false, |_| bits);
    }

    fn swap(&self, bits: u64, order: Ordering) -> u64 {
        if SWAP {
            return self.modify(order, |_| bits);
        }
        let were = self.load(Ordering::Acquire);
        self.store(bits, Ordering::Release);
        were
    }

    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.modify(order, |were| were | bits)
    }

    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.modify(order, |were| were & bits)
    }

    fn fence() {
        if FENCE {
            fence(Ordering::SeqCst);
        }
    }
}

/// Guest memory and its marks. Page `i` is page `i` of both.
struct Guest<W> {
    pages: [AtomicU64; PAGES],
    marks: Marks<W>,
}

impl<W: Word> Guest<W> {
    fn new(words: usize) -> Arc<Guest<W>> {
        Arc::new(Guest { pages: std::array::from_fn(|_| AtomicU64::new(0)), marks: Marks::new(words) })
    }

    fn write(&self, page: usize) {
        self.pages[page].store(1, Ordering::Relaxed);
    }

    /// A thread that writes `page` and then marks it.
    fn writer(guest: &Arc<Self>, page: usize, mark: Mark) -> thread::JoinHandle<()>
    where
        W: Send + Sync + 'static,
    {
        let guest = guest.clone();
        thread::spawn(move || {
            guest.write(page);
            match mark {
                Mark::Page => guest.marks.set(0, 1 << page),
                Mark::Range(pages) => guest.marks.set_range(pages.clone()),
            }
        })
    }

    /// Copies the pages of `bits`.
    fn copy(&self, bits: u64, copy: &mut [u64; PAGES]) {
        for (page, copied) in copy.iter_mut().enumerate().filter(|(page, _)| bits >> page & 1 != 0) {
            *copied = self.pages[page].load(Ordering::Relaxed);
        }
    }

    /// Takes all marks, then copies what was marked.
    fn drain(&self, copy: &mut [u64; PAGES]) {
        let mut taken = 0;
        self.marks.take_all(|word, bits| taken |= if word == 0 { bits } else { 0 });
        self.copy(taken, copy);
    }

    /// After all writers have ended.
    fn check(&self, copy: &mut [u64; PAGES]) {
        self.drain(copy);
        let memory = std::array::from_fn(|page| self.pages[page].load(Ordering::Relaxed));
        assert_eq!(*copy, memory, "a write was lost");
    }
}

/// What a writer does with page 0 or 1 after it wrote it.
#[derive(Clone, Copy)]
enum Mark {
    /// Marks it alone.
    Page,
    /// Marks a range that it is in.
    Range(&'static Range<usize>),
}

const WORD: Mark = Mark::Range(&(0..64));
const PART: Mark = Mark::Range(&(0..3));
const WORD_AND_PART: Mark = Mark::Range(&(0..70));

/// Two writers, one a page, while a third thread drains once, or clears a range and copies it.
fn race<W: Word + Send + Sync + 'static>(marks: [Mark; PAGES], clear: bool) {
    loom::model(move || {
        let guest = Guest::<W>::new(2);
        let writers: Vec<_> =
            marks.into_iter().enumerate().map(|(page, mark)| Guest::writer(&guest, page, mark)).collect();
        let mut copy = [0; PAGES];
        if clear {
            guest.marks.clear_range(0..PAGES);
            guest.copy(u64::MAX, &mut copy);
        } else {
            guest.drain(&mut copy);
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        guest.check(&mut copy);
    });
}

#[test]
fn loom_pages_of_one_word() {
    race::<Correct>([Mark::Page, Mark::Page], false);
    race::<Correct>([Mark::Page, Mark::Page], true);
}

#[test]
fn loom_a_page_and_a_whole_word() {
    race::<Correct>([Mark::Page, WORD], false);
    race::<Correct>([Mark::Page, WORD], true);
}

#[test]
fn loom_two_whole_words() {
    race::<Correct>([WORD, WORD], false);
    race::<Correct>([WORD, WORD_AND_PART], false);
}

#[test]
fn loom_a_page_and_a_part_of_a_word() {
    race::<Correct>([Mark::Page, PART], false);
    race::<Correct>([PART, WORD_AND_PART], false);
}

#[test]
#[should_panic(expected = "a write was lost")]
fn loom_finds_out_when_marks_are_taken_by_a_load_and_a_store() {
    race::<WithoutSwap>([Mark::Page, Mark::Page], false);
}

#[test]
#[should_panic(expected = "a write was lost")]
fn loom_finds_out_when_the_fences_are_missing() {
    race::<WithoutFence>([Mark::Page, WORD], false);
}

/// Of two takers of one mark, exactly one gets it, and the page's contents with it.
#[test]
fn loom_two_takers() {
    loom::model(|| {
        let guest = Guest::<Correct>::new(1);
        let other = {
            let guest = guest.clone();
            thread::spawn(move || {
                let mut copy = [0; PAGES];
                let taken = guest.marks.take(0, 1);
                guest.copy(taken, &mut copy);
                assert_eq!(copy[0], taken, "a write was lost");
                taken
            })
        };
        let writer = {
            let guest = guest.clone();
            thread::spawn(move || {
                guest.write(0);
                guest.marks.set(0, 1);
            })
        };
        let mut takes = 0;
        let mut drain = || {
            let mut copy = [0; PAGES];
            guest.marks.take_all(|_, bits| {
                takes += bits;
                guest.copy(bits, &mut copy);
                assert_eq!(copy[0], 1, "a write was lost");
            });
        };
        drain();
        writer.join().unwrap();
        let others = other.join().unwrap();
        drain();
        assert_eq!(takes + others, 1, "taken by one, once");
    });
}

/// A merge passes marks on, and the order with them.
#[test]
fn loom_a_merge_on_the_way() {
    loom::model(|| {
        let guest = Guest::<Correct>::new(1);
        let merged = Arc::new(Marks::<Correct>::new(1));
        let mut threads: Vec<_> = [Mark::Page, WORD]
            .into_iter()
            .enumerate()
            .map(|(page, mark)| Guest::writer(&guest, page, mark))
            .collect();
        threads.push({
            let (guest, merged) = (guest.clone(), merged.clone());
            thread::spawn(move || merged.merge(&guest.marks, PAGES))
        });
        // Marks that were merged, and what was copied because of them. The first page is marked by its writer
        // or as part of the whole word; in the latter case its contents may still be the old ones.
        let mut copy = [0; PAGES];
        let mut taken = 0;
        merged.take_all(|_, bits| taken |= bits);
        guest.copy(taken, &mut copy);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(guest.marks.load(0) & 0b11, 0b11, "merging takes nothing");
        assert!(taken & 0b10 == 0 || copy[1] == 1, "a write was lost");
    });
}
