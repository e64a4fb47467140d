//! `vmm log info`: what is in a log. It reads all of it, so it also says whether it is whole.

use std::path::Path;

use dirty_track::log::{End, Epoch, Event, Header};
use serde::Serialize;

use super::{LogfileError, open, print, read_error, snapshots};
use crate::options::human_size;
use crate::panel::grouped;

#[derive(Serialize)]
struct Info<'a> {
    header: &'a Header,
    end: End,
    seconds: f64,
    bytes: u64,
    states: Vec<State>,
}

#[derive(Serialize)]
struct State {
    name: String,
    bytes: usize,
}

/// Parts of machine state that are named.
const NAMED: usize = 256;

/// Says what is in the log at `path`.
///
/// # Errors
/// See [`LogfileError`].
pub fn info(path: &Path, json: bool) -> Result<(), LogfileError> {
    if path.is_dir() {
        return snapshots::info(path, json);
    }
    let mut log = open(path)?;
    let mut last = Epoch::default();
    let (mut states, mut end) = (Vec::new(), End::default());
    while let Some(event) = log.read().map_err(|error| read_error(path, error))? {
        match event {
            Event::Epoch(epoch) => last = epoch,
            Event::State { name, bytes } if states.len() < NAMED => {
                states.push(State { name: name.to_owned(), bytes: bytes.len() });
            }
            Event::End(all) => end = all,
            _ => {}
        }
    }
    let info =
        Info { header: log.header(), end, seconds: last.at_ns as f64 / 1e9, bytes: log.bytes_read(), states };
    print(|out| {
        if json {
            serde_json::to_writer(&mut *out, &info).map_err(std::io::Error::from)?;
            return Ok(writeln!(out)?);
        }
        let Header { id, parent, slots, tracker, guarantees, contents, creator, .. } = info.header;
        let pages: u64 = slots.iter().map(|slot| slot.pages).sum();
        writeln!(
            out,
            "  log         {id}, written by {}, whole",
            if creator.is_empty() { "nobody says" } else { creator }
        )?;
        if let Some(parent) = parent {
            writeln!(out, "  parent      {parent}")?;
        }
        let size = human_size(pages.saturating_mul(4096));
        writeln!(out, "  memory      {size} in {} memslots", slots.len())?;
        writeln!(out, "  tracker     {tracker}, pages of {}", human_size(guarantees.granularity.bytes()))?;
        let End { epochs, total, .. } = info.end;
        writeln!(
            out,
            "  epochs      {epochs} in {:.1} s, {} dirty pages",
            info.seconds,
            grouped(total.dirty)
        )?;
        if *contents {
            writeln!(
                out,
                "  contents    {} pages, and {} more that are all zeros",
                grouped(total.pages),
                grouped(total.zero)
            )?;
        } else {
            writeln!(out, "  contents    none: ranges only")?;
        }
        for State { name, bytes } in &info.states {
            writeln!(out, "  state       {name}, {}", human_size(*bytes as u64))?;
        }
        writeln!(out, "  size        {}", human_size(info.bytes))?;
        Ok(())
    })
}
