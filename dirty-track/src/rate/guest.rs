//! A simulated guest with a known truth: it writes a page every so often, and a log may hold it back.

use crate::mix::{below, mix};

/// Which page a guest writes next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer {
    /// Any of `pages`, each as likely.
    Uniform { pages: u64 },
    /// Of `pages`, page *i* with a likelihood of about 1/(*i* + 1).
    Zipf { pages: u64 },
    /// One after the other, over and over.
    Sequential { pages: u64 },
}

/// A guest on one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    writer: Writer,
    /// Seconds that one write takes, with the work around it, when nobody tracks.
    per_write: f64,
    writes: u64,
    seed: u64,
}

/// What an epoch showed.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    /// Its length; a little more than was asked for, because the last write ends in it.
    pub(crate) seconds: f64,
    /// For each page, whether it was written.
    pub(crate) dirty: Vec<bool>,
    /// First writes.
    pub(crate) faults: u64,
}

impl Guest {
    pub(crate) fn new(writer: Writer, writes_per_s: f64, seed: u64) -> Guest {
        Guest { writer, per_write: 1.0 / writes_per_s, writes: 0, seed }
    }

    pub(crate) fn pages(&self) -> u64 {
        let (Writer::Uniform { pages } | Writer::Zipf { pages } | Writer::Sequential { pages }) = self.writer;
        pages
    }

    fn next(&mut self) -> u64 {
        self.writes += 1;
        let random = mix(self.seed << 40 ^ self.writes);
        match self.writer {
            Writer::Uniform { pages } => below(random, pages),
            // The inverse of the distribution function ln(1 + i) / ln(1 + pages).
            Writer::Zipf { pages } => {
                let share = random as f64 / u64::MAX as f64;
                ((((pages + 1) as f64).powf(share) - 1.0) as u64).min(pages - 1)
            }
            Writer::Sequential { pages } => self.writes % pages,
        }
    }

    /// Runs for `seconds` under a log whose faults cost `fault` seconds each; 0 for no log.
    pub(crate) fn epoch(&mut self, seconds: f64, fault: f64) -> Epoch {
        let mut epoch = Epoch { seconds: 0.0, dirty: vec![false; self.pages() as usize], faults: 0 };
        while epoch.seconds < seconds {
            epoch.seconds += self.per_write;
            let page = self.next() as usize;
            if !std::mem::replace(&mut epoch.dirty[page], true) {
                epoch.faults += 1;
                epoch.seconds += fault;
            }
        }
        epoch
    }
}
