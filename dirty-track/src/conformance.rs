//! The conformance suite: holds a tracker to its guarantees, with a running guest.
//!
//! A monitor that wants to try its own tracker, or one of these trackers on its own machine, implements
//! [`Subject`] for a machine whose guest keeps a ledger (which pages it wrote and read, by epoch), and calls
//! [`run`] with a [`Plan`]. There are two judges, and they know nothing of each other:
//!
//! - **The ledger**, in *sharp* epochs: the vCPUs stand still at each boundary, so the pages entered under an epoch
//!   and those harvested for it must be the same set, but for what the tracker's
//!   [`Guarantees`] let it report besides.
//! - **A copy of guest RAM**, in *racing* epochs as well: it is made once, when tracking begins, and from then on
//!   gets only the pages that harvests name, while vCPUs and the host go on writing. In the end, with everything
//!   still, it must equal RAM byte for byte.
//!
//! A page that is missed is a [`Failure`] and ends the run. A page that is reported beyond the guarantees is one
//! as well; within them it is counted in the [`Report`].
//!
//! It needs the feature `conformance`.

use std::fmt;

use crate::addr::{Gfn, PAGE_SIZE, PageRange, PageSize};
use crate::bitmap::{PAGES_PER_WORD, words_for};
use crate::tracker::{Guarantees, Harvest, Tracker, TrackerError};

/// One page's bytes.
pub type Page = [u8; PAGE_SIZE as usize];

/// An error of the machine under test.
pub type SubjectError = Box<dyn std::error::Error + Send + Sync>;

/// What a guest says that it did in one epoch, over the pages of its region.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// The pages that the ledger tells about.
    pub region: Option<PageRange>,
    /// Written in the epoch: one bit a page, counted from the region's first.
    pub wrote: Vec<u64>,
    /// Read in the epoch, likewise.
    pub read: Vec<u64>,
    /// Pages that were being accessed at one of the epoch's ends: they may count for it or for its neighbour.
    pub in_flight: Vec<Gfn>,
    /// Pages outside the region that the guest writes without an entry: its kernel, its page tables, the ledger.
    pub own: Vec<PageRange>,
}

impl Ledger {
    fn has(&self, words: &[u64], gfn: Gfn) -> bool {
        let Some(region) = self.region.filter(|region| region.contains(gfn)) else { return false };
        let page = (gfn.0 - region.start.0) as usize;
        words.get(page / PAGES_PER_WORD).is_some_and(|word| word >> (page % PAGES_PER_WORD) & 1 != 0)
    }
}

/// A machine with a guest that writes all the time and keeps a ledger.
pub trait Subject {
    /// All of guest RAM.
    fn ram(&self) -> Vec<PageRange>;

    /// Pages of RAM that the guest does not use, and which the suite may write to from the host.
    fn host_area(&self) -> PageRange;

    /// Stops the vCPUs between two instructions. Returns when they stand still.
    fn stop(&mut self);

    /// Lets them go on.
    fn go(&mut self);

    /// Tells the guest, which stands still, that epoch `epoch` begins.
    ///
    /// # Errors
    /// When the guest is not to be told.
    fn begin_epoch(&mut self, epoch: u32) -> Result<(), SubjectError>;

    /// Waits until the guest has made `accesses` more accesses.
    ///
    /// # Errors
    /// When it makes none.
    fn let_work(&mut self, accesses: u64) -> Result<(), SubjectError>;

    /// What the guest, which stands still, did in epoch `epoch`, the one that was begun last.
    ///
    /// # Errors
    /// When its ledger is not to be read.
    fn ledger(&mut self, epoch: u32) -> Result<Ledger, SubjectError>;

    /// Copies a page out of guest memory.
    ///
    /// # Errors
    /// When it is not to be read.
    fn read(&self, gfn: Gfn, page: &mut Page) -> Result<(), SubjectError>;

    /// Writes a page of the [host area](Subject::host_area), in the way that the machine's devices write.
    ///
    /// # Errors
    /// When it is not to be written.
    fn write(&self, gfn: Gfn, page: &Page) -> Result<(), SubjectError>;
}

