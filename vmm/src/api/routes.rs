//! What can be asked for, and how it is answered.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::body::Body as HttpBody;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use dirty_track::log::{Compression, flags};
use dirty_track::rearm::Rearm;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::answer::{Body, Failure};
use super::stream::{BodySink, FileSink};
use super::{Cut, OPENAPI, Subject, metrics};
use crate::board::DumpStatus;
use crate::dump::{CREATOR, DumpConfig, DumpError};
use crate::live::{Epoch, Totals};
use crate::migrate::lane::Cancel;
use crate::migrate::report::Phase;
use crate::migrate::{Address, MAX_CONNECTIONS, MigrateConfig};
use crate::observe::{Command, Refusal, Reply, Sink};
use crate::options::{self, LONGEST_EPOCH};
use crate::sampled::{Look, Looks};
use crate::snapshot::{Request, SnapshotReport};
use crate::track::TrackConfig;
use crate::vcpu::End;

type Answer<T> = Result<T, Failure>;

/// Largest body of a request.
const BODY: usize = 64 << 10;

/// How long who waits for an epoch is kept waiting.
const LONG_POLL: Duration = Duration::from_secs(30);

/// How long the end of a dump waits for who reads it.
const FOR_A_READER: Duration = Duration::from_secs(5);

pub(super) fn routes(subject: Arc<Subject>) -> Router {
    Router::new()
        .route("/vm", get(vm))
        .route("/vm/pause", put(pause))
        .route("/vm/resume", put(resume))
        .route("/vm/shutdown", put(shutdown))
        .route("/vm/console", put(console))
        .route("/vm/snapshot", put(snapshot))
        .route("/vm/migrate", get(migration).put(migrate).delete(cancel_migration))
        .route("/dirty", get(dirty))
        .route("/dirty/ranges", get(ranges))
        .route("/dirty/tracker", put(track).delete(untrack))
        .route("/dirty/dump", get(dump_status).post(dump).delete(end_dump))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .fallback(nothing)
        .method_not_allowed_fallback(not_like_that)
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(subject)
}

async fn nothing() -> Failure {
    Failure(
        StatusCode::NOT_FOUND,
        "there is nothing at this path: GET /openapi.json tells what there is".into(),
    )
}

