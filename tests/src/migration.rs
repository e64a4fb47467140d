//! A network between two ends of a migration that breaks where a test wants it to.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde_json::Value;

use crate::conformance::wait_until;
use crate::sys;

/// A TCP address of this host that nobody listens at.
///
/// # Panics
/// When the system has none.
pub fn free_tcp() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("tcp:{}", listener.local_addr().unwrap())
}

/// Something that goes over a connection, as far as a [`Proxy`] knows the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the destination: a connection begins.
    Hello,
    /// To the source.
    Welcome,
    /// To the destination: the head of an epoch, all of memory being number 0.
    Epoch(u64),
    /// To the destination: the first contents in that epoch.
    Pages(u64),
    /// To the destination: the first part of the machine's state.
    State,
    /// To the destination: the log's end.
    End,
    /// To the source.
    Ready,
    /// To the destination.
    Go,
    /// To the source.
    Running,
    /// To the source, after a switch to postcopy: a request for pages, from 0 on each connection.
    Request(u64),
    /// To the destination, after such a switch: something of what was asked for.
    Answer(u64),
}

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends before it goes through.
    Cut,
    /// The connection ends in the middle of it.
    Halve,
    /// Neither it nor anything else goes through from now on, either way.
    Silence,
    /// It waits until the test [goes on](Proxy::go_on).
    Hold,
    /// A bit of it changes.
    Flip,
    /// This process is killed before it goes through.
    KillBefore(u32),
    /// This process is killed when it has gone through.
    KillAfter(u32),
}

/// A network between a source and a destination's socket.
pub struct Proxy {
    path: PathBuf,
    shared: Arc<Shared>,
    _directory: tempfile::TempDir,
}

struct Shared {
    /// On which connection, where, and what.
    fault: Option<(usize, Step, Fault)>,
    fired: AtomicBool,
    silent: AtomicBool,
    goes_on: AtomicBool,
    /// Both ends of each connection, with its number.
    streams: Mutex<Vec<(usize, UnixStream)>>,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, Vec<(usize, UnixStream)>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, which: impl Fn(usize) -> bool) {
        for (_, stream) in self.streams().iter().filter(|(lane, _)| which(*lane)) {
            // One that has ended is fine.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.cut(|_| true);
    }
}

impl Proxy {
    /// A network to the socket at `to` that breaks once: on its connection number `lane`, at `step`, by `fault`.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn start(to: &Path, fault: Option<(usize, Step, Fault)>) -> Proxy {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy");
        let listener = UnixListener::bind(&path).unwrap();
        let shared = Arc::new(Shared {
            fault,
            fired: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            goes_on: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let (to, theirs) = (to.to_owned(), Arc::clone(&shared));
        // It ends with the process, or when nobody is there.
        thread::spawn(move || -> io::Result<()> {
            for lane in 0.. {
                let (source, destination) = (listener.accept()?.0, UnixStream::connect(&to)?);
                theirs.streams().extend([(lane, source.try_clone()?), (lane, destination.try_clone()?)]);
                let ends = [(source.try_clone()?, destination.try_clone()?), (destination, source)];
                for ((from, to), forth) in ends.into_iter().zip([true, false]) {
                    let shared = Arc::clone(&theirs);
                    thread::spawn(move || {
                        Way { from, to, lane, shared, inside: Inside::default() }.pump(forth);
                    });
                }
            }
            Ok(())
        });
        Proxy { path, shared, _directory: directory }
    }

    /// Where a source connects to.
    pub fn address(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Ends a [`Fault::Hold`].
    pub fn go_on(&self) {
        self.shared.goes_on.store(true, Ordering::Release);
    }

    /// Whether it broke.
    pub fn has_fired(&self) -> bool {
        self.shared.fired.load(Ordering::Acquire)
    }
}

/// Where in the protocol the bytes from a source are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inside {
    #[default]
    Notes,
    Prelude,
    Log {
        /// Epochs that have begun.
        epochs: u64,
        /// Since when there has been nothing that counts as a first.
        fresh: bool,
    },
    /// Requests and answers, of which there have been so many.
    Pages(u64),
}

/// The first bytes of a note.
const MAGIC: &[u8] = b"VMN1";

/// One way of a connection.
struct Way {
    from: UnixStream,
    to: UnixStream,
    lane: usize,
    shared: Arc<Shared>,
    inside: Inside,
}

impl Way {
    /// Forwards until one side ends.
    fn pump(mut self, forth: bool) {
        while let Ok((step, mut bytes)) = self.next(forth) {
            if self.shared.silent.load(Ordering::Acquire) {
                return;
            }
            let fault = self.shared.fault.filter(|&(lane, at, _)| lane == self.lane && Some(at) == step);
            if let Some((_, _, fault)) = fault {
                // Before anybody can notice.
                self.shared.fired.store(true, Ordering::Release);
                let sent = match fault {
                    Fault::Cut => {
                        self.shared.cut(|lane| lane == self.lane);
                        Ok(())
                    }
                    Fault::Halve => {
                        let sent = self.to.write_all(&bytes[..bytes.len() / 2]);
                        self.shared.cut(|lane| lane == self.lane);
                        sent
                    }
                    Fault::Silence => {
                        self.shared.silent.store(true, Ordering::Release);
                        return;
                    }
                    Fault::Hold => {
                        wait_until("the test goes on", || self.shared.goes_on.load(Ordering::Acquire));
                        self.to.write_all(&bytes)
                    }
                    Fault::Flip => {
                        let middle = bytes.len() / 2;
                        bytes[middle] ^= 1;
                        self.to.write_all(&bytes)
                    }
                    Fault::KillBefore(pid) => sys::kill(pid).and_then(|()| self.to.write_all(&bytes)),
                    Fault::KillAfter(pid) => self.to.write_all(&bytes).and_then(|()| sys::kill(pid)),
                };
                if sent.is_err() {
                    break;
                }
            } else if self.to.write_all(&bytes).is_err() {
                break;
            }
        }
        if !self.shared.silent.load(Ordering::Acquire) {
            // The other end may be gone as well.
            let _ = self.to.shutdown(Shutdown::Write);
        }
    }

