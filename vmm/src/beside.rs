//! Files that are there when they are whole: written beside their place, then renamed. Whoever is stopped half-way leaves
//! what was there before as it was.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// The directory that `path` is in.
pub(crate) fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file that is being written, and only its owner may read. Dropped before it is [complete](Beside::complete), it is gone.
#[derive(Debug)]
pub(crate) struct Beside {
    file: NamedTempFile,
    path: PathBuf,
}

impl Beside {
    /// Begins a file that is to be at `path`.
    pub(crate) fn new(path: &Path) -> io::Result<Beside> {
        let file = tempfile::Builder::new().prefix(".vmm").tempfile_in(directory(path))?;
        Ok(Beside { file, path: path.to_owned() })
    }

    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Puts it at its place, on the disk too.
    pub(crate) fn complete(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(&self.path)?;
        Ok(())
    }
}

/// Puts `bytes` at `path`.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = Beside::new(path)?;
    beside.file().write_all(bytes)?;
    beside.complete()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_not_complete_changes_nothing() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        write(&path, b"before").unwrap();
        let mut half = Beside::new(&path).unwrap();
        half.file().write_all(b"half").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"before");
        drop(half);
        assert_eq!(fs::read(&path).unwrap(), b"before");
        write(&path, b"after").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
        assert_eq!(directory(Path::new("file")), Path::new("."));
    }
}
