//! The built-in guest is an ordinary PVH kernel: QEMU boots the very same file, and the guest's own books are in
//! order there as well.

use std::process::Stdio;

use tests::skip;
use tests::store::Store;
use tests::sys::end_with_parent;

/// What QEMU exits with when the guest writes 0x10 to its isa-debug-exit device: twice that, plus one.
const GOOD: i32 = 33;

fn runs_under_qemu(test: &str, machine: &str) {
    let store = Store::open();
    let qemu = match store.qemu() {
        Ok(qemu) => qemu,
        Err(e) if e.is_unavailable() => return skip::skip(test, &e.to_string()),
        Err(e) => panic!("QEMU cannot be had: {e}"),
    };
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), guest::ELF).unwrap();
    let mut command = qemu.loader();
    command.arg(qemu.executable());
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(qemu.tree.join(firmware));
    }
    command
        .args(["-accel", "tcg", "-M", machine, "-m", "256", "-smp", "2", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-append"])
        .arg("cpus=2 workload=zipf region=32M passes=2 verify=on")
        .arg("-kernel")
        .arg(image.path());
    let output = end_with_parent(command.stdin(Stdio::null())).output().unwrap();
    let console = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(GOOD), "{console}{}", String::from_utf8_lossy(&output.stderr));
    let results: Vec<serde_json::Value> = console
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &serde_json::Value| line["guest"] == "result")
        .collect();
    assert_eq!(results.len(), 2, "{console}");
    for result in results {
        assert_eq!(result["corrupt"], 0, "{console}");
        assert_eq!(result["writes"], 8192, "{console}");
    }
}

#[test]
fn the_guest_runs_under_qemu_on_a_pc() {
    runs_under_qemu("the_guest_runs_under_qemu_on_a_pc", "q35");
}

#[test]
fn the_guest_runs_under_qemu_on_a_microvm() {
    runs_under_qemu("the_guest_runs_under_qemu_on_a_microvm", "microvm");
}
