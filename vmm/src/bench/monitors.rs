//! Monitors as their users start them: this program, and QEMU if there is one, each with the same guest. Whatever is started
//! here ends with whoever holds it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::BenchError;
use crate::machine::open_kvm;
use crate::sys::signals;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A failure of `who`.
pub(super) fn failed(who: &str, why: impl ToString) -> BenchError {
    BenchError::Process { who: who.to_owned(), why: why.to_string() }
}

/// What can be started.
#[derive(Clone, Debug)]
pub(super) struct Monitors(Rc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    vmm: PathBuf,
    qemu: Result<PathBuf, String>,
    directory: TempDir,
    /// Rate of the time-stamp counter, which a guest that is to keep a rate has to know.
    tsc_khz: Option<u32>,
}

impl Deref for Monitors {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Monitors {
    /// Looks for them. `qemu` is where QEMU is, if not in the search path.
    pub(super) fn find(qemu: Option<&Path>) -> Result<Monitors, BenchError> {
        let system = |what| move |source| BenchError::System { what, source };
        let vmm = std::env::current_exe().map_err(system("find this program"))?;
        let directory =
            tempfile::Builder::new().prefix("vmm-bench").tempdir().map_err(system("make a directory"))?;
        fs::write(directory.path().join("guest"), guest::ELF).map_err(system("write the guest"))?;
        let qemu = qemu.unwrap_or(Path::new("qemu-system-x86_64"));
        let version = Command::new(qemu).arg("--version").stdin(Stdio::null()).output();
        let qemu = match version {
            Ok(output) if output.status.success() => Ok(qemu.to_owned()),
            Ok(output) => {
                Err(format!("{}: {}", qemu.display(), String::from_utf8_lossy(&output.stderr).trim()))
            }
            Err(error) => {
                Err(format!("{}: {error}: install it, or say where it is by --qemu", qemu.display()))
            }
        };
        let tsc_khz = || open_kvm().ok()?.create_vm().ok()?.create_vcpu(0).ok()?.get_tsc_khz().ok();
        Ok(Monitors(Rc::new(Inner { vmm, qemu, directory, tsc_khz: tsc_khz() })))
    }
}

impl Inner {
    /// Why there is no QEMU.
    pub(super) fn no_qemu(&self) -> Option<String> {
        self.qemu.as_ref().err().cloned()
    }

    /// Whether there is one.
    pub(super) fn has_qemu(&self) -> bool {
        self.qemu.is_ok()
    }

    /// A new directory for sockets and files, in memory if the system's temporary files are.
    pub(super) fn directory(&self) -> Result<TempDir, BenchError> {
        tempfile::tempdir_in(self.directory.path())
            .map_err(|source| BenchError::System { what: "make a directory", source })
    }

    /// What the guest has to be told besides its workload.
    pub(super) fn cmdline(&self, workload: &str) -> String {
        match self.tsc_khz {
            Some(khz) => format!("tsc_khz={khz} {workload}"),
            None => workload.to_owned(),
        }
    }

    /// This program.
    pub(super) fn vmm(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(&self.vmm);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// What a command of this program says in JSON.
    pub(super) fn ask(&self, args: &[&str]) -> Result<Value, BenchError> {
        let output = self
            .vmm(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .map_err(|error| failed("vmm", error))?;
        let said = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout).map_err(|_| failed("vmm", said.trim()))
    }

    /// QEMU's smallest machine, with so many MiB of memory, which are there from the start if `prealloc`.
    pub(super) fn qemu(
        &self,
        mib: u64,
        ring: bool,
        prealloc: bool,
        workload: &str,
    ) -> Result<Command, BenchError> {
        let qemu = self.qemu.as_ref().map_err(|why| failed("QEMU", why))?;
        let mut command = Command::new(qemu);
        command.args(["-M", "microvm,pit=off,rtc=off,memory-backend=ram", "-bios", "qboot.rom", "-smp", "1"]);
        command.args(["-cpu", "host,arch-capabilities=off"]);
        command.args(["-accel", if ring { "kvm,dirty-ring-size=4096" } else { "kvm" }]);
        let prealloc = if prealloc { "on" } else { "off" };
        command.arg("-m").arg(format!("{mib}M"));
        command.arg("-object").arg(format!("memory-backend-ram,id=ram,size={mib}M,prealloc={prealloc}"));
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.arg("-kernel").arg(self.directory.path().join("guest"));
        command.arg("-append").arg(self.cmdline(workload));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command)
    }
}

/// A process that ends with whoever holds it.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// From just before it was there.
    pub(super) began: Instant,
}

