//! The source: its machine goes away, if all goes well.
//!
//! A migration is a value that changes its type with each step: [`Copying`], [`Still`], and then it is over. What can
//! be done in a step is what its type has, and who has given the machine away has nothing left to run it with.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{Gfn, Gpa, LEAVES_PER_BLOCK, PAGE_BYTES, PageRange};
use dirty_track::log::{
    CHUNK_PAGES, Compression, EpochWriter, Header, LogWriter, Span, StreamId, WriteError, flags,
};
use dirty_track::refine::Shadow;
use dirty_track::tracker::Guarantees;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::lane::{Cancel, Lane, Way};
use super::note::{Hello, Note, NoteError, VERSION};
use super::report::Round;
use super::rounds::Limits;
use super::{Address, MigrateError, postcopy};
use crate::dump::{self, CREATOR};
use crate::memory::{GuestRam, Ram};
use crate::snapshot::Shape;
use crate::state::{MachineState, parts};
use crate::sys::guest_io;

/// How to migrate.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrateConfig {
    /// Where to.
    pub to: Address,
    /// How long the guest may stand still.
    pub downtime: Duration,
    /// Connections.
    pub connections: usize,
    /// How the contents of pages are compressed.
    pub compress: Compression,
    /// Hold back vCPUs that write faster than can be sent.
    pub auto_converge: bool,
    /// Switch to postcopy if they do.
    pub postcopy: bool,
    /// Most bytes per second, if there is a limit.
    pub bandwidth: Option<u64>,
    /// TLS, by the certificates in this directory ([`tls`](super::tls)).
    pub tls_dir: Option<PathBuf>,
}

/// How long who has broken off may take to say why.
const FOR_A_REASON: Duration = Duration::from_millis(500);

/// How long another connection may take then.
const FOR_ANOTHER: Duration = Duration::from_millis(5);

/// Most connections.
pub const MAX_CONNECTIONS: usize = 64;

impl MigrateConfig {
    pub(super) fn limits(&self) -> Limits {
        Limits { downtime: self.downtime, auto_converge: self.auto_converge, postcopy: self.postcopy }
    }
}

/// What is on the way, and how fast it may be.
#[derive(Debug)]
struct Pace {
    cancel: Cancel,
    /// Bytes per second of one connection.
    limit: Option<f64>,
}

impl Pace {
    /// Waits until `bytes`, sent since `began`, are not too many.
    fn keep(&self, began: Instant, bytes: u64) -> io::Result<()> {
        if self.cancel.is_cancelled() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if let Some(limit) = self.limit {
            let due = Duration::from_secs_f64(bytes as f64 / limit);
            thread::sleep(due.saturating_sub(began.elapsed()));
        }
        Ok(())
    }
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    pub(crate) zero: u64,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
}

impl Sent {
    pub(crate) fn add(&mut self, other: &Sent) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.bytes += other.bytes;
        self.seconds += other.seconds;
    }

    pub(crate) fn round(&self, dirty: u64) -> Round {
        Round { seconds: self.seconds, pages: self.pages, zero: self.zero, dirty }
    }
}

/// Memory is copied; the guest runs, or stands still by somebody else's doing.
#[derive(Debug)]
pub(crate) struct Copying {
    lanes: Vec<LogWriter<Lane>>,
    pace: Pace,
    compress: bool,
    began: Instant,
    /// As it was said on the first connection.
    hello: Hello,
}

