//! Live migration of one guest over a Unix socket, by `vmm` and by QEMU in turn, on this host's KVM: 1 GiB of which no
//! page is all zeros, allocated on both sides before, written at different rates. Beside both, in the same run, the
//! limit: as much memory copied through a Unix socket in pieces of 1 MiB into memory like the destination's.
//!
//! QEMU is the Debian package that the rig downloads, with its microvm machine, the guest is the same ELF.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde::Serialize;
use serde_json::{Value, json};
use tests::cargo::vmm_binary;
use tests::store::{Qemu, Store};

/// Compare live migration by vmm and by QEMU on this host.
#[derive(Parser)]
struct Cli {
    /// Runs of each kind
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Megabytes that the guest writes per second; 0 for next to nothing, and `flat` for as much as it can
    #[arg(long, value_delimiter = ',', default_value = "0,100,500,flat")]
    rates: Vec<String>,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Without QEMU
    #[arg(long)]
    alone: bool,
    /// Options of `vmm migrate`, as in "--connections 4"
    #[arg(long, default_value = "")]
    vmm: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

type Failure = Box<dyn std::error::Error>;

/// One migration.
#[derive(Clone, Copy, Debug, Serialize)]
struct Moved {
    total_ms: f64,
    still_ms: f64,
}

/// A way to migrate, and how it went.
#[derive(Debug, Serialize)]
struct Row {
    rate: String,
    how: String,
    runs: Vec<Moved>,
    total_ms: f64,
    still_ms: f64,
}

/// What ends with whoever started it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Waits for what `there` finds.
fn wait<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> Result<T, Failure> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(found) = there() {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(format!("{what} does not happen").into())
}

fn cmdline(cli: &Cli, rate: &str) -> String {
    let rate = match rate {
        "flat" => "0".to_owned(),
        "0" => "4K".to_owned(),
        rate => format!("{rate}M"),
    };
    // The guest keeps a ledger beside its region.
    let region = cli.memory - cli.memory / 16;
    let tsc_khz = tsc_khz().map_or(String::new(), |khz| format!("tsc_khz={khz} "));
    format!("{tsc_khz}workload=rand region={region}M rate={rate} reads=0 passes=0 nonzero=on quiet=on")
}

/// What KVM says of the time-stamp counter; QEMU's command line does not tell the guest.
fn tsc_khz() -> Option<u32> {
    let kvm = vmm::machine::open_kvm().ok()?;
    kvm.create_vm().ok()?.create_vcpu(0).ok()?.get_tsc_khz().ok()
}

fn by_vmm(cli: &Cli, vmm: &Path, rate: &str) -> Result<Moved, Failure> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let memory = format!("size={}M,prealloc=on", cli.memory);
    let run = |args: &[&str]| {
        let mut command = Command::new(vmm);
        command.args([
            "run",
            "--memory",
            &memory,
            "--ledger",
            "off",
            "--quiet",
            "--duration",
            "0",
            "--epoch",
            "200ms",
        ]);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Process)
    };
    let api = at("api").display().to_string();
    let to = format!("unix:{}", at("to").display());
    let _source = run(&["--track", "kvm-manual", "--api-socket", &api, "--cmdline", &cmdline(cli, rate)])?;
    let call = |args: &[&str]| -> Option<Value> {
        let output = Command::new(vmm).args(args).output().ok()?;
        serde_json::from_slice(&output.stdout).ok()
    };
    wait("the guest's first epoch", || {
        call(&["dirty", "--api-socket", &api, "--json", "rate"]).filter(|rate| !rate["rate"].is_null())
    })?;
    let _destination = run(&["--incoming", &to])?;
    wait("the destination", || at("to").exists().then_some(()))?;
    let mut args = vec!["migrate", "--api-socket", &api, "--json", &to];
    args.extend(cli.vmm.split_whitespace());
    let report = call(&args).ok_or("vmm migrate says nothing")?;
    match (report["phase"].as_str(), report["seconds"].as_f64(), report["still_ms"].as_f64()) {
        (Some("completed"), Some(seconds), Some(still_ms)) => Ok(Moved { total_ms: seconds * 1e3, still_ms }),
        _ => Err(format!("vmm: {report}").into()),
    }
}

