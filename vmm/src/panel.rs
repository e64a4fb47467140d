//! Dirty memory as people read it: the panel below the console, the line per epoch, the summary.
//!
//! Everything here turns figures into text and does nothing else.

use std::fmt::Write;

use dirty_track::addr::PAGE_SIZE;

use crate::fault::Served;
use crate::forecast::{Forecast, PrecopyReport, RateReport};
use crate::live::{COLUMNS, Epoch, Totals, blocks};
use crate::memory::Faults;
use crate::options::human_size;
use crate::owners::Space;
use crate::sampled::{Look, Looks};
use crate::working_set::WorkingSetReport;

/// Lines of the panel, for memory whose faults are handled like that, and with or without its owners.
pub fn height(fault: Faults, owners: bool) -> u16 {
    HEIGHT + u16::from(fault == Faults::Uffd) + u16::from(owners)
}

const HEIGHT: u16 = 5;

/// Eighths, for bars and densities.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What stays the same during a run.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Bytes of RAM.
    pub ram: u64,
    /// Backing asked for, such as `thp`.
    pub huge: String,
    /// vCPUs.
    pub cpus: usize,
    /// Name of the tracker.
    pub tracker: &'static str,
    /// Why it was chosen, if the user left that open.
    pub chosen_because: Option<&'static str>,
    /// Bytes per second of the link that a migration is foretold for.
    pub bandwidth: u64,
    /// Whether colours are welcome.
    pub colour: bool,
}

impl Subject {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// One character for a share of 0 to 255; anything dirty shows.
fn bar(share: u8) -> char {
    BARS[usize::from(share).div_ceil(32).min(8)]
}

/// Guest memory from left to right.
fn strip(map: &[u8]) -> String {
    map.iter().map(|share| bar(*share)).collect()
}

/// Rates of the last epochs, scaled to the highest of them.
fn sparkline(rates: &[f64]) -> String {
    let top = rates.iter().copied().fold(0.0, f64::max);
    rates.iter().map(|rate| if top > 0.0 { bar((rate / top * 255.0) as u8) } else { ' ' }).collect()
}

/// `12345` as `12,345`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", human_size(bytes_per_s as u64))
}

/// A rate with its error.
fn sure(report: &RateReport) -> String {
    let error = report.percent().map(|percent| format!(" ± {percent:.0} %")).unwrap_or_default();
    rate(report.bytes_per_s) + &error
}

fn time(seconds: f64) -> String {
    if seconds < 0.0995 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.1} s") }
}

/// A migration in a few words.
fn precopy(report: &PrecopyReport) -> String {
    if report.converges {
        let (total, still) = (time(report.total_s), time(report.downtime_s));
        let rounds = if report.rounds == 1 { "round" } else { "rounds" };
        format!("{} {rounds}, {total}, stands still {still}", report.rounds)
    } else {
        format!("does not converge: would stand still {}", time(report.downtime_s))
    }
}

/// How fast the guest dirties memory, as far as the last epoch and all of them tell.
pub fn rates(epoch: &Epoch, totals: &Totals) -> String {
    let last = rate(epoch.dirty_bytes_per_s);
    let (mean, peak) = (rate(totals.mean_bytes_per_s), rate(totals.peak_bytes_per_s));
    format!(
        "last epoch {last}, of {} epochs {mean} mean, {peak} peak\nlately {}",
        totals.epochs,
        outlook(&epoch.forecast).trim_start()
    )
}

/// What follows from the epochs so far.
fn outlook(forecast: &Forecast) -> String {
    let mut text = String::new();
    if let Some(report) = &forecast.rate {
        let _ = write!(text, " mean {}", sure(report));
    }
    if let Some(report) = &forecast.untracked {
        let _ = write!(text, "  untracked {}", sure(report));
    }
    if let Some(report) = &forecast.precopy {
        let _ = write!(text, "  precopy {}", precopy(report));
    }
    text
}

fn huge(subject: &Subject, epoch: &Epoch) -> Option<String> {
    let huge = epoch.pages_2m? + epoch.pages_1g.unwrap_or(0) * 512;
    Some(format!("{}/{}", grouped(huge), grouped(blocks(subject.ram))))
}

