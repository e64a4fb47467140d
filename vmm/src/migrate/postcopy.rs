//! After the switch: the guest runs at the destination, which asks the source for the pages that it has not got.
//!
//! The connections are turned round: the destination asks, the source answers. A request is 16 bytes: first frame (8),
//! pages (4, at most [`MOST`]), what it is (4: [`PAGES`] or [`COMPLETE`]), all little-endian. The answer to a request for
//! pages is a bitmap (8 bytes for each 64 pages begun) of those that are not all zeros, and their contents.
//!
//! The source's memory does not change any more, so a page may be asked for any number of times. That is what makes a
//! broken connection harmless: the source connects again, says which migration it is about, and whoever waited for an
//! answer asks anew. A guest that needs a page meanwhile waits.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{Gfn, LEAVES_PER_BLOCK, PAGE_BYTES, PageRange};
use dirty_track::bitmap::DirtyBitmap;
use dirty_track::fault::{PageSource, Server};
use dirty_track::log::{SlotInfo, StreamId};

use super::MigrateError;
use super::lane::{Cancel, Lane, Listener, PATIENCE, Way};
use super::note::{Hello, Note, NoteError};
use super::source::{Zeros, blocks, zeros};
use crate::memory::{GuestRam, Ram};

/// Most pages of a request: a block.
const MOST: u64 = LEAVES_PER_BLOCK;

/// A request for pages.
const PAGES: u32 = 1;
/// The destination needs nothing any more.
const COMPLETE: u32 = 2;

/// Requests for more than this are not urgent: a guest waits for a page and its neighbours.
const URGENT: u64 = 16;

/// How long the source tries to reach a destination that it has lost.
const RECOVERY: Duration = Duration::from_secs(300);

/// How long it waits between two attempts.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(100);

/// Name of the records of a log that say which pages are still the source's.
pub(super) const MISSING: &str = "missing";

/// Entries in such a record.
const ENTRIES: usize = 1 << 16;

/// The pages `ranges` as records of the log: entries of 16 bytes, first frame and pages.
pub(super) fn records(ranges: &[PageRange]) -> impl Iterator<Item = Vec<u8>> + '_ {
    ranges.chunks(ENTRIES).map(|ranges| {
        ranges
            .iter()
            .flat_map(|range| [range.start.0.to_le_bytes(), range.pages.to_le_bytes()])
            .flatten()
            .collect()
    })
}

/// Reads such a record. `None`: it is none, or has pages that no slot of `slots` has.
pub(super) fn ranges(record: &[u8], slots: &[SlotInfo]) -> Option<Vec<PageRange>> {
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).ok();
    let mut ranges = Vec::with_capacity(record.len() / 16);
    for entry in record.chunks(16) {
        let (first, pages) = entry.split_at_checked(8)?;
        let range = PageRange { start: Gfn(word(first)?), pages: word(pages)? };
        place(slots, range)?;
        ranges.push(range);
    }
    Some(ranges)
}

/// What a destination asks for that is told to ask for `ranges`: these, in order, and all of a block of which half is among
/// them, or too many pieces. What was sent of them has to be dropped while the guest stands still; a huge page goes in
/// one stroke, whereas each piece of it costs some microseconds (Linux flushes TLBs every time), so that a guest that wrote
/// here and there for a while would wait for hundreds of milliseconds.
pub(super) fn whole_blocks(mut ranges: Vec<PageRange>, slots: &[SlotInfo]) -> Vec<PageRange> {
    ranges.sort_unstable_by_key(|range| range.start);
    let pieces: Vec<PageRange> = joined(ranges, slots).into_iter().flat_map(blocks).collect();
    let mut asked = Vec::with_capacity(pieces.len());
    let place = |piece: &PageRange| (piece.start.block(), slot(slots, piece.start));
    for pieces in pieces.chunk_by(|a, b| place(a) == place(b)) {
        let pages: u64 = pieces.iter().map(|piece| piece.pages).sum();
        let many = pages * 2 >= LEAVES_PER_BLOCK || pieces.len() > MOST_PIECES;
        match pieces.first().map(place) {
            Some((block, Some(slot))) if many => {
                let start = Gfn(block * LEAVES_PER_BLOCK).max(slot.start);
                let end = Gfn((block + 1) * LEAVES_PER_BLOCK).min(slot.end());
                asked.push(PageRange { start, pages: end.0 - start.0 });
            }
            _ => asked.extend_from_slice(pieces),
        }
    }
    joined(asked, slots)
}

