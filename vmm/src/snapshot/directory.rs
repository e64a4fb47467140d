//! The directory that a snapshot is: there when it is whole.
//!
//! It is made beside its place, put on the disk, and then takes its place in one step: where nothing was, or in exchange
//! for the snapshot that was there. So whoever is stopped at any moment leaves what was there before, whole. What he
//! leaves besides is removed by the next one who writes to the same place.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::SnapshotError;
use super::chain::header;
use crate::beside::directory;
use crate::sys::rename;

/// The state, and which pages the snapshot has: a dirty log without contents.
pub(super) const STATE: &str = "state";
/// Contents and sums of the pages: see [`dirty_track::image`].
pub(super) const MEMORY: &str = "memory";
/// See [`MEMORY`].
pub(super) const SUMS: &str = "sums";

pub(super) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::Io { what, path: path.to_owned(), source }
}

/// A snapshot that is being written. Dropped before it is [complete](Partial::complete), it is gone.
#[derive(Debug)]
pub(super) struct Partial {
    place: PathBuf,
    path: PathBuf,
    /// Locked, so that nobody else takes it for a left-over.
    lock: File,
    replaces: bool,
    done: bool,
}

impl Partial {
    /// Begins a snapshot that is to be at `place`.
    pub(super) fn begin(place: &Path) -> Result<Partial, SnapshotError> {
        let name = place.file_name().ok_or_else(|| SnapshotError::Occupied(place.to_owned()))?;
        let replaces = match fs::symlink_metadata(place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(io_error("look at", place)(error)),
            // Whatever is there and is no snapshot is somebody else's.
            Ok(found) if found.is_dir() && header(place).is_ok() => true,
            Ok(_) => return Err(SnapshotError::Occupied(place.to_owned())),
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".partial");
        let path = directory(place).join(hidden);
        if let Ok(left) = File::open(&path) {
            lock(&left, place)?;
            fs::remove_dir_all(&path).map_err(io_error("remove the left-over", &path))?;
        }
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&path).map_err(|error| match error.kind() {
            // Somebody was faster.
            io::ErrorKind::AlreadyExists => SnapshotError::Busy(place.to_owned()),
            _ => io_error("create the directory", &path)(error),
        })?;
        let lock_file = File::open(&path).map_err(io_error("open", &path))?;
        lock(&lock_file, place)?;
        Ok(Partial { place: place.to_owned(), path, lock: lock_file, replaces, done: false })
    }

    /// Path of the file `name` in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Puts it at its place, on the disk too. Its files are on the disk already.
    pub(super) fn complete(mut self) -> Result<(), SnapshotError> {
        self.lock.sync_all().map_err(io_error("write", &self.path))?;
        if self.replaces {
            rename::exchange(&self.path, &self.place)
                .map_err(io_error("put the new snapshot in place of", &self.place))?;
        } else {
            rename::no_replace(&self.path, &self.place)
                .map_err(io_error("put the snapshot at", &self.place))?;
            self.done = true;
        }
        let parent = directory(&self.place);
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(io_error("write", parent))
        // What was replaced has its name now, and goes with it.
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done {
            // If it stays, the next one removes it.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn lock(file: &File, place: &Path) -> Result<(), SnapshotError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => SnapshotError::Busy(place.to_owned()),
        TryLockError::Error(error) => io_error("lock", place)(error),
    })
}

/// `to` as seen from the directory `from`, where both are absolute; else `to` as it is.
pub(super) fn relative(from: &Path, to: &Path) -> PathBuf {
    if !from.is_absolute() || !to.is_absolute() {
        return to.to_owned();
    }
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let mut path: PathBuf = from.components().skip(shared).map(|_| "..").collect();
    path.extend(to.components().skip(shared));
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_seen_from_its_child() {
        let seen = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(seen("/a/b/new", "/a/b/old"), Path::new("../old"));
        assert_eq!(seen("/a/b/new", "/c/old"), Path::new("../../../c/old"));
        assert_eq!(seen("new", "/c/old"), Path::new("/c/old"));
    }

    #[test]
    fn what_is_somebody_elses_stays_and_what_is_half_done_goes() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("snapshot");
        for other in ["file", "full", "empty"] {
            let path = home.path().join(other);
            match other {
                "file" => fs::write(&path, "x").unwrap(),
                _ => fs::create_dir(&path).unwrap(),
            }
            if other == "full" {
                fs::write(path.join("x"), "x").unwrap();
            }
            assert!(matches!(Partial::begin(&path), Err(SnapshotError::Occupied(_))), "{other}");
        }
        let half = Partial::begin(&place).unwrap();
        assert!(matches!(Partial::begin(&place), Err(SnapshotError::Busy(_))));
        fs::write(half.file(STATE), "x").unwrap();
        drop(half);
        assert!(!place.exists());
        // One that was killed.
        fs::create_dir(home.path().join(".snapshot.partial")).unwrap();
        fs::write(home.path().join(".snapshot.partial/memory"), "x").unwrap();
        let whole = Partial::begin(&place).unwrap();
        fs::write(whole.file(STATE), "x").unwrap();
        whole.complete().unwrap();
        assert_eq!(fs::read(place.join(STATE)).unwrap(), b"x");
        assert_eq!(fs::read_dir(&place).unwrap().count(), 1);
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 4);
    }
}
