//! Writing an image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::image::{CHUNK, ImageError, SUM, chunks, digest, sum};
use crate::log::StreamId;
use crate::sys::zeroed::zeroed_atomics;

/// An image that is being written.
#[derive(Debug)]
pub struct ImageWriter {
    id: StreamId,
    end: Gfn,
    memory: File,
    path: PathBuf,
    /// By frame.
    sums: Box<[AtomicU64]>,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// See the [module](super).
    pub digests: Vec<u64>,
    /// Pages that are not all zeros.
    pub pages: u64,
}

impl ImageWriter {
    /// Begins an image with frames below `end`, whose contents go to a new file at `memory`.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn create(memory: &Path, id: StreamId, end: Gfn) -> Result<ImageWriter, ImageError> {
        let create = || {
            let file = File::options().read(true).write(true).create_new(true).open(memory)?;
            file.set_len(end.gpa().0)?;
            Ok(file)
        };
        let failed = |source| ImageError::Io { what: "create", path: memory.to_owned(), source };
        let file = create().map_err(failed)?;
        Ok(ImageWriter {
            id,
            end,
            memory: file,
            path: memory.to_owned(),
            sums: zeroed_atomics(end.0 as usize),
        })
    }

    /// What tells the image from others.
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Saves `contents`, whole pages from frame `first` on.
    ///
    /// # Errors
    /// [`ImageError::Beyond`] and [`ImageError::Io`]; what of them was saved is not known then.
    pub fn save(&self, first: Gfn, contents: &[u8]) -> Result<(), ImageError> {
        let pages = contents.len() / PAGE_BYTES;
        let range = PageRange { start: first, pages: pages as u64 };
        let sums = usize::try_from(first.0)
            .ok()
            .and_then(|first| self.sums.get(first..first.checked_add(pages)?))
            .ok_or_else(|| ImageError::Beyond { range, path: self.path.clone() })?;
        let write = |run: std::ops::Range<usize>| {
            let bytes = &contents[run.start * PAGE_BYTES..run.end * PAGE_BYTES];
            let at = (first.0 + run.start as u64) << crate::addr::PAGE_SHIFT;
            let written = self.memory.write_all_at(bytes, at);
            written.map_err(|source| ImageError::Io { what: "write", path: self.path.clone(), source })
        };
        let mut run = 0..0;
        for (page, bytes) in contents.chunks_exact(PAGE_BYTES).enumerate() {
            let new = sum(self.id, Gfn(first.0 + page as u64), bytes);
            // One thread has this page; whoever finishes the image has waited for it.
            let old = sums[page].swap(new, Ordering::Relaxed);
            // What is a hole already stays one.
            if new == 0 && old == 0 {
                if !run.is_empty() {
                    write(run.clone())?;
                }
                run = page + 1..page + 1;
            } else {
                run.end = page + 1;
            }
        }
        if run.is_empty() { Ok(()) } else { write(run) }
    }

    /// Writes the sums to a new file at `path`. Both files are on the disk then.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn finish(mut self, path: &Path) -> Result<Saved, ImageError> {
        let mut saved = Saved { digests: Vec::with_capacity(chunks(self.end)), pages: 0 };
        let mut bytes = Vec::with_capacity(CHUNK * SUM);
        let mut write = || -> io::Result<()> {
            let file = File::options().write(true).create_new(true).open(path)?;
            file.set_len(self.end.0 * SUM as u64)?;
            for (chunk, sums) in self.sums.chunks_mut(CHUNK).enumerate() {
                bytes.clear();
                for sum in sums {
                    let sum = *sum.get_mut();
                    saved.pages += u64::from(sum != 0);
                    bytes.extend_from_slice(&sum.to_le_bytes());
                }
                let digest = digest(self.id, chunk, &bytes);
                if digest != 0 {
                    file.write_all_at(&bytes, (chunk * CHUNK * SUM) as u64)?;
                }
                saved.digests.push(digest);
            }
            file.sync_all()
        };
        write().map_err(|source| ImageError::Io { what: "write", path: path.to_owned(), source })?;
        self.memory.sync_all().map_err(|source| ImageError::Io {
            what: "write",
            path: self.path.clone(),
            source,
        })?;
        Ok(saved)
    }
}
