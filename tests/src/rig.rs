//! The rigs: Linux hosts with KVM on nested page tables, on a machine that may have no KVM at all.
//!
//! An emulator has a CPU with virtualisation; a stock Debian kernel boots on it (L1), loads the mainline KVM module
//! and runs what it is given, a monitor for example, whose guest then is L2. So the real KVM code runs, TDP MMU
//! and eager page splitting included. Which emulator decides what the nested page tables are ([`Mmu`]): QEMU's TCG has
//! AMD's, about a hundred times slower than hardware; [`bochs`] has Intel's, and is ten times slower again.
//! Correctness and work done count here; figures in seconds compare only with others from the same rig, and emulators
//! flush their TLBs so often that a missing flush does not show.
//!
//! L1 has one CPU. With two, each a thread of QEMU's, half of all end-to-end runs end in a triple fault of
//! L2 (a page fault out of nowhere on one L1 CPU, in page tables that the other walks as before) or with an L1
//! kernel whose stack was overwritten; with two that take turns in one thread, an L2 with two vCPUs hangs. So
//! vCPUs alternate here instead of running at once: races are the business of hosts with KVM of their own.
//! Further: `-M microvm` for L1 is fifty times slower, and QEMU before 10 crashes the L1 kernel now and then.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::bochs;
use crate::e2e::GUEST_ENV;
use crate::initramfs::Initramfs;
use crate::recipe;
use crate::store::{self, Kernel, Qemu, Store};
use crate::sys;

/// Why something did not run in the rig.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package is missing.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The initramfs could not be made.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// What Bochs boots from could not be made.
    #[error(transparent)]
    Bochs(#[from] bochs::Error),
    /// A file of this run could not be written or read.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// L1 did not end in time; it was stopped.
    #[error("the rig's host did not end within {limit:?}; its console ended with:\n{tail}")]
    Timeout {
        /// The limit.
        limit: Duration,
        /// Last lines of the console.
        tail: String,
    },
    /// L1 ended without saying how its command did: the kernel or the emulator crashed.
    #[error(
        "the rig's host ended ({status}) before its command did; {stderr}its console ended with:\n{tail}"
    )]
    Ended {
        /// How the emulator ended.
        status: String,
        /// What the emulator said, if anything, with a line end.
        stderr: String,
        /// Last lines of the console.
        tail: String,
    },
}

impl Error {
    /// Whether this machine simply cannot have the rig's packages; see [`store::Error::is_unavailable`].
    pub fn is_unavailable(&self) -> bool {
        match self {
            Error::Store(e) | Error::Recipe(recipe::Error::Store(e)) => e.is_unavailable(),
            _ => false,
        }
    }
}

/// What KVM on the L1 host has for its guests' memory, and with it, what emulates the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mmu {
    /// AMD's nested page tables, under QEMU.
    Npt,
    /// Shadow paging on the same CPU.
    Shadow,
    /// Intel's extended page tables, under [`bochs`], with its page-modification log or without (`kvm_intel.pml`).
    Ept {
        /// The processor logs the pages that it makes dirty; or else KVM write-protects them.
        pml: bool,
    },
}

impl Mmu {
    /// KVM's module and its parameters.
    fn module(self) -> (&'static str, &'static str) {
        match self {
            Mmu::Npt => ("kvm_amd", "npt=1"),
            Mmu::Shadow => ("kvm_amd", "npt=0"),
            Mmu::Ept { pml: true } => ("kvm_intel", bochs::KVM_WITH_PML),
            Mmu::Ept { pml: false } => ("kvm_intel", bochs::KVM_WITHOUT_PML),
        }
    }

    /// What a script has to begin with.
    fn environment(self) -> String {
        match self {
            Mmu::Npt | Mmu::Shadow => String::new(),
            Mmu::Ept { .. } => format!("export {GUEST_ENV}={}\n", bochs::GUEST),
        }
    }
}

/// How the L1 host is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Series of its stock kernel: `6.12`, `6.1`, `7.2`.
    pub kernel: String,
    /// Its CPUs; more than one is at your risk, see the module. On EPT it has one.
    pub cpus: u32,
    /// Its memory in MiB. The payload is held in it, twice while it boots.
    pub memory_mib: u32,
    /// KVM's TDP MMU (`kvm.tdp_mmu`); off selects the older MMU code.
    pub tdp_mmu: bool,
    /// Splitting huge mappings when logging starts (`kvm.eager_page_split`).
    pub eager_page_split: bool,
    /// Nested paging, and the emulator.
    pub mmu: Mmu,
    /// Wall-clock limit of a run that nobody watches: a safety net, far above what a run needs.
    pub timeout: Duration,
}

impl Default for Host {
    fn default() -> Host {
        Host {
            kernel: "6.12".into(),
            cpus: 1,
            memory_mib: 1536,
            tdp_mmu: true,
            eager_page_split: true,
            mmu: Mmu::Npt,
            timeout: Duration::from_secs(1800),
        }
    }
}

