//! The thread that serves.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, oneshot};

use super::Subject;
use super::routes;
use super::socket::{Socket, SocketError};

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A system resource.
    #[error("cannot serve the control socket: {0}")]
    System(#[from] io::Error),
}

/// Connections at a time; further ones wait.
const CONNECTIONS: usize = 64;

/// How long the head of a request may take.
const FOR_A_HEAD: Duration = Duration::from_secs(5);

/// The server. Dropping it ends it, and removes the socket.
#[derive(Debug)]
pub struct Server {
    /// Hung up when it is to end.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `subject` at `path`.
    pub(crate) fn start(path: &Path, subject: Subject) -> Result<Server, ApiError> {
        let socket = Socket::bind(path)?;
        socket.listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let body = move || {
            let served = runtime.block_on(async {
                tokio::select! {
                    served = serve(&socket, Arc::new(subject)) => served,
                    _ = stopped => Ok(()),
                }
            });
            if let Err(error) = served {
                eprintln!("vmm: the control socket is not served any more: {error}");
            }
            // Requests under way end here, whatever they wait for.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("api".into()).spawn(body)?;
        Ok(Server { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked but by a bug, which it has reported.
            let _ = thread.join();
        }
    }
}

async fn serve(socket: &Socket, subject: Arc<Subject>) -> io::Result<()> {
    let listener = UnixListener::from_std(socket.listener.try_clone()?)?;
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let routes = routes::routes(subject);
    loop {
        // It is never closed.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: those of others come back.
                eprintln!("vmm: the control socket cannot take a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(FOR_A_HEAD)
                .max_buf_size(64 << 10)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off, or speaks something else, has been answered as far as that goes.
            let _ = connection.await;
            drop(permit);
        });
    }
}
