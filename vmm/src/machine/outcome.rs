//! How a machine ended, which what serves its memory may decide.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use dirty_track::addr::PageRange;
use dirty_track::fault::PageSource;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::gate::Gate;
use crate::vcpu::End;

/// How the machine ended, and who is told.
pub(super) struct Outcome {
    end: Mutex<Option<End>>,
    ended: EventFd,
}

impl Outcome {
    pub(super) fn new() -> io::Result<Outcome> {
        Ok(Outcome { end: Mutex::new(None), ended: EventFd::new(EFD_NONBLOCK)? })
    }

    /// The end, if there has been one.
    pub(super) fn end(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Readable when there has been one.
    pub(super) fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// The first end counts.
    pub(super) fn report(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        slot.get_or_insert(end);
        // An eventfd that cannot count on is readable already.
        let _ = self.ended.write(1);
    }
}

/// Where the guest's pages come from. One that cannot be had ends the machine: it is never given anything else instead.
pub(super) struct OrEnd {
    pub(super) source: Arc<dyn PageSource>,
    pub(super) outcome: Arc<Outcome>,
    pub(super) gate: Arc<Gate>,
}

impl fmt::Debug for OrEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl OrEnd {
    fn end(&self, error: io::Error) -> io::Error {
        self.outcome.report(End::Failed(format!("the guest cannot go on: {error}")));
        self.gate.stop();
        error
    }
}

impl PageSource for OrEnd {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.source.fetch(pages, into).map_err(|error| self.end(error))
    }

    fn filled(&self, pages: PageRange, take: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        self.source.filled(pages, take).map_err(|error| self.end(error))
    }
}
