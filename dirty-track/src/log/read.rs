//! Reading a log.

use std::io::{self, Read};

use serde::de::DeserializeOwned;

use crate::addr::{Gfn, PAGE_BYTES, PageRange};
use crate::log::codec::{AS_IT_IS, Decoder};
use crate::log::format::{
    APART_HEAD, ENTRY, HEAD, Head, OPTIONAL, PAGES_HEAD, PRELUDE, kind, u16_at, u32_at, u64_at,
};
use crate::log::{CHUNK_PAGES, End, Epoch, EpochEnd, Header, MAGIC, MAX_PAYLOAD, ReadError, Span, VERSION};

const WRONG_COUNT: &str = "it has no pages, or more than a record may";
const OTHER_CONTENTS: &str = "its contents are not those of so many pages";

/// Reads a log from anything that gives bytes, record by record. It reads no further than the log's end.
#[derive(Debug)]
pub struct LogReader<R> {
    records: Records<R>,
    header: Header,
    chunk: Vec<u8>,
    spans: Vec<Span>,
    decoder: Decoder,
    phase: Phase,
    epoch: EpochEnd,
    /// Where the next range of the epoch may begin.
    next: Gfn,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Epochs,
    Epoch,
    States,
    Done,
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// An epoch begins.
    Epoch(Epoch),
    /// These pages were written.
    Ranges(&'a [Span]),
    /// Of these, what one vCPU wrote.
    Vcpu(u32, &'a [Span]),
    /// These pages are all zeros.
    Zero(&'a [Span]),
    /// This is in these pages.
    Pages(PageRange, &'a [u8]),
    /// What is in these pages comes next: [`LogReader::contents`] takes it. Pages of whole ranges, in this order.
    Ahead(&'a [Span]),
    /// The epoch ends.
    EpochEnd(EpochEnd),
    /// A part of the machine's state.
    State {
        /// Its name.
        name: &'a str,
        /// What it is.
        bytes: &'a [u8],
    },
    /// The log ends.
    End(End),
}

impl<R: Read> LogReader<R> {
    /// Begins to read a log.
    ///
    /// # Errors
    /// What the input says, and what is wrong with the log's beginning.
    pub fn new(mut input: R) -> Result<LogReader<R>, ReadError> {
        let mut prelude = [0; PRELUDE];
        let mut at = 0;
        fill(&mut input, &mut prelude, &mut at).map_err(|error| match error {
            ReadError::Truncated { .. } => ReadError::NotALog,
            error => error,
        })?;
        if prelude[..8] != MAGIC {
            return Err(ReadError::NotALog);
        }
        let (major, minor) = (u16_at(&prelude, 8), u16_at(&prelude, 10));
        if major != VERSION.0 {
            return Err(ReadError::Version(major, minor));
        }
        let mut records = Records { input, seed: 0, number: 0, at, record: Vec::new(), ahead: 0 };
        if records.fetch()? != kind::HEADER {
            return Err(records.senseless("a log begins with its header"));
        }
        let header: Header = records.json()?;
        if let Some(fault) = header.fault() {
            return Err(records.senseless(fault));
        }
        records.seed = header.id.seed();
        Ok(LogReader {
            records,
            header,
            chunk: Vec::new(),
            spans: Vec::new(),
            decoder: Decoder::new(),
            phase: Phase::Epochs,
            epoch: EpochEnd::default(),
            next: Gfn(0),
            end: End::default(),
        })
    }

    /// What the log is about.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the log that were read.
    pub fn bytes_read(&self) -> u64 {
        self.records.at
    }

    /// Reads the next record; `None` after the last.
    ///
    /// # Errors
    /// What the input says, and what is wrong with the record: no other one should be read then.
    pub fn read(&mut self) -> Result<Option<Event<'_>>, ReadError> {
        loop {
            if self.phase == Phase::Done {
                return Ok(None);
            }
            let kind = self.records.fetch()?;
            if kind < OPTIONAL {
                return self.understand(kind).map(Some);
            }
        }
    }

    /// Has `take` read the contents that are ahead, those of the pages that it is told and nothing else, from the input that
    /// it is given. What is not taken before the next record is read is passed over.
    ///
    /// # Errors
    /// What `take` says.
    pub fn contents(
        &mut self,
        take: impl FnOnce(&mut R, &[Span]) -> io::Result<()>,
    ) -> Result<(), ReadError> {
        let records = &mut self.records;
        if records.ahead == 0 {
            return Ok(());
        }
        take(&mut records.input, &self.spans).map_err(ReadError::Io)?;
        records.at += std::mem::take(&mut records.ahead) as u64;
        Ok(())
    }

    /// Gives the input back, which may go on after the log.
    pub fn into_input(self) -> R {
        self.records.input
    }

    fn understand(&mut self, kind: u8) -> Result<Event<'_>, ReadError> {
        use Phase::{Done, Epochs, States};
        let payload = self.records.payload().len();
        match (self.phase, kind) {
            (Epochs, kind::EPOCH) => {
                let epoch: Epoch = self.records.json()?;
                if epoch.number != self.end.epochs {
                    return Err(self.records.senseless("its epoch is not the next one"));
                }
                (self.phase, self.epoch, self.next) = (Phase::Epoch, EpochEnd::default(), Gfn(0));
                Ok(Event::Epoch(epoch))
            }
            (Phase::Epoch, kind::RANGES) => {
                self.epoch.dirty += self.get_spans(0, payload)?;
                for span in &self.spans {
                    if span.range.start < self.next {
                        return Err(self.records.senseless("its ranges overlap or are out of order"));
                    }
                    self.next = span.range.end();
                }
                Ok(Event::Ranges(&self.spans))
            }
            (Phase::Epoch, kind::VCPU) if payload >= 8 => {
                self.get_spans(8, payload)?;
                Ok(Event::Vcpu(u32_at(self.records.payload(), 0), &self.spans))
            }
            (Phase::Epoch, kind::ZERO) => {
                self.epoch.zero += self.get_spans(0, payload)?;
                Ok(Event::Zero(&self.spans))
            }
            (Phase::Epoch, kind::PAGES) if payload >= PAGES_HEAD => self.get_pages(),
            (Phase::Epoch, kind::APART) if payload >= APART_HEAD && !self.header.checked => {
                let pages = self.get_spans(APART_HEAD, payload)?;
                if pages == 0 || pages > CHUNK_PAGES as u64 {
                    return Err(self.records.senseless(WRONG_COUNT));
                }
                if self.records.ahead != pages as usize * PAGE_BYTES {
                    return Err(self.records.senseless(OTHER_CONTENTS));
                }
                self.epoch.pages += pages;
                Ok(Event::Ahead(&self.spans))
            }
            (Phase::Epoch, kind::EPOCH_END) => {
                let end: EpochEnd = self.records.json()?;
                if end != self.epoch {
                    return Err(self.records.senseless("its epoch had another number of pages"));
                }
                self.phase = Epochs;
                self.end.epochs += 1;
                self.end.total.add(&end);
                Ok(Event::EpochEnd(end))
            }
            (Epochs | States, kind::STATE) if payload >= 2 => {
                self.phase = States;
                self.end.states += 1;
                let (name, bytes) = self.records.payload()[2..]
                    .split_at_checked(u16_at(self.records.payload(), 0).into())
                    .ok_or_else(|| self.records.senseless("the name is longer than the record"))?;
                let name = str::from_utf8(name).map_err(|_| self.records.senseless("the name is no text"))?;
                Ok(Event::State { name, bytes })
            }
            (Epochs | States, kind::END) => {
                let end: End = self.records.json()?;
                if end != self.end {
                    return Err(self.records.senseless("the log had another number of epochs or pages"));
                }
                self.phase = Done;
                Ok(Event::End(end))
            }
            (_, 0 | 11..) => {
                let (record, at) = self.records.place();
                Err(ReadError::Unknown { record, at, kind })
            }
            (_, kind::VCPU | kind::PAGES | kind::STATE | kind::APART)
                if self.phase != Done && payload < PAGES_HEAD =>
            {
                Err(self.records.senseless("it is too short, or not where it belongs"))
            }
            _ => Err(self.records.senseless("it is not where a record of its kind can be")),
        }
    }

    fn get_pages(&mut self) -> Result<Event<'_>, ReadError> {
        let (head, contents) = self.records.payload().split_at(PAGES_HEAD);
        let range = PageRange { start: Gfn(u64_at(head, 0)), pages: u32_at(head, 8).into() };
        if range.pages == 0 || range.pages > CHUNK_PAGES as u64 {
            return Err(self.records.senseless(WRONG_COUNT));
        }
        if !self.header.has(range) {
            let (record, at) = self.records.place();
            return Err(ReadError::OutsideSlots { record, at, range });
        }
        let bytes = range.pages as usize * PAGE_BYTES;
        self.epoch.pages += range.pages;
        if head[12] == AS_IT_IS {
            if contents.len() != bytes {
                return Err(self.records.senseless(OTHER_CONTENTS));
            }
            return Ok(Event::Pages(range, contents));
        }
        self.chunk.resize(bytes, 0);
        if let Err(why) = self.decoder.decode(head[12], contents, &mut self.chunk) {
            return Err(self.records.senseless(why));
        }
        Ok(Event::Pages(range, &self.chunk))
    }

    /// Reads the entries in the payload from byte `start` to `end`, and returns how many pages they have.
    fn get_spans(&mut self, start: usize, end: usize) -> Result<u64, ReadError> {
        let entries = &self.records.payload()[start..end];
        if !entries.len().is_multiple_of(ENTRY) {
            return Err(self.records.senseless("it has a part of an entry"));
        }
        self.spans.clear();
        self.spans.extend(entries.chunks_exact(ENTRY).map(Span::get));
        let mut pages = 0;
        for &Span { range, .. } in &self.spans {
            if range.pages == 0 || !self.header.has(range) {
                let (record, at) = self.records.place();
                return Err(ReadError::OutsideSlots { record, at, range });
            }
            pages += range.pages;
        }
        Ok(pages)
    }
}

/// The records, whatever they say.
#[derive(Debug)]
struct Records<R> {
    input: R,
    seed: u64,
    /// Of the next one.
    number: u64,
    /// Bytes that were read.
    at: u64,
    /// The one that was read last, head and payload.
    record: Vec<u8>,
    /// So many bytes of contents, of the last record, have not been read.
    ahead: usize,
}

impl<R: Read> Records<R> {
    /// Reads a whole record, checks that it is the next one, and returns its kind.
    fn fetch(&mut self) -> Result<u8, ReadError> {
        let ahead = std::mem::take(&mut self.ahead);
        self.more(ahead)?;
        let (at, record) = (self.at, self.number);
        self.record.resize(HEAD, 0);
        fill(&mut self.input, &mut self.record, &mut self.at)?;
        let head = Head::get(&self.record);
        if head.payload > MAX_PAYLOAD {
            return Err(ReadError::TooLong { record, at, bytes: head.payload });
        }
        if head.kind == kind::APART && head.payload >= APART_HEAD {
            self.more(APART_HEAD)?;
            let entries = u32_at(self.payload(), 0) as usize;
            self.ahead = (head.payload - APART_HEAD).saturating_sub(entries.saturating_mul(ENTRY));
        }
        self.more(head.payload - self.payload().len() - self.ahead)?;
        if !head.is_sound(&self.record, self.seed) {
            return Err(ReadError::Damaged { record, at });
        }
        if head.number != record {
            return Err(ReadError::Order { expected: record, found: head.number, at });
        }
        self.number += 1;
        if self.record[13..16] != [0; 3] {
            return Err(self.senseless("its head has something where zeros belong"));
        }
        Ok(head.kind)
    }

    /// Reads so many bytes more of the record.
    fn more(&mut self, bytes: usize) -> Result<(), ReadError> {
        let start = self.record.len();
        self.record.resize(start + bytes, 0);
        fill(&mut self.input, &mut self.record[start..], &mut self.at)
    }

    fn payload(&self) -> &[u8] {
        &self.record[HEAD..]
    }

    fn json<T: DeserializeOwned>(&self) -> Result<T, ReadError> {
        serde_json::from_slice(self.payload()).map_err(|source| {
            let (record, at) = self.place();
            ReadError::Json { record, at, source }
        })
    }

    /// Number and place of the record that was just fetched.
    fn place(&self) -> (u64, u64) {
        (self.number - 1, self.at - self.record.len() as u64)
    }

    fn senseless(&self, why: &'static str) -> ReadError {
        let (record, at) = self.place();
        ReadError::Senseless { record, at, why }
    }
}

/// Fills `to`; an input that ends before is cut off.
fn fill(input: &mut impl Read, to: &mut [u8], at: &mut u64) -> Result<(), ReadError> {
    let mut filled = 0;
    while filled < to.len() {
        match input.read(&mut to[filled..]) {
            Ok(0) => return Err(ReadError::Truncated { at: *at }),
            Ok(bytes) => {
                filled += bytes;
                *at += bytes as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Io(error)),
        }
    }
    Ok(())
}
