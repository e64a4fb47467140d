//! The control socket: HTTP with JSON over a Unix socket, as `openapi.json` in this folder describes it.
//!
//! The server has one thread of its own. It answers from what the observer [posted](crate::board), hands commands to the
//! observer, and pauses and resumes the machine itself; so neither waits for a client. A client that is slow has only its
//! own connection slowed down: reading a request's head has a time limit, its body a size limit, and there is a limit on
//! connections.

mod answer;
pub mod client;
mod metrics;
mod routes;
mod server;
mod socket;
mod stream;

pub use server::{ApiError, Server};

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

pub(crate) use stream::Cut;

use crate::board::Reader;
use crate::machine::Machine;
use crate::migrate::lane::Cancel;
use crate::observe::Command;

/// What the server serves.
pub(crate) struct Subject {
    pub(crate) machine: Arc<Machine>,
    pub(crate) board: Reader,
    pub(crate) commands: mpsc::Sender<Command>,
    /// Written to when the monitor is to end.
    pub(crate) quit: EventFd,
    pub(crate) began: Instant,
    /// Whether a client has stopped the vCPUs.
    pub(crate) paused: Mutex<bool>,
    /// Of the newest dump that is a response.
    pub(crate) cut: Mutex<Cut>,
    /// Held by who asks for a migration, until it is under way or refused: the other one is told then.
    pub(crate) asking: tokio::sync::Mutex<()>,
    /// Ends the newest migration.
    pub(crate) migration: Arc<Mutex<Cancel>>,
    /// Whether a client has been told how a migration ended.
    pub(crate) told: Arc<AtomicBool>,
}

/// The description of what is served: OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("openapi.json");

/// Understands the body of a request, or not.
#[cfg(any(test, fuzzing))]
pub(crate) use routes::understand;
