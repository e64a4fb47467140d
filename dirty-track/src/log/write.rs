//! Writing a log.

use std::io::{self, Write};

use serde::Serialize;

use crate::addr::{Gfn, Gpa, PAGE_BYTES, PageRange};
use crate::image::is_zero;
use crate::log::codec::{AS_IT_IS, Compression, Encoder};
use crate::log::format::{APART_HEAD, HEAD, Head, PAGES_HEAD, PRELUDE, kind};
use crate::log::{CHUNK_PAGES, End, Epoch, EpochEnd, Header, MAGIC, MAX_PAYLOAD, Span, VERSION, WriteError};

/// Entries in a record of ranges.
const SPANS: usize = 1 << 15;

/// Pages that are copied at once: what stays in a processor's own cache from copying to checking to writing.
const COPY_PAGES: usize = 64;
const _: () = assert!(COPY_PAGES <= CHUNK_PAGES);

/// Room for the heads of the first page's record.
const ROOM: usize = PAGE_BYTES;
const _: () = assert!(HEAD + PAGES_HEAD <= ROOM);

/// Writes a log to anything that takes bytes. It does not buffer: one record with pages is one write.
#[derive(Debug)]
pub struct LogWriter<W> {
    out: W,
    header: Header,
    seed: u64,
    number: u64,
    record: Vec<u8>,
    /// [`ROOM`], then pages as they were copied.
    chunk: Vec<u8>,
    spans: Vec<Span>,
    encoder: Encoder,
    /// What has been written of the epoch that is open.
    open: Option<EpochEnd>,
    end: End,
}

/// Writes one epoch. Without [`finish`](EpochWriter::finish) the log cannot be finished.
#[derive(Debug)]
pub struct EpochWriter<'a, W>(&'a mut LogWriter<W>);

impl<W: Write> LogWriter<W> {
    /// Begins a log.
    ///
    /// # Errors
    /// [`WriteError::Header`] for one that a reader would refuse, and what the output says.
    pub fn new(mut out: W, header: Header, compression: Compression) -> Result<LogWriter<W>, WriteError> {
        if let Some(fault) = header.fault() {
            return Err(WriteError::Header(fault));
        }
        let mut prelude = [0; PRELUDE];
        prelude[..8].copy_from_slice(&MAGIC);
        prelude[8..10].copy_from_slice(&VERSION.0.to_le_bytes());
        prelude[10..12].copy_from_slice(&VERSION.1.to_le_bytes());
        out.write_all(&prelude)?;
        let mut log = LogWriter {
            out,
            seed: 0,
            number: 0,
            record: Vec::new(),
            chunk: Vec::new(),
            spans: Vec::new(),
            encoder: Encoder::new(compression)?,
            open: None,
            end: End::default(),
            header,
        };
        let header = log.header.clone();
        log.json(kind::HEADER, &header)?;
        log.seed = header.id.seed();
        Ok(log)
    }

    /// What the log is about.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it goes.
    pub fn out(&self) -> &W {
        &self.out
    }

    /// How much has been written.
    pub fn so_far(&self) -> End {
        self.end
    }

