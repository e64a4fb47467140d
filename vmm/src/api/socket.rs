//! The socket's place in the file system.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, io::ErrorKind};

use crate::beside::directory;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody serves it.
    #[error("{} is in use by another monitor: give another path", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{} exists and is no socket: give another path, or remove it", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot make a socket at {}: {source}", path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A socket that only its owner may use, and that is gone when this is.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    _place: Place,
}

#[derive(Debug)]
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // Somebody may have removed it before.
        let _ = fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Makes the socket at `path`. One that a monitor left behind is replaced.
    pub(super) fn bind(path: &Path) -> Result<Socket, SocketError> {
        let system = |source| SocketError::System { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) => return Err(system(error)),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(system(error)),
        }
        // Nobody else can reach it before its mode is right, and it takes the place of an old one in one step.
        let private = tempfile::Builder::new().prefix(".vmm").tempdir_in(directory(path)).map_err(system)?;
        let made = private.path().join("s");
        let listener = UnixListener::bind(&made).map_err(system)?;
        fs::set_permissions(&made, fs::Permissions::from_mode(0o600)).map_err(system)?;
        fs::rename(&made, path).map_err(system)?;
        Ok(Socket { listener, _place: Place(path.to_owned()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_its_owners_alone_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse(_))));
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(matches!(Socket::bind(&path.join("x")), Err(SocketError::System { .. })));
    }
}
