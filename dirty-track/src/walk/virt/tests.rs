//! Views of tables that a test builds, and of hostile ones, against a search page by page.

use proptest::prelude::*;

use super::*;
use crate::addr::{LEAVES_PER_BLOCK, PageSize};
use crate::walk::x86::tests::{Guest, HOSTILE_PAGES, Hostile, hostile, naive};

const BLOCK: u64 = LEAVES_PER_BLOCK;

// Flags of entries, as the processor has them.
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;

const AMPLE: Limits = Limits { looks: 1 << 16, runs: 1 << 10 };

fn frames(start: u64, pages: u64) -> PageRange {
    PageRange { start: Gfn(start), pages }
}

fn view(guest: &Guest, dirty: &[PageRange]) -> VirtualView {
    virtual_view(&guest.memory, guest.paging, dirty, AMPLE).unwrap()
}

/// First virtual page and frames of each run.
fn runs(view: &VirtualView) -> Vec<(u64, PageRange)> {
    assert_eq!(view.cut_short_at, None);
    view.runs.iter().map(|run| (run.start >> PAGE_SHIFT, run.frames)).collect()
}

/// First page of the half of the address space that kernels have.
fn kernel(guest: &Guest) -> u64 {
    (1 << 52) - if guest.paging.la57 { 1 << 44 } else { 1 << 35 }
}

#[test]
fn every_address_that_maps_a_dirty_frame_is_found() {
    for la57 in [false, true] {
        let mut guest = Guest::new(la57, 32);
        // A frame that a process, another mapping of it and the kernel's map of all memory have.
        guest.map(0x400, PageSize::K4, 0x7777, USER | NO_EXECUTE);
        guest.map(0x900, PageSize::K4, 0x7777, USER | WRITABLE);
        guest.map(0x901, PageSize::K4, 0x8888, USER | WRITABLE);
        let kernel = kernel(&guest);
        guest.map(kernel, PageSize::G1, 0, WRITABLE);
        let view = view(&guest, &[frames(0x7777, 1)]);
        let found = [0x400, 0x900, kernel + 0x7777].map(|page| (page, frames(0x7777, 1)));
        assert_eq!(runs(&view), found);
        let rights: Vec<_> = view.runs.iter().map(|run| (run.writable, run.user, run.no_execute)).collect();
        assert_eq!(rights, [(false, true, true), (true, true, false), (true, false, false)]);
        // An address is one: of the upper half too.
        assert_eq!(view.runs[2].start, (kernel << PAGE_SHIFT) + 0x777_7000);
        assert!(view.runs[2].start >= 0xff00 << 48);
        assert_eq!(view.malformed, 0);
    }
}

#[test]
fn of_a_mapping_only_what_is_dirty_is_told() {
    let mut guest = Guest::new(false, 32);
    guest.map(2 * BLOCK, PageSize::M2, 8 * BLOCK, 0);
    for page in 0..10 {
        guest.map(page, PageSize::K4, 100 + page, 0);
    }
    let dirty = [frames(8 * BLOCK + 500, 100), frames(103, 2), frames(90, 11), frames(8 * BLOCK + 7, 1)];
    assert_eq!(
        runs(&view(&guest, &dirty)),
        [
            (0, frames(100, 1)),
            (3, frames(103, 2)),
            (2 * BLOCK + 7, frames(8 * BLOCK + 7, 1)),
            (2 * BLOCK + 500, frames(8 * BLOCK + 500, 12)),
        ]
    );
    assert_eq!(runs(&view(&guest, &[])), []);
    assert_eq!(runs(&view(&guest, &[frames(102, 0), frames(1000, 5)])), []);
}

#[test]
fn ranges_may_overlap_and_come_in_any_order_and_be_as_long_as_can_be() {
    let mut guest = Guest::new(false, 32);
    (0..8).for_each(|page| guest.map(page, PageSize::K4, 100 + page, 0));
    let dirty = [frames(105, 2), frames(101, 2), frames(102, 4), frames(u64::MAX - 2, u64::MAX)];
    assert_eq!(runs(&view(&guest, &dirty)), [(1, frames(101, 6))]);
    assert_eq!(runs(&view(&guest, &[frames(0, u64::MAX)])), [(0, frames(100, 8))]);
}

