//! How fast a running guest is moved over a Unix socket, and how long it stands still for that: no page of it is all zeros, and
//! its memory is there on both sides before. Beside it, in the same turns, the limit: as many bytes copied through a socket into
//! memory like the destination's; and QEMU with the same guest.

use std::time::Duration;
use std::{fs, thread};

use serde_json::json;

use super::monitors::{Monitors, Process, Qmp, failed, file, wait};
use super::results::{Bench, Better, Case, Unit};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan, limits};

static TOTAL: Quantity = Quantity::decisive("total", Unit::Ms, Better::Lower);
static STILL: Quantity = Quantity::new("still", Unit::Ms, Better::Lower);
static THROUGHPUT: Quantity = Quantity::new("throughput", Unit::MibPerS, Better::Higher);
static SENT: Quantity = Quantity::new("sent", Unit::Mib, Better::Lower);

/// How QEMU migrates.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    ring: bool,
    multifd: bool,
}

const WAYS: [Way; 3] = [
    Way { name: "QEMU", ring: false, multifd: false },
    Way { name: "QEMU multifd", ring: false, multifd: true },
    Way { name: "QEMU multifd, ring", ring: true, multifd: true },
];

/// What the guest writes: "0", megabytes per second, or "flat out".
type Rate = &'static str;

pub(super) fn groups(plan: &Plan, monitors: &Monitors) -> Vec<Group<'static>> {
    let rates: &[Rate] = plan.scale.of(&["0"], &["0", "flat out"], &["0", "100", "500", "flat out"]);
    let mib = plan.scale.of(32, 256, 1024);
    rates.iter().map(|rate| group(plan, monitors, mib, rate)).collect()
}

fn group(plan: &Plan, monitors: &Monitors, mib: u64, rate: Rate) -> Group<'static> {
    let written = if rate == "flat out" { rate.to_owned() } else { format!("{rate} MB/s") };
    let case =
        |monitor: &str, how: &str| Case::of(&[("monitor", monitor), ("how", how), ("written", &written)]);
    let limit = Some((0, "the same bytes through a socket"));
    let mut contenders = vec![Contender {
        case: case("socket", "-"),
        limit: None,
        measure: Box::new(move |readings| {
            let took = limits::socket(mib as usize)?.as_secs_f64();
            readings.add(&TOTAL, took * 1e3);
            readings.add(&THROUGHPUT, mib as f64 / took);
            Ok(())
        }),
    }];
    for how in ["precopy", "postcopy"] {
        // What fits into the time that the guest may stand still needs no switch.
        if how == "postcopy" && rate == "0" {
            continue;
        }
        let monitors = monitors.clone();
        let measure =
            move |readings: &mut Readings| by_vmm(&monitors, mib, rate, how == "postcopy", readings);
        contenders.push(Contender { case: case("vmm", how), limit, measure: Box::new(measure) });
    }
    for way in WAYS.into_iter().filter(|_| monitors.has_qemu()) {
        let monitors = monitors.clone();
        let measure = move |readings: &mut Readings| by_qemu(&monitors, mib, rate, way, readings);
        contenders.push(Contender { case: case(way.name, "precopy"), limit, measure: Box::new(measure) });
    }
    let turn =
        Duration::from_millis(900 + mib) + Duration::from_secs(if monitors.has_qemu() { 13 } else { 0 });
    let title = format!("live migration of a guest of {mib} MiB that writes {written}");
    let mut effort = plan.effort();
    effort.time *= 3;
    Group { bench: Bench::Migrate, title, lacks: None, expected: turn * plan.turns(), effort, contenders }
}

fn workload(mib: u64, rate: Rate) -> String {
    let rate = match rate {
        "flat out" => "0".to_owned(),
        "0" => "4K".to_owned(),
        rate => format!("{rate}M"),
    };
    // The guest keeps a ledger beside its region.
    let region = mib - mib / 16;
    format!("workload=rand region={region}M rate={rate} reads=0 passes=0 nonzero=on quiet=on")
}

