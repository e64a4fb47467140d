//! What tracking takes from the guest, against what a migration would have to send: of trackers that nobody is better than
//! in both, one has to choose; of the others, not.

use super::axis::Axis;
use super::dirty::{self, Group};
use super::drawable;
use super::frame::{Along, Frame, Taken, Titles, beside};
use super::marks::{self, Mark, RADIUS};
use super::svg::{Path, Svg};
use crate::bench::report::words::{self, number};
use crate::bench::results::{Results, Row};

/// Shares of memory, in per cent. The first is drawn for every backing, the others for one.
const SHARES: [f64; 2] = [1.0, 10.0];

/// A tracker.
struct Dot {
    name: String,
    mark: Mark,
    sent: f64,
    slower: f64,
    noisy: bool,
    tip: String,
}

/// Plots, with the names of their files.
pub(super) fn plots(results: &Results) -> Vec<(String, Svg)> {
    let groups = dirty::groups(results, |row| place(row).is_some());
    let mut plots = Vec::new();
    for (at, share) in SHARES.into_iter().enumerate() {
        for group in groups.iter().take(if at == 0 { groups.len() } else { 1 }) {
            let dots = dots(group, share);
            if dots.is_empty() {
                continue;
            }
            let titles = Titles {
                title: format!("Slow-down against what is sent, {} % dirty", number(share)),
                about: group.about.clone(),
            };
            plots.push((format!("frontier {} {share}", group.backing), draw(&titles, &dots)));
        }
    }
    plots
}

fn place(row: &Row) -> Option<(f64, f64)> {
    Some((drawable(row.figure("sent")?.median)?, drawable(row.figure("slow-down")?.median)?))
}

fn dots(group: &Group<'_>, share: f64) -> Vec<Dot> {
    let mut dots: Vec<Dot> = Vec::new();
    for measured in group.measured.iter().filter(|measured| measured.share == share) {
        let (Some((sent, slower)), row) = (place(measured.row), measured.row) else { continue };
        if dots.iter().any(|dot| dot.name == measured.name) {
            continue;
        }
        let figures = ["slow-down", "sent"].into_iter().filter_map(|name| row.figure(name));
        let parts: Vec<_> =
            figures.clone().map(|figure| format!("{} {}", figure.name, words::detail(figure))).collect();
        dots.push(Dot {
            name: measured.name.clone(),
            mark: measured.mark,
            sent,
            slower,
            noisy: figures.into_iter().any(|figure| figure.noisy),
            tip: format!("{}: {}", measured.name, parts.join("; ")),
        });
    }
    dots
}

/// Those of which none is better than another in both: the least sent first.
fn best(dots: &[Dot]) -> Vec<(f64, f64)> {
    let mut places: Vec<_> = dots.iter().map(|dot| (dot.sent, dot.slower)).collect();
    places.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.total_cmp(&other.1)));
    let mut best: Vec<(f64, f64)> = Vec::new();
    for (sent, slower) in places {
        if best.last().is_none_or(|(_, least)| slower < *least) {
            best.push((sent, slower));
        }
    }
    best
}