#[test]
fn neighbours_are_one_run_if_their_frames_and_rights_allow() {
    let mut guest = Guest::new(false, 32);
    // Small and huge, side by side, in both spaces.
    guest.map(BLOCK - 1, PageSize::K4, 4 * BLOCK - 1, WRITABLE);
    guest.map(BLOCK, PageSize::M2, 4 * BLOCK, WRITABLE);
    guest.map(2 * BLOCK, PageSize::M2, 5 * BLOCK, WRITABLE);
    guest.map(3 * BLOCK, PageSize::M2, 6 * BLOCK, 0);
    guest.map(4 * BLOCK, PageSize::M2, 8 * BLOCK, 0);
    let all = [frames(0, 100 * BLOCK)];
    assert_eq!(
        runs(&view(&guest, &all)),
        [
            (BLOCK - 1, frames(4 * BLOCK - 1, 2 * BLOCK + 1)),
            (3 * BLOCK, frames(6 * BLOCK, BLOCK)),
            (4 * BLOCK, frames(8 * BLOCK, BLOCK)),
        ]
    );
}

#[test]
fn the_last_run_of_all_ends_with_the_last_address() {
    let mut guest = Guest::new(false, 32);
    guest.map((1 << 52) - 1, PageSize::K4, 9, 0);
    guest.map(0, PageSize::K4, 10, 0);
    let last = (1 << 52) - 1;
    assert_eq!(runs(&view(&guest, &[frames(9, 2)])), [(0, frames(10, 1)), (last, frames(9, 1))]);
}

#[test]
fn a_view_that_was_cut_short_says_where() {
    let mut guest = Guest::new(false, 32);
    // Every second frame: no run is longer than a page.
    (0..100).for_each(|page| guest.map(page, PageSize::K4, 2 * page, 0));
    let dirty = [frames(0, 1000)];
    let limited = |looks, runs| {
        let limits = Limits { looks, runs };
        virtual_view(&guest.memory, guest.paging, &dirty, limits).unwrap()
    };
    for (limit, view) in [(7, limited(1 << 16, 7)), (30, limited(30, 1 << 10))] {
        assert_eq!(view.cut_short_at, Some(limit << PAGE_SHIFT));
        assert_eq!(view.runs.len() as u64, limit);
    }
    let none = limited(0, 0);
    assert_eq!((none.runs.len(), none.cut_short_at), (0, Some(0)));
    assert_eq!(limited(1 << 16, 100).cut_short_at, None);
}

#[test]
fn registers_that_make_no_sense_are_an_error() {
    let guest = Guest::new(false, 2);
    let paging = Paging { maxphyaddr: 64, ..guest.paging };
    let error = virtual_view(&guest.memory, paging, &[], AMPLE);
    assert_eq!(error, Err(X86Error::PhysBits(64)));
}

/// A search page by page: what the guest finds at `page`, if it is dirty.
fn dirty_at(guest: &Guest, dirty: &[PageRange], page: u64) -> Option<(Gfn, bool, bool, bool)> {
    let (_, mapping) = naive(guest, page)?;
    let is_dirty = dirty.iter().any(|range| range.contains(mapping.gfn));
    is_dirty.then_some((mapping.gfn, mapping.writable, mapping.user, mapping.no_execute))
}

fn check(hostile: &Hostile, dirty: &[PageRange], limits: Limits) -> Result<(), TestCaseError> {
    let guest = hostile.guest();
    let view = virtual_view(&guest.memory, guest.paging, dirty, limits).unwrap();
    prop_assert!(view.runs.len() <= limits.runs && view.malformed <= limits.looks, "bounded");
    let complete = view.cut_short_at.map_or(1 << 52, |address| address >> PAGE_SHIFT);
    let mut end = 0;
    for run in &view.runs {
        let start = run.start >> PAGE_SHIFT;
        prop_assert!(end <= start && run.frames.pages > 0, "ascending");
        end = start + run.frames.pages;
        prop_assert!(end <= complete);
        for at in [0, run.frames.pages / 2, run.frames.pages - 1] {
            let told = (Gfn(run.frames.start.0 + at), run.writable, run.user, run.no_execute);
            prop_assert_eq!(Some(told), dirty_at(&guest, dirty, start + at));
        }
    }
    for &page in hostile.pages.iter().filter(|&&page| page < complete) {
        let told = view.runs.iter().find(|run| {
            let start = run.start >> PAGE_SHIFT;
            (start..start + run.frames.pages).contains(&page)
        });
        prop_assert_eq!(told.is_some(), dirty_at(&guest, dirty, page).is_some(), "page {:#x}", page);
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_view_is_what_a_search_finds_whatever_the_guest_wrote(
        hostile in hostile(),
        dirty in prop::collection::vec((0..2 * HOSTILE_PAGES, 1..4u64), 0..5),
        most in any::<bool>(),
        looks in 0..3000u64,
        runs in 0..200usize,
    ) {
        let mut dirty: Vec<_> = dirty.into_iter().map(|(start, pages)| frames(start, pages)).collect();
        if most {
            dirty.push(frames(HOSTILE_PAGES / 2, 1 << 39));
        }
        check(&hostile, &dirty, Limits { looks, runs })?;
    }
}
