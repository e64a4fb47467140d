//! The report as one page: nothing of it comes from elsewhere, and nothing in it runs. Its policy, which stands in its head,
//! lets a browser hold it to that.

use std::fmt::Write;

use super::facts;
use super::grid::{Column, Grid};
use super::markup::escape;
use super::plot::{self, Plot};
use super::words::{MISSING, detail, mark, percent, quantity, ratio};
use crate::bench::results::{Better, Figure, Results, Table, Unit};

/// Tables that are open whatever their length.
const OPEN: usize = 3;

/// Rows of a table that is open wherever it stands.
const SHORT: usize = 8;

/// The whole page.
pub(super) fn page(results: &Results, plots: &[Plot]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>vmm bench: {}</title>\n\
         <style>\n{}{}</style>\n</head>\n<body>\n<main>\n<h1>vmm bench</h1>\n<p class=\"lead\">{}</p>\n",
        escape(&results.began),
        include_str!("style.css"),
        plot::STYLE,
        escape(&facts::summary(results)),
    );
    host(&mut page, results);
    if !plots.is_empty() {
        page += "<h2>Plots</h2>\n<div class=\"plots\">\n";
        for plot in plots {
            page += &format!("<figure>{}</figure>\n", plot.svg.inline());
        }
        page += "</div>\n";
    }
    if !results.tables.is_empty() {
        page += "<h2>Tables</h2>\n";
    }
    for (index, table) in results.tables.iter().enumerate() {
        set(&mut page, table, index < OPEN || table.rows.len() <= SHORT);
    }
    if !results.skipped.is_empty() {
        let skipped = results.skipped.iter().map(|skipped| (skipped.what.as_str(), skipped.why.as_str()));
        page += "<h2>Skipped</h2>\n";
        terms(&mut page, skipped);
    }
    page += "<h2>How to read it</h2>\n";
    let reading = facts::reading();
    terms(&mut page, reading.iter().map(|(term, meaning)| (*term, meaning.as_str())));
    page + "</main>\n</body>\n</html>\n"
}

// Writing to a string does not fail.

fn host(page: &mut String, results: &Results) {
    *page += "<h2>Host</h2>\n<div class=\"wide\"><table class=\"facts\">\n";
    for (name, fact) in facts::host(results) {
        let _ = writeln!(page, "<tr><th scope=\"row\">{name}</th><td>{}</td></tr>", escape(&fact));
    }
    *page += "</table></div>\n";
}

fn terms<'a>(page: &mut String, pairs: impl Iterator<Item = (&'a str, &'a str)>) {
    *page += "<dl>\n";
    for (term, meaning) in pairs {
        let _ = writeln!(page, "<dt>{}</dt><dd>{}</dd>", escape(term), escape(meaning));
    }
    *page += "</dl>\n";
}

fn set(page: &mut String, table: &Table, open: bool) {
    let grid = Grid::of(table);
    let open = if open { " open=\"\"" } else { "" };
    let plural = if table.rows.len() == 1 { "" } else { "s" };
    let _ = writeln!(
        page,
        "<details{open}>\n<summary><b>{}: {}</b> <span class=\"faint\">{} row{plural}</span></summary>",
        table.bench,
        escape(&table.title),
        table.rows.len(),
    );
    if !grid.heading().is_empty() {
        let _ = writeln!(page, "<p class=\"faint\">{}</p>", escape(&grid.heading()));
    }
    *page += "<div class=\"wide\"><table>\n<thead><tr>";
    for key in &grid.keys {
        let _ = write!(page, "<th scope=\"col\">{}</th>", escape(key));
    }
    for column in &grid.columns {
        heading(page, column);
    }
    *page += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        *page += "<tr>";
        for key in &grid.keys {
            let _ = write!(page, "<td>{}</td>", escape(row.case.get(key)));
        }
        for column in &grid.columns {
            match row.figure(column.name) {
                Some(figure) => cell(page, figure, column),
                None => {
                    let _ = write!(page, "<td class=\"figure faint\">{MISSING}</td>");
                }
            }
        }
        *page += "</tr>\n";
    }
    *page += "</tbody>\n</table></div>\n</details>\n";
}

fn heading(page: &mut String, column: &Column<'_>) {
    let _ = write!(page, "<th scope=\"col\" class=\"figure\">{}", escape(column.name));
    let unit = column.unit.filter(|unit| *unit != Unit::Count).map(|unit| unit.to_string());
    let way = match column.better {
        Some(Better::Lower) => Some("↓".to_owned()),
        Some(Better::Higher) => Some("↑".to_owned()),
        _ => None,
    };
    let under: Vec<_> = unit.into_iter().chain(way).collect();
    let _ = write!(page, "<small>{}</small>", under.join(" "));
    if let Some(limit) = column.limit {
        let _ = write!(page, "<small>ratio to {}</small>", escape(limit));
    }
    *page += "</th>";
}

fn cell(page: &mut String, figure: &Figure, column: &Column<'_>) {
    let unit = if column.unit.is_some() { Unit::Count } else { figure.unit };
    let noisy = if figure.noisy { " noisy" } else { "" };
    let _ = write!(
        page,
        "<td class=\"figure{noisy}\" title=\"{}\">{}{}",
        escape(&detail(figure)),
        mark(figure),
        escape(&quantity(figure.median, unit)),
    );
    let mut under = Vec::new();
    if figure.median.is_finite() && figure.spread > 0.0 {
        under.push(format!("±{}", percent(figure.spread)));
    }
    if let Some((limit, ratio)) = figure.limit.as_ref().and_then(|limit| Some((limit, ratio(limit)?))) {
        under.push(if column.limit.is_some() { ratio } else { format!("{ratio} to {}", limit.name) });
    }
    if !under.is_empty() {
        let _ = write!(page, "<small>{}</small>", escape(&under.join(", ")));
    }
    *page += "</td>";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{markup, sample};

    #[test]
    fn every_tag_is_closed() {
        for results in [sample::realistic(), sample::odd(), sample::empty()] {
            let page = page(&results, &plot::all(&results));
            assert_eq!(markup::wrong(&page), None);
        }
    }

    #[test]
    fn outside_text_is_text_and_nothing_is_fetched() {
        let results = sample::odd();
        let page = page(&results, &plot::all(&results));
        assert!(page.contains("&lt;script&gt;"));
        for bad in ["<script", "<img", "<link", "src=\"", "href", "@import", "url(", "NaN", "inf "] {
            assert!(!page.contains(bad), "{bad}");
        }
        let elsewhere = page.matches("http").count();
        let namespaces = page.matches("xmlns=\"http").count() + page.matches("http-equiv").count();
        assert_eq!(elsewhere, namespaces);
    }

    #[test]
    fn all_that_was_measured_is_there() {
        let results = sample::realistic();
        let page = page(&results, &plot::all(&results));
        let figures: usize = results.rows().map(|(_, row)| row.figures.len()).sum();
        assert_eq!(
            page.matches("<td class=\"figure").count() - page.matches("figure faint").count(),
            figures
        );
        assert_eq!(page.matches("<details").count(), results.tables.len());
        assert!(page.contains(&results.skipped[0].why));
        assert!(page.matches("<details open").count() >= OPEN);
    }
}