/// Pages of each vCPU, where they are told apart.
fn by_vcpu(epoch: &Epoch) -> Option<String> {
    const SHOWN: usize = 8;
    let shown: Vec<_> = epoch.vcpu_pages.iter().take(SHOWN).map(|pages| grouped(*pages)).collect();
    let rest = if epoch.vcpu_pages.len() > SHOWN { " …" } else { "" };
    (!shown.is_empty()).then(|| format!("{}{rest}", shown.join(" ")))
}

/// How the ledger compares, in a few words; the second part says whether it is bad.
fn verdict(epoch: &Epoch) -> Option<(String, bool)> {
    let found = epoch.ledger.as_ref()?;
    Some(if found.missed > 0 {
        (format!("{} MISSED", grouped(found.missed)), true)
    } else if found.stray > 0 || found.extra > found.extra_read + found.extra_coarse {
        (format!("{} extra", grouped(found.stray + found.extra)), true)
    } else if found.extra_coarse > 0 {
        let (coarse, read) = (grouped(found.extra_coarse), grouped(found.extra_read));
        (format!("complete + {coarse} coarse, {read} read"), false)
    } else if found.extra_read > 0 {
        (format!("exact + {} read", grouped(found.extra_read)), false)
    } else {
        ("exact".to_owned(), false)
    })
}

/// The panel after `epoch`, `rates` being those of the last epochs, oldest first.
pub fn panel(
    subject: &Subject,
    epoch: &Epoch,
    rates: &[f64],
    working_set: Option<&WorkingSetReport>,
    width: usize,
) -> Vec<String> {
    let title = format!(
        "── {} {} · {} vCPU · {} · epoch {} · {:.1} s ",
        human_size(subject.ram),
        subject.huge,
        subject.cpus,
        subject.tracker,
        epoch.epoch,
        epoch.at_s
    );
    let rule = "─".repeat(width.saturating_sub(title.chars().count()));
    let mut first = format!(
        " dirty {:>9} pages {:>12} {}",
        grouped(epoch.dirty_pages),
        rate(epoch.dirty_bytes_per_s),
        sparkline(&rates[rates.len().saturating_sub(16)..])
    );
    if let Some((text, bad)) = verdict(epoch) {
        let _ = write!(first, "  ledger {}", subject.paint(if bad { "1;31" } else { "32" }, &text));
    }
    let mut second = String::new();
    if let Some(huge) = huge(subject, epoch) {
        let _ = write!(second, " huge {huge} blocks");
    }
    if let Some(faults) = epoch.faults {
        let _ = write!(second, "  faults {}", grouped(faults));
    }
    if let Some(percent) = epoch.slowdown_percent {
        let _ = write!(second, "  guest slowed by {percent:.1} %");
    }
    if epoch.coarse_pages > 0 {
        let _ = write!(second, "  coarse {}", grouped(epoch.coarse_pages));
    }
    if let Some(pages) = by_vcpu(epoch) {
        let _ = write!(second, "  per vCPU {pages}");
    }
    if epoch.stall_us > 0.0 {
        let _ = write!(second, "  stood still {:.2} ms", epoch.stall_us / 1000.0);
    }
    if let Some(report) = working_set {
        let _ = write!(second, "  {}", in_use(report));
    }
    let map = if width >= COLUMNS + 12 {
        format!(" 0 {} {}", subject.paint("33", &strip(&epoch.map)), human_size(subject.ram))
    } else {
        String::new()
    };
    let mut lines = vec![subject.paint("2", &format!("{title}{rule}")), first, second];
    lines.extend(epoch.served.as_ref().map(|served| format!(" {}", serving(served))));
    lines.extend(epoch.owners.as_ref().map(|spaces| format!(" {}", owners(spaces))));
    lines.extend([outlook(&epoch.forecast), map]);
    lines
}

/// How much of memory is in use.
fn in_use(report: &WorkingSetReport) -> String {
    let about = if report.interval.is_some() { "about " } else { "" };
    format!("in use {about}{} ({:.1} %) in {:.1} s", human_size(report.bytes), report.percent, report.seconds)
}

