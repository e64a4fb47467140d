//! Building the workspace's executables from a test or from the rig, into the same target directory.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::e2e::VMM_ENV;
use crate::store::target_dir;

/// Why an executable could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cargo did not start.
    #[error("cannot start {cargo}: {source}")]
    Start {
        /// The program.
        cargo: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The build failed; cargo has said why on stderr.
    #[error("`cargo {0}` failed (see above)")]
    Failed(String),
    /// The build made no executable of that name.
    #[error("`cargo {0}` made no executable {1}")]
    NoExecutable(String, String),
}

/// The `vmm` command: `$VMM_BINARY` if that is set (it is in the rig), or else built on the first call.
pub fn vmm_binary() -> Result<PathBuf, Error> {
    match env::var_os(VMM_ENV) {
        Some(path) => Ok(path.into()),
        None => command("vmm"),
    }
}

/// The memory stressor that goes into Linux guests.
pub fn memstress_binary() -> Result<PathBuf, Error> {
    command("memstress")
}

/// A command of the workspace. A test is built with it, or cargo would leave out what only tests need of the libraries that
/// both use, and build these once more.
fn command(name: &str) -> Result<PathBuf, Error> {
    executable(&["build", "--workspace", "--bin", name, "--test", "cli"], name)
}

/// The integration test `name` of the workspace.
pub fn test_binary(name: &str) -> Result<PathBuf, Error> {
    executable(&["test", "--workspace", "--test", name, "--no-run"], name)
}

/// Runs cargo once per process for each set of arguments.
fn executable(arguments: &[&str], name: &str) -> Result<PathBuf, Error> {
    static BUILT: Mutex<Vec<(String, PathBuf)>> = Mutex::new(Vec::new());
    let shown = arguments.join(" ");
    let mut built = BUILT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, path)) = built.iter().find(|(key, _)| *key == shown) {
        return Ok(path.clone());
    }
    let cargo = PathBuf::from(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let mut command = Command::new(&cargo);
    // What cargo tells a test of its package would be news to build scripts that look at it (ring's), and all that depends
    // on these would be built once more.
    let of_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
    for (name, _) in env::vars_os() {
        if of_package.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
    let output = command
        .args(arguments)
        .args(["--quiet", "--message-format=json-render-diagnostics", "--target-dir"])
        .arg(target_dir())
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| Error::Start { cargo, source })?;
    if !output.status.success() {
        return Err(Error::Failed(shown));
    }
    let path = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| Error::NoExecutable(shown.clone(), name.into()))?;
    built.push((shown, path.clone()));
    Ok(path)
}
