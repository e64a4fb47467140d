//! Where the pages of a slot come from that are not there yet.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::addr::{Gfn, PageRange};
use crate::fault::plan::Origin;
use crate::sys::uffd::fill::Staging;

/// Something that page contents can be had from: a file, a stream.
///
/// It is asked before anything is visible to the guest, with no lock held, so it may take its time and it may fail:
/// the guest's thread sleeps on, and it is asked again. When memory is no longer served (the process wants to
/// end) it must return, with an error if need be.
pub trait PageSource: fmt::Debug + Send + Sync {
    /// Fills `into` with the contents of `pages`, of which it has exactly as many bytes. The same pages may be asked
    /// for more than once, and by several threads, and their contents must not change.
    ///
    /// # Errors
    /// Whatever keeps it from that. It is reported and tried again.
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()>;

    /// Hands those of `pages` to `take` that may be something else than zeros: the others need not be brought in unless
    /// somebody asks for them. A source that does not know says all.
    ///
    /// # Errors
    /// As for [`fetch`](Self::fetch).
    fn filled(&self, pages: PageRange, take: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        take(pages);
        Ok(())
    }
}

/// A file, or a part of one, that holds the pages from one frame on.
#[derive(Debug)]
pub struct FileRegion {
    file: File,
    offset: u64,
    first: Gfn,
}

impl FileRegion {
    /// `file` has frame `first` at `offset`, and the frames after it behind that. Past the file's end is zero.
    pub fn new(file: File, offset: u64, first: Gfn) -> FileRegion {
        FileRegion { file, offset, first }
    }
}

impl PageSource for FileRegion {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        let before = || io::Error::new(io::ErrorKind::InvalidInput, "the pages are not in the file");
        let page = pages.start.0.checked_sub(self.first.0).ok_or_else(before)?;
        let start = page.checked_mul(crate::addr::PAGE_SIZE).and_then(|bytes| bytes.checked_add(self.offset));
        let start = start.ok_or_else(before)?;
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], start + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        into[done..].fill(0);
        Ok(())
    }
}

/// Where a slot's pages come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// They are zero.
    Zero,
    /// They are copied from what this fetches.
    Fetch(Arc<dyn PageSource>),
    /// The slot is a shared mapping of a memfd, which has them: they are mapped, not copied.
    Shared,
    /// They are moved out of this memory, whose first page is the slot's first: a huge page stays huge. Each page can
    /// be moved once; after that it is the guest's. Private anonymous slots only, Linux 6.8.
    Staged(Arc<Staging>),
}

impl Source {
    pub(super) fn origin(&self) -> Origin {
        match self {
            Source::Zero => Origin::Zero,
            Source::Fetch(_) => Origin::Buffer,
            Source::Shared => Origin::Cache,
            Source::Staged(_) => Origin::Staged,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_region_is_its_bytes_and_then_zeros() {
        let path = std::env::temp_dir().join(format!("file-region-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&[7; 100 + 4096 + 10]).unwrap();
        let region = FileRegion::new(file, 100, Gfn(0x40));
        let mut page = [1; 2 * 4096];
        region.fetch(PageRange { start: Gfn(0x40), pages: 2 }, &mut page).unwrap();
        assert!(page[..4106].iter().all(|&byte| byte == 7) && page[4106..].iter().all(|&byte| byte == 0));
        assert!(region.fetch(PageRange { start: Gfn(0x3f), pages: 1 }, &mut page[..4096]).is_err());
        assert!(region.fetch(PageRange { start: Gfn(u64::MAX), pages: 1 }, &mut page[..4096]).is_err());
    }
}
