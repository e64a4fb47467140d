//! What tracking costs, against the share of memory that is dirty: to the guest, which is held up at its first write to a
//! page, and to the host, which asks for the log and clears it.

use super::axis::Axis;
use super::dirty::{self, Measured};
use super::drawable;
use super::frame::{Along, Frame, MARGIN, Titles, WIDTH, spread};
use super::marks::{self, Mark};
use super::svg::{self, Path, Svg, TEXT};
use crate::bench::report::words::{self, number, quantity};
use crate::bench::results::{Figure, Results, Row, Unit};

/// Between the lines of labels.
const LINE: f64 = 16.0;

/// A line: what a tracker costs.
struct Line {
    name: String,
    mark: Mark,
    points: Vec<Point>,
}

struct Point {
    share: f64,
    cost: f64,
    between: Option<(f64, f64)>,
    noisy: bool,
    tip: String,
}

/// A cost: of a row, with what lies between its quartiles if that is known, whether it is noisy, and in words.
type Cost = (f64, Option<(f64, f64)>, bool, String);

/// Both costs of each backing, with the names of their files.
pub(super) fn plots(results: &Results) -> Vec<(String, Svg)> {
    let mut plots =
        of(results, "first write", "Cost of a first write to a page", "ns a write (log)", first_write);
    plots.extend(of(
        results,
        "harvest",
        "Cost of asking for an epoch's dirty pages",
        "ms an epoch (log)",
        harvest,
    ));
    plots
}

fn of(
    results: &Results,
    name: &str,
    title: &str,
    y: &'static str,
    cost: fn(&Row) -> Option<Cost>,
) -> Vec<(String, Svg)> {
    let groups = dirty::groups(results, |row| cost(row).is_some());
    let plot = |group: dirty::Group<'_>| {
        let titles = Titles { title: title.to_owned(), about: group.about };
        let svg = draw(&titles, y, &lines(&group.measured, cost))?;
        Some((format!("{name} {}", group.backing), svg))
    };
    groups.into_iter().filter_map(plot).collect()
}

fn first_write(row: &Row) -> Option<Cost> {
    let figure = row.figure("first write")?;
    Some((drawable(figure.median)?, between(figure), figure.noisy, words::detail(figure)))
}

/// Both together if that was measured, or else what there is of the two: a tracker may clear the log as it is asked for.
fn harvest(row: &Row) -> Option<Cost> {
    if let Some((both, cost)) =
        row.figure("get and clear").and_then(|both| Some((both, drawable(both.median)?)))
    {
        return Some((cost, between(both), both.noisy, words::detail(both)));
    }
    let figures: Vec<_> =
        ["get dirty log", "clear dirty log"].into_iter().filter_map(|name| row.figure(name)).collect();
    let cost = figures.iter().filter_map(|figure| drawable(figure.median)).reduce(|sum, cost| sum + cost)?;
    let parts: Vec<_> =
        figures.iter().map(|figure| format!("{} {}", figure.name, number(figure.median))).collect();
    let noisy = figures.iter().any(|figure| figure.noisy);
    // Quartiles do not add up.
    Some((drawable(cost)?, None, noisy, format!("{} ({})", quantity(cost, Unit::Ms), parts.join(", "))))
}

fn between(figure: &Figure) -> Option<(f64, f64)> {
    let (low, high) = (drawable(figure.low)?, drawable(figure.high)?);
    (low > 0.0 && low < high).then_some((low, high))
}

fn lines(measured: &[Measured<'_>], cost: fn(&Row) -> Option<Cost>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for Measured { name, mark, share, row } in measured {
        let Some((cost, between, noisy, text)) = cost(row) else { continue };
        let tip = format!("{name}, {} % dirty: {text}", number(*share));
        let point = Point { share: *share, cost, between, noisy, tip };
        match lines.iter_mut().find(|line| line.name == *name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name: name.clone(), mark: *mark, points: vec![point] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|one, other| one.share.total_cmp(&other.share));
        // Measured twice: the first time counts.
        line.points.dedup_by(|second, first| second.share == first.share);
    }
    lines
}

fn draw(titles: &Titles, y: &'static str, lines: &[Line]) -> Option<Svg> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let shares: Vec<f64> = points().map(|point| point.share).collect();
    let costs: Vec<f64> = points()
        .flat_map(|point| {
            let (low, high) = point.between.unwrap_or((point.cost, point.cost));
            [low, point.cost, high]
        })
        .collect();
    let names = lines.iter().map(|line| svg::width(&line.name, TEXT));
    let beside = names.reduce(f64::max)?.min(WIDTH / 3.0) + 36.0;
    let height = 250f64.max(lines.len() as f64 * LINE + 10.0);
    let x = Along { axis: Axis::log(&shares), title: "% of memory dirtied in an epoch (log)" };
    let y = Along { axis: Axis::log(&costs), title: y };
    let (mut svg, frame) = Frame::begin((titles, points().any(|point| point.noisy)), x, y, height, beside);

    for line in lines {
        svg.open(&line.mark.colour());
        curve(&mut svg, &frame, line);
        svg.close();
    }
    let ends: Vec<_> = lines
        .iter()
        .filter_map(|line| line.points.last().map(|last| (line, frame.x(last.share), frame.y(last.cost))))
        .collect();
    let wanted: Vec<f64> = ends.iter().map(|(_, _, y)| *y).collect();
    let places = spread(&wanted, LINE, frame.top + 4.0, frame.bottom - 4.0);
    for ((line, x, y), place) in ends.into_iter().zip(places) {
        let label = frame.right + 24.0;
        svg.open(&line.mark.colour());
        let guide =
            Path::default().from(x + marks::RADIUS + 2.0, y).to(frame.right, y).to(label - 16.0, place);
        svg.path("guide", &guide, None);
        svg.path("point", &Path::default().from(label - 9.0, place).on(line.mark.shape()), None);
        svg.text("label", label, place + 4.5, &svg::fitting(&line.name, WIDTH - MARGIN / 2.0 - label, TEXT));
        svg.close();
    }
    Some(svg)
}

