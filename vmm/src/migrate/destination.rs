//! The destination: it waits for a machine, takes it in, and runs it when it is told to.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
#[cfg(any(test, fuzzing))]
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{Gfn, PAGE_BYTES, PAGE_SIZE, PageRange};
use dirty_track::bitmap::DirtyBitmap;
use dirty_track::fault::{PageSource, Server};
use dirty_track::log::{Event, LogReader, SlotInfo, StreamId};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::lane::{Cancel, FOR_A_HELLO, Lane, Listener};
use super::note::{Hello, Note, NoteError, VERSION};
use super::postcopy::{Filling, Rest};
use super::source::MAX_CONNECTIONS;
use super::tls::DestinationTls;
use super::{Address, MigrateError, postcopy};
use crate::devices::virtio::disk::{DiskConfig, DiskError};
use crate::dump;
use crate::machine::Machine;
use crate::memory::{Faults, MemoryConfig, Ram};
use crate::snapshot::Shape;
use crate::state::parts::Parts;
use crate::sys::signals::Signals;

/// How long the other connections may take after the first one.
const FOR_LANES: Duration = Duration::from_secs(10);

/// A source that has connected, and has not been answered yet.
#[derive(Debug)]
pub(crate) struct Incoming {
    lanes: Vec<Lane>,
    hello: Hello,
    listener: Listener,
}

impl Incoming {
    /// Waits for a source, with TLS by what is in `tls_dir` if that is given. `None`: a signal came first.
    pub(crate) fn wait(
        address: &Address,
        tls_dir: Option<&Path>,
        signals: &Signals,
    ) -> Result<Option<Incoming>, MigrateError> {
        let listen = |source| MigrateError::Listen { at: address.to_string(), source };
        let tls = tls_dir.map(DestinationTls::new).transpose()?;
        let listener = Listener::bind(address, tls).map_err(listen)?;
        loop {
            if !waited(&listener, signals, None).map_err(listen)? {
                return Ok(None);
            }
            let lane = listener.accept().map_err(NoteError::from);
            let (lane, hello) = match lane.and_then(|lane| greeted(lane, None)) {
                Ok(greeted) => greeted,
                // Somebody else, or a source that cannot be served: it has been told. One that is meant for this machine
                // may come yet; but not by a command that has been run.
                Err(error) if listener.fd().is_none() => return Err(error.into()),
                Err(error) => {
                    eprintln!("vmm: a connection that brings no machine: {error}");
                    continue;
                }
            };
            let mut lanes = vec![lane];
            let deadline = Instant::now() + FOR_LANES;
            while lanes.len() < hello.lanes {
                let left = deadline.saturating_duration_since(Instant::now());
                if !waited(&listener, signals, Some(left)).map_err(listen)? {
                    if left.is_zero() {
                        break;
                    }
                    return Ok(None);
                }
                let due = Some((hello.id, lanes.len()));
                match listener.accept().map_err(NoteError::from).and_then(|lane| greeted(lane, due)) {
                    Ok((lane, _)) => lanes.push(lane),
                    Err(error) => eprintln!("vmm: a connection that is not the source's: {error}"),
                }
            }
            if lanes.len() == hello.lanes {
                return Ok(Some(Incoming { lanes, hello, listener }));
            }
            let refused = Note::Refused { why: "not all of the connections came".into() };
            // The source may have gone.
            lanes.iter_mut().for_each(|lane| drop(refused.write(lane)));
        }
    }

    /// What the machine is made of, with `disks` for its disks: a source does not say which files are opened here.
    /// `memory` is what its memory is to be.
    pub(crate) fn shape(
        &mut self,
        disks: &[DiskConfig],
        memory: &MemoryConfig,
    ) -> Result<Shape, MigrateError> {
        let shape = self.fitting(disks, memory);
        if let Err(error) = &shape {
            self.refuse(error);
        }
        shape
    }

