//! System calls that no crate wraps safely.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// Makes the child end with the thread that starts it: whichever way this process goes, Ctrl-C and SIGKILL
/// included, no emulator is left running. The thread must outlive the child (it waits for it).
pub fn end_with_parent(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let hook = move || {
        // SAFETY: prctl, getppid and _exit are async-signal-safe and touch no memory of ours.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have died before the call above; nobody would send the signal then.
            if libc::getppid() as u32 != parent {
                libc::_exit(1);
            }
        }
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec and keeps to async-signal-safe calls.
    unsafe { command.pre_exec(hook) }
}

/// Makes the child end by SIGALRM when it takes longer than `limit`, so that nobody who waits for it does so for ever.
pub fn end_after(command: &mut Command, limit: Duration) -> &mut Command {
    let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX);
    let hook = move || {
        // SAFETY: alarm is async-signal-safe and touches no memory; what it sets outlives exec (alarm(2)).
        unsafe { libc::alarm(seconds) };
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec and keeps to async-signal-safe calls.
    unsafe { command.pre_exec(hook) }
}

/// Rows and columns of the terminal on stdout, if it is one and knows.
pub fn terminal_size() -> Option<(u16, u16)> {
    // SAFETY: winsize is plain numbers, for which zeroes are valid.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one winsize, and `size` is one.
    let outcome = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (outcome == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Sends `signal` to a child process that has not been waited for.
///
/// # Errors
/// What kill(2) says.
pub fn signal(child: &std::process::Child, signal: i32) -> std::io::Result<()> {
    // SAFETY: the child has not been reaped, so its process id is still its own.
    let result = unsafe { libc::kill(child.id() as libc::pid_t, signal) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Sets how long files may be that a child process writes, which has not been waited for; `None`: as long as they like.
///
/// # Errors
/// What prlimit(2) says.
pub fn limit_file_size(child: &std::process::Child, bytes: Option<u64>) -> std::io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let pid = child.id() as libc::pid_t;
    // SAFETY: the call writes one rlimit, which is ours and outlives it.
    if unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, std::ptr::null(), &mut limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    limit.rlim_cur = bytes.unwrap_or(limit.rlim_max);
    // SAFETY: the call reads one rlimit, which outlives it; the child has not been reaped.
    match unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Kills a child process that has not been waited for.
///
/// # Errors
/// What kill(2) says.
pub fn kill(child: u32) -> std::io::Result<()> {
    // SAFETY: the call touches no memory; the child has not been reaped, so its process id is still its own.
    let result = unsafe { libc::kill(child as libc::pid_t, libc::SIGKILL) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
