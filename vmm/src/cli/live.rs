//! The verbs that ask a running monitor: `vmm snapshot`, `migrate` and `dirty`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Subcommand};
use dirty_track::log::Compression;
use vmm::dirty;
use vmm::dump::DumpConfig;
use vmm::migrate::{self, Address, MAX_CONNECTIONS, MigrateConfig};
use vmm::options;

use super::{Cli, bandwidth, said};

#[derive(Args)]
pub(super) struct SnapshotArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
    /// Just what was written since the last snapshot, or since the one that the machine was restored from
    #[arg(long)]
    diff: bool,
    /// The snapshot: a directory, which is there when it is whole. One that is there is replaced by it
    #[arg(value_name = "DIR")]
    output: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0  the guest runs at the destination
  1  it does not: it goes on where it was
  2  the command line is wrong
  5  it was given away, and the destination has not said that it runs: look there")]
pub(super) struct MigrateArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// Where `vmm run --incoming` waits: unix:PATH, tcp:HOST:PORT, or exec:COMMAND, whose input and output carry it
    #[arg(value_name = "DEST")]
    to: Address,
    /// How long the guest may stand still
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = options::duration)]
    downtime: Duration,
    /// Connections, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// How contents are compressed: none, lz4 or zstd
    #[arg(long, value_name = "HOW", default_value = "none")]
    compress: Compression,
    /// Hold those vCPUs back that write most, more and more, if the guest writes faster than can be sent
    #[arg(long)]
    auto_converge: bool,
    /// Switch if the guest writes faster than can be sent: it runs at the destination, which asks for what it has not got.
    /// Needs `--memory fault=uffd` there
    #[arg(long)]
    postcopy: bool,
    /// Most bytes per second, as in 1250M [default: as fast as it goes]
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    bandwidth: Option<u64>,
    /// For tcp: TLS, by ca-cert.pem, client-cert.pem and client-key.pem in this directory of the monitor's
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct DirtyArgs {
    /// Control socket of the monitor: what `vmm run --api-socket` was given
    // Before the verb or behind it, which clap offers for options only that need not be given.
    #[arg(long, value_name = "PATH", global = true)]
    api_socket: Option<PathBuf>,
    /// JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: DirtyVerb,
}

#[derive(Subcommand)]
pub(super) enum DirtyVerb {
    /// Write the dirty log while the guest runs. Ctrl-C ends it as it should be
    Dump {
        /// Length of an epoch [default: that of the run]
        #[arg(long, value_name = "TIME", value_parser = options::epoch)]
        interval: Option<Duration>,
        /// End after so many epochs [default: at Ctrl-C, or when the guest ends]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        epochs: Option<u64>,
        /// The contents of dirty pages, too; the guest stands still for those of the last epoch
        #[arg(long)]
        pages: bool,
        /// All of memory first, so that the log stands for itself
        #[arg(long, requires = "pages")]
        full: bool,
        /// How contents are compressed: none, lz4 or zstd
        #[arg(long, value_name = "HOW", default_value = "none")]
        compress: Compression,
        /// Where to: a file, which is there when it is whole, or - for standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// A line for each epoch
    Watch,
    /// How fast the guest dirties memory, and what follows for a migration
    Rate,
}

pub(super) fn migrate(args: MigrateArgs) -> ExitCode {
    let most = if matches!(args.to, Address::Exec(_)) { 1 } else { MAX_CONNECTIONS };
    if !(1..=most).contains(&args.connections) {
        eprintln!("vmm: {} connections to {}: there can be 1 to {most}", args.connections, args.to);
        return ExitCode::from(2);
    }
    let config = MigrateConfig {
        to: args.to,
        downtime: args.downtime,
        connections: args.connections,
        compress: args.compress,
        auto_converge: args.auto_converge,
        postcopy: args.postcopy,
        bandwidth: args.bandwidth,
        tls_dir: args.tls_dir,
    };
    match migrate::client::migrate(&args.api_socket, &config, args.json) {
        Ok(report) if report.phase == migrate::report::Phase::Completed => ExitCode::SUCCESS,
        Ok(report) if report.phase == migrate::report::Phase::InDoubt => ExitCode::from(5),
        Ok(_) => ExitCode::FAILURE,
        Err(error) => said(Err(error)),
    }
}

pub(super) fn dirty(args: DirtyArgs) -> ExitCode {
    let Some(socket) = &args.api_socket else {
        let missing = "--api-socket <PATH> is missing: give what `vmm run --api-socket` was given";
        Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, missing).exit();
    };
    said(match args.verb {
        DirtyVerb::Dump { interval, epochs, pages, full, compress, output } => {
            let interval_ms = interval.map_or(0, |interval| interval.as_millis() as u64);
            let config = DumpConfig { pages, full, compress, epochs: epochs.unwrap_or(0), interval_ms };
            dirty::dump(socket, config, &output, args.json)
        }
        DirtyVerb::Watch => dirty::watch(socket, args.json),
        DirtyVerb::Rate => dirty::rate(socket, args.json),
    })
}

pub(super) fn snapshot(args: &SnapshotArgs) -> ExitCode {
    said(dirty::snapshot(&args.api_socket, &args.output, args.diff, args.json))
}
