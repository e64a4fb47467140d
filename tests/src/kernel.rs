//! A distribution kernel taken apart: the ELF image inside its bzImage, and its modules in loading order.
//!
//! Monitors boot either form, but PVH needs the ELF; and a kernel whose virtio drivers are modules needs
//! them in its initramfs, decompressed, because busybox's `insmod` is handed plain ELF files in the order
//! of their dependencies. Both are read from the package's files alone; nothing is installed.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

/// Why a kernel image or module could not be taken apart.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bzImage is not one, or is cut short.
    #[error("not a usable bzImage: {0}")]
    BzImage(&'static str),
    /// The compressed payload does not decompress.
    #[error("cannot decompress {what}: {reason}")]
    Decompress {
        /// What was being decompressed.
        what: String,
        /// What the decoder said.
        reason: String,
    },
    /// The module is not below the kernel's module directory.
    #[error("the kernel in {tree} has no module {name}")]
    NoModule {
        /// The module's name.
        name: String,
        /// The directory that was searched.
        tree: PathBuf,
    },
    /// The module file is no ELF file with a `.modinfo` section.
    #[error("{name} is not a kernel module: {reason}")]
    BadModule {
        /// The module's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The ELF image inside a bzImage.
///
/// The payload's place is in the setup header (Linux `Documentation/arch/x86/boot.rst`: `setup_sects`,
/// `payload_offset`, `payload_length`); its last four bytes are the unpacked size, which is no part of the
/// compressed stream.
pub fn vmlinux_of(bzimage: &[u8]) -> Result<Vec<u8>, Error> {
    let at = |offset: usize| -> Result<u32, Error> {
        let bytes = bzimage.get(offset..offset + 4).ok_or(Error::BzImage("shorter than its header"))?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    if at(0x202)? != u32::from_le_bytes(*b"HdrS") {
        return Err(Error::BzImage("no setup header"));
    }
    let setup_sects = match bzimage[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sects + 1) * 512 + at(0x248)? as usize;
    let length = at(0x24c)? as usize;
    let payload = length
        .checked_sub(4)
        .and_then(|length| bzimage.get(start..start + length))
        .ok_or(Error::BzImage("its payload reaches beyond the file"))?;
    let image = decompress(payload, "the kernel's payload")?;
    if !image.starts_with(b"\x7fELF") {
        return Err(Error::BzImage("its payload is no ELF file"));
    }
    Ok(image)
}

/// Decompresses what the kernel's build and Debian's packages use: zstd, xz, LZ4 (its legacy frame).
/// A plain ELF file is returned as it is.
fn decompress(data: &[u8], what: &str) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    let outcome = match data {
        [0x7f, b'E', b'L', b'F', ..] => return Ok(data.to_vec()),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ruzstd::decoding::StreamingDecoder::new(data)
            .map_err(|e| e.to_string())
            .and_then(|mut decoder| decoder.read_to_end(&mut out).map_err(|e| e.to_string())),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            lzma_rust2::XzReader::new(data, false).read_to_end(&mut out).map_err(|e| e.to_string())
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            lz4_flex::frame::FrameDecoder::new(data).read_to_end(&mut out).map_err(|e| e.to_string())
        }
        _ => Err("neither zstd nor xz nor LZ4".into()),
    };
    match outcome {
        Ok(_) => Ok(out),
        Err(reason) => Err(Error::Decompress { what: what.into(), reason }),
    }
}

/// The file of a module directory that names the modules built into the kernel.
pub const BUILTIN: &str = "modules.builtin";

/// A kernel module, ready for `insmod`.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file.
    pub image: Vec<u8>,
}

/// The modules `wanted` and all they depend on, each once, dependencies first, from the module directory
/// `tree` (searched in depth). What `modules.builtin` says is part of the kernel itself is left out.
pub fn modules_of(tree: &Path, wanted: &[&str]) -> Result<Vec<Module>, Error> {
    let mut files = Vec::new();
    find_modules(tree, &mut files)?;
    let builtin: Vec<String> = fs::read_to_string(tree.join(BUILTIN))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    let mut loaded: Vec<Module> = Vec::new();
    for name in wanted.iter().filter(|name| !builtin.contains(&name.replace('-', "_"))) {
        load(tree, &files, name, &mut loaded)?;
    }
    Ok(loaded)
}

fn load(tree: &Path, files: &[PathBuf], name: &str, loaded: &mut Vec<Module>) -> Result<(), Error> {
    let name = name.replace('-', "_");
    if loaded.iter().any(|m| m.name == name) {
        return Ok(());
    }
    let file = files
        .iter()
        .find(|f| module_name(f).is_some_and(|n| n == name))
        .ok_or_else(|| Error::NoModule { name: name.clone(), tree: tree.into() })?;
    let packed = fs::read(file).map_err(|source| Error::Read { path: file.clone(), source })?;
    let image = decompress(&packed, &name)?;
    // A module's dependencies form no cycle (depmod refuses one), so this ends.
    for dependency in dependencies(&name, &image)? {
        load(tree, files, &dependency, loaded)?;
    }
    loaded.push(Module { name, image });
    Ok(())
}

/// The names in the `depends=` entry of the module's `.modinfo`, a section of NUL-separated `key=value`.
fn dependencies(name: &str, image: &[u8]) -> Result<Vec<String>, Error> {
    let bad = |reason: String| Error::BadModule { name: name.into(), reason };
    let file = object::File::parse(image).map_err(|e| bad(e.to_string()))?;
    let section = file.section_by_name(".modinfo").ok_or_else(|| bad("no .modinfo section".into()))?;
    let data = section.data().map_err(|e| bad(e.to_string()))?;
    let depends = data.split(|b| *b == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let depends = String::from_utf8_lossy(depends.unwrap_or_default()).into_owned();
    Ok(depends.split(',').filter(|d| !d.is_empty()).map(str::to_owned).collect())
}

/// The module's name by its file: up to `.ko`, with underscores.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let (stem, rest) = name.split_once(".ko")?;
    (rest.is_empty() || rest.starts_with('.')).then(|| stem.replace('-', "_"))
}

fn find_modules(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let read = |source| Error::Read { path: dir.into(), source };
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let kind = entry.file_type().map_err(read)?;
        if kind.is_dir() {
            find_modules(&entry.path(), files)?;
        } else if kind.is_file() && module_name(&entry.path()).is_some() {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_bzimage_is_refused() {
        assert!(matches!(vmlinux_of(b"MZ"), Err(Error::BzImage(_))));
        let mut header = vec![0; 0x1000];
        assert!(matches!(vmlinux_of(&header), Err(Error::BzImage("no setup header"))));
        header[0x202..0x206].copy_from_slice(b"HdrS");
        header[0x24c..0x250].copy_from_slice(&0xffff_ffff_u32.to_le_bytes());
        assert!(matches!(vmlinux_of(&header), Err(Error::BzImage("its payload reaches beyond the file"))));
    }

    #[test]
    fn a_cut_payload_is_refused() {
        let mut image = vec![0; 0x1000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x24c..0x250].copy_from_slice(&64_u32.to_le_bytes());
        image[0x400..0x404].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        assert!(matches!(vmlinux_of(&image), Err(Error::Decompress { .. })));
    }

    #[test]
    fn modules_are_known_by_their_names() {
        assert_eq!(module_name(Path::new("a/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("a/virtio_blk.ko")).as_deref(), Some("virtio_blk"));
        assert_eq!(module_name(Path::new("a/modules.order")), None);
        assert_eq!(module_name(Path::new("a/x.kotlin")), None);
    }
}
