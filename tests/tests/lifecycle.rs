//! One guest through everything that can be done with it while it runs, again and again: it writes as fast as it can, and
//! checks what it finds all the time.

use std::fs;
use std::path::Path;

use serde_json::json;
use tests::monitor::{Monitor, skipped, text, vmm};

const CMDLINE: &str = "workload=mixed region=48M verify=on quiet=on passes=0";

/// A busy host sends slowly.
const PATIENT: &[&str] = &["--auto-converge", "--downtime", "300ms"];

fn assert_whole(path: &Path, context: &str) {
    let verify = vmm().args(["log", "verify"]).arg(path).output().unwrap();
    assert!(verify.status.success(), "{context}: {}", text(&verify.stderr));
}

/// Twice, or as often as MIGRATIONS says.
#[test]
fn a_guest_is_dumped_kept_restored_and_moved_in_a_row() {
    if skipped("a_guest_is_dumped_kept_restored_and_moved_in_a_row") {
        return;
    }
    let rounds = std::env::var("MIGRATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let lazy = vmm::snapshot::Mode::best() == vmm::snapshot::Mode::Lazy;
    let modes: &[&str] = if lazy { &["lazy", "eager", "map"] } else { &["eager", "map"] };
    let mut here = Monitor::observing(&["run", "--memory", "size=64M", "--cpus", "2", "--cmdline", CMDLINE]);
    for round in 0..rounds {
        let home = tempfile::tempdir().unwrap();
        let mode = modes[round % modes.len()];
        let context = format!("round {round}, {mode}");
        let dump = home.path().join("dump");
        let args = ["dump", "--pages", "--full", "--epochs", "3", "--interval", "20ms", "-o"];
        let output = here.dirty(&[&args[..], &[dump.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{context}: {}", text(&output.stderr));
        assert_whole(&dump, &context);

        let kept = |number: usize| home.path().join(format!("kept-{number}"));
        here.take(&kept(0), &[]);
        for number in 1..=5 {
            here.take(&kept(number), &["--diff"]);
        }
        assert_whole(&kept(5), &context);
        here.assert_runs(&context);
        here.process().kill().unwrap();
        assert_eq!(here.wait(), None, "{context}");

        let memory = format!("mode={mode}");
        here = Monitor::observing(&["restore", kept(5).to_str().unwrap(), "--memory", &memory]);
        here.assert_runs(&context);

        let mut there = Monitor::waiting(&[]);
        let (code, report) = here.migrated(&format!("unix:{}", there.incoming().display()), PATIENT);
        assert_eq!((code, &report["phase"]), (Some(0), &json!("completed")), "{context}: {report}");
        assert_eq!(here.wait(), Some(0), "{context}: {}", here.stderr());
        let end = here.summary();
        let seen = (&end["end"], &end["missed"], &end["stray"]);
        assert_eq!(seen, (&json!("migrated"), &json!(0), &json!(0)), "{context}: {end}");
        there.wait_for_epochs();
        there.assert_runs(&context);
        here = there;
        // What it goes on from is not needed any more.
        fs::remove_dir_all(home.path()).unwrap();
    }
    here.end_well("after all of them");
}
