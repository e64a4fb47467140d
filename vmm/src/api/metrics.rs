//! The figures in Prometheus' text format, version 0.0.4.

use std::fmt::Write;
use std::sync::PoisonError;

use super::Subject;
use crate::board::Posted;

/// Everything that is known now.
pub(super) fn text(subject: &Subject, posted: &Posted) -> String {
    let mut out = String::with_capacity(2048);
    let mut say = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            // Writing to a string does not fail.
            let _ = writeln!(out, "# HELP vmm_{name} {help}\n# TYPE vmm_{name} {kind}\nvmm_{name} {value}");
        }
    };
    let paused = *subject.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = &subject.machine;
    say("memory_bytes", "gauge", "Guest RAM.", Some(machine.ram().config().size as f64));
    say("cpus", "gauge", "vCPUs.", Some(machine.cpus() as f64));
    say("paused", "gauge", "Whether a client has paused the guest.", Some(f64::from(u8::from(paused))));
    say(
        "uptime_seconds",
        "counter",
        "Time since the machine was started.",
        Some(subject.began.elapsed().as_secs_f64()),
    );
    say("tracking", "gauge", "Whether dirty memory is tracked.", Some(f64::from(u8::from(posted.armed))));
    let totals = posted.totals.as_deref();
    let total = |value: fn(&crate::live::Totals) -> f64| totals.map(value);
    say("epochs_total", "counter", "Epochs closed.", total(|totals| totals.epochs.into()));
    say(
        "dirty_pages_total",
        "counter",
        "Pages of 4 KiB reported dirty.",
        total(|totals| totals.dirty_pages as f64),
    );
    say(
        "coarse_pages_total",
        "counter",
        "Of these, pages that were left writable.",
        total(|totals| totals.coarse_pages as f64),
    );
    say(
        "page_faults_total",
        "counter",
        "Page faults that KVM took for the guest.",
        total(|totals| totals.faults as f64),
    );
    say(
        "distinct_dirty_pages",
        "gauge",
        "Different pages that were dirty at least once.",
        total(|totals| totals.distinct_pages as f64),
    );
    let last = posted.last.as_deref();
    let epoch = |value: fn(&crate::live::Epoch) -> f64| last.map(value);
    say(
        "dirty_bytes_per_second",
        "gauge",
        "Dirty rate of the last epoch.",
        epoch(|epoch| epoch.dirty_bytes_per_s),
    );
    say(
        "harvest_seconds",
        "gauge",
        "Time that the last harvest took.",
        epoch(|epoch| epoch.harvest_us / 1e6),
    );
    say(
        "stall_seconds",
        "gauge",
        "Time that the vCPUs stood still for it.",
        epoch(|epoch| epoch.stall_us / 1e6),
    );
    say(
        "slowdown_ratio",
        "gauge",
        "Share of the vCPUs' time that write faults took.",
        last.and_then(|epoch| epoch.slowdown_percent).map(|percent| percent / 100.0),
    );
    say(
        "ledger_missed_pages_total",
        "counter",
        "Written pages that were not reported, by the built-in guest's ledger.",
        totals.filter(|totals| totals.checked > 0).map(|totals| totals.missed as f64),
    );
    say(
        "sampled_dirty_bytes_per_second",
        "gauge",
        "Dirty rate by the last look at the sample.",
        posted.look.map(|look| look.rate.bytes_per_s),
    );
    out
}