/// The address spaces with most dirty pages.
fn owners(spaces: &[Space]) -> String {
    const SHOWN: usize = 2;
    let space = |space: &Space| {
        let mut text = format!("cr3 {:#x}", space.cr3);
        if !space.vcpus.is_empty() {
            let vcpus: Vec<_> = space.vcpus.iter().map(u8::to_string).collect();
            let _ = write!(text, " (vCPU {})", vcpus.join(" "));
        }
        let _ = write!(text, " {} dirty pages of its own", grouped(space.user_pages));
        if let Some(run) = space.runs.first().filter(|run| run.user) {
            let _ = write!(text, ", {} at {:#x}", human_size(run.pages * PAGE_SIZE), run.gva);
        }
        text
    };
    let shown: Vec<_> = spaces.iter().take(SHOWN).map(space).collect();
    let rest = if spaces.len() > SHOWN { " …" } else { "" };
    match shown.is_empty() {
        true => "owners unknown: no address space maps what is dirty".into(),
        false => format!("owners {}{rest}", shown.join(" · ")),
    }
}

/// What was served, in a line.
fn serving(served: &Served) -> String {
    let mut text = format!(
        "served {} missing, {} first writes, {} pages",
        grouped(served.missing + served.minor),
        grouped(served.write_protected),
        grouped(served.installed)
    );
    if served.old > 0 {
        let _ = write!(text, " ({} of them old)", grouped(served.old));
    }
    if served.old_hits > 0 {
        let _ = write!(text, ", {} old ones written", grouped(served.old_hits));
    }
    if served.blocks_opened > 0 {
        let _ = write!(text, ", {} blocks opened", grouped(served.blocks_opened));
    }
    if served.waiting > 0 {
        let _ = write!(text, ", {} wait", grouped(served.waiting));
    }
    if let Some(failure) = &served.failure {
        let _ = write!(text, ", FAILED {} times: {failure}", grouped(served.failures));
    }
    text
}

/// The panel after a look at a sample.
pub fn sampled_panel(subject: &Subject, look: &Look, rates: &[f64], width: usize) -> Vec<String> {
    let title = format!(
        "── {} {} · {} vCPU · {} pages sampled · epoch {} · {:.1} s ",
        human_size(subject.ram),
        subject.huge,
        subject.cpus,
        grouped(look.sampled),
        look.epoch,
        look.at_s
    );
    let rule = "─".repeat(width.saturating_sub(title.chars().count()));
    let line = format!(
        " changed {:>4.1} %  {:>12}{}  {}",
        look.changed as f64 / look.sampled as f64 * 100.0,
        rate(look.rate.bytes_per_s),
        between(&look.rate),
        sparkline(&rates[rates.len().saturating_sub(16)..])
    );
    let mut lines = vec![subject.paint("2", &format!("{title}{rule}")), line];
    lines.resize(usize::from(HEIGHT), String::new());
    lines
}

/// One line for a look at a sample, where there is no terminal.
pub fn sampled_line(look: &Look) -> String {
    format!(
        "epoch {:<4} {:>7.1} s  changed {:>5} of {} pages  {:>12}{}",
        look.epoch,
        look.at_s,
        grouped(look.changed),
        grouped(look.sampled),
        rate(look.rate.bytes_per_s),
        between(&look.rate)
    )
}

fn between(report: &RateReport) -> String {
    match (report.low, report.high) {
        (Some(low), Some(high)) => format!(" ({} to {})", rate(low), rate(high)),
        _ => String::new(),
    }
}

/// The summary of a run with a sample.
pub fn sampled_summary(subject: &Subject, looks: &Looks, host: Option<&str>) -> String {
    let mut out = String::new();
    let mut say = |label: &str, text: String| {
        let _ = writeln!(out, "  {label:<11} {text}");
    };
    if looks.epochs == 0 {
        say("dirty", "the run ended before its first epoch did".into());
        return out;
    }
    let (mean, peak) = (rate(looks.mean_bytes_per_s), rate(looks.peak_bytes_per_s));
    say("rate", format!("{mean} mean, {peak} peak in {} epochs", looks.epochs));
    say(
        "sample",
        format!(
            "{} pages of {}: what changed; a page that was written and holds the same is not seen",
            grouped(looks.sampled),
            human_size(subject.ram)
        ),
    );
    if let Some(host) = host {
        say("host pages", host.to_owned());
    }
    out
}

