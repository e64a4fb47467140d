//! Where goes what there is to say about a run: see [`To`]. The guest's console goes where that leaves room for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use serde::Serialize;

use crate::live::{Epoch, Totals};
use crate::memory::{HostPages, MemoryConfig};
use crate::migrate::report::MigrationReport;
use crate::options::human_size;
use crate::panel::{self, Picture, Subject};
use crate::sampled::{Look, Looks};
use crate::terminal::{Console, Terminal};
use crate::timing::{Phase, Timing};
use crate::vcpu::Crash;
use crate::working_set::WorkingSetReport;

/// Who reads it.
#[derive(Debug)]
pub(crate) enum To {
    /// Who sits at a terminal: a panel below the console, the summary at the end.
    Terminal(Arc<Terminal>),
    /// A program: JSON lines on standard output, the console on standard error.
    Json,
    /// Who reads a log: a line per epoch and the summary on standard error, the console on standard output.
    Lines,
    /// Nobody: nothing but the console, on standard output.
    Nobody,
}

impl To {
    /// Where the guest's console goes.
    pub(crate) fn console(&self) -> Box<dyn Write + Send> {
        match self {
            To::Terminal(terminal) => Box::new(Console(Arc::clone(terminal))),
            To::Json => Box::new(io::stderr()),
            To::Lines | To::Nobody => Box::new(Unbuffered),
        }
    }

    /// The terminal with a panel, if there is one.
    pub(crate) fn terminal(&self) -> Option<Arc<Terminal>> {
        match self {
            To::Terminal(terminal) => Some(Arc::clone(terminal)),
            _ => None,
        }
    }
}

/// Shows one run.
pub(crate) struct Show {
    subject: Subject,
    to: To,
    rates: VecDeque<f64>,
    /// Of the interval that ended last.
    working_set: Option<WorkingSetReport>,
    picture: Picture,
}

/// Rates that the panel has room for.
const RATES: usize = 16;

/// What a run begins with.
#[derive(Serialize)]
pub(crate) struct Start {
    pub(crate) memory: MemoryConfig,
    pub(crate) cpus: u8,
    pub(crate) track: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) track_chosen_because: Option<&'static str>,
    pub(crate) epoch_s: f64,
    pub(crate) builtin_guest: bool,
}

/// What it ends with.
#[derive(Serialize)]
pub(crate) struct Summary<'a> {
    pub(crate) end: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) guest_status: Option<u32>,
    /// With a tracker.
    #[serde(flatten)]
    pub(crate) totals: Option<&'a Totals>,
    /// With a sample.
    #[serde(flatten)]
    pub(crate) looks: Option<&'a Looks>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fault_cost_ns: Option<f64>,
    pub(crate) host: Option<HostPages>,
}

#[derive(Serialize)]
struct Event<'a, T: Serialize> {
    event: &'a str,
    #[serde(flatten)]
    body: T,
}

fn print_json(event: &str, body: impl Serialize) {
    if let Ok(line) = serde_json::to_string(&Event { event, body }) {
        // A reader that has gone does not want the rest.
        let _ = writeln!(io::stdout(), "{line}");
    }
}

impl Show {
    pub(crate) fn new(subject: Subject, to: To) -> Show {
        Show {
            subject,
            to,
            rates: VecDeque::with_capacity(RATES),
            working_set: None,
            picture: Picture::default(),
        }
    }