/// Pieces of a block that are dropped one by one.
const MOST_PIECES: usize = 64;

/// `ranges`, which are in order and each in one slot, without overlaps, and without seams but those of slots.
fn joined(ranges: Vec<PageRange>, slots: &[SlotInfo]) -> Vec<PageRange> {
    let mut joined: Vec<PageRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last)
                if range.start <= last.end() && slot(slots, range.start) == slot(slots, last.start) =>
            {
                last.pages = last.end().max(range.end()).0 - last.start.0;
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// The frames of the slot that has `gfn`.
fn slot(slots: &[SlotInfo], gfn: Gfn) -> Option<PageRange> {
    slots.iter().map(SlotInfo::frames).find(|frames| frames.contains(gfn))
}

/// Where the pages of `range`, which are all in one slot, come in the row of all pages.
pub(super) fn place(slots: &[SlotInfo], range: PageRange) -> Option<usize> {
    let mut before = 0;
    for slot in slots {
        let offset = range.start.0.checked_sub(slot.first).filter(|offset| *offset < slot.pages);
        if let Some(offset) = offset {
            let fits = range.pages > 0 && range.pages <= slot.pages - offset;
            return fits.then_some((before + offset) as usize);
        }
        before += slot.pages;
    }
    None
}

/// Serves a destination from memory that does not change any more, until it needs nothing. Returns how many pages it asked
/// for.
pub(super) fn serve(
    lanes: Vec<Lane>,
    ram: &Ram,
    to: &Way,
    hello: &Hello,
    cancel: &Cancel,
    tell: impl Fn(u64) + Sync,
) -> Result<u64, MigrateError> {
    let service = Service {
        ram: ram.mem(),
        slots: crate::dump::slots(ram),
        to,
        hello,
        cancel,
        tell,
        asked: AtomicU64::new(0),
        complete: AtomicBool::new(false),
    };
    let outcomes: Vec<Result<(), MigrateError>> = thread::scope(|scope| {
        let service = &service;
        let threads: Vec<_> = lanes
            .into_iter()
            .enumerate()
            .map(|(number, lane)| scope.spawn(move || service.serve(number, lane)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    // One connection is enough to say so.
    if !service.complete.load(Ordering::Acquire) {
        outcomes.into_iter().collect::<Result<Vec<()>, _>>()?;
    }
    Ok(service.asked.into_inner())
}

/// The source's side.
struct Service<'a, T> {
    ram: &'a GuestRam,
    slots: Vec<SlotInfo>,
    to: &'a Way,
    hello: &'a Hello,
    cancel: &'a Cancel,
    tell: T,
    asked: AtomicU64,
    complete: AtomicBool,
}

impl<T: Fn(u64)> Service<'_, T> {
    /// Serves one connection, and makes another one when it breaks off.
    fn serve(&self, number: usize, mut lane: Lane) -> Result<(), MigrateError> {
        loop {
            let Err(error) = self.answer(&mut lane) else {
                self.complete.store(true, Ordering::Release);
                return Ok(());
            };
            let since = Instant::now();
            lane = loop {
                if self.complete.load(Ordering::Acquire) {
                    return Ok(());
                }
                let given_up = since.elapsed() > RECOVERY || self.cancel.is_abandoned();
                if given_up || self.to.is_once() {
                    return Err(NoteError::from(error).into());
                }
                match greet_again(self.to, self.hello, number) {
                    Ok(lane) => break lane,
                    Err(_) => thread::sleep(BETWEEN_ATTEMPTS),
                }
            };
        }
    }

    /// Answers requests until the destination is complete.
    fn answer(&self, lane: &mut Lane) -> io::Result<()> {
        loop {
            let mut request = [0; 16];
            lane.read_exact(&mut request)?;
            let (range, what) = decode(&request);
            match what {
                COMPLETE => return Ok(()),
                PAGES if range.pages <= MOST && place(&self.slots, range).is_some() => {}
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
            let mut empty: Zeros = [false; LEAVES_PER_BLOCK as usize];
            zeros(self.ram, range, &mut empty).map_err(io::Error::other)?;
            let empty = &empty[..range.pages as usize];
            let full: Vec<u8> = empty
                .chunks(64)
                .map(|word| word.iter().rev().fold(0, |bits: u64, empty| bits << 1 | u64::from(!empty)))
                .flat_map(u64::to_le_bytes)
                .collect();
            lane.write_all(&full)?;
            let mut page = 0;
            while page < empty.len() {
                let end = (page + 1..empty.len()).find(|&next| empty[next] != empty[page]);
                let end = end.unwrap_or(empty.len());
                if !empty[page] {
                    let start = Gfn(range.start.0 + page as u64);
                    lane.send(self.ram, &[PageRange { start, pages: (end - page) as u64 }])?;
                }
                page = end;
            }
            (self.tell)(self.asked.fetch_add(range.pages, Ordering::Relaxed) + range.pages);
        }
    }
}

fn greet_again(to: &Way, hello: &Hello, lane: usize) -> Result<Lane, NoteError> {
    let mut connection = to.connect()?;
    Note::Hello(Box::new(Hello { lane, again: true, ..hello.clone() })).write(&mut connection)?;
    Note::expect(&mut connection, &Note::Welcome, "a welcome")?;
    Ok(connection)
}

/// The pages that a destination has not got.
#[derive(Debug)]
pub(crate) struct Rest {
    slots: Vec<SlotInfo>,
    missing: DirtyBitmap,
    ranges: Vec<PageRange>,
    pools: Mutex<Pools>,
    changed: Condvar,
    id: StreamId,
    lanes: usize,
}

/// Connections that nobody uses at the moment. They take turns: one that has broken off is noticed before all depends on it.
#[derive(Debug, Default)]
struct Pools {
    urgent: VecDeque<Lane>,
    bulk: VecDeque<Lane>,
    /// Nobody needs them any more.
    ended: bool,
}

impl Rest {
    /// The pages of `ranges`, to be had by `lanes` and by the one that it [begins](Rest::begin) with. The first ones are kept
    /// for what a guest waits for.
    pub(super) fn new(slots: Vec<SlotInfo>, ranges: Vec<PageRange>, lanes: Vec<Lane>, id: StreamId) -> Rest {
        let pages: u64 = slots.iter().map(|slot| slot.pages).sum();
        let missing = DirtyBitmap::new(pages as usize);
        for range in &ranges {
            if let Some(first) = place(&slots, *range) {
                missing.set_range(first..first + range.pages as usize);
            }
        }
        let rest = Rest {
            slots,
            missing,
            ranges,
            pools: Mutex::default(),
            changed: Condvar::new(),
            id,
            lanes: lanes.len() + 1,
        };
        lanes.into_iter().enumerate().for_each(|(number, lane)| rest.add(number + 1, lane));
        rest
    }

    fn lock(&self) -> MutexGuard<'_, Pools> {
        // Lists of connections, whole between any two statements.
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first connection is free for requests.
    pub(super) fn begin(&self, lane: Lane) {
        if self.is_empty() {
            return;
        }
        self.add(0, lane);
    }

    /// Whether nothing is missing.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether connection `number` is for what nobody waits for.
    fn is_bulk(&self, number: usize) -> bool {
        number > 0 && number >= self.lanes.div_ceil(2)
    }

    fn add(&self, number: usize, lane: Lane) {
        self.put(lane, self.is_bulk(number));
    }

    /// A connection that is free for requests; if there are going to be none, the source is told.
    fn put(&self, mut lane: Lane, bulk: bool) {
        let mut pools = self.lock();
        match pools.ended {
            true => complete(&mut lane),
            false if bulk => pools.bulk.push_back(lane),
            false => pools.urgent.push_back(lane),
        }
        self.changed.notify_all();
    }

    /// Takes a connection, as soon as there is one.
    fn take(&self, urgent: bool) -> io::Result<(Lane, bool)> {
        let mut pools = self.lock();
        loop {
            if pools.ended {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let bulk = !urgent && self.lanes > 1;
            let lane = if bulk { pools.bulk.pop_front() } else { pools.urgent.pop_front() };
            if let Some(lane) = lane {
                return Ok((lane, bulk));
            }
            pools = self.changed.wait(pools).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fills `into` with what the source has in `range`, all of which is missing.
    fn ask(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        loop {
            let (mut lane, bulk) = self.take(range.pages <= URGENT)?;
            // A connection that failed is gone; the source makes another one.
            if request(&mut lane, range, into).is_ok() {
                self.put(lane, bulk);
                return Ok(());
            }
        }
    }

    /// Takes connections again that the source has lost, until this has ended.
    fn accept(&self, listener: &Listener) {
        while !self.lock().ended {
            let Ok(mut lane) = listener.accept() else {
                thread::sleep(BETWEEN_ATTEMPTS);
                continue;
            };
            let hello = Note::read(&mut lane);
            match hello {
                Ok(Note::Hello(hello)) if hello.again && hello.id == self.id && hello.lane < self.lanes => {
                    if Note::Welcome.write(&mut lane).is_ok() {
                        self.add(hello.lane, lane);
                    }
                }
                // Somebody else.
                _ => drop(Note::Refused { why: "a machine is here already".into() }.write(&mut lane)),
            }
        }
    }

    /// Nothing is needed any more.
    fn complete(&self) {
        let mut pools = self.lock();
        pools.ended = true;
        let Pools { urgent, bulk, .. } = &mut *pools;
        urgent.iter_mut().chain(bulk).for_each(complete);
        self.changed.notify_all();
    }
}

/// Tells the source that nothing is needed any more. One that has gone needs not be told.
fn complete(lane: &mut Lane) {
    let word = encode(PageRange { start: Gfn(0), pages: 0 }, COMPLETE);
    let _ = lane.write_all(&word).and_then(|()| lane.flush());
}

fn encode(range: PageRange, what: u32) -> [u8; 16] {
    let mut request = [0; 16];
    request[..8].copy_from_slice(&range.start.0.to_le_bytes());
    request[8..12].copy_from_slice(&(range.pages as u32).to_le_bytes());
    request[12..].copy_from_slice(&what.to_le_bytes());
    request
}

fn decode(request: &[u8; 16]) -> (PageRange, u32) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, what @ ..] = *request;
    let start = Gfn(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
    (PageRange { start, pages: u32::from_le_bytes([i, j, k, l]).into() }, u32::from_le_bytes(what))
}

fn request(lane: &mut Lane, range: PageRange, into: &mut [u8]) -> io::Result<()> {
    lane.write_all(&encode(range, PAGES))?;
    let pages = range.pages as usize;
    let mut full = [0; (MOST as usize).div_ceil(8)];
    let full = &mut full[..pages.div_ceil(64) * 8];
    lane.read_exact(full)?;
    let is_full = |page: usize| full[page / 8] >> (page % 8) & 1 != 0;
    let mut page = 0;
    while page < pages {
        let end = (page + 1..pages).find(|&next| is_full(next) != is_full(page)).unwrap_or(pages);
        let part = &mut into[page * PAGE_BYTES..end * PAGE_BYTES];
        if is_full(page) {
            lane.read_exact(part)?;
        } else {
            part.fill(0);
        }
        page = end;
    }
    Ok(())
}

impl PageSource for Rest {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        let first = place(&self.slots, pages).ok_or(io::ErrorKind::InvalidInput)?;
        let count = pages.pages as usize;
        let is_missing = |page: usize| self.missing.get(first + page);
        let mut page = 0;
        while page < count {
            let most = count.min(page + MOST as usize);
            let end = (page + 1..most).find(|&next| is_missing(next) != is_missing(page)).unwrap_or(most);
            let part = &mut into[page * PAGE_BYTES..end * PAGE_BYTES];
            if is_missing(page) {
                let start = Gfn(pages.start.0 + page as u64);
                self.ask(PageRange { start, pages: (end - page) as u64 }, part)?;
            } else {
                part.fill(0);
            }
            page = end;
        }
        Ok(())
    }
}

/// Brings the rest in while the guest runs. Dropping it ends that: what is missing then stays so.
#[derive(Debug)]
pub(crate) struct Filling {
    rest: Arc<Rest>,
}

impl Filling {
    /// Begins.
    pub(super) fn start(rest: Arc<Rest>, server: Arc<Server>, listener: Listener) -> io::Result<Filling> {
        let filling = Filling { rest: Arc::clone(&rest) };
        let accepting = Arc::clone(&rest);
        listener.set_patience(PATIENCE)?;
        thread::Builder::new().name("postcopy-again".into()).spawn(move || accepting.accept(&listener))?;
        thread::Builder::new().name("postcopy".into()).spawn(move || {
            // What fails is told by the server, and tried again.
            while server.fill(&rest.ranges).is_err() && !rest.lock().ended {
                thread::sleep(BETWEEN_ATTEMPTS);
            }
            rest.complete();
        })?;
        Ok(filling)
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.rest.complete();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: [SlotInfo; 2] =
        [SlotInfo { id: 0, first: 0, pages: 100 }, SlotInfo { id: 1, first: 1000, pages: 50 }];

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange { start: Gfn(first), pages }
    }

    #[test]
    fn records_are_read_as_they_are_written_and_hostile_ones_refused() {
        let missing = vec![range(0, 100), range(1049, 1)];
        let written: Vec<_> = records(&missing).collect();
        assert_eq!(written.len(), 1);
        assert_eq!(ranges(&written[0], &SLOTS).unwrap(), missing);
        assert_eq!(ranges(&written[0][..31], &SLOTS), None);
        for bad in [
            range(0, 0),
            range(0, 101),
            range(100, 1),
            range(1049, 2),
            range(u64::MAX, 1),
            range(99, u64::MAX),
        ] {
            let record = records(&[bad]).next().unwrap();
            assert_eq!(ranges(&record, &SLOTS), None, "{bad}");
        }
    }

    #[test]
    fn requests_are_read_as_they_are_written() {
        assert_eq!(decode(&encode(range(1 << 40, 512), PAGES)), (range(1 << 40, 512), PAGES));
    }

    #[test]
    fn what_is_asked_for_is_what_is_missing_and_whole_blocks_where_that_is_much() {
        // The second slot begins in the midst of block 2, and ends in that of block 5.
        let slots = [SlotInfo { id: 0, first: 0, pages: 1300 }, SlotInfo { id: 1, first: 1300, pages: 1500 }];
        let asked = |ranges: &[PageRange]| whole_blocks(ranges.to_vec(), &slots);
        // Few pages stay what they are; told twice, or in pieces, they are the same.
        let few = [range(3, 1), range(600, 2), range(1299, 1), range(1300, 1)];
        assert_eq!(asked(&few), few);
        assert_eq!(asked(&[range(601, 1), range(3, 1), range(600, 2)]), [range(3, 1), range(600, 2)]);
        assert_eq!(asked(&[range(600, 2), range(602, 3)]), [range(600, 5)]);
        // Half a block is all of it, and no other's.
        assert_eq!(asked(&[range(512, 255), range(3, 1)]), [range(3, 1), range(512, 255)]);
        assert_eq!(asked(&[range(513, 256), range(3, 1)]), [range(3, 1), range(512, 512)]);
        assert_eq!(asked(&[range(500, 524)]), [range(500, 524)]);
        // A block that two slots share is asked for by slots, and no range is in two.
        assert_eq!(asked(&[range(1030, 270), range(1300, 1)]), [range(1024, 276), range(1300, 1)]);
        assert_eq!(asked(&[range(1024, 276), range(1300, 1500)]), [range(1024, 276), range(1300, 1500)]);
        // So are many pieces.
        let pieces = |count: u64| (0..count).map(|piece| range(1536 + 2 * piece, 1)).collect::<Vec<_>>();
        assert_eq!(asked(&pieces(64)), pieces(64));
        assert_eq!(asked(&pieces(65)), [range(1536, 512)]);
        assert_eq!(asked(&[]), []);
    }

    #[test]
    fn pages_have_their_place() {
        assert_eq!(place(&SLOTS, range(99, 1)), Some(99));
        assert_eq!(place(&SLOTS, range(1000, 50)), Some(100));
        assert_eq!(place(&SLOTS, range(999, 1)), None);
    }
}
