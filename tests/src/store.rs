//! The rig's cache: fetched once, kept below cargo's target directory, safe against interruption and against
//! other processes.
//!
//! Every piece (QEMU, busybox, one kernel per series) is a directory that appears by a rename when it is
//! complete, so what exists is whole and needs no network. A lock on a file beside them keeps two test
//! processes from fetching the same thing. Deleting the cache is always safe.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{self, Archive};
use crate::kernel::{self, Module};

/// Why a piece of the rig is missing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The package could not be had.
    #[error(transparent)]
    Debian(#[from] debian::Error),
    /// The kernel could not be taken apart.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The package lacks what it was fetched for.
    #[error("package {package} holds no {what}")]
    Missing {
        /// The package.
        package: String,
        /// The file that was expected.
        what: &'static str,
    },
    /// A file of the cache could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// Whether this machine simply cannot have the packages (no apt, no Debian mirror, no network).
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Error::Debian(debian::Error::Unavailable(_)))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// Where a package is looked for, in this order: the release, and whether QEMU comes from its backports.
/// The older release is first because it is what the rig was proven on.
const RELEASES: [(&str, bool); 2] = [("bookworm", true), ("trixie", false)];

/// The release that Bochs comes from.
const BOCHS_RELEASE: &str = "trixie";

/// Modules kept from a kernel package: KVM for L1, virtio for the guests.
const MODULES: [&str; 7] =
    ["kvm_amd", "kvm_intel", "virtio_mmio", "virtio_blk", "virtio_rng", "virtio_net", "virtio_balloon"];

/// The cache directory. Cheap to make; nothing is fetched before it is asked for.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A stock kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    dir: PathBuf,
    /// Package name and version.
    pub version: String,
}

/// QEMU with all its libraries and firmware, runnable from where it lies.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The tree that its packages were unpacked into.
    pub tree: PathBuf,
    /// Package version.
    pub version: String,
}

/// Bochs with all its libraries and firmware, and what makes a CD for it, runnable from where they lie.
#[derive(Clone, Debug)]
pub struct Bochs {
    /// The tree that the packages were unpacked into.
    pub tree: PathBuf,
    /// Package version.
    pub version: String,
}

/// The static busybox.
#[derive(Clone, Debug)]
pub struct Busybox {
    /// The executable.
    pub path: PathBuf,
    /// Package version.
    pub version: String,
}

