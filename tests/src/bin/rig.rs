//! The rigs for people: KVM on AMD's or Intel's nested page tables, on any Debian machine, with or without KVM.
//!
//! `cargo run -p tests --bin rig -- vmm run` is `vmm run` in there.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use tests::compare::{self, Comparison};
use tests::rig::{Host, Mmu, Payload};
use tests::store::Store;
use tests::{e2e, recipe};

/// Exit code for a rig that could not be brought up; the commands inside keep theirs.
const RIG_FAILED: u8 = 125;

/// Runs `vmm`, a shell or the tests on a Linux host with KVM and nested paging, emulated by QEMU's TCG or by Bochs.
///
/// The packages (the emulator, a stock Debian kernel, busybox) come from the Debian mirror in apt's sources, once, and
/// are kept below cargo's target directory; nothing is installed. On a terminal, Ctrl-] x ends the rig.
///
/// The rig's own options come before the verb:
///
///     rig --linux vmm run --kernel /images/vmlinux --initrd /images/initramfs --cmdline console=ttyS0
#[derive(Debug, Parser)]
#[command(name = "rig", verbatim_doc_comment)]
struct Options {
    /// Series of the host's stock kernel, e.g. 6.12, 6.1, 7.2
    #[arg(long, default_value = "6.12", value_name = "SERIES")]
    kernel: String,
    /// KVM's TDP MMU on the host
    #[arg(long, value_enum, default_value_t = Switch::On)]
    tdp_mmu: Switch,
    /// Whether the host's KVM splits huge mappings when logging starts, not at the first write
    #[arg(long, value_enum, default_value_t = Switch::On)]
    eager_split: Switch,
    /// Nested paging on the host
    #[arg(long, value_enum, default_value_t = Paging::Npt)]
    mmu: Paging,
    /// With --mmu ept: the processor's page-modification log
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pml: Switch,
    /// Memory of the host in MiB
    #[arg(long, default_value_t = 1536, value_name = "MIB")]
    memory: u32,
    /// CPUs of the host; the emulator is not to be trusted with more than one
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u32,
    /// Place a file of this machine in the host (may be repeated)
    #[arg(long, value_name = "LOCAL=PATH", value_parser = local_and_path)]
    put: Vec<(PathBuf, String)>,
    /// Place a stock Linux guest in the host: /images/vmlinux, /images/bzImage, /images/initramfs
    #[arg(long)]
    linux: bool,
    /// Series of that guest's kernel
    #[arg(long, default_value = "6.12", value_name = "SERIES")]
    linux_kernel: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run `vmm` (built in release mode) with these arguments
    Vmm {
        /// Arguments of `vmm`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a command, or a busybox shell; `vmm` and QEMU (`qemu-microvm`) are there
    Shell {
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run the end-to-end tests; on EPT, a selection, unless the arguments are another
    Test {
        /// Arguments of the test harness, e.g. a filter
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Compare `vmm` with QEMU's microvm machine, in alternating runs on one host
    Compare {
        /// Time to userland, or sequential read of a virtio disk
        what: Comparison,
        /// Runs of each
        #[arg(long, default_value_t = 5, value_name = "N")]
        runs: usize,
        /// Print JSON and no table
        #[arg(long)]
        json: bool,
    },
    /// Fetch the packages and build the images, and say which versions they are
    Fetch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Paging {
    /// AMD's nested page tables, by QEMU
    Npt,
    /// Shadow paging, by QEMU
    Shadow,
    /// Intel's extended page tables, by Bochs: slow, one CPU, shows its output and takes no input
    Ept,
}

fn local_and_path(text: &str) -> Result<(PathBuf, String), String> {
    let (local, path) = text.split_once('=').ok_or_else(|| format!("{text} is not LOCAL=PATH"))?;
    if !path.starts_with('/') {
        return Err(format!("{path} is not an absolute path"));
    }
    Ok((local.into(), path.into()))
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("rig: {e}");
            ExitCode::from(RIG_FAILED)
        }
    }
}

fn run(options: Options) -> Result<u8, Box<dyn Error>> {
    let store = Store::open();
    let host = Host {
        kernel: options.kernel,
        cpus: options.cpus,
        memory_mib: options.memory,
        tdp_mmu: options.tdp_mmu == Switch::On,
        eager_page_split: options.eager_split == Switch::On,
        mmu: match options.mmu {
            Paging::Npt => Mmu::Npt,
            Paging::Shadow => Mmu::Shadow,
            Paging::Ept => Mmu::Ept { pml: options.pml == Switch::On },
        },
        timeout: Duration::from_secs(7200),
    };
    let linux = options.linux.then_some(options.linux_kernel.as_str());
    let prepare = |mut payload: Payload| -> Result<Payload, Box<dyn Error>> {
        for (local, path) in &options.put {
            payload = payload.put(path, local);
        }
        if let Some(series) = linux {
            payload = recipe::with_linux_guest(payload, &store, series)?;
        }
        Ok(payload)
    };
    let status = match options.verb {
        Verb::Vmm { arguments } => {
            let words = ["vmm".to_owned()].into_iter().chain(arguments);
            host.interact(&store, &prepare(e2e::with_vmm(Payload::command(words))?)?)?
        }
        Verb::Shell { command } => {
            let payload = e2e::with_vmm(Payload::command(command))?;
            let payload = match options.mmu {
                // There is no room for it, and no time.
                Paging::Ept => payload,
                Paging::Npt | Paging::Shadow => tests::peer::with_qemu(payload, &store.qemu()?)?,
            };
            host.interact(&store, &prepare(payload)?)?
        }
        Verb::Test { arguments } => {
            let payload = match options.mmu {
                Paging::Ept if arguments.is_empty() => e2e::payload(e2e::ON_EPT, e2e::FEW)?,
                Paging::Ept => e2e::payload(e2e::ON_EPT.map(|(name, _)| (name, &arguments)), e2e::FEW)?,
                Paging::Npt | Paging::Shadow => {
                    e2e::payload(e2e::HARNESSES.map(|name| (name, &arguments)), e2e::SOME)?
                }
            };
            host.interact(&store, &prepare(payload)?)?
        }
        Verb::Compare { what, runs, json } => {
            let report = compare::run(&store, &host, &options.linux_kernel, what, runs)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{report}");
            }
            0
        }
        Verb::Fetch => {
            let emulator =
                if options.mmu == Paging::Ept { store.bochs()?.version } else { store.qemu()?.version };
            println!("{emulator}\n{}", store.busybox()?.version);
            println!("{}", store.kernel(&host.kernel)?.version);
            println!("{}", store.kernel(&options.linux_kernel)?.version);
            println!("in {}", store.dir().display());
            0
        }
    };
    Ok(u8::try_from(status).unwrap_or(RIG_FAILED))
}
