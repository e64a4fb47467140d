//! A snapshot and those that it builds on, as one memory.
//!
//! They come from outside. What they say is checked before a guest exists: that each is whole, builds on the one that is
//! there, and is of the same memory. Pages are checked when they are read.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dirty_track::addr::{Gfn, PAGE_BYTES, PageRange};
use dirty_track::fault::PageSource;
use dirty_track::image::{ImageError, ImageReader};
use dirty_track::log::{Event, Header, LogReader, StreamId};

use super::directory::{MEMORY, STATE, SUMS};
use super::{DIGESTS, PARENT, SHAPE, Shape, SnapshotError};
use crate::state::MachineState;
use crate::state::parts::{self, Parts, PartsError};

/// Snapshots of a chain: restoring one page looks at each of them.
const MOST_LAYERS: usize = 4096;

/// A snapshot, by itself.
#[derive(Debug)]
pub struct Layer {
    /// The directory.
    pub path: PathBuf,
    /// What it is about.
    pub header: Header,
    /// The pages that it has, in ascending order.
    pub ranges: Vec<PageRange>,
    /// Their contents.
    pub image: ImageReader,
    /// What it builds on.
    parent: Option<(StreamId, PathBuf)>,
}

/// The machine of a snapshot, but for its memory.
#[derive(Debug)]
pub struct Saved {
    /// What it is made of.
    pub shape: Shape,
    /// The rest.
    pub state: MachineState,
}

/// A snapshot with all that it builds on.
#[derive(Debug)]
pub struct Chain {
    /// The newest first; the last one stands for itself.
    layers: Vec<Layer>,
}

fn log(path: &Path) -> Result<LogReader<BufReader<File>>, SnapshotError> {
    let file = path.join(STATE);
    let not_a_directory = || path.is_file().then(|| SnapshotError::File(path.to_owned()));
    let open_error =
        |source| not_a_directory().unwrap_or(SnapshotError::Io { what: "open", path: file.clone(), source });
    let opened = File::open(&file).map_err(open_error)?;
    LogReader::new(BufReader::with_capacity(1 << 18, opened))
        .map_err(|source| SnapshotError::Read { path: file, source })
}

/// What the snapshot at `path` is about, as its first record says.
pub(super) fn header(path: &Path) -> Result<Header, SnapshotError> {
    Ok(log(path)?.header().clone())
}

/// The end of guest-physical memory.
pub(super) fn end_of(header: &Header) -> Gfn {
    header.slots.last().map_or(Gfn(0), |slot| slot.frames().end())
}

impl Layer {
    /// Opens the snapshot at `path`, and reads everything of it but contents of pages.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn open(path: &Path) -> Result<(Layer, Saved), SnapshotError> {
        let mut log = log(path)?;
        let header = log.header().clone();
        let read_error = |source| SnapshotError::Read { path: path.join(STATE), source };
        let part_error = |source| SnapshotError::Parts { path: path.to_owned(), source };
        let (mut parts, mut shape, mut digests, mut parent) = (Parts::default(), None, None, None);
        let mut ranges: Vec<PageRange> = Vec::new();
        while let Some(event) = log.read().map_err(read_error)? {
            match event {
                Event::Ranges(spans) => {
                    for range in spans.iter().map(|span| span.range) {
                        match ranges.last_mut() {
                            Some(last) if last.end() == range.start => last.pages += range.pages,
                            _ => ranges.push(range),
                        }
                    }
                }
                Event::State { name: SHAPE, bytes } => {
                    shape = Some(parts::parse::<Shape>(SHAPE, bytes).map_err(part_error)?);
                }
                Event::State { name: DIGESTS, bytes } => {
                    let (words, _) = bytes.as_chunks();
                    let words = words.iter().map(|word| u64::from_le_bytes(*word));
                    digests.get_or_insert_with(Vec::new).extend(words);
                }
                Event::State { name: PARENT, bytes } => {
                    parent = Some(PathBuf::from(OsStr::from_bytes(bytes)));
                }
                Event::State { name, bytes } => parts.add(name, bytes).map_err(part_error)?,
                _ => {}
            }
        }
        let missing = |missing: &str| SnapshotError::NotASnapshot {
            path: path.to_owned(),
            missing: missing.to_owned(),
        };
        let digests = digests.ok_or_else(|| missing("sums of its pages"))?;
        let parent = match (header.parent, parent) {
            (None, _) => None,
            (Some(id), Some(path)) => Some((id, path)),
            (Some(_), None) => return Err(missing("path of what it builds on")),
        };
        let shape = shape.ok_or_else(|| missing("shape of a machine"))?;
        let state = parts.finish(shape.cpus).map_err(|error| match error {
            PartsError::Missing(part) => missing(part),
            error => part_error(error),
        })?;
        let saved = Saved { shape, state };
        let memory: u64 = header.slots.iter().fold(0, |sum, slot| sum.saturating_add(slot.frames().bytes()));
        if memory != saved.shape.memory {
            return Err(SnapshotError::Layout { path: path.to_owned(), memory: saved.shape.memory });
        }
        let end = end_of(&header);
        let image = ImageReader::open(&path.join(MEMORY), &path.join(SUMS), header.id, end, digests)?;
        Ok((Layer { path: path.to_owned(), header, ranges, image, parent }, saved))
    }

    /// The snapshot that it builds on, as it was given.
    pub fn parent(&self) -> Option<&Path> {
        self.parent.as_ref().map(|(_, path)| path.as_path())
    }

    /// Reads and checks all of `range`, which it has; what it says is zeros, too. In pieces of `buffer`.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn check(&self, range: PageRange, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        let mut at = range.start;
        while at < range.end() {
            let pages = (range.end().0 - at.0).min((buffer.len() / PAGE_BYTES) as u64);
            let piece = PageRange { start: at, pages };
            let contents = &mut buffer[..piece.bytes() as usize];
            self.image.read_raw(piece, contents)?;
            self.image.check(piece, contents)?;
            at = piece.end();
        }
        Ok(())
    }

    /// Whether it has `gfn`, and the frame up to which that is so.
    fn has(&self, gfn: Gfn) -> (bool, Gfn) {
        let at = self.ranges.partition_point(|range| range.end() <= gfn);
        match self.ranges.get(at) {
            Some(range) if range.contains(gfn) => (true, range.end()),
            Some(range) => (false, range.start),
            None => (false, Gfn(u64::MAX)),
        }
    }
}

