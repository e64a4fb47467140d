//! TLS for what goes over a network: both sides show a certificate, and check the other's against the same authority.
//!
//! A directory has what a side needs, under the names that the peers use: `ca-cert.pem`, and `server-cert.pem` and
//! `server-key.pem` for a destination, `client-cert.pem` and `client-key.pem` for a source. The destination's certificate
//! has to be for the host that the source connects to. TLS 1.3 and nothing older.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot use {} for TLS: {}", path.display(), told(.source))]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// Certificates that do not do.
    #[error("the certificates in {} will not do: {source}", directory.display())]
    Certificates {
        /// Where they are.
        directory: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// An authority that does not do.
    #[error("the authority in {} will not do: {source}", directory.display())]
    Authority {
        /// Where it is.
        directory: PathBuf,
        /// What is wrong.
        source: VerifierBuilderError,
    },
    /// Something that no certificate is for.
    #[error("{host:?} is no name of a host that a certificate could be for: {source}")]
    Host {
        /// What was to be the host.
        host: String,
        /// What is wrong.
        source: InvalidDnsNameError,
    },
}

fn told(error: &pem::Error) -> String {
    match error {
        pem::Error::Io(source) => source.to_string(),
        pem::Error::NoItemsFound => "there is no certificate or key in it".into(),
        error => error.to_string(),
    }
}

/// A connection with TLS over it.
pub(super) trait Secured: Read + Write + Send + Debug {}
impl<T: Read + Write + Send + Debug> Secured for T {}

/// How a source secures its connections.
#[derive(Clone, Debug)]
pub(super) struct SourceTls {
    config: Arc<ClientConfig>,
    host: ServerName<'static>,
}

/// How a destination does.
#[derive(Clone, Debug)]
pub(super) struct DestinationTls(Arc<ServerConfig>);

impl SourceTls {
    /// By what is in `directory`, to the host of `address`, which is HOST:PORT.
    pub(super) fn new(directory: &Path, address: &str) -> Result<SourceTls, TlsError> {
        let wrong = |source| TlsError::Certificates { directory: directory.to_owned(), source };
        let (chain, key) = identity(directory, "client")?;
        let config = ClientConfig::builder_with_provider(default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(wrong)?
            .with_root_certificates(authority(directory)?)
            .with_client_auth_cert(chain, key)
            .map_err(wrong)?;
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|source| TlsError::Host { host, source })?;
        Ok(SourceTls { config: config.into(), host: name })
    }

    /// Secures `stream`. What the destination thinks of this side's certificate shows when something is read.
    pub(super) fn secure(&self, mut stream: TcpStream) -> io::Result<Box<dyn Secured>> {
        let client = ClientConnection::new(Arc::clone(&self.config), self.host.clone());
        let mut client = client.map_err(io::Error::other)?;
        while client.is_handshaking() {
            client.complete_io(&mut stream)?;
        }
        Ok(Box::new(StreamOwned::new(client, stream)))
    }
}

impl DestinationTls {
    /// By what is in `directory`.
    pub(super) fn new(directory: &Path) -> Result<DestinationTls, TlsError> {
        let (chain, key) = identity(directory, "server")?;
        let provider = Arc::new(default_provider());
        let sources =
            WebPkiClientVerifier::builder_with_provider(authority(directory)?.into(), Arc::clone(&provider))
                .build()
                .map_err(|source| TlsError::Authority { directory: directory.to_owned(), source })?;
        let wrong = |source| TlsError::Certificates { directory: directory.to_owned(), source };
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(wrong)?
            .with_client_cert_verifier(sources)
            .with_single_cert(chain, key)
            .map_err(wrong)?;
        Ok(DestinationTls(config.into()))
    }

    /// Secures `stream`, whose other side has shown its certificate then.
    pub(super) fn secure(&self, mut stream: TcpStream) -> io::Result<Box<dyn Secured>> {
        let mut server = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        while server.is_handshaking() {
            server.complete_io(&mut stream)?;
        }
        Ok(Box::new(StreamOwned::new(server, stream)))
    }
}

fn authority(directory: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(directory.join("ca-cert.pem"))? {
        store
            .add(certificate)
            .map_err(|source| TlsError::Certificates { directory: directory.to_owned(), source })?;
    }
    Ok(store)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(directory: &Path, side: &str) -> Result<Identity, TlsError> {
    let chain = certificates(directory.join(format!("{side}-cert.pem")))?;
    let path = directory.join(format!("{side}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| TlsError::File { path, source })?;
    Ok((chain, key))
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(chain) if chain.is_empty() => Err(TlsError::File { path, source: pem::Error::NoItemsFound }),
        Ok(chain) => Ok(chain),
        Err(source) => Err(TlsError::File { path, source }),
    }
}
