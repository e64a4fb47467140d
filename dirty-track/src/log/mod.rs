//! The dirty log as a stream of bytes: which pages were written in which epoch, with their contents if wanted.
//!
//! # Why
//! A dump, a chain of diff snapshots and a live migration say the same thing: *these pages were written, and this is
//! what is in them*. So they share one format, one writer and one reader that trusts nothing it reads.
//!
//! # Contract
//! - What a [`LogWriter`] wrote, a [`LogReader`] reads, whatever cuts the stream into pieces on the way.
//! - A stream that was truncated, damaged, reordered, spliced together from two, or made to hurt, is a [`ReadError`] at
//!   the first record that is wrong. A reader allocates no more than [`MAX_PAYLOAD`] and one [`CHUNK_PAGES`] chunk,
//!   whatever a stream says of itself.
//! - Replaying the epochs with contents onto an image of memory as it was when the log began ([`replay`]) gives
//!   memory as it was when the last epoch was copied, byte for byte.
//!
//! # Layout, version 1
//! Integers are little-endian. A stream is a prelude of 16 bytes: the magic number [`MAGIC`] (8), the format's major and
//! minor version (2, 2), zero (4); then records:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | checksum: XXH3-64 of all the rest of the record, seeded with the stream's id; with 0 for the header. Of a record apart, without the contents |
//! | 8..12 | bytes of the payload, at most [`MAX_PAYLOAD`] |
//! | 12 | the record's kind |
//! | 13..16 | zero |
//! | 16..24 | the record's number, from 0 |
//! | 24.. | payload |
//!
//! | kind | payload |
//! |---|---|
//! | 1 header | [`Header`] as JSON; first, and only there |
//! | 2 epoch | [`Epoch`] as JSON; begins an epoch |
//! | 3 ranges | pages that were written: entries of 16 bytes (first frame 8, pages 4, [`flags`] 4), ascending in an epoch |
//! | 4 vcpu | of these, what one vCPU wrote: its number (4), zero (4), entries as above |
//! | 5 zero | pages that are all zeros now: entries as above |
//! | 6 pages | first frame (8), pages (4), encoding (1: 0 as it is, 1 LZ4, 2 Zstandard), zero (3), the contents |
//! | 7 epoch's end | [`EpochEnd`] as JSON: how much there was, so that nothing can be missing |
//! | 8 state | length of a name (2), the name, bytes: a part of the machine's state; after the epochs |
//! | 9 end | [`End`] as JSON; last |
//! | 10 apart | number of entries (4), zero (4), entries as above with at most [`CHUNK_PAGES`] pages in all, the contents of these pages as they are; where the header allows it |
//!
//! **Versions.** A reader refuses another major version. Within one, a later minor version may add fields to the JSON
//! and kinds of records from 128 on, which a reader that does not know them passes over. Kinds below 128 that it does not
//! know are an error: without them the log would say something else.
//!
//! A record's checksum is seeded with the stream's id, and records are numbered: so none can be left out, repeated, moved,
//! or taken from another stream. That is protection against accidents; whoever has to fear an adversary who *makes* a
//! valid stream needs an authenticated channel besides. For memory safety no stream is trusted at all.
//!
//! **Contents apart.** A log that goes from one machine's memory into another's can go without its contents being copied or
//! looked at on the way: [`EpochWriter::pages_apart`] writes a record's heads and lets the caller write the contents, and
//! a reader that is told of such a record ([`Event::Ahead`]) can read the contents itself ([`LogReader::contents`]). The
//! log says in its header that contents are not [`checked`](Header::checked).

mod codec;
mod error;
mod format;
mod read;
mod replay;
mod write;

pub use codec::Compression;
pub use error::{ReadError, ReplayError, WriteError};
pub use format::{
    CHUNK_PAGES, End, Epoch, EpochEnd, Header, MAGIC, MAX_PAYLOAD, SlotInfo, Span, StreamId, VERSION, flags,
};
pub use read::{Event, LogReader};
pub use replay::{Image, replay};
pub use write::{EpochWriter, LogWriter};

#[cfg(test)]
mod tests;
