//! Snapshots and what goes on from them: the guest itself says whether its memory is right.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use dirty_track::addr::{Gfn, PAGE_SIZE, PageRange};
use dirty_track::cow::{Cow, CowError, Wanted};
use dirty_track::image::{ImageReader, ImageWriter};
use dirty_track::log::StreamId;
use serde_json::Value;
use tests::conformance::{config, start};
use tests::monitor::{Monitor, skipped, text, vmm};
use tests::{e2e, skip};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{HugePages, MemoryConfig, Ram};

const MIB: u64 = 1 << 20;

const WORKLOAD: &str = "workload=mixed region=48M verify=on quiet=on passes=0";

fn run_args(tracker: &str) -> [&str; 8] {
    ["run", "--memory", "size=64M", "--cpus", "2", "--cmdline", WORKLOAD, tracker]
}

/// Whether this process may use userfaultfd as snapshots need it.
fn has_userfaultfd() -> bool {
    vmm::snapshot::Mode::best() == vmm::snapshot::Mode::Lazy
}

fn modes() -> &'static [&'static str] {
    if has_userfaultfd() { &["mode=lazy", "mode=eager", "mode=map"] } else { &["mode=eager", "mode=map"] }
}

#[test]
fn a_guest_goes_on_from_its_snapshot_again_and_again() {
    if skipped("a_guest_goes_on_from_its_snapshot_again_and_again") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let place = |life: usize| home.path().join(format!("snapshot{life}"));
    let mut monitor = Monitor::observing(&run_args("--track=auto"));
    for life in 0..4 {
        let report = monitor.take(&place(life), &[]);
        assert_eq!((&report["pages"], &report["parent"]), (&(64 * MIB / PAGE_SIZE).into(), &Value::Null));
        assert!(report["still_us"].as_f64() > Some(0.0), "{report}");
        // It goes on, finds its memory right at its end, and so does who goes on from its snapshot.
        monitor.end_well(&format!("life {life}"));
        let mode = modes()[life % modes().len()];
        let (path, context) = (place(life), format!("restored from life {life}, {mode}"));
        monitor = Monitor::observing(&["restore", path.to_str().unwrap(), "--memory", mode]);
        println!("{context}");
    }
    monitor.end_well("the last life");
}

/// A full snapshot and diffs of it, each of which a guest goes on from, in every mode; and from what they are merged to.
#[test]
fn a_chain_of_diffs_is_the_guest_at_each_of_them() {
    if skipped("a_chain_of_diffs_is_the_guest_at_each_of_them") {
        return;
    }
    let diffs = if e2e::in_rig() { 2 } else { 5 };
    for tracker in ["--track=auto", "--track=exact"] {
        if tracker == "--track=exact" && !has_userfaultfd() {
            skip::skip("a_chain_of_diffs_is_the_guest_at_each_of_them", "exact: no userfaultfd");
            continue;
        }
        let home = tempfile::tempdir().unwrap();
        let place = |number: usize| home.path().join(format!("{number}"));
        let monitor = Monitor::observing(&run_args(tracker));
        assert!(monitor.take_none(&place(0), &["--diff"]).contains("take a full snapshot first"));
        assert!(!place(0).exists());
        let full = monitor.take(&place(0), &[]);
        let method = if tracker == "--track=exact" { "precopy" } else { "copy-on-write" };
        if has_userfaultfd() {
            assert_eq!(full["method"], method);
        }
        let mut parent = full["id"].clone();
        for number in 1..=diffs {
            let diff = monitor.take(&place(number), &["--diff"]);
            assert_eq!(diff["parent"], parent);
            assert!(diff["pages"].as_u64() < full["pages"].as_u64(), "{diff}");
            parent = diff["id"].clone();
        }
        monitor.end_well("the original");
        let merged = home.path().join("merged");
        let merge = vmm().args(["log", "merge"]).arg(place(diffs)).arg("-o").arg(&merged).output().unwrap();
        assert!(merge.status.success(), "{}", text(&merge.stderr));
        for (number, path) in (0..=diffs).map(|number| (number, place(number))).chain([(99, merged)]) {
            for mode in modes() {
                let context = format!("{tracker}: {number}, {mode}");
                let path = path.to_str().unwrap();
                let monitor = Monitor::observing(&["restore", path, "--memory", mode]);
                monitor.end_well(&context);
            }
        }
    }
}