async fn not_like_that() -> Failure {
    Failure(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path has no such method: GET /openapi.json tells which it has".into(),
    )
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

/// The machine.
#[derive(Debug, Serialize)]
struct Vm {
    /// `running`, `paused` or `ended`.
    state: &'static str,
    cpus: usize,
    memory_bytes: u64,
    huge: String,
    shared: bool,
    uptime_s: f64,
    creator: &'static str,
}

async fn vm(State(subject): State<Arc<Subject>>) -> Json<Vm> {
    let memory = subject.machine.ram().config();
    let paused = *subject.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let state = match subject.machine.end() {
        Some(End::Stopped) | None if paused => "paused",
        None => "running",
        Some(_) => "ended",
    };
    Json(Vm {
        state,
        cpus: subject.machine.cpus(),
        memory_bytes: memory.size,
        huge: memory.huge.to_string(),
        shared: memory.shared,
        uptime_s: subject.began.elapsed().as_secs_f64(),
        creator: CREATOR,
    })
}

/// Stops or starts the vCPUs, on a thread that may wait for them.
async fn set_paused(subject: Arc<Subject>, pause: bool) -> Answer<StatusCode> {
    let set = move || {
        let mut paused = subject.paused.lock().unwrap_or_else(PoisonError::into_inner);
        match (*paused, pause) {
            (false, true) => subject.machine.hold(),
            (true, false) => subject.machine.release(),
            _ => {}
        }
        *paused = pause;
    };
    tokio::task::spawn_blocking(set).await.map_err(|_| Failure::gone())?;
    Ok(StatusCode::NO_CONTENT)
}

async fn pause(State(subject): State<Arc<Subject>>) -> Answer<StatusCode> {
    not_while_migrating(&subject)?;
    set_paused(subject, true).await
}

async fn resume(State(subject): State<Arc<Subject>>) -> Answer<StatusCode> {
    let phase = subject.board.borrow().migration.as_ref().map(|report| report.phase);
    if phase == Some(Phase::InDoubt) {
        command(&subject, Command::Reclaim).await?;
    }
    set_paused(subject, false).await
}

async fn shutdown(State(subject): State<Arc<Subject>>) -> StatusCode {
    // An eventfd that cannot count on is readable already.
    let _ = subject.quit.write(1);
    StatusCode::NO_CONTENT
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum Typed {
    /// Text, as it is.
    Text(String),
    /// The name of a key.
    Key(String),
}

async fn console(State(subject): State<Arc<Subject>>, Body(typed): Body<Typed>) -> Answer<StatusCode> {
    let bytes = match typed {
        Typed::Text(text) => text.into_bytes(),
        Typed::Key(name) => key(&name).ok_or_else(|| {
            Failure::bad(format!(
                "there is no key {name:?}: use enter, tab, escape, backspace, or ctrl-a to ctrl-z"
            ))
        })?,
    };
    subject.machine.platform().serial().input(&bytes);
    Ok(StatusCode::NO_CONTENT)
}

/// What a key sends over a serial line.
fn key(name: &str) -> Option<Vec<u8>> {
    let byte = match name {
        "enter" => b'\r',
        "tab" => b'\t',
        "escape" => 0x1b,
        "backspace" => 0x7f,
        name => match name.strip_prefix("ctrl-")?.as_bytes() {
            [letter @ b'a'..=b'z'] => letter & 0x1f,
            _ => return None,
        },
    };
    Some(vec![byte])
}

async fn snapshot(
    State(subject): State<Arc<Subject>>,
    Body(request): Body<Request>,
) -> Answer<Json<SnapshotReport>> {
    not_while_dumping(&subject)?;
    command(&subject, |reply| Command::Snapshot(request, reply)).await.map(Json)
}

/// Dirty memory now.
#[derive(Debug, Serialize)]
struct Dirty<'a> {
    tracker: &'a str,
    armed: bool,
    epoch_s: f64,
    last: Option<&'a Epoch>,
    totals: Option<&'a Totals>,
    look: Option<&'a Look>,
    looks: Option<&'a Looks>,
    dump: Option<&'a DumpStatus>,
}

#[derive(Debug, Deserialize)]
struct After {
    /// Waits until there is an epoch after this one.
    after: Option<u32>,
}

async fn dirty(
    State(subject): State<Arc<Subject>>,
    query: Result<Query<After>, axum::extract::rejection::QueryRejection>,
) -> Answer<Response> {
    let Query(After { after }) = query.map_err(|error| Failure::bad(error.body_text()))?;
    let mut board = subject.board.clone();
    if let Some(after) = after {
        let newer = board.wait_for(|posted| {
            let epoch = posted.last.as_ref().map(|epoch| epoch.epoch);
            // Not a later one: with another sample they begin anew.
            epoch.or(posted.look.map(|look| look.epoch)).is_some_and(|epoch| epoch != after)
        });
        // Who has waited too long, or waits for an observer that has ended, is told what there is.
        let _ = tokio::time::timeout(LONG_POLL, newer).await.map(|posted| posted.map(drop));
    }
    let posted = Arc::clone(&board.borrow());
    let dirty = Dirty {
        tracker: posted.tracker,
        armed: posted.armed,
        epoch_s: posted.epoch_s,
        last: posted.last.as_deref(),
        totals: posted.totals.as_deref(),
        look: posted.look.as_ref(),
        looks: posted.looks.as_ref(),
        dump: posted.dump.as_ref(),
    };
    Ok(Json(dirty).into_response())
}

async fn ranges(State(subject): State<Arc<Subject>>) -> Json<Value> {
    let posted = Arc::clone(&subject.board.borrow());
    let ranges: Vec<Value> = posted
        .ranges
        .iter()
        .map(|span| {
            json!({
                "gpa": span.range.start.gpa().0,
                "bytes": span.range.bytes(),
                "coarse": span.flags & flags::COARSE != 0,
                "host": span.flags & flags::HOST != 0,
            })
        })
        .collect();
    Json(json!({ "epoch": posted.last.as_ref().map(|epoch| epoch.epoch), "ranges": ranges }))
}

/// Sends a command to the observer, and waits for its answer.
async fn command<T>(subject: &Subject, make: impl FnOnce(Reply<T>) -> Command) -> Answer<T> {
    let (reply, answer) = oneshot::channel::<Result<T, Refusal>>();
    subject.commands.send(make(reply)).map_err(|_| Failure::gone())?;
    Ok(answer.await.map_err(|_| Failure::gone())??)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrackRequest {
    #[serde(default = "auto")]
    track: String,
    rearm: Option<String>,
    epoch: Option<String>,
}

fn auto() -> String {
    "auto".into()
}

/// A migration that is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateRequest {
    pub(crate) to: String,
    #[serde(default = "downtime_ms")]
    pub(crate) downtime_ms: u64,
    #[serde(default = "one")]
    pub(crate) connections: usize,
    #[serde(default)]
    pub(crate) compress: Compression,
    #[serde(default)]
    pub(crate) auto_converge: bool,
    #[serde(default)]
    pub(crate) postcopy: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_per_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_dir: Option<PathBuf>,
}

fn downtime_ms() -> u64 {
    20
}

fn one() -> usize {
    1
}

impl MigrateRequest {
    fn config(&self) -> Result<MigrateConfig, String> {
        let to: Address = self.to.parse()?;
        let most = if matches!(to, Address::Exec(_)) { 1 } else { MAX_CONNECTIONS };
        if !(1..=most).contains(&self.connections) {
            return Err(format!("{} connections to {to}: there can be 1 to {most}", self.connections));
        }
        if self.downtime_ms == 0 || self.bytes_per_s == Some(0) {
            return Err("a guest cannot move in no time, or over no link".into());
        }
        if self.tls_dir.is_some() && !matches!(to, Address::Tcp(_)) {
            return Err(format!("TLS is for TCP, and not for {to}"));
        }
        Ok(MigrateConfig {
            to,
            downtime: Duration::from_millis(self.downtime_ms),
            connections: self.connections,
            compress: self.compress,
            auto_converge: self.auto_converge,
            postcopy: self.postcopy,
            bandwidth: self.bytes_per_s,
            tls_dir: self.tls_dir.clone(),
        })
    }
}

async fn migrate(
    State(subject): State<Arc<Subject>>,
    Body(request): Body<MigrateRequest>,
) -> Answer<StatusCode> {
    let config = request.config().map_err(Failure::bad)?;
    let _asking = subject.asking.lock().await;
    not_while_dumping(&subject)?;
    if *subject.paused.lock().unwrap_or_else(PoisonError::into_inner) {
        return Err(Failure(StatusCode::CONFLICT, "the machine is paused: resume it first".into()));
    }
    let cancel = Cancel::default();
    subject.migration.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&cancel);
    command(&subject, |reply| Command::Migrate(Box::new(config), cancel, reply)).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn migration(State(subject): State<Arc<Subject>>) -> Answer<Response> {
    let posted = Arc::clone(&subject.board.borrow());
    let none = || Failure(StatusCode::NOT_FOUND, "there has been no migration".into());
    let report = posted.migration.as_ref().ok_or_else(none)?;
    if report.phase.is_over() {
        subject.told.store(true, Ordering::Release);
    }
    Ok(Json(&**report).into_response())
}

async fn cancel_migration(State(subject): State<Arc<Subject>>) -> Answer<StatusCode> {
    let phase = subject.board.borrow().migration.as_ref().map(|report| report.phase);
    if phase.is_none_or(Phase::is_over) {
        return Err(Failure(StatusCode::CONFLICT, "no migration is under way".into()));
    }
    match subject.migration.lock().unwrap_or_else(PoisonError::into_inner).cancel() {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Failure(StatusCode::CONFLICT, "it is too late: the guest has been given away".into())),
    }
}

