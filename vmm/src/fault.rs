//! `--memory fault=uffd`: the guest's faults are served by this process.
//!
//! All of RAM is registered with a userfaultfd before anything of it is touched, so every page that the guest, the
//! devices or the loader touch first is brought by a [`Server`] thread: alone or with others ([`Policies`]), and in a
//! way that tells what the guest touched from what came along. Memory that is tracked is tracked by the server, too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;

use dirty_track::fault::{
    Age, Config, Counts, FaultError, PageSource, ParseError, Policies, Prefault, Server, Source, Split,
    WorkingSet,
};
use dirty_track::stage2::SecondLevel;
use dirty_track::tracker::Slot;
use serde::{Deserialize, Serialize};

use crate::beside;
use crate::memory::{HugePages, MemoryConfig};

/// What comes along with a missing page, as `--prefault` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrefaultChoice {
    /// By rule.
    Rule(Prefault),
    /// What an earlier run recorded in this file.
    Recorded(PathBuf),
}

impl FromStr for PrefaultChoice {
    type Err = String;

    /// `none`, `around=SIZE`, `block` or `recorded=FILE`.
    fn from_str(text: &str) -> Result<PrefaultChoice, String> {
        match text.strip_prefix("recorded=") {
            Some("") => Err("recorded= needs the file that --record-working-set wrote".into()),
            Some(path) => Ok(PrefaultChoice::Recorded(path.into())),
            None => match text.parse() {
                Ok(Prefault::Recorded) => {
                    Err("give the file that --record-working-set wrote, as in recorded=FILE".into())
                }
                Ok(rule) => Ok(PrefaultChoice::Rule(rule)),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

/// How faults are served.
#[derive(Clone, Debug, Default)]
pub struct FaultConfig {
    /// What decides.
    pub policies: Policies,
    /// What an earlier run touched, for [`Prefault::Recorded`].
    pub working_set: WorkingSet,
    /// Where pages come from, if they are not zeros. What of it nobody touches is brought in meanwhile.
    pub source: Option<Arc<dyn PageSource>>,
}

/// Why a working set cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file.
    #[error("cannot read or write the working set {path}: {source}")]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in it.
    #[error("{path} is no working set: {source}")]
    Text {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: ParseError,
    },
}

impl FaultConfig {
    /// The configuration that the command line asks for; what it does not say is the library's default.
    ///
    /// # Errors
    /// See [`WorkingSetError`].
    pub fn new(
        prefault: Option<PrefaultChoice>,
        age: Option<Age>,
        split: Option<Split>,
    ) -> Result<FaultConfig, WorkingSetError> {
        let mut config = FaultConfig::default();
        let policies = &mut config.policies;
        policies.age = age.unwrap_or_default();
        policies.split = split.unwrap_or_default();
        match prefault {
            None => {}
            Some(PrefaultChoice::Rule(rule)) => policies.prefault = rule,
            Some(PrefaultChoice::Recorded(path)) => {
                policies.prefault = Prefault::Recorded;
                let text = fs::read_to_string(&path)
                    .map_err(|source| WorkingSetError::File { path: path.clone(), source })?;
                config.working_set = text.parse().map_err(|source| WorkingSetError::Text { path, source })?;
            }
        }
        Ok(config)
    }
}

/// Serves the faults of `slots`, which are the RAM that `memory` describes. With `fill`, what nobody asks for is brought in
/// meanwhile.
///
/// # Errors
/// See [`Server::start`].
pub fn start(
    slots: Vec<Slot>,
    memory: MemoryConfig,
    cpus: u8,
    config: FaultConfig,
    fill: bool,
) -> Result<Server, FaultError> {
    let FaultConfig { policies, working_set, source } = config;
    let source = match source {
        Some(source) => Source::Fetch(source),
        // A memfd's pages are its cache's; hugetlb is filled page by page all the same.
        None if memory.shared && memory.huge.hugetlb_shift().is_none() => Source::Shared,
        None => Source::Zero,
    };
    let slots = slots.into_iter().map(|slot| (slot, source.clone())).collect();
    // A handler has time for the faults of some vCPUs: each sleeps through most of its own.
    let handlers = usize::from(cpus).div_ceil(CPUS_PER_HANDLER);
    let ahead = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MOST_AHEAD));
    let huge = memory.huge == HugePages::Thp;
    Server::start(slots, Config { policies, working_set, handlers, ahead, fill, huge })
}

const CPUS_PER_HANDLER: usize = 8;

/// Threads that bring in what was not asked for yet: more than this find little to do but wait for each other, or for a disk.
const MOST_AHEAD: usize = 8;

/// Writes what the guest is known to have touched to `path`: beside it first, so that what was there is whole until it
/// is replaced.
///
/// # Errors
/// [`WorkingSetError::File`].
pub fn record(server: &Server, path: &Path) -> Result<(), WorkingSetError> {
    let text = WorkingSet::touched(server.stage2()).to_string();
    beside::write(path, text.as_bytes())
        .map_err(|source| WorkingSetError::File { path: path.to_owned(), source })
}

/// What was served, as it is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// Faults of pages that were nowhere.
    pub missing: u64,
    /// Faults of pages that only the mapping did not have.
    pub minor: u64,
    /// First writes to protected pages.
    pub write_protected: u64,
    /// Pages installed.
    pub installed: u64,
    /// Pages installed for each missing or minor fault.
    pub pages_per_fault: Option<f64>,
    /// Pages that came along.
    pub prefaulted: u64,
    /// Of these, pages recorded as old.
    pub old: u64,
    /// Old pages that were written later. (That a mapped page is only read nobody sees.)
    pub old_hits: u64,
    /// The same as a share of the old pages, in percent.
    pub old_hit_percent: Option<f64>,
    /// Pages opened for writing.
    pub opened: u64,
    /// Writes for which a whole block was opened.
    pub blocks_opened: u64,
    /// Huge mappings split.
    pub splits: u64,
    /// Pages that were dropped, or unmapped.
    pub removed: u64,
    /// Of these, old ones: they came in vain, as far as was seen.
    pub removed_old: u64,
    /// Calls that copied, mapped zeros, mapped from a file's cache, and moved.
    pub copies: u64,
    /// See `copies`.
    pub zeroes: u64,
    /// See `copies`.
    pub continues: u64,
    /// See `copies`.
    pub moves: u64,
    /// Faults of which somebody else had taken care.
    pub stale: u64,
    /// Faults that were looked at again, for mappings changed.
    pub again: u64,
    /// Threads that wait at this moment.
    pub waiting: u64,
    /// Times that a fault could not be served at once.
    pub failures: u64,
    /// Why, the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

impl Served {
    /// Puts `counts` into words.
    pub fn new(counts: &Counts, failure: Option<String>) -> Served {
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Served {
            missing: counts.missing,
            minor: counts.minor,
            write_protected: counts.protected,
            installed: counts.installed,
            pages_per_fault: share(counts.installed, counts.missing + counts.minor),
            prefaulted: counts.prefaulted,
            old: counts.old,
            old_hits: counts.hits,
            old_hit_percent: share(counts.hits * 100, counts.old),
            opened: counts.opened,
            blocks_opened: counts.blocks_opened,
            splits: counts.splits,
            removed: counts.removed,
            removed_old: counts.unmapped_old,
            copies: counts.copies,
            zeroes: counts.zeroes,
            continues: counts.continues,
            moves: counts.moves,
            stale: counts.stale,
            again: counts.again,
            waiting: counts.waiting,
            failures: counts.failures,
            failure,
        }
    }
}

/// The record of how RAM is mapped, at the end of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecordReport {
    /// Pages that are recorded as mapped.
    pub present: u64,
    /// Pages that are known to have been touched.
    pub touched: u64,
    /// Pages that came along and were not seen to be touched: an upper bound of those that came in vain.
    pub untouched: u64,
    /// Bytes of memory that the record takes.
    pub bytes: usize,
    /// Second-level mappings that KVM has, in pages of 4 KiB.
    pub kvm_maps: Option<u64>,
    /// Of these, pages that the record does not have. There must be none. `None` where KVM shadows page tables: it maps
    /// pages twice then.
    pub kvm_unexplained: Option<u64>,
    /// Blocks that KVM maps as one and the record does not: harmless.
    pub kvm_huge_unexplained: Option<u64>,
    /// Pages that can be written without the record knowing. There must be none.
    pub harmful: u64,
    /// Pages of which the kernel and the record think differently without harm.
    pub harmless: u64,
    /// The first few differences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<String>,
}

