//! One connection of a migration: bytes both ways, whatever carries them.
//!
//! What is small is collected, so that it does not cost a system call each time; what is large goes from memory to memory,
//! and from huge pages without a copy at this end ([`splice`](crate::sys::splice)). What is collected leaves before anything
//! is waited for.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dirty_track::addr::PageRange;
use socket2::SockRef;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::tls::{DestinationTls, Secured, SourceTls, TlsError};
use super::{Address, MigrateConfig};
use crate::memory::GuestRam;
use crate::sys::guest_io;
use crate::sys::splice::Splice;

/// How long the other side may neither take nor give anything before it counts as gone.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// From so many bytes on it pays to send and receive without a copy.
const LARGE: usize = 64 << 10;

/// So many bytes are collected.
const COLLECTED: usize = 256 << 10;

/// So many are taken at most before it is known what they are: the heads of any record, and few contents, which are copied
/// once more then.
const AHEAD: usize = 8 << 10;

/// Bytes that a Unix socket may hold. With the default (net.core.wmem_default, 208 KiB) its ends wait for each other all the
/// time: a bare loop that sends 1 GiB without a copy takes three times as long.
const ON_THEIR_WAY: usize = 2 << 20;

/// How long a connection may take to say what it is.
pub(super) const FOR_A_HELLO: Duration = Duration::from_secs(5);

/// How long a command may go on after the end of its input.
const FOR_A_COMMAND: Duration = Duration::from_millis(500);

/// A connection. Reads and writes that get nowhere for a while fail.
#[derive(Debug)]
pub(super) struct Lane {
    carrier: Carrier,
    /// Where this end sends memory.
    splice: Option<Splice>,
    sent: u64,
    /// Small things that are yet to leave.
    out: Vec<u8>,
    /// What came with other things, from `taken` to `filled`.
    came: Vec<u8>,
    taken: usize,
    filled: usize,
    /// What is at the other end, where that is a command; dropped after its socket.
    _command: Option<Running>,
}

#[derive(Debug)]
enum Carrier {
    Unix(UnixStream),
    Tcp(TcpStream),
    /// The stream itself, and what is over it.
    Tls(TcpStream, Box<dyn Secured>),
}

impl Carrier {
    /// What carries the bytes as they are.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Carrier::Unix(stream) => Some(stream.as_fd()),
            Carrier::Tcp(stream) => Some(stream.as_fd()),
            Carrier::Tls(..) => None,
        }
    }
}

/// A command that runs as long as this lives.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has heard the end of its input by now, and may still have to pass on what came before.
        let deadline = Instant::now() + FOR_A_COMMAND;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        // It has ended, or is of no use any more.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where a source connects to, and how; again and again if need be.
#[derive(Clone, Debug)]
pub(super) struct Way {
    to: Address,
    tls: Option<SourceTls>,
}

impl Way {
    pub(super) fn of(config: &MigrateConfig) -> Result<Way, TlsError> {
        let tls = match (&config.tls_dir, &config.to) {
            (Some(directory), Address::Tcp(address)) => Some(SourceTls::new(directory, address)?),
            _ => None,
        };
        Ok(Way { to: config.to.clone(), tls })
    }

    /// Connects.
    pub(super) fn connect(&self) -> io::Result<Lane> {
        let lane = Lane::connect(&self.to, self.tls.as_ref())?;
        // Without one, memory is copied.
        Ok(Lane { splice: Splice::new().ok(), ..lane })
    }

    /// Whether a connection that broke off is not to be had again.
    pub(super) fn is_once(&self) -> bool {
        matches!(self.to, Address::Exec(_))
    }
}

impl Lane {
    /// Connects to `address`; with `tls` if that is TCP.
    fn connect(address: &Address, tls: Option<&SourceTls>) -> io::Result<Lane> {
        match address {
            Address::Unix(path) => Lane::unix(UnixStream::connect(path)?),
            Address::Tcp(address) => {
                let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, PATIENCE) {
                        Ok(stream) => {
                            return Lane::tcp(stream, |stream| tls.map(|tls| tls.secure(stream)).transpose());
                        }
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
            Address::Exec(command) => Lane::exec(command),
        }
    }

    fn over(carrier: Carrier) -> Lane {
        Lane {
            carrier,
            splice: None,
            sent: 0,
            out: Vec::new(),
            came: Vec::new(),
            taken: 0,
            filled: 0,
            _command: None,
        }
    }

    /// Bytes that were sent.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    pub(super) fn unix(stream: UnixStream) -> io::Result<Lane> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // The kernel gives as much of it as it may.
        let _ = SockRef::from(&stream).set_send_buffer_size(ON_THEIR_WAY);
        Ok(Lane::over(Carrier::Unix(stream)))
    }

