//! Snapshots: a machine in a directory, to go on from.
//!
//! | file | what |
//! |---|---|
//! | `state` | a dirty log without contents: one epoch, whose ranges are the pages that the snapshot has; then the machine's state, what the snapshot builds on, and the digests of the image |
//! | `memory`, `sums` | the [image](dirty_track::image) of these pages |
//!
//! A *full* snapshot has all pages. A *diff* has those that were written since another one, its *parent*, which it names by
//! id and path; a [chain](Chain) of them is one memory. The pages are those of the moment at which the state was taken,
//! while the guest stood still ([`take`] says how that is a short one).
//!
//! A snapshot comes from outside. Whatever is wrong with it, no guest is started with a part of it: everything but the
//! contents of pages is checked before there is a machine, and each page when it is read. A page that turns out to be wrong
//! while the guest runs already is never given to it: the machine ends.

mod chain;
mod directory;
mod restore;
mod take;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Layer, Saved};
pub use restore::{Mode, Restore, Restored, open};
pub(crate) use take::take;
pub use take::{Base, Method, Request, SnapshotReport, merge};

use std::io;
use std::path::PathBuf;

use dirty_track::image::ImageError;
use dirty_track::log::{ReadError, StreamId, WriteError};
use serde::{Deserialize, Serialize};

use crate::cpuid::CpuidError;
use crate::devices::virtio::disk::DiskConfig;
use crate::dump::DumpError;
use crate::live::LiveError;
use crate::memory::MemoryError;
use crate::state::StateError;
use crate::state::parts::PartsError;

/// What a machine is made of, as far as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Disks, in the order of their devices.
    pub disks: Vec<DiskConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// The built-in guest runs in it.
    pub builtin: bool,
}

/// Why there is no snapshot, or none to go on from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or directory.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else is where the snapshot is to be.
    #[error("{} is there, and it is no snapshot: remove it, or give another path", .0.display())]
    Occupied(PathBuf),
    /// Two at a time.
    #[error("another snapshot is being written to {}", .0.display())]
    Busy(PathBuf),
    /// What a diff builds on may not be replaced by it.
    #[error("{} is what the diff would build on: give another path", .0.display())]
    Ancestor(PathBuf),
    /// No diff can be had.
    #[error("there is nothing that a diff could build on: {0}; take a full snapshot first")]
    NoBase(String),
    /// Neither way of taking one can be had.
    #[error(
        "nothing is tracked, and the guest's writes cannot be held up meanwhile ({0}): start a tracker first"
    )]
    NoMethod(String),
    /// A file, and no directory.
    #[error("{} is no snapshot: that is a directory", .0.display())]
    File(PathBuf),
    /// The file is no whole log.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ReadError,
    },
    /// Something is missing.
    #[error("{} is no snapshot: it has no {missing}", path.display())]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
        /// What it lacks.
        missing: String,
    },
    /// The machine's state makes no sense, or is not all there.
    #[error("the snapshot {} cannot be used: {source}", path.display())]
    Parts {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: PartsError,
    },
    /// Memory of another layout.
    #[error("the snapshot {} has other memslots than this program makes for {memory} bytes of memory", path.display())]
    Layout {
        /// The directory.
        path: PathBuf,
        /// Bytes of memory.
        memory: u64,
    },
    /// What a diff builds on cannot be used.
    #[error("the snapshot {} builds on {}, which cannot be used: {source}", child.display(), parent.display())]
    Parent {
        /// The diff.
        child: PathBuf,
        /// What it builds on.
        parent: PathBuf,
        /// Why not.
        source: Box<SnapshotError>,
    },
    /// It is of another memory.
    #[error("it is of a machine with other memory")]
    OtherMemory,
    /// Another snapshot is where the parent was.
    #[error(
        "the snapshot {} builds on {expected}, and at {} there is {found}: what it builds on was replaced",
        child.display(), parent.display()
    )]
    WrongParent {
        /// The diff.
        child: PathBuf,
        /// Where its parent was.
        parent: PathBuf,
        /// The parent's id.
        expected: StreamId,
        /// What is there.
        found: StreamId,
    },
    /// A chain without an end.
    #[error("the snapshot {} builds on a chain that comes back to itself, or has no end", .0.display())]
    Endless(PathBuf),
    /// Only a full snapshot's file is all of memory.
    #[error(
        "memory cannot be mapped from {} that is not private and on small pages: leave huge= and shared= out", .0.display()
    )]
    Mapped(PathBuf),
    /// Contents.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Writing it.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// An id.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The last epoch.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// Guest memory.
    #[error("cannot read or write guest memory: {0}")]
    Guest(#[from] vm_memory::GuestMemoryError),
    /// Another processor.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Holding up writes.
    #[error(transparent)]
    Cow(#[from] dirty_track::cow::CowError),
}

impl SnapshotError {
    /// Whether nothing broke: it was asked for what cannot be.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            SnapshotError::Occupied(_)
                | SnapshotError::Busy(_)
                | SnapshotError::Ancestor(_)
                | SnapshotError::NoBase(_)
                | SnapshotError::NoMethod(_)
        )
    }
}

/// Names of the parts of the state.
const SHAPE: &str = "shape";
/// Of the image.
const DIGESTS: &str = "digests";
/// Path of what a diff builds on, as seen from the diff's directory where both are absolute.
const PARENT: &str = "parent";