/// What one run does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Epochs with a sharp boundary, held against the ledger.
    pub sharp: u32,
    /// Epochs that are harvested while everything runs.
    pub racing: u32,
    /// Accesses that the guest makes in an epoch, at least.
    pub accesses: u64,
    /// Pages that the host writes in an epoch.
    pub host_writes: u32,
    /// Every so many harvests one is dropped before it is committed; 0 for none.
    pub drop_every: u32,
    /// Every so many racing epochs tracking is ended and begun again; 0 for never.
    pub rearm_every: u32,
    /// Seed of what is chosen at random.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan { sharp: 3, racing: 6, accesses: 2400, host_writes: 40, drop_every: 3, rearm_every: 5, seed: 1 }
    }
}

/// What a run came to, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Written by the guest in sharp epochs, by its ledger.
    pub wrote: u64,
    /// Reported by the harvests that were committed.
    pub reported: u64,
    /// Reported in a sharp epoch though the guest did not write them, within the guarantees.
    pub extra: u64,
    /// Those of them that the guest had read.
    pub extra_read: u64,
    /// Written by the host.
    pub host_wrote: u64,
    /// Harvests that were dropped and came back.
    pub dropped: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { wrote, reported, extra, extra_read, host_wrote, dropped } = self;
        write!(
            f,
            "{wrote} written, {reported} reported, 0 missed, {extra} extra ({extra_read} read), {host_wrote} by the \
             host, {dropped} harvests dropped"
        )
    }
}

