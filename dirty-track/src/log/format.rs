//! The parts that streams are made of; the layout is in the [module's](super) documentation.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::tracker::Guarantees;

/// The first bytes of every stream. Not text, and damaged by anything that takes it for text.
pub const MAGIC: [u8; 8] = *b"\x89DTLOG\r\n";

/// Major and minor version of the format.
pub const VERSION: (u16, u16) = (1, 0);

/// Most bytes of a record's payload.
pub const MAX_PAYLOAD: usize = 2 << 20;

/// Most pages whose contents are in one record: 1 MiB.
pub const CHUNK_PAGES: usize = 256;

/// Flags of a range of pages.
pub mod flags {
    /// The tracker could not tell which pages of the range were written.
    pub const COARSE: u32 = 1;
    /// The host wrote it (a device).
    pub const HOST: u32 = 2;
    /// All that version 1.0 knows. Others are ignored.
    pub const ALL: u32 = COARSE | HOST;
}

pub(super) const PRELUDE: usize = 16;
/// Bytes of a record before its payload.
pub(super) const HEAD: usize = 24;
/// Bytes of a record of pages before the contents.
pub(super) const PAGES_HEAD: usize = 16;
/// Bytes of a record apart before its entries.
pub(super) const APART_HEAD: usize = 8;
pub(super) const ENTRY: usize = 16;
/// Kinds from here on may be passed over.
pub(super) const OPTIONAL: u8 = 128;

pub(super) mod kind {
    pub(crate) const HEADER: u8 = 1;
    pub(crate) const EPOCH: u8 = 2;
    pub(crate) const RANGES: u8 = 3;
    pub(crate) const VCPU: u8 = 4;
    pub(crate) const ZERO: u8 = 5;
    pub(crate) const PAGES: u8 = 6;
    pub(crate) const EPOCH_END: u8 = 7;
    pub(crate) const STATE: u8 = 8;
    pub(crate) const END: u8 = 9;
    pub(crate) const APART: u8 = 10;
}

/// What tells one stream from every other: 128 random bits. As text, 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StreamId(pub u128);

impl StreamId {
    /// Seed of the checksums.
    pub(crate) fn seed(self) -> u64 {
        self.0 as u64 ^ (self.0 >> 64) as u64
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for StreamId {
    type Err = String;

    fn from_str(text: &str) -> Result<StreamId, String> {
        let digits = text.len() == 32 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(id) if digits => Ok(StreamId(id)),
            _ => Err(format!("{text:?} is no stream id: 32 hexadecimal digits are")),
        }
    }
}

impl TryFrom<String> for StreamId {
    type Error = String;

    fn try_from(text: String) -> Result<StreamId, String> {
        text.parse()
    }
}

impl From<StreamId> for String {
    fn from(id: StreamId) -> String {
        id.to_string()
    }
}

/// A memslot that the log is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotInfo {
    /// Its number.
    pub id: u32,
    /// Its first frame.
    pub first: u64,
    /// Its pages.
    pub pages: u64,
}

impl SlotInfo {
    /// Its frames.
    pub fn frames(&self) -> PageRange {
        PageRange { start: Gfn(self.first), pages: self.pages }
    }
}

/// What a log is about, and how it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The stream's own id.
    pub id: StreamId,
    /// The stream whose end this one begins at, if it does not stand for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<StreamId>,
    /// Bytes of a page: 4096.
    pub page_size: u64,
    /// What of guest memory it is about, ascending and without overlaps.
    pub slots: Vec<SlotInfo>,
    /// Name of the tracker.
    pub tracker: String,
    /// What its reports can be relied on for.
    pub guarantees: Guarantees,
    /// Contents of the pages are in the log.
    pub contents: bool,
    /// All of these contents have checksums. Not so where the log goes over a channel that damages nothing: then they can
    /// go from memory to memory, looked at by nobody.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub checked: bool,
    /// What wrote it, for people.
    #[serde(default)]
    pub creator: String,
}

fn yes() -> bool {
    true
}

fn is_yes(checked: &bool) -> bool {
    *checked
}

