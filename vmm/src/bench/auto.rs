//! Whether `--track auto` chose well: what its tracker costs next to the cheapest one that promises as much.
//!
//! What counts is an epoch: what it adds to the guest's own work, and what its harvest takes. Trackers that report more than was
//! written, by their own word, promise less.

use super::results::{Bench, Results, Row, Table};

/// How far from the best is well enough.
pub const WELL: f64 = 1.10;

/// What the choice was worth in one table.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The table.
    pub title: String,
    /// What an epoch costs under the tracker that was chosen, in milliseconds.
    pub chosen: f64,
    /// Under the best.
    pub best: f64,
    /// Which is this one.
    pub tracker: String,
    /// Whether a figure that this is made of is noisy.
    pub noisy: bool,
}

impl Verdict {
    /// What the choice costs, the best being 1.
    pub fn ratio(&self) -> f64 {
        self.chosen / self.best
    }

    /// Whether it is good enough.
    pub fn is_well(&self) -> bool {
        self.ratio() <= WELL
    }
}

/// In words, where the choice was not good enough.
pub fn summary(results: &Results) -> String {
    let verdicts = verdicts(results);
    let missed: Vec<_> = verdicts
        .iter()
        .filter(|verdict| !verdict.is_well())
        .map(|verdict| {
            let noisy = if verdict.noisy { "~" } else { "" };
            format!("{} ({noisy}{:.2}x) at {}", verdict.tracker, verdict.ratio(), verdict.title)
        })
        .collect();
    match missed.is_empty() {
        _ if verdicts.is_empty() => "not measured".to_owned(),
        true => format!("nowhere: an epoch takes at most {WELL:.2} of what the best takes"),
        false => missed.join("; "),
    }
}

/// What an epoch costs, and whether that is noisy.
fn cost(row: &Row) -> Option<(f64, bool)> {
    let (pass, harvest) = (row.figure("dirty memory")?, row.figure("get and clear")?);
    Some((pass.median + harvest.median, pass.noisy || harvest.noisy))
}

/// For every table that has both.
pub fn verdicts(results: &Results) -> Vec<Verdict> {
    let dirty = results.tables.iter().filter(|table| table.bench == Bench::Dirty);
    dirty.filter_map(|table| verdict(results, table)).collect()
}

fn verdict(results: &Results, table: &Table) -> Option<Verdict> {
    let plain = |row: &&Row| row.case.get("rearm") == "all" && matches!(row.case.get("split"), "-" | "leaf");
    let sound = |row: &&Row| results.host.sound.iter().any(|name| name == row.case.get("tracker"));
    let costs: Vec<_> = table
        .rows
        .iter()
        .filter(plain)
        .filter(sound)
        .filter_map(|row| Some((row.case.get("tracker"), cost(row)?)))
        .collect();
    let &(_, (chosen, noisy)) = costs.iter().find(|(tracker, _)| *tracker == results.host.auto)?;
    let &(tracker, (best, also)) = costs.iter().min_by(|(_, (a, _)), (_, (b, _))| a.total_cmp(b))?;
    Some(Verdict {
        title: table.title.clone(),
        chosen,
        best,
        tracker: tracker.to_owned(),
        noisy: noisy || also,
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::sample;
    use super::super::results::{Better, Case, Figure, HostFacts, Unit};
    use super::*;

    fn results(costs: &[(&str, &str, f64)]) -> Results {
        let row = |&(tracker, rearm, cost): &(&str, &str, f64)| Row {
            case: Case::of(&[("tracker", tracker), ("rearm", rearm), ("split", "-")]),
            yardstick: false,
            figures: vec![
                Figure::of("dirty memory", Unit::Ms, Better::Lower, vec![cost * 0.75]),
                Figure::of("get and clear", Unit::Ms, Better::Lower, vec![cost * 0.25]),
            ],
        };
        let host = HostFacts {
            auto: "kvm-manual".into(),
            sound: ["kvm-bitmap", "kvm-manual", "exact"].map(str::to_owned).to_vec(),
            ..HostFacts::default()
        };
        Results {
            host,
            tables: vec![Table {
                bench: Bench::Dirty,
                title: "a table".into(),
                rows: costs.iter().map(row).collect(),
            }],
            ..sample::empty()
        }
    }

    #[test]
    fn the_best_is_one_that_promises_as_much() {
        // Cheaper are one that nobody can rely on here, and one that reports more than was written.
        let costs = [
            ("kvm-manual", "all", 2.0),
            ("kvm-manual", "dense-skip", 0.1),
            ("kvm-ring", "all", 0.5),
            ("exact", "all", 1.6),
        ];
        let [verdict] = &verdicts(&results(&costs))[..] else { panic!("one table") };
        assert_eq!((verdict.tracker.as_str(), verdict.is_well()), ("exact", false));
        assert!((verdict.ratio() - 1.25).abs() < 1e-9);
        let mut measured = results(&costs);
        assert_eq!(summary(&measured), "exact (1.25x) at a table");
        measured.tables[0].rows[0].figures[0].noisy = true;
        assert_eq!(summary(&measured), "exact (~1.25x) at a table");
        let [verdict] = &verdicts(&results(&[("kvm-manual", "all", 1.0), ("exact", "all", 0.95)]))[..] else {
            panic!("one table")
        };
        assert!(verdict.is_well());
        assert_eq!(verdicts(&results(&[("exact", "all", 1.0)])), []);
    }
}
