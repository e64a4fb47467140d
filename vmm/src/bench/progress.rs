//! How far a run is, for whoever waits: a bar with the time left on a terminal, nothing elsewhere. And its end before its time:
//! Ctrl-C, after which what was measured is kept.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::results::Case;
use crate::sys::signals::Signals;

/// The bar.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Of a run that should take so long.
    pub(super) fn new(expected: Duration) -> Progress {
        let visible = io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(expected.as_millis() as u64), target);
        let style = ProgressStyle::with_template("{elapsed:>4} {wide_bar} {percent:>3} %, {eta} left  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Progress { bar }
    }

    /// Of a run that nobody watches.
    #[cfg(test)]
    pub(super) fn silent() -> Progress {
        Progress { bar: ProgressBar::hidden() }
    }

    /// What is measured now.
    pub(super) fn at(&self, case: &Case) {
        self.bar.set_message(case.0.first().map_or("", |(_, value)| value).to_owned());
        self.bar.tick();
    }

    /// What should take so long is done.
    pub(super) fn done(&self, expected: Duration) {
        self.bar.inc(expected.as_millis() as u64);
    }

    /// Says something without disturbing the bar.
    pub(super) fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Whether the run is to end.
#[derive(Debug)]
pub(super) struct Interrupt {
    signals: Option<Signals>,
    seen: AtomicBool,
}

impl Interrupt {
    /// By Ctrl-C, or whatever else asks a process to end. Call it before any other thread exists.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn by_signals() -> io::Result<Interrupt> {
        let signals = Signals::take(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        Ok(Interrupt { signals: Some(signals), seen: AtomicBool::new(false) })
    }

    /// By nobody, unless it is [asked](Interrupt::ask) for.
    #[cfg(test)]
    pub(super) fn never() -> Interrupt {
        Interrupt { signals: None, seen: AtomicBool::new(false) }
    }

    /// Asks for it.
    #[cfg(test)]
    pub(super) fn ask(&self) {
        self.seen.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked for.
    pub(super) fn seen(&self) -> bool {
        if self.signals.as_ref().is_some_and(|signals| signals.next().is_some()) {
            self.seen.store(true, Ordering::Relaxed);
        }
        self.seen.load(Ordering::Relaxed)
    }
}
