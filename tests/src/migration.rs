//! Two monitors, a machine that moves between them, and a network between them that breaks where a test wants it to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde_json::Value;

use crate::conformance::{PATIENCE, wait_until};
use crate::{cargo, sys};

/// The `vmm` command, without standard input.
///
/// # Panics
/// When it cannot be built.
pub fn vmm() -> Command {
    let mut command = Command::new(cargo::vmm_binary().expect("vmm can be built"));
    command.stdin(Stdio::null());
    command
}

/// A monitor with a control socket and a directory of its own. Dropping it kills it.
pub struct Monitor {
    child: Child,
    directory: tempfile::TempDir,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // One that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    /// Starts `vmm run` with `args`. Short epochs, JSON lines to a file.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn start(args: &[&str]) -> Monitor {
        Monitor::start_in(tempfile::tempdir().unwrap(), args)
    }

    fn start_in(directory: tempfile::TempDir, args: &[&str]) -> Monitor {
        let file = |name: &str| File::create(directory.path().join(name)).unwrap();
        let child = vmm()
            .arg("run")
            .args(args)
            .args(["--json", "--epoch", "50ms", "--duration", "0", "--api-socket"])
            .arg(directory.path().join("api"))
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .unwrap();
        Monitor { child, directory }
    }

    /// Starts one that waits at a socket of its own for a machine, and returns when it does.
    ///
    /// # Panics
    /// When it does not.
    pub fn waiting(args: &[&str]) -> Monitor {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix:{}", directory.path().join("incoming").display());
        Monitor::waiting_in(directory, &address, args)
    }

    /// The same, at `address`.
    ///
    /// # Panics
    /// When it does not.
    pub fn waiting_at(address: &str, args: &[&str]) -> Monitor {
        Monitor::waiting_in(tempfile::tempdir().unwrap(), address, args)
    }

    fn waiting_in(directory: tempfile::TempDir, address: &str, args: &[&str]) -> Monitor {
        let mut monitor = Monitor::start_in(directory, &[&["--incoming", address], args].concat());
        wait_until("somebody listens", || {
            assert!(monitor.child.try_wait().unwrap().is_none(), "it has ended: {}", monitor.stderr());
            listens(address)
        });
        monitor
    }

    /// Where it waits for a machine, unless told otherwise.
    pub fn incoming(&self) -> PathBuf {
        self.directory.path().join("incoming")
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("api")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it said to its user.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    /// The last line that it printed.
    ///
    /// # Panics
    /// When that is no JSON.
    pub fn summary(&self) -> Value {
        let lines = fs::read_to_string(self.directory.path().join("stdout")).unwrap();
        serde_json::from_str(lines.lines().last().unwrap_or("null")).unwrap()
    }

    /// Asks over the control socket; status 0 if nobody is there.
    pub fn call(&self, method: &str, target: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut answer = Vec::new();
        if let Ok(mut stream) = UnixStream::connect(self.socket()) {
            // A server that has heard enough closes its side.
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let _ = stream.write_all(request.as_bytes());
            let _ = stream.read_to_end(&mut answer);
        }
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    /// Asks for something that changes nothing.
    pub fn get(&self, target: &str) -> Value {
        self.call("GET", target, &Value::Null).1
    }

    /// The epoch that ends after the one that runs now.
    ///
    /// # Panics
    /// When there is none.
    pub fn next_epoch(&self) -> Value {
        let begun = self.get("/dirty")["last"]["epoch"].as_u64().unwrap_or(0) + 1;
        let mut last = Value::Null;
        wait_until("an epoch ends", || {
            last = self.get("/dirty")["last"].clone();
            last["epoch"].as_u64() > Some(begun)
        });
        last
    }

    /// Waits until the guest writes here, and holds what the tracker has seen of it against the guest's ledger.
    ///
    /// # Panics
    /// When the guest does not get on, or the ledger contradicts.
    pub fn assert_runs(&self, context: &str) {
        wait_until("the guest gets on", || {
            let epoch = self.next_epoch();
            epoch["ledger"]["wrote"].as_u64() > Some(0)
        });
        let totals = &self.get("/dirty")["totals"];
        assert_eq!((&totals["missed"], &totals["stray"]), (&0.into(), &0.into()), "{context}: {totals}");
        assert!(totals["checked"].as_u64() > Some(0), "{context}: {totals}");
    }

    /// Holds against it that no vCPU runs: nothing is written but what the monitor writes itself.
    ///
    /// # Panics
    /// When something is.
    pub fn assert_stands_still(&self, context: &str) {
        // What was written before it stood still is in an epoch that has ended.
        self.next_epoch();
        for _ in 0..3 {
            let epoch = self.next_epoch();
            assert_eq!(epoch["dirty_pages"], epoch["host_pages"], "{context}: {epoch}");
        }
    }

    /// `vmm migrate` of its machine.
    pub fn migrate(&self, to: &str, args: &[&str]) -> Child {
        let mut command = vmm();
        command.args(["migrate", "--json", "--api-socket"]).arg(self.socket()).arg(to).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The same, until it is over: its exit code, and the report or what it said instead.
    pub fn migrated(&self, to: &str, args: &[&str]) -> (Option<i32>, Value) {
        ended(self.migrate(to, args))
    }

    /// Waits for its end, and returns its exit code; `None` if it was killed.
    pub fn wait(&mut self) -> Option<i32> {
        wait_until("it ends", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }

    /// Ends it as Ctrl-C does; the guest looks at its memory once more.
    ///
    /// # Panics
    /// When anything about the guest was wrong.
    pub fn end_well(mut self, context: &str) {
        sys::signal(&self.child, libc::SIGINT).unwrap();
        let code = self.wait();
        let end = self.summary();
        let seen = (code, &end["missed"], &end["stray"], &end["guest_status"]);
        let good = (Some(0), &0.into(), &0.into(), &0.into());
        assert_eq!(seen, good, "{context}: {end} {}", self.stderr());
    }
}

/// How `vmm migrate` ended.
///
/// # Panics
/// When it cannot be waited for.
pub fn ended(migrate: Child) -> (Option<i32>, Value) {
    let Output { status, stdout, stderr } = migrate.wait_with_output().unwrap();
    let said = || Value::String(String::from_utf8_lossy(&stderr).into_owned());
    (status.code(), serde_json::from_slice(&stdout).unwrap_or_else(|_| said()))
}

/// Whether somebody waits at `address`; nobody can tell for a command.
fn listens(address: &str) -> bool {
    match address.split_once(':') {
        Some(("unix", path)) => {
            let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
            // A socket has its path before it listens; then it has this flag (net/unix/af_unix.c).
            table.lines().any(|line| line.ends_with(path) && line.contains(" 00010000 "))
        }
        Some(("tcp", rest)) => {
            let port: u16 = rest.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or(0);
            let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
            // Local address, remote address, state: 0A listens (Documentation/networking/proc_net_tcp.rst).
            table.contains(&format!(":{port:04X} 00000000:0000 0A"))
        }
        _ => true,
    }
}

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
}

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
                if forth && step == Some(Step::Hello) {
                    self.inside = Inside::Prelude;
                }
                Ok((step, bytes))
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
                    6 if fresh => (Some(Step::Pages(epochs - 1)), Inside::Log { epochs, fresh: false }),
                    7 => (None, Inside::Log { epochs, fresh: true }),
                    8 if fresh => (Some(Step::State), Inside::Log { epochs, fresh: false }),
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
