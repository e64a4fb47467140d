//! Where in guest RAM everything lies: a pure function from the monitor's memory map to a plan.
//!
//! The kernel's own data (page tables of the region's window, then the ledger) follows the image and stays
//! below 4 GiB, so that the boot page tables reach it. The region takes the largest usable range, which may
//! be what is left of that same range or one above the 32-bit hole.

/// Bytes in a small page.
pub const PAGE: u64 = 4096;
/// Bytes in a huge page, to which the region is aligned.
pub const BLOCK: u64 = 2 << 20;
/// Most pages in a region: what one top-level page-table entry maps (512 GiB).
pub const MAX_PAGES: u64 = 1 << 27;
/// The boot page tables map what lies below.
const MAPPED: u64 = 4 << 30;

/// Addresses (guest-physical) of what is placed in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The region, aligned to [`BLOCK`].
    pub region: u64,
    /// Pages in the region.
    pub pages: u64,
    /// The window's page-directory-pointer table; the page directories follow it.
    pub tables: u64,
    /// Page tables, one page for every 512 region pages; without `small` there are none.
    pub leaves: u64,
    /// The ledger's `writes`.
    pub writes: u64,
    /// The ledger's `reads`.
    pub reads: u64,
    /// One past the last of the kernel's own bytes.
    pub end: u64,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The memory map has no usable range around the image, or no room at all after it.
    NoMemory,
    /// The region that was asked for does not fit; this many pages would.
    TooLarge(u64),
}

/// Plans for an image that ends at `image_end`, in the usable `(start, end)` ranges of RAM. `wanted` pages, or
/// with 0 as many as there is room for, in whole blocks. `small`: with page tables for 4 KiB pages.
pub fn plan(
    ranges: impl Iterator<Item = (u64, u64)> + Clone,
    image_end: u64,
    wanted: u64,
    small: bool,
) -> Result<Layout, LayoutError> {
    let own = ranges.clone().find(|&(start, end)| start < image_end && image_end < end);
    let (_, own_end) = own.ok_or(LayoutError::NoMemory)?;
    let own_end = own_end.min(MAPPED);
    // The room for the region and its kernel data, with `pages` pages in one of the ranges.
    let fits = |pages: u64, (start, end): (u64, u64)| {
        let layout = place(image_end, pages, small);
        let shared = start < image_end && image_end < end;
        let first = if shared { layout.end } else { start }.next_multiple_of(BLOCK);
        let room = end.saturating_sub(first) / PAGE;
        (layout.end <= own_end && pages <= room).then_some(Layout { region: first, ..layout })
    };
    let mut best: Option<(Layout, (u64, u64))> = None;
    for range in ranges.filter(|&(start, end)| start < end && end <= 1 << 52 && end >= image_end) {
        // The most pages that fit, by bisection: if n fit, so do fewer.
        let (mut low, mut high) = (0, ((range.1 - range.0) / PAGE).min(MAX_PAGES) + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle, range).is_some() { low = middle } else { high = middle }
        }
        let pages = if low >= 512 { low / 512 * 512 } else { low };
        if pages > best.map_or(0, |(layout, _)| layout.pages) {
            best = fits(pages, range).map(|layout| (layout, range));
        }
    }
    let (most, range) = best.ok_or(LayoutError::NoMemory)?;
    if wanted == 0 { Ok(most) } else { fits(wanted, range).ok_or(LayoutError::TooLarge(most.pages)) }
}