/// Differences that are spelled out.
const SPELLED_OUT: usize = 8;

impl RecordReport {
    /// Whether a write may have been missed.
    pub fn contradicted(&self) -> bool {
        self.harmful + self.kvm_unexplained.unwrap_or(0) > 0
    }

    /// Holds the record against the kernel, while the guest stands and nobody drops memory. `kvm` is what KVM says that
    /// it maps; each page once, or not.
    ///
    /// # Errors
    /// See [`Server::check`].
    pub fn new(server: &Server, kvm: Option<SecondLevel>, once: bool) -> Result<RecordReport, FaultError> {
        let found = server.check()?;
        let pages = |harmful| {
            found.iter().filter(|one| one.what.is_harmful() == harmful).map(|one| one.pages.pages).sum()
        };
        let stage2 = server.stage2();
        let mapped = stage2.mapped();
        let unexplained = kvm.map(|kvm| mapped.leaves_unexplained(&kvm, once));
        let touched = WorkingSet::touched(stage2).pages();
        Ok(RecordReport {
            present: mapped.pages,
            touched,
            untouched: mapped.pages - touched.min(mapped.pages),
            bytes: stage2.bytes(),
            kvm_maps: kvm.map(|kvm| kvm.pages()),
            kvm_unexplained: unexplained.and_then(|found| found.pages),
            kvm_huge_unexplained: unexplained.map(|found| found.huge),
            harmful: pages(true),
            harmless: pages(false),
            differences: found.iter().take(SPELLED_OUT).map(ToString::to_string).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_along_is_read() {
        let parse = |text: &str| text.parse::<PrefaultChoice>();
        assert_eq!(parse("block"), Ok(PrefaultChoice::Rule(Prefault::Block)));
        assert_eq!(parse("around=64K"), Ok(PrefaultChoice::Rule(Prefault::default())));
        assert_eq!(parse("recorded=a/b"), Ok(PrefaultChoice::Recorded("a/b".into())));
        for bad in ["", "recorded", "recorded=", "around=3K", "all"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_working_set_that_cannot_be_read_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("set");
        let config = |path: &Path| FaultConfig::new(Some(PrefaultChoice::Recorded(path.into())), None, None);
        assert!(config(&path).unwrap_err().to_string().contains("set"));
        fs::write(&path, "0x10+4\nx\n").unwrap();
        assert!(matches!(config(&path), Err(WorkingSetError::Text { .. })));
        fs::write(&path, "0x10+4\n").unwrap();
        let config = config(&path).unwrap();
        assert_eq!((config.working_set.pages(), config.policies.prefault), (4, Prefault::Recorded));
    }
}
