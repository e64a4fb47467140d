//! Taking a snapshot of a machine that runs, and goes on.
//!
//! **Copy-on-write** ([`dirty_track::cow`]) where it can be had: the guest stands still while its memory is fixed and its
//! state is taken, and the rest is copied afterwards. It needs the one userfaultfd that memory can have; where a tracker
//! has it, or who serves faults, the snapshot is taken by **precopy**: memory is copied while the guest runs, then what was
//! written meanwhile, until that is little, and the last of it while the guest stands still.
//!
//! What a diff has is what was dirty since its parent, which the [observer](Observer) keeps. It forgets that only when the
//! snapshot is at its place: one that fails costs nothing.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use dirty_track::addr::{Gfn, PAGE_BYTES, PAGE_SIZE, PageRange};
use dirty_track::bitmap::{DirtyBitmap, PAGES_PER_WORD};
use dirty_track::cow::{Cow, CowReport, Wanted};
use dirty_track::image::ImageWriter;
use dirty_track::log::{Compression, Header, LogWriter, Span, StreamId};
use dirty_track::tracker::{Guarantees, Kind};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, Layer, Saved, end_of, header};
use super::directory::{MEMORY, Partial, STATE, SUMS, io_error, relative};
use super::{DIGESTS, PARENT, SHAPE, Shape, SnapshotError};
use crate::dump::{self, CREATOR};
use crate::live::{Epoch, Observer};
use crate::machine::Machine;
use crate::memory::Ram;
use crate::state::parts::{self, PartsError};
use crate::state::{MachineState, MsrNumbers};

/// A snapshot that is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The directory that it is to be.
    pub path: PathBuf,
    /// Just what was written since the last one.
    #[serde(default)]
    pub diff: bool,
}

/// What a diff can build on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: StreamId,
    /// Where it is.
    pub path: PathBuf,
}

/// How memory was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// After the guest had stood still, page by page before it is written.
    CopyOnWrite,
    /// Before and while it stood still.
    Precopy,
}

impl Method {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Method::CopyOnWrite => "copy-on-write",
            Method::Precopy => "precopy",
        }
    }
}

/// How a snapshot was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its id.
    pub id: StreamId,
    /// What it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<StreamId>,
    /// How memory was copied.
    pub method: Method,
    /// Seconds from the beginning until it was at its place.
    pub seconds: f64,
    /// Microseconds for which the guest stood still.
    pub still_us: f64,
    /// Pages that it has.
    pub pages: u64,
    /// Those of them that are all zeros.
    pub zero: u64,
    /// Bytes of contents.
    pub bytes: u64,
    /// Writes of the guest that waited until their page was copied.
    pub faults: u64,
    /// Pages that were copied for them.
    pub fault_pages: u64,
    /// The longest time in microseconds that such a write took to serve, and the mean.
    pub fault_worst_us: f64,
    /// See `fault_worst_us`.
    pub fault_mean_us: f64,
}

/// By precopy: so many pages are copied while the guest stands still.
const FEW: u64 = 256;

/// By precopy: after so many epochs the guest stands still for as many as there are.
const EPOCHS: u32 = 8;

/// Threads that copy. More than this and the guest would wait for memory's bandwidth.
const COPIERS: usize = 4;

