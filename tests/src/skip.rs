//! Skipping a test, visibly.
//!
//! The test harness hides what a passing test prints, and knows no skipping at run time. So a skip is written
//! past its capture, straight to stderr, with a running count.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// Says that `test` is skipped for `reason`, and counts it.
pub fn skip(test: &str, reason: &str) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    // Best effort: a closed stderr is no reason to fail.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {reason} ({count} skipped in this process)");
}

/// Whether this is an automatic run that was set up for the tests: what is missing there is a failure.
pub fn in_ci() -> bool {
    std::env::var("CI").as_deref() == Ok("true")
}