    fn tcp(
        stream: TcpStream,
        secure: impl FnOnce(TcpStream) -> io::Result<Option<Box<dyn Secured>>>,
    ) -> io::Result<Lane> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Lane::over(match secure(stream.try_clone()?)? {
            Some(secured) => Carrier::Tls(stream, secured),
            None => Carrier::Tcp(stream),
        }))
    }

    /// A command has a socket for its input and output: a pipe's other end could keep this one waiting for ever.
    fn exec(command: &str) -> io::Result<Lane> {
        let (ours, theirs) = UnixStream::pair()?;
        let (input, output) = (OwnedFd::from(theirs.try_clone()?), OwnedFd::from(theirs));
        let child = Command::new("sh").args(["-c", command]).stdin(input).stdout(output).spawn()?;
        Ok(Lane { _command: Some(Running(child)), ..Lane::unix(ours)? })
    }

    /// How long reading may take without a byte; `None`: for ever.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match &self.carrier {
            Carrier::Unix(stream) => stream.set_read_timeout(patience),
            Carrier::Tcp(stream) | Carrier::Tls(stream, _) => stream.set_read_timeout(patience),
        }
    }

    /// Sends what is in `ranges`, each of which is in one memslot.
    pub(super) fn send(&mut self, ram: &GuestRam, ranges: &[PageRange]) -> io::Result<()> {
        let slices = ranges.iter().map(|range| slice(ram, *range)).collect::<io::Result<Vec<_>>>()?;
        self.sent += slices.iter().map(|memory| memory.len() as u64).sum::<u64>();
        let Some(socket) = self.carrier.socket() else {
            slices.iter().for_each(|memory| collect(&mut self.out, memory));
            return self.leave_if_full();
        };
        let mut spliced = Vec::with_capacity(slices.len());
        spliced.extend(slices.iter().map(|memory| match &mut self.splice {
            Some(splice) => splice.pays(memory),
            None => false,
        }));
        let mut rest = &slices[..];
        for run in spliced.chunk_by(PartialEq::eq) {
            let (now, later) = rest.split_at(run.len());
            rest = later;
            let bytes: usize = now.iter().map(VolatileSlice::len).sum();
            match &self.splice {
                _ if bytes < LARGE => now.iter().for_each(|memory| collect(&mut self.out, memory)),
                Some(splice) if run[0] => {
                    guest_io::send(socket, &self.out, &now[..0])?;
                    splice.send(now, socket)?;
                    self.out.clear();
                }
                _ => {
                    guest_io::send(socket, &self.out, now)?;
                    self.out.clear();
                }
            }
        }
        self.leave_if_full()
    }

    /// Receives what is in `ranges`, each of which is in one memslot.
    pub(super) fn receive(
        &mut self,
        ram: &GuestRam,
        ranges: impl Iterator<Item = PageRange>,
    ) -> io::Result<()> {
        let mut rest = Vec::new();
        for range in ranges {
            let memory = slice(ram, range)?;
            let here = memory.len().min(self.filled - self.taken);
            memory.copy_from(&self.came[self.taken..][..here]);
            self.taken += here;
            rest.extend(memory.offset(here).ok().filter(|memory| !memory.is_empty()));
        }
        self.leave()?;
        if let Some(socket) = self.carrier.socket() {
            return guest_io::receive(socket, &rest);
        }
        for memory in rest {
            let mut copy = vec![0; memory.len()];
            self.stream().read_exact(&mut copy)?;
            memory.copy_from(&copy);
        }
        Ok(())
    }

    /// Sends what was collected.
    fn leave(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            // What fails here is not sent a second time.
            let out = std::mem::take(&mut self.out);
            self.stream().write_all(&out)?;
            self.out = out;
            self.out.clear();
        }
        Ok(())
    }

    fn leave_if_full(&mut self) -> io::Result<()> {
        if self.out.len() >= COLLECTED { self.leave() } else { Ok(()) }
    }

    fn wait_for_some(&mut self) -> io::Result<usize> {
        self.leave()?;
        let mut came = std::mem::take(&mut self.came);
        came.resize(AHEAD, 0);
        let read = loop {
            match self.stream().read(&mut came) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        (self.came, self.taken, self.filled) = (came, 0, *read.as_ref().unwrap_or(&0));
        read
    }

    fn stream(&mut self) -> &mut dyn Stream {
        match &mut self.carrier {
            Carrier::Unix(stream) => stream,
            Carrier::Tcp(stream) => stream,
            Carrier::Tls(_, stream) => stream,
        }
    }

    /// Ends it: what was sent arrives, and nothing else is taken.
    pub(super) fn cut(&self) {
        // Without a descriptor to spare it ends when it is dropped.
        if let Ok(breaker) = self.breaker() {
            breaker.cut();
        }
    }

    /// What breaks it off from another thread.
    pub(super) fn breaker(&self) -> io::Result<Breaker> {
        Ok(match &self.carrier {
            Carrier::Unix(stream) => Breaker::Unix(stream.try_clone()?),
            Carrier::Tcp(stream) | Carrier::Tls(stream, _) => Breaker::Tcp(stream.try_clone()?),
        })
    }
}