    /// Name of the tracker.
    pub(crate) fn tracker(&self) -> &'static str {
        self.subject.tracker
    }

    /// Another tracker tracks from now on.
    pub(crate) fn track(&mut self, tracker: &'static str, chosen_because: Option<&'static str>) {
        (self.subject.tracker, self.subject.chosen_because) = (tracker, chosen_because);
        if let To::Json = self.to {
            print_json("track", serde_json::json!({ "track": tracker }));
        }
    }

    /// The machine runs.
    pub(crate) fn start(&self, start: &Start) {
        if let To::Json = self.to {
            print_json("start", start);
        }
    }

    /// Something that a user should know.
    pub(crate) fn note(&self, text: &str) {
        match self.to {
            To::Json => print_json("note", serde_json::json!({ "text": text })),
            To::Terminal(_) | To::Lines => eprintln!("vmm: note: {text}"),
            To::Nobody => {}
        }
    }

    /// A migration is over.
    pub(crate) fn migrated(&self, report: &MigrationReport) {
        if let To::Json = self.to {
            print_json("migration", report);
        } else {
            self.note(&report.to_string());
        }
    }

    /// Why there are no epochs yet.
    pub(crate) fn waiting(&self) {
        const WHY: &str = "the guest touches its memory before its workload begins";
        match &self.to {
            To::Terminal(terminal) => terminal.draw(vec![format!("── {WHY}")]),
            To::Lines => eprintln!("{WHY}"),
            To::Json | To::Nobody => {}
        }
    }

    /// An epoch was closed.
    pub(crate) fn epoch(&mut self, epoch: &Epoch) {
        self.picture.add(&epoch.map);
        self.working_set = epoch.working_set.or(self.working_set);
        self.rate(epoch.dirty_bytes_per_s);
        let (subject, rates) = (&self.subject, self.rates.make_contiguous());
        match &self.to {
            To::Terminal(terminal) => {
                let set = self.working_set.as_ref();
                terminal.draw(panel::panel(subject, epoch, rates, set, terminal.width()));
            }
            To::Json => print_json("epoch", epoch),
            To::Lines => eprintln!("{}", panel::line(subject, epoch)),
            To::Nobody => {}
        }
    }

    /// The sample was looked at.
    pub(crate) fn look(&mut self, look: &Look) {
        self.rate(look.rate.bytes_per_s);
        let (subject, rates) = (&self.subject, self.rates.make_contiguous());
        match &self.to {
            To::Terminal(terminal) => {
                terminal.draw(panel::sampled_panel(subject, look, rates, terminal.width()));
            }
            To::Json => print_json("look", look),
            To::Lines => eprintln!("{}", panel::sampled_line(look)),
            To::Nobody => {}
        }
    }

    fn rate(&mut self, bytes_per_s: f64) {
        if self.rates.len() == RATES {
            self.rates.pop_front();
        }
        self.rates.push_back(bytes_per_s);
    }

    /// Gives the terminal back. What follows is printed below.
    pub(crate) fn leave_terminal(&mut self) {
        if let To::Terminal(terminal) = &self.to {
            terminal.close();
            self.to = To::Lines;
        }
    }

    /// KVM could not go on.
    pub(crate) fn crash(&self, crash: &Crash) {
        if let To::Json = self.to {
            print_json("crash", crash);
        }
        eprintln!("vmm: the guest stopped: {crash}");
    }

    /// The run is over. `memory` is what was asked for.
    pub(crate) fn summary(&self, summary: &Summary<'_>, memory: MemoryConfig) {
        match self.to {
            To::Json => print_json("summary", summary),
            To::Terminal(_) | To::Lines => {
                let host = summary.host.map(|host| describe(host, memory));
                let (subject, host) = (&self.subject, host.as_deref());
                match (summary.totals, summary.looks) {
                    (Some(totals), _) => {
                        eprint!("\n{}", panel::summary(subject, totals, &self.picture, host));
                    }
                    (None, Some(looks)) => eprint!("\n{}", panel::sampled_summary(subject, looks, host)),
                    (None, None) => {}
                }
            }
            To::Nobody => {}
        }
    }

    /// The phases of the start, which were asked for.
    pub(crate) fn timing(&self, timing: &Timing) {
        let phases = timing.report();
        if let To::Json = self.to {
            let phases: serde_json::Map<_, _> =
                phases.iter().filter_map(|(phase, us)| Some((name(*phase)?, (*us).into()))).collect();
            print_json("timing", serde_json::json!({ "microseconds_since_main": phases }));
            return;
        }
        eprintln!("\n  phases of the start, ms since main");
        for (phase, us) in phases {
            eprintln!("  {:>9.3}  {}", us / 1000.0, name(phase).unwrap_or_default());
        }
    }
}

fn describe(host: HostPages, memory: MemoryConfig) -> String {
    let mut text = format!("{} resident", human_size(host.resident));
    if host.hugetlb > 0 {
        text.push_str(&format!(", {} of it in hugetlb pages", human_size(host.hugetlb)));
    }
    text.push_str(&format!(", {} of it in transparent huge pages", human_size(host.thp)));
    text.push_str(&format!(" (asked for: huge={})", memory.huge));
    text
}

fn name(phase: Phase) -> Option<String> {
    serde_json::to_value(phase).ok()?.as_str().map(str::to_owned)
}

/// Standard output without a buffer, because a console shows every byte as it comes.
struct Unbuffered;

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
