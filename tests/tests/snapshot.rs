//! Snapshots and what goes on from them: the guest itself says whether its memory is right.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tests::conformance::wait_until;
use tests::{cargo, skip};

fn vmm() -> Command {
    let mut command = Command::new(cargo::vmm_binary().unwrap());
    command.stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A monitor with a control socket.
struct Monitor {
    child: Child,
    socket: PathBuf,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // One that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    fn start(directory: &Path, args: &[&str]) -> Monitor {
        let socket = directory.join("api");
        let child = vmm()
            .args(args)
            .args(["--json", "--epoch", "50ms", "--api-socket"])
            .arg(&socket)
            .stdout(fs::File::create(directory.join("stdout")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut monitor = Monitor { child, socket };
        wait_until("it has epochs", || {
            assert!(monitor.child.try_wait().unwrap().is_none(), "it has ended");
            let rate =
                vmm().args(["dirty", "--api-socket"]).arg(&monitor.socket).args(["--json", "rate"]).output();
            let rate: Value = serde_json::from_slice(&rate.unwrap().stdout).unwrap_or_default();
            !rate["rate"].is_null()
        });
        monitor
    }

    fn snapshot(&self, path: &Path) -> Output {
        vmm().args(["snapshot", "--json", "--api-socket"]).arg(&self.socket).arg(path).output().unwrap()
    }

    /// Ends it, and returns its exit code.
    fn end(mut self) -> Option<i32> {
        tests::sys::signal(&self.child, libc::SIGINT).unwrap();
        self.child.wait().unwrap().code()
    }
}

/// The last line that a run printed.
fn summary(directory: &Path) -> Value {
    let lines = fs::read_to_string(directory.join("stdout")).unwrap();
    serde_json::from_str(lines.lines().last().unwrap()).unwrap()
}

#[test]
fn a_guest_goes_on_from_its_snapshot_again_and_again() {
    let test = "a_guest_goes_on_from_its_snapshot_again_and_again";
    if let Err(error) = vmm::machine::open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let directory = tempfile::tempdir().unwrap();
    let file = |life: usize| directory.path().join(format!("snapshot{life}"));
    let cmdline = "workload=mixed region=48M verify=on quiet=on passes=0";
    let run = ["run", "--memory", "size=64M", "--cpus", "2", "--duration", "0", "--cmdline", cmdline];
    let mut monitor = Monitor::start(directory.path(), &run);
    for life in 0..4 {
        let output = monitor.snapshot(&file(life));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["bytes"], fs::metadata(file(life)).unwrap().len());
        assert!(report["still_us"].as_f64() > Some(0.0), "{report}");
        // It goes on, finds its memory right at its end, and so does who goes on from its snapshot.
        assert_eq!(monitor.end(), Some(0), "life {life}");
        let end = summary(directory.path());
        assert_eq!(
            (&end["missed"], &end["stray"], &end["guest_status"]),
            (&0.into(), &0.into(), &0.into()),
            "{end}"
        );
        let path = file(life);
        monitor = Monitor::start(directory.path(), &["restore", path.to_str().unwrap()]);
    }
    assert_eq!(monitor.end(), Some(0));
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let test = "what_is_no_snapshot_is_refused";
    if let Err(error) = vmm::machine::open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let cmdline = "workload=rand region=16M quiet=on";
    let monitor = Monitor::start(
        directory.path(),
        &["run", "--memory", "size=64M", "--duration", "0", "--cmdline", cmdline],
    );
    assert!(monitor.snapshot(&path).status.success());
    // A dump is a log, too, and has no state.
    let dump = directory.path().join("dump");
    let dumped = vmm()
        .args(["dirty", "--api-socket"])
        .arg(&monitor.socket)
        .args(["dump", "--pages", "--full", "--epochs", "1", "-o"])
        .arg(&dump)
        .output()
        .unwrap();
    assert!(dumped.status.success());
    drop(monitor);
    let refused = |path: &Path, words: &str| {
        let output = vmm().arg("restore").arg(path).args(["--duration", "1s"]).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(stderr.contains(words), "{words}: {stderr}");
    };
    refused(&dump, "no snapshot");
    refused(&directory.path().join("nothing"), "nothing");
    let whole = fs::read(&path).unwrap();
    let broken = directory.path().join("broken");
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (bytes, words) in [
        (&whole[..whole.len() - 7], "cut off"),
        (&whole[..100], ""),
        (&flipped[..], "damaged"),
        (b"", "not a"),
    ] {
        fs::write(&broken, bytes).unwrap();
        refused(&broken, words);
    }
    let size = vmm().arg("restore").arg(&path).args(["--memory", "size=1G"]).output().unwrap();
    assert_eq!(size.status.code(), Some(2));
}
