//! Two runs of `vmm bench`: what got faster, what got slower, and by more than chance.
//!
//! Figures are compared as they are, after the drift of the host, told by the limits themselves, is taken out; and what has
//! a limit also by its ratio to that, which was measured in the same turns. Of the two the smaller difference is taken, and
//! none if they point in different directions: what a slow host or a limit out of luck explains is no change. What others
//! are held against (bare loops, the host's own faults, another monitor) is not compared: it is not this program. A difference
//! counts when it is larger than the threshold *and* than what the samples of both runs leave open.
//!
//! A figure has few samples, and two or three lie close together by chance often enough. So nothing is taken to be steadier
//! than figures of its name are in its table: how far those lie from their medians in all cases of both runs is the least that
//! is assumed. And with a thousand figures some differ by two or three standard errors every time, hence
//! [`ERRORS`].

use std::collections::HashMap;
use std::fmt;

use super::results::{Bench, Better, Figure, Results, Row, Table, Unit};
use super::stats;

/// Standard errors that a difference has to have.
const ERRORS: f64 = 6.0;

/// A figure that both runs have.
#[derive(Clone, Debug)]
pub struct Change {
    /// Where: the bench, the table, the case.
    pub place: String,
    /// The figure.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// Before and after, as they were measured.
    pub medians: [f64; 2],
    /// What remains of their ratio when the host's own part is taken out: 1.1 is 10 % more.
    pub factor: f64,
    /// How much of that may be chance.
    pub noise: f64,
    /// Whether it is good: `None` if it may be chance, or if it is neither.
    pub better: Option<bool>,
}

/// How two runs differ.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Of all figures that both have.
    pub figures: usize,
    /// By how much the host itself was slower: 1.1 is 10 %.
    pub drift: f64,
    /// Those that differ by more than chance.
    pub changes: Vec<Change>,
    /// Figures that only one of them has.
    pub unmatched: usize,
}

impl Comparison {
    /// Whether anything got worse.
    pub fn got_worse(&self) -> bool {
        self.changes.iter().any(|change| change.better == Some(false))
    }
}

/// Compares `after` with `before`; differences below `threshold` (0.1 is 10 %) are none.
pub fn compare(before: &Results, after: &Results, threshold: f64) -> Comparison {
    let (drift, usual) = (drift(before, after), Usual::of([before, after]));
    let (mut figures, mut changes, mut matched) = (0, Vec::new(), 0);
    for (table, row) in before.rows() {
        let Some(other) = find(after, table, row) else { continue };
        for figure in &row.figures {
            let Some(now) = other.figure(&figure.name) else { continue };
            matched += 1;
            let ours = table.bench != Bench::Limits && !row.yardstick && row.case.get("monitor") != "QEMU";
            if !ours || figure.better == Better::Neither {
                continue;
            }
            figures += 1;
            let change = change(table, row, figure, now, drift, &usual);
            let factor = change.factor.ln().abs();
            if factor > threshold.ln_1p().max(ERRORS * change.noise) {
                changes.push(change);
            }
        }
    }
    let count = |results: &Results| results.rows().map(|(_, row)| row.figures.len()).sum::<usize>();
    let unmatched = count(before) + count(after) - 2 * matched;
    changes.sort_by(|a, b| b.factor.ln().abs().total_cmp(&a.factor.ln().abs()));
    Comparison { figures, drift, changes, unmatched }
}

fn find<'a>(results: &'a Results, table: &Table, row: &Row) -> Option<&'a Row> {
    let mut tables =
        results.tables.iter().filter(|other| other.bench == table.bench && other.title == table.title);
    tables.find_map(|table| table.rows.iter().find(|other| other.case == row.case))
}

/// How much longer the host took for what is none of our work.
fn drift(before: &Results, after: &Results) -> f64 {
    let mut factors = Vec::new();
    for (table, row) in before.rows().filter(|(table, _)| table.bench == Bench::Limits) {
        let Some(other) = find(after, table, row) else { continue };
        for (figure, now) in
            row.figures.iter().filter_map(|figure| Some((figure, other.figure(&figure.name)?)))
        {
            let factor = if figure.better == Better::Higher {
                figure.median / now.median
            } else {
                now.median / figure.median
            };
            factors.extend((factor.is_finite() && factor > 0.0).then_some(factor));
        }
    }
    if factors.is_empty() { 1.0 } else { stats::median(&factors) }
}

