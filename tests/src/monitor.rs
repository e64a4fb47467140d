//! A monitor under test: a process with a control socket, and what can be asked of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use vmm::machine::open_kvm;

use crate::conformance::{PATIENCE, wait_until};
use crate::{cargo, skip, sys};

/// Whether this host has no KVM, in which case `test` is skipped, and says so.
pub fn skipped(test: &str) -> bool {
    open_kvm().inspect_err(|error| skip::skip(test, &error.to_string())).is_err()
}

/// What a command said.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// No `vmm` of a test lives for longer: one that hangs is an error, and not a run without an end.
const LIFETIME: Duration = Duration::from_secs(600);

/// The `vmm` command, without standard input.
///
/// # Panics
/// When it cannot be built.
pub fn vmm() -> Command {
    let mut command = Command::new(cargo::vmm_binary().expect("vmm can be built"));
    sys::end_after(command.stdin(Stdio::null()), LIFETIME);
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
    /// Starts `vmm` with `args`, the verb `run` or `restore` being the first. Short epochs, JSON lines to a file, no end.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn start(args: &[&str]) -> Monitor {
        Monitor::start_in(tempfile::tempdir().unwrap(), args)
    }

    /// The same, and returns when it has epochs.
    ///
    /// # Panics
    /// When it has none.
    pub fn observing(args: &[&str]) -> Monitor {
        let mut monitor = Monitor::start(args);
        monitor.wait_for_epochs();
        monitor
    }

    /// Returns when it has epochs.
    ///
    /// # Panics
    /// When it has none.
    pub fn wait_for_epochs(&mut self) {
        wait_until("it has epochs", || {
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended: {}", self.stderr());
            !self.get("/dirty")["last"].is_null()
        });
    }

    fn start_in(directory: tempfile::TempDir, args: &[&str]) -> Monitor {
        let file = |name: &str| File::create(directory.path().join(name)).unwrap();
        let child = vmm()
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
        let mut monitor = Monitor::start_in(directory, &[&["run", "--incoming", address], args].concat());
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

    /// A file of its own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The process.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
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

    /// Sends bytes to the control socket, and returns what comes back to its end; nothing if nobody is there.
    pub fn raw(&self, request: &[u8]) -> Vec<u8> {
        let mut answer = Vec::new();
        if let Ok(mut stream) = UnixStream::connect(self.socket()) {
            // A server that has heard enough closes its side.
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let _ = stream.write_all(request);
            let _ = stream.read_to_end(&mut answer);
        }
        answer
    }

    /// Asks over the control socket: status, or 0 if nobody is there, the answer's body, and its type.
    pub fn request(&self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>, String) {
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = self.raw(&[head.as_bytes(), body].concat());
        let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
            return (0, Vec::new(), String::new());
        };
        let head = text(&answer[..end]).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
        (status, answer[end + 4..].to_vec(), kind.to_owned())
    }

    /// Asks with JSON, or without if that is null, and is answered in JSON.
    pub fn call(&self, method: &str, target: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer, _) = self.request(method, target, body.as_bytes());
        (status, serde_json::from_slice(&answer).unwrap_or_default())
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

    /// What Ctrl-C does.
    ///
    /// # Panics
    /// When it has gone already.
    pub fn interrupt(&self) {
        sys::signal(&self.child, libc::SIGINT).unwrap();
    }

    /// `vmm snapshot` of its machine.
    pub fn snapshot(&self, path: &Path, args: &[&str]) -> Command {
        let mut command = vmm();
        command.args(["snapshot", "--json", "--api-socket"]).arg(self.socket()).arg(path).args(args);
        command
    }

    /// Takes a snapshot, and returns the report.
    ///
    /// # Panics
    /// When there is none.
    pub fn take(&self, path: &Path, args: &[&str]) -> Value {
        let output = self.snapshot(path, args).output().unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stderr), self.stderr());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Takes none, and returns why.
    ///
    /// # Panics
    /// When there is one.
    pub fn take_none(&self, path: &Path, args: &[&str]) -> String {
        let output = self.snapshot(path, args).output().unwrap();
        assert!(!output.status.success());
        text(&output.stderr)
    }

    /// `vmm dirty` with `args`.
    pub fn dirty(&self, args: &[&str]) -> Output {
        vmm().args(["dirty", "--api-socket"]).arg(self.socket()).args(args).output().unwrap()
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
        self.interrupt();
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
