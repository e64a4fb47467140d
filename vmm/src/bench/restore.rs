//! How soon a snapshot runs: from before its monitor is executed to the guest's next output, and to the end of its first walk
//! over all its memory. The guest prints a byte now and then, so all is seen from outside, of any monitor.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::monitors::{Monitors, Process, Qmp, failed, moments, wait};
use super::results::{Bench, Better, Case, Unit};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan};
use crate::machine::MachineError;
use crate::memory::{MemoryConfig, Ram};

static FIRST: Quantity = Quantity::decisive("first output", Unit::Ms, Better::Lower);
static WALK: Quantity = Quantity::decisive("first walk", Unit::Ms, Better::Lower);
static SNAPSHOT: Quantity = Quantity::new("snapshot", Unit::Ms, Better::Lower);
static STILL: Quantity = Quantity::new("still", Unit::Ms, Better::Lower);

/// Bytes that a guest prints in a walk.
const BEATS: u64 = 16;

pub(super) fn groups(plan: &Plan, monitors: &Monitors) -> Vec<Group<'static>> {
    let sizes: &[u64] = plan.scale.of(&[32], &[128], &[128, 1024]);
    sizes.iter().map(|&mib| group(plan, monitors, mib)).collect()
}

fn group(plan: &Plan, monitors: &Monitors, mib: u64) -> Group<'static> {
    let memory = if mib < 1024 { format!("{mib} MiB") } else { format!("{} GiB", mib >> 10) };
    let mut contenders: Vec<Contender<'static>> = ["lazy", "recorded", "eager", "map"]
        .into_iter()
        .map(|way| {
            let monitors = monitors.clone();
            Contender {
                case: Case::of(&[("monitor", "vmm"), ("way", way), ("memory", &memory)]),
                limit: None,
                measure: Box::new(move |readings| by_vmm(&monitors, mib, way, readings)),
            }
        })
        .collect();
    if monitors.has_qemu() {
        let monitors = monitors.clone();
        contenders.push(Contender {
            case: Case::of(&[("monitor", "QEMU"), ("way", "-"), ("memory", &memory)]),
            limit: None,
            measure: Box::new(move |readings| by_qemu(&monitors, mib, readings)),
        });
    }
    let turn = Duration::from_millis(1200 + mib * 4);
    let expected = turn * contenders.len() as u32 * plan.turns();
    let title = format!("a snapshot of {memory} that runs again");
    Group { bench: Bench::Restore, title, lacks: None, expected, effort: plan.effort(), contenders }
}

/// Pages that the guest walks over.
fn pages(mib: u64) -> u64 {
    (mib - mib / 16) << 8
}

/// A guest that is at its walk when the snapshot is taken.
fn workload(mib: u64, beat: u64) -> String {
    format!("workload=seq region={}M passes=0 nonzero=on quiet=on beat={beat}", mib - mib / 16)
}

