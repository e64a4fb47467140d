//! How fast `vmm run` starts and how much memory it needs, seen from outside the process: the figures that the
//! README quotes, measured on the host at hand.
//!
//! Time runs from just before `exec` to the guest's first byte on the console's pipe, and to the line that the
//! built-in guest prints when it is in ring 3. The monitor's own memory is its resident set without guest RAM.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde::Serialize;
use tests::cargo::vmm_binary;

/// Measure the start of `vmm run` and its memory on this host.
#[derive(Parser)]
struct Cli {
    /// Runs of each kind
    #[arg(long, default_value_t = 21)]
    runs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Minimum, median and maximum.
#[derive(Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        Some(Spread { min: *values.first()?, median: *values.get(values.len() / 2)?, max: *values.last()? })
    }
}

#[derive(Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    #[serde(flatten)]
    spread: Spread,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let vmm = match vmm_binary() {
        Ok(path) => path,
        Err(error) => {
            eprintln!("startup: {error}");
            return ExitCode::FAILURE;
        }
    };
    let sizes = ["1G", "64G"];
    let mut starts: Vec<Vec<Start>> = sizes.iter().map(|_| Vec::new()).collect();
    // One size after the other: what the kernel still has to take down of a large guest slows what comes next.
    for (index, size) in sizes.iter().enumerate() {
        for run in 0..cli.runs {
            match start(&vmm, size) {
                Ok(start) => starts[index].push(start),
                Err(error) => {
                    eprintln!("startup: run {run} of {size}: {error}");
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    let mut rows = Vec::new();
    for (size, starts) in sizes.iter().zip(&starts) {
        let mut row = |what: &str, value: fn(&Start) -> f64| {
            if let Some(spread) = Spread::of(starts.iter().map(value).collect()) {
                rows.push(Row { what: format!("{size} guest: {what}"), unit: "ms", spread });
            }
        };
        row("exec to its first output byte", |start| start.first_byte_ms);
        row("exec to its ring 3", |start| start.ring3_ms);
    }
    for (what, track) in [("tracking off", "none"), ("tracking on", "kvm-manual")] {
        let sizes: Result<Vec<f64>, _> = (0..cli.runs.min(7)).map(|_| own_memory(&vmm, track)).collect();
        match sizes.map(Spread::of) {
            Ok(Some(spread)) => rows.push(Row { what: format!("own memory, {what}"), unit: "MiB", spread }),
            Ok(None) => {}
            Err(error) => {
                eprintln!("startup: memory with {what}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    if cli.json {
        for row in &rows {
            println!("{}", serde_json::json!(row));
        }
        return ExitCode::SUCCESS;
    }
    println!("{:<44} {:>8} {:>8} {:>8}", "", "min", "median", "max");
    for Row { what, unit, spread } in &rows {
        println!("{what:<44} {:>8.2} {:>8.2} {:>8.2} {unit}", spread.min, spread.median, spread.max);
    }
    ExitCode::SUCCESS
}

struct Start {
    first_byte_ms: f64,
    ring3_ms: f64,
}

/// Starts a guest once. The monitor's own clock, which begins in `main`, tells only the distance of the two
/// moments.
fn start(vmm: &std::path::Path, size: &str) -> Result<Start, String> {
    let mut command = Command::new(vmm);
    command
        .args(["run", "--track", "none", "--json", "--timing", "--duration", "20ms", "--memory", size])
        .args(["--cmdline", "workload=rand region=16M quiet=on"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn().map_err(|e| format!("cannot start: {e}"))?;
    let (Some(mut console), Some(mut events)) = (child.stderr.take(), child.stdout.take()) else {
        return Err("no pipes".into());
    };
    let mut byte = [0];
    console.read_exact(&mut byte).map_err(|e| format!("no output: {e}"))?;
    let first_byte_ms = begin.elapsed().as_secs_f64() * 1000.0;
    let mut rest = String::new();
    console.read_to_string(&mut rest).map_err(|e| format!("console: {e}"))?;
    let mut lines = String::new();
    events.read_to_string(&mut lines).map_err(|e| format!("events: {e}"))?;
    let status = child.wait().map_err(|e| e.to_string())?;
    if !status.success() {
        return Err(format!("{status}: {}{rest}", char::from(byte[0])));
    }
    let timing = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find(|event| event["event"] == "timing")
        .ok_or("no timing event")?;
    let phase = |name: &str| timing["microseconds_since_main"][name].as_f64().ok_or(format!("no {name}"));
    let ring3_ms = first_byte_ms + (phase("ring3")? - phase("first_byte")?) / 1000.0;
    Ok(Start { first_byte_ms, ring3_ms })
}

/// MiB resident of a monitor that runs a 1 GiB guest with one vCPU, guest RAM not counted. RAM is a memfd here,
/// so that it can be told apart by its name.
fn own_memory(vmm: &std::path::Path, track: &str) -> Result<f64, String> {
    let mut child = Command::new(vmm)
        .args(["run", "--memory", "size=1G,shared=on", "--track", track, "--epoch", "100ms", "--json"])
        .args(["--duration", "0", "--cmdline", "workload=rand quiet=on rate=50M"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot start: {e}"))?;
    // Past the start, the measurement of the fault cost, and a few epochs.
    thread::sleep(Duration::from_millis(1500));
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", child.id()));
    // It may have ended by itself; its status tells.
    let _ = child.kill();
    child.wait().map_err(|e| e.to_string())?;
    let smaps = smaps.map_err(|e| format!("smaps: {e}"))?;
    let (mut own_kib, mut ram_kib, mut is_ram) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) {
            (Some("Rss:"), Some(kib)) if is_ram => ram_kib += kib,
            (Some("Rss:"), Some(kib)) => own_kib += kib,
            (Some(range), _) if range.contains('-') && !range.ends_with(':') => {
                is_ram = line.contains("memfd:guest-ram");
            }
            _ => {}
        }
    }
    if ram_kib == 0 {
        return Err("guest RAM is not to be found in smaps".into());
    }
    Ok(own_kib as f64 / 1024.0)
}
