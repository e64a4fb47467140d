//! The `vmm` command as its user meets it: exit codes, messages, signals, odd guests and wrong input.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};

use serde_json::Value;
use tests::monitor::{skipped as no_kvm, vmm};
use tests::{skip, tiny};

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn kernel(&self, code: &[u8]) -> PathBuf {
        self.put("kernel", &tiny::kernel(code))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `vmm run` with `args`, which must fail with status 1 and one line on stderr that contains all of
/// `words`.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let output = vmm().arg("run").args(args).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{args:?} deserves one line: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: no '{word}' in: {stderr}");
    }
}

#[test]
fn wrong_kernels_are_refused_in_a_line() {
    if no_kvm("wrong_kernels_are_refused_in_a_line") {
        return;
    }
    let files = Files::new();
    let refused = |name: &str, bytes: &[u8], words: &[&str]| {
        refused(&["--kernel", files.put(name, bytes).to_str().unwrap()], words);
    };
    refused("empty", b"", &["not a kernel"]);
    refused("text", b"root:x:0:0:root:/root:/bin/bash\n", &["not a kernel", "vmlinux"]);
    refused("half-an-elf", &guest::ELF[..40], &["cannot load the kernel"]);
    refused("no-segments", &guest::ELF[..4096.min(guest::ELF.len() / 2)], &["cannot load the kernel"]);
    let mut no_note = tiny::kernel(&tiny::SPIN);
    let at = no_note.windows(4).position(|w| w == b"Xen\0").unwrap();
    no_note[at] = b'Y';
    refused("no-pvh-note", &no_note, &["no PVH entry", "bzImage"]);
    // A boot protocol header and nothing that it announces.
    let mut bzimage = vec![0; 0x300];
    bzimage[0x1f1] = 1; // setup_sects
    bzimage[0x1f4..0x1f8].copy_from_slice(&0x10_0000u32.to_le_bytes()); // syssize
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bzimage[0x211] = 1; // loaded high
    bzimage[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    refused("header-only", &bzimage, &["cannot load the kernel"]);
    bzimage.resize(0x1000, 0);
    refused("truncated", &bzimage, &["truncated", "16778240 bytes"]);
    self::refused(&["--kernel", "/nonexistent/vmlinux"], &["cannot read the kernel", "No such file"]);
    self::refused(&["--kernel", "/tmp"], &["cannot read the kernel", "directory"]);
    // An ELF whose segment does not fit into RAM.
    let mut huge = tiny::kernel(&tiny::SPIN);
    huge[64 + 24..64 + 32].copy_from_slice(&0xffff_ffff_0000_0000u64.to_le_bytes());
    refused("far-away", &huge, &["cannot load the kernel"]);
}

#[test]
fn wrong_sizes_disks_and_initrds_are_refused_in_a_line() {
    if no_kvm("wrong_sizes_disks_and_initrds_are_refused_in_a_line") {
        return;
    }
    let files = Files::new();
    let kernel = files.kernel(&tiny::SPIN);
    let kernel = kernel.to_str().unwrap();
    refused(&["--memory", "1M"], &["16 MiB", "64 TiB"]);
    refused(&["--memory", "100T"], &["64 TiB"]);
    refused(&["--memory", "33554433"], &["multiple of 2 MiB"]);
    refused(&["--memory", "size=60T,huge=hugetlb-2m"], &["31457280 free 2 MiB huge pages", "nr_hugepages"]);
    refused(&["--memory", "size=64M,huge=hugetlb-1g"], &["multiple of 1 GiB"]);
    refused(&["--cpus", "255"], &["255 vCPUs", "1 to"]);
    refused(&["--disk", "path=/nonexistent/disk"], &["/nonexistent/disk"]);
    refused(&["--disk", "path=/tmp"], &["/tmp"]);
    let disk = files.put("disk", &[0; 1 << 20]);
    let spec = format!("path={}", disk.display());
    let lock = File::open(&disk).unwrap();
    lock.try_lock().unwrap();
    refused(&["--disk", &spec], &["lock"]);
    drop(lock);
    refused(&["--disk", &spec, "--disk", &spec], &["lock"]);
    let initrd = files.0.path().join("initrd");
    File::create(&initrd).unwrap().set_len(1 << 30).unwrap();
    let initrd = initrd.to_str().unwrap();
    refused(
        &["--kernel", kernel, "--initrd", initrd, "--memory", "64M"],
        &["initrd", "1 GiB", "larger --memory"],
    );
    refused(&["--kernel", kernel, "--initrd", "/nonexistent"], &["cannot read the initrd"]);
    let long = "x".repeat(70_000);
    refused(&["--kernel", kernel, "--cmdline", &long], &["command line", "70000"]);
}

#[test]
fn a_wrong_command_line_is_status_2() {
    for args in [
        &["run", "--memory", "much"][..],
        &["run", "--memory", "size=1G,colour=red"],
        &["run", "--cpus", "0"],
        &["run", "--epoch", "0"],
        &["run", "--epoch", "never"],
        &["run", "--track", "guessing"],
        &["run", "--disk", "readonly=on"],
        &["walk"],
        &[],
    ] {
        let output = vmm().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(!output.stderr.is_empty());
    }
}

/// Runs a guest of these bytes, and returns what the monitor did.
fn run_code(code: &[u8], args: &[&str]) -> Output {
    let files = Files::new();
    let kernel = files.kernel(code);
    vmm().args(["run", "--memory", "64M", "--kernel"]).arg(kernel).args(args).output().unwrap()
}

fn events(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[test]
fn a_guest_that_resets_or_powers_off_ends_well() {
    if no_kvm("a_guest_that_resets_or_powers_off_ends_well") {
        return;
    }
    for (port, value, end) in [(0x64, 0xfe, "reset"), (0x604, 0x34, "power-off")] {
        let code = [tiny::say("bye\n"), tiny::out(port, value), tiny::SPIN.to_vec()].concat();
        let output = run_code(&code, &["--json"]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "bye\n", "the console is on stderr, and nothing else");
        let events = events(&output);
        assert_eq!(events.first().unwrap()["event"], "start");
        assert_eq!(events.last().unwrap()["event"], "summary");
        assert_eq!(events.last().unwrap()["end"], end);
    }
}

#[test]
fn a_guest_that_crashes_is_described() {
    if no_kvm("a_guest_that_crashes_is_described") {
        return;
    }
    // mov eax, 0x12345678; ud2: there is no IDT, so it is a triple fault.
    let output = run_code(&[0xb8, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x0b], &["--quiet"]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    // What KVM leaves in the registers after a triple fault differs between hosts (SVM resets the vCPU), so
    // only their presence is looked for.
    for word in ["triple fault", "rip 0x", "code", "rax", "cr3"] {
        assert!(stderr.contains(word), "no '{word}' in: {stderr}");
    }
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named_with_the_reason() {
    let test = "an_instruction_that_kvm_cannot_emulate_is_named_with_the_reason";
    if no_kvm(test) {
        return;
    }
    if vmm::host::kvm_module() != vmm::host::KvmModule::Pvm {
        // Only where ring 0 is emulated is there such an instruction that is a legal one.
        return skip::skip(test, "this host's KVM does not emulate ring 0");
    }
    // pxor xmm0, xmm0
    let output = run_code(&[0x66, 0x0f, 0xef, 0xc0], &["--json"]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    for word in ["cannot emulate", "rip 0x0000000000100000", "66 0f ef c0", "kvm_pvm", "--bin rig"] {
        assert!(stderr.contains(word), "no '{word}' in: {stderr}");
    }
    let crash = events(&output).into_iter().find(|event| event["event"] == "crash").unwrap();
    assert_eq!(crash["rip"], tiny::ENTRY);
}

/// A running `vmm run` whose first epoch has been reported.
fn running(args: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = vmm()
        .args(["run", "--json", "--duration", "0", "--epoch", "50ms", "--memory", "64M"])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut events = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("\"event\":\"epoch\"") {
        line.clear();
        assert_ne!(events.read_line(&mut line).unwrap(), 0, "it ended before its first epoch");
    }
    (child, events)
}

#[test]
fn signals_end_a_run_with_its_summary() {
    if no_kvm("signals_end_a_run_with_its_summary") {
        return;
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let (mut child, mut events) = running(&["--cpus", "2"]);
        tests::sys::signal(&child, signal).unwrap();
        let mut rest = String::new();
        events.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "signal {signal}");
        let summary: Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
        assert_eq!(summary["event"], "summary");
        assert_eq!(summary["missed"], 0);
        assert_eq!(summary["extra"], summary["extra_read"]);
        assert_eq!(summary["stray"], 0);
        assert_eq!(summary["guest_status"], 0, "the guest had the time to end by itself");
        assert!(summary["checked"].as_u64().unwrap() > 0 && summary["wrote"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_killed_run_leaves_nothing_behind() {
    if no_kvm("a_killed_run_leaves_nothing_behind") {
        return;
    }
    let files = Files::new();
    let disk = files.put("disk", &[7; 1 << 20]);
    let spec = format!("path={}", disk.display());
    let (mut child, _events) = running(&["--disk", &spec]);
    child.kill().unwrap();
    child.wait().unwrap();
    // The lock went with the process, and the directory holds what it held.
    let (mut child, _events) = running(&["--disk", &spec]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 1);
    assert_eq!(fs::read(&disk).unwrap(), [7; 1 << 20]);
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if no_kvm("what_is_typed_reaches_the_guest") {
        return;
    }
    // Poll LSR bit 0, read a byte, write it back; 'q' resets the machine.
    #[rustfmt::skip]
    let echo = [
        0x66, 0xba, 0xfd, 0x03, // 0: mov dx, 0x3fd
        0xec,                   // 4: in al, dx
        0xa8, 0x01,             // 5: test al, 1
        0x74, 0xfb,             // 7: jz 4
        0x66, 0xba, 0xf8, 0x03, // 9: mov dx, 0x3f8
        0xec,                   // 13: in al, dx
        0xee,                   // 14: out dx, al
        0x3c, b'q',             // 15: cmp al, 'q'
        0x75, 0xed,             // 17: jne 0
        0xb0, 0xfe,             // 19: mov al, 0xfe
        0xe6, 0x64,             // 21: out 0x64, al
    ];
    let files = Files::new();
    let kernel = files.kernel(&echo);
    let mut child = vmm()
        .args(["run", "--memory", "64M", "--quiet", "--kernel"])
        .arg(kernel)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // More than the FIFO holds at a time. Ctrl-A is no escape where there is no terminal.
    let typed = format!("{}\x01xq", "All work and no play. ".repeat(50));
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), typed);
}

#[test]
fn the_built_in_guest_comes_to_an_end_and_its_status_is_the_exit_status() {
    if no_kvm("the_built_in_guest_comes_to_an_end_and_its_status_is_the_exit_status") {
        return;
    }
    let run = |cmdline: &str| {
        vmm().args(["run", "--memory", "64M", "--json", "--cmdline", cmdline]).output().unwrap()
    };
    let good = run("workload=fill region=16M passes=2 verify=on");
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    assert!(text(&good.stderr).contains("\"writes\":8192"), "{}", text(&good.stderr));
    let summary = events(&good).pop().unwrap();
    assert_eq!(summary["guest_status"], 0);
    let bad = run("workload=dance");
    assert_eq!(bad.status.code(), Some(4), "{}", text(&bad.stderr));
    assert!(text(&bad.stderr).contains("dance"), "{}", text(&bad.stderr));
}

#[test]
fn the_monitor_serves_the_faults_of_its_guest() {
    if no_kvm("the_monitor_serves_the_faults_of_its_guest") {
        return;
    }
    let files = Files::new();
    let set = files.0.path().join("set");
    let set = set.to_str().unwrap();
    let common = ["run", "--json", "--memory", "size=64M,huge=thp,fault=uffd", "--epoch", "100ms"];
    let run = |args: &[&str]| {
        let output = vmm().args(common).args(args).output().unwrap();
        let stderr = text(&output.stderr);
        if stderr.contains("userfaultfd") || stderr.contains("PAGEMAP_SCAN") {
            skip::skip("the_monitor_serves_the_faults_of_its_guest", &stderr);
            return None;
        }
        assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
        let lines = text(&output.stdout);
        Some(lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>())
    };
    // It comes to an end by itself: what is recorded then is all that it touched.
    let recording = [
        "--cmdline",
        "workload=rand region=32M passes=1",
        "--duration",
        "0",
        "--prefault",
        "around=64K",
        "--prefault-age",
        "old",
        "--track",
        "exact",
        "--record-working-set",
        set,
    ];
    let Some(lines) = run(&recording) else { return };
    assert_eq!(lines[0]["track"], "uffd-serve");
    let epochs: Vec<_> = lines.iter().filter(|line| line["event"] == "epoch").collect();
    assert!(!epochs.is_empty());
    for epoch in &epochs {
        assert_eq!(
            (&epoch["ledger"]["missed"], &epoch["ledger"]["extra"]),
            (&0.into(), &0.into()),
            "{epoch}"
        );
        assert!(epoch["served"]["write_protected"].is_u64() && epoch["coarse_pages"] == 0, "{epoch}");
    }
    let summary = lines.last().unwrap();
    let served = |name: &str| summary["served"][name].as_u64().unwrap();
    assert!(served("old") > 0 && served("old") == served("prefaulted"), "{summary}");
    assert!(served("old_hits") > 0 && served("failures") == 0, "{summary}");
    assert_eq!(summary["record"]["harmful"], 0, "{summary}");
    // Where KVM shadows page tables it cannot be held against the record by number.
    let unexplained = &summary["record"]["kvm_unexplained"];
    assert!(unexplained.is_null() || *unexplained == 0, "{summary}");
    let recorded = fs::read_to_string(set).unwrap().parse::<dirty_track::fault::WorkingSet>().unwrap();
    assert_eq!(summary["record"]["touched"], recorded.pages());
    // A log of KVM's beside it, and what the first run touched.
    let prefault = format!("recorded={set}");
    let again = ["--cmdline", "workload=rand region=32M", "--prefault", &prefault, "--split", "block"];
    let again = [&again[..], &["--duration", "1s"]].concat();
    assert_eq!(run(&again).unwrap()[0]["track"], "kvm-manual");

    let wrong = |args: &[&str], word: &str| {
        let output = vmm().arg("run").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).contains(word), "{args:?}: {}", text(&output.stderr));
    };
    wrong(&["--prefault", "block"], "fault=uffd");
    wrong(&["--track", "uffd-serve"], "fault=uffd");
    wrong(&["--memory", "size=64M,fault=uffd", "--track", "uffd-async"], "--track exact");
    wrong(&["--memory", "size=64M,fault=maybe"], "kernel or uffd");
    wrong(&["--memory", "size=64M,fault=uffd", "--prefault", "recorded"], "recorded=FILE");
}
