//! Snapshots: a machine in a file, to go on from.
//!
//! A snapshot is a dirty log that stands for itself: all of memory as its first epoch, what was written while that was
//! copied as further ones, the last of them copied while the vCPUs stand still, and the machine's state. So the machine
//! stands still for what was written during a short epoch, and for the state, whatever its size. See
//! [`dirty_track::log`] for the format, and [`crate::state`] for the state.
//!
//! A file comes from outside. It is read to its end before a vCPU runs: whatever is wrong with it, no guest is started
//! with a part of it.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};

use dirty_track::addr::{PAGE_SIZE, PageRange};
use dirty_track::log::{Event, Image, LogReader, LogWriter, ReadError, WriteError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::disk::DiskConfig;
use crate::dump;
use crate::machine::Machine;
use crate::memory::{MemoryConfig, MemoryError, Ram};
use crate::state::{DeviceState, MachineState, StateError, VcpuState, VmState};

/// What a machine is made of, as far as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Disks, in the order of their devices.
    pub disks: Vec<DiskConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// The built-in guest runs in it.
    pub builtin: bool,
}

/// Why there is no snapshot, or none to go on from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file cannot be opened.
    #[error("cannot open the snapshot {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no whole log.
    #[error("the snapshot {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ReadError,
    },
    /// A log, and no snapshot.
    #[error("{} is a dirty log and no snapshot: it has no {missing}", path.display())]
    NotASnapshot {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        missing: String,
    },
    /// A part of it makes no sense.
    #[error("the {part} in the snapshot {} cannot be understood: {source}", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// Which part.
        part: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Memory of another layout.
    #[error("the snapshot {} has other memslots than this program makes for {memory} bytes of memory", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// Bytes of memory.
        memory: u64,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Writing it.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A part that cannot be written as JSON.
    #[error("cannot put the machine's state into words: {0}")]
    Json(#[from] serde_json::Error),
}

const SHAPE: &str = "shape";
const VM: &str = "vm";
const VCPU: &str = "vcpu";
const DEVICES: &str = "devices";

/// Writes the state of `machine`, which stands still, behind the epochs of `log`.
///
/// # Errors
/// See [`SnapshotError`].
pub fn write_state<W: Write>(
    log: &mut LogWriter<W>,
    machine: &Machine,
    shape: &Shape,
) -> Result<(), SnapshotError> {
    let still = machine.pause();
    let (MachineState { vm, vcpus, devices }, _devices_rest) = still.state()?;
    log.state(SHAPE, &serde_json::to_vec(shape)?)?;
    log.state(VM, &serde_json::to_vec(&vm)?)?;
    for vcpu in &vcpus {
        log.state(VCPU, &serde_json::to_vec(vcpu)?)?;
    }
    log.state(DEVICES, &serde_json::to_vec(&devices)?)?;
    Ok(())
}

/// What a snapshot has.
pub struct Snapshot {
    /// What the machine is made of.
    pub shape: Shape,
    /// Its memory.
    pub ram: Ram,
    /// Everything else.
    pub state: MachineState,
}

/// Reads the snapshot at `path` into memory as `memory` says, whose size is the snapshot's.
///
/// # Errors
/// See [`SnapshotError`].
pub fn read(path: &Path, memory: MemoryConfig) -> Result<Snapshot, SnapshotError> {
    let open_error = |source| SnapshotError::Open { path: path.to_owned(), source };
    let read_error = |source| SnapshotError::Read { path: path.to_owned(), source };
    let missing =
        |missing: &str| SnapshotError::NotASnapshot { path: path.to_owned(), missing: missing.to_owned() };
    let file = File::open(path).map_err(open_error)?;
    let mut log = LogReader::new(BufReader::with_capacity(1 << 20, file)).map_err(read_error)?;
    if !log.header().contents {
        return Err(missing("contents"));
    }
    let size = log.header().slots.iter().fold(0, |sum: u64, slot| sum.saturating_add(slot.pages));
    let size = size.saturating_mul(PAGE_SIZE);
    let ram = Ram::new(MemoryConfig { size, ..memory })?;
    // By where they are; their numbers are this program's own.
    let frames =
        |slots: &[dirty_track::log::SlotInfo]| -> Vec<_> { slots.iter().map(|slot| slot.frames()).collect() };
    if frames(&dump::slots(&ram)) != frames(&log.header().slots) {
        return Err(SnapshotError::Layout { path: path.to_owned(), memory: size });
    }
    let mut parts = Parts { path, shape: None, vm: None, vcpus: Vec::new(), devices: None };
    let mut image = Memory(&ram);
    let written = |range: PageRange| move |source| WriteError::Memory { range, source };
    while let Some(event) = log.read().map_err(read_error)? {
        match event {
            Event::Pages(range, contents) => image.write(range, contents).map_err(written(range))?,
            Event::Zero(spans) => {
                for range in spans.iter().map(|span| span.range) {
                    image.zero(range).map_err(written(range))?;
                }
            }
            Event::State { name, bytes } => parts.add(name, bytes)?,
            _ => {}
        }
    }
    let shape = parts.shape.ok_or_else(|| missing("shape of a machine"))?;
    let state = MachineState {
        vm: parts.vm.ok_or_else(|| missing("interrupt controllers"))?,
        vcpus: parts.vcpus,
        devices: parts.devices.ok_or_else(|| missing("devices"))?,
    };
    if state.vcpus.len() != usize::from(shape.cpus) {
        return Err(missing("state of each vCPU"));
    }
    Ok(Snapshot { shape, ram, state })
}

/// What was found of the state.
struct Parts<'a> {
    path: &'a Path,
    shape: Option<Shape>,
    vm: Option<VmState>,
    vcpus: Vec<VcpuState>,
    devices: Option<DeviceState>,
}

impl Parts<'_> {
    fn parse<T: DeserializeOwned>(&self, part: &str, bytes: &[u8]) -> Result<T, SnapshotError> {
        serde_json::from_slice(bytes).map_err(|source| SnapshotError::Part {
            path: self.path.to_owned(),
            part: part.to_owned(),
            source,
        })
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        match name {
            SHAPE => self.shape = Some(self.parse(name, bytes)?),
            VM => self.vm = Some(self.parse(name, bytes)?),
            // More than any machine has are noticed at the end.
            VCPU if self.vcpus.len() <= usize::from(u8::MAX) => {
                let vcpu = self.parse(name, bytes)?;
                self.vcpus.push(vcpu);
            }
            DEVICES => self.devices = Some(self.parse(name, bytes)?),
            // Of a later version.
            _ => {}
        }
        Ok(())
    }
}

/// RAM that nobody uses yet: it is all zeros.
struct Memory<'a>(&'a Ram);

impl Image for Memory<'_> {
    fn write(&mut self, range: PageRange, contents: &[u8]) -> io::Result<()> {
        self.0.mem().write_slice(contents, GuestAddress(range.start.gpa().0)).map_err(io::Error::other)
    }

    fn zero(&mut self, range: PageRange) -> io::Result<()> {
        // A page that an earlier epoch had contents of; the others are not touched.
        let mut page = vec![0; PAGE_SIZE as usize];
        for gfn in range.iter() {
            let at = GuestAddress(gfn.gpa().0);
            self.0.mem().read_slice(&mut page, at).map_err(io::Error::other)?;
            if page.iter().any(|byte| *byte != 0) {
                page.fill(0);
                self.0.mem().write_slice(&page, at).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }
}
