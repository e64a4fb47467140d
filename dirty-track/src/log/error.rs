//! What can go wrong with a log.

use std::io;

use crate::addr::PageRange;

/// Why a log could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The output.
    #[error("cannot write the log: {0}")]
    Io(#[from] io::Error),
    /// Guest memory.
    #[error("cannot read the guest pages {range} (first frame and number) for the log: {source}")]
    Memory {
        /// The pages.
        range: PageRange,
        /// Why.
        source: io::Error,
    },
    /// A header that no reader would accept.
    #[error("a log with this header cannot be written: {0}")]
    Header(&'static str),
    /// A range that is in no slot of the header.
    #[error("the pages {0} (first frame and number) are in no memslot of the log")]
    OutsideSlots(PageRange),
    /// An epoch was begun and not finished.
    #[error("an epoch of the log was begun and not finished: the log is of no use any more")]
    Unfinished,
    /// Contents apart, in a log whose checksums are of them.
    #[error("this log checks the contents of its pages: they cannot be written apart")]
    Checked,
    /// More than a record can hold.
    #[error("{what} of {bytes} bytes is more than a record of the log can hold")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
}

/// Why a log could not be read. Nothing after the place where it happened was looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The input.
    #[error("cannot read the log: {0}")]
    Io(#[source] io::Error),
    /// It is something else.
    #[error("this is not a dirty log: it does not begin like one")]
    NotALog,
    /// It has another version.
    #[error(
        "this log has format version {0}.{1}, and this program reads 1.x: use the program that wrote it, or a newer one"
    )]
    Version(u16, u16),
    /// It ends too early.
    #[error("the log ends in the middle, after {at} bytes: it was cut off, or its writer was")]
    Truncated {
        /// Bytes that were read.
        at: u64,
    },
    /// A record says of itself that it is longer than any is.
    #[error(
        "record {record} at byte {at} claims {bytes} bytes, more than any record has: the log is damaged"
    )]
    TooLong {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
        /// What it claims.
        bytes: usize,
    },
    /// A checksum is wrong.
    #[error("record {record} at byte {at} is damaged or belongs to another log: its checksum is wrong")]
    Damaged {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
    },
    /// A record is not the next one.
    #[error(
        "record {expected} at byte {at} calls itself number {found}: records are missing, repeated or out of order"
    )]
    Order {
        /// The number that is due.
        expected: u64,
        /// The number that it has.
        found: u64,
        /// Where it begins.
        at: u64,
    },
    /// A record with a valid checksum that makes no sense.
    #[error("record {record} at byte {at} makes no sense: {why}")]
    Senseless {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// JSON that is none, or lacks something.
    #[error("record {record} at byte {at} cannot be understood: {source}")]
    Json {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A kind of record that has to be understood and is not known.
    #[error(
        "record {record} at byte {at} is of kind {kind}, which this program does not know: a newer one may"
    )]
    Unknown {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
        /// Its kind.
        kind: u8,
    },
    /// Pages that the header does not have.
    #[error(
        "record {record} at byte {at} is about the pages {range} (first frame and number), which are in no memslot"
    )]
    OutsideSlots {
        /// Number of the record.
        record: u64,
        /// Where it begins.
        at: u64,
        /// The pages.
        range: PageRange,
    },
}

/// Why a log could not be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The log.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The image.
    #[error("cannot write the pages {range} (first frame and number) to the image: {source}")]
    Image {
        /// The pages.
        range: PageRange,
        /// Why.
        source: io::Error,
    },
    /// A log without contents.
    #[error("the log has no contents of pages: write it with contents (--pages) to replay it")]
    NoContents,
}
