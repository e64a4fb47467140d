//! How fast a guest starts, from before its monitor is executed to what comes out of its console; and how much memory a monitor
//! has for itself.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use super::monitors::{Monitors, Process, failed, moments};
use super::results::{Bench, Better, Case, Unit};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan};

static FIRST: Quantity = Quantity::decisive("first byte", Unit::Ms, Better::Lower);
static RING3: Quantity = Quantity::decisive("ring 3", Unit::Ms, Better::Lower);
static OWN: Quantity = Quantity::new("own memory", Unit::Mib, Better::Lower);

pub(super) fn groups(plan: &Plan, monitors: &Monitors) -> Vec<Group<'static>> {
    // What is not touched is not there.
    let sizes: &[u64] = plan.scale.of(&[1], &[1], &[1, 64]);
    sizes.iter().map(|&gib| group(plan, monitors, gib)).collect()
}

fn group(plan: &Plan, monitors: &Monitors, gib: u64) -> Group<'static> {
    let memory = format!("{gib} GiB");
    let contender =
        |monitor: &str, limit, measure: fn(&Monitors, u64, &mut Readings) -> Result<(), BenchError>| {
            let monitors = monitors.clone();
            Contender {
                case: Case::of(&[("monitor", monitor), ("memory", &memory)]),
                limit,
                measure: Box::new(move |readings| measure(&monitors, gib << 10, readings)),
            }
        };
    let mut contenders = vec![
        contender("a process", None, |monitors, _, readings| {
            let mut process = Process::start(monitors.vmm(["--version"]).stdout(Stdio::piped()))?;
            let (first, _) =
                moments(process.console()?, 1, |_| true).map_err(|error| failed("vmm", error))?;
            readings.add(&FIRST, (first - process.began).as_secs_f64() * 1e3);
            Ok(())
        }),
        contender("vmm", Some((0, "a process")), by_vmm),
    ];
    if monitors.has_qemu() {
        contenders.push(contender("QEMU", Some((0, "a process")), by_qemu));
    }
    let mut effort = plan.effort();
    // They are short.
    (effort.least, effort.most) = (effort.least * 3, effort.most * 3);
    let expected = Duration::from_millis(500) * contenders.len() as u32 * plan.turns();
    Group {
        bench: Bench::Boot,
        title: format!("the start of a guest of {memory}"),
        lacks: None,
        expected,
        effort,
        contenders,
    }
}

const WORKLOAD: &str = "workload=read region=16M";

fn by_vmm(monitors: &Monitors, mib: u64, readings: &mut Readings) -> Result<(), BenchError> {
    let memory = format!("{mib}M");
    // With JSON on standard output the console is on standard error.
    let mut command =
        monitors.vmm(["run", "--json", "--track", "none", "--duration", "0", "--memory", &memory]);
    command.args(["--cmdline", WORKLOAD]).stderr(Stdio::piped());
    let mut process = Process::start(&mut command)?;
    let console = process.errors()?;
    look(&mut process, console, mib, readings).map_err(|error| failed("vmm", error))
}

fn by_qemu(monitors: &Monitors, mib: u64, readings: &mut Readings) -> Result<(), BenchError> {
    let mut process = Process::start(monitors.qemu(mib, false, false, WORKLOAD)?.stdout(Stdio::piped()))?;
    let console = process.console()?;
    look(&mut process, console, mib, readings).map_err(|error| failed("QEMU", error))
}

/// Until the guest's line from ring 3 is whole: the second, the first is its greeting.
fn look(
    process: &mut Process,
    console: impl std::io::Read,
    mib: u64,
    readings: &mut Readings,
) -> std::io::Result<()> {
    let (first, ring3) = moments(console, 2, |byte| byte == b'\n')?;
    readings.add(&FIRST, (first - process.began).as_secs_f64() * 1e3);
    readings.add(&RING3, (ring3 - process.began).as_secs_f64() * 1e3);
    // When it has settled.
    thread::sleep(Duration::from_millis(100));
    if let Some(own) = process.own_memory(mib) {
        readings.add(&OWN, own);
    }
    Ok(())
}