impl Store {
    /// The cache in `$RIG_CACHE`, or else in `rig/` below the target directory that this executable was
    /// built into.
    pub fn open() -> Store {
        let dir = env::var_os("RIG_CACHE").map(PathBuf::from).unwrap_or_else(|| target_dir().join("rig"));
        Store { dir }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// QEMU's x86-64 system emulator, version 10 or newer (TCG of 7.2 crashes L1 now and then).
    pub fn qemu(&self) -> Result<Qemu, Error> {
        let (dir, version) = self.piece("qemu", |tree| {
            self.in_some_release(|archive, backports| {
                let version = archive.unpack_with_dependencies(&["qemu-system-x86"], backports, tree)?;
                Ok(format!("qemu-system-x86 {version} (Debian {})", archive.release()))
            })
        })?;
        Ok(Qemu { tree: dir, version })
    }

    /// Bochs 3.0 or newer. (2.7 logs addresses in the middle of a page, of each of which the host's kernel warns, and
    /// takes half as long again.)
    pub fn bochs(&self) -> Result<Bochs, Error> {
        let (tree, version) = self.piece("bochs", |tree| {
            let archive = self.archive(BOCHS_RELEASE)?;
            // A display of some kind has to be there; this one brings the fewest packages.
            let names = ["bochs", "bochs-term", "genisoimage", "isolinux", "syslinux-common"];
            let version = archive.unpack_with_dependencies(&names, false, tree)?;
            Ok(format!("bochs {version} (Debian {BOCHS_RELEASE})"))
        })?;
        Ok(Bochs { tree, version })
    }

    /// Busybox, linked statically.
    pub fn busybox(&self) -> Result<Busybox, Error> {
        let (dir, version) = self.piece("busybox", |tree| {
            self.in_some_release(|archive, _| {
                let package = archive.newest("busybox-static", "busybox-static")?;
                archive.unpack(&[&package.name], tree)?;
                Ok(format!("busybox-static {} (Debian {})", package.version, archive.release()))
            })
        })?;
        let path = ["bin/busybox", "usr/bin/busybox"].map(|p| dir.join(p)).into_iter().find(|p| p.exists());
        let path = path.ok_or(Error::Missing { package: "busybox-static".into(), what: "busybox" })?;
        Ok(Busybox { path, version })
    }

    /// The newest stock cloud kernel of `series`, e.g. `6.12`.
    pub fn kernel(&self, series: &str) -> Result<Kernel, Error> {
        let (dir, version) = self.piece(&format!("kernel-{series}"), |dir| {
            self.in_some_release(|archive, _| fetch_kernel(archive, series, dir))
        })?;
        Ok(Kernel { dir, version })
    }

    fn archive(&self, release: &str) -> Result<Archive, Error> {
        Ok(Archive::open(release, &self.dir.join("apt").join(release))?)
    }

    /// Tries each release in turn; the first error is the one to report, unless a later release has more to say
    /// than that it lacks the package.
    fn in_some_release<T>(
        &self,
        mut fetch: impl FnMut(&Archive, bool) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut first = None;
        for (release, backports) in RELEASES {
            match self.archive(release).and_then(|archive| fetch(&archive, backports)) {
                Ok(found) => return Ok(found),
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.expect("there is at least one release"))
    }

    /// The directory of the piece `name` and its version; made by `fill` if it is not there yet.
    fn piece(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<String, Error>,
    ) -> Result<(PathBuf, String), Error> {
        fs::create_dir_all(&self.dir).map_err(io_error("create", &self.dir))?;
        let lock_path = self.dir.join("lock");
        let lock = File::create(&lock_path).map_err(io_error("create", &lock_path))?;
        // Held until this function returns; a process that dies lets it go.
        lock.lock().map_err(io_error("lock", &lock_path))?;
        let dir = self.dir.join(name);
        let version_file = dir.join("VERSION");
        if !version_file.exists() {
            eprintln!("rig: fetching {name} into {}", self.dir.display());
            let fresh = self.dir.join(format!("{name}.part"));
            for stale in [&fresh, &dir] {
                if stale.exists() {
                    fs::remove_dir_all(stale).map_err(io_error("remove", stale))?;
                }
            }
            fs::create_dir_all(&fresh).map_err(io_error("create", &fresh))?;
            let version = fill(&fresh)?;
            let fresh_version = fresh.join("VERSION");
            fs::write(&fresh_version, &version).map_err(io_error("write", &fresh_version))?;
            fs::rename(&fresh, &dir).map_err(io_error("rename", &fresh))?;
            eprintln!("rig: {name} is {version}");
        }
        let version = fs::read_to_string(&version_file).map_err(io_error("read", &version_file))?;
        Ok((dir, version))
    }
}

/// Unpacks the newest kernel of `series` into `dir`: `bzImage`, `vmlinux`, `config` and `modules/`.
fn fetch_kernel(archive: &Archive, series: &str, dir: &Path) -> Result<String, Error> {
    let image = archive.newest(&format!("linux-image-{series}."), "-cloud-amd64")?;
    // Newer kernels split the image package; the pieces carry the same suffix.
    let suffix = image.name.trim_start_matches("linux-image").to_owned();
    let mut names = vec![image.name.as_str()];
    names.extend(image.depends.iter().map(String::as_str).filter(|d| d.ends_with(&suffix)));
    let tree = dir.join("tree");
    archive.unpack(&names, &tree)?;

    let release = suffix.trim_start_matches('-');
    let find = |candidates: [String; 2], what| {
        let found = candidates.into_iter().map(|c| tree.join(c)).find(|p| p.exists());
        found.ok_or(Error::Missing { package: image.name.clone(), what })
    };
    let vmlinuz = find(
        [format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")],
        "kernel image",
    )?;
    let modules =
        find([format!("lib/modules/{release}"), format!("usr/lib/modules/{release}")], "module directory")?;

    let write = |name: &str, data: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, data).map_err(io_error("write", &path))
    };
    let bzimage = fs::read(&vmlinuz).map_err(io_error("read", &vmlinuz))?;
    write("vmlinux", &kernel::vmlinux_of(&bzimage)?)?;
    write("bzImage", &bzimage)?;
    let kept = dir.join("modules");
    fs::create_dir_all(&kept).map_err(io_error("create", &kept))?;
    for module in kernel::modules_of(&modules, &MODULES)? {
        write(&format!("modules/{}.ko", module.name), &module.image)?;
    }
    if let Ok(builtin) = fs::read(modules.join(kernel::BUILTIN)) {
        write(&format!("modules/{}", kernel::BUILTIN), &builtin)?;
    }
    fs::remove_dir_all(&tree).map_err(io_error("remove", &tree))?;
    Ok(format!("{} {} (Debian {})", image.name, image.version, archive.release()))
}

impl Kernel {
    /// The kernel as a bzImage.
    pub fn bzimage(&self) -> PathBuf {
        self.dir.join("bzImage")
    }

    /// The kernel as an ELF file, which monitors boot by PVH.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The modules `wanted` and what they depend on, in loading order.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>, Error> {
        Ok(kernel::modules_of(&self.dir.join("modules"), wanted)?)
    }
}

/// A command that starts a program of the unpacked packages in `tree` with their own loader and libraries; the
/// executable comes next.
pub fn loader(tree: &Path) -> Command {
    let lib = |dir: &str| tree.join(dir).join("x86_64-linux-gnu").display().to_string();
    let mut command = Command::new(loader_path(tree));
    command.arg("--library-path").arg(format!("{}:{}", lib("lib"), lib("usr/lib")));
    command
}

/// The dynamic loader of the packages in `tree`.
pub fn loader_path(tree: &Path) -> PathBuf {
    tree.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
}

/// Cargo's target directory: the directory above this executable that holds the compiler's fingerprint.
pub fn target_dir() -> PathBuf {
    let exe = env::current_exe().unwrap_or_default();
    let marked = exe.ancestors().find(|dir| dir.join(".rustc_info.json").exists());
    marked.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), Path::to_path_buf)
}