fn not_while_migrating(subject: &Subject) -> Answer<()> {
    let running = subject.board.borrow().migration.as_ref().is_some_and(|report| !report.phase.is_over());
    if running { Err(Refusal::Migrating.into()) } else { Ok(()) }
}

/// Commands that a dump or a migration is in the way of are not even sent: the observer may be waiting for who reads it.
fn not_while_dumping(subject: &Subject) -> Answer<()> {
    not_while_migrating(subject)?;
    let running = subject.board.borrow().dump.as_ref().is_some_and(|dump| dump.running);
    if running { Err(Refusal::Dumping.into()) } else { Ok(()) }
}

async fn track(State(subject): State<Arc<Subject>>, Body(request): Body<TrackRequest>) -> Answer<StatusCode> {
    let mut track: TrackConfig = request.track.parse().map_err(Failure::bad)?;
    if let Some(rearm) = request.rearm {
        track.rearm = rearm.parse::<Rearm>().map_err(Failure::bad)?;
        track.check_rearm().map_err(Failure::bad)?;
    }
    if let Some(why) = track.refused(subject.machine.ram().config().fault) {
        return Err(Failure::bad(why));
    }
    let epoch = request.epoch.map(|text| options::epoch(&text)).transpose().map_err(Failure::bad)?;
    not_while_dumping(&subject)?;
    command(&subject, |reply| Command::Track(track, epoch, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn untrack(State(subject): State<Arc<Subject>>) -> Answer<StatusCode> {
    not_while_dumping(&subject)?;
    let none = TrackConfig::from(dirty_track::tracker::Kind::None);
    command(&subject, |reply| Command::Track(none, None, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A dump that is asked for.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DumpRequest {
    /// Into this file of the monitor's; else in the response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<PathBuf>,
    pub(super) pages: bool,
    pub(super) full: bool,
    pub(super) compress: Compression,
    pub(super) epochs: u64,
    pub(super) interval_ms: u64,
}

impl DumpRequest {
    fn config(&self) -> DumpConfig {
        let &DumpRequest { pages, full, compress, epochs, interval_ms, .. } = self;
        DumpConfig { pages, full, compress, epochs, interval_ms }
    }
}

async fn dump(State(subject): State<Arc<Subject>>, Body(request): Body<DumpRequest>) -> Answer<Response> {
    let config = request.config();
    if config.full && !config.pages {
        return Err(Failure::bad(DumpError::FullWithoutPages));
    }
    if config.interval_ms > LONGEST_EPOCH.as_millis() as u64 {
        return Err(Failure::bad("an epoch has 24 hours at most: 86400000 ms"));
    }
    not_while_dumping(&subject)?;
    if let Some(path) = request.path {
        let sink = FileSink::create(&path)
            .map_err(|error| Failure::bad(format!("cannot write to {}: {error}", path.display())))?;
        let sink: Box<dyn Sink> = Box::new(sink);
        command(&subject, |reply| Command::Dump(sink, config, reply)).await?;
        return Ok(StatusCode::ACCEPTED.into_response());
    }
    let cut = Cut::default();
    subject.cut.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&cut);
    let (sink, pieces) = BodySink::new(cut);
    let sink: Box<dyn Sink> = Box::new(sink);
    command(&subject, |reply| Command::Dump(sink, config, reply)).await?;
    let pieces = ReceiverStream::new(pieces).map(Ok::<_, std::convert::Infallible>);
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, HttpBody::from_stream(pieces)).into_response())
}

async fn dump_status(State(subject): State<Arc<Subject>>) -> Answer<Json<DumpStatus>> {
    let posted = Arc::clone(&subject.board.borrow());
    let none = || Failure(StatusCode::NOT_FOUND, "there has been no dump".into());
    posted.dump.clone().map(Json).ok_or_else(none)
}

async fn end_dump(State(subject): State<Arc<Subject>>) -> Answer<Json<DumpStatus>> {
    let end = command(&subject, Command::EndDump);
    tokio::pin!(end);
    if let Ok(ended) = tokio::time::timeout(FOR_A_READER, &mut end).await {
        return ended.map(Json);
    }
    // Whoever reads the log does not read: it ends without.
    subject.cut.lock().unwrap_or_else(PoisonError::into_inner).cut();
    match end.await {
        // It has ended by being cut.
        Err(Failure(StatusCode::CONFLICT, _)) => dump_status(State(Arc::clone(&subject))).await,
        ended => ended.map(Json),
    }
}

async fn metrics(State(subject): State<Arc<Subject>>) -> Response {
    let posted = Arc::clone(&subject.board.borrow());
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (kind, metrics::text(&subject, &posted)).into_response()
}

/// Understands the body of a request, of whichever kind, as far as that goes without a machine.
#[cfg(any(test, fuzzing))]
pub(crate) fn understand(body: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<MigrateRequest>(body) {
        // One that cannot be is refused.
        let _ = request.config();
    }
    if let Ok(request) = serde_json::from_slice::<TrackRequest>(body) {
        let _ = request.track.parse::<TrackConfig>();
        let _ = request.rearm.map(|rearm| rearm.parse::<Rearm>());
        let _ = request.epoch.map(|epoch| options::epoch(&epoch));
    }
    if let Ok(request) = serde_json::from_slice::<DumpRequest>(body) {
        request.config();
    }
    if let Ok(Typed::Key(name)) = serde_json::from_slice::<Typed>(body) {
        key(&name);
    }
}
