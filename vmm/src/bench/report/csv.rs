//! All figures as comma-separated values (RFC 4180), a line each, for what computes with them.
//!
//! Numbers are as exact as they were measured; what is no number is an empty field.

use std::borrow::Cow;

use crate::bench::results::{Better, Results};

const HEADER: [&str; 15] = [
    "bench",
    "table",
    "case",
    "figure",
    "unit",
    "better",
    "median",
    "low",
    "high",
    "spread",
    "noisy",
    "limit",
    "limit_median",
    "ratio",
    "samples",
];

/// A header and a line for each figure.
pub(super) fn lines(results: &Results) -> String {
    let mut text = line(&HEADER.map(Cow::Borrowed));
    for (table, row) in results.rows() {
        for figure in &row.figures {
            let limit = figure.limit.as_ref();
            text += &line(&[
                table.bench.to_string().into(),
                table.title.as_str().into(),
                row.case.to_string().into(),
                figure.name.as_str().into(),
                figure.unit.to_string().into(),
                better(figure.better).into(),
                exact(figure.median),
                exact(figure.low),
                exact(figure.high),
                exact(figure.spread),
                figure.noisy.to_string().into(),
                limit.map_or("", |limit| limit.name.as_str()).into(),
                limit.map_or("".into(), |limit| exact(limit.median)),
                limit.map_or("".into(), |limit| exact(limit.ratio)),
                figure.samples.len().to_string().into(),
            ]);
        }
    }
    text
}

fn better(better: Better) -> &'static str {
    match better {
        Better::Lower => "lower",
        Better::Higher => "higher",
        Better::Neither => "neither",
    }
}

fn exact(value: f64) -> Cow<'static, str> {
    if value.is_finite() { value.to_string().into() } else { "".into() }
}

fn line(fields: &[Cow<'_, str>; HEADER.len()]) -> String {
    let quoted: Vec<_> = fields.iter().map(|field| quoted(field)).collect();
    quoted.join(",") + "\r\n"
}

fn quoted(field: &str) -> Cow<'_, str> {
    if field.contains([',', '"', '\r', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\"")).into()
    } else {
        field.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample;

    /// Records and fields of a whole document.
    fn parse(text: &str) -> Vec<Vec<String>> {
        let (mut records, mut record, mut field) = (Vec::new(), Vec::new(), String::new());
        let mut inside = false;
        let mut letters = text.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '"' if inside && letters.peek() == Some(&'"') => {
                    letters.next();
                    field.push('"');
                }
                '"' => inside = !inside,
                letter if inside => field.push(letter),
                ',' => record.push(std::mem::take(&mut field)),
                '\r' => {}
                '\n' => {
                    record.push(std::mem::take(&mut field));
                    records.push(std::mem::take(&mut record));
                }
                letter => field.push(letter),
            }
        }
        assert!(!inside && field.is_empty() && record.is_empty());
        records
    }

    #[test]
    fn every_figure_is_a_line_of_as_many_fields() {
        for results in [sample::realistic(), sample::odd(), sample::empty()] {
            let figures: usize = results.rows().map(|(_, row)| row.figures.len()).sum();
            let records = parse(&lines(&results));
            assert_eq!(records.len(), figures + 1);
            for record in &records {
                assert_eq!(record.len(), HEADER.len(), "{record:?}");
                assert!(
                    record.iter().all(|field| !["NaN", "inf", "-inf"].contains(&field.as_str())),
                    "{record:?}"
                );
            }
        }
    }

    #[test]
    fn odd_text_comes_back_as_it_was() {
        let results = sample::odd();
        let records = parse(&lines(&results));
        let (table, row) = results.rows().find(|(_, row)| !row.figures.is_empty()).unwrap();
        assert_eq!(records[1][1], table.title);
        assert_eq!(records[1][2], row.case.to_string());
        assert!(records.iter().any(|record| record[2].contains(['"', '\n'])));
    }

    #[test]
    fn numbers_are_exact() {
        assert_eq!(exact(0.1 + 0.2), "0.30000000000000004");
        assert_eq!(exact(f64::NEG_INFINITY), "");
        assert_eq!(quoted("a"), "a");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