/// Takes a snapshot of `machine`, whose memory `observer` tracks, if anybody does. What it closes of epochs it tells
/// `show`.
pub(crate) fn take(
    machine: &Machine,
    shape: &Shape,
    observer: Option<&mut Observer>,
    kind: Kind,
    request: &Request,
    show: &mut dyn FnMut(&Epoch),
) -> Result<SnapshotReport, SnapshotError> {
    let began = Instant::now();
    let ram = machine.ram();
    let parent = match request.diff {
        true => Some(base(observer.as_deref(), &request.path)?),
        false => None,
    };
    let partial = Partial::begin(&request.path)?;
    // So that it need not be asked for when the guest stands still.
    MsrNumbers::of_host()?;
    let id = dump::stream_id()?;
    let slots = dump::slots(ram);
    let guarantees = observer
        .as_deref()
        .map_or(Kind::None.guarantees(dirty_track::tracker::Backing::Private), Observer::guarantees);
    let head = Header {
        id,
        parent: parent.as_ref().map(|base| base.id),
        page_size: PAGE_SIZE,
        slots,
        tracker: kind.name().to_owned(),
        guarantees: Guarantees { ..guarantees },
        contents: false,
        checked: true,
        creator: CREATOR.to_owned(),
    };
    let image = Arc::new(ImageWriter::create(&partial.file(MEMORY), id, end_of(&head))?);
    let mut taking = Taking { machine, observer, image: Arc::clone(&image), diff: request.diff, show };
    if let Some(observer) = &mut taking.observer {
        observer.be_brief(true);
    }
    let taken = match Cow::new(machine.slots(), Arc::clone(&image), ram.is_anonymous()) {
        Ok(cow) => taking.copy_on_write(cow),
        Err(_) if taking.observer.is_some() => taking.precopy(),
        Err(error) => Err(SnapshotError::NoMethod(error.to_string())),
    };
    if let Some(observer) = &mut taking.observer {
        observer.be_brief(false);
    }
    let taken = taken?;
    let Taking { observer, image: shared, .. } = taking;
    drop(shared);
    let ranges = match (&taken.marks, request.diff) {
        (Some(marks), true) => frames(ram, marks),
        _ => head.slots.iter().map(|slot| slot.frames()).collect(),
    };
    // The copiers have ended, and nobody else has it.
    let image = Arc::into_inner(image).ok_or_else(|| SnapshotError::Busy(request.path.clone()))?;
    let saved = image.finish(&partial.file(SUMS))?;
    let parent_path = parent.as_ref().map(|base| relative(&request.path, &base.path));
    let behind =
        Behind { digests: saved.digests, parent: parent_path.as_deref(), shape, state: &taken.state };
    write_state(&partial.file(STATE), head, &ranges, behind)?;
    partial.complete()?;
    if let Some(observer) = observer {
        observer.set_base(Base { id, path: request.path.clone() });
    }
    let pages = ranges.iter().map(|range| range.pages).sum();
    Ok(SnapshotReport {
        id,
        parent: parent.map(|base| base.id),
        method: taken.method,
        seconds: began.elapsed().as_secs_f64(),
        still_us: taken.still_us,
        pages,
        zero: pages - saved.pages.min(pages),
        bytes: saved.pages * PAGE_SIZE,
        faults: taken.cow.faults,
        fault_pages: taken.cow.fault_pages,
        fault_worst_us: taken.cow.worst_fault_us,
        fault_mean_us: taken.cow.mean_fault_us,
    })
}

/// Writes one full snapshot of all of `chain` to `place`. Returns how many pages it has that are not zeros.
///
/// # Errors
/// See [`SnapshotError`].
pub fn merge(chain: &Chain, saved: &Saved, place: &Path) -> Result<u64, SnapshotError> {
    let newest = chain.newest();
    let partial = Partial::begin(place)?;
    let id = dump::stream_id()?;
    let head = Header { id, parent: None, creator: CREATOR.to_owned(), ..newest.header.clone() };
    let image = ImageWriter::create(&partial.file(MEMORY), id, end_of(&head))?;
    let mut buffer = vec![0; COPIED];
    let ranges: Vec<_> = head.slots.iter().map(|slot| slot.frames()).collect();
    for range in &ranges {
        chain.filled(*range, &mut buffer, |range, contents| Ok(image.save(range.start, contents)?))?;
    }
    let written = image.finish(&partial.file(SUMS))?;
    let Saved { shape, state } = saved;
    let behind = Behind { digests: written.digests, parent: None, shape, state };
    write_state(&partial.file(STATE), head, &ranges, behind)?;
    partial.complete()?;
    Ok(written.pages)
}