/// A machine that was restored takes diffs against what it was restored from.
#[test]
fn a_restored_guest_goes_on_with_the_chain() {
    if skipped("a_restored_guest_goes_on_with_the_chain") {
        return;
    }
    for mode in modes() {
        let home = tempfile::tempdir().unwrap();
        let place = |number: usize| home.path().join(format!("{number}"));
        let mut monitor = Monitor::observing(&run_args("--track=auto"));
        let mut parent = monitor.take(&place(0), &[])["id"].clone();
        for number in 1..4 {
            monitor.end_well("before");
            let path = place(number - 1);
            monitor = Monitor::observing(&["restore", path.to_str().unwrap(), "--memory", mode]);
            let diff = monitor.take(&place(number), &["--diff"]);
            assert_eq!(diff["parent"], parent, "{mode}");
            parent = diff["id"].clone();
        }
        monitor.end_well("the last");
        // Somebody else is where the parent was.
        fs::remove_dir_all(place(1)).unwrap();
        fs::rename(place(0), place(1)).unwrap();
        refused(&place(3), "was replaced");
        fs::remove_dir_all(place(1)).unwrap();
        refused(&place(3), "cannot be used");
    }
}

fn refused(path: &Path, words: &str) {
    let mut modes: Vec<_> = modes().iter().map(|mode| vec!["--memory", mode]).collect();
    modes.push(vec!["--memory", "mode=map", "--verify"]);
    let mut found = BTreeSet::new();
    for mode in modes {
        let output =
            vmm().arg("restore").arg(path).args(["--duration", "1s", "--quiet"]).args(&mode).output();
        let output = output.unwrap();
        let stderr = text(&output.stderr);
        found.insert((output.status.code(), stderr.lines().count()));
        assert!(stderr.contains(words) || stderr.is_empty(), "{mode:?}: not {words}: {stderr}");
        assert_eq!(
            (output.status.code(), stderr.lines().count()),
            (Some(1), 1),
            "{mode:?}: {words}: {stderr}"
        );
    }
    assert_eq!(found.len(), 1);
}

/// Changes a file for as long as `during` takes.
fn with_change(path: &Path, change: impl FnOnce(&File), during: impl FnOnce()) {
    let before = fs::read(path).unwrap();
    change(&File::options().read(true).write(true).open(path).unwrap());
    during();
    fs::write(path, before).unwrap();
}

#[test]
fn what_is_no_snapshot_is_refused() {
    if skipped("what_is_no_snapshot_is_refused") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("snapshot");
    let cmdline = "workload=rand region=16M quiet=on passes=0";
    let args = ["run", "--memory", "size=64M", "--cmdline", cmdline];
    let monitor = Monitor::observing(&args);
    monitor.take(&path, &[]);
    // A dump is a log, too, and no directory.
    let dump = home.path().join("dump");
    let dumped = vmm()
        .args(["dirty", "--api-socket"])
        .arg(monitor.socket())
        .args(["dump", "--pages", "--full", "--epochs", "1", "-o"])
        .arg(&dump)
        .output()
        .unwrap();
    assert!(dumped.status.success());
    // What is somebody else's stays.
    assert!(monitor.take_none(&dump, &[]).contains("no snapshot"));
    assert!(monitor.take_none(&path, &["--diff"]).contains("build on"));
    fs::create_dir(home.path().join("empty")).unwrap();
    assert!(monitor.take_none(&home.path().join("empty"), &[]).contains("no snapshot"));
    assert!(monitor.take_none(&home.path().join("no/such/place"), &[]).contains("no/such"));
    drop(monitor);
    refused(&dump, "no snapshot");
    refused(&home.path().join("nothing"), "nothing");
    refused(&home.path().join("empty"), "state");

    let [state, memory, sums] = ["state", "memory", "sums"].map(|name| path.join(name));
    let length = |path: &Path| fs::metadata(path).unwrap().len();
    with_change(&state, |file| file.set_len(length(&state) - 7).unwrap(), || refused(&path, "cut off"));
    with_change(&state, |file| file.set_len(0).unwrap(), || refused(&path, "not a dirty log"));
    with_change(&state, |file| file.write_all_at(&[9], 8).unwrap(), || refused(&path, "version"));
    for at in (30..length(&state)).step_by(length(&state) as usize / 20) {
        let mut byte = [0];
        let flip = |file: &File| {
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        };
        with_change(&state, flip, || refused(&path, "damaged"));
    }
    with_change(&memory, |file| file.set_len(length(&memory) - 1).unwrap(), || refused(&path, "cut off"));
    with_change(&sums, |file| file.set_len(8).unwrap(), || refused(&path, "cut off"));
    for name in [&state, &memory, &sums] {
        let aside = home.path().join("aside");
        fs::rename(name, &aside).unwrap();
        refused(&path, name.to_str().unwrap());
        fs::rename(&aside, name).unwrap();
    }
    let size = vmm().arg("restore").arg(&path).args(["--memory", "size=1G"]).output().unwrap();
    assert_eq!(size.status.code(), Some(2));
}