impl Process {
    /// Starts it; a Ctrl-C on the terminal is not for it.
    pub(super) fn start(command: &mut Command) -> Result<Process, BenchError> {
        command.process_group(0);
        let began = Instant::now();
        let who = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|error| failed(&who, error))?;
        Ok(Process { child, began })
    }

    /// What it prints, if that was [piped](Stdio::piped).
    pub(super) fn console(&mut self) -> Result<ChildStdout, BenchError> {
        self.child.stdout.take().ok_or_else(|| failed("a monitor", "it has no console"))
    }

    /// The same of standard error.
    pub(super) fn errors(&mut self) -> Result<std::process::ChildStderr, BenchError> {
        self.child.stderr.take().ok_or_else(|| failed("a monitor", "it has no console"))
    }

    /// MiB that it has in memory, without what is its guest's: a mapping that it made as large as that.
    pub(super) fn own_memory(&self, guest_mib: u64) -> Option<f64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).ok()?;
        let (mut own, mut is_ram) = (0, false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (name, value) = (words.next()?, words.next().and_then(|word| word.parse::<u64>().ok()));
            match (name, value) {
                // It comes before what is said of it.
                ("Size:", Some(kib)) => is_ram = kib >= guest_mib << 10,
                ("Rss:", Some(kib)) if !is_ram => own += kib,
                _ => {}
            }
        }
        Some(own as f64 / 1024.0)
    }

    /// Ends it as Ctrl-C does, and waits for that.
    pub(super) fn end(mut self) -> Result<(), BenchError> {
        let outcome = signals::interrupt(&self.child).and_then(|()| self.child.wait());
        match outcome {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(failed("a monitor", status)),
            Err(error) => Err(failed("a monitor", error)),
        }
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for what `there` finds.
pub(super) fn wait<T>(who: &str, what: &str, mut there: impl FnMut() -> Option<T>) -> Result<T, BenchError> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(found) = there() {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(2));
    }
    Err(failed(who, format!("{what} does not happen within {PATIENCE:?}")))
}

/// When a console's first byte came, and its `nth` of those that count.
pub(super) fn moments(
    console: impl Read,
    nth: usize,
    counts: impl Fn(u8) -> bool,
) -> std::io::Result<(Instant, Instant)> {
    let mut console = BufReader::with_capacity(4096, console);
    let (mut first, mut left) = (None, nth);
    loop {
        let buffer = console.fill_buf()?;
        let now = Instant::now();
        let length = buffer.len();
        if length == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let counted = buffer.iter().filter(|byte| counts(**byte)).count();
        let first = *first.get_or_insert(now);
        if counted >= left {
            return Ok((first, now));
        }
        left -= counted;
        console.consume(length);
    }
}

/// QEMU's machine protocol.
pub(super) struct Qmp {
    to: UnixStream,
    from: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// The option that makes a QEMU listen at `path`.
    pub(super) fn option(path: &Path) -> [String; 2] {
        ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", path.display())]
    }

    pub(super) fn connect(path: &Path) -> Result<Qmp, BenchError> {
        let to = wait("QEMU", "its socket", || UnixStream::connect(path).ok())?;
        let from = BufReader::new(to.try_clone().map_err(|error| failed("QEMU", error))?);
        let mut qmp = Qmp { from, to, events: Vec::new() };
        qmp.line()?;
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, BenchError> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => Err(failed("QEMU", "it broke off")),
            Ok(_) => serde_json::from_str(&line).map_err(|error| failed("QEMU", error)),
            Err(error) => Err(failed("QEMU", error)),
        }
    }

    pub(super) fn call(&mut self, name: &str, arguments: &Value) -> Result<Value, BenchError> {
        let request = json!({ "execute": name, "arguments": arguments });
        self.to.write_all(format!("{request}\n").as_bytes()).map_err(|error| failed("QEMU", error))?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer.get("error").is_some() {
                return Err(failed("QEMU", format!("{name}: {answer}")));
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Seconds of the event `name`, by this host's clock.
    pub(super) fn event(&mut self, name: &str) -> Option<f64> {
        let event = self.events.iter().find(|event| event["event"] == name)?;
        let at = &event["timestamp"];
        Some(at["seconds"].as_f64()? + at["microseconds"].as_f64()? / 1e6)
    }
}

/// A file that is written from now on.
pub(super) fn file(path: &Path) -> Result<File, BenchError> {
    File::create(path).map_err(|source| BenchError::System { what: "make a file", source })
}