/// A QEMU's machine protocol.
struct Qmp {
    to: UnixStream,
    from: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Qmp, Failure> {
        let to = wait("QEMU's socket", || UnixStream::connect(path).ok())?;
        let mut qmp = Qmp { from: BufReader::new(to.try_clone()?), to, events: Vec::new() };
        qmp.line()?;
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err("QEMU broke off".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn call(&mut self, name: &str, arguments: &Value) -> Result<Value, Failure> {
        self.to.write_all(format!("{}\n", json!({ "execute": name, "arguments": arguments })).as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer.get("error").is_some() {
                return Err(format!("QEMU: {name}: {answer}").into());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Seconds of the event `name`, by this host's clock.
    fn event(&mut self, name: &str) -> Option<f64> {
        let event = self.events.iter().find(|event| event["event"] == name)?;
        let at = &event["timestamp"];
        Some(at["seconds"].as_f64()? + at["microseconds"].as_f64()? / 1e6)
    }
}

/// How QEMU migrates.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    ring: bool,
    multifd: bool,
}

const WAYS: [Way; 3] = [
    Way { name: "QEMU", ring: false, multifd: false },
    Way { name: "QEMU, multifd 4", ring: false, multifd: true },
    Way { name: "QEMU, multifd 4, ring", ring: true, multifd: true },
];

fn by_qemu(cli: &Cli, qemu: &Qemu, elf: &Path, way: Way, rate: &str) -> Result<Moved, Failure> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let start = |name: &str, more: &[&str]| -> Result<(Process, Qmp), Failure> {
        let qmp = at(name);
        let mut command = qemu.loader();
        command.arg(qemu.executable()).arg("-L").arg(qemu.tree.join("usr/share/qemu"));
        command.arg("-L").arg(qemu.tree.join("usr/share/seabios"));
        command.args([
            "-M",
            "microvm,pit=off,rtc=off,memory-backend=ram",
            "-bios",
            "qboot.rom",
            "-cpu",
            "host,arch-capabilities=off",
            "-smp",
            "1",
        ]);
        command.args(["-accel", if way.ring { "kvm,dirty-ring-size=4096" } else { "kvm" }]);
        command.args(["-m", &format!("{}M", cli.memory)]);
        command.args(["-object", &format!("memory-backend-ram,id=ram,size={}M,prealloc=on", cli.memory)]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-serial", "null", "-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        command.arg("-kernel").arg(elf).args(["-append", &cmdline(cli, rate)]).args(more);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(at(&format!("{name}.err")))?);
        let process = Process(command.spawn()?);
        let qmp = Qmp::connect(&qmp).map_err(|error| {
            format!("{error}: {}", fs::read_to_string(at(&format!("{name}.err"))).unwrap_or_default())
        })?;
        Ok((process, qmp))
    };
    let (_source, mut source) = start("source", &[])?;
    // It has no way to say that it has touched its memory.
    thread::sleep(Duration::from_millis(2500));
    let (_destination, mut destination) = start("destination", &["-incoming", "defer"])?;
    let to = format!("unix:{}", at("to").display());
    for side in [&mut source, &mut destination] {
        let capabilities = json!({ "capabilities": [{ "capability": "multifd", "state": way.multifd },
            { "capability": "events", "state": true }] });
        side.call("migrate-set-capabilities", &capabilities)?;
        let parameters = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 20, "multifd-channels": 4 });
        side.call("migrate-set-parameters", &parameters)?;
    }
    destination.call("migrate-incoming", &json!({ "uri": to }))?;
    source.call("migrate", &json!({ "uri": to }))?;
    let total_ms = wait("QEMU's migration", || {
        let status = source.call("query-migrate", &json!({})).ok()?;
        let over = status["status"] == "completed";
        over.then(|| status["total-time"].as_f64()).flatten()
    })?;
    let (stop, resume) = wait("QEMU's guest at its destination", || {
        // Events come with answers.
        let _ = (source.call("query-status", &json!({})), destination.call("query-status", &json!({})));
        Some((source.event("STOP")?, destination.event("RESUME")?))
    })?;
    Ok(Moved { total_ms, still_ms: (resume - stop) * 1e3 })
}

/// Bytes of a piece.
const PIECE: usize = 1 << 20;

/// Copies as much through a socket, from memory to memory that is there. Milliseconds.
fn limit(mebibytes: u64) -> Result<f64, Failure> {
    let memory = |size: u64| {
        let config = format!("size={size}M,prealloc=on").parse::<vmm::memory::MemoryConfig>();
        Ok::<_, Failure>(vmm::memory::Ram::new(config?)?)
    };
    use vm_memory::{Bytes, GuestAddress};
    let (from, to) = (memory(mebibytes)?, memory(mebibytes)?);
    let filler: Vec<u8> = (0..PIECE).map(|byte| byte as u8 | 1).collect();
    let pieces = move || (0..mebibytes).map(|piece| GuestAddress(piece << 20));
    for piece in pieces() {
        from.mem().write_slice(&filler, piece)?;
    }
    let (mut here, mut there) = UnixStream::pair()?;
    let began = Instant::now();
    let receiver = thread::spawn(move || -> std::io::Result<vmm::memory::Ram> {
        use vm_memory::{GuestMemoryBackend, ReadVolatile};
        for piece in pieces() {
            let mut slice = to.mem().get_slice(piece, PIECE).map_err(std::io::Error::other)?;
            there.read_exact_volatile(&mut slice).map_err(std::io::Error::other)?;
        }
        there.write_all(b"!")?;
        Ok(to)
    });
    for piece in pieces() {
        use vm_memory::{GuestMemoryBackend, WriteVolatile};
        here.write_all_volatile(&from.mem().get_slice(piece, PIECE)?)?;
    }
    here.read_exact(&mut [0])?;
    let took = began.elapsed();
    receiver.join().map_err(|_| "the receiver panicked")??;
    Ok(took.as_secs_f64() * 1e3)
}

fn compare(cli: &Cli) -> Result<(Vec<Row>, Vec<f64>), Failure> {
    let vmm = vmm_binary()?;
    let directory = tempfile::tempdir()?;
    let elf: PathBuf = directory.path().join("guest");
    fs::write(&elf, guest::ELF)?;
    let qemu = if cli.alone { None } else { Some(Store::open().qemu()?) };
    let (mut rows, mut limits) = (Vec::new(), Vec::new());
    for rate in &cli.rates {
        let ways: &[Way] = if qemu.is_some() { &WAYS } else { &[] };
        let mut runs: Vec<Vec<Moved>> = vec![Vec::new(); ways.len() + 1];
        for _ in 0..cli.runs {
            limits.push(limit(cli.memory)?);
            runs[0].push(by_vmm(cli, &vmm, rate)?);
            for (way, runs) in ways.iter().zip(&mut runs[1..]) {
                if let Some(qemu) = &qemu {
                    runs.push(by_qemu(cli, qemu, &elf, *way, rate)?);
                }
            }
        }
        let names = std::iter::once("vmm").chain(ways.iter().map(|way| way.name));
        for (how, runs) in names.zip(runs) {
            let of = |value: fn(&Moved) -> f64| median(runs.iter().map(value).collect());
            rows.push(Row {
                rate: rate.clone(),
                how: how.to_owned(),
                total_ms: of(|moved| moved.total_ms),
                still_ms: of(|moved| moved.still_ms),
                runs,
            });
        }
        eprintln!("migration: {rate} MB/s is measured");
    }
    Ok((rows, limits))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (rows, limits) = match compare(&cli) {
        Ok(measured) => measured,
        Err(error) => {
            eprintln!("migration: {error}");
            return ExitCode::FAILURE;
        }
    };
    let limit = median(limits);
    if cli.json {
        println!("{}", json!({ "limit_ms": limit, "rows": rows }));
        return ExitCode::SUCCESS;
    }
    println!(
        "{} MiB, medians of {} runs; the same bytes through a socket: {limit:.0} ms",
        cli.memory, cli.runs
    );
    println!("{:<8} {:<24} {:>9} {:>9} {:>12}", "MB/s", "", "total ms", "still ms", "of the limit");
    for row in &rows {
        println!(
            "{:<8} {:<24} {:>9.0} {:>9.2} {:>11.0}%",
            row.rate,
            row.how,
            row.total_ms,
            row.still_ms,
            limit / row.total_ms * 100.0
        );
    }
    ExitCode::SUCCESS
}