/// Has the host find the memory that a restore is about to need. Where the host is itself a virtual machine, memory that is
/// free goes back to whoever runs it, and what that costs is no monitor's doing.
fn find_memory(mib: u64) -> Result<(), BenchError> {
    let config = MemoryConfig { size: (mib + mib / 2) << 20, prealloc: true, ..MemoryConfig::default() };
    Ok(Ram::new(config).map(drop).map_err(MachineError::from)?)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn by_vmm(monitors: &Monitors, mib: u64, way: &str, readings: &mut Readings) -> Result<(), BenchError> {
    let directory = monitors.directory()?;
    let at = |name: &str| directory.path().join(name).display().to_string();
    let (memory, api, set) = (format!("size={mib}M"), at("api"), at("set"));
    // One that prints at every access, and one that prints some times in a walk.
    for (name, beat, count) in [("often", 1, 1), ("seldom", pages(mib) / BEATS, BEATS)] {
        let snapshot = at(name);
        let cmdline = workload(mib, beat);
        let mut run =
            monitors.vmm(["run", "--quiet", "--ledger", "off", "--duration", "0", "--epoch", "200ms"]);
        run.args(["--memory", &memory, "--api-socket", &api, "--cmdline", &cmdline, "--track", "kvm-manual"]);
        let source = Process::start(&mut run)?;
        wait("vmm", "its guest's first epoch", || {
            let rate = monitors.ask(&["dirty", "--api-socket", &api, "--json", "rate"]).ok()?;
            (!rate["rate"].is_null()).then_some(())
        })?;
        let report = monitors.ask(&["snapshot", "--api-socket", &api, "--json", &snapshot])?;
        drop(source);
        if way == "lazy" && name == "seldom" {
            readings.add(&SNAPSHOT, report["seconds"].as_f64().unwrap_or(f64::NAN) * 1e3);
            readings.add(&STILL, report["still_us"].as_f64().unwrap_or(f64::NAN) / 1e3);
        }
        let mode = if way == "recorded" { "lazy" } else { way };
        let restore = |more: &[&str]| {
            let mut command =
                monitors.vmm(["restore", "--track", "none", "--ledger", "off", "--json", "--duration"]);
            command.args(["0", "--memory", &format!("mode={mode}"), &snapshot]).args(more);
            command.stderr(Stdio::piped());
            command
        };
        if way == "recorded" && name == "seldom" {
            let mut run = Process::start(&mut restore(&["--record-working-set", &set]))?;
            moments(run.errors()?, count as usize, |byte| byte == b'.')
                .map_err(|error| failed("vmm", error))?;
            run.end()?;
        }
        let recorded = format!("recorded={set}");
        let more: &[&str] =
            if way == "recorded" && name == "seldom" { &["--prefault", &recorded] } else { &[] };
        for _ in 0..2 {
            find_memory(mib)?;
            let mut process = Process::start(&mut restore(more))?;
            let (_, last) = moments(process.errors()?, count as usize, |byte| byte == b'.')
                .map_err(|error| failed("vmm restore", error))?;
            readings.add(if name == "often" { &FIRST } else { &WALK }, ms(last - process.began));
        }
    }
    Ok(())
}

fn by_qemu(monitors: &Monitors, mib: u64, readings: &mut Readings) -> Result<(), BenchError> {
    let directory = monitors.directory()?;
    let at = |name: &str| directory.path().join(name);
    for (name, beat, count) in [("often", 1, 1), ("seldom", pages(mib) / BEATS, BEATS)] {
        let (snapshot, qmp) = (at(name), at(&format!("{name}.qmp")));
        let mut command = monitors.qemu(mib, false, false, &workload(mib, beat))?;
        let mut source = Process::start(command.args(Qmp::option(&qmp)))?;
        let mut control = Qmp::connect(&qmp)?;
        // Until it is at its walk, which nobody can see.
        thread::sleep(Duration::from_millis(1000 + mib));
        if source.has_ended() {
            return Err(failed("QEMU", "it has ended"));
        }
        // The guest stands still for all that it writes during the first round: more of them would bring nothing.
        let parameters = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 2000 });
        control.call("migrate-set-parameters", &parameters)?;
        control.call("migrate", &json!({ "uri": format!("file:{}", snapshot.display()) }))?;
        let status = wait("QEMU", "the end of its snapshot", || {
            let status = control.call("query-migrate", &json!({})).ok()?;
            (status["status"] == "completed").then_some(status)
        })?;
        drop(source);
        if name == "seldom" {
            readings.add(&SNAPSHOT, status["total-time"].as_f64().unwrap_or(f64::NAN));
            readings.add(&STILL, status["downtime"].as_f64().unwrap_or(f64::NAN));
        }
        for _ in 0..2 {
            find_memory(mib)?;
            let mut command = monitors.qemu(mib, false, false, &workload(mib, beat))?;
            command.arg("-incoming").arg(format!("file:{}", snapshot.display())).stdout(Stdio::piped());
            let mut process = Process::start(&mut command)?;
            let (_, last) = moments(process.console()?, count as usize, |byte| byte == b'.')
                .map_err(|error| failed("QEMU", error))?;
            readings.add(if name == "often" { &FIRST } else { &WALK }, ms(last - process.began));
        }
    }
    Ok(())
}
