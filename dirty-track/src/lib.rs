//! Which pages of a guest's memory were touched.
//!
//! A [`tracker::Tracker`] watches the memslots of one KVM virtual machine. It is *armed* at some moment,
//! *harvested* as often as its user likes, and *disarmed* at the end; the time between two harvests is an
//! *epoch*, and a harvest is the set of pages that were written in it. The library knows KVM and vm-memory,
//! and nothing of the monitor that uses it.
//!
//! - [`addr`]: guest-physical addresses, frame numbers and ranges of them as types of their own.
//! - [`bitmap`]: the dirty bitmap and the arithmetic on its words.
//! - `cow` (with `log`): the contents of memory as they were at one moment, saved while the guest runs on.
//! - [`fault`]: serving the guest's faults, and the policies of what comes along and what is opened.
//! - `image` (with `log`): the contents of pages in files, each page checked by itself.
//! - `log` (a feature, on by default): the log as a stream, for dumps, snapshots and migrations.
//! - [`rate`]: how fast the guest dirties memory, and what follows for a migration.
//! - [`rearm`]: what is write-protected again when an epoch ends.
//! - [`refine`]: takes pages out of a harvest that may have been written and did not change.
//! - [`region`]: the bitmap that vm-memory marks when the *host* writes to guest memory.
//! - [`stage2`]: how guest memory is mapped, block by block, as the monitor remembers it.
//! - [`touched`]: which pages were touched in an interval, read or written.
//! - [`tracker`]: the trait, what a harvest is, and one module for each way of knowing.
//! - [`collapse`]: huge mappings for memory whose tracking has split them.
//! - [`walk`]: the page walk, over what maps guest memory: this process, the guest itself, or a simulated table.
//! - `conformance` (a feature): the suite that holds any tracker to its guarantees, on any machine.
//! - [`sys`]: the ioctls that no crate wraps. All `unsafe` code of the library is in there.

pub mod addr;
pub mod bitmap;
pub mod collapse;
#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "log")]
pub mod cow;
pub mod fault;
#[cfg(feature = "log")]
pub mod image;
#[cfg(feature = "log")]
pub mod log;
mod mix;
pub mod rate;
pub mod rearm;
pub mod refine;
pub mod region;
pub mod stage2;
pub mod sys;
pub mod touched;
pub mod tracker;
pub mod walk;

/// The README's example is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
