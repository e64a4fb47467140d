//! `vmm log`: what can be done with a dirty log in a file, without the guest that it is of.
//!
//! A log comes from outside: every verb reads it through [`LogReader`], which trusts nothing, and keeps no more of it in
//! memory than a bound that does not depend on the log.

mod apply;
mod heatmap;
mod info;
mod ranges;
mod snapshots;

pub use apply::{apply, verify};
pub use heatmap::heatmap;
pub use info::info;
pub use ranges::{Export, export, ranges};
pub use snapshots::merge;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use dirty_track::log::{LogReader, ReadError, ReplayError};

use crate::snapshot::SnapshotError;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum LogfileError {
    /// The log cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The log cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The log.
        path: PathBuf,
        /// What is wrong with it.
        source: ReadError,
    },
    /// The log cannot be replayed.
    #[error("{}: {source}", path.display())]
    Replay {
        /// The log.
        path: PathBuf,
        /// Why not.
        source: ReplayError,
    },
    /// The result cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An image is not what the log makes of it.
    #[error("{} differs from the log in {pages} pages, the first of them at {first:#x}", path.display())]
    Differs {
        /// The image.
        path: PathBuf,
        /// How many pages.
        pages: u64,
        /// Guest-physical address of the first.
        first: u64,
    },
    /// More pages than can be remembered.
    #[error("{}: the log has the contents of more pages than can be held against an image: apply it, and compare the images", .0.display())]
    TooManyPages(PathBuf),
    /// A picture of no known kind.
    #[error("{}: a picture is a .png or a .svg", .0.display())]
    Picture(PathBuf),
    /// Nothing to draw.
    #[error("{}: the log has no epochs, so there is nothing to draw", .0.display())]
    Empty(PathBuf),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Contents that are needed.
    #[error("{}: the log has no contents of pages: write it with --pages", .0.display())]
    NoContents(PathBuf),
}

type Input = BufReader<Box<dyn Read>>;

/// Opens a log; `-` is standard input.
fn open(path: &Path) -> Result<LogReader<Input>, LogfileError> {
    let input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let opened =
            File::open(path).map_err(|source| LogfileError::Open { path: path.to_owned(), source })?;
        Box::new(opened)
    };
    LogReader::new(BufReader::with_capacity(1 << 20, input)).map_err(|source| read_error(path, source))
}

fn read_error(path: &Path, source: ReadError) -> LogfileError {
    LogfileError::Read { path: path.to_owned(), source }
}

fn write_error(path: &Path) -> impl Fn(io::Error) -> LogfileError {
    move |source| LogfileError::Write { path: path.to_owned(), source }
}

/// Writes to standard output. A reader that has gone does not want the rest, which is no error.
fn print(write: impl FnOnce(&mut dyn Write) -> Result<(), PrintError>) -> Result<(), LogfileError> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let outcome = write(&mut out).and_then(|()| Ok(out.flush()?));
    match outcome {
        Ok(()) => Ok(()),
        Err(PrintError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(PrintError::Io(source)) => Err(write_error(Path::new("standard output"))(source)),
        Err(PrintError::Log(error)) => Err(error),
    }
}

/// Why something could not be printed to its end.
enum PrintError {
    Io(io::Error),
    Log(LogfileError),
}

impl From<io::Error> for PrintError {
    fn from(error: io::Error) -> PrintError {
        PrintError::Io(error)
    }
}

impl From<LogfileError> for PrintError {
    fn from(error: LogfileError) -> PrintError {
        PrintError::Log(error)
    }
}
