//! Disk images: what `--disk` says, and the file or block device behind it.
//!
//! A disk is a raw image. It is locked while it is open (`flock`, released by the kernel however the process
//! ends): exclusively if the guest may write, shared if not, so that no two machines write one image and none
//! reads what another writes. A machine that comes from another process finds its disks locked by that one: it opens them
//! as they are, and has to [take](DiskLock::take) their locks before its guest runs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vmm_sys_util::write_zeroes::{PunchHole, WriteZeroesAt};

use super::Buffers;
use crate::options::{self, OptionError};
use crate::sys::guest_io;

/// Bytes of a sector, the unit of all virtio-blk addresses whatever the block size (virtio 1.2, 5.2.2).
pub const SECTOR: u64 = 512;

/// A disk as the command line describes it: `path=FILE[,readonly=on|off]`, off by default. A path with a
/// comma in it cannot be said this way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
}

impl FromStr for DiskConfig {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<DiskConfig, DiskError> {
        let mut path = None;
        let mut readonly = false;
        for (key, value) in options::key_values(text, &["path", "readonly"])? {
            match key {
                "path" if !value.is_empty() => path = Some(PathBuf::from(value)),
                "path" => {}
                _ => readonly = options::on_off(key, value)?,
            }
        }
        let path = path.ok_or_else(|| DiskError::NoPath(text.to_owned()))?;
        Ok(DiskConfig { path, readonly })
    }
}

/// What can be wrong with a disk before the guest sees it.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Not what `--disk` takes.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// An argument that names no image.
    #[error("the disk `{0}` has no path: write path=FILE[,readonly=on|off]")]
    NoPath(String),
    /// There is no such file.
    #[error("there is no disk image {path}; `truncate -s 1G {path}` makes an empty one", path = .0.display())]
    Missing(PathBuf),
    /// We may not open it as asked.
    #[error(
        "no permission to {access} the disk image {path}; change its mode or owner{or}",
        access = if *.readonly { "read" } else { "read and write" },
        path = .path.display(),
        or = if *.readonly { "" } else { ", or add readonly=on" }
    )]
    Permission {
        /// The image.
        path: PathBuf,
        /// Whether only reading was asked for.
        readonly: bool,
    },
    /// A directory, a pipe, a socket or a character device.
    #[error("{path} is {what}; a disk image is a regular file or a block device", path = .path.display())]
    Kind {
        /// What was to be the image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another open file description holds a lock that conflicts.
    #[error(
        "the disk image {path} is in use (locked) by another process or another --disk; \
         stop that one or use a copy: an image that is written has one user{all}",
        path = .path.display(),
        all = if *.readonly { "" } else { ", one that all open with readonly=on may have many" }
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// Whether only reading was asked for.
        readonly: bool,
    },
    /// No room for a single sector.
    #[error(
        "the disk image {path} has {size} bytes, less than one sector of 512; make it larger with truncate -s",
        path = .path.display()
    )]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Any other refusal of the operating system.
    #[error("cannot {action} the disk image {path}: {source}", path = .path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// An open, locked disk image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    sectors: u64,
    readonly: bool,
}

impl Disk {
    /// Opens and locks the image that `config` names. If its size is not a multiple of 512, the bytes after
    /// the last whole sector are out of the guest's reach, and a line on stderr says so.
    ///
    /// # Errors
    /// Every [`DiskError`] but those of parsing. Nothing is created or changed.
    pub fn open(config: &DiskConfig) -> Result<Disk, DiskError> {
        let disk = Disk::open_as_it_is(config)?;
        disk.lock()?.take()?;
        Ok(disk)
    }

    /// The same, without a lock on it.
    ///
    /// # Errors
    /// As [`open`](Disk::open), but for [`DiskError::Locked`].
    pub fn open_as_it_is(config: &DiskConfig) -> Result<Disk, DiskError> {
        let DiskConfig { path, readonly } = config.clone();
        let io = |action| {
            let path = path.clone();
            move |source| DiskError::Io { action, path, source }
        };
        // Without O_NONBLOCK, opening a pipe would wait for its other end. Files and block devices ignore it.
        let opened =
            OpenOptions::new().read(true).write(!readonly).custom_flags(libc::O_NONBLOCK).open(&path);
        let mut file = opened.map_err(|source| match source.kind() {
            ErrorKind::NotFound => DiskError::Missing(path.clone()),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                DiskError::Permission { path: path.clone(), readonly }
            }
            ErrorKind::IsADirectory => DiskError::Kind { path: path.clone(), what: "a directory" },
            _ => io("open")(source),
        })?;
        let kind = file.metadata().map_err(io("examine"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() {
                "a directory"
            } else if kind.is_fifo() {
                "a pipe"
            } else {
                "a character device"
            };
            return Err(DiskError::Kind { path, what });
        }
        // For a block device, metadata has no size; the end of the device is found by seeking.
        let size = file.seek(SeekFrom::End(0)).map_err(io("find the size of"))?;
        if size < SECTOR {
            return Err(DiskError::TooSmall { path, size });
        }
        if size % SECTOR != 0 {
            eprintln!(
                "vmm: the size of the disk image {} is not a multiple of {SECTOR}: the guest does not see its last {} bytes",
                path.display(),
                size % SECTOR
            );
        }
        Ok(Disk { file, path, sectors: size / SECTOR, readonly })
    }

