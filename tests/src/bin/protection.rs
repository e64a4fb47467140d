//! What a harvest by write-protection costs, and what it costs the guest.
//!
//! The built-in guest reads its memory in order, over and over. Between two passes the host writes 1 % of its pages
//! (back to what they were), and the epoch is closed: by a harvest, or by protecting all of memory anew, as looking
//! and protecting in one walk does. The time of the next pass, less the time of a pass without any of that, is the
//! guest's price.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use dirty_track::tracker::Kind;
use guest::abi::Control;
use tests::conformance::{config, start};
use vm_memory::{Bytes, GuestAddress};
use vmm::ledger::Ledger;
use vmm::memory::{HugePages, MemoryConfig};
use vmm::track::TrackConfig;

/// Measure what a harvest by write-protection costs, and what it costs the guest
#[derive(Parser)]
struct Cli {
    /// Guest memory in MiB; three quarters of it are read
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..))]
    memory: u64,
    /// More of the guest's command line
    #[arg(long, default_value = "")]
    cmdline: String,
}

const ROUNDS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Cli { memory: mib, cmdline } = Cli::parse();
    for huge in [HugePages::None, HugePages::Thp] {
        let memory = MemoryConfig { size: mib << 20, huge, ..MemoryConfig::default() };
        let machine =
            start(config(&format!("workload=read region={}M passes=0 {cmdline}", mib * 3 / 4), 1, memory));
        let control = machine.channel().control().ok_or("the guest announced no ledger")?;
        let mut stats = machine.take_vcpu_stats();
        let mut faults = move || -> Option<u64> {
            let stats = stats.first_mut()?;
            stats.refresh().ok()?;
            Some(stats.get(stats.find("pf_taken")?))
        };
        let ledger = Ledger::attach(Arc::clone(machine.ram()), control)?;
        let at = GuestAddress(control + std::mem::offset_of!(Control, region_gpa) as u64);
        let region: u64 = machine.ram().mem().read_obj(at)?;
        let pages = ledger.pages();
        let gib = pages as f64 / f64::from(1 << 18);
        println!(
            "huge={huge}, {gib:.3} GiB read in order, 1 % written in between; medians of {ROUNDS}, ms per GiB"
        );

        let pass = || -> Result<f64, Box<dyn std::error::Error>> {
            let (begin, start) = (ledger.accesses()?, Instant::now());
            while ledger.accesses()? < begin + pages {
                thread::sleep(Duration::from_micros(50));
            }
            Ok(start.elapsed().as_secs_f64() * 1e3 / gib)
        };
        let write = |round: usize| -> Result<(), Box<dyn std::error::Error>> {
            for page in (round * 7 % 100..pages as usize).step_by(100) {
                let at = GuestAddress(region + ((page as u64) << 12));
                let was: u8 = machine.ram().mem().read_obj(at)?;
                machine.ram().mem().write_obj(was, at)?;
            }
            Ok(())
        };
        for kind in [Kind::UffdAsync, Kind::Exact] {
            let mut tracker = machine.tracker(kind, &TrackConfig::default())?;
            tracker.arm()?;
            for naive in [false, true] {
                let mut measured = [const { Vec::new() }; 4];
                for round in 0..ROUNDS {
                    pass()?;
                    measured[0].push(pass()?);
                    {
                        let _still = machine.pause();
                        write(round)?;
                    }
                    pass()?;
                    let _still = machine.pause();
                    let start = Instant::now();
                    if naive {
                        tracker.disarm()?;
                        tracker.arm()?;
                    } else {
                        let harvest = tracker.harvest()?;
                        assert!(harvest.count() >= pages / 101, "{} pages", harvest.count());
                        harvest.commit();
                    }
                    measured[1].push(start.elapsed().as_secs_f64() * 1e3 / gib);
                    drop(_still);
                    let before = faults();
                    measured[2].push(pass()?);
                    let taken =
                        faults().zip(before).map_or(f64::NAN, |(after, before)| (after - before) as f64);
                    measured[3].push(taken / gib);
                }
                let [plain, harvest, after, faults] = measured.map(|mut times| {
                    times.sort_by(f64::total_cmp);
                    times[ROUNDS / 2]
                });
                let how = if naive { "all protected anew" } else { "harvest" };
                println!(
                    "{kind:>10}, {how:<18} {harvest:8.2}   pass before {plain:8.2}   pass after {after:8.2}   \
                     price {:8.2}   in {faults:6.0} faults, {:.1} us each",
                    after - plain,
                    (after - plain) * 1e3 / faults,
                );
            }
            tracker.disarm()?;
        }
    }
    Ok(())
}