fn collect(out: &mut Vec<u8>, memory: &VolatileSlice<'_, impl BitmapSlice>) {
    let start = out.len();
    out.resize(start + memory.len(), 0);
    memory.copy_to(&mut out[start..]);
}

fn slice(ram: &GuestRam, range: PageRange) -> io::Result<VolatileSlice<'_, impl BitmapSlice>> {
    ram.get_slice(GuestAddress(range.start.gpa().0), range.bytes() as usize).map_err(io::Error::other)
}

/// Bytes both ways.
trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

impl Read for Lane {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.filled == self.taken {
            if to.len() >= AHEAD {
                self.leave()?;
                return self.stream().read(to);
            }
            self.wait_for_some()?;
        }
        let part = to.len().min(self.filled - self.taken);
        to[..part].copy_from_slice(&self.came[self.taken..][..part]);
        self.taken += part;
        Ok(part)
    }
}

impl Write for Lane {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let sent = if from.len() < LARGE {
            self.out.extend_from_slice(from);
            self.leave_if_full()?;
            from.len()
        } else {
            self.leave()?;
            self.stream().write(from)?
        };
        self.sent += sent as u64;
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.leave()?;
        self.stream().flush()
    }
}

/// Breaks a lane off: whoever reads or writes there fails.
#[derive(Debug)]
pub(super) enum Breaker {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Breaker {
    fn cut(&self) {
        // One that is gone needs no breaking.
        match self {
            Breaker::Unix(stream) => drop(stream.shutdown(Shutdown::Both)),
            Breaker::Tcp(stream) => drop(stream.shutdown(Shutdown::Both)),
        }
    }
}

/// Breaks all lanes of a migration off, those to come as well, until it is too late for that.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<Mutex<Cancelling>>);

#[derive(Debug, Default)]
struct Cancelling {
    cancelled: bool,
    too_late: bool,
    abandoned: bool,
    breakers: Vec<Breaker>,
}

impl Cancel {
    fn lock(&self) -> MutexGuard<'_, Cancelling> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on everything about this migration fails. False: it is too late.
    pub(crate) fn cancel(&self) -> bool {
        let mut inner = self.lock();
        inner.abandoned = true;
        if !inner.too_late {
            inner.cancelled = true;
            inner.breakers.iter().for_each(Breaker::cut);
        }
        inner.cancelled
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Whether somebody wanted it to end, late as it may have been.
    pub(super) fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }

    /// From now on it cannot be cancelled. False: it was.
    pub(super) fn too_late(&self) -> bool {
        let mut inner = self.lock();
        inner.too_late = true;
        !inner.cancelled
    }

    /// Breaks `lane` off as well, when it comes to that.
    pub(super) fn watch(&self, lane: &Lane) -> io::Result<()> {
        let breaker = lane.breaker()?;
        let mut inner = self.lock();
        if inner.cancelled {
            breaker.cut();
        }
        inner.breakers.push(breaker);
        Ok(())
    }
}

/// Where a destination waits.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener, Option<DestinationTls>),
    /// It has one connection, and that is there from the beginning.
    Exec(String),
}

impl Listener {
    /// Waits at `address`; with `tls` if that is TCP.
    pub(super) fn bind(address: &Address, tls: Option<DestinationTls>) -> io::Result<Listener> {
        Ok(match address {
            Address::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                // Who may connect may give this process a machine to run.
                fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
                Listener::Unix(listener, path.clone())
            }
            Address::Tcp(address) => Listener::Tcp(TcpListener::bind(address)?, tls),
            Address::Exec(command) => Listener::Exec(command.clone()),
        })
    }

    /// Waits for the next connection.
    pub(super) fn accept(&self) -> io::Result<Lane> {
        match self {
            Listener::Unix(listener, _) => Lane::unix(listener.accept()?.0),
            Listener::Tcp(listener, tls) => Lane::tcp(listener.accept()?.0, |stream| {
                stream.set_read_timeout(Some(FOR_A_HELLO))?;
                tls.as_ref().map(|tls| tls.secure(stream)).transpose()
            }),
            Listener::Exec(command) => Lane::exec(command),
        }
    }

    /// From now on waiting for a connection ends after `patience`, with an error.
    pub(super) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        // It is for accept(2), too.
        self.fd().map_or(Ok(()), |fd| SockRef::from(&fd).set_read_timeout(Some(patience)))
    }

    /// What becomes readable with a connection; `None` where it is there already.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Listener::Unix(listener, _) => Some(listener.as_fd()),
            Listener::Tcp(listener, _) => Some(listener.as_fd()),
            Listener::Exec(_) => None,
        }
    }

    pub(super) fn raw_fd(&self) -> Option<RawFd> {
        self.fd().map(|fd| fd.as_raw_fd())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // Somebody may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
}

/// A socket at which nobody listens was left behind by a process that was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if metadata.file_type().is_socket() && UnixStream::connect(path).is_err() {
        return fs::remove_file(path);
    }
    // Binding says that it is in use.
    Ok(())
}
