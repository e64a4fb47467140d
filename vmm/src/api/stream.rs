//! Dumps on their way: into a file, or into a response.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use axum::body::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::beside::Beside;
use crate::observe::Sink;

/// A file that is there when all of it was written, and not before.
pub(super) struct FileSink(Beside);

impl FileSink {
    pub(super) fn create(path: &Path) -> io::Result<FileSink> {
        Beside::new(path).map(FileSink)
    }
}

impl Write for FileSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for FileSink {
    fn complete(self: Box<Self>) -> io::Result<()> {
        self.0.complete()
    }
}

/// Pieces of a stream that wait for a slow reader: 16 of up to 1 MiB each.
const WAITING: usize = 16;

/// How long who writes sleeps while who reads has enough to read.
const NAP: Duration = Duration::from_millis(1);

/// The body of a response. Who writes waits for who reads, until that goes away, or the body is [cut](Cut).
pub(super) struct BodySink {
    pieces: mpsc::Sender<Bytes>,
    cut: Cut,
}

/// Ends the wait for a reader that does not read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cut(Arc<AtomicBool>);

impl Cut {
    pub(super) fn cut(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl BodySink {
    pub(super) fn new(cut: Cut) -> (BodySink, mpsc::Receiver<Bytes>) {
        let (pieces, receiver) = mpsc::channel(WAITING);
        (BodySink { pieces, cut }, receiver)
    }
}

impl Write for BodySink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut piece = Bytes::copy_from_slice(bytes);
        loop {
            match self.pieces.try_send(piece) {
                Ok(()) => return Ok(bytes.len()),
                Err(TrySendError::Full(_)) if self.cut.0.load(Ordering::Relaxed) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "whoever reads it does not read on"));
                }
                Err(TrySendError::Full(back)) => piece = back,
                Err(TrySendError::Closed(_)) => {
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, "whoever read it has gone"));
                }
            }
            thread::sleep(NAP);
        }
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
