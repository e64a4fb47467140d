//! `vmm doctor`: what this host can do for the monitor, in plain words, and what to do about what is missing.
//!
//! Facts come from [`crate::host::probe`]; [`diagnose`] turns them into findings and looks at nothing itself,
//! so that it can be tested with hosts that nobody has at hand; this module prints them.

mod diagnose;
mod trackers;

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

pub use self::diagnose::diagnose;
pub use self::trackers::{Row, rows};
use crate::host::{self, Host};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and there is something to know about it.
    Note,
    /// Something that `vmm run` does without is not there.
    Missing,
    /// `vmm run` cannot work.
    Fatal,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Heading that it belongs under.
    pub group: &'static str,
    /// What was looked at.
    pub what: &'static str,
    /// How bad it is.
    pub level: Level,
    /// How it is.
    pub value: String,
    /// What that means for the user, when it is not simply good.
    pub meaning: Option<String>,
    /// What the user can do about it.
    pub remedy: Option<String>,
}

/// Everything that `vmm doctor --json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    /// `vmm run` can work.
    runs: bool,
    host: &'a Host,
    findings: &'a [Finding],
    trackers: &'a [Row],
}

/// Whether `vmm run` can work, going by `findings`.
pub fn runs(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.level < Level::Fatal)
}

/// Looks at this host and prints what it found, as text or as JSON. Succeeds only if `vmm run` can work.
pub fn run(json: bool) -> ExitCode {
    let host = host::probe();
    let findings = diagnose(&host);
    let mut out = io::stdout().lock();
    let trackers = rows(&host);
    let printed = match json {
        true => print_json(&mut out, &host, &findings, &trackers),
        false => print(&mut out, &findings, &trackers),
    };
    match printed {
        // A reader that went away (`vmm doctor | head`) has seen what it wanted.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("cannot print the report: {error}");
            ExitCode::FAILURE
        }
        _ if runs(&findings) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn print_json(out: &mut dyn Write, host: &Host, findings: &[Finding], trackers: &[Row]) -> io::Result<()> {
    let report = Report { runs: runs(findings), host, findings, trackers };
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)
}

/// Columns of text: a level, a name, a value.
const NAME_COLUMN: usize = 8;
const VALUE_COLUMN: usize = 36;
/// Widest line.
const WIDTH: usize = 110;

fn print(out: &mut dyn Write, findings: &[Finding], trackers: &[Row]) -> io::Result<()> {
    for group in findings.chunk_by(|a, b| a.group == b.group) {
        writeln!(out, "{}", group[0].group)?;
        for finding in group {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Note => "note",
                Level::Missing => "no",
                Level::Fatal => "FAIL",
            };
            let name = format!("  {level:<6}{:<width$}", finding.what, width = VALUE_COLUMN - NAME_COLUMN);
            paragraph(out, &name, VALUE_COLUMN, &finding.value)?;
            if let Some(meaning) = &finding.meaning {
                paragraph(out, "", NAME_COLUMN + 2, meaning)?;
            }
            if let Some(remedy) = &finding.remedy {
                paragraph(out, &format!("{:NAME_COLUMN$}> ", ""), NAME_COLUMN + 2, remedy)?;
            }
        }
        writeln!(out)?;
    }
    trackers::print(out, trackers)?;
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    if runs(findings) {
        let rest = match count(Level::Missing) {
            0 => "Nothing is missing.".to_owned(),
            1 => "One thing that it can do without is missing.".to_owned(),
            missing => format!("{missing} things that it can do without are missing."),
        };
        writeln!(out, "`vmm run` works on this host. {rest}")
    } else {
        writeln!(out, "`vmm run` cannot work on this host: see what says FAIL above.")
    }
}

/// Prints `text` behind `first`, wrapped, with `indent` columns before every further line. A line break in
/// `text` stays one, so that a command can have its own line.
fn paragraph(out: &mut dyn Write, first: &str, indent: usize, text: &str) -> io::Result<()> {
    let mut start = format!("{first:<indent$}");
    for line in text.lines() {
        let mut column = start.len();
        write!(out, "{start}")?;
        for (index, word) in line.split(' ').enumerate() {
            if index > 0 && column + 1 + word.len() > WIDTH {
                write!(out, "\n{:indent$}{word}", "")?;
                column = indent + word.len();
            } else {
                let space = if index > 0 { " " } else { "" };
                write!(out, "{space}{word}")?;
                column += space.len() + word.len();
            }
        }
        writeln!(out)?;
        start = " ".repeat(indent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_and_indented() {
        let mut out = Vec::new();
        paragraph(&mut out, "  ok  ", 6, &"word ".repeat(40)).unwrap();
        paragraph(&mut out, "", 2, "a\nb c").unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("  ok  word word"));
        assert!(text.lines().all(|line| line.len() <= WIDTH));
        assert!(text.lines().skip(1).take(1).all(|line| line.starts_with("      word")));
        assert!(text.ends_with("\n  a\n  b c\n"));
    }

    #[test]
    fn the_report_of_this_host_prints_both_ways() {
        let host = host::probe();
        let findings = diagnose(&host);
        let mut text = Vec::new();
        let trackers = rows(&host);
        print(&mut text, &findings, &trackers).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(findings.iter().all(|finding| text.contains(finding.what)));
        assert_eq!(text.contains("`vmm run` works on this host"), runs(&findings));
        let mut json = Vec::new();
        print_json(&mut json, &host, &findings, &trackers).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["runs"], runs(&findings));
        assert_eq!(json["findings"].as_array().unwrap().len(), findings.len());
        assert_eq!(json["host"]["kernel"], host.kernel);
        assert_eq!(json["trackers"].as_array().unwrap().len(), trackers.len());
        assert!(trackers.iter().all(|row| text.contains(row.name)));
        assert_eq!(trackers.iter().filter(|row| row.auto).count(), usize::from(runs(&findings)));
    }
}
