//! Dumps on their way: into a file, or into a response.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use axum::body::Bytes;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::observe::Sink;

/// A file that is there when all of it was written, and not before.
pub(super) struct FileSink {
    file: NamedTempFile,
    path: PathBuf,
}

impl FileSink {
    pub(super) fn create(path: &Path) -> io::Result<FileSink> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new().prefix(".dump").tempfile_in(parent)?;
        Ok(FileSink { file, path: path.to_owned() })
    }
}

impl Write for FileSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.as_file_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for FileSink {
    fn complete(self: Box<Self>) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Pieces of a stream that wait for a slow reader: 16 of up to 1 MiB each.
const WAITING: usize = 16;

/// The body of a response. Who writes waits for who reads, until that goes away.
pub(super) struct BodySink(mpsc::Sender<Bytes>);

impl BodySink {
    pub(super) fn new() -> (BodySink, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (BodySink(sender), receiver)
    }
}

impl Write for BodySink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for BodySink {
    fn complete(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}