    /// Tells the source why its machine cannot be taken.
    pub(crate) fn refuse(&mut self, why: &dyn std::error::Error) {
        let note = Note::Refused { why: why.to_string() };
        // It may have gone, or know already.
        self.lanes.iter_mut().for_each(|lane| drop(note.write(lane)));
    }

    fn fitting(&self, disks: &[DiskConfig], memory: &MemoryConfig) -> Result<Shape, MigrateError> {
        if self.hello.postcopy && !takes_postcopy(memory) {
            return Err(MigrateError::NoPostcopy);
        }
        let theirs = &self.hello.shape.disks;
        let readonly = |disks: &[DiskConfig]| disks.iter().map(|disk| disk.readonly).collect::<Vec<_>>();
        if readonly(theirs) != readonly(disks) {
            return Err(MigrateError::Disks { theirs: theirs.clone() });
        }
        Ok(Shape { disks: disks.to_vec(), ..self.hello.shape.clone() })
    }

    /// Takes the machine in, whose memory is empty, and starts it when it has been given away. Whatever fails before that,
    /// the guest is the source's, and has not run here.
    pub(crate) fn receive(
        mut self,
        machine: &Machine,
        signals: &Signals,
    ) -> Result<Option<Filling>, MigrateError> {
        let cancel = Cancel::default();
        for lane in &self.lanes {
            cancel.watch(lane).map_err(MigrateError::System)?;
        }
        let done = EventFd::new(0).map_err(MigrateError::System)?;
        let outcome = thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                // A signal stays for whoever handles it afterwards.
                if let Ok(Some(0)) = first_of(&[signals.as_raw_fd(), done.as_raw_fd()], None) {
                    cancel.cancel();
                }
            });
            let outcome = self.take_in(machine);
            cancel.too_late();
            let _ = done.write(1);
            let _ = watcher.join();
            outcome
        });
        match outcome {
            Ok(None) => Ok(None),
            Ok(Some((rest, server))) => {
                Filling::start(rest, server, self.listener).map(Some).map_err(MigrateError::System)
            }
            Err(error) => {
                self.refuse(&error);
                Err(error)
            }
        }
    }

    fn take_in(&mut self, machine: &Machine) -> Result<Option<Later>, MigrateError> {
        for lane in &mut self.lanes {
            Note::Welcome.write(lane)?;
        }
        let ram = machine.ram();
        let into = Into::new(self.hello.id, ram);
        let absorbed: Vec<Result<(), MigrateError>> = thread::scope(|scope| {
            let into = &into;
            let absorb = |lane: &mut Lane| {
                let absorbed = into.absorb(lane);
                if let Err(error) = &absorbed {
                    // At once, while the others still hear: the source may know already, or be gone.
                    let _ = Note::Refused { why: error.to_string() }.write(lane);
                    lane.cut();
                }
                absorbed
            };
            let threads: Vec<_> =
                self.lanes.iter_mut().map(|lane| scope.spawn(move || absorb(lane))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        absorbed.into_iter().collect::<Result<(), _>>()?;
        let Into { slots, said, .. } = into;
        let Said { parts, missing } = said.into_inner().unwrap_or_else(PoisonError::into_inner);
        let state = parts.finish(self.hello.shape.cpus)?;
        machine.give_state(&state).map_err(|error| MigrateError::Machine(error.to_string()))?;
        let mut rest = None;
        if takes_postcopy(&ram.config()) {
            // What came before and was written since is the source's again; and where a page of a block came, the others
            // may be there as well, as parts of a huge page of zeros.
            let missing = postcopy::whole_blocks(missing, &slots);
            for range in &missing {
                ram.discard(*range).map_err(MigrateError::System)?;
            }
            let lanes = if missing.is_empty() { Vec::new() } else { self.lanes.split_off(1) };
            let pages = Arc::new(Rest::new(slots, missing, lanes, self.hello.id));
            let source = Arc::clone(&pages) as Arc<dyn PageSource>;
            let server =
                machine.serve_faults(source).map_err(|error| MigrateError::Machine(error.to_string()))?;
            rest = Some((pages, server));
        } else if !missing.is_empty() {
            return Err(MigrateError::NoPostcopy);
        }
        let lane = &mut self.lanes[0];
        Note::Ready.write(lane)?;
        Note::expect(lane, &Note::Go, "word that the machine is given away")?;
        // It is ours now, whatever becomes of the connection.
        take_disks(machine).map_err(|error| MigrateError::Machine(error.to_string()))?;
        machine.start().map_err(|error| MigrateError::Machine(error.to_string()))?;
        let _ = Note::Running.write(lane);
        if let Some((rest, _)) = &rest {
            rest.begin(self.lanes.remove(0));
        }
        Ok(rest.filter(|(rest, _)| !rest.is_empty()))
    }
}

/// What comes when the machine runs, and who brings it.
type Later = (Arc<Rest>, Arc<Server>);

/// Whether the memory can be had page by page from elsewhere.
fn takes_postcopy(memory: &MemoryConfig) -> bool {
    memory.fault == Faults::Uffd && !memory.shared && memory.huge.hugetlb_shift().is_none()
}

/// How long who looks whether a disk is free may keep it from being taken.
const FOR_DISKS: Duration = Duration::from_secs(1);

/// Takes the disks, which the source has left.
fn take_disks(machine: &Machine) -> Result<(), DiskError> {
    let deadline = Instant::now() + FOR_DISKS;
    loop {
        match machine.take_disks() {
            Err(DiskError::Locked { .. }) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            taken => return taken,
        }
    }
}

/// Waits for a connection. False: a signal came, or the time is up.
fn waited(listener: &Listener, signals: &Signals, time: Option<Duration>) -> io::Result<bool> {
    let Some(fd) = listener.raw_fd() else { return Ok(true) };
    Ok(first_of(&[signals.as_raw_fd(), fd], time)? == Some(1))
}

/// Which of `fds` is readable, the first one first; `None` when the time is up.
fn first_of(fds: &[RawFd], time: Option<Duration>) -> io::Result<Option<usize>> {
    let epoll = Epoll::new()?;
    for (index, fd) in fds.iter().enumerate() {
        epoll.ctl(ControlOperation::Add, *fd, EpollEvent::new(EventSet::IN, index as u64))?;
    }
    let time = time.map_or(-1, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
    let mut events = [EpollEvent::default(); 4];
    loop {
        match epoll.wait(time, &mut events) {
            Ok(count) => return Ok(events[..count].iter().map(|event| event.data() as usize).min()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Hears what a connection is: the first of a migration, or the one that is `due`. Who is wrong is told.
fn greeted(mut lane: Lane, due: Option<(StreamId, usize)>) -> Result<(Lane, Hello), NoteError> {
    lane.set_patience(Some(FOR_A_HELLO))?;
    let hello = match Note::read(&mut lane)? {
        Note::Hello(hello) => *hello,
        note => return Err(NoteError::Unexpected { said: format!("{note:?}"), due: "a hello" }),
    };
    let why = if hello.version.0 != VERSION.0 {
        Some(format!("it speaks version {} of the protocol, and this is {}", hello.version.0, VERSION.0))
    } else if hello.lanes == 0 || hello.lanes > MAX_CONNECTIONS {
        Some(format!("{} connections: there can be 1 to {MAX_CONNECTIONS}", hello.lanes))
    } else if (hello.id, hello.lane) != due.unwrap_or((hello.id, 0)) {
        Some("it is a connection of another migration, or out of order".into())
    } else {
        None
    };
    if let Some(why) = why {
        Note::Refused { why: why.clone() }.write(&mut lane)?;
        return Err(NoteError::Refused(why));
    }
    lane.set_patience(Some(super::lane::PATIENCE))?;
    Ok((lane, hello))
}

/// What the connections' logs are read into.
struct Into<'a> {
    id: StreamId,
    ram: &'a Ram,
    slots: Vec<SlotInfo>,
    /// Pages that are not as they were made.
    written: DirtyBitmap,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    parts: Parts,
    missing: Vec<PageRange>,
}

impl Into<'_> {
    /// Into `ram`, which is as it was made.
    fn new(id: StreamId, ram: &Ram) -> Into<'_> {
        Into {
            id,
            ram,
            slots: dump::slots(ram),
            written: DirtyBitmap::new((ram.config().size / PAGE_SIZE) as usize),
            said: Mutex::default(),
        }
    }

    /// Reads a connection's log to its end, and nothing behind it.
    fn absorb(&self, lane: &mut Lane) -> Result<(), MigrateError> {
        let mut log = LogReader::new(lane)?;
        let header = log.header();
        let same = header.slots.iter().map(SlotInfo::frames).eq(self.slots.iter().map(SlotInfo::frames));
        if header.id != self.id || !header.contents || !same {
            return Err(MigrateError::OtherLog);
        }
        let memory = self.ram.mem();
        let failed = |error: GuestMemoryError| MigrateError::System(io::Error::other(error));
        while let Some(event) = log.read()? {
            match event {
                Event::Ahead(spans) => {
                    spans.iter().for_each(|span| self.written.set_range(self.place(span.range)));
                    log.contents(|lane, spans| lane.receive(memory, spans.iter().map(|span| span.range)))?;
                }
                Event::Pages(range, contents) => {
                    self.written.set_range(self.place(range));
                    memory.write_slice(contents, GuestAddress(range.start.gpa().0)).map_err(failed)?;
                }
                Event::Zero(spans) => {
                    for range in spans.iter().map(|span| span.range) {
                        // What nobody wrote is zeros already.
                        let written = |(_, page): &(Gfn, usize)| self.written.get(*page);
                        for (gfn, _) in range.iter().zip(self.place(range)).filter(written) {
                            let to = GuestAddress(gfn.gpa().0);
                            memory.write_slice(&[0; PAGE_BYTES], to).map_err(failed)?;
                        }
                    }
                }
                Event::State { name: postcopy::MISSING, bytes } => {
                    let ranges = postcopy::ranges(bytes, &self.slots).ok_or(MigrateError::OtherLog)?;
                    self.said().missing.extend(ranges);
                }
                Event::State { name, bytes } => self.said().parts.add(name, bytes)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the pages of `range`, which the log's slots have, come in the row of all pages.
    fn place(&self, range: PageRange) -> Range<usize> {
        postcopy::place(&self.slots, range).map_or(0..0, |first| first..first + range.pages as usize)
    }
}

/// What a destination does with one connection, and without a machine, down to the memory.
#[cfg(any(test, fuzzing))]
pub(crate) fn rehearse(stream: UnixStream, ram: &Ram) -> Result<(), MigrateError> {
    let (mut lane, hello) = greeted(Lane::unix(stream).map_err(MigrateError::System)?, None)?;
    Note::Welcome.write(&mut lane)?;
    let into = Into::new(hello.id, ram);
    into.absorb(&mut lane)?;
    let Said { parts, .. } = into.said.into_inner().unwrap_or_else(PoisonError::into_inner);
    parts.finish(hello.shape.cpus)?;
    Ok(())
}

/// The destination of so many connections, down to the memory.
#[cfg(test)]
pub(super) fn absorb_all(listener: &Listener, connections: usize, ram: &Ram) {
    let mut due = None;
    let mut lanes = Vec::new();
    for _ in 0..connections {
        let (lane, hello) = greeted(listener.accept().unwrap(), due).unwrap();
        lanes.push(lane);
        due = Some((hello.id, lanes.len()));
    }
    let into = Into::new(due.unwrap().0, ram);
    thread::scope(|scope| {
        for mut lane in lanes {
            Note::Welcome.write(&mut lane).unwrap();
            let into = &into;
            scope.spawn(move || into.absorb(&mut lane).unwrap());
        }
    });
}
