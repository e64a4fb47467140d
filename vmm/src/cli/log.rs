//! `vmm log`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use vmm::logfile::{self, Export};

use super::said;

#[derive(Subcommand)]
pub(super) enum LogVerb {
    /// What is in a log or a snapshot, and whether it is whole
    Info {
        /// The log, - for standard input; or the directory of a snapshot
        log: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List dirty ranges
    Ranges {
        /// The log; - for standard input
        log: PathBuf,
        /// Just this epoch
        #[arg(long, value_name = "N")]
        epoch: Option<u64>,
    },
    /// Print all ranges, and which vCPU wrote them, for programs
    #[command(group(clap::ArgGroup::new("form").required(true)))]
    Export {
        /// The log; - for standard input
        log: PathBuf,
        /// A JSON object a line
        #[arg(long, group = "form")]
        json: bool,
        /// Comma-separated values
        #[arg(long, group = "form")]
        csv: bool,
    },
    /// Make one full snapshot of a snapshot and all that it builds on
    Merge {
        /// The snapshot
        #[arg(value_name = "DIR")]
        snapshot: PathBuf,
        /// The snapshot to make. One that is there is replaced
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
    },
    /// Make an image of memory as it was at the log's end
    Apply {
        /// A log with contents; - for standard input
        log: PathBuf,
        /// Image of memory as it was when the log began [default: nothing but zeros, as for a log of --full]
        #[arg(long, value_name = "IMAGE")]
        base: Option<PathBuf>,
        /// The image to make: the byte of each guest-physical address at that offset. It may be the base
        #[arg(short, long, value_name = "IMAGE")]
        output: PathBuf,
    },
    /// Check that a log or a snapshot is whole, and that an image is what the log says
    Verify {
        /// The log, - for standard input; or the directory of a snapshot, with all that it builds on
        log: PathBuf,
        /// Image of memory as it was at the log's end
        #[arg(long)]
        image: Option<PathBuf>,
    },
    /// Draw dirty memory over time
    Heatmap {
        /// The log; - for standard input
        log: PathBuf,
        /// A .png or .svg [default: as text]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

pub(super) fn log(verb: LogVerb) -> ExitCode {
    said(match verb {
        LogVerb::Info { log, json } => logfile::info(&log, json),
        LogVerb::Ranges { log, epoch } => logfile::ranges(&log, epoch),
        LogVerb::Export { log, csv, .. } => {
            logfile::export(&log, if csv { Export::Csv } else { Export::Json })
        }
        LogVerb::Merge { snapshot, output } => logfile::merge(&snapshot, &output),
        LogVerb::Apply { log, base, output } => logfile::apply(&log, base.as_deref(), &output),
        LogVerb::Verify { log, image } => logfile::verify(&log, image.as_deref()),
        LogVerb::Heatmap { log, output } => logfile::heatmap(&log, output.as_deref()),
    })
}