fn by_vmm(
    monitors: &Monitors,
    mib: u64,
    rate: Rate,
    postcopy: bool,
    readings: &mut Readings,
) -> Result<(), BenchError> {
    let directory = monitors.directory()?;
    let at = |name: &str| directory.path().join(name).display().to_string();
    let memory = format!("size={mib}M,prealloc=on");
    let run = |args: &[&str], name: &str| {
        let mut command =
            monitors.vmm(["run", "--ledger", "off", "--quiet", "--duration", "0", "--epoch", "200ms"]);
        Process::start(command.args(args).stderr(file(&directory.path().join(name))?))
    };
    let (api, to) = (at("api"), format!("unix:{}", at("to")));
    let cmdline = monitors.cmdline(&workload(mib, rate));
    let source = ["--memory", &memory, "--track", "kvm-manual", "--api-socket", &api, "--cmdline", &cmdline];
    let source = run(&source, "source")?;
    wait("vmm", "its guest's first epoch", || {
        let rate = monitors.ask(&["dirty", "--api-socket", &api, "--json", "rate"]).ok()?;
        (!rate["rate"].is_null()).then_some(())
    })?;
    let (there, here) =
        (at("there"), if postcopy { format!("size={mib}M,fault=uffd") } else { memory.clone() });
    let destination = run(&["--memory", &here, "--incoming", &to, "--api-socket", &there], "destination")?;
    wait("vmm", "that it waits for a machine", || directory.path().join("to").exists().then_some(()))?;
    let mut args = vec!["migrate", "--api-socket", &api, "--json", &to];
    if postcopy {
        args.extend(["--postcopy", "--connections", "2", "--downtime", "1ms"]);
    }
    let report = monitors.ask(&args)?;
    let (Some("completed"), Some(seconds), Some(still)) =
        (report["phase"].as_str(), report["seconds"].as_f64(), report["still_ms"].as_f64())
    else {
        return Err(failed(
            "vmm",
            format!("{report} {}", fs::read_to_string(at("destination")).unwrap_or_default()),
        ));
    };
    readings.add(&TOTAL, seconds * 1e3);
    readings.add(&STILL, still);
    readings.add(&THROUGHPUT, mib as f64 / seconds);
    readings.add(&SENT, report["bytes"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20));
    drop(source);
    drop(destination);
    Ok(())
}

fn by_qemu(
    monitors: &Monitors,
    mib: u64,
    rate: Rate,
    way: Way,
    readings: &mut Readings,
) -> Result<(), BenchError> {
    let directory = monitors.directory()?;
    let at = |name: &str| directory.path().join(name);
    let start = |name: &str, more: &[&str]| -> Result<(Process, Qmp), BenchError> {
        let qmp = at(name);
        let mut command = monitors.qemu(mib, way.ring, true, &workload(mib, rate))?;
        command.args(Qmp::option(&qmp)).args(more).stderr(file(&at(&format!("{name}.err")))?);
        let process = Process::start(&mut command)?;
        let said = || fs::read_to_string(at(&format!("{name}.err"))).unwrap_or_default();
        let qmp = Qmp::connect(&qmp).map_err(|error| failed("QEMU", format!("{error} {}", said())))?;
        Ok((process, qmp))
    };
    let (_source, mut source) = start("source", &[])?;
    // It has no way to say that its guest has touched its memory.
    thread::sleep(Duration::from_millis(1000 + mib * 3 / 2));
    let (_destination, mut destination) = start("destination", &["-incoming", "defer"])?;
    let to = format!("unix:{}", at("to").display());
    for side in [&mut source, &mut destination] {
        let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let capabilities =
            json!({ "capabilities": [capability("multifd", way.multifd), capability("events", true)] });
        side.call("migrate-set-capabilities", &capabilities)?;
        let parameters = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 20, "multifd-channels": 4 });
        side.call("migrate-set-parameters", &parameters)?;
    }
    destination.call("migrate-incoming", &json!({ "uri": to }))?;
    source.call("migrate", &json!({ "uri": to }))?;
    let status = wait("QEMU", "the end of its migration", || {
        let status = source.call("query-migrate", &json!({})).ok()?;
        (status["status"] == "completed").then_some(status)
    })?;
    let (stop, resume) = wait("QEMU", "that its guest runs at the destination", || {
        // Events come with answers.
        let _ = (source.call("query-status", &json!({})), destination.call("query-status", &json!({})));
        Some((source.event("STOP")?, destination.event("RESUME")?))
    })?;
    let total = status["total-time"].as_f64().unwrap_or(f64::NAN);
    readings.add(&TOTAL, total);
    readings.add(&STILL, (resume - stop) * 1e3);
    readings.add(&THROUGHPUT, mib as f64 / total * 1e3);
    readings.add(&SENT, status["ram"]["transferred"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20));
    Ok(())
}