/// What a diff at `path` builds on, which is there still.
fn base(observer: Option<&Observer>, path: &Path) -> Result<Base, SnapshotError> {
    let none = |why: &str| SnapshotError::NoBase(why.to_owned());
    let observer = observer.ok_or_else(|| none("nothing is tracked"))?;
    let base = observer.base().cloned();
    let base = base.ok_or_else(|| none("no snapshot was taken since tracking began"))?;
    let there = header(&base.path).map_err(|error| SnapshotError::NoBase(error.to_string()))?;
    if there.id != base.id {
        let place = base.path.display();
        return Err(SnapshotError::NoBase(format!("what is at {place} is another snapshot by now")));
    }
    // Nothing that it builds on may make place for it.
    let mut at = base.path.clone();
    let place = fs::canonicalize(path).ok();
    while let Some(place) = &place {
        let ancestor = fs::canonicalize(&at).unwrap_or(at);
        if ancestor == *place {
            return Err(SnapshotError::Ancestor(path.to_owned()));
        }
        let (layer, _) = Layer::open(&ancestor)?;
        match layer.parent() {
            Some(parent) => at = ancestor.join(parent),
            None => break,
        }
    }
    Ok(base)
}

/// A snapshot on its way.
struct Taking<'a> {
    machine: &'a Machine,
    observer: Option<&'a mut Observer>,
    image: Arc<ImageWriter>,
    diff: bool,
    show: &'a mut dyn FnMut(&Epoch),
}

/// What was taken.
struct Taken {
    method: Method,
    still_us: f64,
    state: MachineState,
    cow: CowReport,
    /// Of a diff: its pages.
    marks: Option<Arc<DirtyBitmap>>,
}

impl Taking<'_> {
    fn copy_on_write(&mut self, cow: Cow) -> Result<Taken, SnapshotError> {
        let machine = self.machine;
        let marks = match &mut self.observer {
            Some(observer) if self.diff => {
                // Most of what it is going to have is known before the guest stands still.
                (self.show)(&observer.close_epoch()?);
                Some(Arc::clone(observer.since_base()))
            }
            _ => None,
        };
        let wanted = || marks.as_deref().map_or(Wanted::All, Wanted::Marked);
        cow.protect(wanted())?;
        if let Some(observer) = &mut self.observer {
            // So that the last epoch is a short one.
            (self.show)(&observer.close_epoch()?);
        }
        // What devices wrote is in the last epoch, and they write nothing after it.
        let devices = machine.platform().pause();
        let fix = || -> Result<_, SnapshotError> {
            cow.freeze(wanted())?;
            state(machine)
        };
        let (still_us, state) = match &mut self.observer {
            Some(observer) => {
                let mut fixed = None;
                let epoch = observer.close_epoch_with(true, |_, _| fixed = Some(fix()))?;
                (self.show)(&epoch);
                (epoch.stall_us, fixed)
            }
            None => {
                let began = Instant::now();
                let still = machine.pause();
                let fixed = fix();
                drop(still);
                (began.elapsed().as_nanos() as f64 / 1000.0, Some(fixed))
            }
        };
        drop(devices);
        // It was looked at, or the epoch would not have been closed.
        let state = state.unwrap_or_else(fix)?;
        let copiers = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(COPIERS));
        let cow = cow.save(copiers)?;
        Ok(Taken { method: Method::CopyOnWrite, still_us, state, cow, marks })
    }

    fn precopy(&mut self) -> Result<Taken, SnapshotError> {
        let (machine, ram) = (self.machine, self.machine.ram());
        let Some(observer) = &mut self.observer else {
            return Err(SnapshotError::NoMethod("there is no tracker".into()));
        };
        let image = &self.image;
        let mut buffer = vec![0; COPIED];
        (self.show)(&observer.close_epoch()?);
        match self.diff {
            true => {
                for range in frames(ram, observer.since_base()) {
                    copy(ram, range, image, &mut buffer)?;
                }
            }
            false => {
                for slot in dump::slots(ram) {
                    copy(ram, slot.frames(), image, &mut buffer)?;
                }
            }
        }
        let mut before = u64::MAX;
        for _ in 0..EPOCHS {
            let mut written = Ok(());
            let epoch = observer.close_epoch_with(false, |harvest, _| {
                written = harvest.runs().try_for_each(|run| copy(ram, run, image, &mut buffer));
            })?;
            written?;
            (self.show)(&epoch);
            // It does not become less from one epoch to the next.
            if epoch.dirty_pages <= FEW || epoch.dirty_pages > before / 4 * 3 {
                break;
            }
            before = epoch.dirty_pages;
        }
        let devices = machine.platform().pause();
        let mut taken = None;
        let epoch = observer.close_epoch_with(true, |harvest, _| {
            let copied = harvest.runs().try_for_each(|run| copy(ram, run, image, &mut buffer));
            taken = Some(copied.and_then(|()| state(machine)));
        })?;
        drop(devices);
        (self.show)(&epoch);
        Ok(Taken {
            method: Method::Precopy,
            still_us: epoch.stall_us,
            // It was looked at, or the epoch would not have been closed.
            state: taken.unwrap_or_else(|| state(machine))?,
            cow: CowReport::default(),
            marks: self.diff.then(|| Arc::clone(observer.since_base())),
        })
    }
}

