//! What can go wrong when faults are served.

use std::io;

use vmm_sys_util::errno;

use crate::addr::{Gfn, PageRange};
use crate::stage2::{NoMemory, Stage2Error};
use crate::sys::uffd::UffdError;
use crate::tracker::TrackerError;

/// Why faults cannot be served, or one could not be at once.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// No userfaultfd that can do it.
    #[error(transparent)]
    Userfaultfd(#[from] UffdError),
    /// The slots cannot be looked up.
    #[error(transparent)]
    Slots(#[from] TrackerError),
    /// The slots cannot be recorded.
    #[error(transparent)]
    Stage2(#[from] Stage2Error),
    /// No memory for the record.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
    /// A slot and its source do not go together.
    #[error("the faults of memory slot {id} cannot be served: {why}")]
    Slot {
        /// Number of the slot.
        id: u32,
        /// Why.
        why: &'static str,
    },
    /// A configuration that cannot be.
    #[error("faults cannot be served like that: {0}")]
    Config(&'static str),
    /// The slot could not be registered or unregistered.
    #[error(
        "cannot register or unregister memory slot {id} for its faults: {source}; is another userfaultfd in use on \
         it, or something else mapped there?"
    )]
    Register {
        /// Number of the slot.
        id: u32,
        /// What the kernel said.
        source: errno::Error,
    },
    /// No thread.
    #[error("cannot start a handler of faults: {0}")]
    Handler(io::Error),
    /// Faults cannot be read.
    #[error("cannot read from the userfaultfd: {0}")]
    Read(io::Error),
    /// Contents cannot be had.
    #[error("cannot fetch the contents of page {gfn:#x}, at which the guest waits: {source}; it is tried again", gfn = gfn.0)]
    Fetch {
        /// The page that is missing.
        gfn: Gfn,
        /// What the source said.
        source: io::Error,
    },
    /// A page cannot be installed or opened.
    #[error("cannot give the guest page {gfn:#x}, at which it waits: {source}; it is tried again", gfn = gfn.0)]
    Install {
        /// The page.
        gfn: Gfn,
        /// What the kernel said.
        source: errno::Error,
    },
    /// Dirty pages cannot be protected.
    #[error("cannot write-protect pages {range}: {source}; they are dirty still, harvest again")]
    Protect {
        /// The pages.
        range: PageRange,
        /// What the kernel said.
        source: errno::Error,
    },
    /// It cannot be seen how pages are mapped.
    #[error(
        "cannot look how pages {range} are mapped: {source}; PAGEMAP_SCAN (Linux 6.7) and /proc are needed"
    )]
    Look {
        /// The pages.
        range: PageRange,
        /// What the kernel said.
        source: errno::Error,
    },
    /// The process's page tables cannot be looked at.
    #[error("cannot open /proc/self/pagemap: {0}: is /proc mounted?")]
    Pagemap(io::Error),
    /// Guest memory was moved to other addresses.
    #[error("{start:#x}..{end:#x} was moved elsewhere by mremap while the guest had it")]
    Moved {
        /// The first address.
        start: u64,
        /// The address after the last.
        end: u64,
    },
    /// A source panicked.
    #[error("a handler of faults panicked: {0:?}; it goes on")]
    Panicked(String),
}