    /// Its lock, which is the disk's for as long as either lives.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn lock(&self) -> Result<DiskLock, DiskError> {
        let io = |source| DiskError::Io { action: "open", path: self.path.clone(), source };
        // The same open file description, and that is what has the lock (flock(2)).
        let file = self.file.try_clone().map_err(io)?;
        Ok(DiskLock { file, path: self.path.clone(), readonly: self.readonly })
    }

    /// A disk of `sectors` sectors on any file, not locked.
    #[cfg(test)]
    pub(super) fn for_test(file: File, path: &str, sectors: u64) -> Disk {
        Disk { file, path: path.into(), sectors, readonly: false }
    }

    /// Size in sectors, at least 1.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the guest may only read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Where the image is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Whether `bytes` bytes from sector `sector` on are whole sectors of this disk.
    pub fn contains(&self, sector: u64, bytes: u64) -> bool {
        bytes.is_multiple_of(SECTOR)
            && sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.sectors)
    }

    /// Fills `to` from sector `sector` on, in one system call unless it is interrupted or cut short.
    ///
    /// # Errors
    /// Those of `preadv(2)`, and `UnexpectedEof` if somebody has shortened the image.
    pub fn read(&self, sector: u64, to: &mut Buffers<'_>) -> io::Result<()> {
        let mut offset = sector * SECTOR;
        while !to.is_empty() {
            match guest_io::read_at(&self.file, to.slices(), offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    to.advance(n);
                    offset += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes `from` from sector `sector` on, in one system call unless it is interrupted or cut short.
    ///
    /// # Errors
    /// Those of `pwritev(2)`; what came before the error has been written.
    pub fn write(&self, sector: u64, from: &mut Buffers<'_>) -> io::Result<()> {
        let mut offset = sector * SECTOR;
        while !from.is_empty() {
            match guest_io::write_at(&self.file, from.slices(), offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    from.advance(n);
                    offset += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes all completed writes survive a crash of the host.
    ///
    /// # Errors
    /// Those of `fdatasync(2)`.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives `count` sectors from `sector` on back to the host. They may read as anything afterwards; where
    /// the host cannot do it, they keep their contents.
    ///
    /// # Errors
    /// Those of `fallocate(2)`, except that it is not supported.
    pub fn discard(&mut self, sector: u64, count: u32) -> io::Result<()> {
        loop {
            match self.file.punch_hole(sector * SECTOR, u64::from(count) * SECTOR) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
                result => return result,
            }
        }
    }

    /// Makes `count` sectors from `sector` on read as zeroes, giving their space back if `unmap` is set and
    /// the host can.
    ///
    /// # Errors
    /// Those of `fallocate(2)` and `pwrite(2)`.
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) -> io::Result<()> {
        let (offset, length) = (sector * SECTOR, u64::from(count) * SECTOR);
        if unmap && self.file.punch_hole(offset, length).is_ok() {
            return Ok(());
        }
        self.file.write_all_zeroes_at(offset, length as usize)
    }
}

/// The lock of a disk.
#[derive(Debug)]
pub struct DiskLock {
    file: File,
    path: PathBuf,
    readonly: bool,
}

impl DiskLock {
    /// Locks the disk, if it is not locked already.
    ///
    /// # Errors
    /// [`DiskError::Locked`], if somebody else has it.
    pub fn take(&self) -> Result<(), DiskError> {
        let lock = if self.readonly { self.file.try_lock_shared() } else { self.file.try_lock() };
        lock.map_err(|error| match error {
            TryLockError::WouldBlock => {
                DiskError::Locked { path: self.path.clone(), readonly: self.readonly }
            }
            TryLockError::Error(source) => DiskError::Io { action: "lock", path: self.path.clone(), source },
        })
    }

    /// Leaves the disk to somebody else.
    ///
    /// # Errors
    /// What flock(2) says.
    pub fn give(&self) -> Result<(), DiskError> {
        self.file.unlock().map_err(|source| DiskError::Io {
            action: "unlock",
            path: self.path.clone(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(error: DiskError) -> String {
        let text = error.to_string();
        assert!(!text.contains('\n'), "one line: {text}");
        text
    }

    fn open(path: &std::path::Path, readonly: bool) -> Result<Disk, DiskError> {
        Disk::open(&DiskConfig { path: path.to_owned(), readonly })
    }

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn arguments() {
        let disk = |path: &str, readonly| DiskConfig { path: path.into(), readonly };
        assert_eq!("path=a.img".parse::<DiskConfig>().unwrap(), disk("a.img", false));
        assert_eq!("path=/x/a=b,readonly=on".parse::<DiskConfig>().unwrap(), disk("/x/a=b", true));
        assert_eq!("readonly=off,path=a".parse::<DiskConfig>().unwrap(), disk("a", false));
        for (text, problem) in [
            ("", "no path"),
            ("a.img", "'a.img' is not of the form key=value"),
            ("path=", "no path"),
            ("readonly=on", "no path"),
            ("path=a,readonly=yes", "'yes' will not do"),
            ("path=a,path=b", "'path' is given twice"),
            ("path=a,cache=none", "no key 'cache'"),
        ] {
            let error = message(text.parse::<DiskConfig>().unwrap_err());
            assert!(error.contains(problem), "{text}: {error}");
            assert!(error.contains("path") || error.contains("on or off"), "{text}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none.img");
        for readonly in [false, true] {
            assert!(matches!(open(&missing, readonly), Err(DiskError::Missing(_))));
            let error = message(open(dir.path(), readonly).unwrap_err());
            assert!(error.contains("is a directory"), "{error}");
            let error = message(open("/dev/null".as_ref(), readonly).unwrap_err());
            assert!(error.contains("is a character device"), "{error}");
            let error = message(open(image(511).path(), readonly).unwrap_err());
            assert!(error.contains("511 bytes"), "{error}");
            let error = message(open(&image(512).path().join("x"), readonly).unwrap_err());
            assert!(error.contains("cannot open"), "{error}");
        }
        assert!(!missing.exists(), "nothing is created");
        let pipe = dir.path().join("pipe");
        let status = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(status.success());
        let error = message(open(&pipe, true).unwrap_err());
        assert!(error.contains("is a pipe"), "{error}");
    }

    #[test]
    fn errors_say_what_to_do() {
        let path = PathBuf::from("d.img");
        for (error, hint) in [
            (DiskError::Missing(path.clone()), "truncate -s"),
            (DiskError::Permission { path: path.clone(), readonly: false }, "or add readonly=on"),
            (DiskError::Permission { path: path.clone(), readonly: true }, "permission to read the"),
            (DiskError::Locked { path: path.clone(), readonly: false }, "all open with readonly=on"),
            (DiskError::Locked { path, readonly: true }, "use a copy"),
        ] {
            let text = message(error);
            assert!(text.contains("d.img") && text.contains(hint), "{text}");
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let writer = open(file.path(), false).unwrap();
        assert!(matches!(open(file.path(), false), Err(DiskError::Locked { .. })));
        assert!(matches!(open(file.path(), true), Err(DiskError::Locked { .. })));
        drop(writer);
        let _reader = open(file.path(), true).unwrap();
        let _another = open(file.path(), true).unwrap();
        assert!(matches!(open(file.path(), false), Err(DiskError::Locked { .. })));
    }

    #[test]
    fn a_lock_changes_hands() {
        let file = image(4096);
        let config = DiskConfig { path: file.path().to_owned(), readonly: false };
        let (here, there) = (Disk::open(&config).unwrap(), Disk::open_as_it_is(&config).unwrap());
        let [ours, theirs] = [&here, &there].map(|disk| disk.lock().unwrap());
        let is_locked = || matches!(Disk::open(&config), Err(DiskError::Locked { .. }));
        assert!(matches!(theirs.take(), Err(DiskError::Locked { .. })));
        // Whoever has it may take it again.
        ours.take().unwrap();
        assert!(is_locked());
        ours.give().unwrap();
        theirs.take().unwrap();
        assert!(is_locked() && matches!(ours.take(), Err(DiskError::Locked { .. })));
        theirs.give().unwrap();
        ours.take().unwrap();
        drop((here, ours));
        assert!(!is_locked());
    }

    #[test]
    fn sizes() {
        assert_eq!(open(image(512).path(), true).unwrap().sectors(), 1);
        let disk = open(image(4096 + 511).path(), true).unwrap();
        assert_eq!(disk.sectors(), 8, "a partial sector is out of reach");
        for (sector, bytes, inside) in [
            (0, 4096, true),
            (7, 512, true),
            (8, 0, true),
            (8, 512, false),
            (9, 0, false),
            (7, 1024, false),
            (0, 511, false),
            (0, 513, false),
            (u64::MAX, 512, false),
            (u64::MAX / 512, 512, false),
        ] {
            assert_eq!(disk.contains(sector, bytes), inside, "{sector} {bytes}");
        }
    }
}
