//! Live migration, there and back, over connections that hold and over connections that break: the guest itself says
//! whether its memory is right, and there is never more than one of it.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use dirty_track::addr::{Gfn, PageRange};
use dirty_track::log::{Compression, Header, LogWriter, SlotInfo, StreamId};
use dirty_track::tracker::{Backing, Kind};
use serde_json::{Value, json};
use tests::conformance::{PATIENCE, wait_until};
use tests::migration::{Fault, Proxy, Step, free_tcp};
use tests::monitor::{Monitor, ended, skipped};
use tests::sys;

/// A guest that writes as fast as it can.
const CMDLINE: &str = "workload=mixed region=48M verify=on quiet=on passes=0";

/// A busy host sends slowly.
const PATIENT: &[&str] = &["--auto-converge", "--downtime", "300ms"];

/// Starts a source; none if this host has no KVM.
fn source(test: &str, cmdline: &str) -> Option<Monitor> {
    let args = ["run", "--memory", "size=64M", "--cpus", "2", "--cmdline", cmdline];
    (!skipped(test)).then(|| Monitor::observing(&args))
}

/// Holds against a guest that came that it runs.
fn assert_came(destination: &mut Monitor, context: &str) {
    destination.wait_for_epochs();
    destination.assert_runs(context);
}

/// Two commands that are the two ends of one connection: through named pipes in `directory`.
fn commands(directory: &Path) -> (String, String) {
    let pipe = |name: &str| {
        let path = directory.join(name);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        path.display().to_string()
    };
    let (forth, back) = (pipe("forth"), pipe("back"));
    (format!("exec:cat <{back} & exec cat >{forth}"), format!("exec:cat <{forth} & exec cat >{back}"))
}

