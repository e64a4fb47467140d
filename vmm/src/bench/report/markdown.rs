//! The report as GitHub Markdown, with the plots beside it as pictures.

use super::facts;
use super::grid::{Column, Grid};
use super::plot::Plot;
use super::words::{MISSING, mark, plain, quantity, ratio};
use crate::bench::results::{Better, Results, Row, Table, Unit};

/// The whole document.
pub(super) fn document(results: &Results, plots: &[Plot]) -> String {
    let mut text = format!("# vmm bench\n\n{}\n\n## Host\n\n", escape(&facts::summary(results)));
    text += "| | |\n|---|---|\n";
    for (name, fact) in facts::host(results) {
        text += &format!("| {name} | {} |\n", escape(&fact));
    }
    if !plots.is_empty() {
        text += "\n## Plots\n";
    }
    for plot in plots {
        text += &format!("\n![{}]({})\n", escape(plot.svg.label()), plot.file);
    }
    if !results.tables.is_empty() {
        text += "\n## Tables\n";
    }
    for table in &results.tables {
        text += &set(table);
    }
    if !results.skipped.is_empty() {
        text += "\n## Skipped\n\n";
    }
    for skipped in &results.skipped {
        text += &format!("- **{}**: {}\n", escape(&skipped.what), escape(&skipped.why));
    }
    text += "\n## How to read it\n\n";
    for (term, meaning) in facts::reading() {
        text += &format!("- **{term}**: {}\n", escape(&meaning));
    }
    text
}

fn set(table: &Table) -> String {
    let grid = Grid::of(table);
    let mut text = format!("\n### {}: {}\n\n", table.bench, escape(&table.title));
    if !grid.heading().is_empty() {
        text += &format!("{}\n\n", escape(&grid.heading()));
    }
    let (keys, columns) = (&grid.keys, &grid.columns);
    if keys.len() + columns.len() == 0 {
        return text;
    }
    let keys_of = |row: &Row| keys.iter().map(|key| escape(row.case.get(key))).collect::<Vec<_>>();
    let headings = keys.iter().map(|key| escape(key)).chain(columns.iter().map(heading)).collect::<Vec<_>>();
    text += &line(headings);
    let left = keys.iter().map(|_| "---");
    text += &line(left.chain(columns.iter().map(|_| "---:")).map(str::to_owned).collect());
    for row in &table.rows {
        let mut cells = keys_of(row);
        cells.extend(columns.iter().map(|column| cell(row, column)));
        text += &line(cells);
    }
    text
}

fn line(cells: Vec<String>) -> String {
    format!("| {} |\n", cells.join(" | "))
}

fn heading(column: &Column<'_>) -> String {
    let unit = column.unit.filter(|unit| *unit != Unit::Count).map(|unit| format!(", {unit}"));
    let way = match column.better {
        Some(Better::Lower) => " ↓",
        Some(Better::Higher) => " ↑",
        _ => "",
    };
    let limit = column.limit.map(|limit| format!(" (ratio to {})", escape(limit)));
    format!("{}{}{way}{}", escape(column.name), unit.unwrap_or_default(), limit.unwrap_or_default())
}

fn cell(row: &Row, column: &Column<'_>) -> String {
    let Some(figure) = row.figure(column.name) else { return MISSING.to_owned() };
    let unit = if column.unit.is_some() { Unit::Count } else { figure.unit };
    let mut text = format!("{}{}", mark(figure), quantity(figure.median, unit));
    if let Some((limit, ratio)) = figure.limit.as_ref().and_then(|limit| Some((limit, ratio(limit)?))) {
        text += &format!(" ({ratio}");
        if column.limit.is_none() {
            text += &format!(" to {}", escape(&limit.name));
        }
        text.push(')');
    }
    text
}

/// Text from outside, on one line and without meaning to Markdown.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for letter in plain(text).chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '\\' | '|' | '`' | '*' | '_' | '[' | ']' | '~' | '#' | '$' => escaped.extend(['\\', letter]),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{plot, sample};

    /// Columns of a line of a table.
    fn columns(line: &str) -> usize {
        line.replace("\\\\", "").replace("\\|", "").matches('|').count() - 1
    }

    #[test]
    fn tables_have_as_many_columns_everywhere() {
        for results in [sample::realistic(), sample::odd(), sample::empty()] {
            let text = document(&results, &plot::all(&results));
            let mut width = None;
            let mut lines = 0;
            for line in text.lines() {
                if !line.starts_with('|') {
                    width = None;
                    continue;
                }
                assert_eq!(*width.get_or_insert(columns(line)), columns(line), "{line}");
                lines += 1;
            }
            let rows = results.rows().filter(|(table, _)| !Grid::of(table).columns.is_empty()).count();
            assert!(lines >= rows + facts::host(&results).len(), "{text}");
        }
    }

    #[test]
    fn outside_text_is_text() {
        assert_eq!(escape("a|b\\|\n<i>`*x*`_"), "a\\|b\\\\\\| &lt;i>\\`\\*x\\*\\`\\_");
        let results = sample::odd();
        let text = document(&results, &plot::all(&results));
        assert!(!text.contains("<script"), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf "), "{text}");
    }

    #[test]
    fn pictures_are_referred_to_by_name() {
        let results = sample::realistic();
        let plots = plot::all(&results);
        let text = document(&results, &plots);
        for plot in &plots {
            assert!(text.contains(&format!("]({})", plot.file)));
        }
        assert!(document(&sample::empty(), &[]).starts_with("# vmm bench\n"));
    }
}
