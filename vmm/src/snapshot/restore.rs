//! Going on from a snapshot: where the pages come from, and when.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use dirty_track::addr::{BLOCK_SIZE, Gfn, PAGE_BYTES, PageRange};
use dirty_track::sys::uffd::{Mode as UffdMode, Uffd};
use vm_memory::{Bytes, GuestAddress};

use super::SnapshotError;
use super::chain::{Chain, Saved};
use super::take::Base;
use crate::dump;
use crate::machine::open_kvm;
use crate::memory::{Faults, HugePages, MemoryConfig, Ram};
use crate::{cpuid, host};

/// When pages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When the guest touches them, and behind its back: it goes on at once.
    Lazy,
    /// All of them before it goes on.
    Eager,
    /// When it touches them, by the kernel, which maps the file of a full snapshot. They are checked before if that is asked for,
    /// and else never.
    Map,
}

impl Mode {
    /// Lazy, if this process may serve its guest's faults.
    pub fn best() -> Mode {
        match Uffd::open(UffdMode::Serve { moves: false }) {
            Ok(_) => Mode::Lazy,
            Err(_) => Mode::Eager,
        }
    }

    /// Who answers when the guest touches a page that is not there.
    pub fn faults(self) -> Faults {
        match self {
            Mode::Lazy => Faults::Uffd,
            Mode::Eager | Mode::Map => Faults::Kernel,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Lazy => "lazy",
            Mode::Eager => "eager",
            Mode::Map => "map",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        let all = [Mode::Lazy, Mode::Eager, Mode::Map];
        all.into_iter()
            .find(|mode| mode.to_string() == text)
            .ok_or_else(|| format!("there is no mode {text:?}: use lazy, eager or map"))
    }
}

/// A snapshot to go on from, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// The snapshot.
    pub path: PathBuf,
    /// When its pages are read.
    pub mode: Mode,
    /// Check all of them first.
    pub verify: bool,
}

/// What a machine goes on from.
#[derive(Debug)]
pub struct Restored {
    /// What it is made of, and its state.
    pub saved: Saved,
    /// Its memory; with [`Mode::Lazy`] there is nothing in it yet.
    pub ram: Ram,
    /// Where that comes from.
    pub chain: Arc<Chain>,
    /// What a diff of it builds on.
    pub base: Base,
}

/// Opens the snapshot that `restore` names, with memory as `memory` says, whose size is the snapshot's.
///
/// # Errors
/// See [`SnapshotError`].
pub fn open(restore: &Restore, memory: MemoryConfig) -> Result<Restored, SnapshotError> {
    let path = std::path::absolute(&restore.path).unwrap_or_else(|_| restore.path.clone());
    let (chain, saved) = Chain::open(&path)?;
    // Before anything of it is read. Who has no KVM is told so when the machine is made.
    if let Ok(kvm) = open_kvm() {
        cpuid::check(&kvm, host::kvm_module(), &saved.state)?;
    }
    let config = MemoryConfig { size: saved.shape.memory, fault: restore.mode.faults(), ..memory };
    // By where they are; their numbers are this program's own.
    let frames =
        |slots: &[dirty_track::log::SlotInfo]| -> Vec<_> { slots.iter().map(|slot| slot.frames()).collect() };
    let newest = chain.newest();
    let ram = match restore.mode {
        Mode::Map if config.shared || config.huge.hugetlb_shift().is_some() => {
            return Err(SnapshotError::Mapped(path));
        }
        Mode::Map => {
            let image = &chain.base().image;
            Ram::of_file(MemoryConfig { huge: HugePages::None, ..config }, image.memory())?
        }
        Mode::Lazy | Mode::Eager => Ram::new(config)?,
    };
    if frames(&dump::slots(&ram)) != frames(&newest.header.slots) {
        return Err(SnapshotError::Layout { path, memory: config.size });
    }
    let base = Base { id: newest.header.id, path };
    match restore.mode {
        Mode::Lazy if !restore.verify => {}
        Mode::Lazy => fill(&chain, &ram, |_, _| Ok(()))?,
        Mode::Eager => fill(&chain, &ram, |range, bytes| write(&ram, range, bytes))?,
        Mode::Map => map(&chain, &ram, restore.verify)?,
    }
    Ok(Restored { saved, ram, chain: Arc::new(chain), base })
}

fn write(ram: &Ram, range: PageRange, bytes: &[u8]) -> Result<(), SnapshotError> {
    Ok(ram.mem().write_slice(bytes, GuestAddress(range.start.gpa().0))?)
}

/// Bytes that are read at once: what stays in a processor's own cache until it is checked and written.
const READ: usize = 64 * PAGE_BYTES;

/// Threads that read.
const READERS: usize = 8;

/// Hands all pages of `chain` that are not zeros to `take`, checked, by some threads.
fn fill(
    chain: &Chain,
    ram: &Ram,
    take: impl Fn(PageRange, &[u8]) -> Result<(), SnapshotError> + Sync,
) -> Result<(), SnapshotError> {
    let slots: Vec<_> = dump::slots(ram).iter().map(|slot| slot.frames()).collect();
    let step = BLOCK_SIZE / PAGE_BYTES as u64;
    let blocks: u64 = slots.iter().map(|slot| slot.pages.div_ceil(step)).sum();
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let outcome = Mutex::new(Ok(()));
    let work = || {
        let mut buffer = vec![0; READ];
        while !failed.load(Ordering::Relaxed) {
            let mut number = next.fetch_add(1, Ordering::Relaxed);
            if number >= blocks {
                return;
            }
            for slot in &slots {
                let blocks = slot.pages.div_ceil(step);
                if number < blocks {
                    let start = Gfn(slot.start.0 + number * step);
                    let range = PageRange { start, pages: step.min(slot.end().0 - start.0) };
                    if let Err(error) = chain.filled(range, &mut buffer, &take) {
                        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                        *outcome = Err(error);
                        failed.store(true, Ordering::Relaxed);
                    }
                    break;
                }
                number -= blocks;
            }
        }
    };
    thread::scope(|scope| {
        let readers = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(READERS));
        for _ in 1..readers {
            // This one is enough.
            let _ = thread::Builder::new().name("reader".into()).spawn_scoped(scope, work);
        }
        work();
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// `ram` maps the file of the chain's base: what was written since goes on top of it.
fn map(chain: &Chain, ram: &Ram, verify: bool) -> Result<(), SnapshotError> {
    let base = &chain.base().path;
    let mut buffer = vec![0; READ];
    for slot in dump::slots(ram) {
        for (part, layer) in chain.parts(slot.frames()) {
            if layer.path == *base {
                if verify {
                    layer.check(part, &mut buffer)?;
                }
                continue;
            }
            // Zeros, too: the base has something else there.
            let mut at = part.start;
            while at < part.end() {
                let pages = (part.end().0 - at.0).min((READ / PAGE_BYTES) as u64);
                let range = PageRange { start: at, pages };
                let bytes = &mut buffer[..range.bytes() as usize];
                layer.image.read(range, bytes)?;
                write(ram, range, bytes)?;
                at = range.end();
            }
        }
    }
    Ok(())
}
