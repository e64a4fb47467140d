//! Claims under every order of events (loom tries them all): two who save, the handler of faults and a copier, and a guest
//! that writes.
//!
//! A page is a lock around what is in it and whether it is protected, as the kernel's page tables are: whoever writes looks
//! and writes in one step. A writer who finds it protected says so, and tries again when it is not.

use std::ops::Range;
use std::sync::atomic::Ordering;

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Mutex};
use loom::thread;

use super::claim::{Claims, Mechanism, Outcome, Word};

const PAGES: usize = 2;
/// What a page has at the moment.
const THEN: u8 = 1;
/// What the guest writes later.
const LATER: u8 = 2;

impl Word for AtomicU64 {
    fn zero() -> AtomicU64 {
        AtomicU64::new(0)
    }

    fn store(&self, bits: u64) {
        self.store(bits, Ordering::Release);
    }

    fn keep(&self, bits: u64) -> u64 {
        self.fetch_and(bits, Ordering::AcqRel)
    }
}

/// A word whose change is two steps: a model with it must fail.
#[derive(Debug)]
struct TwoSteps(AtomicU64);

impl Word for TwoSteps {
    fn zero() -> TwoSteps {
        TwoSteps(AtomicU64::new(0))
    }

    fn store(&self, bits: u64) {
        self.0.store(bits, Ordering::Release);
    }

    fn keep(&self, bits: u64) -> u64 {
        let before = self.0.load(Ordering::Acquire);
        self.0.store(before & bits, Ordering::Release);
        before
    }
}

#[derive(Debug)]
struct Page {
    contents: u8,
    protected: bool,
}

struct World<W> {
    memory: [Mutex<Page>; PAGES],
    claims: Claims<W>,
    /// By page: what was saved of it.
    saved: [Mutex<Vec<u8>>; PAGES],
}

/// One who saves. With `EARLY` pages are opened before they are copied: a model with it must fail.
struct By<'a, W, const EARLY: bool> {
    world: &'a World<W>,
    copied: Vec<(usize, u8)>,
}

impl<W, const EARLY: bool> By<'_, W, EARLY> {
    fn lift(&self, pages: Range<usize>) {
        pages.for_each(|page| self.world.memory[page].lock().unwrap().protected = false);
    }
}

impl<W, const EARLY: bool> Mechanism for By<'_, W, EARLY> {
    fn copy(&mut self, pages: Range<usize>) {
        if EARLY {
            self.lift(pages.clone());
        }
        for page in pages {
            let contents = self.world.memory[page].lock().unwrap().contents;
            self.copied.push((page, contents));
        }
    }

    fn open(&mut self, pages: Range<usize>) {
        self.lift(pages);
    }

    fn write(&mut self) {
        for (page, contents) in self.copied.drain(..) {
            self.world.saved[page].lock().unwrap().push(contents);
        }
    }
}

/// A thread with room for frames that were not optimized: loom's own have less.
fn spawn(run: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    thread::Builder::new().stack_size(1 << 16).spawn(run).expect("loom always has a thread")
}

fn race<W: Word + Send + Sync + 'static, const EARLY: bool>() {
    loom::model(|| spawn(model::<W, EARLY>).join().unwrap());
}

fn model<W: Word + Send + Sync + 'static, const EARLY: bool>() {
    let page = || Mutex::new(Page { contents: THEN, protected: true });
    let world = Arc::new(World {
        memory: [page(), page()],
        claims: Claims::<W>::new(PAGES, 1),
        saved: [Mutex::default(), Mutex::default()],
    });
    world.claims.want(vec![(1 << PAGES) - 1]);
    let copier = {
        let world = Arc::clone(&world);
        spawn(move || {
            let mut by = By::<W, EARLY> { world: &world, copied: Vec::new() };
            world.claims.save_rest(0..PAGES, &mut by);
        })
    };
    let guest = {
        let world = Arc::clone(&world);
        spawn(move || {
            let mut page = world.memory[0].lock().unwrap();
            if !page.protected {
                page.contents = LATER;
            }
        })
    };
    // The handler has heard of a write to the first page; what comes along depends on who is faster.
    let mut by = By::<W, EARLY> { world: &world, copied: Vec::new() };
    let outcome = world.claims.serve(0, 16, &mut by);
    assert_ne!(outcome, Outcome::Unwanted);
    copier.join().unwrap();
    guest.join().unwrap();
    for page in 0..PAGES {
        assert_eq!(*world.saved[page].lock().unwrap(), [THEN], "page {page} is saved as it was, and once");
        assert!(!world.memory[page].lock().unwrap().protected, "nobody waits for ever");
    }
}

#[test]
fn loom_each_page_is_saved_once_as_it_was_and_opened() {
    race::<AtomicU64, false>();
}

#[test]
#[should_panic(expected = "saved as it was, and once")]
fn loom_finds_out_a_claim_in_two_steps() {
    race::<TwoSteps, false>();
}

#[test]
#[should_panic(expected = "saved as it was, and once")]
fn loom_finds_out_who_opens_before_he_copies() {
    race::<AtomicU64, true>();
}
