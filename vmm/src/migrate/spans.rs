//! Sets of pages as spans in the order of their addresses, which do not overlap.

use dirty_track::addr::{Gfn, PageRange};
use dirty_track::log::Span;

/// Keeps the first `pages` of `spans` there, and returns the rest.
pub(super) fn split(spans: &mut Vec<Span>, pages: u64) -> Vec<Span> {
    let mut room = pages;
    let Some(last) = spans.iter().position(|span| {
        let fits = span.range.pages <= room;
        room -= span.range.pages.min(room);
        !fits
    }) else {
        return Vec::new();
    };
    let mut rest = spans.split_off(last);
    // Of the first that does not fit, a part may.
    let before: u64 = spans.iter().map(|span| span.range.pages).sum();
    let part = pages - before;
    if let (true, Some(Span { range, flags })) = (part > 0, rest.first_mut()) {
        spans.push(Span { range: PageRange { start: range.start, pages: part }, flags: *flags });
        *range = PageRange { start: Gfn(range.start.0 + part), pages: range.pages - part };
    }
    rest
}

/// What of `spans` is not in `others`.
pub(super) fn without(spans: &[Span], others: &[Span]) -> Vec<Span> {
    let mut left = Vec::new();
    let mut others = others.iter().map(|other| other.range).peekable();
    for &Span { range, flags } in spans {
        let mut at = range.start;
        let mut keep = |from: Gfn, to: Gfn| {
            if from < to {
                left.push(Span { range: PageRange { start: from, pages: to.0 - from.0 }, flags });
            }
        };
        while let Some(other) = others.next_if(|other| other.end() <= range.end()) {
            keep(at, other.start);
            at = at.max(other.end());
        }
        // One that ends later may have part of the next span, too.
        match others.peek() {
            Some(other) => keep(at, other.start.min(range.end())),
            None => keep(at, range.end()),
        }
    }
    left
}

/// All that is in `spans`, whatever their order, where they may overlap. What two of them have is known of all that both have.
pub(super) fn union(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable_by_key(|span| span.range.start);
    let mut all: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match all.last_mut() {
            Some(last) if span.range.start < last.range.end() => {
                let end = last.range.end().max(span.range.end());
                last.range.pages = end.0 - last.range.start.0;
                last.flags &= span.flags;
            }
            _ => all.push(span),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Some spans below page 96, in order.
    fn spans() -> impl Strategy<Value = Vec<Span>> {
        prop::collection::vec((0..6u64, 1..7u64, 0..4u32), 0..12).prop_map(|parts| {
            let mut at = 0;
            let mut spans = Vec::new();
            for (gap, pages, flags) in parts {
                spans.push(Span { range: PageRange { start: Gfn(at + gap), pages }, flags });
                at += gap + pages;
            }
            spans
        })
    }

    /// The flags of each page, the naive way.
    fn pages(spans: &[Span]) -> BTreeMap<u64, u32> {
        let mut pages = BTreeMap::new();
        for span in spans {
            for gfn in span.range.iter() {
                let flags = pages.entry(gfn.0).or_insert(span.flags);
                *flags &= span.flags;
            }
        }
        pages
    }

    fn in_order(spans: &[Span]) -> bool {
        spans.iter().all(|span| span.range.pages > 0)
            && spans.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start)
    }

    proptest! {
        #[test]
        fn a_part_and_the_rest_are_the_whole(whole in spans(), count in 0..80u64) {
            let mut part = whole.clone();
            let rest = split(&mut part, count);
            let all = pages(&whole);
            prop_assert_eq!(pages(&part).len() as u64, count.min(all.len() as u64));
            let both: Vec<_> = part.iter().chain(&rest).copied().collect();
            prop_assert!(in_order(&both));
            prop_assert_eq!(pages(&both), all);
        }

        #[test]
        fn what_is_left_out_is_what_the_other_has(some in spans(), others in spans()) {
            let left = without(&some, &others);
            let other = pages(&others);
            let expected: BTreeMap<_, _> =
                pages(&some).into_iter().filter(|(page, _)| !other.contains_key(page)).collect();
            prop_assert!(in_order(&left));
            prop_assert_eq!(pages(&left), expected);
        }

        #[test]
        fn a_union_has_every_page_and_claims_no_more_than_is_known(some in spans(), others in spans()) {
            let both: Vec<_> = some.iter().chain(&others).copied().collect();
            let all = union(both.clone());
            prop_assert!(in_order(&all));
            let (all, known) = (pages(&all), pages(&both));
            prop_assert!(all.keys().eq(known.keys()));
            for (page, flags) in all {
                prop_assert_eq!(flags & known[&page], flags);
            }
        }
    }
}
