//! What the verbs say of a snapshot, and what it builds on.

use std::path::Path;

use dirty_track::addr::PAGE_BYTES;
use dirty_track::log::StreamId;
use serde::Serialize;

use super::{LogfileError, print};
use crate::options::human_size;
use crate::panel::grouped;
use crate::snapshot::{self, Chain, Layer, Saved};

#[derive(Serialize)]
struct Info<'a> {
    path: &'a Path,
    id: StreamId,
    creator: &'a str,
    memory: u64,
    cpus: u8,
    disks: usize,
    builtin: bool,
    /// The newest first.
    layers: Vec<LayerInfo<'a>>,
}

#[derive(Serialize)]
struct LayerInfo<'a> {
    path: &'a Path,
    id: StreamId,
    /// Pages that it has, and those that are not zeros.
    pages: u64,
    filled: u64,
}

fn layer(layer: &Layer) -> Result<LayerInfo<'_>, LogfileError> {
    let mut filled = 0;
    for range in &layer.ranges {
        let runs = layer.image.filled(*range).map_err(snapshot::SnapshotError::from)?;
        filled += runs.iter().map(|run| run.pages).sum::<u64>();
    }
    let pages = layer.ranges.iter().map(|range| range.pages).sum();
    Ok(LayerInfo { path: &layer.path, id: layer.header.id, pages, filled })
}

/// Says what is in the snapshot at `path`, and what it builds on.
///
/// # Errors
/// See [`LogfileError`].
pub(super) fn info(path: &Path, json: bool) -> Result<(), LogfileError> {
    let (chain, Saved { shape, .. }) = Chain::open(path)?;
    let newest = chain.newest();
    let info = Info {
        path,
        id: newest.header.id,
        creator: &newest.header.creator,
        memory: shape.memory,
        cpus: shape.cpus,
        disks: shape.disks.len(),
        builtin: shape.builtin,
        layers: chain.layers().iter().map(layer).collect::<Result<_, _>>()?,
    };
    print(|out| {
        if json {
            serde_json::to_writer(&mut *out, &info).map_err(std::io::Error::from)?;
            return Ok(writeln!(out)?);
        }
        let kind = if info.layers.len() == 1 { "full" } else { "diff" };
        writeln!(out, "  snapshot    {}, {kind}, written by {}", info.id, info.creator)?;
        let guest = if info.builtin { ", the built-in guest" } else { "" };
        writeln!(
            out,
            "  machine     {} of memory, {} vCPUs, {} disks{guest}",
            human_size(info.memory),
            info.cpus,
            info.disks
        )?;
        for LayerInfo { path, id, pages, filled } in &info.layers {
            writeln!(
                out,
                "  layer       {id} at {}: {} pages, {} of them with contents ({})",
                path.display(),
                grouped(*pages),
                grouped(*filled),
                human_size(filled * PAGE_BYTES as u64)
            )?;
        }
        writeln!(out, "  contents    not looked at: `vmm log verify` checks each page")?;
        Ok(())
    })
}

/// Checks all of the snapshot at `path`, and of what it builds on.
///
/// # Errors
/// See [`LogfileError`].
pub(super) fn verify(path: &Path) -> Result<(), LogfileError> {
    let (chain, _) = Chain::open(path)?;
    let mut buffer = vec![0; 64 * PAGE_BYTES];
    for layer in chain.layers() {
        let mut pages = 0;
        for range in &layer.ranges {
            layer.check(*range, &mut buffer)?;
            pages += range.pages;
        }
        println!("{}: whole, {} pages", layer.path.display(), grouped(pages));
    }
    Ok(())
}

/// Makes one full snapshot at `output` of the snapshot at `path` and all that it builds on.
///
/// # Errors
/// See [`LogfileError`].
pub fn merge(path: &Path, output: &Path) -> Result<(), LogfileError> {
    let (chain, saved) = Chain::open(path)?;
    let pages = snapshot::merge(&chain, &saved, output)?;
    eprintln!("{}: {} pages from {} snapshots", output.display(), grouped(pages), chain.layers().len());
    Ok(())
}