    /// Begins the next epoch, which ended `at_ns` nanoseconds after the log was begun and lasted `took_ns`.
    ///
    /// # Errors
    /// What the output says, and [`WriteError::Unfinished`].
    pub fn epoch(&mut self, at_ns: u64, took_ns: u64) -> Result<EpochWriter<'_, W>, WriteError> {
        self.closed()?;
        self.json(kind::EPOCH, &Epoch { number: self.end.epochs, at_ns, took_ns })?;
        self.open = Some(EpochEnd::default());
        Ok(EpochWriter(self))
    }

    /// Writes a part of the machine's state. No epoch may come after it.
    ///
    /// # Errors
    /// What the output says, [`WriteError::TooLong`] and [`WriteError::Unfinished`].
    pub fn state(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.closed()?;
        let too_long = |what, bytes| WriteError::TooLong { what, bytes };
        let len = u16::try_from(name.len()).map_err(|_| too_long("the name of a state", name.len()))?;
        if 2 + name.len() + bytes.len() > MAX_PAYLOAD {
            return Err(too_long("a part of the machine's state", bytes.len()));
        }
        self.begin();
        self.record.extend_from_slice(&len.to_le_bytes());
        self.record.extend_from_slice(name.as_bytes());
        self.record.extend_from_slice(bytes);
        self.put(kind::STATE)?;
        self.end.states += 1;
        Ok(())
    }

    /// Ends the log, flushes the output and gives it back.
    ///
    /// # Errors
    /// What the output says, and [`WriteError::Unfinished`].
    pub fn finish(mut self) -> Result<(W, End), WriteError> {
        self.closed()?;
        let end = self.end;
        self.json(kind::END, &end)?;
        self.out.flush()?;
        Ok((self.out, end))
    }

    /// Hands what was written to the output on, for a reader that waits for it.
    ///
    /// # Errors
    /// What the output says.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        Ok(self.out.flush()?)
    }

    /// Gives the output back. Unless it is [finished](LogWriter::finish) the log is cut off.
    pub fn into_out(self) -> W {
        self.out
    }

    fn closed(&self) -> Result<(), WriteError> {
        if self.open.is_some() { Err(WriteError::Unfinished) } else { Ok(()) }
    }

    fn begin(&mut self) {
        self.record.clear();
        self.record.resize(HEAD, 0);
    }

    /// Writes what is in `record`.
    fn put(&mut self, kind: u8) -> Result<(), WriteError> {
        Head::seal(&mut self.record, kind, self.number, self.seed);
        self.out.write_all(&self.record)?;
        self.number += 1;
        Ok(())
    }

    fn json(&mut self, kind: u8, value: &impl Serialize) -> Result<(), WriteError> {
        self.begin();
        serde_json::to_writer(&mut self.record, value).map_err(io::Error::from)?;
        if self.record.len() - HEAD > MAX_PAYLOAD {
            return Err(WriteError::TooLong { what: "a header", bytes: self.record.len() - HEAD });
        }
        self.put(kind)
    }

    fn check(&self, range: PageRange) -> Result<(), WriteError> {
        if self.header.has(range) { Ok(()) } else { Err(WriteError::OutsideSlots(range)) }
    }

    /// Writes the ranges in `spans`, if there are any.
    fn put_spans(&mut self, kind: u8, vcpu: Option<u32>) -> Result<(), WriteError> {
        if self.spans.is_empty() {
            return Ok(());
        }
        self.begin();
        if let Some(vcpu) = vcpu {
            self.record.extend_from_slice(&u64::from(vcpu).to_le_bytes());
        }
        self.spans.drain(..).for_each(|span| span.put(&mut self.record));
        self.put(kind)
    }

    /// Writes all of `spans`, in as many records as it takes, and returns how many pages they have.
    fn all_spans(
        &mut self,
        kind: u8,
        vcpu: Option<u32>,
        spans: impl IntoIterator<Item = Span>,
    ) -> Result<u64, WriteError> {
        self.spans.clear();
        let mut pages = 0;
        for Span { mut range, flags } in spans {
            self.check(range)?;
            pages += range.pages;
            // An entry's number of pages has 32 bits.
            while range.pages > 0 {
                let part = range.pages.min(1 << 31);
                self.spans.push(Span { range: PageRange { start: range.start, pages: part }, flags });
                range = PageRange { start: Gfn(range.start.0 + part), pages: range.pages - part };
                if self.spans.len() == SPANS {
                    self.put_spans(kind, vcpu)?;
                }
            }
        }
        self.put_spans(kind, vcpu)?;
        Ok(pages)
    }

    /// Writes the pages at `run` of the chunk, whose first page is `first`.
    fn put_run(&mut self, first: Gfn, run: std::ops::Range<usize>) -> Result<(), WriteError> {
        let (start, end) = (ROOM + run.start * PAGE_BYTES, ROOM + run.end * PAGE_BYTES);
        let mut head = [0; PAGES_HEAD];
        head[..8].copy_from_slice(&(first.0 + run.start as u64).to_le_bytes());
        head[8..12].copy_from_slice(&(run.len() as u32).to_le_bytes());
        self.begin();
        self.record.extend_from_slice(&head);
        if let Some(encoding) = self.encoder.encode(&self.chunk[start..end], &mut self.record)? {
            self.record[HEAD + 12] = encoding;
            return self.put(kind::PAGES);
        }
        // Without another copy: the heads go over the page before, which is zero, or written already, or room.
        head[12] = AS_IT_IS;
        self.chunk[start - PAGES_HEAD..start].copy_from_slice(&head);
        let record = &mut self.chunk[start - PAGES_HEAD - HEAD..end];
        Head::seal(record, kind::PAGES, self.number, self.seed);
        self.out.write_all(record)?;
        self.number += 1;
        Ok(())
    }
}

