//! Live migration: a running machine moves to another process.
//!
//! # Contract
//! - Exactly one side owns the guest at every moment. The source gives it away by one note (`go`), after the destination
//!   has said that it has all it needs; whatever fails before that note, the guest goes on at the source, and the
//!   destination has not run it; after it, the source does not run it again by itself.
//! - What the destination runs is what the source had when the guest stood still, byte for byte.
//! - Nothing that comes over a connection is trusted.
//!
//! # Protocol, version 1
//! A migration is 1 to 64 connections from the source to the destination. On each, the source says `hello`: the
//! protocol's version, the migration's id, which connection it is, and what the machine is made of. The destination makes
//! a machine of that, and says `welcome`, or `refused` and why. Then each connection carries a dirty log
//! ([`dirty_track::log`]) with the migration's id and contents that are not checked: a channel that damages nothing is
//! the user's business (a Unix socket; TCP, with TLS where others can touch it). A page always takes the same connection
//! (the number of its block modulo theirs), so what was sent later arrives later. The machine's state is in the first
//! connection's log, behind its epochs.
//!
//! ```text
//!   source                                                    destination
//!     |  hello (each connection)                                   |  waits
//!     |----------------------------------------------------------->|
//!     |                                                 welcome    |  makes the machine
//!     |<-----------------------------------------------------------|
//!     |  epochs: all of memory                                     |
//!     |----------------------------------------------------------->|  writes it
//!     |  more epochs: what was written meanwhile                   |
//!     |----------------------------------------------------------->|
//!  stops the guest                                                 |
//!     |  last epoch, state, end                                    |
//!     |----------------------------------------------------------->|  checks the state, gives it to the machine
//!     |                                                   ready    |
//!     |<-----------------------------------------------------------|
//!     |  go                                                        |
//!     |===========================================================>|  owns the guest, and starts it
//!     |                                                 running    |
//!     |<-----------------------------------------------------------|
//!   ends                                                           |
//! ```
//!
//! Over TCP, TLS ([`tls`]) can be below all that. Notes are read by [`note`]; their layout is there. Either side breaks a migration off by closing its connections.

mod address;
pub mod client;
pub(crate) mod destination;
pub(crate) mod drive;
pub(crate) mod lane;
pub mod note;
mod postcopy;
pub mod report;
mod rounds;
pub(crate) mod source;
mod spans;
pub mod tls;

pub use address::Address;
pub use source::{MAX_CONNECTIONS, MigrateConfig};

use std::io;

use dirty_track::log::{ReadError, WriteError};

use crate::devices::virtio::disk::DiskConfig;
use crate::state::parts::PartsError;
use note::NoteError;

/// Why a migration did not come about.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Nobody is there.
    #[error(
        "cannot connect to {to}: {source}; is `vmm run --incoming {to}{}` waiting there?",
        if *.tls { " --tls-dir DIR" } else { "" }
    )]
    Connect {
        /// Where.
        to: String,
        /// With TLS.
        tls: bool,
        /// What the system said.
        source: io::Error,
    },
    /// The address cannot be had.
    #[error("cannot wait for a machine at {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// What the system said.
        source: io::Error,
    },
    /// What the two sides say to each other.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// What is sent.
    #[error("{0}")]
    Write(#[from] WriteError),
    /// What comes.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The machine's state.
    #[error(transparent)]
    Parts(#[from] PartsError),
    /// A log of something else.
    #[error("what came is another migration's, or of a machine with another memory")]
    OtherLog,
    /// Disks that the destination was not given.
    #[error("the machine has other disks than were given here with --disk: {}", listed(.theirs))]
    Disks {
        /// What it has at its source.
        theirs: Vec<DiskConfig>,
    },
    /// Memory that cannot be had page by page.
    #[error(
        "the source may switch to postcopy: that needs --memory fault=uffd at the destination, private and without \
         hugetlb"
    )]
    NoPostcopy,
    /// The machine.
    #[error("{0}")]
    Machine(String),
    /// Somebody wanted it to end.
    #[error("it was cancelled")]
    Cancelled,
    /// It would never end.
    #[error(
        "the guest writes faster than can be sent: allow a longer --downtime, or --auto-converge, or --postcopy"
    )]
    Diverges,
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// A system resource.
    #[error("cannot migrate: {0}")]
    System(#[source] io::Error),
}

fn listed(disks: &[DiskConfig]) -> String {
    if disks.is_empty() {
        return "none".into();
    }
    let one = |disk: &DiskConfig| {
        format!("path={}{}", disk.path.display(), if disk.readonly { ",readonly=on" } else { "" })
    };
    disks.iter().map(one).collect::<Vec<_>>().join(" and ")
}
