//! `vmm bench` as its user meets it: what it keeps, what it says, and how it is ended. What it measures differs from host to host
//! and from run to run, and nothing here depends on it.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tests::conformance::wait_until;
use tests::monitor::{skipped, text, vmm};
use tests::sys;

fn results(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn figure<'a>(row: &'a Value, name: &str) -> Option<&'a Value> {
    row["figures"].as_array()?.iter().find(|figure| figure["name"] == name)
}

/// Changes every figure, which is told its bench and its case.
fn change(results: &mut Value, how: impl Fn(&Value, &Value, &mut Value)) {
    for table in results["tables"].as_array_mut().unwrap() {
        let bench = table["bench"].clone();
        for row in table["rows"].as_array_mut().unwrap() {
            let case = row["case"].clone();
            for figure in row["figures"].as_array_mut().unwrap() {
                how(&bench, &case, figure);
            }
        }
    }
}

/// The row of `table` with this tracker, and nothing else about it.
fn row<'a>(table: &'a Value, tracker: &str) -> Option<&'a Value> {
    let plain = |row: &&Value| {
        let case = &row["case"];
        case["tracker"] == tracker
            && case["rearm"] == "all"
            && (case["split"] == "-" || case["split"] == "leaf")
    };
    table["rows"].as_array()?.iter().find(plain)
}

#[test]
fn a_run_is_kept_and_told_and_the_same_as_itself() {
    if skipped("a_run_is_kept_and_told_and_the_same_as_itself") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let (json, report) = (home.path().join("results.json"), home.path().join("a/report"));
    let run = vmm()
        .args(["bench", "dirty", "--quick", "--memory", "8M", "--json"])
        .arg(&json)
        .arg("--report")
        .arg(&report)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let results = results(&json);
    assert_eq!((&results["schema"], &results["complete"]), (&json!(1), &json!(true)));
    let tables = results["tables"].as_array().unwrap();
    let dirty: Vec<_> = tables.iter().filter(|table| row(table, "bare ioctls").is_some()).collect();
    assert_eq!(dirty.len(), 6, "{results}");
    for table in dirty {
        let [bare, manual] = ["bare ioctls", "kvm-manual"].map(|tracker| row(table, tracker).unwrap());
        // The same guest wrote the same pages: what is sent of them is no matter of time.
        let sent = |row| figure(row, "sent").unwrap()["median"].as_f64().unwrap();
        let title = &table["title"];
        assert!((sent(bare) - sent(manual)).abs() < 0.2, "{title}: {} {}", sent(bare), sent(manual));
        assert!(figure(manual, "get and clear").unwrap()["limit"]["ratio"].as_f64() > Some(0.0), "{title}");
        assert!(row(table, "untracked").is_some(), "{title}");
        // Whose protecting is a step of its own.
        let clears =
            |tracker| row(table, tracker).is_some_and(|row| figure(row, "clear dirty log").is_some());
        assert!(clears("kvm-manual") && !clears("kvm-bitmap"), "{title}");
    }
    assert!(!results["skipped"].to_string().contains("missed"), "{}", results["skipped"]);
    assert!(text(&run.stdout).contains("kvm-manual"));
    for name in ["report.html", "report.md", "report.csv", "results.json"] {
        let text = fs::read_to_string(report.join(name)).unwrap();
        assert!(text.contains("kvm-manual") && !text.contains("NaN"), "{name}");
    }

    let compare = |other: &Path, args: &[&str]| {
        let output = vmm().args(["bench", "compare"]).arg(&json).arg(other).args(args).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, said, _) = compare(&json, &[]);
    assert!(code == Some(0) && said.contains("no change"), "{said}");

    // Ten times as slow, by its limit and by itself, in a run without noise: how much this host has is not the question.
    let mut steady = results;
    change(&mut steady, |_, _, figure| {
        let median = figure["median"].clone();
        figure["samples"].as_array_mut().unwrap().fill(median);
    });
    fs::write(&json, steady.to_string()).unwrap();
    let mut slower = steady;
    change(&mut slower, |bench, case, figure| {
        if bench == "dirty" && case["tracker"] == "exact" && figure["name"] == "enable" {
            let slow = |value: &mut Value| *value = json!(value.as_f64().unwrap() * 10.0);
            slow(&mut figure["median"]);
            slow(&mut figure["limit"]["ratio"]);
            figure["samples"].as_array_mut().unwrap().iter_mut().for_each(slow);
        }
    });
    let other = home.path().join("slower.json");
    fs::write(&other, slower.to_string()).unwrap();
    let (code, said, _) = compare(&other, &[]);
    assert!(code == Some(6) && said.contains("WORSE") && said.contains("enable"), "{said}");
    assert_eq!(compare(&other, &["--threshold", "100000"]).0, Some(0));

    // What is no run, or of another version.
    for (bytes, words) in [
        (&b"{"[..], "is not what `vmm bench --json` writes"),
        (br#"{"schema":1}"#, "is not what `vmm bench --json` writes"),
        (br#"{"schema":2}"#, "has form 2"),
    ] {
        fs::write(&other, bytes).unwrap();
        let (code, _, said) = compare(&other, &[]);
        assert!(code == Some(1) && said.contains(words) && said.lines().count() == 1, "{said}");
    }
    let (code, _, said) = compare(&home.path().join("nothing"), &[]);
    assert!(code == Some(1) && said.contains("cannot read"), "{said}");

    // What is not measured is told before anything is.
    let output = vmm().args(["bench", "boot", "--quick", "--only", "nonsense"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).is_empty() && text(&output.stderr).contains("no table has \"nonsense\""));
}

#[test]
fn what_was_measured_before_an_interruption_is_kept() {
    if skipped("what_was_measured_before_an_interruption_is_kept") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let json = home.path().join("results.json");
    let mut run = vmm()
        .args(["bench", "all", "--quick", "--memory", "8M", "--json"])
        .arg(&json)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("a table is measured", || json.exists());
    sys::signal(&run, libc::SIGINT).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(7));
    let results = results(&json);
    assert_eq!(results["complete"], json!(false));
    assert!(!results["tables"].as_array().unwrap().is_empty());
}

#[test]
fn monitors_are_measured_from_outside() {
    if skipped("monitors_are_measured_from_outside") {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    for (bench, figures) in
        [("boot", &["first byte", "ring 3", "own memory"][..]), ("restore", &["first output", "first walk"])]
    {
        let json = home.path().join(bench);
        // There is no such QEMU, which is said.
        let run =
            vmm().args(["bench", bench, "--quick", "--qemu", "/nowhere/qemu", "--json"]).arg(&json).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{bench}: {}", text(&run.stderr));
        let results = results(&json);
        let rows =
            results["tables"].as_array().unwrap().iter().flat_map(|table| table["rows"].as_array().unwrap());
        let ours: Vec<_> = rows.filter(|row| row["case"]["monitor"] == "vmm").collect();
        assert!(!ours.is_empty(), "{results}");
        for row in ours {
            assert!(figures.iter().all(|name| figure(row, name).is_some()), "{row}");
        }
        let skipped = results["skipped"].to_string();
        assert!(skipped.contains("/nowhere/qemu"), "{skipped}");
    }
}