fn draw(titles: &Titles, dots: &[Dot]) -> Svg {
    let (sent, slower): (Vec<f64>, Vec<f64>) = dots.iter().map(|dot| (dot.sent, dot.slower)).unzip();
    let (x, y) = (Axis::fit(&sent), Axis::fit(&slower));
    let x = Along {
        title: if x.is_log() {
            "MiB to be sent after an epoch (log)"
        } else {
            "MiB to be sent after an epoch"
        },
        axis: x,
    };
    let y = Along {
        title: if y.is_log() { "% that the guest is slower (log)" } else { "% that the guest is slower" },
        axis: y,
    };
    let (mut svg, frame) = Frame::begin((titles, dots.iter().any(|dot| dot.noisy)), x, y, 270.0, 6.0);
    let step = corners(&frame, &best(dots));
    svg.path("best", &Path::through(&step), Some("No tracker is better in both than those on this line."));

    let places: Vec<_> = dots.iter().map(|dot| (frame.x(dot.sent), frame.y(dot.slower))).collect();
    let sides = step.iter().zip(step.iter().skip(1)).map(|(from, to)| Taken::about(*from, *to, 1.0));
    let mut taken: Vec<Taken> =
        places.iter().map(|place| Taken::about(*place, *place, RADIUS)).chain(sides).collect();
    for (dot, (x, y)) in dots.iter().zip(places) {
        svg.open(&dot.mark.colour());
        let label = beside(&dot.name, x, y, &frame, &taken);
        let (from, middle) = (x.clamp(label.left, label.right), f64::midpoint(label.top, label.bottom));
        if (middle - y).abs() > 16.0 {
            let end = if middle < y { label.bottom - 1.0 } else { label.top + 1.0 };
            svg.path("guide", &Path::default().from(x, y).to(from, end), None);
        }
        taken.push(label);
        // Letters are narrower than they are taken for: the end that is near to the point is the one that counts.
        let (class, at) = if label.right < x { ("label e", label.right) } else { ("label", label.left) };
        svg.text(class, at, label.bottom - 3.0, &dot.name);
        let shape = Path::default().from(x, y).on(dot.mark.shape());
        svg.path(marks::point(dot.noisy), &shape, Some(&dot.tip));
        svg.close();
    }
    svg
}

/// Of the line below which nothing was measured.
fn corners(frame: &Frame, best: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut corners: Vec<_> = best.iter().take(1).map(|(sent, _)| (frame.x(*sent), frame.top)).collect();
    let mut ends = best.iter().skip(1).map(|(sent, _)| frame.x(*sent)).chain([frame.right]);
    for (sent, slower) in best {
        let y = frame.y(*slower);
        corners.extend([(frame.x(*sent), y), (ends.next().unwrap_or(frame.right), y)]);
    }
    corners
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample::{self, figure};
    use crate::bench::results::{Bench, Table, Unit};

    fn row(tracker: &str, backing: &str, dirty: &str, sent: f64, slower: f64) -> Row {
        sample::row(
            &[("tracker", tracker), ("backing", backing), ("dirty", dirty)],
            vec![figure("slow-down", Unit::Percent, &[slower]), figure("sent", Unit::Mib, &[sent])],
        )
    }

    fn dot(sent: f64, slower: f64) -> Dot {
        Dot { name: String::new(), mark: Mark::of(0), sent, slower, noisy: false, tip: String::new() }
    }

    #[test]
    fn the_frontier_is_what_none_is_better_than() {
        let dots = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (1.0, 9.0), (4.0, 1.0)];
        let best = best(&dots.map(|(sent, slower)| dot(sent, slower)));
        assert_eq!(best, [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]);
        assert!(super::best(&[]).is_empty());
    }

    #[test]
    fn each_tracker_is_a_point() {
        let mut results = sample::empty();
        let rows = vec![
            row("kvm-ring", "none", "1 %", 1.25, 3.0),
            row("exact", "none", "1 %", 0.5, 300.0),
            row("uffd", "none", "1 %", 1.25, f64::NAN),
            row("bitmap", "none", "1 %", 1.25, -0.5),
            row("bitmap", "none", "1 %", 9.0, 9.0),
            row("kvm-ring", "none", "10 %", 12.5, 30.0),
            row("kvm-ring", "thp", "1 %", 128.0, 0.0),
            row("kvm-ring", "thp", "10 %", 128.0, 0.0),
        ];
        results.tables.push(Table { bench: Bench::Dirty, title: String::new(), rows });
        let drawn: Vec<_> = plots(&results)
            .into_iter()
            .map(|(name, svg)| {
                let text = svg.file();
                assert_eq!(text.matches("class=\"best\"").count(), 1);
                (name, text.matches("<path class=\"point").count())
            })
            .collect();
        let expected = [("frontier none 1", 3), ("frontier thp 1", 1), ("frontier none 10", 1)];
        assert_eq!(drawn, expected.map(|(name, dots)| (name.to_owned(), dots)));
    }
}