/// One line for an epoch, where there is no terminal.
pub fn line(subject: &Subject, epoch: &Epoch) -> String {
    let mut text = format!(
        "epoch {:<4} {:>7.1} s  dirty {:>9} pages  {:>12}",
        epoch.epoch,
        epoch.at_s,
        grouped(epoch.dirty_pages),
        rate(epoch.dirty_bytes_per_s),
    );
    if let Some(huge) = huge(subject, epoch) {
        let _ = write!(text, "  huge {huge}");
    }
    if let Some(faults) = epoch.faults {
        let _ = write!(text, "  faults {}", grouped(faults));
    }
    if let Some(percent) = epoch.slowdown_percent {
        let _ = write!(text, "  slowed by {percent:.1} %");
    }
    if let Some(report) = &epoch.forecast.untracked {
        let _ = write!(text, "  untracked {}", rate(report.bytes_per_s));
    }
    if epoch.coarse_pages > 0 {
        let _ = write!(text, "  coarse {}", grouped(epoch.coarse_pages));
    }
    if let Some(pages) = by_vcpu(epoch) {
        let _ = write!(text, "  per vCPU {pages}");
    }
    if let Some(served) = &epoch.served {
        let _ = write!(text, "  {}", serving(served));
    }
    if let Some(report) = &epoch.working_set {
        let _ = write!(text, "  {}", in_use(report));
    }
    if let Some(spaces) = &epoch.owners {
        let _ = write!(text, "  {}", owners(spaces));
    }
    if let Some((verdict, _)) = verdict(epoch) {
        let _ = write!(text, "  ledger {verdict}");
    }
    text
}

/// Most rows of the summary's picture.
const PICTURE_ROWS: usize = 16;

/// Guest memory over time: a row per epoch, or per few of them, the densest share of each.
pub struct Picture {
    rows: Vec<[u8; COLUMNS]>,
    /// Epochs that a row stands for.
    scale: usize,
    /// Epochs in the last row.
    filled: usize,
}

impl Default for Picture {
    fn default() -> Self {
        Picture { rows: Vec::with_capacity(2 * PICTURE_ROWS), scale: 1, filled: 0 }
    }
}

impl Picture {
    /// Adds an epoch's map. Memory stays bounded: when there are too many rows, pairs of them become one.
    pub fn add(&mut self, map: &[u8]) {
        if self.filled == 0 || self.filled == self.scale {
            if self.rows.len() == 2 * PICTURE_ROWS {
                let rows = std::mem::take(&mut self.rows);
                self.rows =
                    rows.chunks(2).map(|pair| merge(pair[0], pair.get(1).unwrap_or(&pair[0]))).collect();
                self.scale *= 2;
            }
            self.rows.push([0; COLUMNS]);
            self.filled = 0;
        }
        self.filled += 1;
        if let Some(row) = self.rows.last_mut() {
            *row = merge(*row, map);
        }
    }

    /// The picture as lines, oldest first.
    fn lines(&self, subject: &Subject, epoch_s: f64) -> Vec<String> {
        let group = self.rows.len().div_ceil(PICTURE_ROWS).max(1);
        self.rows
            .chunks(group)
            .enumerate()
            .map(|(index, rows)| {
                let row = rows.iter().fold([0; COLUMNS], |sum, row| merge(sum, row));
                let at = (index * group * self.scale) as f64 * epoch_s;
                format!("  {at:>7.1} s  {}", subject.paint("33", &strip(&row)))
            })
            .collect()
    }
}

fn merge(mut row: [u8; COLUMNS], other: &[u8]) -> [u8; COLUMNS] {
    for (cell, share) in row.iter_mut().zip(other) {
        *cell = (*cell).max(*share);
    }
    row
}

