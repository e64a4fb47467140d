//! `vmm bench`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use vmm::bench::results::{Bench, Results, ResultsError};
use vmm::bench::{self, BenchConfig, Ended};
use vmm::options;

use super::said;

#[derive(Subcommand)]
pub(super) enum BenchVerb {
    /// Everything
    All(BenchArgs),
    /// What every tracker costs, by how much a guest writes
    Dirty(BenchArgs),
    /// What serving a guest's faults costs, by policy
    Fault(BenchArgs),
    /// How soon a snapshot runs
    Restore(BenchArgs),
    /// How fast a guest is moved, and how long it stands still for that
    Migrate(BenchArgs),
    /// How fast a guest starts
    Boot(BenchArgs),
    /// What got faster or slower from one run to another, by more than chance
    #[command(after_help = "\
Exit codes:
  0  nothing got worse
  1  the runs cannot be compared
  2  the command line is wrong
  6  something got worse")]
    Compare {
        /// What `--json` wrote before
        before: PathBuf,
        /// And after
        after: PathBuf,
        /// Differences below this many per cent are none
        #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
        threshold: f64,
    },
}

#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0  all was measured, or skipped with a reason
  1  nothing can be measured here
  2  the command line is wrong
  7  interrupted; what was measured until then is kept")]
pub(super) struct BenchArgs {
    /// Over in minutes: less memory, fewer cases, fewer turns
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON, after every table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report to this directory: report.html, Markdown, CSV, plots
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Only the tables whose title has this in it, such as "10 %" or "4 vCPUs"
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Memory that a tracked guest works in [default: 256M, 64M if quick]
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    memory: Option<u64>,
    /// The QEMU to compare with [default: qemu-system-x86_64, if it is there]
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
}

pub(super) fn bench(verb: BenchVerb) -> ExitCode {
    let (what, args) = match verb {
        BenchVerb::All(args) => (Vec::new(), args),
        BenchVerb::Dirty(args) => (vec![Bench::Dirty], args),
        BenchVerb::Fault(args) => (vec![Bench::Fault], args),
        BenchVerb::Restore(args) => (vec![Bench::Restore], args),
        BenchVerb::Migrate(args) => (vec![Bench::Migrate], args),
        BenchVerb::Boot(args) => (vec![Bench::Boot], args),
        BenchVerb::Compare { before, after, threshold } => return compare_verb(&before, &after, threshold),
    };
    let BenchArgs { quick, only, json, report, memory, qemu } = args;
    match bench::run(&BenchConfig { what, quick, only, memory, json, report, qemu }) {
        Ok(Ended::Complete) => ExitCode::SUCCESS,
        Ok(Ended::Interrupted) => ExitCode::from(7),
        Err(error) => said(Err(error)),
    }
}

fn compare_verb(before: &Path, after: &Path, threshold: f64) -> ExitCode {
    let read = || Ok::<_, ResultsError>((Results::read(before)?, Results::read(after)?));
    match read() {
        Ok((before, after)) => {
            let comparison = bench::compare(&before, &after, threshold / 100.0);
            print!("{comparison}");
            if comparison.got_worse() { ExitCode::from(6) } else { ExitCode::SUCCESS }
        }
        Err(error) => said(Err(error)),
    }
}
