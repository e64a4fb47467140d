//! Which pages of a slot are tracked: all, or ranges that were chosen.
//!
//! Ranges are ascending, not empty, and neither overlap nor touch. A mask besides has one bit for each page, so
//! that a harvest leaves pages out word by word.

use std::ops::Range;
use std::sync::Arc;

use crate::bitmap;
use crate::tracker::wp_slot::masks;

/// The tracked pages of a slot, counted from the slot's start. Clones share what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    ranges: Arc<[Range<usize>]>,
    /// None when all pages are chosen.
    mask: Option<Arc<[u64]>>,
}

impl Chosen {
    /// All of a slot of `pages` pages.
    pub(crate) fn all(pages: usize) -> Chosen {
        Chosen { ranges: Arc::new([0..pages]), mask: None }
    }

    /// The pages of `ranges`, in any order, of a slot of `pages` pages.
    pub(crate) fn of(ranges: &[Range<usize>], pages: usize) -> Chosen {
        let mut mask = vec![0; bitmap::words_for(pages)];
        for range in ranges {
            masks(range.clone(), |word, bits| mask[word] |= bits);
        }
        let ranges: Arc<[_]> = bitmap::runs(&mask).collect();
        if *ranges == [0..pages] { Chosen::all(pages) } else { Chosen { ranges, mask: Some(mask.into()) } }
    }

    /// The ranges; none when nothing is chosen.
    pub(crate) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Whether all pages of the slot are.
    pub(crate) fn is_all(&self) -> bool {
        self.mask.is_none()
    }

    /// The chosen pages of word number `word`. Beyond the slot's end anything, if all are chosen.
    pub(crate) fn bits(&self, word: usize) -> u64 {
        self.mask.as_ref().map_or(u64::MAX, |mask| mask[word])
    }

    /// Takes the pages that are not chosen out of `words`, the slot's from its first page on.
    pub(crate) fn mask(&self, words: &mut [u64]) {
        if let Some(mask) = &self.mask {
            words.iter_mut().zip(&**mask).for_each(|(word, bits)| *word &= bits);
        }
    }

    /// `pages` as far as they are in the same chosen range as `page`; none when it is in none.
    pub(crate) fn around(&self, page: usize, pages: Range<usize>) -> Option<Range<usize>> {
        let range = self.ranges.get(self.ranges.partition_point(|range| range.end <= page))?;
        range.contains(&page).then(|| pages.start.max(range.start)..pages.end.min(range.end))
    }

    /// The ranges of what is chosen here and not by `other`, for the same slot.
    pub(crate) fn minus(&self, other: &Chosen) -> Vec<Range<usize>> {
        if other.is_all() {
            return Vec::new();
        }
        let mut left = Vec::new();
        for range in self.ranges() {
            let mut start = range.start;
            let first = other.ranges.partition_point(|cut| cut.end <= start);
            for cut in other.ranges[first..].iter().take_while(|cut| cut.start < range.end) {
                if start < cut.start {
                    left.push(start..cut.start);
                }
                start = cut.end;
            }
            if start < range.end {
                left.push(start..range.end);
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::bitmap::PAGES_PER_WORD;

    const PAGES: usize = 200;

    fn ranges() -> impl Strategy<Value = Vec<Range<usize>>> {
        prop::collection::vec((0..PAGES, 0..80usize), 0..6).prop_map(|ranges| {
            ranges.into_iter().map(|(start, len)| start..(start + len).min(PAGES)).collect()
        })
    }

    proptest! {
        #[test]
        fn chosen_pages_are_a_set(one in ranges(), other in ranges(), page in 0..PAGES, around in ranges()) {
            let set = |ranges: &[Range<usize>]| ranges.iter().cloned().flatten().collect::<BTreeSet<_>>();
            let (a, b) = (Chosen::of(&one, PAGES), Chosen::of(&other, PAGES));
            prop_assert_eq!(set(a.ranges()), set(&one));
            prop_assert!(a.ranges().windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(a.is_all(), set(&one).len() == PAGES);
            prop_assert_eq!(set(&a.minus(&b)), &set(&one) - &set(&other));
            let has = |page: usize| a.bits(page / PAGES_PER_WORD) >> (page % PAGES_PER_WORD) & 1 != 0;
            prop_assert!((0..PAGES).all(|page| has(page) == set(&one).contains(&page)));
            let mut words = vec![u64::MAX; bitmap::words_for(PAGES)];
            a.mask(&mut words);
            prop_assert!(words.iter().enumerate().all(|(word, bits)| *bits == a.bits(word)));
            for pages in around.into_iter().filter(|pages| pages.contains(&page)) {
                let found = a.around(page, pages.clone());
                prop_assert_eq!(found.is_some(), set(&one).contains(&page));
                if let Some(found) = found {
                    prop_assert!(found.contains(&page) && found.clone().all(has));
                    prop_assert!(found.start == pages.start || !has(found.start - 1));
                    prop_assert!(found.end == pages.end || !has(found.end));
                }
            }
        }
    }
}
