//! The contents of pages at their places in a file, each of which can be had, and is checked, by itself.
//!
//! # Why
//! A guest can go on from memory that is not there yet only if any page can be fetched at once, and it may go on from
//! it only if that page is right. A stream with checksums must be read from its start; here a page is one read, and its
//! checksum another.
//!
//! # Layout
//! An image is two sparse files and a list.
//! - *memory*: the byte of each guest-physical address at that offset. Pages of zeros are holes, and so is what the image
//!   does not have.
//! - *sums*: 8 bytes for each frame, little-endian, at 8 times its number: the page's [`sum`], 0 for a page of zeros.
//! - *digests*: for each [`CHUNK`] frames one XXH3-64 of their sums, 0 if all of these are. Whoever keeps the image keeps
//!   the list where it is safe, as in a dirty log.
//!
//! # Contract
//! - What is read is what was saved, or an [`ImageError`]: a page that was changed, moved or taken from another image has
//!   not the sum that is at its place; sums that were changed, moved, lost or taken from another image have not their
//!   chunk's digest. Both depend on the image's id and on the frame. It is protection against accidents, as that of
//!   the [log](crate::log).
//! - Nothing is read but what is asked for, so to open an image costs the same whatever its size.
//! - Pages may be saved by any number of threads, in any order, and more than once (the last one counts), but the same
//!   page by one at a time.

mod read;
mod write;

pub use read::ImageReader;
pub use write::{ImageWriter, Saved};

use std::io;
use std::path::PathBuf;

use twox_hash::XxHash3_64;

use crate::addr::{Gfn, PageRange};
use crate::log::StreamId;
use crate::mix::mix;

/// Frames whose sums share a digest: 16 MiB of memory.
pub const CHUNK: usize = 4096;

/// Bytes of a sum.
const SUM: usize = 8;

/// Why an image could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file of it.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file has another size than it had.
    #[error("{} has {found} bytes, and it had {expected}: it was cut off, or something else was written to it", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its size when it was written.
        expected: u64,
        /// Its size.
        found: u64,
    },
    /// A page is not what it was.
    #[error(
        "page {:#x} in {} is damaged, or belongs elsewhere: its contents have not the sum that was recorded", gfn.0, path.display()
    )]
    Page {
        /// The page.
        gfn: Gfn,
        /// The file of contents.
        path: PathBuf,
    },
    /// Sums are not what they were.
    #[error("the sums of the pages {range} (first frame and number) in {} are damaged, or belong elsewhere", path.display())]
    Sums {
        /// Whose sums.
        range: PageRange,
        /// The file of sums.
        path: PathBuf,
    },
    /// Pages that no image of this size has.
    #[error("the pages {range} (first frame and number) are beyond the end of {}", path.display())]
    Beyond {
        /// The pages.
        range: PageRange,
        /// The file of contents.
        path: PathBuf,
    },
}

/// The sum of a page of the image `id`: 0 if it is all zeros, and else never.
pub fn sum(id: StreamId, gfn: Gfn, page: &[u8]) -> u64 {
    if is_zero(page) { 0 } else { XxHash3_64::oneshot_with_seed(seed(id, gfn.0), page).max(1) }
}

/// The digest of the sums of chunk number `chunk` of the image `id`.
fn digest(id: StreamId, chunk: usize, sums: &[u8]) -> u64 {
    if is_zero(sums) { 0 } else { XxHash3_64::oneshot_with_seed(!seed(id, chunk as u64), sums).max(1) }
}

fn seed(id: StreamId, place: u64) -> u64 {
    id.seed() ^ mix(place)
}

/// Whether `bytes` are all zeros. Most that are not have something early.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Chunks of an image that ends at frame `end`.
fn chunks(end: Gfn) -> usize {
    (end.0 as usize).div_ceil(CHUNK)
}

#[cfg(test)]
mod tests;