/// What L1 gets: files, and a command that uses them.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    files: Vec<(String, Source)>,
    script: String,
}

#[derive(Clone, Debug)]
enum Source {
    Local(PathBuf),
    Bytes(Vec<u8>),
}

impl Payload {
    /// A payload whose command is the shell script `script` (busybox's).
    pub fn script(script: impl Into<String>) -> Payload {
        Payload { files: Vec::new(), script: script.into() }
    }

    /// A payload whose command is `words`, the first of them the program, each passed as it is.
    pub fn command<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> Payload {
        let quoted: Vec<String> = words.into_iter().map(|w| quote(w.as_ref())).collect();
        Payload::script(quoted.join(" "))
    }

    /// The same files, with the shell script `script` as the command.
    pub fn with_script(self, script: impl Into<String>) -> Payload {
        Payload { script: script.into(), ..self }
    }

    /// Places this machine's file `local` at `path` in L1, executable.
    pub fn put(mut self, path: impl Into<String>, local: impl Into<PathBuf>) -> Payload {
        self.files.push((path.into(), Source::Local(local.into())));
        self
    }

    /// Places `bytes` at `path` in L1, executable.
    pub fn put_bytes(mut self, path: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Payload {
        self.files.push((path.into(), Source::Bytes(bytes.into())));
        self
    }
}

/// `word` in single quotes, as a shell reads it back unchanged.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What a run in L1 came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit status of the command (128 + n if signal n ended it).
    pub status: i32,
    /// All that came over the console.
    pub console: String,
}

/// Lines of the console that an error quotes.
const TAIL_LINES: usize = 80;

impl Host {
    /// Boots L1, runs the payload with an empty stdin, and returns when L1 has ended. `on_line` sees each
    /// line of the console as it comes, with the time at which it came.
    ///
    /// # Errors
    /// Not for a command that fails: its status is in the [`Outcome`].
    pub fn run(
        &self,
        store: &Store,
        payload: &Payload,
        mut on_line: impl FnMut(Instant, &str),
    ) -> Result<Outcome, Error> {
        let script = format!("exec </dev/null\n{}{}\n", self.mmu.environment(), payload.script);
        let files = self.write_files(store, payload, &script)?;
        let mut command = match self.mmu {
            Mmu::Npt | Mmu::Shadow => {
                let mut command = self.qemu(&store.qemu()?, &files);
                command.args(["-chardev", "stdio,id=console,signal=off"]);
                command
            }
            Mmu::Ept { .. } => self.bochs(&files).command(&store.bochs()?)?,
        };
        let stderr = File::create(files.stderr()).map_err(io_error("create", &files.stderr()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut emulator = Emulator::start(command)?;

        let stdout = emulator.child.stdout.take().expect("stdout was asked to be a pipe");
        let (sender, lines) = mpsc::channel();
        // Ends at the end of the pipe, that is with the emulator.
        thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
                line.clear();
                if sender.send((Instant::now(), text)).is_err() {
                    return;
                }
            }
        });
        let deadline = Instant::now() + self.timeout;
        let mut console = String::new();
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((at, line)) => {
                    on_line(at, &line);
                    console += &line;
                    console.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    drop(emulator);
                    return Err(Error::Timeout { limit: self.timeout, tail: tail(&console) });
                }
            }
        }
        let status = emulator.wait()?;
        match files.status() {
            Some(status) => Ok(Outcome { status, console }),
            None => Err(Error::Ended { status, stderr: files.said(), tail: tail(&console) }),
        }
    }

    /// Boots L1 with this process's stdin and stdout as its console, runs the payload there (a shell if the
    /// script is empty), and returns its exit status. `Ctrl-]` then `x` ends L1 at any moment. On EPT nobody can interact:
    /// the console is shown, and there has to be a script.
    pub fn interact(&self, store: &Store, payload: &Payload) -> Result<i32, Error> {
        if matches!(self.mmu, Mmu::Ept { .. }) {
            return Ok(self.run(store, payload, |_, line| println!("{line}"))?.status);
        }
        // Whoever reads this adds carriage returns if it is a terminal, and wants none if it is a program.
        let mut script = "stty -onlcr\n".to_owned();
        if let Some((rows, columns)) = sys::terminal_size() {
            script += &format!("stty rows {rows} cols {columns}\n");
        }
        let command = if payload.script.is_empty() { "sh -l" } else { &payload.script };
        // A session with the console as its controlling terminal, so that Ctrl-C reaches the command. Its end
        // hangs the terminal up, which drops output not yet sent: setting terminal modes waits for that.
        let session = format!("{command}\nstatus=$?\nstty opost\nexit $status");
        script += &format!("cd /root\nexec setsid cttyhack sh -c {}\n", quote(&session));
        let files = self.write_files(store, payload, &script)?;
        let mut command = self.qemu(&store.qemu()?, &files);
        command.args(["-chardev", "stdio,id=console,signal=off,mux=on", "-mon", "chardev=console"]);
        command.args(["-echr", "29"]);
        let mut emulator = Emulator::start(command)?;
        let status = emulator.wait()?;
        files.status().ok_or_else(|| Error::Ended {
            status,
            stderr: String::new(),
            tail: "(it was shown above)".into(),
        })
    }

    fn write_files(&self, store: &Store, payload: &Payload, script: &str) -> Result<RunFiles, Error> {
        let kernel = store.kernel(&self.kernel)?;
        let on_off = |on: bool| if on { "1" } else { "0" };
        let kvm =
            format!("tdp_mmu={} eager_page_split={}", on_off(self.tdp_mmu), on_off(self.eager_page_split));
        let mut initrd = recipe::initramfs(store, &kernel, &[("kvm", &kvm), self.mmu.module()])?;
        let mut archive = Initramfs::new();
        archive.file("/run.sh", 0o755, script.as_bytes());
        for (path, source) in &payload.files {
            match source {
                Source::Local(local) => archive.file(path, 0o755, &recipe::read(local)?),
                Source::Bytes(bytes) => archive.file(path, 0o755, bytes),
            };
        }
        initrd.append(&mut archive.finish());
        let files = RunFiles::new(store.dir(), kernel)?;
        let path = files.initrd();
        fs::write(&path, initrd).map_err(io_error("write", &path))?;
        Ok(files)
    }

    /// What Bochs needs.
    fn bochs<'a>(&self, files: &'a RunFiles) -> bochs::Run<'a> {
        bochs::Run {
            dir: files.dir.path(),
            kernel: &files.kernel,
            initrd: files.initrd(),
            cmdline: CMDLINE,
            memory_mib: self.memory_mib,
            status: files.status_path(),
        }
    }

    /// QEMU's command line, all but the chardev `console`.
    fn qemu(&self, qemu: &Qemu, files: &RunFiles) -> Command {
        let mut command = qemu.loader();
        command.arg(qemu.executable());
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(qemu.tree.join(firmware));
        }
        command
            .args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max"])
            .args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "chardev:console", "-serial"])
            .arg(format!("file:{}", files.status_path().display()))
            .arg("-kernel")
            .arg(files.kernel.vmlinux())
            .arg("-initrd")
            .arg(files.initrd())
            .args(["-append", CMDLINE]);
        command
    }
}

