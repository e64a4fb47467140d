//! The command line: what it may say, and what is done about it. One file for verbs that are of a kind.

mod bench;
mod live;
mod log;
mod run;

use std::fmt::Display;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmm::options;
use vmm::timing::{Phase, Timing};

/// A virtual machine monitor that knows which memory its guest touched.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a guest and show its dirty memory live. Without arguments: the built-in guest for 30 s
    Run(Box<run::RunArgs>),
    /// Write a snapshot of the machine of a running monitor, which goes on
    Snapshot(live::SnapshotArgs),
    /// Go on from a snapshot
    Restore(Box<run::RestoreArgs>),
    /// Move the machine of a running monitor to another one, while it runs
    Migrate(live::MigrateArgs),
    /// Ask a running monitor about dirty memory
    Dirty(live::DirtyArgs),
    /// Read, apply and draw dirty logs
    #[command(subcommand)]
    Log(log::LogVerb),
    /// Measure what tracking costs on this host, and what this program is worth next to its limits and to QEMU
    #[command(subcommand)]
    Bench(bench::BenchVerb),
    /// Say what this host can do for virtual machines and for tracking their memory
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Cli {
    /// Does what the command line says.
    pub(crate) fn run(self, timing: &Timing) -> ExitCode {
        match self.verb {
            Verb::Run(args) => {
                timing.mark(Phase::Parsed);
                run::run(*args, timing)
            }
            Verb::Restore(args) => {
                timing.mark(Phase::Parsed);
                run::restore(*args, timing)
            }
            Verb::Snapshot(args) => live::snapshot(&args),
            Verb::Migrate(args) => live::migrate(args),
            Verb::Dirty(args) => live::dirty(args),
            Verb::Log(verb) => log::log(verb),
            Verb::Bench(verb) => bench::bench(verb),
            Verb::Doctor { json } => vmm::doctor::run(json),
        }
    }
}

/// Says what went wrong, if anything did.
fn said(outcome: Result<(), impl Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Bytes per second, which are some.
fn bandwidth(text: &str) -> Result<u64, String> {
    match options::size(text) {
        Ok(0) => Err("nothing can be sent over that".into()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}
