//! Saves pages: the mechanism of [`Claims`](super::claim::Claims) on real memory.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::addr::{BLOCK_SIZE, PAGE_BYTES, PAGE_SHIFT};
use crate::cow::claim::{Mechanism, Outcome};
use crate::cow::{CowError, Part, Phase, Shared, gfn};
use crate::tracker::change::Tracked;

/// Pages that are saved together when somebody waits for one: 64 KiB, which is copied in less time than it takes to hear
/// of another fault.
const WINDOW: usize = 16;

/// What one thread that saves has to itself.
#[derive(Debug)]
pub(super) struct Saver<'a> {
    shared: &'a Shared,
    /// A block: the most that is copied before it is written.
    buffer: Vec<u8>,
}

impl<'a> Saver<'a> {
    pub(super) fn new(shared: &'a Shared) -> Saver<'a> {
        Saver { shared, buffer: vec![0; BLOCK_SIZE as usize] }
    }

    /// Somebody waits to write at `address`.
    pub(super) fn serve(&mut self, address: u64) {
        let shared = self.shared;
        let part = shared
            .parts
            .iter()
            .find(|part| (part.slot.hva(0)..part.slot.hva(part.slot.pages())).contains(&address));
        let Some(part) = part else { return };
        let page = ((address - part.slot.hva(0)) >> PAGE_SHIFT) as usize;
        let phase = shared.phase();
        match *phase {
            Phase::Before | Phase::Failed => {
                // With the phase held: nothing is fixed between the note and the opening.
                let pages = part.slot.widen(page..page + 1, part.slot.page());
                part.armed.clear_range(pages.clone());
                open(shared, part, pages);
                shared.counters.let_through.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Phase::Saving => drop(phase),
        }
        let heard = Instant::now();
        let window = if part.slot.page().leaves() == 1 { WINDOW } else { 1 };
        let mut by = OfPart { shared, part, buffer: &mut self.buffer, copied: Vec::new(), opened: None };
        let outcome = part.claims.serve(page, window, &mut by);
        let took = by.opened.map_or(0, |opened: Instant| (opened - heard).as_nanos() as u64);
        let counters = &shared.counters;
        match outcome {
            Outcome::Saved(pages) => {
                counters.faults.fetch_add(1, Ordering::Relaxed);
                counters.fault_pages.fetch_add(pages as u64, Ordering::Relaxed);
                counters.worst_ns.fetch_max(took, Ordering::Relaxed);
                counters.total_ns.fetch_add(took, Ordering::Relaxed);
            }
            Outcome::Unwanted => drop(counters.let_through.fetch_add(1, Ordering::Relaxed)),
            Outcome::Taken => {}
        }
    }

    /// Saves what nobody has claimed of `pages`, a block.
    pub(super) fn save_block(&mut self, part: &Part, pages: Range<usize>) {
        let shared = self.shared;
        let mut by = OfPart { shared, part, buffer: &mut self.buffer, copied: Vec::new(), opened: None };
        part.claims.save_rest(pages, &mut by);
    }
}

fn open(shared: &Shared, part: &Part, pages: Range<usize>) {
    let (start, len) = part.slot.addresses(&pages);
    loop {
        let Err(error) = shared.uffd.unprotect(start, len) else { return };
        match error.errno() {
            // Mappings change at this moment.
            libc::EAGAIN => std::thread::yield_now(),
            // It is not registered any more: open.
            libc::ENOENT => {
                let _ = shared.uffd.wake(start, len);
                return;
            }
            _ => {
                // Nobody holds the phase but who serves a fault before the moment, and then there is no copy to be lost.
                let _ = shared.uffd.wake(start, len);
                return shared.lose(CowError::Open(error));
            }
        }
    }
}

struct OfPart<'a> {
    shared: &'a Shared,
    part: &'a Part,
    buffer: &'a mut [u8],
    /// Runs of pages whose contents are in the buffer, one behind the other.
    copied: Vec<Range<usize>>,
    /// When the last page was opened.
    opened: Option<Instant>,
}

impl Mechanism for OfPart<'_> {
    fn copy(&mut self, pages: Range<usize>) {
        let at = self.copied.iter().map(ExactSizeIterator::len).sum::<usize>() * PAGE_BYTES;
        let into = &mut self.buffer[at..at + pages.len() * PAGE_BYTES];
        // The slot has these pages.
        self.part.slot.slot().read(pages.start, into);
        self.copied.push(pages);
    }

    fn open(&mut self, pages: Range<usize>) {
        open(self.shared, self.part, pages);
        self.opened = Some(Instant::now());
    }

    fn write(&mut self) {
        let mut at = 0;
        let mut pages = 0;
        for run in std::mem::take(&mut self.copied) {
            let bytes = at..at + run.len() * PAGE_BYTES;
            at = bytes.end;
            pages += run.len();
            let saved = self.shared.image.save(gfn(&self.part.slot, run.start), &self.buffer[bytes]);
            if let Err(error) = saved {
                self.shared.fail(error.into());
            }
        }
        self.shared.left.fetch_sub(pages, Ordering::AcqRel);
    }
}