/// 4 times, or as often as MIGRATIONS says.
#[test]
fn a_guest_goes_there_and_back_again() {
    let test = "a_guest_goes_there_and_back_again";
    let Some(mut here) = source(test, CMDLINE) else { return };
    let hops = std::env::var("MIGRATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let ways = [("unix", "1"), ("tcp", "4"), ("exec", "1"), ("unix", "4"), ("tcp", "1")];
    let directory = tempfile::tempdir().unwrap();
    for hop in 0..hops {
        let (by, connections) = ways[hop % ways.len()];
        let compress = ["none", "lz4", "zstd"][hop % 3];
        let own = directory.path().join(format!("{hop}"));
        fs::create_dir(&own).unwrap();
        let (to, at) = match by {
            "unix" => {
                let address = format!("unix:{}", own.join("incoming").display());
                (address.clone(), address)
            }
            "tcp" => {
                let address = free_tcp();
                (address.clone(), address)
            }
            _ => commands(&own),
        };
        let context = format!("hop {hop} by {by}, {connections} connections, {compress}");
        here.assert_runs(&context);
        let there = Monitor::waiting_at(&at, &[]);
        let args = [&["--connections", connections, "--compress", compress], PATIENT].concat();
        let (code, report) = here.migrated(&to, &args);
        assert_eq!((code, &report["phase"]), (Some(0), &json!("completed")), "{context}: {report}");
        assert!(report["still_ms"].as_f64() > Some(0.0), "{context}: {report}");
        assert_eq!(here.wait(), Some(0), "{context}: {}", here.stderr());
        let end = here.summary();
        let seen = (&end["end"], &end["missed"], &end["stray"]);
        assert_eq!(seen, (&json!("migrated"), &json!(0), &json!(0)), "{context}: {end}");
        here = there;
        assert_came(&mut here, &context);
    }
    here.end_well("after all of them");
}

/// Where a migration can break before the guest is given away.
const EARLY: [Step; 8] = [
    Step::Hello,
    Step::Welcome,
    Step::Epoch(0),
    Step::Pages(0),
    Step::Epoch(1),
    Step::Pages(1),
    Step::State,
    Step::End,
];

/// Every other one of `cases`, or all of them if MIGRATIONS is set: each is a machine that is moved.
fn some<T>(cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let step = if std::env::var_os("MIGRATIONS").is_some() { 1 } else { 2 };
    cases.into_iter().step_by(step)
}

/// Holds against a destination that did not get the machine that it says so and ends.
fn assert_gave_up(mut destination: Monitor, context: &str) {
    let code = destination.wait();
    let said = destination.stderr();
    assert_eq!(code, Some(1), "{context}: {said}");
    assert!(said.lines().last().is_some_and(|line| line.starts_with("vmm: no machine came: ")), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// Breaks the way from `source` to a new destination at `step` by what `fault` makes of the destination's process id.
/// The guest has to stay at the source, whose report is returned, with the destination.
fn broken(source: &Monitor, lane: usize, step: Step, fault: impl Fn(u32) -> Fault) -> (Value, Monitor) {
    let destination = Monitor::waiting(&[]);
    let fault = fault(destination.id());
    let proxy = Proxy::start(&destination.incoming(), Some((lane, step, fault)));
    let connections = if lane == 0 { "1" } else { "4" };
    let (code, report) =
        source.migrated(&proxy.address(), &[&["--connections", connections], PATIENT].concat());
    let context = format!("{fault:?} at {step:?}: {report}");
    assert!(proxy.has_fired(), "{context}");
    assert_eq!(code, Some(1), "{context}");
    source.assert_runs(&context);
    assert_eq!(source.get("/vm")["state"], "running", "{context}");
    (report, destination)
}

#[test]
fn a_connection_that_ends_early_leaves_the_guest_where_it_is() {
    let Some(source) = source("a_connection_that_ends_early_leaves_the_guest_where_it_is", CMDLINE) else {
        return;
    };
    let cuts = EARLY.iter().chain([&Step::Ready]).map(|&step| (0, step, Fault::Cut));
    let halves = EARLY.iter().rev().map(|&step| (0, step, Fault::Halve));
    let others = [(2, Step::Pages(0), Fault::Halve), (3, Step::End, Fault::Cut)];
    for (lane, step, fault) in some(cuts).chain(some(halves)).chain(others) {
        let (_, mut destination) = broken(&source, lane, step, |_| fault);
        if matches!(step, Step::Hello) {
            // It was nobody, as far as it knows: somebody else may come.
            sys::kill(destination.id()).unwrap();
            destination.wait();
        } else {
            assert_gave_up(destination, &format!("{fault:?} at {step:?}"));
        }
    }
    source.end_well("after all of them");
}

#[test]
fn a_destination_that_is_killed_early_leaves_the_guest_where_it_is() {
    let Some(source) = source("a_destination_that_is_killed_early_leaves_the_guest_where_it_is", CMDLINE)
    else {
        return;
    };
    for step in some(EARLY) {
        let (_, mut destination) = broken(&source, 0, step, Fault::KillBefore);
        assert_eq!(destination.wait(), None, "{step:?}");
    }
    source.end_well("after all of them");
}

#[test]
fn a_silent_network_leaves_the_guest_where_it_is() {
    let test = "a_silent_network_leaves_the_guest_where_it_is";
    // Each takes as long as a side waits for the other.
    thread::scope(|scope| {
        for step in [Step::Pages(1), Step::Ready] {
            scope.spawn(move || {
                let Some(source) = source(test, CMDLINE) else { return };
                let (report, destination) = broken(&source, 0, step, |_| Fault::Silence);
                assert!(report.to_string().contains("does not answer"), "{step:?}: {report}");
                assert_gave_up(destination, &format!("silence at {step:?}"));
                source.end_well("after silence");
            });
        }
    });
}

/// A source that is killed takes its guest with it, unless that has been given away.
#[test]
fn a_source_that_is_killed_leaves_at_most_one_guest() {
    // That it was given away must not be left out.
    let early = [Step::Welcome, Step::Pages(0), Step::Epoch(1), Step::State, Step::Ready];
    for step in some(early).chain([Step::Go]) {
        let Some(mut source) = source("a_source_that_is_killed_leaves_at_most_one_guest", CMDLINE) else {
            return;
        };
        let mut destination = Monitor::waiting(&[]);
        let proxy = Proxy::start(&destination.incoming(), Some((0, step, Fault::KillBefore(source.id()))));
        let (code, _) = source.migrated(&proxy.address(), PATIENT);
        assert_eq!((code, source.wait()), (Some(1), None), "{step:?}");
        if step == Step::Go {
            assert_came(&mut destination, "it was given away");
            destination.end_well("it was given away");
        } else {
            assert_gave_up(destination, &format!("killed at {step:?}"));
        }
    }
}

/// Once it is given away, who gave it cannot know whether it was taken.
#[test]
fn a_guest_that_was_given_away_in_doubt_runs_once() {
    let test = "a_guest_that_was_given_away_in_doubt_runs_once";
    // Whether the destination got it.
    type Gets = bool;
    type Case = (Step, fn(u32) -> Fault, Gets);
    let cases: [Case; 6] = [
        (Step::Ready, Fault::KillBefore, false),
        (Step::Go, |_| Fault::Cut, false),
        (Step::Go, |_| Fault::Halve, false),
        (Step::Go, |_| Fault::Silence, false),
        (Step::Go, Fault::KillBefore, false),
        (Step::Running, |_| Fault::Cut, true),
    ];
    for (step, fault, gets) in cases {
        let Some(source) = source(test, CMDLINE) else { return };
        let mut destination = Monitor::waiting(&[]);
        let fault = fault(destination.id());
        let proxy = Proxy::start(&destination.incoming(), Some((0, step, fault)));
        let context = format!("{fault:?} at {step:?}");
        let (code, report) = source.migrated(&proxy.address(), PATIENT);
        assert!(proxy.has_fired(), "{context}");
        assert_eq!((code, &report["phase"]), (Some(5), &json!("in-doubt")), "{context}: {report}");
        source.assert_stands_still(&context);
        // It cannot be given away a second time, or be had back by the way, whatever tracks it.
        assert_eq!(source.call("PUT", "/dirty/tracker", &json!({})).0, 204, "{context}");
        let (status, problem) = source.call("PUT", "/vm/migrate", &json!({ "to": "unix:/nowhere" }));
        assert!(status == 409 && problem.to_string().contains("doubt"), "{context}: {status} {problem}");
        assert_eq!(source.call("DELETE", "/vm/migrate", &Value::Null).0, 409, "{context}");
        source.assert_stands_still(&context);
        if gets {
            assert_came(&mut destination, &context);
            source.assert_stands_still(&context);
            destination.end_well(&context);
        } else {
            match fault {
                Fault::KillBefore(_) => assert_eq!(destination.wait(), None),
                _ => assert_gave_up(destination, &context),
            }
            assert_eq!(source.call("PUT", "/vm/resume", &Value::Null).0, 204, "{context}");
            source.assert_runs(&context);
            source.end_well(&context);
        }
    }
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_guest_where_it_is() {
    let Some(source) = source("a_migration_that_is_cancelled_leaves_the_guest_where_it_is", CMDLINE) else {
        return;
    };
    for by_signal in [false, true] {
        let destination = Monitor::waiting(&[]);
        let to = format!("unix:{}", destination.incoming().display());
        // Slow enough not to be over before that.
        let migrate = source.migrate(&to, &["--bandwidth", "8M"]);
        wait_until("it copies", || source.get("/vm/migrate")["phase"] == "precopy");
        assert_eq!(source.call("PUT", "/vm/migrate", &json!({ "to": to })).0, 409);
        assert_eq!(source.call("PUT", "/vm/pause", &Value::Null).0, 409);
        if by_signal {
            sys::signal(&migrate, libc::SIGINT).unwrap();
        } else {
            assert_eq!(source.call("DELETE", "/vm/migrate", &Value::Null).0, 204);
        }
        let (code, report) = ended(migrate);
        assert_eq!((code, &report["phase"]), (Some(1), &json!("cancelled")), "{report}");
        source.assert_runs("cancelled");
        assert_gave_up(destination, "cancelled");
    }
    // While nobody has answered yet.
    let destination = Monitor::waiting(&[]);
    let proxy = Proxy::start(&destination.incoming(), Some((0, Step::Hello, Fault::Silence)));
    for to in [proxy.address().as_str(), "exec:exec sleep 1000"] {
        let migrate = source.migrate(to, &[]);
        let connects = json!({ "phase": "connecting", "to": to });
        wait_until("it connects", || {
            let report = source.get("/vm/migrate");
            (&report["phase"], &report["to"]) == (&connects["phase"], &connects["to"])
        });
        sys::signal(&migrate, libc::SIGINT).unwrap();
        let (code, report) = ended(migrate);
        assert_eq!(code, Some(1), "{report}");
        assert_eq!(source.get("/vm/migrate")["phase"], "cancelled", "{report}");
        source.assert_runs("cancelled while it connects");
    }
    source.end_well("after all of them");
}

/// The destination asks for what it has not got while the guest runs there; a connection that breaks is made again.
#[test]
fn a_guest_that_writes_too_fast_is_asked_for_page_by_page() {
    let test = "a_guest_that_writes_too_fast_is_asked_for_page_by_page";
    let faults = [
        None,
        Some((0, Step::Request(5), Fault::Cut)),
        Some((1, Step::Request(1), Fault::Halve)),
        Some((0, Step::Answer(7), Fault::Halve)),
        Some((1, Step::Answer(3), Fault::Cut)),
        Some((2, Step::Request(0), Fault::Cut)),
    ];
    for fault in faults {
        let Some(mut source) = source(test, TOO_FAST) else { return };
        let mut destination = Monitor::waiting(&["--memory", "size=64M,fault=uffd"]);
        let proxy = Proxy::start(&destination.incoming(), fault);
        let (code, report) = source.migrated(&proxy.address(), POSTCOPY);
        let context = format!("{fault:?}: {report}");
        assert_eq!((code, &report["phase"]), (Some(0), &json!("completed")), "{context}");
        assert!(report["postcopy_pages"].as_u64() > Some(256), "{context}");
        assert_eq!(proxy.has_fired(), fault.is_some(), "{context}");
        assert_eq!(source.wait(), Some(0), "{context}");
        assert_came(&mut destination, &context);
        destination.end_well(&context);
    }
}

/// A guest for which [`POSTCOPY`] is too slow, and which does not take it long all the same.
const TOO_FAST: &str = "workload=rand region=12M nonzero=on verify=on quiet=on passes=0";

/// More connections than these two, so that one is left when another breaks; too slow to converge.
const POSTCOPY: &[&str] = &["--postcopy", "--connections", "3", "--bandwidth", "20M", "--downtime", "1ms"];

/// What is only at a source that is gone nobody has: the guest waits for it, and gets nothing else instead.
#[test]
fn a_guest_whose_pages_are_lost_does_not_go_on_without_them() {
    let test = "a_guest_whose_pages_are_lost_does_not_go_on_without_them";
    let Some(mut source) = source(test, TOO_FAST) else { return };
    let mut destination = Monitor::waiting(&["--memory", "size=64M,fault=uffd"]);
    // Hardly anything has come by then, and the guest needs all of it sooner or later.
    let fault = (0, Step::Request(0), Fault::KillBefore(source.id()));
    let proxy = Proxy::start(&destination.incoming(), Some(fault));
    assert_eq!(source.migrated(&proxy.address(), POSTCOPY).0, Some(1));
    assert_eq!(source.wait(), None);
    wait_until("it serves", || destination.socket().exists());
    // An epoch ends when the vCPUs stand still, which they cannot do while they wait for a page.
    wait_until("they wait", || {
        let epoch = || destination.get("/dirty")["last"]["epoch"].clone();
        let before = epoch();
        thread::sleep(Duration::from_millis(500));
        before == epoch()
    });
    // It can be ended all the same.
    destination.interrupt();
    assert_eq!(destination.wait(), Some(1));
    assert!(destination.stderr().contains("waits for pages that do not come"), "{}", destination.stderr());
    assert_eq!(destination.summary()["missed"], json!(0));
}

/// vCPUs that write faster than can be sent are held back until they do not.
#[test]
fn a_guest_that_writes_too_fast_is_slowed_down() {
    let test = "a_guest_that_writes_too_fast_is_slowed_down";
    // It has no phases in which it writes less.
    let cmdline = "workload=rand region=16M verify=on quiet=on passes=0";
    let Some(mut source) = source(test, cmdline) else { return };
    let mut destination = Monitor::waiting(&[]);
    let to = format!("unix:{}", destination.incoming().display());
    let args = ["--auto-converge", "--bandwidth", "100M", "--downtime", "140ms"];
    let (code, report) = source.migrated(&to, &args);
    assert_eq!((code, &report["phase"]), (Some(0), &json!("completed")), "{report}");
    assert!(report["slowed_percent"].as_u64() > Some(0), "{report}");
    assert_eq!(source.wait(), Some(0));
    assert_came(&mut destination, "it was slowed down");
    destination.end_well("it was slowed down");
    // Who may not is told so, and the guest stays.
    let Some(source) = self::source(test, cmdline) else { return };
    let destination = Monitor::waiting(&[]);
    let to = format!("unix:{}", destination.incoming().display());
    let (code, report) = source.migrated(&to, &["--bandwidth", "200M", "--downtime", "1ms"]);
    assert_eq!((code, &report["phase"]), (Some(1), &json!("failed")), "{report}");
    assert!(report["error"].as_str().is_some_and(|error| error.contains("--auto-converge")), "{report}");
    source.assert_runs("it would not converge");
    source.end_well("it would not converge");
}

#[test]
fn what_is_damaged_on_the_way_is_not_run() {
    let Some(source) = source("what_is_damaged_on_the_way_is_not_run", CMDLINE) else { return };
    let steps =
        [Step::Hello, Step::Welcome, Step::Epoch(0), Step::Epoch(1), Step::State, Step::End, Step::Ready];
    for step in some(steps) {
        let (_, mut destination) = broken(&source, 0, step, |_| Fault::Flip);
        if step == Step::Hello {
            sys::kill(destination.id()).unwrap();
            destination.wait();
        } else {
            assert_gave_up(destination, &format!("a bit at {step:?}"));
        }
    }
    source.end_well("after all of them");
}

#[test]
fn a_guest_without_a_place_to_go_stays() {
    let Some(source) = source("a_guest_without_a_place_to_go_stays", CMDLINE) else { return };
    let directory = tempfile::tempdir().unwrap();
    let refused = |to: &str, words: &str| {
        let (code, said) = source.migrated(to, &[]);
        let said = said.as_str().unwrap_or_default();
        let warned = usize::from(to.starts_with("tcp:"));
        assert_eq!((code, said.lines().count()), (Some(1), 1 + warned), "{to}: {said}");
        assert!(said.contains(words), "{to}: {words}: {said}");
        assert_eq!(source.get("/vm/migrate")["phase"], "failed", "{to}");
    };
    let nowhere = format!("unix:{}", directory.path().join("nothing").display());
    refused(&nowhere, "--incoming");
    refused(&free_tcp(), "--incoming");
    refused("exec:exit 3", "broke off");
    refused("exec:echo hello, I am no monitor; exec cat >/dev/null", "does not speak this protocol");
    // A destination with a disk, for a machine without.
    let image = directory.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let disk = format!("path={}", image.display());
    let other = Monitor::waiting(&["--disk", &disk]);
    refused(&format!("unix:{}", other.incoming().display()), "other disks");
    assert_gave_up(other, "other disks");
    source.end_well("after all of them");
}

/// A source that is somebody else.
struct Stranger(UnixStream);

impl Stranger {
    fn at(destination: &Monitor) -> Stranger {
        let stream = UnixStream::connect(destination.incoming()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Stranger(stream)
    }

    fn says(mut self, note: &Value) -> Stranger {
        let text = note.to_string();
        let length = u32::try_from(text.len()).unwrap().to_le_bytes();
        // Who has heard enough closes its side.
        let _ = self.0.write_all(&[&b"VMN1"[..], &length, text.as_bytes()].concat());
        self
    }

    fn hears(&mut self) -> Option<Value> {
        let mut head = [0; 8];
        self.0.read_exact(&mut head).ok()?;
        let mut text = vec![0; u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize];
        self.0.read_exact(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Holds against the destination that it refuses, with these words.
    fn expect_refused(mut self, words: &str) {
        let said = self.hears().unwrap_or_default();
        assert_eq!(said["note"], "refused", "{words}: {said}");
        assert!(said["why"].as_str().unwrap_or_default().contains(words), "{words}: {said}");
    }
}

const ID: StreamId = StreamId(7);

fn hello(change: impl FnOnce(&mut Value)) -> Value {
    let mut hello = json!({
        "note": "hello",
        "version": [1, 0],
        "id": ID.to_string(),
        "lane": 0,
        "lanes": 1,
        "shape": { "memory": 64 << 20, "cpus": 1, "disks": [], "rng": false, "builtin": true },
        "postcopy": false,
    });
    change(&mut hello);
    hello
}

fn header(pages: u64) -> Header {
    Header {
        id: ID,
        parent: None,
        page_size: 4096,
        slots: vec![SlotInfo { id: 0, first: 0, pages }],
        tracker: "none".into(),
        guarantees: Kind::None.guarantees(Backing::Private),
        contents: true,
        checked: false,
        creator: "a stranger".into(),
    }
}

#[test]
fn strangers_bring_nothing() {
    let test = "strangers_bring_nothing";
    if skipped(test) {
        return;
    }
    // Those after which it waits for another one.
    let destination = Monitor::waiting(&[]);
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"VMN1\xff\xff\xff\xff", b"VMN1\x04\0\0\0{{{{", b"VMN1", b""]
    {
        let mut stranger = Stranger::at(&destination);
        stranger.0.write_all(bytes).unwrap();
        stranger.0.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stranger.hears(), None, "{bytes:?}");
    }
    let says = |note: &Value| Stranger::at(&destination).says(note);
    says(&hello(|hello| hello["version"] = json!([2, 0]))).expect_refused("version 2");
    says(&hello(|hello| hello["lanes"] = json!(0))).expect_refused("0 connections");
    says(&hello(|hello| hello["lanes"] = json!(1000))).expect_refused("1000 connections");
    says(&hello(|hello| (hello["lane"], hello["lanes"]) = (json!(1), json!(2))))
        .expect_refused("out of order");
    for odd in [
        json!({ "note": "go" }),
        hello(|hello| hello["shape"]["cpus"] = json!(256)),
        hello(|hello| hello["shape"]["memory"] = json!(-1)),
        hello(|hello| hello["id"] = json!("seven")),
    ] {
        assert_eq!(says(&odd).hears(), None, "{odd}");
    }
    // Connections of two migrations, and then of one that is another.
    let first = says(&hello(|hello| hello["lanes"] = json!(2)));
    says(&hello(|hello| (hello["lane"], hello["id"]) = (json!(1), json!("1".repeat(32)))))
        .expect_refused("another migration");
    drop(first);
    assert!(!destination.stderr().contains("panicked"), "{}", destination.stderr());
    drop(destination);

    // Those after which it ends.
    for (note, words) in [
        (hello(|hello| hello["shape"]["memory"] = json!(1u64 << 60)), "guest memory"),
        (hello(|hello| hello["shape"]["memory"] = json!(0)), "guest memory"),
        (hello(|hello| hello["shape"]["memory"] = json!((64 << 20) + 12345)), "guest memory"),
        (hello(|hello| hello["shape"]["cpus"] = json!(255)), "255 vCPUs"),
        (hello(|hello| hello["shape"]["cpus"] = json!(0)), "0 vCPUs"),
        (
            hello(|hello| hello["shape"]["disks"] = json!([{ "path": "/etc/passwd", "readonly": true }])),
            "/etc/passwd",
        ),
    ] {
        let mut destination = Monitor::waiting(&[]);
        Stranger::at(&destination).says(&note).expect_refused(words);
        assert_eq!(destination.wait(), Some(1), "{note}");
        let said = destination.stderr();
        assert!(said.contains(words) && !said.contains("panicked"), "{note}: {said}");
    }
    // Logs of something else, or of less than a machine.
    let whole = 64 << 20 >> 12;
    type Log<'a> = LogWriter<&'a UnixStream>;
    type Case<'a> = (Header, fn(&mut Log<'_>), &'a str);
    let logs: [Case<'_>; 5] = [
        (header(whole / 2), |_| {}, "another memory"),
        (Header { contents: false, ..header(whole) }, |_| {}, "another migration"),
        (Header { id: StreamId(8), ..header(whole) }, |_| {}, "another migration"),
        (header(whole), |_| {}, "no record of each vCPU"),
        (header(whole), |log| log.state("vcpu", b"{\"id\":0}").unwrap(), "the vcpu of the machine's state"),
    ];
    for (header, write, words) in logs {
        let destination = Monitor::waiting(&[]);
        let mut stranger = Stranger::at(&destination).says(&hello(|_| {}));
        assert_eq!(stranger.hears(), Some(json!({ "note": "welcome" })), "{words}");
        let mut log = LogWriter::new(&stranger.0, header, Compression::None).unwrap();
        write(&mut log);
        // It may have heard enough.
        let _ = log.finish();
        stranger.expect_refused(words);
        assert_gave_up(destination, words);
    }
    // Contents that are outside of memory, in a log that says that they are in it.
    let destination = Monitor::waiting(&[]);
    let mut stranger = Stranger::at(&destination).says(&hello(|_| {}));
    assert_eq!(stranger.hears(), Some(json!({ "note": "welcome" })));
    let mut log = LogWriter::new(Vec::new(), header(1 << 40), Compression::None).unwrap();
    let mut epoch = log.epoch(0, 0).unwrap();
    let range = PageRange { start: Gfn(whole + 5), pages: 1 };
    epoch
        .pages(range, |_, to| {
            to.fill(0x55);
            Ok(())
        })
        .unwrap();
    epoch.finish().unwrap();
    let bytes = log.finish().unwrap().0;
    // The head of the header says how long that is; the records behind it are the other log's.
    let behind =
        |bytes: &[u8]| 16 + 24 + u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]) as usize;
    let honest = LogWriter::new(Vec::new(), header(whole), Compression::None).unwrap().finish().unwrap().0;
    let forged = [&honest[..behind(&honest)], &bytes[behind(&bytes)..]].concat();
    let _ = stranger.0.write_all(&forged);
    stranger.expect_refused("");
    assert_gave_up(destination, "outside of memory");
}

/// The image of a disk is one machine's at any moment, but for that in which the guest changes sides.
#[test]
fn a_disk_goes_with_its_guest() {
    let test = "a_disk_goes_with_its_guest";
    if skipped(test) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let disk = format!("path={}", image.display());
    let third = || {
        let file = fs::File::open(&image).unwrap();
        file.try_lock().is_ok().then_some(file)
    };
    let begin =
        || Monitor::observing(&["run", "--memory", "size=64M", "--disk", &disk, "--cmdline", CMDLINE]);
    let mut here = begin();
    // There and back; the second time it is looked at while it is on its way, slowly: all that it has fits the downtime.
    for args in [PATIENT, &["--bandwidth", "20M", "--downtime", "4s"]] {
        let there = Monitor::waiting(&["--disk", &disk]);
        let migrate = here.migrate(&format!("unix:{}", there.incoming().display()), args);
        while here.get("/vm/migrate")["phase"] == "precopy" {
            assert!(third().is_none());
        }
        let (code, report) = ended(migrate);
        assert_eq!(code, Some(0), "{report}");
        assert_eq!(here.wait(), Some(0));
        assert!(third().is_none());
        here = there;
        assert_came(&mut here, "with its disk");
    }
    here.end_well("with its disk");

    // It runs there, so it cannot be had back here.
    let source = begin();
    let mut there = Monitor::waiting(&["--disk", &disk]);
    let proxy = Proxy::start(&there.incoming(), Some((0, Step::Running, Fault::Cut)));
    assert_eq!(source.migrated(&proxy.address(), PATIENT).0, Some(5));
    assert_came(&mut there, "with its disk");
    let (status, problem) = source.call("PUT", "/vm/resume", &Value::Null);
    assert!(status == 409 && problem.to_string().contains("in use"), "{status} {problem}");
    source.assert_stands_still("its disk is elsewhere");
    there.end_well("with its disk");
    // Now it can: a user knows what that means.
    assert_eq!(source.call("PUT", "/vm/resume", &Value::Null).0, 204);
    assert!(third().is_none());
    source.assert_runs("it has its disk back");

    // Somebody else is quicker than the destination, which must not run it then.
    let mut there = Monitor::waiting(&["--disk", &disk]);
    let proxy = Proxy::start(&there.incoming(), Some((0, Step::Go, Fault::Hold)));
    let migrate = source.migrate(&proxy.address(), PATIENT);
    wait_until("it is given away", || proxy.has_fired());
    let thief = third();
    assert!(thief.is_some());
    proxy.go_on();
    let (code, report) = ended(migrate);
    assert!(code == Some(5) && report["error"].as_str().unwrap().contains("in use"), "{report}");
    assert_eq!(there.wait(), Some(1));
    assert!(there.stderr().contains("in use"), "{}", there.stderr());
    assert_eq!(source.call("PUT", "/vm/resume", &Value::Null).0, 409);
    drop(thief);
    assert_eq!(source.call("PUT", "/vm/resume", &Value::Null).0, 204);
    assert!(third().is_none());
    source.assert_runs("the thief has gone");
    source.end_well("the thief has gone");
}