/// A page that is wrong is found when it is read: before the guest runs, or, when it is read later, the guest ends.
#[test]
fn a_page_that_is_wrong_is_never_the_guests() {
    if skipped("a_page_that_is_wrong_is_never_the_guests") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("snapshot");
    let cmdline = "workload=seq region=32M quiet=on passes=0";
    let args = ["run", "--memory", "size=64M", "--cmdline", cmdline];
    let monitor = Monitor::observing(&args);
    monitor.take(&path, &[]);
    drop(monitor);
    let [memory, sums] = ["memory", "sums"].map(|name| path.join(name));
    // Pages of the guest's region, which it writes to all the time.
    let file = File::open(&sums).unwrap();
    let mut sum = [0; 8];
    let filled = (0..64 * MIB / PAGE_SIZE).filter(|gfn| {
        file.read_exact_at(&mut sum, gfn * 8).unwrap();
        sum != [0; 8]
    });
    let filled: Vec<_> = filled.collect();
    let (first, second) = (filled[filled.len() / 2], filled[filled.len() / 2 + 7]);
    let mut page = vec![0; PAGE_SIZE as usize];
    File::open(&memory).unwrap().read_exact_at(&mut page, second * PAGE_SIZE).unwrap();
    let context = format!("page {first:#x}");
    with_change(
        &memory,
        |file| file.write_all_at(&[0xa5, 0x5a, 0xff], first * PAGE_SIZE + 77).unwrap(),
        || refused_in_time(&path, &context),
    );
    // One in another's place; and none.
    with_change(
        &memory,
        |file| file.write_all_at(&page, first * PAGE_SIZE).unwrap(),
        || refused_in_time(&path, &context),
    );
    page.fill(0);
    with_change(
        &memory,
        |file| file.write_all_at(&page, first * PAGE_SIZE).unwrap(),
        || refused_in_time(&path, &context),
    );
    with_change(
        &sums,
        |file| file.write_all_at(&[0; 8], first * 8).unwrap(),
        || refused_in_time(&path, "sums of the pages"),
    );
}

