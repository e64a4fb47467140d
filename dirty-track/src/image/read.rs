//! Reading an image.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::image::{CHUNK, ImageError, SUM, chunks, digest, is_zero, sum};
use crate::log::StreamId;

/// An image that is read, by any number of threads.
#[derive(Debug)]
pub struct ImageReader {
    id: StreamId,
    end: Gfn,
    memory: File,
    memory_path: PathBuf,
    sums: File,
    sums_path: PathBuf,
    digests: Vec<u64>,
    /// The sums of each chunk that was needed, after they were held against its digest.
    known: Vec<OnceLock<Box<[u64]>>>,
}

impl ImageReader {
    /// The image `id` with frames below `end` whose files are at `memory` and `sums`. No contents are read.
    ///
    /// # Errors
    /// [`ImageError::Io`]; [`ImageError::Length`]; [`ImageError::Sums`] when there are not as many digests as chunks.
    pub fn open(
        memory: &Path,
        sums: &Path,
        id: StreamId,
        end: Gfn,
        digests: Vec<u64>,
    ) -> Result<ImageReader, ImageError> {
        let open = |path: &Path, expected: u64| {
            let failed = |source| ImageError::Io { what: "open", path: path.to_owned(), source };
            let file = File::open(path).map_err(failed)?;
            match file.metadata().map_err(failed)?.len() {
                found if found == expected => Ok(file),
                found => Err(ImageError::Length { path: path.to_owned(), expected, found }),
            }
        };
        if digests.len() != chunks(end) {
            let range = PageRange { start: Gfn(0), pages: end.0 };
            return Err(ImageError::Sums { range, path: sums.to_owned() });
        }
        Ok(ImageReader {
            id,
            end,
            memory: open(memory, end.gpa().0)?,
            memory_path: memory.to_owned(),
            sums: open(sums, end.0 * SUM as u64)?,
            sums_path: sums.to_owned(),
            known: (0..chunks(end)).map(|_| OnceLock::new()).collect(),
            digests,
        })
    }

    /// The file of contents.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Where that is.
    pub fn memory_path(&self) -> &Path {
        &self.memory_path
    }

    fn bad_sums(&self, chunk: usize) -> ImageError {
        let start = (chunk * CHUNK) as u64;
        let range = PageRange { start: Gfn(start), pages: (self.end.0 - start).min(CHUNK as u64) };
        ImageError::Sums { range, path: self.sums_path.clone() }
    }

    /// The sums of a chunk; none if it is all zeros.
    fn chunk(&self, chunk: usize) -> Result<Option<&[u64]>, ImageError> {
        let Some(&expected) = self.digests.get(chunk).filter(|digest| **digest != 0) else { return Ok(None) };
        let known = &self.known[chunk];
        if let Some(sums) = known.get() {
            return Ok(Some(sums));
        }
        let start = chunk * CHUNK;
        let mut bytes = vec![0; CHUNK.min(self.end.0 as usize - start) * SUM];
        self.sums.read_exact_at(&mut bytes, (start * SUM) as u64).map_err(|source| ImageError::Io {
            what: "read",
            path: self.sums_path.clone(),
            source,
        })?;
        if digest(self.id, chunk, &bytes) != expected {
            return Err(self.bad_sums(chunk));
        }
        let sums = bytes.chunks_exact(SUM).map(|sum| u64::from_le_bytes(sum.try_into().unwrap_or_default()));
        Ok(Some(known.get_or_init(|| sums.collect())))
    }

    /// The pages of `range` that are not all zeros, as runs in ascending order.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn filled(&self, range: PageRange) -> Result<Vec<PageRange>, ImageError> {
        let mut filled: Vec<PageRange> = Vec::new();
        self.each(range, |gfn, sum| {
            match filled.last_mut() {
                Some(last) if sum != 0 && last.end() == gfn => last.pages += 1,
                _ if sum != 0 => filled.push(PageRange { start: gfn, pages: 1 }),
                _ => {}
            }
            Ok(())
        })?;
        Ok(filled)
    }

    /// Hands each page of `range` with its sum to `look`; chunks of zeros are passed over.
    fn each(
        &self,
        range: PageRange,
        mut look: impl FnMut(Gfn, u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let end = range.start.0.checked_add(range.pages).filter(|end| *end <= self.end.0);
        let end = end.ok_or_else(|| ImageError::Beyond { range, path: self.memory_path.clone() })?;
        let mut at = range.start.0;
        while at < end {
            let chunk = at as usize / CHUNK;
            let first = (chunk * CHUNK) as u64;
            let stop = end.min(first + CHUNK as u64);
            if let Some(sums) = self.chunk(chunk)? {
                for gfn in at..stop {
                    look(Gfn(gfn), sums[(gfn - first) as usize])?;
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Reads the contents of `range` into `into`, which has as many bytes, and checks them.
    ///
    /// # Errors
    /// See [`ImageError`]; what is in `into` is good for nothing then.
    pub fn read(&self, range: PageRange, into: &mut [u8]) -> Result<(), ImageError> {
        let filled = self.filled(range)?;
        let offset = |gfn: Gfn| (gfn.0 - range.start.0) as usize * PAGE_BYTES;
        let mut at = 0;
        for run in filled {
            let bytes = offset(run.start)..offset(run.end());
            into[at..bytes.start].fill(0);
            at = bytes.end;
            let contents = &mut into[bytes];
            self.read_raw(run, contents)?;
            self.check(run, contents)?;
        }
        into[at..].fill(0);
        Ok(())
    }

    /// Reads what the file has at `range`, whatever it is: [`check`](Self::check) tells.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn read_raw(&self, range: PageRange, into: &mut [u8]) -> Result<(), ImageError> {
        let failed = |source| ImageError::Io { what: "read", path: self.memory_path.clone(), source };
        self.memory.read_exact_at(into, range.start.gpa().0).map_err(failed)
    }

    /// Holds `contents` against what was saved of `range`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn check(&self, range: PageRange, contents: &[u8]) -> Result<(), ImageError> {
        let wrong = |gfn| ImageError::Page { gfn, path: self.memory_path.clone() };
        let mut next = range.start;
        let page = |gfn: Gfn| {
            let at = (gfn.0 - range.start.0) as usize * PAGE_BYTES;
            &contents[at..at + PAGE_BYTES]
        };
        let zeros = |from: Gfn, to: Gfn| {
            (from.0..to.0).map(Gfn).find(|gfn| !is_zero(page(*gfn))).map_or(Ok(()), |gfn| Err(wrong(gfn)))
        };
        self.each(range, |gfn, expected| {
            // Chunks of zeros are passed over.
            zeros(next, gfn)?;
            next = Gfn(gfn.0 + 1);
            if sum(self.id, gfn, page(gfn)) == expected { Ok(()) } else { Err(wrong(gfn)) }
        })?;
        zeros(next, range.end())
    }
}
