//! The other end of the control socket: what the command line's live verbs are made of.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::answer::Problem;

/// Why a monitor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("cannot reach a monitor at {}: {source}; start one with `vmm run --api-socket {}`", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It broke off, or speaks something else.
    #[error("the monitor broke off: {0}")]
    Http(#[from] hyper::Error),
    /// It refused.
    #[error("the monitor says: {0}")]
    Refused(String),
    /// An answer that cannot be understood.
    #[error("the monitor's answer cannot be understood: {0}")]
    Answer(#[from] serde_json::Error),
    /// What it sent cannot be written.
    #[error("cannot write: {0}")]
    Write(#[source] io::Error),
    /// A system resource.
    #[error("cannot start a client: {0}")]
    System(#[source] io::Error),
}

/// Each Ctrl-C from now on, also those that come while nobody waits for one.
///
/// # Errors
/// When the system refuses.
pub fn interruptions() -> Result<Signal, ClientError> {
    signal(SignalKind::interrupt()).map_err(ClientError::System)
}

/// A client of one monitor. Every call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the monitor that serves `path`.
    pub fn new(path: &Path) -> Client {
        Client { path: path.to_owned() }
    }

    /// Sends a request, and returns the response's head and body to come.
    async fn send(
        &self,
        method: Method,
        target: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the response; what goes wrong is told there.
        tokio::spawn(connection);
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder().method(method).uri(target).header("host", "localhost");
        let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(bytes)));
        let request = request.map_err(|error| ClientError::System(io::Error::other(error)))?;
        let response = sender.send_request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let said = serde_json::from_slice::<Problem>(&body)
            .map_or_else(|_| status.to_string(), |problem| problem.error);
        Err(ClientError::Refused(said))
    }

    /// Calls, and reads the answer; an empty one is `null`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = self.send(method, target, body).await?.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(if body.is_empty() { b"null" } else { &body })?)
    }

    /// Asks for `target`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, target: &str) -> Result<T, ClientError> {
        self.call(Method::GET, target, None::<&()>).await
    }

    /// Calls, and writes what comes to `out` as it comes. Returns the number of bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn stream(
        &self,
        target: &str,
        body: &impl Serialize,
        out: &mut impl Write,
    ) -> Result<u64, ClientError> {
        let mut body = self.send(Method::POST, target, Some(body)).await?.into_body();
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                out.write_all(&data).map_err(ClientError::Write)?;
                bytes += data.len() as u64;
            }
        }
        out.flush().map_err(ClientError::Write)?;
        Ok(bytes)
    }
}

/// Runs what a verb does with its client.
///
/// # Errors
/// What `verb` returns, and [`ClientError::System`].
pub fn block_on<T>(verb: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ClientError::System)?.block_on(verb)
}