/// Bytes that are copied at once: what stays in a processor's own cache until it is written.
const COPIED: usize = 64 * PAGE_BYTES;

fn copy(ram: &Ram, range: PageRange, image: &ImageWriter, buffer: &mut [u8]) -> Result<(), SnapshotError> {
    let mut at = range.start;
    while at < range.end() {
        let pages = (range.end().0 - at.0).min((buffer.len() / PAGE_BYTES) as u64);
        let contents = &mut buffer[..pages as usize * PAGE_BYTES];
        ram.mem().read_slice(contents, GuestAddress(at.gpa().0))?;
        image.save(at, contents)?;
        at = Gfn(at.0 + pages);
    }
    Ok(())
}

/// The marked pages, which are those of the regions of `ram` one after the other, as frames.
fn frames(ram: &Ram, marks: &DirtyBitmap) -> Vec<PageRange> {
    let slots = dump::slots(ram);
    let mut ranges: Vec<PageRange> = Vec::new();
    for run in marks.runs() {
        let mut base = 0;
        for slot in &slots {
            let pages = slot.pages as usize;
            let (start, end) = (run.start.max(base), run.end.min(base + pages));
            if start < end {
                let start = Gfn(slot.first + (start - base) as u64);
                let range = PageRange { start, pages: (end - base) as u64 + slot.first - start.0 };
                ranges.push(range);
            }
            base += pages.next_multiple_of(PAGES_PER_WORD);
        }
    }
    ranges
}

/// The state of `machine`, which stands still, and whose devices rest.
fn state(machine: &Machine) -> Result<MachineState, SnapshotError> {
    Ok(machine.pause().state()?.0)
}

/// What goes behind the ranges.
struct Behind<'a> {
    digests: Vec<u64>,
    parent: Option<&'a Path>,
    shape: &'a Shape,
    state: &'a MachineState,
}

/// Digests in one record.
const DIGESTS_AT_ONCE: usize = 1 << 17;

fn write_state(
    path: &Path,
    head: Header,
    ranges: &[PageRange],
    behind: Behind<'_>,
) -> Result<(), SnapshotError> {
    let file = File::options().write(true).create_new(true).open(path).map_err(io_error("create", path))?;
    let write = |out| -> Result<BufWriter<File>, PartsError> {
        let mut log = LogWriter::new(out, head, Compression::None)?;
        let mut epoch = log.epoch(0, 0)?;
        epoch.ranges(ranges.iter().map(|&range| Span { range, flags: 0 }))?;
        epoch.finish()?;
        for digests in behind.digests.chunks(DIGESTS_AT_ONCE) {
            let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
            log.state(DIGESTS, &bytes)?;
        }
        if let Some(parent) = behind.parent {
            log.state(PARENT, parent.as_os_str().as_bytes())?;
        }
        parts::put(&mut log, SHAPE, behind.shape)?;
        parts::write(&mut log, behind.state)?;
        Ok(log.finish()?.0)
    };
    let mut out = write(BufWriter::with_capacity(1 << 18, file)).map_err(|error| match error {
        PartsError::Write(error) => error.into(),
        source => SnapshotError::Parts { path: path.to_owned(), source },
    })?;
    out.flush().and_then(|()| out.get_ref().sync_all()).map_err(io_error("write", path))
}