/// Everything but the region, one after the other from `image_end` on.
fn place(image_end: u64, pages: u64, small: bool) -> Layout {
    let tables = image_end.next_multiple_of(PAGE);
    let directories = tables + PAGE;
    let leaves = directories + pages.div_ceil(512 * 512) * PAGE;
    let writes = leaves + if small { pages.div_ceil(512) * PAGE } else { 0 };
    let reads = writes + (8 * pages).next_multiple_of(PAGE);
    let end = reads + (4 * pages).next_multiple_of(PAGE);
    Layout { region: 0, pages, tables, leaves, writes, reads, end }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    /// Where the image ends in these tests.
    const IMAGE_END: u64 = 0x1b_a000;

    /// RAM of `size` bytes on a PC: a legacy hole and one of 1 GiB below 4 GiB.
    fn pc(size: u64) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, 0x9_fc00), (MIB, size.min(3 * GIB))];
        if size > 3 * GIB {
            ranges.push((4 * GIB, size + GIB));
        }
        ranges
    }

    fn check(layout: &Layout, ranges: &[(u64, u64)], small: bool) {
        let Layout { region, pages, tables, leaves, writes, reads, end } = *layout;
        assert!(pages > 0 && region % BLOCK == 0);
        assert!(ranges.iter().any(|&(s, e)| s <= region && region + pages * PAGE <= e), "region in RAM");
        assert!(ranges.iter().any(|&(s, e)| s < IMAGE_END && end <= e), "kernel in RAM");
        assert!(end <= MAPPED);
        assert!(region >= end || region + pages * PAGE <= tables, "region and kernel apart");
        let starts = [tables, leaves, writes, reads, end];
        assert!(starts.iter().all(|start| start % PAGE == 0));
        assert!(tables >= IMAGE_END);
        assert!(leaves - tables >= PAGE + pages.div_ceil(512 * 512) * PAGE);
        assert!(writes - leaves >= if small { pages.div_ceil(512) * PAGE } else { 0 });
        assert!(reads - writes >= 8 * pages && end - reads >= 4 * pages);
    }

    #[test]
    fn machines_of_all_sizes() {
        for size in
            [16 * MIB, 64 * MIB, 256 * MIB, GIB, 3 * GIB, 4 * GIB, 6 * GIB, 7 * GIB, 64 * GIB, 512 * GIB]
        {
            for small in [false, true] {
                let ranges = pc(size);
                let layout = plan(ranges.iter().copied(), IMAGE_END, 0, small).expect("room");
                check(&layout, &ranges, small);
                assert_eq!(layout.pages % 512, 0);
                let largest = ranges.iter().map(|(start, end)| end - start).max().expect("not empty");
                // The ledger and the page tables cost half a percent, rounding a block or three.
                assert!(layout.pages * PAGE + largest / 150 + 4 * BLOCK >= largest, "{} MiB", size / MIB);
            }
        }
    }

    #[test]
    fn above_the_hole_if_there_is_more() {
        let region = |size| plan(pc(size).into_iter(), IMAGE_END, 0, false).expect("room").region;
        assert!(region(3 * GIB) < GIB);
        assert!(region(5 * GIB) < GIB);
        assert_eq!(region(7 * GIB), 4 * GIB);
    }

    #[test]
    fn what_was_asked_for_or_how_much_there_is() {
        for size in [64 * MIB, GIB, 64 * GIB] {
            let ranges = pc(size);
            let most = plan(ranges.iter().copied(), IMAGE_END, 0, true).expect("room").pages;
            for wanted in [1, 511, 513, most] {
                let layout = plan(ranges.iter().copied(), IMAGE_END, wanted, true).expect("room");
                check(&layout, &ranges, true);
                assert_eq!(layout.pages, wanted);
            }
            let error = plan(ranges.iter().copied(), IMAGE_END, most + 600, true);
            assert_eq!(error, Err(LayoutError::TooLarge(most)));
            let error = plan(ranges.iter().copied(), IMAGE_END, u64::MAX / PAGE, true);
            assert_eq!(error, Err(LayoutError::TooLarge(most)));
        }
    }

    #[test]
    fn no_room() {
        let none = |ranges: &[(u64, u64)]| plan(ranges.iter().copied(), IMAGE_END, 0, false);
        assert_eq!(none(&[]), Err(LayoutError::NoMemory));
        assert_eq!(none(&[(0, MIB)]), Err(LayoutError::NoMemory));
        assert_eq!(none(&[(MIB, IMAGE_END)]), Err(LayoutError::NoMemory));
        assert_eq!(none(&[(MIB, 2 * MIB)]), Err(LayoutError::NoMemory));
        // Plenty of memory, but none for the ledger.
        assert_eq!(none(&[(MIB, IMAGE_END + PAGE), (4 * GIB, 8 * GIB)]), Err(LayoutError::NoMemory));
    }

    proptest! {
        #[test]
        fn any_map_gives_a_sound_plan_or_none(
            mut edges in proptest::collection::vec(0u64..1 << 41, 2..12),
            wanted in prop_oneof![Just(0u64), 1..1u64 << 28, any::<u64>().prop_map(|bytes| bytes / PAGE)],
            small: bool,
        ) {
            edges.iter_mut().for_each(|edge| *edge &= !(PAGE - 1));
            edges.sort_unstable();
            let mut ranges: Vec<_> = edges.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            ranges.retain(|&(start, end)| start < end && start > 64 * MIB);
            ranges.insert(0, (MIB, 64 * MIB));
            if let Ok(layout) = plan(ranges.iter().copied(), IMAGE_END, wanted, small) {
                check(&layout, &ranges, small);
                prop_assert!(wanted == 0 || layout.pages == wanted);
            }
        }
    }
}
