//! The recipe of a Linux guest: which files of which packages make an initramfs that boots to a userland.
//!
//! The same recipe serves the guests and the rig's L1 host; they differ in the modules that they load. What
//! happens at boot is in `images/init`, which `images/README.md` explains.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cargo;
#[cfg(doc)]
use crate::e2e;
use crate::e2e::IMAGES;
use crate::initramfs::Initramfs;
use crate::rig::Payload;
use crate::store::{self, Busybox, Kernel, Store};

/// Process 1: see `images/README.md`.
const INIT: &[u8] = include_bytes!("../../images/init");

/// What a guest's virtio devices need.
const GUEST_MODULES: [&str; 3] = ["virtio_mmio", "virtio_blk", "virtio_rng"];

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package is missing.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The memory stressor could not be built.
    #[error(transparent)]
    Cargo(#[from] cargo::Error),
    /// A file that should go in could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Busybox does not run here.
    #[error("cannot ask {path} for its applets: {source}")]
    Busybox {
        /// The executable.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// An initramfs for `kernel`: busybox, [`INIT`] and the modules named in `modules`, each with its parameters
/// (`("kvm", "tdp_mmu=0")`; modules that they depend on come along, without parameters unless named).
pub fn initramfs(store: &Store, kernel: &Kernel, modules: &[(&str, &str)]) -> Result<Vec<u8>, Error> {
    let Busybox { path, .. } = store.busybox()?;
    let mut archive = Initramfs::new();
    archive.file("/init", 0o755, INIT).file("/bin/busybox", 0o755, &read(&path)?);
    let applets = Command::new(&path).arg("--list").output();
    let applets = applets.map_err(|source| Error::Busybox { path: path.clone(), source })?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
        archive.symlink(&format!("/bin/{applet}"), "busybox");
    }
    let names: Vec<&str> = modules.iter().map(|(name, _)| *name).collect();
    let mut list = String::new();
    for module in kernel.modules(&names)? {
        let file = format!("/lib/modules/{}.ko", module.name);
        let parameters = modules.iter().find(|(name, _)| *name == module.name).map_or("", |(_, p)| p);
        list += &format!("{file} {parameters}\n");
        archive.file(&file, 0o644, &module.image);
    }
    archive.file("/etc/modules", 0o644, list.as_bytes());
    Ok(archive.finish())
}

/// The initramfs of a Linux guest on `kernel`: virtio modules, and the stressor as `memstress`.
pub fn guest_initramfs(store: &Store, kernel: &Kernel) -> Result<Vec<u8>, Error> {
    let mut bytes = initramfs(store, kernel, &GUEST_MODULES.map(|name| (name, "")))?;
    let mut extra = Initramfs::new();
    extra.file("/bin/memstress", 0o755, &read(&cargo::memstress_binary()?)?);
    bytes.append(&mut extra.finish());
    Ok(bytes)
}

/// The series of the guest's kernel unless somebody asks for another.
pub const DEFAULT_SERIES: &str = "6.12";

/// Adds a stock Linux guest with the kernel `series` to what goes into the rig, in [`e2e::IMAGES`]: `vmlinux`,
/// `bzImage`, `initramfs`.
pub fn with_linux_guest(payload: Payload, store: &Store, series: &str) -> Result<Payload, Error> {
    let kernel = store.kernel(series)?;
    let initramfs = guest_initramfs(store, &kernel)?;
    Ok(payload
        .put(format!("{IMAGES}/vmlinux"), kernel.vmlinux())
        .put(format!("{IMAGES}/bzImage"), kernel.bzimage())
        .put_bytes(format!("{IMAGES}/initramfs"), initramfs))
}

/// Reads a file that goes into an archive.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}
