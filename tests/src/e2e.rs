//! The end-to-end tests as a payload: the same test executable that runs on this machine, run in the rig.

use std::path::PathBuf;

use crate::cargo;
use crate::recipe;
use crate::rig::{Payload, quote};
use crate::store::Store;

/// Names the `vmm` executable that tests use, where there is no cargo to build it.
pub const VMM_ENV: &str = "VMM_BINARY";

/// Names the directory with a stock Linux guest: `vmlinux`, `bzImage`, `initramfs`. Set in the rig.
pub const IMAGES_ENV: &str = "VMM_IMAGES";

/// Where the rig places that guest.
pub const IMAGES: &str = "/images";

/// Why the payload could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A build failed.
    #[error(transparent)]
    Cargo(#[from] cargo::Error),
    /// The Linux guest could not be made.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
}

/// Adds `vmm`, in release mode, as a command.
pub fn with_vmm(payload: Payload) -> Result<Payload, cargo::Error> {
    Ok(payload.put("/bin/vmm", cargo::vmm_binary()?))
}

/// The integration tests that need KVM and nothing else, so that they run on this machine and in the rig alike.
pub const HARNESSES: [&str; 4] = ["e2e", "cli", "kvm", "conformance"];

/// `vmm`, a stock Linux guest and the test executables `harnesses`, each of which runs with `arguments`; the exit
/// status is that of the last that fails.
pub fn payload(store: &Store, harnesses: &[&str], arguments: &[String]) -> Result<Payload, Error> {
    let arguments: String = arguments.iter().map(|a| format!(" {}", quote(a))).collect();
    let mut script = format!("export {VMM_ENV}=/bin/vmm {IMAGES_ENV}={IMAGES} CI=true\nfailed=0\n");
    let mut payload = with_vmm(Payload::default())?;
    for name in harnesses {
        let path = format!("/tests/{name}");
        script += &format!("echo running {path}\n{path}{arguments} || failed=$?\n");
        payload = payload.put(path, cargo::test_binary(name)?);
    }
    let payload = payload.with_script(script + "exit $failed");
    Ok(recipe::with_linux_guest(payload, store, recipe::DEFAULT_SERIES)?)
}

/// The directory with the stock Linux guest, if this process runs in the rig.
pub fn images() -> Option<PathBuf> {
    std::env::var_os(IMAGES_ENV).map(PathBuf::from)
}
