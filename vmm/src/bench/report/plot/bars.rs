//! Bars along a time that begins at nothing, with what they say written at their ends.

use super::axis::Axis;
use super::frame::{MARGIN, TITLES, Titles, WIDTH};
use super::svg::{self, Path, SMALL, Svg, TEXT};

/// Of a bar, and between two.
const THICK: f64 = 15.0;
const LINE: f64 = 22.0;

/// Of the line that names a group.
const HEADING: f64 = 24.0;

/// A kind of part that bars have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub name: &'static str,
    /// Its class.
    pub class: &'static str,
}

/// A part of a bar.
#[derive(Debug)]
pub(super) struct Part {
    pub kind: Kind,
    pub from: f64,
    pub to: f64,
    pub noisy: bool,
    pub tip: String,
}

/// A contender.
#[derive(Debug)]
pub(super) struct Bar {
    pub name: String,
    pub parts: Vec<Part>,
    /// What is written at its end.
    pub label: String,
}

/// Bars that belong together, and why.
#[derive(Debug)]
pub(super) struct Group {
    pub name: String,
    pub bars: Vec<Bar>,
}

/// Draws them; nothing if there are none.
pub(super) fn draw(titles: &Titles, kinds: &[Kind], along: &str, groups: &[Group]) -> Option<Svg> {
    let bars = || groups.iter().flat_map(|group| &group.bars);
    let ends: Vec<f64> = bars().flat_map(|bar| &bar.parts).flat_map(|part| [part.from, part.to]).collect();
    let names = bars().map(|bar| svg::width(&bar.name, TEXT)).reduce(f64::max)?.min(WIDTH / 3.0);
    let axis = Axis::linear(&ends);

    let left = MARGIN + names + 12.0;
    // No label ends outside of the paper, unless that leaves the bars no room.
    let right = bars().map(|bar| {
        let end = bar.parts.iter().map(|part| axis.place(part.from.max(part.to))).fold(0.0, f64::max);
        left + (WIDTH - MARGIN - 6.0 - svg::width(&bar.label, SMALL) - left) / end
    });
    let right = right.fold(f64::MAX, f64::min).clamp(left + 120.0, WIDTH - 2.0 * MARGIN);
    let x = |value: f64| left + axis.place(value) * (right - left);
    let top = TITLES + 24.0;
    let heading = |group: &Group| if group.name.is_empty() { 4.0 } else { HEADING };
    let height: f64 = groups.iter().map(|group| heading(group) + group.bars.len() as f64 * LINE).sum();
    let bottom = top + height + 4.0;
    let noisy = bars().flat_map(|bar| &bar.parts).any(|part| part.noisy);
    let mut svg = titles.begin(bottom + 44.0, noisy);

    let mut at = MARGIN;
    for kind in kinds {
        svg.open(kind.class);
        svg.rect("bar", at, TITLES + 5.0, 12.0, 9.0, None);
        svg.close();
        svg.text("faint", at + 18.0, TITLES + 14.0, kind.name);
        at += svg::width(kind.name, SMALL) + 36.0;
    }
    // Lines and ticks no nearer to each other than these have room; none through the name of a group.
    let ticks = axis.ticks();
    let widest = ticks.iter().map(|(_, text)| svg::width(text, SMALL)).fold(1.0, f64::max);
    let room = (right - left) / (widest + 8.0);
    let every = (ticks.len() as f64 / room.max(1.0)).ceil() as usize;
    let upright = |x: f64| {
        let start = (Path::default(), top);
        let (path, _) = groups.iter().fold(start, |(path, y), group| {
            let (from, to) = (y + heading(group), y + heading(group) + group.bars.len() as f64 * LINE);
            (path.from(x, from - 1.0).to(x, to + 1.0), to)
        });
        path
    };
    for (place, text) in ticks.into_iter().step_by(every.max(1)) {
        let x = left + place * (right - left);
        svg.path("grid", &upright(x), None);
        svg.text("faint m", x, bottom + 16.0, &text);
    }
    svg.text("faint m", f64::midpoint(left, right), bottom + 35.0, along);

    let mut y = top;
    for group in groups {
        y += heading(group);
        if !group.name.is_empty() {
            svg.text("group", MARGIN, y - 7.0, &svg::fitting(&group.name, WIDTH - 2.0 * MARGIN, TEXT));
        }
        for bar in &group.bars {
            let middle = y + LINE / 2.0;
            svg.text(
                "e",
                left - 8.0,
                middle + 4.5,
                &svg::fitting(&bar.name, left - 8.0 - MARGIN / 2.0, TEXT),
            );
            let mut end = left;
            for part in &bar.parts {
                let (from, to) = (x(part.from.min(part.to)), x(part.from.max(part.to)));
                // What was measured is seen, however short it was.
                let from = from.min(to - 2.0).max(left);
                let width = (to - from).max(2.0);
                svg.open(part.kind.class);
                let class = if part.noisy { "bar noisy" } else { "bar" };
                svg.rect(class, from, middle - THICK / 2.0, width, THICK, Some(&part.tip));
                svg.close();
                end = end.max(from + width);
            }
            let label = svg::fitting(&bar.label, WIDTH - end - 6.0, SMALL);
            svg.text("faint over", end + 6.0, middle + 4.5, &label);
            y += LINE;
        }
    }
    svg.path("axis", &upright(left), None);
    Some(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::markup;

    #[test]
    fn each_part_is_seen() {
        let kind = Kind { name: "still", class: "stop" };
        let part = |from, to, noisy| Part { kind, from, to, noisy, tip: String::new() };
        let bar = |parts| Bar { name: "<vmm>".into(), parts, label: "1 ms".into() };
        let groups = [
            Group {
                name: "a".into(),
                bars: vec![bar(vec![part(0.0, 1e6, false), part(1e6, 1e6 + 1.0, true)])],
            },
            Group { name: String::new(), bars: vec![bar(vec![part(0.0, 0.0, false)]), bar(Vec::new())] },
        ];
        let titles = Titles { title: "t".into(), about: "a".into() };
        let text = draw(&titles, &[kind], "ms", &groups).unwrap().file();
        assert_eq!(markup::wrong(&text), None);
        // One of them is in the legend.
        assert_eq!(text.matches("<rect class=\"bar").count(), 4);
        assert_eq!(text.matches("\"bar noisy\"").count(), 1);
        assert_eq!(text.matches("width=\"2\"").count(), 2, "{text}");
        assert!(draw(&titles, &[kind], "ms", &[]).is_none());
    }
}
