//! The destination: it waits for a machine, takes it in, and runs it when it is told to.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::{PAGE_SIZE, PageRange};
use dirty_track::bitmap::DirtyBitmap;
use dirty_track::log::{Event, LogReader, StreamId};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::lane::{Cancel, Lane, Listener};
use super::note::{Hello, Note, NoteError, VERSION};
use super::source::MAX_CONNECTIONS;
use super::{Address, MigrateError};
use crate::devices::virtio::disk::DiskConfig;
use crate::dump;
use crate::machine::Machine;
use crate::memory::Ram;
use crate::snapshot::Shape;
use crate::state::parts::Parts;
use crate::sys::signals::Signals;

/// How long a connection may take to say what it is.
const FOR_A_HELLO: Duration = Duration::from_secs(5);

/// How long the other connections may take after the first one.
const FOR_LANES: Duration = Duration::from_secs(10);

/// A source that has connected, and has not been answered yet.
#[derive(Debug)]
pub(crate) struct Incoming {
    lanes: Vec<Lane>,
    hello: Hello,
    /// Nobody else can bring a machine as long as this is here.
    _listener: Listener,
}

impl Incoming {
    /// Waits for a source. `None`: a signal came first.
    pub(crate) fn wait(address: &Address, signals: &Signals) -> Result<Option<Incoming>, MigrateError> {
        let listen = |source| MigrateError::Listen { at: address.to_string(), source };
        let listener = Listener::bind(address).map_err(listen)?;
        loop {
            if !waited(&listener, signals, None).map_err(listen)? {
                return Ok(None);
            }
            let lane = listener.accept().map_err(listen)?;
            let (lane, hello) = match greeted(lane, None) {
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
                return Ok(Some(Incoming { lanes, hello, _listener: listener }));
            }
            let refused = Note::Refused { why: "not all of the connections came".into() };
            // The source may have gone.
            lanes.iter_mut().for_each(|lane| drop(refused.write(lane)));
        }
    }

    /// What the machine is made of, with `disks` for its disks: a source does not say which files are opened here.
    pub(crate) fn shape(&self, disks: &[DiskConfig]) -> Result<Shape, MigrateError> {
        let theirs = &self.hello.shape.disks;
        let readonly = |disks: &[DiskConfig]| disks.iter().map(|disk| disk.readonly).collect::<Vec<_>>();
        if readonly(theirs) != readonly(disks) {
            return Err(MigrateError::Disks { theirs: theirs.clone() });
        }
        Ok(Shape { disks: disks.to_vec(), ..self.hello.shape.clone() })
    }

    /// Takes the machine in, whose memory is empty, and starts it when it has been given away. Whatever fails before that, the guest is the source's, and has not run here.
    pub(crate) fn receive(mut self, machine: &Machine, signals: &Signals) -> Result<(), MigrateError> {
        let cancel = Cancel::default();
        for lane in &self.lanes {
            cancel.watch(lane).map_err(MigrateError::System)?;
        }
        let done = EventFd::new(0).map_err(MigrateError::System)?;
        let outcome = thread::scope(|scope| {
            // A signal stays for whoever handles it afterwards.
            let watcher = scope.spawn(|| match first_of(&[signals.as_raw_fd(), done.as_raw_fd()], None) {
                Ok(Some(0)) => drop(cancel.cancel()),
                _ => {}
            });
            let outcome = self.take_in(machine);
            cancel.too_late();
            let _ = done.write(1);
            let _ = watcher.join();
            outcome
        });
        if let Err(error) = &outcome
            && let Some(lane) = self.lanes.first_mut()
        {
            // The source may know already.
            let _ = Note::Refused { why: error.to_string() }.write(lane);
        }
        outcome
    }

    fn take_in(&mut self, machine: &Machine) -> Result<(), MigrateError> {
        for lane in &mut self.lanes {
            Note::Welcome.write(lane)?;
        }
        let ram = machine.ram();
        let written = DirtyBitmap::new((ram.config().size / PAGE_SIZE) as usize);
        let id = self.hello.id;
        let lanes = std::mem::take(&mut self.lanes);
        let parts = Mutex::new(Parts::default());
        let absorbed: Vec<Result<Lane, MigrateError>> = thread::scope(|scope| {
            let (written, parts) = (&written, &parts);
            let threads: Vec<_> = lanes
                .into_iter()
                .map(|lane| scope.spawn(move || absorb(lane, id, ram, written, parts)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        for lane in absorbed {
            self.lanes.push(lane?);
        }
        let parts = parts.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        let state = parts.finish(self.hello.shape.cpus)?;
        machine.give_state(&state).map_err(|error| MigrateError::Machine(error.to_string()))?;
        let lane = &mut self.lanes[0];
        Note::Ready.write(lane)?;
        Note::expect(lane, &Note::Go, "word that the machine is given away")?;
        // It is ours now, whatever becomes of the connection.
        machine.start().map_err(|error| MigrateError::Machine(error.to_string()))?;
        let _ = Note::Running.write(lane);
        Ok(())
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

/// Reads a connection's log to its end, and gives the connection back.
fn absorb(
    lane: Lane,
    id: StreamId,
    ram: &Ram,
    written: &DirtyBitmap,
    parts: &Mutex<Parts>,
) -> Result<Lane, MigrateError> {
    let mut log = LogReader::new(lane)?;
    let header = log.header();
    let slots = dump::slots(ram);
    let same = header.slots.iter().map(|slot| slot.frames()).eq(slots.iter().map(|slot| slot.frames()));
    if header.id != id || !header.contents || !same {
        return Err(MigrateError::OtherLog);
    }
    // Where the pages of a slot begin in `written`.
    let mut firsts = Vec::with_capacity(slots.len());
    let mut pages = 0;
    for slot in &slots {
        firsts.push((slot.frames(), pages));
        pages += slot.pages;
    }
    let bits = |range: PageRange| {
        let slot = firsts.iter().find(|(frames, _)| frames.contains(range.start));
        let first = slot.map_or(0, |(frames, first)| first + (range.start.0 - frames.start.0));
        first as usize..(first + range.pages) as usize
    };
    let written_to = |range: PageRange| written.set_range(bits(range));
    while let Some(event) = log.read_apart()? {
        match event {
            Event::Ahead(range) => {
                written_to(range);
                let to = GuestAddress(range.start.gpa().0);
                log.contents(|lane, bytes| lane.receive(ram.mem(), to, bytes))?;
            }
            Event::Pages(range, contents) => {
                written_to(range);
                let to = GuestAddress(range.start.gpa().0);
                ram.mem()
                    .write_slice(contents, to)
                    .map_err(|error| MigrateError::System(io::Error::other(error)))?;
            }
            Event::Zero(spans) => {
                for range in spans.iter().map(|span| span.range) {
                    for (gfn, bit) in range.iter().zip(bits(range)) {
                        // What nobody wrote is zeros already.
                        if written.get(bit) {
                            let to = GuestAddress(gfn.gpa().0);
                            ram.mem()
                                .write_slice(&[0; PAGE_SIZE as usize], to)
                                .map_err(|error| MigrateError::System(io::Error::other(error)))?;
                        }
                    }
                }
            }
            Event::State { name, bytes } => {
                parts.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).add(name, bytes)?;
            }
            _ => {}
        }
    }
    Ok(log.into_input())
}
