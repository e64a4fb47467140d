//! A live dump: the dirty log of a running guest as a stream, epoch by epoch.
//!
//! The contents of a page are copied after the harvest that reports it, so after it is protected again: a write during
//! the copy is in the next epoch. Only the last epoch of a log with contents is copied while the vCPUs stand still, so
//! that memory has been, at one instant, what a replay of the log makes of the memory that it began with.

use std::io::{self, Write};
use std::time::Instant;

use dirty_track::addr::{Gfn, Gpa, PageRange};
use dirty_track::bitmap;
use dirty_track::log::{
    Compression, End, EpochWriter, Header, LogWriter, SlotInfo, Span, StreamId, WriteError, flags,
};
use dirty_track::tracker::{Guarantees, Harvest, SlotSet};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Ram;

/// What is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DumpConfig {
    /// The contents of dirty pages, too.
    pub pages: bool,
    /// All of memory as the first epoch, so that the log stands for itself. Only with `pages`.
    pub full: bool,
    /// How contents are compressed.
    pub compress: Compression,
    /// Epochs after which the log ends, all of memory not counted; 0: when it is told to.
    pub epochs: u64,
    /// Length of an epoch in milliseconds; 0: as it is.
    pub interval_ms: u64,
}

impl Default for DumpConfig {
    fn default() -> DumpConfig {
        DumpConfig { pages: false, full: false, compress: Compression::None, epochs: 0, interval_ms: 0 }
    }
}

/// Why a dump ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The log.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// No random number.
    #[error("cannot read /dev/urandom: {0}")]
    Random(#[source] io::Error),
    /// `full` without `pages`.
    #[error("all of memory without its contents says nothing: give pages as well")]
    FullWithoutPages,
}

/// A log that is being written.
pub struct Dump<W> {
    log: LogWriter<W>,
    config: DumpConfig,
    began: Instant,
}

/// Bytes of the monitor's own name in a log.
pub(crate) const CREATOR: &str = concat!("vmm ", env!("CARGO_PKG_VERSION"));

/// 128 random bits.
pub fn stream_id() -> Result<StreamId, DumpError> {
    let mut bytes = [0; 16];
    let mut random = std::fs::File::open("/dev/urandom").map_err(DumpError::Random)?;
    io::Read::read_exact(&mut random, &mut bytes).map_err(DumpError::Random)?;
    Ok(StreamId(u128::from_ne_bytes(bytes)))
}

impl<W: Write> Dump<W> {
    /// Begins a log of `ram`. The epoch that is under way begins now, too.
    ///
    /// # Errors
    /// See [`DumpError`].
    pub fn begin(
        out: W,
        ram: &Ram,
        tracker: &str,
        guarantees: Guarantees,
        config: DumpConfig,
    ) -> Result<Dump<W>, DumpError> {
        if config.full && !config.pages {
            return Err(DumpError::FullWithoutPages);
        }
        let header = Header {
            id: stream_id()?,
            parent: None,
            page_size: dirty_track::addr::PAGE_SIZE,
            slots: slots(ram),
            tracker: tracker.to_owned(),
            guarantees,
            contents: config.pages,
            checked: true,
            creator: CREATOR.to_owned(),
        };
        let log = LogWriter::new(out, header, config.compress)?;
        Ok(Dump { log, config, began: Instant::now() })
    }

    /// What was asked for.
    pub fn config(&self) -> DumpConfig {
        self.config
    }

    /// The log itself, between two epochs or after the last.
    pub fn log(&mut self) -> &mut LogWriter<W> {
        &mut self.log
    }

    /// Where it goes.
    pub fn out(&self) -> &W {
        self.log.out()
    }

    /// How much is in it.
    pub fn so_far(&self) -> End {
        self.log.so_far()
    }

    /// Whether the next epoch is the last one.
    pub fn is_at_last(&self) -> bool {
        // All of memory is an epoch more.
        let epochs = self.config.epochs + u64::from(self.config.full);
        self.config.epochs > 0 && self.log.so_far().epochs + 1 >= epochs
    }

    /// Writes all of memory as an epoch: what every page is, or was written to while it was copied, which the next epoch
    /// has.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn all(&mut self, ram: &Ram) -> Result<(), DumpError> {
        let at = nanos(self.began);
        let slots = slots(ram);
        let mut epoch = self.log.epoch(at, 0)?;
        let span = |slot: &SlotInfo| Span { range: slot.frames(), flags: flags::COARSE };
        epoch.ranges(slots.iter().map(span))?;
        for slot in &slots {
            contents(&mut epoch, slot.frames(), ram)?;
        }
        epoch.finish()?;
        Ok(())
    }

    /// Writes what an epoch of so many `seconds` brought.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn epoch(&mut self, harvest: &Harvest<'_>, ram: &Ram, seconds: f64) -> Result<(), DumpError> {
        let mut epoch = self.log.epoch(nanos(self.began), (seconds * 1e9) as u64)?;
        for slot in harvest.slots() {
            epoch.ranges(spans(slot))?;
        }
        for vcpu in 0..harvest.vcpus() {
            let runs = harvest.slots().iter().flat_map(|slot| slot.written_by(vcpu));
            epoch.vcpu(vcpu as u32, runs.map(|range| Span { range, flags: 0 }))?;
        }
        if self.config.pages {
            for run in harvest.runs() {
                contents(&mut epoch, run, ram)?;
            }
        }
        epoch.finish()?;
        self.log.flush()?;
        Ok(())
    }

    /// Ends the log.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn finish(self) -> Result<(W, End), DumpError> {
        Ok(self.log.finish()?)
    }
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// All of RAM.
pub fn slots(ram: &Ram) -> Vec<SlotInfo> {
    let region = |(id, region): (usize, &crate::memory::RamRegion)| SlotInfo {
        id: id as u32,
        first: Gpa(region.gpa).gfn().0,
        pages: region.len / dirty_track::addr::PAGE_SIZE,
    };
    ram.regions().iter().enumerate().map(region).collect()
}

/// Writes the contents of `range`.
fn contents<W: Write>(epoch: &mut EpochWriter<'_, W>, range: PageRange, ram: &Ram) -> Result<(), DumpError> {
    Ok(epoch
        .pages(range, |gpa, to| ram.mem().read_slice(to, GuestAddress(gpa.0)).map_err(io::Error::other))?)
}

/// The dirty pages of `slot`, as runs of pages of which the same is known.
pub fn spans(slot: &SlotSet) -> impl Iterator<Item = Span> + '_ {
    let first = slot.frames().start.0;
    let flags_of = move |page: usize| {
        let has = |words: &[u64]| {
            words
                .get(page / bitmap::PAGES_PER_WORD)
                .is_some_and(|word| word >> (page % bitmap::PAGES_PER_WORD) & 1 != 0)
        };
        let flag = |words: &[u64], flag: u32| if has(words) { flag } else { 0 };
        flag(slot.coarse_words(), flags::COARSE) | flag(slot.host_words(), flags::HOST)
    };
    slot.runs().flat_map(move |run| {
        let mut at = run.start.0;
        std::iter::from_fn(move || {
            let end = run.end().0;
            (at < end).then(|| {
                let (start, flags) = (at, flags_of((at - first) as usize));
                at = (start + 1..end).find(|&gfn| flags_of((gfn - first) as usize) != flags).unwrap_or(end);
                Span { range: PageRange { start: Gfn(start), pages: at - start }, flags }
            })
        })
    })
}