impl<W: Write> EpochWriter<'_, W> {
    fn so_far(&mut self) -> &mut EpochEnd {
        self.0.open.get_or_insert_default()
    }

    /// Where the log goes.
    pub fn out(&self) -> &W {
        &self.0.out
    }

    /// Reports pages as written. In an epoch, all of them come in ascending order and once.
    ///
    /// # Errors
    /// What the output says, and [`WriteError::OutsideSlots`].
    pub fn ranges(&mut self, spans: impl IntoIterator<Item = Span>) -> Result<(), WriteError> {
        self.so_far().dirty += self.0.all_spans(kind::RANGES, None, spans)?;
        Ok(())
    }

    /// Says what vCPU number `vcpu` wrote.
    ///
    /// # Errors
    /// What the output says, and [`WriteError::OutsideSlots`].
    pub fn vcpu(&mut self, vcpu: u32, spans: impl IntoIterator<Item = Span>) -> Result<(), WriteError> {
        self.0.all_spans(kind::VCPU, Some(vcpu), spans).map(drop)
    }

    /// Writes the contents of `range`, which `read` copies from an address into a buffer of whole pages. Pages of zeros
    /// become ranges, without contents.
    ///
    /// # Errors
    /// What the output and `read` say, and [`WriteError::OutsideSlots`].
    pub fn pages(
        &mut self,
        range: PageRange,
        mut read: impl FnMut(Gpa, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        self.0.check(range)?;
        self.0.chunk.resize(ROOM + COPY_PAGES * PAGE_BYTES, 0);
        self.0.spans.clear();
        let mut first = range.start;
        while first < range.end() {
            let pages = (range.end().0 - first.0).min(COPY_PAGES as u64) as usize;
            let chunk = &mut self.0.chunk[ROOM..][..pages * PAGE_BYTES];
            read(first.gpa(), chunk).map_err(|source| WriteError::Memory {
                range: PageRange { start: first, pages: pages as u64 },
                source,
            })?;
            let mut page = 0;
            while page < pages {
                let kind_at = |page: usize| is_zero(&self.0.chunk[ROOM + page * PAGE_BYTES..][..PAGE_BYTES]);
                let zero = kind_at(page);
                let run = page..(page + 1..pages).find(|&page| kind_at(page) != zero).unwrap_or(pages);
                if zero {
                    let range = PageRange { start: Gfn(first.0 + run.start as u64), pages: run.len() as u64 };
                    self.zero(range)?;
                } else {
                    self.0.put_run(first, run.clone())?;
                    self.so_far().pages += run.len() as u64;
                }
                page = run.end;
            }
            first = Gfn(first.0 + pages as u64);
        }
        self.0.put_spans(kind::ZERO, None)
    }

    /// Writes the heads of a record with the contents of `ranges`, at most [`CHUNK_PAGES`] in all; `write` is to write these
    /// contents, range by range and nothing else, to the output that it is given. For a log whose contents are not
    /// [checked](Header::checked).
    ///
    /// # Errors
    /// What the output says, [`WriteError::OutsideSlots`], [`WriteError::TooLong`] and [`WriteError::Checked`].
    pub fn pages_apart(
        &mut self,
        ranges: &[PageRange],
        write: impl FnOnce(&mut W) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        let log = &mut *self.0;
        if log.header.checked {
            return Err(WriteError::Checked);
        }
        log.begin();
        log.record.extend_from_slice(&(ranges.len() as u64).to_le_bytes());
        debug_assert_eq!(log.record.len(), HEAD + APART_HEAD);
        let mut pages = 0;
        for &range in ranges {
            log.check(range)?;
            pages += range.pages;
            Span { range, flags: 0 }.put(&mut log.record);
        }
        let bytes = pages as usize * PAGE_BYTES;
        if pages == 0 || pages > CHUNK_PAGES as u64 {
            return Err(WriteError::TooLong { what: "what is in ranges of pages", bytes });
        }
        Head::seal_before(&mut log.record, bytes, kind::APART, log.number, log.seed);
        log.out.write_all(&log.record)?;
        write(&mut log.out)?;
        log.number += 1;
        self.so_far().pages += pages;
        Ok(())
    }

    /// Says that pages are all zeros.
    ///
    /// # Errors
    /// What the output says, and [`WriteError::OutsideSlots`].
    pub fn zeros(&mut self, ranges: impl IntoIterator<Item = PageRange>) -> Result<(), WriteError> {
        let spans = ranges.into_iter().map(|range| Span { range, flags: 0 });
        self.so_far().zero += self.0.all_spans(kind::ZERO, None, spans)?;
        Ok(())
    }

    /// Remembers zeros, which are written when they end.
    fn zero(&mut self, range: PageRange) -> Result<(), WriteError> {
        self.so_far().zero += range.pages;
        match self.0.spans.last_mut() {
            Some(last) if last.range.end() == range.start && last.range.pages + range.pages < 1 << 31 => {
                last.range.pages += range.pages;
            }
            _ => self.0.spans.push(Span { range, flags: 0 }),
        }
        if self.0.spans.len() == SPANS { self.0.put_spans(kind::ZERO, None) } else { Ok(()) }
    }

    /// Ends the epoch.
    ///
    /// # Errors
    /// What the output says.
    pub fn finish(self) -> Result<EpochEnd, WriteError> {
        let end = self.0.open.unwrap_or_default();
        self.0.json(kind::EPOCH_END, &end)?;
        self.0.open = None;
        self.0.end.epochs += 1;
        self.0.end.total.add(&end);
        Ok(end)
    }
}
