//! `vmm doctor` and `vmm run` on this host, and on the same host with KVM taken away: the first tells what is
//! wrong, the second fails with a line that says what to do.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use serde_json::Value;

const VMM: &str = env!("CARGO_BIN_EXE_vmm");

/// Says on the terminal, past the capture of the test's output, that `test` is skipped.
fn skip(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("the report is JSON")
}

/// The finding about `what`.
fn finding<'a>(report: &'a Value, what: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["what"] == what).unwrap()
}

/// `vmm run` must have failed with one line that has `words`.
fn assert_refused(output: &Output, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn the_exit_code_says_whether_run_can_work() {
    let output = Command::new(VMM).args(["doctor", "--json"]).output().unwrap();
    let report = json(&output);
    assert_eq!(report["runs"].as_bool(), Some(output.status.success()));
    let text = Command::new(VMM).arg("doctor").output().unwrap();
    assert_eq!(text.status.code(), output.status.code());
    let works = String::from_utf8(text.stdout).unwrap().contains("`vmm run` works on this host");
    assert_eq!(works, output.status.success());
}

#[test]
fn without_dev_kvm_the_rig_is_named() {
    // An empty /dev in a mount namespace of its own, which goes with the process.
    let hidden = |verb: &str| {
        let script = format!("mount -t tmpfs none /dev && exec {VMM} {verb}");
        Command::new("unshare").args(["--map-root-user", "--mount", "sh", "-c", &script]).output()
    };
    let possible = Command::new("unshare")
        .args(["--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/dev"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !possible {
        return skip("without_dev_kvm_the_rig_is_named", "this user may not make a mount namespace");
    }
    let output = hidden("doctor --json").unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(report["host"]["kvm"]["device"], "absent");
    let device = finding(&report, "/dev/kvm");
    assert_eq!(device["level"], "fatal");
    assert!(device["remedy"].as_str().unwrap().contains("--bin rig -- vmm run"));
    assert_refused(&hidden("run").unwrap(), &["/dev/kvm", "--bin rig -- vmm run"]);
}

#[test]
fn without_permission_the_group_is_named() {
    let test = "without_permission_the_group_is_named";
    let Ok(device) = fs::metadata("/dev/kvm") else { return skip(test, "there is no /dev/kvm") };
    if device.permissions().mode() & 0o006 != 0 {
        return skip(test, "everybody may open /dev/kvm");
    }
    // Where nobody may execute it.
    let dir = tempfile::tempdir().unwrap();
    let vmm = dir.path().join("vmm");
    fs::copy(VMM, &vmm).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let nobody = |arguments: &[&str]| Command::new(&vmm).args(arguments).uid(65534).gid(65534).output();
    let Ok(output) = nobody(&["doctor", "--json"]) else { return skip(test, "only root can become nobody") };
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    let device = finding(&report, "/dev/kvm");
    assert_eq!((&device["level"], &device["value"]), (&"fatal".into(), &"no permission".into()));
    assert!(device["remedy"].as_str().unwrap().contains("sudo"));
    assert_refused(&nobody(&["run"]).unwrap(), &["permission", "/dev/kvm"]);
}