/// The summary at the end of a run.
pub fn summary(subject: &Subject, totals: &Totals, picture: &Picture, host: Option<&str>) -> String {
    let mut out = String::new();
    let mut say = |label: &str, text: String| {
        let _ = writeln!(out, "  {label:<11} {text}");
    };
    if totals.epochs == 0 {
        say("dirty", "the run ended before its first epoch did".into());
        return out;
    }
    say(
        "dirty",
        format!(
            "{} pages in {} epochs, {} different ones ({} of {})",
            grouped(totals.dirty_pages),
            totals.epochs,
            grouped(totals.distinct_pages),
            human_size(totals.distinct_pages * 4096),
            human_size(subject.ram),
        ),
    );
    let mut rates = format!("{} mean, {} peak", rate(totals.mean_bytes_per_s), rate(totals.peak_bytes_per_s));
    if let Some(report) = &totals.forecast.untracked {
        let _ = write!(rates, "; untracked it would be {}", sure(report));
    }
    say("rate", rates);
    let mut cost = format!("{} page faults", grouped(totals.faults));
    if let Some(percent) = totals.slowdown_percent {
        let _ = write!(cost, ", the guest slowed by {percent:.1} %");
    }
    if totals.worst_stall_us > 0.0 {
        let _ = write!(cost, ", stood still at most {:.2} ms", totals.worst_stall_us / 1000.0);
    }
    say("cost", cost);
    if totals.checked > 0 {
        let verdict = if totals.contradicted() {
            subject.paint("1;31", "DISAGREES")
        } else {
            subject.paint("32", "agrees")
        };
        say(
            "ledger",
            format!(
                "{verdict} in {} epochs: {} written, {} missed, {} extra{}",
                totals.checked,
                grouped(totals.wrote),
                grouped(totals.missed),
                grouped(totals.extra + totals.stray),
                if totals.extra_read > 0 {
                    format!(" ({} of them read only)", grouped(totals.extra_read))
                } else {
                    String::new()
                },
            ),
        );
    }
    if let Some(served) = &totals.served {
        say("faults", serving(served));
    }
    if let Some(record) = &totals.record {
        let verdict = match (record.harmful, record.kvm_unexplained.unwrap_or(0)) {
            (0, 0) => subject.paint("32", "agrees with the kernel"),
            (0, pages) => {
                subject.paint("1;31", &format!("KVM maps {} pages that it does not have", grouped(pages)))
            }
            (pages, _) => {
                subject.paint("1;31", &format!("DISAGREES with the kernel about {} pages", grouped(pages)))
            }
        };
        let mut text = format!(
            "{verdict}: {} pages mapped, {} known to be touched, {} came along and were not written; {} of its own",
            grouped(record.present),
            grouped(record.touched),
            grouped(record.untouched),
            human_size(record.bytes as u64),
        );
        for difference in &record.differences {
            let _ = write!(text, "\n              {difference}");
        }
        say("record", text);
    }
    if let Some(report) = &totals.forecast.precopy {
        let sent = human_size(report.bytes as u64);
        let link = rate(subject.bandwidth as f64);
        say("migration", format!("precopy at {link}: {}, {sent} sent", precopy(report)));
    }
    let why = subject.chosen_because.map(|why| format!(" (chosen here: {why})"));
    say("tracker", format!("{}{}", subject.tracker, why.unwrap_or_default()));
    if let Some(host) = host {
        say("host pages", host.to_owned());
    }
    let _ = writeln!(out, "\n  guest memory over time, 0 to {} from left to right", human_size(subject.ram));
    for line in picture.lines(subject, totals.seconds / f64::from(totals.epochs)) {
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slightest_dirt_shows_and_none_does_not() {
        assert_eq!(bar(0), ' ');
        assert_eq!(bar(1), '▁');
        assert_eq!(bar(255), '█');
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn the_picture_stays_bounded_and_forgets_no_dirt() {
        let mut picture = Picture::default();
        let subject = Subject {
            ram: 1 << 30,
            huge: "thp".into(),
            cpus: 1,
            tracker: "none",
            chosen_because: None,
            bandwidth: 1 << 30,
            colour: false,
        };
        for epoch in 0..1000 {
            let mut map = [0; COLUMNS];
            map[epoch % COLUMNS] = 255;
            picture.add(&map);
        }
        let lines = picture.lines(&subject, 1.0);
        assert!(lines.len() <= PICTURE_ROWS && lines.len() > PICTURE_ROWS / 4, "{}", lines.len());
        let seen = picture.rows.iter().fold([0; COLUMNS], |sum, row| merge(sum, row));
        assert_eq!(seen, [255; COLUMNS]);
    }
}
