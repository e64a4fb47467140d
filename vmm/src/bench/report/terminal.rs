//! The figures as text: aligned, for people, and no wider than [`WIDTH`] where that is possible. What does not fit is named
//! below its table, the least important first to go.

use super::facts;
use super::grid::Grid;
use super::words::{MISSING, mark, plain, quantity, ratio, shortened};
use crate::bench::results::{Bench, Results, Table};

/// Columns of a line.
const WIDTH: usize = 110;

/// Letters of a value that tells rows apart.
const LETTERS: usize = 32;

/// Before every row, and between columns.
const GAP: &str = "  ";

/// All tables of `results` for a terminal, and what was skipped. Text from outside has no control characters in it.
pub fn terminal(results: &Results) -> String {
    let mut text = plain(&facts::summary(results)) + "\n";
    for table in &results.tables {
        text += "\n";
        text += &set(table);
    }
    if !results.skipped.is_empty() {
        text += "\nskipped\n";
    }
    for skipped in &results.skipped {
        text += &format!("{GAP}{}: {}\n", plain(&skipped.what), plain(&skipped.why));
    }
    text
}

/// What is asked first of a bench.
fn important(bench: Bench) -> &'static [&'static str] {
    match bench {
        Bench::Limits => &["throughput", "call", "fault"],
        Bench::Dirty => &[
            "first write",
            "get and clear",
            "slow-down",
            "sent",
            "dirty memory",
            "stall p99.9",
            "stall max",
            "get dirty log",
            "clear dirty log",
        ],
        Bench::Fault => &["touch", "p99", "pass", "hit rate", "throughput", "p50", "max"],
        Bench::Restore => &["first output", "first walk", "still", "snapshot"],
        Bench::Migrate => &["total", "still", "throughput", "sent"],
        Bench::Boot => &["first byte", "ring 3", "own memory"],
    }
}

/// A column: a heading, and for each row a text and what comes after it.
struct Column {
    heading: String,
    cells: Vec<(String, String)>,
    /// Numbers are set against the right.
    right: bool,
}

impl Column {
    /// Widths of the texts, of what comes after, and of all with the heading.
    fn widths(&self) -> (usize, usize, usize) {
        let widest = |letters: fn(&(String, String)) -> &String| {
            self.cells.iter().map(|cell| letters(cell).chars().count()).max().unwrap_or(0)
        };
        let (text, after) = (widest(|(text, _)| text), widest(|(_, after)| after));
        let both = if after > 0 { text + 1 + after } else { text };
        (text, after, both.max(self.heading.chars().count()))
    }

    fn heading(&self) -> String {
        let (_, _, width) = self.widths();
        if self.right { format!("{:>width$}", self.heading) } else { format!("{:<width$}", self.heading) }
    }

    fn cell(&self, row: usize) -> String {
        let (before, after, width) = self.widths();
        let Some((text, rest)) = self.cells.get(row) else { return " ".repeat(width) };
        match self.right {
            false => format!("{text:<width$}"),
            true if after == 0 => format!("{text:>width$}"),
            true => format!("{:>width$}", format!("{text:>before$} {rest:<after$}")),
        }
    }
}

fn set(table: &Table) -> String {
    let grid = Grid::of(table);
    let keys = grid.keys.iter().map(|key| Column {
        heading: plain(key),
        cells: table
            .rows
            .iter()
            .map(|row| (shortened(&plain(row.case.get(key)), LETTERS), String::new()))
            .collect(),
        right: false,
    });
    let figures = grid.columns.iter().map(|column| Column {
        heading: plain(column.name),
        cells: table
            .rows
            .iter()
            .map(|row| match row.figure(column.name) {
                Some(figure) => (
                    format!("{}{}", mark(figure), quantity(figure.median, figure.unit)),
                    figure.limit.as_ref().and_then(ratio).unwrap_or_default(),
                ),
                None => (MISSING.to_owned(), String::new()),
            })
            .collect(),
        right: true,
    });
    let mut columns: Vec<_> = keys.collect();
    let figures: Vec<_> = figures.collect();

    let mut ranked: Vec<(usize, &Column)> = figures.iter().enumerate().collect();
    let ranks = important(table.bench);
    // Stable: those that are not in the list stay in their order, after those that are.
    ranked.sort_by_key(|(_, column)| {
        ranks.iter().position(|name| *name == column.heading).unwrap_or(ranks.len())
    });
    let mut width: usize = columns.iter().map(|column| column.widths().2 + GAP.len()).sum();
    let mut shown = Vec::new();
    for (index, column) in ranked {
        let more = column.widths().2 + GAP.len();
        if shown.is_empty() || width + more <= WIDTH {
            width += more;
            shown.push(index);
        }
    }

    let mut text = format!("{}: {}", table.bench, plain(&table.title));
    let same = plain(&grid.heading());
    if !same.is_empty() {
        // On a line of its own if it makes the first too long.
        let apart = text.chars().count() + same.chars().count() + 3 > WIDTH;
        text += &if apart { format!("\n{GAP}({same})") } else { format!(" ({same})") };
    }
    text.push('\n');
    let mut left_out = Vec::new();
    for (index, column) in figures.into_iter().enumerate() {
        if shown.contains(&index) {
            columns.push(column);
        } else {
            left_out.push(column.heading);
        }
    }
    let mut lines = vec![columns.iter().map(Column::heading).collect::<Vec<_>>()];
    lines.extend((0..table.rows.len()).map(|row| columns.iter().map(|column| column.cell(row)).collect()));
    for line in lines {
        text += format!("{GAP}{}", line.join(GAP)).trim_end();
        text.push('\n');
    }
    if !left_out.is_empty() {
        text += &format!("{GAP}also measured: {}\n", left_out.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample;
    use crate::bench::results::Unit;

    #[test]
    fn columns_are_aligned_and_marked() {
        let noisy = sample::bounded(sample::figure("total", Unit::Ms, &[80.0, 100.0, 300.0]), Some("socket"));
        let table = Table {
            bench: Bench::Migrate,
            title: "a table".into(),
            rows: vec![
                sample::row(&[("monitor", "vmm"), ("written", "0 MB/s")], vec![noisy]),
                sample::row(
                    &[("monitor", "QEMU"), ("written", "0 MB/s")],
                    vec![
                        sample::figure("total", Unit::Ms, &[9.5]),
                        sample::figure("still", Unit::Ms, &[f64::NAN]),
                    ],
                ),
            ],
        };
        assert_eq!(
            set(&table),
            "migrate: a table (written=0 MB/s)\n\
             \x20 monitor          total  still\n\
             \x20 vmm      ~100 ms 1.04x      –\n\
             \x20 QEMU     9.50 ms            –\n"
        );
    }

    #[test]
    fn lines_are_not_too_wide_and_name_what_they_leave_out() {
        let text = terminal(&sample::realistic());
        for line in text.lines().filter(|line| !line.contains("also measured")) {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        let many = text.split("\n\n").find(|table| table.contains("dirty: 1 % of 128 MiB")).unwrap();
        assert!(many.contains("first write") && many.contains("slow-down"), "{many}");
        assert!(many.lines().last().unwrap().contains("enable"), "{many}");
    }

    #[test]
    fn a_terminal_is_not_told_what_to_do() {
        let text = terminal(&sample::odd());
        assert!(!text.chars().any(|letter| letter.is_control() && letter != '\n'), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf "), "{text}");
        assert!(text.contains("skipped"));
    }
}