/// L1's kernel command line. The second serial port carries the command's exit status.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 nokaslr mitigations=off panic=-1 tsc=reliable \
                       no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests STATUS=/dev/ttyS1";

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// The files of one run, in a directory that goes with it.
struct RunFiles {
    dir: tempfile::TempDir,
    kernel: Kernel,
}

impl RunFiles {
    fn new(store: &Path, kernel: Kernel) -> Result<RunFiles, Error> {
        fs::create_dir_all(store).map_err(io_error("create", store))?;
        RunFiles::remove_left_over(store);
        let prefix = format!("run-{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(store);
        Ok(RunFiles { dir: dir.map_err(io_error("create a directory in", store))?, kernel })
    }

    /// Removes the directories of runs whose process was killed.
    fn remove_left_over(store: &Path) {
        for entry in fs::read_dir(store).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
            if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
                // Another run may be removing it as well.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn initrd(&self) -> PathBuf {
        self.dir.path().join("initrd")
    }

    fn stderr(&self) -> PathBuf {
        self.dir.path().join("stderr")
    }

    fn status_path(&self) -> PathBuf {
        self.dir.path().join("status")
    }

    /// What L1 wrote to its second serial port, if it is a number.
    fn status(&self) -> Option<i32> {
        fs::read_to_string(self.status_path()).ok()?.trim().parse().ok()
    }

    /// What the emulator wrote to stderr, with a line end if there is anything.
    fn said(&self) -> String {
        let text = fs::read_to_string(self.stderr()).unwrap_or_default();
        if text.trim().is_empty() { String::new() } else { format!("{}\n", text.trim()) }
    }
}

/// A running emulator; killed if it is dropped.
struct Emulator {
    child: Child,
    program: PathBuf,
}

impl Emulator {
    fn start(mut command: Command) -> Result<Emulator, Error> {
        let program = PathBuf::from(command.get_program());
        let child = sys::end_with_parent(&mut command).spawn().map_err(io_error("start", &program))?;
        Ok(Emulator { child, program })
    }

    fn wait(&mut self) -> Result<String, Error> {
        let status = self.child.wait().map_err(io_error("wait for", &self.program))?;
        Ok(format!("the emulator's {status}"))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        let payload = Payload::command(["vmm", "it's", "a b", "$HOME"]);
        assert_eq!(payload.script, r"'vmm' 'it'\''s' 'a b' '$HOME'");
    }

    #[test]
    fn an_error_quotes_the_end_of_the_console() {
        let console: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let first = format!("line {}\n", 100 - TAIL_LINES);
        assert!(tail(&console).starts_with(&first) && tail(&console).ends_with("line 99"));
        assert_eq!(tail("one\n"), "one");
    }
}