/// What is told of the tracker in the log's header.
pub(crate) type Tracker = (&'static str, Guarantees);

impl Copying {
    /// Connects, and is made welcome.
    pub(crate) fn begin(
        config: &MigrateConfig,
        shape: &Shape,
        ram: &Ram,
        (tracker, guarantees): Tracker,
        cancel: &Cancel,
    ) -> Result<Copying, MigrateError> {
        let id = dump::stream_id().map_err(|error| MigrateError::System(io::Error::other(error)))?;
        let connections = match config.to {
            // One for what the guest waits for, one for the rest.
            Address::Unix(_) | Address::Tcp(_) if config.postcopy => config.connections.max(2),
            _ => config.connections,
        };
        let hello = Hello {
            version: VERSION,
            id,
            lane: 0,
            lanes: connections,
            shape: shape.clone(),
            postcopy: config.postcopy,
            again: false,
        };
        let way = Way::of(config)?;
        let mut lanes = Vec::with_capacity(connections);
        for lane in 0..connections {
            let connected =
                way.connect().and_then(|connection| cancel.watch(&connection).map(|()| connection));
            let mut connection = connected.map_err(|source| MigrateError::Connect {
                to: config.to.to_string(),
                tls: config.tls_dir.is_some(),
                source,
            })?;
            Note::Hello(Box::new(Hello { lane, ..hello.clone() })).write(&mut connection)?;
            lanes.push(connection);
        }
        let mut logs = Vec::with_capacity(lanes.len());
        for mut lane in lanes {
            // The destination makes a machine meanwhile.
            Note::expect(&mut lane, &Note::Welcome, "a welcome")?;
            logs.push(LogWriter::new(lane, header(id, ram, tracker, guarantees), config.compress)?);
        }
        let limit = config.bandwidth.map(|bytes| bytes as f64 / connections as f64);
        let pace = Pace { cancel: cancel.clone(), limit };
        Ok(Copying {
            lanes: logs,
            pace,
            compress: config.compress != Compression::None,
            began: Instant::now(),
            hello,
        })
    }

    /// Connections that it has.
    pub(crate) fn connections(&self) -> usize {
        self.lanes.len()
    }

    /// Sends the contents of `spans`, as they are now. With a `shadow`, what is sent of coarse ones is recorded there.
    pub(crate) fn send(
        &mut self,
        ram: &Ram,
        spans: &[Span],
        shadow: Option<&Mutex<Shadow>>,
    ) -> Result<Sent, MigrateError> {
        let began = Instant::now();
        let at_ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let before: u64 = self.lanes.iter().map(|log| log.out().sent()).sum();
        let (count, compress, pace) = (self.lanes.len() as u64, self.compress, &self.pace);
        let send = |lane: u64, log: &mut LogWriter<Lane>| -> Result<(u64, u64), WriteError> {
            let first = log.out().sent();
            let mut epoch = log.epoch(at_ns, 0)?;
            // A page always takes the same way, so what is sent later arrives later.
            let parts = || {
                let parts = spans
                    .iter()
                    .flat_map(|&Span { range, flags }| blocks(range).map(move |range| Span { range, flags }));
                parts.filter(|span| span.range.start.block() % count == lane)
            };
            epoch.ranges(parts())?;
            let mut batch = Batch { ram: ram.mem(), ranges: Vec::new(), pages: 0, empty: Vec::new() };
            for Span { range, flags } in parts() {
                match shadow {
                    Some(shadow) if flags & flags::COARSE != 0 => {
                        remembered(&mut epoch, range, ram, shadow)?;
                    }
                    shadow => {
                        match compress {
                            true => epoch.pages(range, |gpa, to| read(ram, gpa, to))?,
                            false => batch.add(&mut epoch, range)?,
                        }
                        // It is not what was recorded.
                        let mut shadow = shadow.map(lock);
                        shadow.iter_mut().for_each(|shadow| range.iter().for_each(|gfn| shadow.forget(gfn)));
                    }
                }
                pace.keep(began, epoch.out().sent() - first)?;
            }
            batch.flush(&mut epoch)?;
            let end = epoch.finish()?;
            log.flush()?;
            Ok((end.pages, end.zero))
        };
        let sent: Result<Vec<(u64, u64)>, WriteError> = match &mut self.lanes[..] {
            [log] => send(0, log).map(|sent| vec![sent]),
            logs => thread::scope(|scope| {
                let threads: Vec<_> = logs
                    .iter_mut()
                    .enumerate()
                    .map(|(lane, log)| {
                        let send = &send;
                        scope.spawn(move || send(lane as u64, log))
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect()
            }),
        };
        let sent = sent.map_err(|error| self.why(error))?;
        let bytes: u64 = self.lanes.iter().map(|log| log.out().sent()).sum();
        Ok(Sent {
            pages: sent.iter().map(|sent| sent.0).sum(),
            zero: sent.iter().map(|sent| sent.1).sum(),
            bytes: bytes - before,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// The guest stands still from now on, until this is over.
    pub(crate) fn stand_still(self) -> Still {
        Still(self)
    }

    /// A destination that breaks off may have said why; and whoever cancelled knows.
    fn why(&mut self, error: WriteError) -> MigrateError {
        if self.pace.cancel.is_cancelled() {
            return MigrateError::Cancelled;
        }
        let WriteError::Io(error) = error else { return error.into() };
        // On the connection where it was wrong; on the others, unless they are gone with it.
        let mut patience = FOR_A_REASON;
        for log in self.lanes.drain(..) {
            let mut lane = log.into_out();
            let said = lane.set_patience(Some(patience)).map_err(NoteError::from);
            if let Ok(Note::Refused { why }) = said.and_then(|()| Note::read(&mut lane)) {
                return NoteError::Refused(why).into();
            }
            patience = FOR_ANOTHER;
        }
        NoteError::Io(error).into()
    }
}

/// The guest stands still, and is this side's.
#[derive(Debug)]
pub(crate) struct Still(Copying);

impl Still {
    /// Sends the contents of `spans`, which do not change any more.
    pub(crate) fn send(&mut self, ram: &Ram, spans: &[Span]) -> Result<Sent, MigrateError> {
        self.0.send(ram, spans, None)
    }

    /// Says which pages the destination has to ask for: those of `spans`, which change no more.
    pub(crate) fn leave(&mut self, spans: &[Span]) -> Result<(), MigrateError> {
        let ranges: Vec<_> = spans.iter().map(|span| span.range).collect();
        for record in postcopy::records(&ranges) {
            self.0.lanes[0].state(postcopy::MISSING, &record)?;
        }
        Ok(())
    }

    /// Sends the state, and waits until the destination has all it needs. The guest is still this side's.
    pub(crate) fn send_state(mut self, state: &MachineState) -> Result<Complete, MigrateError> {
        parts::write(&mut self.0.lanes[0], state)?;
        let mut lanes = Vec::with_capacity(self.0.lanes.len());
        for log in self.0.lanes.drain(..) {
            lanes.push(log.finish()?.0);
        }
        let ready = Note::expect(&mut lanes[0], &Note::Ready, "word that it is ready");
        match ready {
            Ok(()) => Ok(Complete { lanes, hello: self.0.hello }),
            Err(_) if self.0.pace.cancel.is_cancelled() => Err(MigrateError::Cancelled),
            Err(error) => Err(error.into()),
        }
    }
}

/// The destination has everything, and the guest is this side's still.
#[derive(Debug)]
pub(crate) struct Complete {
    lanes: Vec<Lane>,
    hello: Hello,
}

impl Complete {
    /// Gives the guest away, and waits until the destination says that it runs. From here on it must not run on this side,
    /// unless somebody knows that it does not run on the other: whatever fails now, the destination may have heard.
    pub(crate) fn give_away(mut self) -> Result<Gone, NoteError> {
        Note::Go.write(&mut self.lanes[0])?;
        Note::expect(&mut self.lanes[0], &Note::Running, "word that it runs")?;
        Ok(Gone(self))
    }
}

/// The guest runs at the destination.
#[derive(Debug)]
pub(crate) struct Gone(Complete);

impl Gone {
    /// Bytes that were sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.lanes.iter().map(Lane::sent).sum()
    }

    /// Serves the destination with what it was not sent, until it needs nothing any more. Returns the pages that it asked for.
    pub(crate) fn serve(
        self,
        ram: &Ram,
        config: &MigrateConfig,
        cancel: &Cancel,
        tell: impl Fn(u64) + Sync,
    ) -> Result<u64, MigrateError> {
        postcopy::serve(self.0.lanes, ram, &Way::of(config)?, &self.0.hello, cancel, tell)
    }
}

fn header(id: StreamId, ram: &Ram, tracker: &str, guarantees: Guarantees) -> Header {
    Header {
        id,
        parent: None,
        page_size: PAGE_BYTES as u64,
        slots: dump::slots(ram),
        tracker: tracker.to_owned(),
        guarantees,
        contents: true,
        checked: false,
        creator: CREATOR.to_owned(),
    }
}

/// `range` in parts that are each within a block.
pub(super) fn blocks(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut at = range.start.0;
    std::iter::from_fn(move || {
        let end = range.end().0.min((at / LEAVES_PER_BLOCK + 1) * LEAVES_PER_BLOCK);
        (at < end).then(|| {
            let part = PageRange { start: Gfn(at), pages: end - at };
            at = end;
            part
        })
    })
}

fn lock(shadow: &Mutex<Shadow>) -> MutexGuard<'_, Shadow> {
    // A page that was half recorded when somebody panicked ends the migration with it.
    shadow.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(ram: &Ram, gpa: Gpa, to: &mut [u8]) -> io::Result<()> {
    ram.mem().read_slice(to, GuestAddress(gpa.0)).map_err(io::Error::other)
}

/// Sends the contents of `range` and records what was sent.
fn remembered(
    epoch: &mut EpochWriter<'_, Lane>,
    range: PageRange,
    ram: &Ram,
    shadow: &Mutex<Shadow>,
) -> Result<(), WriteError> {
    epoch.pages(range, |gpa, to| {
        read(ram, gpa, to)?;
        let (pages, _) = to.as_chunks::<PAGE_BYTES>();
        let mut shadow = lock(shadow);
        for (page, contents) in pages.iter().enumerate() {
            shadow.record(Gfn(gpa.gfn().0 + page as u64), contents);
        }
        Ok(())
    })
}

/// Pages on their way into records: those that are far from each other share one.
struct Batch<'a> {
    ram: &'a GuestRam,
    ranges: Vec<PageRange>,
    pages: u64,
    empty: Vec<PageRange>,
}

impl Batch<'_> {
    /// Sends the contents of `range`, which is within a block, now or [in the end](Batch::flush).
    fn add(&mut self, epoch: &mut EpochWriter<'_, Lane>, range: PageRange) -> Result<(), WriteError> {
        let failed =
            |source: GuestMemoryError| WriteError::Memory { range, source: io::Error::other(source) };
        let mut zeros: Zeros = [false; LEAVES_PER_BLOCK as usize];
        self::zeros(self.ram, range, &mut zeros).map_err(failed)?;
        for run in zeros[..range.pages as usize].chunk_by(PartialEq::eq).scan(range.start, |at, run| {
            let run = (PageRange { start: *at, pages: run.len() as u64 }, run[0]);
            *at = run.0.end();
            Some(run)
        }) {
            match run {
                (run, true) => self.empty.push(run),
                (run, false) => self.fill(epoch, run)?,
            }
        }
        Ok(())
    }

    fn fill(&mut self, epoch: &mut EpochWriter<'_, Lane>, mut run: PageRange) -> Result<(), WriteError> {
        while run.pages > 0 {
            let pages = run.pages.min(CHUNK_PAGES as u64 - self.pages);
            self.ranges.push(PageRange { start: run.start, pages });
            self.pages += pages;
            run = PageRange { start: Gfn(run.start.0 + pages), pages: run.pages - pages };
            if self.pages == CHUNK_PAGES as u64 {
                self.put(epoch)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, epoch: &mut EpochWriter<'_, Lane>) -> Result<(), WriteError> {
        epoch.pages_apart(&self.ranges, |lane| lane.send(self.ram, &self.ranges))?;
        self.ranges.clear();
        self.pages = 0;
        Ok(())
    }

    /// Sends what is left.
    fn flush(mut self, epoch: &mut EpochWriter<'_, Lane>) -> Result<(), WriteError> {
        if self.pages > 0 {
            self.put(epoch)?;
        }
        epoch.zeros(self.empty)
    }
}

/// Which pages of a block are all zeros.
pub(super) type Zeros = [bool; LEAVES_PER_BLOCK as usize];

/// Finds out which of the pages of `range`, at most a block, are all zeros at this moment.
pub(super) fn zeros(ram: &GuestRam, range: PageRange, zeros: &mut Zeros) -> Result<(), GuestMemoryError> {
    for (gfn, zero) in range.iter().zip(zeros) {
        *zero = guest_io::is_zero(&ram.get_slice(GuestAddress(gfn.gpa().0), PAGE_BYTES)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dirty_track::tracker::{Backing, Kind};

    use super::super::destination::absorb_all;
    use super::super::lane::Listener;
    use super::*;
    use crate::memory::MemoryConfig;

    /// Changes pages of `ram` at random: to contents, to zeros, to nearly zeros.
    fn scribble(ram: &Ram, random: &mut impl FnMut() -> u64, times: usize) -> Vec<PageRange> {
        let pages = ram.config().size / PAGE_BYTES as u64;
        let mut written: Vec<u64> = (0..times).map(|_| random() % pages).collect();
        written.sort_unstable();
        written.dedup();
        for gfn in &written {
            let mut page = [0; PAGE_BYTES];
            match random() % 4 {
                0 => {}
                1 => page[(random() % PAGE_BYTES as u64) as usize] = 1,
                2 => page.fill(random() as u8),
                _ => page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random().to_le_bytes())),
            }
            ram.mem().write_slice(&page, GuestAddress(gfn * PAGE_BYTES as u64)).unwrap();
        }
        written.iter().map(|&gfn| PageRange { start: Gfn(gfn), pages: 1 }).collect()
    }

    /// What the destination has is what the source had, byte for byte.
    #[test]
    fn what_is_sent_arrives() {
        for (connections, compress) in
            [(1, Compression::None), (3, Compression::Lz4), (4, Compression::Zstd), (5, Compression::None)]
        {
            let directory = tempfile::tempdir().unwrap();
            let config = MigrateConfig {
                to: Address::Unix(directory.path().join("socket")),
                downtime: Duration::ZERO,
                connections,
                compress,
                auto_converge: false,
                postcopy: false,
                bandwidth: None,
                tls_dir: None,
            };
            let memory = MemoryConfig { size: 72 << 20, ..MemoryConfig::default() };
            let (here, there) = (Ram::new(memory).unwrap(), Ram::new(memory).unwrap());
            let shape = Shape { memory: memory.size, cpus: 1, disks: Vec::new(), rng: false, builtin: true };
            let guarantees = Kind::KvmManual.guarantees(Backing::Private);
            let listener = Listener::bind(&config.to, None).unwrap();
            let mut seed = 1;
            // Marsaglia's xorshift.
            let mut random = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed
            };
            thread::scope(|scope| {
                let destination = scope.spawn(|| absorb_all(&listener, connections, &there));
                scribble(&here, &mut random, 1000);
                let cancel = Cancel::default();
                let mut copying =
                    Copying::begin(&config, &shape, &here, ("none", guarantees), &cancel).unwrap();
                let spans = |ranges: Vec<PageRange>| -> Vec<Span> {
                    ranges.into_iter().map(|range| Span { range, flags: 0 }).collect()
                };
                let all = dump::slots(&here).iter().map(|slot| slot.frames()).collect();
                copying.send(&here, &spans(all), None).unwrap();
                for _ in 0..4 {
                    let written = scribble(&here, &mut random, 1000);
                    copying.send(&here, &spans(written), None).unwrap();
                }
                copying.lanes.drain(..).for_each(|log| drop(log.finish().unwrap()));
                destination.join().unwrap();
            });
            let page = |ram: &Ram, gpa| {
                let mut page = [0; PAGE_BYTES];
                ram.mem().read_slice(&mut page, GuestAddress(gpa)).unwrap();
                page
            };
            for gpa in (0..memory.size).step_by(PAGE_BYTES) {
                assert!(page(&here, gpa) == page(&there, gpa), "{connections} {compress:?} {gpa:#x}");
            }
        }
    }

    #[test]
    fn ranges_are_cut_at_blocks() {
        let range = PageRange { start: Gfn(500), pages: 1100 };
        let parts: Vec<_> = blocks(range).map(|part| (part.start.0, part.pages)).collect();
        assert_eq!(parts, [(500, 12), (512, 512), (1024, 512), (1536, 64)]);
        assert_eq!(blocks(PageRange { start: Gfn(3), pages: 0 }).count(), 0);
    }
}