/// What a tracker did that it must not do, or why that could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A lost write, by the ledger.
    #[error("{gfn} was written in epoch {epoch} and not reported ({missed} pages missed)")]
    Missed {
        /// The epoch.
        epoch: u32,
        /// The first page.
        gfn: Gfn,
        /// How many there are.
        missed: u64,
    },
    /// A write of the host that was lost.
    #[error("{gfn} was written by the host in epoch {epoch} and not reported")]
    MissedHost {
        /// The epoch.
        epoch: u32,
        /// The page.
        gfn: Gfn,
    },
    /// A lost write, by the copy.
    #[error(
        "the copy differs from RAM in {pages} pages, the first of them {gfn}: their last writes were lost"
    )]
    Differs {
        /// The first page.
        gfn: Gfn,
        /// How many there are.
        pages: u64,
    },
    /// A report that no guarantee covers.
    #[error(
        "{gfn} was reported in epoch {epoch}, where it was {done} only: the guarantees do not allow for that"
    )]
    Extra {
        /// The epoch.
        epoch: u32,
        /// The page.
        gfn: Gfn,
        /// What was done to it.
        done: &'static str,
    },
    /// A dropped harvest did not come back whole.
    #[error("{gfn} was in a harvest that was dropped, and is not in the next one")]
    Forgotten {
        /// The page.
        gfn: Gfn,
    },
    /// A call in a state that does not allow for it did not fail.
    #[error("{0}")]
    Protocol(&'static str),
    /// The guest never wrote: such a run proves nothing.
    #[error("the guest wrote nothing, so nothing was proved")]
    Idle,
    /// The tracker.
    #[error("the tracker failed: {0}")]
    Tracker(#[from] TrackerError),
    /// The machine.
    #[error("the machine under test failed: {0}")]
    Subject(#[from] SubjectError),
}

/// Runs `plan` on `subject` with `tracker`, which must not be armed, and leaves it disarmed.
///
/// # Errors
/// [`Failure`], at the first thing that is wrong; the tracker may be armed still.
pub fn run(subject: &mut dyn Subject, tracker: &mut dyn Tracker, plan: &Plan) -> Result<Report, Failure> {
    if tracker.harvest().is_ok() {
        return Err(Failure::Protocol("a harvest of a tracker that is not armed succeeded"));
    }
    if tracker.disarm().is_ok() {
        return Err(Failure::Protocol("disarming a tracker that is not armed succeeded"));
    }
    let mut suite = Suite {
        guarantees: tracker.guarantees(),
        replica: Replica::new(subject),
        report: Report::default(),
        random: plan.seed | 1,
        harvests: 0,
        host_wrote: Vec::new(),
        plan: *plan,
    };
    suite.begin(subject, tracker)?;
    if tracker.arm().is_ok() {
        return Err(Failure::Protocol("arming an armed tracker succeeded"));
    }
    for epoch in 1..=plan.sharp {
        suite.sharp_epoch(subject, tracker, epoch)?;
    }
    for racing in 1..=plan.racing {
        suite.racing_epoch(subject, tracker)?;
        if plan.rearm_every > 0 && racing % plan.rearm_every == 0 {
            tracker.disarm()?;
            subject.let_work(plan.accesses)?;
            suite.begin(subject, tracker)?;
        }
    }
    subject.stop();
    let outcome = suite.finish(subject, tracker);
    subject.go();
    outcome?;
    if suite.report.wrote == 0 && plan.sharp > 0 {
        return Err(Failure::Idle);
    }
    Ok(suite.report)
}

struct Suite {
    guarantees: Guarantees,
    replica: Replica,
    report: Report,
    random: u64,
    harvests: u32,
    /// Pages that the host wrote since the last harvest that was committed.
    host_wrote: Vec<Gfn>,
    plan: Plan,
}

impl Suite {
    /// Arms the tracker while the guest runs, and copies all of RAM: what is written meanwhile is owed.
    fn begin(&mut self, subject: &dyn Subject, tracker: &mut dyn Tracker) -> Result<(), Failure> {
        tracker.arm()?;
        self.host_wrote.clear();
        for range in subject.ram() {
            for gfn in range.iter() {
                self.replica.copy(subject, gfn)?;
            }
        }
        Ok(())
    }

    /// A number below `below`, by a xorshift generator.
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below.max(1)
    }

    fn write_from_host(&mut self, subject: &dyn Subject) -> Result<(), Failure> {
        let area = subject.host_area();
        for _ in 0..self.plan.host_writes {
            let gfn = Gfn(area.start.0 + self.random(area.pages));
            let mut page = [0; PAGE_SIZE as usize];
            page.fill(self.random(256) as u8);
            subject.write(gfn, &page)?;
            self.host_wrote.push(gfn);
            self.report.host_wrote += 1;
        }
        Ok(())
    }

    fn sharp_epoch(
        &mut self,
        subject: &mut dyn Subject,
        tracker: &mut dyn Tracker,
        epoch: u32,
    ) -> Result<(), Failure> {
        // An epoch that begins at a boundary, whatever was before.
        subject.stop();
        let begun = self.harvest(subject, tracker).and_then(|()| Ok(subject.begin_epoch(epoch)?));
        subject.go();
        begun?;
        subject.let_work(self.plan.accesses / 2)?;
        self.write_from_host(subject)?;
        subject.let_work(self.plan.accesses / 2)?;
        subject.stop();
        let ledger = subject.ledger(epoch);
        let judged = ledger.map_err(Failure::from).and_then(|ledger| {
            let harvest = tracker.harvest()?;
            self.replica.update(subject, &harvest)?;
            self.judge(&harvest, &ledger, epoch)?;
            self.report.reported += harvest.count();
            harvest.commit();
            self.host_wrote.clear();
            Ok(())
        });
        subject.go();
        judged
    }

    /// Holds `harvest` against the ledger and the host's own writes.
    fn judge(&mut self, harvest: &Harvest<'_>, ledger: &Ledger, epoch: u32) -> Result<(), Failure> {
        let Some(region) = ledger.region else { return Ok(()) };
        let mut missed = None;
        for gfn in region.iter().filter(|gfn| ledger.has(&ledger.wrote, *gfn)) {
            self.report.wrote += 1;
            if !harvest.contains(gfn) && !ledger.in_flight.contains(&gfn) {
                missed.get_or_insert((gfn, 0)).1 += 1;
            }
        }
        if let Some((gfn, missed)) = missed {
            return Err(Failure::Missed { epoch, gfn, missed });
        }
        if self.guarantees.sees_host_writes
            && let Some(&gfn) = self.host_wrote.iter().find(|gfn| !harvest.contains(**gfn))
        {
            return Err(Failure::MissedHost { epoch, gfn });
        }
        for gfn in harvest.runs().flat_map(|run| run.iter()) {
            let written = match region.contains(gfn) {
                true => ledger.has(&ledger.wrote, gfn) || ledger.in_flight.contains(&gfn),
                false => ledger.own.iter().any(|own| own.contains(gfn)) || self.host_wrote.contains(&gfn),
            };
            if written {
                continue;
            }
            self.report.extra += 1;
            let read = ledger.has(&ledger.read, gfn);
            self.report.extra_read += u64::from(read);
            let excused = (read && self.guarantees.may_report_reads)
                || harvest.is_coarse(gfn)
                || self.near_a_write(gfn, ledger);
            if !excused {
                return Err(Failure::Extra { epoch, gfn, done: if read { "read" } else { "left alone" } });
            }
        }
        Ok(())
    }

    /// Whether a page of the same unit of report was written.
    fn near_a_write(&self, gfn: Gfn, ledger: &Ledger) -> bool {
        let unit = self.guarantees.granularity.leaves();
        if self.guarantees.granularity == PageSize::K4 {
            return false;
        }
        let first = gfn.0 - gfn.0 % unit;
        let shared_with = |range: &PageRange| range.start.0 < first + unit && range.end().0 > first;
        ledger.own.iter().any(shared_with)
            || (first..first + unit).map(Gfn).any(|other| {
                ledger.has(&ledger.wrote, other)
                    || ledger.in_flight.contains(&other)
                    || self.host_wrote.contains(&other)
            })
    }

    fn racing_epoch(&mut self, subject: &mut dyn Subject, tracker: &mut dyn Tracker) -> Result<(), Failure> {
        subject.let_work(self.plan.accesses / 2)?;
        self.write_from_host(subject)?;
        subject.let_work(self.plan.accesses / 2)?;
        self.harvest(subject, tracker)
    }

    /// Harvests, copies and commits; now and then it drops the harvest first and sees it come back.
    fn harvest(&mut self, subject: &dyn Subject, tracker: &mut dyn Tracker) -> Result<(), Failure> {
        self.harvests += 1;
        let mut owed = Vec::new();
        if self.plan.drop_every > 0 && self.harvests.is_multiple_of(self.plan.drop_every) {
            let dropped = tracker.harvest()?;
            owed = dropped.runs().collect();
            drop(dropped);
            self.report.dropped += 1;
        }
        let harvest = tracker.harvest()?;
        if let Some(gfn) = owed.iter().flat_map(PageRange::iter).find(|gfn| !harvest.contains(*gfn)) {
            return Err(Failure::Forgotten { gfn });
        }
        self.replica.update(subject, &harvest)?;
        self.report.reported += harvest.count();
        harvest.commit();
        self.host_wrote.clear();
        Ok(())
    }

    /// With everything still: the last harvest, and the comparison.
    fn finish(&mut self, subject: &dyn Subject, tracker: &mut dyn Tracker) -> Result<(), Failure> {
        let harvest = tracker.harvest()?;
        self.replica.update(subject, &harvest)?;
        harvest.commit();
        self.replica.compare(subject)?;
        Ok(tracker.disarm()?)
    }
}

/// The copy of guest RAM.
struct Replica {
    parts: Vec<(PageRange, Vec<u8>)>,
}

impl Replica {
    fn new(subject: &dyn Subject) -> Replica {
        let empty = |range: PageRange| (range, vec![0; range.bytes() as usize]);
        Replica { parts: subject.ram().into_iter().map(empty).collect() }
    }

    fn slot(&mut self, gfn: Gfn) -> Option<&mut Page> {
        let (range, bytes) = self.parts.iter_mut().find(|(range, _)| range.contains(gfn))?;
        let (pages, _) = bytes.as_chunks_mut();
        pages.get_mut((gfn.0 - range.start.0) as usize)
    }

    fn copy(&mut self, subject: &dyn Subject, gfn: Gfn) -> Result<(), SubjectError> {
        match self.slot(gfn) {
            Some(page) => subject.read(gfn, page),
            None => Ok(()),
        }
    }

    fn update(&mut self, subject: &dyn Subject, harvest: &Harvest<'_>) -> Result<(), SubjectError> {
        harvest.runs().flat_map(|run| run.iter()).try_for_each(|gfn| self.copy(subject, gfn))
    }

    fn compare(&self, subject: &dyn Subject) -> Result<(), Failure> {
        let mut page = [0; PAGE_SIZE as usize];
        let mut wrong = None;
        for (range, bytes) in &self.parts {
            let (pages, _) = bytes.as_chunks::<{ PAGE_SIZE as usize }>();
            for (gfn, copied) in range.iter().zip(pages) {
                subject.read(gfn, &mut page)?;
                if page != *copied {
                    wrong.get_or_insert((gfn, 0)).1 += 1;
                }
            }
        }
        match wrong {
            Some((gfn, pages)) => Err(Failure::Differs { gfn, pages }),
            None => Ok(()),
        }
    }
}

/// One bit for each of `pages` pages, for a [`Ledger`].
pub fn page_set(pages: u64, set: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut words = vec![0; words_for(pages as usize)];
    for page in set.filter(|page| *page < pages) {
        words[page as usize / PAGES_PER_WORD] |= 1 << (page as usize % PAGES_PER_WORD);
    }
    words
}
