//! `vmm log apply` and `vmm log verify`: images of memory, made of logs and held against them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dirty_track::addr::{Gfn, PAGE_BYTES};
use dirty_track::log::{Event, replay};
use twox_hash::XxHash3_64;

use super::{LogfileError, open, read_error, snapshots, write_error};
use crate::beside::Beside;
use crate::options::human_size;
use crate::panel::grouped;

/// Writes to `output` what memory was at the end of the log at `path`: the image `base`, or nothing but zeros, with what
/// the log says. An image has the byte of each guest-physical address at that offset. `output` is there when all of it is
/// right, and not before.
///
/// # Errors
/// See [`LogfileError`].
pub fn apply(path: &Path, base: Option<&Path>, output: &Path) -> Result<(), LogfileError> {
    let mut log = open(path)?;
    let mut image = Beside::new(output).map_err(write_error(output))?;
    if let Some(base) = base {
        let source =
            File::open(base).map_err(|source| LogfileError::Open { path: base.to_owned(), source })?;
        copy_sparse(&source, image.file()).map_err(write_error(output))?;
    }
    let end = log.header().slots.last().map_or(0, |slot| slot.frames().end().gpa().0);
    let length = image.file().metadata().map_err(write_error(output))?.len();
    image.file().set_len(length.max(end)).map_err(write_error(output))?;
    let done = replay(&mut log, image.file())
        .map_err(|source| LogfileError::Replay { path: path.to_owned(), source })?;
    image.complete().map_err(write_error(output))?;
    eprintln!(
        "{}: {} pages from {} epochs, {} more are all zeros",
        output.display(),
        grouped(done.total.pages),
        done.epochs,
        grouped(done.total.zero)
    );
    Ok(())
}

/// Copies a file, with its holes.
fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let read = from.read_at(&mut buffer, at)?;
        if read == 0 {
            break;
        }
        for (offset, page) in (0..).step_by(PAGE_BYTES).zip(buffer[..read].chunks(PAGE_BYTES)) {
            if page.iter().any(|byte| *byte != 0) {
                to.write_all_at(page, at + offset)?;
            }
        }
        at += read as u64;
    }
    Ok(())
}

/// Pages that one pass over the log remembers, at 24 bytes or so each.
const REMEMBERED: u64 = 16 << 20;

/// Reads all of the log at `path`, so that it is known to be whole; and if there is an `image`, holds against it what the
/// log says last about each page.
///
/// # Errors
/// See [`LogfileError`].
pub fn verify(path: &Path, image: Option<&Path>) -> Result<(), LogfileError> {
    if path.is_dir() {
        return snapshots::verify(path);
    }
    let mut log = open(path)?;
    if image.is_some() && !log.header().contents {
        return Err(LogfileError::NoContents(path.to_owned()));
    }
    // By frame: a hash of the contents.
    let mut last: HashMap<u64, u64> = HashMap::new();
    let zero = XxHash3_64::oneshot(&[0; PAGE_BYTES]);
    let mut end = None;
    while let Some(event) = log.read().map_err(|error| read_error(path, error))? {
        match event {
            Event::Pages(range, contents) if image.is_some() => {
                let hashes = contents.chunks_exact(PAGE_BYTES).map(XxHash3_64::oneshot);
                last.extend((range.start.0..).zip(hashes));
            }
            Event::Zero(spans) if image.is_some() => {
                let frames = spans.iter().flat_map(|span| span.range.iter());
                // One more than can be remembered is noticed below.
                last.extend(frames.take(REMEMBERED as usize + 1).map(|gfn| (gfn.0, zero)));
            }
            Event::End(all) => end = Some(all),
            _ => {}
        }
        if last.len() as u64 > REMEMBERED {
            return Err(LogfileError::TooManyPages(path.to_owned()));
        }
    }
    let end = end.unwrap_or_default();
    if let Some(image) = image {
        compare(image, &last)?;
        println!("{}: {} pages are as the log says", image.display(), grouped(last.len() as u64));
    }
    println!("{}: whole, {} epochs, {}", path.display(), end.epochs, human_size(log.bytes_read()));
    Ok(())
}

fn compare(image: &Path, pages: &HashMap<u64, u64>) -> Result<(), LogfileError> {
    let open_error = |source| LogfileError::Open { path: image.to_owned(), source };
    let file = File::open(image).map_err(open_error)?;
    let mut frames: Vec<_> = pages.iter().map(|(gfn, hash)| (*gfn, *hash)).collect();
    frames.sort_unstable();
    let (mut differs, mut first) = (0, None);
    let mut page = [0; PAGE_BYTES];
    for (gfn, hash) in frames {
        let at = Gfn(gfn).gpa().0;
        let same = match file.read_exact_at(&mut page, at) {
            Ok(()) => XxHash3_64::oneshot(&page) == hash,
            // An image that is too short has no such page.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(open_error(error)),
        };
        if !same {
            differs += 1;
            first.get_or_insert(at);
        }
    }
    match first {
        Some(first) => Err(LogfileError::Differs { path: image.to_owned(), pages: differs, first }),
        None => Ok(()),
    }
}
