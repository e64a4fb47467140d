//! How fast a running guest is moved over a Unix socket, and how long it stands still for that: no page of it is all zeros, and
//! its memory is there on both sides before. Beside it, in the same turns, the limit: as many bytes copied through a socket into
//! memory like the destination's; and QEMU with the same guest. And how long it stands still when it goes on before its memory
//! has come, because the link is too slow for what it writes.

use std::time::Duration;
use std::{fs, thread};

use serde_json::json;

use super::monitors::{Monitors, Process, Qmp, failed, file, wait};
use super::results::{Bench, Better, Case, Unit};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan, Scale, limits};

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
    postcopy: bool,
}

const ONE: Way = Way { name: "QEMU", ring: false, multifd: false, postcopy: false };

const WAYS: [Way; 3] = [
    ONE,
    Way { name: "QEMU multifd", multifd: true, ..ONE },
    Way { name: "QEMU multifd, ring", ring: true, multifd: true, ..ONE },
];

/// MiB per second of a link that is too slow for a guest that writes flat out: it goes on at the destination before its memory
/// is there.
const SLOW_LINK: u64 = 400;

/// What the guest writes: "0", megabytes per second, or "flat out".
type Rate = &'static str;

pub(super) fn groups(plan: &Plan, monitors: &Monitors) -> Vec<Group<'static>> {
    let rates: &[Rate] = plan.scale.of(&["0"], &["0", "flat out"], &["0", "100", "500", "flat out"]);
    let mib = plan.scale.of(32, 256, 1024);
    let fast = rates.iter().map(|rate| precopy(plan, monitors, mib, rate));
    fast.chain((plan.scale != Scale::Work).then(|| postcopy(plan, monitors, mib))).collect()
}

fn case(monitor: &str, how: &str, written: &str) -> Case {
    Case::of(&[("monitor", monitor), ("how", how), ("written", written)])
}

fn group<'a>(
    plan: &Plan,
    monitors: &Monitors,
    title: String,
    vmm: Duration,
    contenders: Vec<Contender<'a>>,
) -> Group<'a> {
    let of_qemu = contenders.len().saturating_sub(2) as u32 * Duration::from_millis(4300);
    let turn = vmm + if monitors.has_qemu() { of_qemu } else { Duration::ZERO };
    let mut effort = plan.effort();
    effort.time *= 3;
    Group { bench: Bench::Migrate, title, lacks: None, expected: turn * plan.turns(), effort, contenders }
}

fn precopy(plan: &Plan, monitors: &Monitors, mib: u64, rate: Rate) -> Group<'static> {
    let written = if rate == "flat out" { rate.to_owned() } else { format!("{rate} MB/s") };
    let limit = Some((0, "the same bytes through a socket"));
    let mut contenders = vec![Contender {
        case: case("socket", "-", &written),
        limit: None,
        measure: Box::new(move |readings| {
            let took = limits::socket(mib as usize)?.as_secs_f64();
            readings.add(&TOTAL, took * 1e3);
            readings.add(&THROUGHPUT, mib as f64 / took);
            Ok(())
        }),
    }];
    let ours = monitors.clone();
    let measure = move |readings: &mut Readings| by_vmm(&ours, mib, rate, false, readings);
    contenders.push(Contender { case: case("vmm", "precopy", &written), limit, measure: Box::new(measure) });
    for way in WAYS.into_iter().filter(|_| monitors.has_qemu()) {
        let monitors = monitors.clone();
        let measure = move |readings: &mut Readings| by_qemu(&monitors, mib, rate, way, readings);
        let case = case(way.name, "precopy", &written);
        contenders.push(Contender { case, limit, measure: Box::new(measure) });
    }
    let title = format!("live migration of a guest of {mib} MiB that writes {written}");
    group(plan, monitors, title, Duration::from_millis(900 + mib), contenders)
}

/// There is no limit: nothing that a socket can do takes as long as this link.
fn postcopy(plan: &Plan, monitors: &Monitors, mib: u64) -> Group<'static> {
    let rate = "flat out";
    let written = format!("{rate}, postcopy at {SLOW_LINK} MiB/s");
    let ours = monitors.clone();
    let measure = move |readings: &mut Readings| by_vmm(&ours, mib, rate, true, readings);
    let mut contenders =
        vec![Contender { case: case("vmm", "postcopy", &written), limit: None, measure: Box::new(measure) }];
    if monitors.has_qemu() {
        let way = Way { postcopy: true, ..ONE };
        let theirs = monitors.clone();
        let measure = move |readings: &mut Readings| by_qemu(&theirs, mib, rate, way, readings);
        let case = case(way.name, "postcopy", &written);
        contenders.push(Contender { case, limit: None, measure: Box::new(measure) });
    }
    let title = format!("postcopy of a guest of {mib} MiB that writes {rate}, over {SLOW_LINK} MiB/s");
    group(plan, monitors, title, Duration::from_millis(900 + mib * 8), contenders)
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
    let link = format!("{SLOW_LINK}M");
    let mut args = vec!["migrate", "--api-socket", &api, "--json", &to];
    if postcopy {
        args.extend(["--postcopy", "--connections", "2", "--bandwidth", &link]);
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
    if postcopy && report["postcopy_pages"].as_u64().is_none_or(|pages| pages == 0) {
        return Err(failed("vmm", "its guest's memory was there before the guest"));
    }
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
        // What is to be asked for cannot be there before.
        let prealloc = !way.postcopy || name == "source";
        let mut command = monitors.qemu(mib, way.ring, prealloc, &workload(mib, rate))?;
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
        let capabilities = [
            capability("multifd", way.multifd),
            capability("postcopy-ram", way.postcopy),
            capability("events", true),
        ];
        side.call("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
        let link = if way.postcopy { SLOW_LINK << 20 } else { 1 << 40 };
        let parameters = json!({
            "max-bandwidth": link,
            "max-postcopy-bandwidth": if way.postcopy { link } else { 0 },
            "downtime-limit": 20,
            "multifd-channels": 4,
        });
        side.call("migrate-set-parameters", &parameters)?;
    }
    destination.call("migrate-incoming", &json!({ "uri": to }))?;
    source.call("migrate", &json!({ "uri": to }))?;
    if way.postcopy {
        // It switches when it is told to: after its first round.
        wait("QEMU", "the end of its first round", || {
            let status = source.call("query-migrate", &json!({})).ok()?;
            (status["ram"]["dirty-sync-count"].as_u64() > Some(1)).then_some(())
        })?;
        source.call("migrate-start-postcopy", &json!({}))?;
    }
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
