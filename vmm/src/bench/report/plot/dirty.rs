//! The rows of the dirty bench that plots are drawn from: of all that differ in more than the tracker and the dirty share,
//! those that say most.

use super::marks::Mark;
use crate::bench::results::{Bench, Case, Results, Row};

/// A tracker, at a share of memory that the guest dirtied.
#[derive(Debug)]
pub(super) struct Measured<'a> {
    pub name: String,
    pub mark: Mark,
    /// In per cent.
    pub share: f64,
    pub row: &'a Row,
}

/// What was measured with a backing.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub backing: &'a str,
    /// What else they have in common.
    pub about: String,
    pub measured: Vec<Measured<'a>>,
}

/// Of each backing, the rows of which `has` holds: with one pattern of writes (random ones, if there are), the fewest vCPUs
/// and one size of memory.
pub(super) fn groups(results: &Results, has: impl Fn(&Row) -> bool) -> Vec<Group<'_>> {
    let names = names(results);
    let rows: Vec<_> = rows(results).filter(|(_, row)| has(row)).collect();
    let mut backings: Vec<&str> = Vec::new();
    for (_, row) in &rows {
        let backing = row.case.get("backing");
        if !backings.contains(&backing) {
            backings.push(backing);
        }
    }
    let group = |backing| {
        let mut rows = rows.clone();
        rows.retain(|(_, row)| row.case.get("backing") == backing);
        let all = |key: &'static str| rows.iter().map(move |(_, row)| row.case.get(key));
        let pattern = all("pattern").find(|pattern| *pattern == "rand").or(all("pattern").next());
        keep(&mut rows, "pattern", pattern);
        let all = |key: &'static str| rows.iter().map(move |(_, row)| row.case.get(key));
        let vcpus = all("vcpus").min_by_key(|vcpus| vcpus.parse().unwrap_or(u64::MAX));
        keep(&mut rows, "vcpus", vcpus);
        let memory = rows.first().map(|(_, row)| row.case.get("memory"));
        keep(&mut rows, "memory", memory);
        let about = rows.first().map(|(_, row)| about(&row.case)).unwrap_or_default();
        let measured = rows.into_iter().map(|(share, row)| {
            let name = name(&row.case);
            let number = names.iter().position(|other| *other == name).unwrap_or_default();
            Measured { name, mark: Mark::of(number), share, row }
        });
        Group { backing, about, measured: measured.collect() }
    };
    backings.into_iter().map(group).collect()
}

/// Those that are of a share.
fn rows(results: &Results) -> impl Iterator<Item = (f64, &Row)> {
    let rows = results.rows().filter(|(table, _)| table.bench == Bench::Dirty).map(|(_, row)| row);
    rows.filter(|row| !row.case.get("tracker").is_empty())
        .filter_map(|row| Some((share(row.case.get("dirty"))?, row)))
}

fn keep<'a>(rows: &mut Vec<(f64, &'a Row)>, key: &str, value: Option<&'a str>) {
    rows.retain(|(_, row)| Some(row.case.get(key)) == value);
}

/// Per cent.
fn share(text: &str) -> Option<f64> {
    let share: f64 = text.trim_end_matches('%').trim().parse().ok()?;
    (0.0..=100.0).contains(&share).then_some(share)
}

/// All contenders, in the order in which they first come.
fn names(results: &Results) -> Vec<String> {
    let mut names = Vec::new();
    for (_, row) in rows(results) {
        let name = name(&row.case);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The tracker, and how it is used if that is not as usual.
fn name(case: &Case) -> String {
    let ways = ["rearm", "split"].map(|key| case.get(key));
    let unusual = ways.into_iter().filter(|way| !["", "-", "all"].contains(way));
    std::iter::once(case.get("tracker")).chain(unusual).collect::<Vec<_>>().join(" ")
}

fn about(case: &Case) -> String {
    let plural = if case.get("vcpus") == "1" { "" } else { "s" };
    let parts = [
        ("backing ", "backing", ""),
        ("pattern ", "pattern", ""),
        ("", "vcpus", if plural.is_empty() { " vCPU" } else { " vCPUs" }),
        ("", "memory", ""),
    ];
    let parts = parts.into_iter().filter(|(_, key, _)| !case.get(key).is_empty());
    parts
        .map(|(before, key, after)| format!("{before}{}{after}", case.get(key)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample;
    use crate::bench::results::Table;

    #[test]
    fn of_each_backing_one_kind_of_rows_is_taken() {
        let row = |pairs: &[(&str, &str)]| sample::row(pairs, Vec::new());
        let of = |tracker, backing, pattern, vcpus, dirty| {
            row(&[
                ("tracker", tracker),
                ("backing", backing),
                ("pattern", pattern),
                ("vcpus", vcpus),
                ("dirty", dirty),
                ("rearm", "all"),
                ("split", "-"),
            ])
        };
        let rows = vec![
            of("kvm-ring", "none", "seq", "1", "1 %"),
            of("kvm-ring", "none", "rand", "16", "1 %"),
            of("kvm-ring", "none", "rand", "2", "1 %"),
            of("exact", "none", "rand", "2", "0.1 %"),
            of("exact", "none", "rand", "2", "none at all"),
            of("exact", "thp", "zipf", "4", "100 %"),
            row(&[("tracker", "exact")]),
            row(&[("tracker", "kvm-manual"), ("split", "leaf"), ("rearm", "dense-skip"), ("dirty", "10%")]),
        ];
        let mut results = sample::empty();
        results.tables.push(Table { bench: Bench::Dirty, title: String::new(), rows });
        let groups = groups(&results, |_| true);
        let read: Vec<_> = groups
            .iter()
            .map(|group| {
                let names = group.measured.iter().map(|measured| (measured.name.as_str(), measured.share));
                (group.backing, group.about.as_str(), names.collect::<Vec<_>>())
            })
            .collect();
        assert_eq!(
            read,
            [
                ("none", "backing none, pattern rand, 2 vCPUs", vec![("kvm-ring", 1.0), ("exact", 0.1)]),
                ("thp", "backing thp, pattern zipf, 4 vCPUs", vec![("exact", 100.0)]),
                ("", "", vec![("kvm-manual dense-skip leaf", 10.0)]),
            ]
        );
        // It looks the same everywhere.
        assert_eq!(groups[0].measured[1].mark, groups[1].measured[0].mark);
        assert_eq!((share("NaN %"), share("-1 %"), share("0 %")), (None, None, Some(0.0)));
    }
}