impl Header {
    /// Why it makes no sense, if it does not.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.page_size != PAGE_BYTES as u64 {
            return Some("its pages are not of 4096 bytes");
        }
        let mut end = 0;
        for slot in &self.slots {
            // KVM knows no frame beyond 2^52 bytes of guest-physical addresses.
            let Some(slot_end) = slot.first.checked_add(slot.pages).filter(|end| *end <= 1 << 40) else {
                return Some("a memslot is beyond all addresses");
            };
            if slot.pages == 0 || slot.first < end {
                return Some("a memslot is empty, overlaps another one or is out of order");
            }
            end = slot_end;
        }
        None
    }

    /// Whether all of `range` is in one slot.
    pub fn has(&self, range: PageRange) -> bool {
        let at = self.slots.partition_point(|slot| slot.first <= range.start.0);
        let Some(slot) = at.checked_sub(1).map(|at| &self.slots[at]) else { return false };
        let offset = range.start.0 - slot.first;
        offset < slot.pages && range.pages <= slot.pages - offset
    }
}

/// Begins an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its number, from 0, without gaps.
    pub number: u64,
    /// When it ended, in nanoseconds since the log was begun.
    pub at_ns: u64,
    /// How long it lasted, in nanoseconds.
    pub took_ns: u64,
}

/// Ends an epoch: how much is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochEnd {
    /// Pages that were reported.
    pub dirty: u64,
    /// Pages whose contents are in it.
    pub pages: u64,
    /// Pages that it says are all zeros.
    pub zero: u64,
}

/// Ends a log: how much is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Epochs.
    pub epochs: u64,
    /// Sum of what was in them.
    pub total: EpochEnd,
    /// Parts of machine state.
    pub states: u64,
}

impl EpochEnd {
    pub(super) fn add(&mut self, other: &EpochEnd) {
        self.dirty += other.dirty;
        self.pages += other.pages;
        self.zero += other.zero;
    }
}

/// A range of pages with [`flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The pages.
    pub range: PageRange,
    /// What is known of them besides.
    pub flags: u32,
}

impl Span {
    pub(super) fn put(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.range.start.0.to_le_bytes());
        to.extend_from_slice(&(self.range.pages as u32).to_le_bytes());
        to.extend_from_slice(&self.flags.to_le_bytes());
    }

    /// Reads an entry of [`ENTRY`] bytes.
    pub(super) fn get(entry: &[u8]) -> Span {
        let range = PageRange { start: Gfn(u64_at(entry, 0)), pages: u32_at(entry, 8).into() };
        Span { range, flags: u32_at(entry, 12) }
    }
}

/// A record's head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) checksum: u64,
    pub(super) payload: usize,
    pub(super) kind: u8,
    pub(super) number: u64,
}

impl Head {
    /// Fills the head in front of a payload: `record` is both. The checksum is made of all the rest.
    pub(super) fn seal(record: &mut [u8], kind: u8, number: u64, seed: u64) {
        Head::seal_before(record, 0, kind, number, seed);
    }

    /// As [`seal`](Head::seal), with so many more bytes of payload to come that the checksum is not of.
    pub(super) fn seal_before(record: &mut [u8], more: usize, kind: u8, number: u64, seed: u64) {
        let payload = (record.len() - HEAD + more) as u32;
        record[8..12].copy_from_slice(&payload.to_le_bytes());
        record[12..16].copy_from_slice(&[kind, 0, 0, 0]);
        record[16..24].copy_from_slice(&number.to_le_bytes());
        let checksum = XxHash3_64::oneshot_with_seed(seed, &record[8..]);
        record[..8].copy_from_slice(&checksum.to_le_bytes());
    }

    pub(super) fn get(head: &[u8]) -> Head {
        Head {
            checksum: u64_at(head, 0),
            payload: u32_at(head, 8) as usize,
            kind: head[12],
            number: u64_at(head, 16),
        }
    }

    /// Whether `record`, head and payload, has the checksum that it says.
    pub(super) fn is_sound(&self, record: &[u8], seed: u64) -> bool {
        XxHash3_64::oneshot_with_seed(seed, &record[8..]) == self.checksum
    }
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}
