//! Renames that never replace anything, or that exchange two names at one moment.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Renames `from` to `to`, where nothing is.
///
/// # Errors
/// `EEXIST` when something is at `to`; what else `renameat2` says.
pub(crate) fn no_replace(from: &Path, to: &Path) -> io::Result<()> {
    rename(from, to, libc::RENAME_NOREPLACE)
}

/// Exchanges what is at `a` and at `b`: at every moment both are there.
///
/// # Errors
/// `EINVAL` when the file system cannot; what else `renameat2` says.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    rename(a, b, libc::RENAME_EXCHANGE)
}

fn rename(from: &Path, to: &Path, flags: libc::c_uint) -> io::Result<()> {
    let [from, to] = [CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?];
    // SAFETY: both are NUL-terminated strings that outlive the call.
    let result =
        unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
