//! `vmm log ranges` and `vmm log export`: the dirty ranges of a log, for people and for programs.

use std::io::{self, Write};
use std::path::Path;

use dirty_track::log::{Epoch, Event, Span, flags};
use serde::Serialize;

use super::{LogfileError, open, print, read_error};
use crate::options::human_size;

/// A form for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Export {
    /// A JSON object a line.
    Json,
    /// Comma-separated values with a line of names.
    Csv,
}

/// A range, as it is exported.
#[derive(Serialize)]
struct Row {
    epoch: u64,
    at_s: f64,
    seconds: f64,
    gpa: u64,
    bytes: u64,
    coarse: bool,
    host: bool,
    /// None: whoever wrote it; else it is in another row, too.
    vcpu: Option<u32>,
}

/// Lists the ranges of the log at `path`, or of one epoch of it.
///
/// # Errors
/// See [`LogfileError`].
pub fn ranges(path: &Path, epoch: Option<u64>) -> Result<(), LogfileError> {
    each(path, |out, row, began| {
        if epoch.is_some_and(|only| only != row.epoch) || row.vcpu.is_some() {
            return Ok(());
        }
        if began {
            writeln!(out, "epoch {}, {:.3} s, {:.3} s long", row.epoch, row.at_s, row.seconds)?;
        }
        let coarse = if row.coarse { "  coarse" } else { "" };
        let host = if row.host { "  by a device" } else { "" };
        writeln!(out, "  {:#014x}  {:>10}{coarse}{host}", row.gpa, human_size(row.bytes))
    })
}

/// Prints all ranges of the log at `path`, and which vCPU wrote which.
///
/// # Errors
/// See [`LogfileError`].
pub fn export(path: &Path, form: Export) -> Result<(), LogfileError> {
    let mut named = false;
    each(path, |out, row, _| {
        if form == Export::Json {
            serde_json::to_writer(&mut *out, &row)?;
            return writeln!(out);
        }
        if !named {
            named = true;
            writeln!(out, "epoch,at_s,seconds,gpa,bytes,coarse,host,vcpu")?;
        }
        let Row { epoch, at_s, seconds, gpa, bytes, coarse, host, vcpu } = row;
        let vcpu = vcpu.map(|vcpu| vcpu.to_string()).unwrap_or_default();
        writeln!(out, "{epoch},{at_s},{seconds},{gpa},{bytes},{},{},{vcpu}", u8::from(coarse), u8::from(host))
    })
}

/// Gives each row to `each`, and whether it is the first of its epoch.
fn each(
    path: &Path,
    mut each: impl FnMut(&mut dyn Write, Row, bool) -> io::Result<()>,
) -> Result<(), LogfileError> {
    let mut log = open(path)?;
    print(|out| {
        let (mut epoch, mut began) = (Epoch::default(), true);
        while let Some(event) = log.read().map_err(|error| read_error(path, error))? {
            let (vcpu, spans): (_, &[Span]) = match event {
                Event::Epoch(next) => {
                    (epoch, began) = (next, true);
                    continue;
                }
                Event::Ranges(spans) => (None, spans),
                Event::Vcpu(vcpu, spans) => (Some(vcpu), spans),
                _ => continue,
            };
            for span in spans {
                let row = Row {
                    epoch: epoch.number,
                    at_s: epoch.at_ns as f64 / 1e9,
                    seconds: epoch.took_ns as f64 / 1e9,
                    gpa: span.range.start.gpa().0,
                    bytes: span.range.bytes(),
                    coarse: span.flags & flags::COARSE != 0,
                    host: span.flags & flags::HOST != 0,
                    vcpu,
                };
                each(out, row, began)?;
                began = false;
            }
        }
        Ok(())
    })
}
