//! From a log and an image of memory to the image of memory later on.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use vmm_sys_util::write_zeroes::PunchHole;

use crate::addr::PageRange;
use crate::log::{End, Event, LogReader, ReplayError};

/// An image of guest memory.
pub trait Image {
    /// Writes the contents of `range`.
    ///
    /// # Errors
    /// What keeps it from doing so.
    fn write(&mut self, range: PageRange, contents: &[u8]) -> io::Result<()>;

    /// Makes all of `range` zeros.
    ///
    /// # Errors
    /// What keeps it from doing so.
    fn zero(&mut self, range: PageRange) -> io::Result<()>;
}

/// A file with the byte of each guest-physical address at that offset, and holes where there is nothing but zeros.
impl Image for File {
    fn write(&mut self, range: PageRange, contents: &[u8]) -> io::Result<()> {
        self.write_all_at(contents, range.start.gpa().0)
    }

    fn zero(&mut self, range: PageRange) -> io::Result<()> {
        self.punch_hole(range.start.gpa().0, range.bytes())
    }
}

/// Writes to `image` what the log says, to its end, and returns how much that was.
///
/// # Errors
/// What is wrong with the log, or the image; the image has a part of the log then and is good for nothing.
pub fn replay<R: Read>(log: &mut LogReader<R>, image: &mut impl Image) -> Result<End, ReplayError> {
    if !log.header().contents {
        return Err(ReplayError::NoContents);
    }
    loop {
        match log.read()? {
            Some(Event::Pages(range, contents)) => {
                image.write(range, contents).map_err(|source| ReplayError::Image { range, source })?;
            }
            Some(Event::Ahead(_)) => {
                let mut failed = None;
                log.contents(|input, spans| {
                    for range in spans.iter().map(|span| span.range) {
                        let mut contents = vec![0; range.bytes() as usize];
                        input.read_exact(&mut contents)?;
                        if failed.is_none() {
                            failed = image.write(range, &contents).err().map(|source| (range, source));
                        }
                    }
                    Ok(())
                })?;
                if let Some((range, source)) = failed {
                    return Err(ReplayError::Image { range, source });
                }
            }
            Some(Event::Zero(spans)) => {
                for span in spans {
                    let range = span.range;
                    image.zero(range).map_err(|source| ReplayError::Image { range, source })?;
                }
            }
            Some(Event::End(end)) => return Ok(end),
            // A reader ends with an end, or an error.
            Some(_) | None => {}
        }
    }
}