/// As [`refused`], by those who look at the contents.
fn refused_in_time(path: &Path, words: &str) {
    let mut ways = vec![vec!["mode=eager"], vec!["mode=map", "--verify"]];
    if has_userfaultfd() {
        ways.extend([vec!["mode=lazy"], vec!["mode=lazy", "--verify"]]);
    }
    for way in ways {
        let run = vmm().arg("restore").arg(path).args(["--quiet", "--memory"]).args(&way).output().unwrap();
        let stderr = text(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{way:?}: {words}: {stderr}");
        assert!(stderr.contains(words), "{way:?}: not {words}: {stderr}");
    }
}

/// Whenever the monitor is killed, the snapshot that was there is whole, or the new one is.
#[test]
fn a_monitor_that_is_killed_leaves_a_whole_snapshot() {
    if skipped("a_monitor_that_is_killed_leaves_a_whole_snapshot") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let (full, diff) = (home.path().join("full"), home.path().join("diff"));
    let monitor = Monitor::observing(&run_args("--track=auto"));
    let report = monitor.take(&full, &[]);
    let micros = (report["seconds"].as_f64().unwrap() * 1e6) as u64;
    drop(monitor);
    let moments = if e2e::in_rig() { 3 } else { 16 };
    for moment in 0..moments {
        let monitor = Monitor::observing(&["restore", full.to_str().unwrap(), "--memory", "mode=eager"]);
        let (place, more): (_, &[&str]) = if moment % 4 == 3 { (&diff, &["--diff"]) } else { (&full, &[]) };
        let mut client =
            monitor.snapshot(place, more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(2000 + micros * 3 / 2 * moment / moments));
        drop(monitor);
        client.wait().unwrap();
        for place in [&full, &diff].into_iter().filter(|place| place.exists()) {
            let verify = vmm().args(["log", "verify"]).arg(place).output().unwrap();
            assert!(verify.status.success(), "moment {moment}: {}", text(&verify.stderr));
        }
        if diff.exists() {
            fs::remove_dir_all(&diff).unwrap();
        }
        let entries = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> =
            entries.filter(|name| text(name.as_encoded_bytes()).ends_with(".partial")).collect();
        assert!(left.len() <= 2, "what a killed monitor leaves is removed by the next: {left:?}");
    }
    let path = full.to_str().unwrap();
    Monitor::observing(&["restore", path]).end_well("after all of that");
}

/// A disk that is full costs nothing but the snapshot: the next diff has what that would have had.
#[test]
fn a_snapshot_that_fails_loses_nothing() {
    if skipped("a_snapshot_that_fails_loses_nothing") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let place = |number: usize| home.path().join(format!("{number}"));
    // The limit is on the size of a file: the image of memory, with 64 MiB, is below it.
    let mut monitor = Monitor::observing(&run_args("--track=auto"));
    monitor.take(&place(0), &[]);
    for (number, limit) in [(1, 1 << 20), (2, 63 << 20), (3, 8 << 20)] {
        tests::sys::limit_file_size(monitor.process(), Some(limit)).unwrap();
        let why = monitor.take_none(&place(number), &["--diff"]);
        assert!(why.contains("File too large") || why.contains("cannot"), "{why}");
        assert!(!place(number).exists());
        assert!(monitor.take_none(&place(number), &[]).contains("cannot"));
        tests::sys::limit_file_size(monitor.process(), None).unwrap();
    }
    monitor.take(&place(4), &["--diff"]);
    monitor.end_well("the original");
    let path = place(4);
    Monitor::observing(&["restore", path.to_str().unwrap()]).end_well("the diff after failures");
}

/// Holds `image` against a copy of `ram`.
fn assert_same(image: &ImageReader, then: &[(u64, Vec<u8>)], context: &str) {
    for (gpa, bytes) in then {
        let range = PageRange { start: Gfn(gpa / PAGE_SIZE), pages: bytes.len() as u64 / PAGE_SIZE };
        let mut found = vec![0; bytes.len()];
        image.read(range, &mut found).unwrap();
        let page = PAGE_SIZE as usize;
        let differs = (0..range.pages as usize)
            .find(|at| found[at * page..(at + 1) * page] != bytes[at * page..(at + 1) * page]);
        assert_eq!(differs, None, "{context}: pages of the region at {gpa:#x}");
    }
}

fn copy(ram: &Ram) -> Vec<(u64, Vec<u8>)> {
    let read = |region: &vmm::memory::RamRegion| {
        let mut bytes = vec![0; region.len as usize];
        ram.mem().read_slice(&mut bytes, GuestAddress(region.gpa)).unwrap();
        (region.gpa, bytes)
    };
    ram.regions().iter().map(read).collect()
}

/// Copy-on-write under a guest that writes all it can: the image is what memory was when the guest stood still.
#[test]
fn copy_on_write_is_memory_at_the_moment() {
    let test = "copy_on_write_is_memory_at_the_moment";
    if skipped(test) {
        return;
    }
    for (huge, shared) in [(HugePages::Thp, false), (HugePages::None, false), (HugePages::Thp, true)] {
        let memory = MemoryConfig { size: 96 * MIB, huge, shared, ..MemoryConfig::default() };
        let machine = start(config("workload=rand region=32M passes=0 populate=on", 2, memory));
        let ram = machine.ram();
        for round in 0..3 {
            let context = format!("{huge}, shared {shared}, round {round}");
            let home = tempfile::tempdir().unwrap();
            let (memory, sums) = (home.path().join("memory"), home.path().join("sums"));
            let (id, end) = (StreamId(round), Gfn(96 * MIB / PAGE_SIZE));
            let image = Arc::new(ImageWriter::create(&memory, id, end).unwrap());
            let cow = match Cow::new(machine.slots(), Arc::clone(&image), ram.is_anonymous()) {
                Ok(cow) => cow,
                Err(error @ CowError::Userfaultfd(_)) => return skip::skip(test, &error.to_string()),
                Err(error) => panic!("{error}"),
            };
            if round > 0 {
                cow.protect(Wanted::All).unwrap();
            }
            let still = machine.pause();
            cow.freeze(Wanted::All).unwrap();
            let then = copy(ram);
            drop(still);
            let report = cow.save(2).unwrap();
            let saved = Arc::into_inner(image).unwrap().finish(&sums).unwrap();
            let image = ImageReader::open(&memory, &sums, id, end, saved.digests).unwrap();
            assert_same(&image, &then, &context);
            let still = machine.pause();
            assert!(copy(ram) != then, "{context}: the guest wrote nothing meanwhile: {report:?}");
            drop(still);
        }
        machine.stop();
    }
}