    /// The next thing that goes this way, and what it is, if that is a step.
    fn next(&mut self, forth: bool) -> io::Result<(Option<Step>, Vec<u8>)> {
        match self.inside {
            Inside::Notes => {
                let (said, bytes) = self.note()?;
                let step = match said["note"].as_str().unwrap_or_default() {
                    "hello" => Some(Step::Hello),
                    "welcome" => Some(Step::Welcome),
                    "ready" => Some(Step::Ready),
                    "go" => Some(Step::Go),
                    "running" => Some(Step::Running),
                    _ => None,
                };
                self.inside = match step {
                    Some(Step::Hello) if said["again"] == true => Inside::Pages(0),
                    Some(Step::Hello) if forth => Inside::Prelude,
                    Some(Step::Go | Step::Running) => Inside::Pages(0),
                    // The first connection has more to say.
                    Some(Step::Welcome) if self.lane > 0 => Inside::Pages(0),
                    _ => self.inside,
                };
                Ok((step, bytes))
            }
            Inside::Pages(count) if forth => {
                let mut bytes = vec![0; 64 << 10];
                let came = self.from.read(&mut bytes)?;
                bytes.truncate(came);
                self.inside = Inside::Pages(count + 1);
                if came == 0 {
                    Err(io::ErrorKind::UnexpectedEof.into())
                } else {
                    Ok((Some(Step::Answer(count)), bytes))
                }
            }
            Inside::Pages(count) => {
                let mut bytes = vec![0; 8];
                self.from.read_exact(&mut bytes)?;
                if bytes.starts_with(MAGIC) {
                    return Ok((None, self.note_behind(bytes)?.1));
                }
                bytes.resize(16, 0);
                self.from.read_exact(&mut bytes[8..])?;
                self.inside = Inside::Pages(count + 1);
                Ok((Some(Step::Request(count)), bytes))
            }
            Inside::Prelude => {
                let mut bytes = vec![0; 16];
                self.from.read_exact(&mut bytes)?;
                self.inside = Inside::Log { epochs: 0, fresh: false };
                Ok((None, bytes))
            }
            Inside::Log { epochs, fresh } => {
                let bytes = self.record()?;
                let (step, inside) = match bytes[12] {
                    2 => (Some(Step::Epoch(epochs)), Inside::Log { epochs: epochs + 1, fresh: true }),
                    6 | 10 if fresh => (Some(Step::Pages(epochs - 1)), Inside::Log { epochs, fresh: false }),
                    7 => (None, Inside::Log { epochs, fresh: true }),
                    8 if fresh => (Some(Step::State), Inside::Log { epochs, fresh: false }),
                    9 if self.lane > 0 => (Some(Step::End), Inside::Pages(0)),
                    9 => (Some(Step::End), Inside::Notes),
                    _ => (None, self.inside),
                };
                self.inside = inside;
                Ok((step, bytes))
            }
        }
    }

    /// `VMN1`, a length, and JSON.
    fn note(&mut self) -> io::Result<(Value, Vec<u8>)> {
        let mut bytes = vec![0; 8];
        self.from.read_exact(&mut bytes)?;
        self.note_behind(bytes)
    }

    /// The same, when its first 8 bytes are here.
    fn note_behind(&mut self, mut bytes: Vec<u8>) -> io::Result<(Value, Vec<u8>)> {
        let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        bytes.resize(8 + length, 0);
        self.from.read_exact(&mut bytes[8..])?;
        Ok((serde_json::from_slice(&bytes[8..])?, bytes))
    }

    /// A record of a log, as its module describes it.
    fn record(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 24];
        self.from.read_exact(&mut bytes)?;
        let length = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
        bytes.resize(24 + length, 0);
        self.from.read_exact(&mut bytes[24..])?;
        Ok(bytes)
    }
}