/// How far samples usually lie from their median: the standard deviation of its logarithm, by table and name of the
/// figure.
struct Usual<'a>(HashMap<(&'a str, &'a str), (f64, usize)>);

impl<'a> Usual<'a> {
    fn of(runs: [&'a Results; 2]) -> Usual<'a> {
        let mut sums: HashMap<_, (f64, usize)> = HashMap::new();
        for (table, row) in runs.into_iter().flat_map(Results::rows) {
            // Nothing to be said of logarithms where something took no time at all.
            for figure in
                row.figures.iter().filter(|figure| figure.samples.iter().all(|&sample| sample > 0.0))
            {
                let (sum, free) = sums.entry((table.title.as_str(), figure.name.as_str())).or_default();
                *sum +=
                    figure.samples.iter().map(|sample| (sample / figure.median).ln().powi(2)).sum::<f64>();
                *free += figure.samples.len().saturating_sub(1);
            }
        }
        Usual(sums)
    }

    /// The error that the median of `figure` has at least.
    fn uncertainty(&self, table: &Table, figure: &Figure) -> f64 {
        let (sum, free) =
            self.0.get(&(table.title.as_str(), figure.name.as_str())).copied().unwrap_or_default();
        let deviation = (sum / free.max(1) as f64).sqrt();
        stats::uncertainty(&figure.samples).max(stats::error_of_median(deviation, figure.samples.len()))
    }
}

fn change(
    table: &Table,
    row: &Row,
    before: &Figure,
    after: &Figure,
    drift: f64,
    usual: &Usual<'_>,
) -> Change {
    let own = factor(before.median, after.median);
    let own = match before.unit {
        unit if is_time(unit) => own / drift,
        Unit::MibPerS => own * drift,
        _ => own,
    };
    let ratios = before.limit.as_ref().zip(after.limit.as_ref());
    let bounded = ratios.map(|(then, now)| factor(then.ratio, now.ratio));
    let factor = bounded.map_or(own, |bounded| common(own, bounded));
    let (a, b) = (usual.uncertainty(table, before), usual.uncertainty(table, after));
    // A limit has been measured as often, and is as uncertain; it knows of the drift, though, which is a doubt otherwise.
    let doubt = if ratios.is_some() { 0.0 } else { drift.ln().abs() / ERRORS };
    let noise = (a * a + b * b).sqrt() * f64::sqrt(2.0) + doubt;
    let better = match before.better {
        Better::Lower => Some(factor < 1.0),
        Better::Higher => Some(factor > 1.0),
        Better::Neither => None,
    };
    Change {
        place: format!("{}: {}: {}", table.bench, table.title, row.case),
        name: before.name.clone(),
        unit: before.unit,
        medians: [before.median, after.median],
        factor,
        noise,
        better,
    }
}

fn factor(before: f64, after: f64) -> f64 {
    let factor = after / before;
    if factor.is_finite() && factor > 0.0 {
        factor
    } else if before == after {
        1.0
    } else {
        // From nothing, or to nothing: as much as there can be, if it is more than a little.
        f64::MAX.sqrt()
    }
}

/// What two factors have in common.
fn common(a: f64, b: f64) -> f64 {
    match (a > 1.0, b > 1.0) {
        (true, true) => a.min(b),
        (false, false) => a.max(b),
        _ => 1.0,
    }
}

fn is_time(unit: Unit) -> bool {
    matches!(unit, Unit::Ms | Unit::Us | Unit::Ns)
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} figures; the host itself took {:.2} of the time", self.figures, self.drift)?;
        if self.unmatched > 0 {
            writeln!(f, "{} figures are in one of the runs only", self.unmatched)?;
        }
        for change in &self.changes {
            let verdict = match change.better {
                Some(true) => "better",
                Some(false) => "WORSE",
                None => "other",
            };
            let Change { place, name, unit, medians: [before, after], factor, .. } = change;
            writeln!(
                f,
                "{verdict:<7}{factor:>6.2}x  {name}: {before:.2} {unit} -> {after:.2} {unit}  ({place})"
            )?;
        }
        if self.changes.is_empty() {
            writeln!(f, "no change beyond the noise")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::sample;
    use super::super::results::{Case, Limit};
    use super::*;

    /// A run on a host that is slow by `host`, of a program that is slow by `ours`, with samples that lie apart by `apart`.
    fn run(host: f64, ours: f64, apart: f64) -> Results {
        let figure = |name: &str, value: f64, limit: Option<f64>| {
            let samples = (0..8).map(|turn| value * (1.0 + apart * (f64::from(turn % 4) - 1.5))).collect();
            let mut figure = Figure::of(name, Unit::Ms, Better::Lower, samples);
            figure.limit =
                limit.map(|limit| Limit { name: "limit".into(), median: limit, ratio: value / limit });
            figure
        };
        let table = |bench, figures| Table {
            bench,
            title: "a table".into(),
            rows: vec![Row { case: Case::of(&[("tracker", "exact")]), figures, ..Row::default() }],
        };
        let bounded = figure("bounded", 3.0 * host * ours, Some(2.0 * host));
        let figures = vec![bounded, figure("free", 5.0 * host * ours, None)];
        Results {
            tables: vec![
                table(Bench::Limits, vec![figure("fault", host, None)]),
                table(Bench::Dirty, figures),
            ],
            ..sample::empty()
        }
    }

    #[test]
    fn a_slower_host_is_no_slower_program() {
        let comparison = compare(&run(1.0, 1.0, 0.01), &run(1.7, 1.0, 0.01), 0.1);
        assert!((comparison.drift - 1.7).abs() < 1e-9);
        assert_eq!((comparison.figures, comparison.changes.len()), (2, 0), "{comparison}");
    }

    #[test]
    fn a_slower_program_is_told_on_any_host() {
        for host in [0.6, 1.0, 1.7] {
            let comparison = compare(&run(1.0, 1.0, 0.01), &run(host, 1.5, 0.01), 0.1);
            let worse: Vec<_> =
                comparison.changes.iter().map(|change| (change.name.as_str(), change.better)).collect();
            assert!(worse.contains(&("bounded", Some(false))), "{host}: {comparison}");
            assert!(comparison.got_worse());
        }
        let comparison = compare(&run(1.0, 1.5, 0.01), &run(1.0, 1.0, 0.01), 0.1);
        assert_eq!(comparison.changes.len(), 2);
        assert!(!comparison.got_worse());
    }

    #[test]
    fn what_may_be_chance_is_no_change() {
        let comparison = compare(&run(1.0, 1.0, 0.2), &run(1.0, 1.2, 0.2), 0.1);
        assert_eq!(comparison.changes.len(), 0, "{comparison}");
        // Nor is what is too small to matter.
        assert_eq!(compare(&run(1.0, 1.0, 0.0), &run(1.0, 1.05, 0.0), 0.1).changes.len(), 0);
        assert_eq!(compare(&run(1.0, 1.0, 0.0), &run(1.0, 1.05, 0.0), 0.01).changes.len(), 2);
    }

    #[test]
    fn samples_that_agree_by_chance_are_no_proof() {
        let (mut before, mut after) = (run(1.0, 1.0, 0.2), run(1.0, 1.0, 0.2));
        for (results, value) in [(&mut before, 3.0), (&mut after, 4.5)] {
            let mut row = results.tables[1].rows[0].clone();
            row.case = Case::of(&[("tracker", "lucky")]);
            row.figures = vec![Figure::of("free", Unit::Ms, Better::Lower, vec![value; 3])];
            results.tables[1].rows.push(row);
        }
        assert_eq!(compare(&before, &after, 0.1).changes.len(), 0);
        // Where everything is steady that is a change.
        before.tables[1].rows.remove(0);
        after.tables[1].rows.remove(0);
        assert_eq!(compare(&before, &after, 0.1).changes.len(), 1);
    }

    #[test]
    fn the_order_of_a_case_and_what_only_one_run_has_are_no_change() {
        let (before, mut after) = (run(1.0, 1.0, 0.0), run(1.0, 1.0, 0.0));
        after.tables[1].rows[0].figures.pop();
        let comparison = compare(&before, &after, 0.1);
        assert_eq!((comparison.figures, comparison.unmatched, comparison.changes.len()), (1, 1, 0));
    }
}
