//! How long a restore, a migration and a start take, and what of it when: a bar for each contender.

use super::bars::{self, Bar, Group, Kind, Part};
use super::drawable;
use super::frame::Titles;
use super::svg::Svg;
use crate::bench::report::words::{self, mark, quantity};
use crate::bench::results::{Bench, Figure, Results, Row};

const FIRST: &str = "strong";
const THEN: &str = "soft";
const STILL: &str = "stop";
const BARE: Kind = Kind { name: "the limit", class: "bare" };

/// The parts of a row's bar, and what is written at its end.
type Drawn = (Vec<Part>, String);

/// A plot of a bench.
struct Timeline {
    bench: Bench,
    title: &'static str,
    along: &'static str,
    kinds: [Kind; 2],
    /// What rows are put together by, and what is said before it.
    by: (&'static str, &'static str),
    /// What is not said of a monitor that does it in one way only.
    implied: &'static str,
    bar: fn(&Row, [Kind; 2]) -> Option<Drawn>,
}

const TIMELINES: [Timeline; 3] = [
    Timeline {
        bench: Bench::Restore,
        title: "From exec to a guest that runs again",
        along: "ms since exec",
        kinds: [
            Kind { name: "to its first output", class: FIRST },
            Kind { name: "to the end of its walk over all its memory", class: THEN },
        ],
        by: ("monitor", ""),
        implied: "",
        bar: |row, kinds| since_exec(row, ["first output", "first walk"], kinds),
    },
    Timeline {
        bench: Bench::Migrate,
        title: "How long a migration takes",
        along: "ms",
        kinds: [
            Kind { name: "the guest runs", class: THEN },
            Kind { name: "of which it stands still", class: STILL },
        ],
        by: ("written", "the guest writes "),
        implied: "how",
        bar: migrate,
    },
    Timeline {
        bench: Bench::Boot,
        title: "From exec to a guest that runs",
        along: "ms since exec",
        kinds: [Kind { name: "to its first byte", class: FIRST }, Kind { name: "to ring 3", class: THEN }],
        by: ("memory", ""),
        implied: "",
        bar: |row, kinds| since_exec(row, ["first byte", "ring 3"], kinds),
    },
];

/// Plots, with the names of their files.
pub(super) fn plots(results: &Results) -> Vec<(String, Svg)> {
    TIMELINES
        .iter()
        .filter_map(|timeline| Some((timeline.bench.to_string(), draw(results, timeline)?)))
        .collect()
}

fn draw(results: &Results, timeline: &Timeline) -> Option<Svg> {
    let rows = results.rows().filter(|(table, _)| table.bench == timeline.bench);
    let rows: Vec<_> =
        rows.filter_map(|(_, row)| Some((row, (timeline.bar)(row, timeline.kinds)?))).collect();
    let (by, before) = timeline.by;
    let (mut same, mut keys): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    let mut grouped = false;
    for key in rows.iter().flat_map(|(row, _)| &row.case.0).map(|(key, _)| key.as_str()) {
        let value = rows.first().map(|(row, _)| row.case.get(key)).unwrap_or_default();
        if rows.iter().any(|(row, _)| row.case.get(key) != value) {
            grouped |= key == by;
            if key != by && !keys.contains(&key) {
                keys.push(key);
            }
        } else if !same.contains(&value) && !["", "-"].contains(&value) {
            same.push(value);
        }
    }
    let one_way = |row: &Row| {
        let mut ways = rows
            .iter()
            .map(|(other, _)| &other.case)
            .filter(|case| case.get("monitor") == row.case.get("monitor"));
        ways.all(|case| case.get(timeline.implied) == row.case.get(timeline.implied))
    };
    let name = |row: &Row| {
        let keys = keys.iter().filter(|key| **key != timeline.implied || !one_way(row));
        let values = keys.map(|key| row.case.get(key)).filter(|value| !["", "-"].contains(value));
        let name = values.collect::<Vec<_>>().join(", ");
        if name.is_empty() { row.case.get("monitor").to_owned() } else { name }
    };
    let names: Vec<_> = rows.iter().map(|(row, _)| name(row)).collect();
    let mut groups: Vec<Group> = Vec::new();
    for ((row, (parts, label)), name) in rows.into_iter().zip(names) {
        let of = row.case.get(by);
        let of = if grouped && !of.is_empty() { format!("{before}{of}") } else { String::new() };
        let bar = Bar { name, parts, label };
        match groups.iter_mut().find(|group| group.name == of) {
            Some(group) => group.bars.push(bar),
            None => groups.push(Group { name: of, bars: vec![bar] }),
        }
    }
    let titles = Titles { title: timeline.title.to_owned(), about: same.join(", ") };
    bars::draw(&titles, &timeline.kinds, timeline.along, &groups)
}

/// A figure that a bar can be made of, and its value.
fn time<'a>(row: &'a Row, name: &str) -> Option<(&'a Figure, f64)> {
    let figure = row.figure(name)?;
    Some((figure, drawable(figure.median).filter(|value| *value >= 0.0)?))
}

fn part(kind: Kind, figure: &Figure, from: f64, to: f64) -> Part {
    Part { kind, from, to, noisy: figure.noisy, tip: format!("{}: {}", figure.name, words::detail(figure)) }
}

fn said(figure: &Figure) -> String {
    format!("{}{}", mark(figure), quantity(figure.median, figure.unit))
}