fn curve(svg: &mut Svg, frame: &Frame, line: &Line) {
    let at = |point: &Point| (frame.x(point.share), frame.y(point.cost));
    let (mut along, mut apart) = (Path::default(), Path::default());
    let mut last: Option<&Point> = None;
    for point in &line.points {
        let (x, y) = at(point);
        along = match last {
            Some(last) if !frame.apart(last.share, point.share) => along.to(x, y),
            Some(last) => {
                let (from_x, from_y) = at(last);
                apart = apart.from(from_x, from_y).to(x, y);
                along.from(x, y)
            }
            None => along.from(x, y),
        };
        last = Some(point);
    }
    svg.path(line.mark.line(), &along, None);
    svg.path("line apart", &apart, None);
    let between = line.points.iter().filter_map(|point| Some((frame.x(point.share), point.between?)));
    let between = between
        .fold(Path::default(), |path, (x, (low, high))| path.from(x, frame.y(low)).to(x, frame.y(high)));
    svg.path("between", &between, None);
    for point in &line.points {
        let (x, y) = at(point);
        let shape = Path::default().from(x, y).on(line.mark.shape());
        svg.path(marks::point(point.noisy), &shape, Some(&point.tip));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample::{self, figure};
    use crate::bench::results::{Bench, Table};

    fn results(rows: Vec<Row>) -> Results {
        let mut results = sample::empty();
        results.tables.push(Table { bench: Bench::Dirty, title: String::new(), rows });
        results
    }

    fn row(tracker: &str, dirty: &str, figures: Vec<Figure>) -> Row {
        sample::row(&[("tracker", tracker), ("backing", "none"), ("dirty", dirty)], figures)
    }

    fn points(svg: &Svg) -> usize {
        // Those without a tip are beside the labels.
        svg.inline()
            .lines()
            .filter(|line| line.contains("<path class=\"point") && line.contains("<title>"))
            .count()
    }

    #[test]
    fn each_figure_is_a_point_and_what_is_no_number_is_none() {
        let write = |samples: &[f64]| vec![figure("first write", Unit::Ns, samples)];
        let plots = plots(&results(vec![
            row("kvm-ring", "0.1 %", write(&[800.0, 810.0, 820.0])),
            row("kvm-ring", "1 %", write(&[400.0, 800.0, 1200.0])),
            row("kvm-ring", "10 %", write(&[f64::NAN])),
            row("kvm-ring", "100 %", write(&[])),
            row("kvm-ring", "1 %", write(&[9.0])),
            row("exact", "1 %", write(&[f64::INFINITY])),
            row("exact", "10 %", write(&[0.0])),
            row("exact", "100 %", Vec::new()),
        ]));
        let [(name, svg)] = plots.as_slice() else { panic!("{}", plots.len()) };
        assert_eq!(name, "first write none");
        assert_eq!(points(svg), 3);
        let text = svg.inline();
        assert_eq!(text.matches("class=\"point noisy\"").count(), 1);
        assert_eq!(text.matches("class=\"line\"").count(), 2);
        assert_eq!(text.matches("class=\"line apart\"").count(), 0);
        assert_eq!(text.matches("class=\"between\"").count(), 1);
        assert!(text.contains("kvm-ring, 1 % dirty: ~800 ns, quartiles 600 to 1000 ns, 3 samples"), "{text}");
    }

    #[test]
    fn what_the_host_does_is_one_cost() {
        let ms = |name: &str, value: f64| figure(name, Unit::Ms, &[value]);
        let both = row("kvm-manual", "1 %", vec![ms("get dirty log", 0.25), ms("clear dirty log", 0.5)]);
        let (cost, between, noisy, text) = harvest(&both).unwrap();
        assert_eq!((cost, between, noisy), (0.75, None, false));
        assert_eq!(text, "0.750 ms (get dirty log 0.250, clear dirty log 0.500)");
        let one = row("kvm-bitmap", "0 %", vec![ms("get dirty log", 0.25), ms("other", 1.0)]);
        assert_eq!(harvest(&one).unwrap().0, 0.25);
        let together = figure("get and clear", Unit::Ms, &[0.7, 0.8, 0.9]);
        let measured =
            row("exact", "1 %", vec![ms("get dirty log", 0.5), together, ms("clear dirty log", 0.3)]);
        let (cost, between, ..) = harvest(&measured).unwrap();
        assert!(cost == 0.8 && between.is_some_and(|(low, high)| low < cost && cost < high));
        assert!(harvest(&row("exact", "0 %", vec![ms("get dirty log", f64::NAN)])).is_none());
        let plots = plots(&results(vec![both, one]));
        let [(name, svg)] = plots.as_slice() else { panic!("{}", plots.len()) };
        assert_eq!((name.as_str(), points(svg)), ("harvest none", 2));
    }

    #[test]
    fn of_what_was_measured_all_is_drawn() {
        let drawn: Vec<_> =
            plots(&sample::realistic()).into_iter().map(|(name, svg)| (name, points(&svg))).collect();
        let expected =
            [("first write thp", 44), ("first write none", 44), ("harvest thp", 55), ("harvest none", 55)];
        assert_eq!(drawn, expected.map(|(name, points)| (name.to_owned(), points)));
    }
}
