//! Initramfs archives: cpio in the "newc" form that Linux unpacks at boot.
//!
//! The kernel accepts several archives one after the other and later files replace earlier ones
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`), so a recipe's fixed part and one run's
//! payload are written apart and appended.

use std::collections::BTreeSet;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;

impl Initramfs {
    /// An archive without entries.
    pub fn new() -> Initramfs {
        Initramfs::default()
    }

    /// Adds the file `path` (a leading `/` is allowed) with `mode` permission bits, and its parent directories.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> &mut Initramfs {
        self.parents(path);
        self.entry(path, FILE | mode, data);
        self
    }

    /// Adds the symbolic link `path` that points to `target`, and its parent directories.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Initramfs {
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, target.as_bytes());
        self
    }

    /// Adds the empty directory `path` and its parents.
    pub fn directory(&mut self, path: &str) -> &mut Initramfs {
        self.parents(&format!("{path}/"));
        self
    }

    /// The finished archive, padded to a multiple of 512 bytes so that another can follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            if self.directories.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY | 0o755, b"");
            }
        }
    }

    /// One header of 110 hexadecimal characters, the name and the data, each padded to 4 bytes.
    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        let path = path.trim_start_matches('/');
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("a cpio entry holds at most 4 GiB, and L1 has less RAM");
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_parent_once_and_is_aligned() {
        let mut archive = Initramfs::new();
        archive.file("/a/b/one", 0o644, b"12345").file("a/b/two", 0o755, b"").symlink("a/c", "b/one");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 6, "a, a/b, two files, a link, the trailer");
        assert!(text.contains("a/b/one\0"));
    }
}
