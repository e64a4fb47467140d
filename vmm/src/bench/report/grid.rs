//! A table as it is set, whatever it is set in: what all its rows have in common goes into its heading, what they differ in
//! into columns, and each figure has a column of its own.

use crate::bench::results::{Better, Figure, Row, Table, Unit};

/// How a [`Table`] is set.
#[derive(Debug)]
pub(super) struct Grid<'a> {
    /// Names and values of what is the same in all rows.
    pub same: Vec<(&'a str, &'a str)>,
    /// Names of what is not.
    pub keys: Vec<&'a str>,
    /// Figures, in the order in which they first come.
    pub columns: Vec<Column<'a>>,
}

/// A figure of a table's rows.
#[derive(Debug)]
pub(super) struct Column<'a> {
    pub name: &'a str,
    /// If they all have the same.
    pub unit: Option<Unit>,
    /// If they all have the same.
    pub better: Option<Better>,
    /// What bounds all of them that are bounded, if that is one thing.
    pub limit: Option<&'a str>,
}

impl<'a> Grid<'a> {
    pub(super) fn of(table: &'a Table) -> Grid<'a> {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in table.rows.iter().flat_map(|row| &row.case.0) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let (mut same, mut keys) = (Vec::new(), Vec::new());
        for name in names {
            match shared(table.rows.iter().map(|row| row.case.get(name))) {
                Some(value) => same.push((name, value)),
                None => keys.push(name),
            }
        }
        let mut figures: Vec<&str> = Vec::new();
        for figure in table.rows.iter().flat_map(|row| &row.figures) {
            if !figures.contains(&figure.name.as_str()) {
                figures.push(&figure.name);
            }
        }
        let columns = figures.into_iter().map(|name| Column::of(name, &table.rows)).collect();
        Grid { same, keys, columns }
    }

    /// What all rows have in common, as a line.
    pub(super) fn heading(&self) -> String {
        let pairs = self.same.iter().filter(|(_, value)| !value.is_empty() && *value != "-");
        pairs.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }
}

impl<'a> Column<'a> {
    fn of(name: &'a str, rows: &'a [Row]) -> Column<'a> {
        let figures = || rows.iter().filter_map(|row| row.figure(name));
        Column {
            name,
            unit: shared(figures().map(|figure| figure.unit)),
            better: shared(figures().map(|figure| figure.better)),
            limit: shared(figures().filter_map(limit)),
        }
    }
}

fn limit(figure: &Figure) -> Option<&str> {
    figure.limit.as_ref().map(|limit| limit.name.as_str())
}

/// What all of them are, if they are the same.
fn shared<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample;
    use crate::bench::results::Bench;

    #[test]
    fn what_is_the_same_is_said_once() {
        let figure = |name, unit, limit| sample::bounded(sample::figure(name, unit, &[1.0]), limit);
        let table = Table {
            bench: Bench::Dirty,
            title: "t".into(),
            rows: vec![
                sample::row(
                    &[("a", "1"), ("b", "x"), ("d", "-")],
                    vec![figure("f", Unit::Ms, Some("memcpy"))],
                ),
                sample::row(
                    &[("a", "1"), ("b", "y"), ("c", "z"), ("d", "-")],
                    vec![figure("g", Unit::Ms, None), figure("f", Unit::Ns, None)],
                ),
            ],
        };
        let grid = Grid::of(&table);
        assert_eq!(grid.same, [("a", "1"), ("d", "-")]);
        assert_eq!(grid.heading(), "a=1");
        assert_eq!(grid.keys, ["b", "c"]);
        let columns: Vec<_> =
            grid.columns.iter().map(|column| (column.name, column.unit, column.limit)).collect();
        assert_eq!(columns, [("f", None, Some("memcpy")), ("g", Some(Unit::Ms), None)]);
        assert!(Grid::of(&Table { rows: Vec::new(), ..table }).columns.is_empty());
    }
}
