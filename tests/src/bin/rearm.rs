//! What re-arming costs a guest, on the host at hand: the built-in guest makes passes over its memory, each
//! pass is an epoch, and the time of a pass is compared with that of the same guest when nobody tracks it.
//!
//! The harvest at the end of each pass is made while the guest waits at its doorbell, so a pass has the
//! guest's own work and the faults of the log in it and nothing else. Times are the vCPU thread's processor time,
//! so that a busy host does not count.

use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use dirty_track::rearm::Rearm;
use dirty_track::tracker::{Kind, Tracker, TrackerError};
use guest::abi::Doorbell;
use tests::conformance::config;
use tests::skip;
use tests::sys::thread_cpu_time;
use vmm::machine::{Machine, open_kvm};
use vmm::memory::{HugePages, MemoryConfig};
use vmm::track::TrackConfig;

/// Measure what re-arming costs a guest that rewrites its memory, and one that writes here and there.
#[derive(Parser)]
struct Cli {
    /// Memory that the guest writes, in MiB
    #[arg(long, default_value_t = 1024)]
    region: u64,
    /// Passes that are measured
    #[arg(long, default_value_t = 40)]
    passes: usize,
    /// A policy to measure besides `all`
    #[arg(long, default_value = "dense-skip")]
    rearm: Rearm,
}

/// What one pass showed.
#[derive(Clone, Copy)]
struct Pass {
    guest: Duration,
    harvest: Duration,
    dirty: u64,
    coarse: u64,
}

/// How long the guest may make no progress.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = open_kvm() {
        skip::skip("rearm", &error.to_string());
        return ExitCode::SUCCESS;
    }
    let random = cli.region * 256 / 100;
    for (guest, workload, short) in [
        ("rewrites everything", "workload=fill".to_owned(), 8),
        ("writes 1 % at random", format!("workload=rand pages={random}"), cli.passes),
    ] {
        println!("a guest of {} MiB that {guest}:", cli.region);
        println!(
            "  {:<42} {:>9} {:>9} {:>9} {:>9} {:>11}",
            "", "mean", "median", "worst", "harvest", "coarse"
        );
        let mut untracked = None;
        for (policy, passes) in [(None, cli.passes), (Some(Rearm::All), short), (Some(cli.rearm), cli.passes)]
        {
            let passes = match measure(&cli, &workload, policy, passes) {
                Ok(passes) => passes,
                Err(error) => {
                    eprintln!("rearm: {error}");
                    return ExitCode::FAILURE;
                }
            };
            report(policy, &passes, &mut untracked);
        }
    }
    ExitCode::SUCCESS
}

/// Prints the mean, the median and the worst pass from the third on.
fn report(policy: Option<Rearm>, passes: &[Pass], untracked: &mut Option<f64>) {
    let settled = &passes[2.min(passes.len() - 1)..];
    let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
    let mean = settled.iter().map(|pass| millis(pass.guest)).sum::<f64>() / settled.len() as f64;
    let mut times: Vec<_> = settled.iter().map(|pass| millis(pass.guest)).collect();
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let worst = settled.iter().map(|pass| millis(pass.guest)).fold(0.0, f64::max);
    let harvest = settled.iter().map(|pass| millis(pass.harvest)).sum::<f64>() / settled.len() as f64;
    let share = settled.iter().map(|pass| pass.coarse as f64 / pass.dirty.max(1) as f64).sum::<f64>()
        / settled.len() as f64;
    let base = *untracked.get_or_insert(mean);
    let name = policy.map_or("not tracked".to_owned(), |policy| policy.to_string());
    println!(
        "  {name:<42} {mean:>6.2} ms {median:>6.2} ms {worst:>6.2} ms {harvest:>6.2} ms {:>9.1} %   {:.2}x",
        share * 100.0,
        mean / base
    );
}

/// Has the guest make `passes` passes under `policy` and returns what each took; the first is not returned.
fn measure(
    cli: &Cli,
    workload: &str,
    policy: Option<Rearm>,
    passes: usize,
) -> Result<Vec<Pass>, Box<dyn std::error::Error>> {
    let (report, results) = mpsc::channel();
    let tracker: Arc<Mutex<Option<Box<dyn Tracker>>>> = Arc::default();
    let for_bell = Arc::clone(&tracker);
    let state = Mutex::new((None::<Duration>, false));
    let doorman = move |_: u8, bell: Doorbell, _: u32| {
        if bell != Doorbell::Pass {
            return;
        }
        let now = thread_cpu_time();
        let mut tracker = for_bell.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut state = state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (began, armed) = &mut *state;
        let guest = began.map(|began| now - began);
        let closed = close(tracker.as_mut(), armed);
        let pass = closed.map(|(dirty, coarse)| {
            guest.map(|guest| Pass { guest, harvest: thread_cpu_time() - now, dirty, coarse })
        });
        // Nobody listens any more when this fails.
        let _ = report.send(pass);
        *began = Some(thread_cpu_time());
    };
    let memory =
        MemoryConfig { size: (cli.region + 64) << 20, huge: HugePages::Thp, ..MemoryConfig::default() };
    let cmdline = format!("{workload} region={}M passes=0 barrier=on populate=on", cli.region);
    let mut config = config(&cmdline, 1, memory);
    config.doorman = Some(Arc::new(doorman));
    let machine = Machine::new(config)?;
    if let Some(policy) = policy {
        let mechanism =
            machine.tracker(Kind::KvmManual, &TrackConfig { rearm: policy, ..TrackConfig::default() })?;
        *tracker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(mechanism);
    }
    machine.start()?;
    let mut measured = Vec::with_capacity(passes);
    while measured.len() < passes {
        if let Some(pass) = results.recv_timeout(PATIENCE)?? {
            measured.push(pass);
        }
    }
    machine.stop();
    // The tracker keeps a view of the machine's RAM, which goes only when nobody does.
    *tracker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    Ok(measured)
}

/// Closes the epoch, or arms the tracker at the first call. Returns the numbers of dirty and coarse pages.
fn close(tracker: Option<&mut Box<dyn Tracker>>, armed: &mut bool) -> Result<(u64, u64), TrackerError> {
    let Some(tracker) = tracker else { return Ok((0, 0)) };
    if !std::mem::replace(armed, true) {
        tracker.arm()?;
        return Ok((0, 0));
    }
    let harvest = tracker.harvest()?;
    let counts = (harvest.count(), harvest.coarse_count());
    harvest.commit();
    Ok(counts)
}