impl Chain {
    /// Opens the snapshot at `path` and all that it builds on.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn open(path: &Path) -> Result<(Chain, Saved), SnapshotError> {
        let (newest, saved) = Layer::open(path)?;
        let mut layers = vec![newest];
        while let Some(child) = layers.last()
            && let Some((id, parent)) = &child.parent
        {
            if layers.len() == MOST_LAYERS || layers.iter().any(|layer| layer.header.id == *id) {
                return Err(SnapshotError::Endless(path.to_owned()));
            }
            let place = child.path.join(parent);
            // As people write it, where that is the same.
            let place = fs::canonicalize(&place).unwrap_or(place);
            let orphan = |source| SnapshotError::Parent {
                child: child.path.clone(),
                parent: place.clone(),
                source: Box::new(source),
            };
            let (layer, _) = Layer::open(&place).map_err(orphan)?;
            if layer.header.id != *id {
                let (child, expected) = (child.path.clone(), *id);
                let found = layer.header.id;
                return Err(SnapshotError::WrongParent { child, parent: place, expected, found });
            }
            if layer.header.slots != child.header.slots {
                return Err(orphan(SnapshotError::OtherMemory));
            }
            layers.push(layer);
        }
        let chain = Chain { layers };
        chain.check_base()?;
        Ok((chain, saved))
    }

    /// Whatever builds on nothing has all pages.
    fn check_base(&self) -> Result<(), SnapshotError> {
        let Some(base) = self.layers.last() else { return Ok(()) };
        let lacks = base.header.slots.iter().map(|slot| slot.frames()).any(|slot| {
            let mut at = slot.start;
            while at < slot.end() {
                match base.has(at) {
                    (true, end) => at = end,
                    (false, _) => return true,
                }
            }
            false
        });
        match lacks {
            true => {
                Err(SnapshotError::NotASnapshot { path: base.path.clone(), missing: "page of some".into() })
            }
            false => Ok(()),
        }
    }

    /// The snapshots, the newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The newest.
    pub fn newest(&self) -> &Layer {
        &self.layers[0]
    }

    /// The one that stands for itself.
    pub fn base(&self) -> &Layer {
        &self.layers[self.layers.len() - 1]
    }

    /// `range` in parts, each with the snapshot that has it.
    pub fn parts(&self, range: PageRange) -> impl Iterator<Item = (PageRange, &Layer)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let mut end = range.end();
            let mut found = self.base();
            for layer in &self.layers {
                let (has, until) = layer.has(at);
                end = end.min(until);
                if has {
                    found = layer;
                    break;
                }
            }
            let part = PageRange { start: at, pages: end.0 - at.0 };
            at = end;
            Some((part, found))
        })
    }

    /// Hands the pages of `range` that are not all zeros to `take`, checked, in pieces of `buffer` at most.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn filled(
        &self,
        range: PageRange,
        buffer: &mut [u8],
        mut take: impl FnMut(PageRange, &[u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let most = (buffer.len() / PAGE_BYTES).max(1) as u64;
        for (part, layer) in self.parts(range) {
            for run in layer.image.filled(part)? {
                let mut at = run.start;
                while at < run.end() {
                    let piece = PageRange { start: at, pages: most.min(run.end().0 - at.0) };
                    let contents = &mut buffer[..piece.bytes() as usize];
                    layer.image.read_raw(piece, contents)?;
                    layer.image.check(piece, contents)?;
                    take(piece, contents)?;
                    at = piece.end();
                }
            }
        }
        Ok(())
    }

    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<(), ImageError> {
        let mut rest = into;
        for (part, layer) in self.parts(range) {
            let (now, later) = rest.split_at_mut(part.bytes() as usize);
            layer.image.read(part, now)?;
            rest = later;
        }
        Ok(())
    }
}

impl PageSource for Chain {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.read(pages, into).map_err(io::Error::other)
    }

    fn filled(&self, pages: PageRange, take: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        for (part, layer) in self.parts(pages) {
            layer.image.filled(part).map_err(io::Error::other)?.into_iter().for_each(&mut *take);
        }
        Ok(())
    }
}
