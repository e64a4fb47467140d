//! The `vmm` command: reads the command line and calls the library.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use vmm::timing::Timing;

fn main() -> ExitCode {
    let timing = Timing::start();
    cli::Cli::parse().run(&timing)
}
