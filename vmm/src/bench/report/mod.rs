//! A run of `vmm bench` for people: a page, tables in Markdown, CSV, plots as separate pictures, and text for a terminal.
//!
//! Everything is made from [`Results`] and from nothing else, so that a report can be made again, elsewhere and later, from
//! the file that `--json` wrote. Names, cases and what the host says of itself come from outside: wherever they end up,
//! they are text and never markup. A figure that is missing, or not a number, leaves a gap and nothing more.

mod csv;
mod facts;
mod grid;
mod html;
mod markdown;
mod markup;
mod plot;
#[cfg(test)]
pub(super) mod sample;
mod terminal;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use super::results::{Results, ResultsError};
use crate::beside;

pub use self::terminal::terminal;

/// Why a report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The directory that it is to be in.
    #[error("cannot make the directory {} for the report: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// One of its files.
    #[error("cannot write {}, a part of the report: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The results beside it.
    #[error(transparent)]
    Results(#[from] ResultsError),
}

/// Writes the report of `results` into `directory`, which is made if it is not there, and says which files it wrote: the
/// page first. Each file is written whole or not at all; what else is in the directory stays. Plots without data are left
/// out.
///
/// # Errors
/// See [`ReportError`].
pub fn write(results: &Results, directory: &Path) -> Result<Vec<PathBuf>, ReportError> {
    fs::create_dir_all(directory)
        .map_err(|source| ReportError::Directory { path: directory.to_owned(), source })?;
    let plots = plot::all(results);
    let mut files = vec![
        ("report.html".to_owned(), html::page(results, &plots)),
        ("report.md".to_owned(), markdown::document(results, &plots)),
        ("report.csv".to_owned(), csv::lines(results)),
    ];
    files.extend(plots.iter().map(|plot| (plot.file.clone(), plot.svg.file())));

    let mut written = Vec::new();
    for (name, text) in files {
        let path = directory.join(name);
        beside::write(&path, text.as_bytes())
            .map_err(|source| ReportError::File { path: path.clone(), source })?;
        written.push(path);
    }
    let path = directory.join("results.json");
    results.write(&path)?;
    written.push(path);
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_written_and_named() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("a/b");
        let written = write(&sample::realistic(), &directory).unwrap();
        let names: Vec<_> = written.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names[..3], ["report.html", "report.md", "report.csv"]);
        assert_eq!(names.last(), Some(&"results.json"));
        assert!(names.contains(&"first-write-none.svg"), "{names:?}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), written.len());
        assert!(written.iter().all(|path| fs::metadata(path).unwrap().len() > 0));
        assert!(Results::read(&directory.join("results.json")).is_ok());
        // Once more, over what is there.
        assert_eq!(write(&sample::realistic(), &directory).unwrap(), written);
    }

    #[test]
    fn an_empty_document_has_a_report_without_plots() {
        let home = tempfile::tempdir().unwrap();
        let written = write(&sample::empty(), home.path()).unwrap();
        assert_eq!(written.len(), 4);
        assert!(terminal(&sample::empty()).lines().count() <= 2);
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write(&sample::empty(), &file.join("below")).unwrap_err();
        assert!(error.to_string().contains("file/below"), "{error}");
        let page = home.path().join("report.html");
        fs::create_dir(&page).unwrap();
        let error = write(&sample::empty(), home.path()).unwrap_err();
        assert!(error.to_string().contains("report.html"), "{error}");
    }
}