/// What it stands still for is drawn at the end, where a precopy has it. A row that has no such time is no guest's, but a
/// limit. A postcopy takes as long as its slow link does, beside which nothing else could be seen.
fn migrate(row: &Row, [runs, stands]: [Kind; 2]) -> Option<Drawn> {
    if row.case.get("how") == "postcopy" {
        return None;
    }
    let (total, end) = time(row, "total")?;
    let Some((still, took)) = time(row, "still") else {
        return Some((vec![part(BARE, total, 0.0, end)], said(total)));
    };
    let stop = (end - took).max(0.0);
    let label = format!("{}, still {}", said(total), said(still));
    Some((vec![part(runs, total, 0.0, stop), part(stands, still, stop, end)], label))
}

/// Two moments, of which both are counted from exec.
fn since_exec(row: &Row, names: [&str; 2], [first, then]: [Kind; 2]) -> Option<Drawn> {
    let [early, late] = names.map(|name| time(row, name));
    let from = early.map_or(0.0, |(_, at)| at);
    let mut parts: Vec<_> = early.into_iter().map(|(figure, at)| part(first, figure, 0.0, at)).collect();
    parts.extend(late.map(|(figure, at)| part(then, figure, from.min(at), at)));
    let said: Vec<_> = early.into_iter().chain(late).map(|(figure, _)| said(figure)).collect();
    (!parts.is_empty()).then(|| (parts, said.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample::{self, figure};
    use crate::bench::results::{Table, Unit};

    fn ms(name: &str, value: f64) -> Figure {
        figure(name, Unit::Ms, &[value])
    }

    fn only(bench: Bench, rows: Vec<Row>) -> Vec<(String, String)> {
        let mut results = sample::empty();
        results.tables.push(Table { bench, title: String::new(), rows });
        plots(&results).into_iter().map(|(name, svg)| (name, svg.file())).collect()
    }

    fn ends(row: &Row, timeline: &Timeline) -> Option<(Vec<(f64, f64)>, String)> {
        let (parts, label) = (timeline.bar)(row, timeline.kinds)?;
        Some((parts.iter().map(|part| (part.from, part.to)).collect(), label))
    }

    #[test]
    fn parts_follow_each_other() {
        let [restore, migrate, boot] = &TIMELINES;
        let row = |figures| sample::row(&[], figures);
        let both = row(vec![ms("first output", 20.0), ms("first walk", 35.5)]);
        assert_eq!(ends(&both, restore), Some((vec![(0.0, 20.0), (20.0, 35.5)], "20 ms, 35.5 ms".into())));
        let still = row(vec![ms("total", 100.0), ms("still", 8.0)]);
        assert_eq!(
            ends(&still, migrate),
            Some((vec![(0.0, 92.0), (92.0, 100.0)], "100 ms, still 8 ms".into()))
        );
        let longer = row(vec![ms("total", 1.0), ms("still", 8.0)]);
        assert_eq!(ends(&longer, migrate).unwrap().0, [(0.0, 0.0), (0.0, 1.0)]);
        let started = row(vec![ms("first byte", 5.0), ms("ring 3", 9.0)]);
        assert_eq!(ends(&started, boot), Some((vec![(0.0, 5.0), (5.0, 9.0)], "5 ms, 9 ms".into())));
        assert_eq!(ends(&row(vec![ms("total", 50.0)]), migrate), Some((vec![(0.0, 50.0)], "50 ms".into())));
        assert_eq!(ends(&row(vec![ms("ring 3", 9.0)]), boot).unwrap().0, [(0.0, 9.0)]);
        for odd in [f64::NAN, f64::INFINITY, -1.0] {
            let row = row(vec![ms("first output", odd), ms("total", odd), ms("first byte", odd)]);
            assert!(TIMELINES.iter().all(|timeline| ends(&row, timeline).is_none()), "{odd}");
        }
    }

    #[test]
    fn contenders_are_beside_each_other() {
        let row = |(monitor, how), written| {
            sample::row(
                &[
                    ("monitor", monitor),
                    ("how", how),
                    ("written", written),
                    ("memory", "1 GiB"),
                    ("link", "-"),
                ],
                vec![ms("total", 100.0), ms("still", 5.0)],
            )
        };
        let ways = [
            ("socket", "-"),
            ("vmm", "precopy"),
            ("QEMU", "precopy"),
            ("vmm", "postcopy"),
            ("QEMU", "postcopy"),
        ];
        let rows = ways
            .into_iter()
            .flat_map(|way| ["0 MB/s", "flat out"].into_iter().map(move |written| row(way, written)));
        let plots = only(Bench::Migrate, rows.collect());
        let [(name, text)] = plots.as_slice() else { panic!("{plots:?}") };
        assert_eq!(name, "migrate");
        let order: Vec<_> =
            ["writes 0 MB/s", ">vmm<", ">QEMU<", "writes flat out"].map(|part| text.find(part)).into();
        assert!(order.is_sorted() && order.iter().all(Option::is_some), "{order:?} {text}");
        assert!(text.contains(">1 GiB<") && !text.contains("postcopy"), "{text}");
        // Two parts each, and two in the legend.
        assert_eq!(text.matches("<rect class=\"bar").count(), 6 * 2 + 2);
    }

    #[test]
    fn a_contender_alone_has_a_name() {
        let row = sample::row(&[("monitor", "vmm"), ("memory", "128 MiB")], vec![ms("first byte", 5.0)]);
        let plots = only(Bench::Boot, vec![row]);
        assert!(plots[0].1.contains(">vmm, 128 MiB<") && plots[0].1.contains(">vmm<"), "{plots:?}");
        assert!(only(Bench::Restore, vec![sample::row(&[("monitor", "vmm")], Vec::new())]).is_empty());
    }
}
