//! Signals as a file descriptor, so that the event loop handles them like everything else.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr;

/// A signalfd. The signals are blocked in the thread that makes it and in all that it starts afterwards;
/// dropping it gives them back their former treatment in the thread that drops it, which should be the same.
#[derive(Debug)]
pub struct Signals {
    file: File,
    former: libc::sigset_t,
}

impl Signals {
    /// Takes these signals. Call it before any other thread exists.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn take(signals: &[libc::c_int]) -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        let mut former = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before the others read it, pthread_sigmask writes `former`,
        // and signalfd gives a descriptor that nobody else owns.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), former.as_mut_ptr());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals { file: File::from_raw_fd(fd), former: former.assume_init() })
        }
    }

    /// The next pending signal, if there is one.
    pub fn next(&self) -> Option<libc::c_int> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.file).read_exact(&mut info).ok()?;
        // `ssi_signo` is the first field (signalfd(2)).
        Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the mask was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.former, ptr::null_mut()) };
    }
}

/// Asks a child process that has not been waited for to end, as Ctrl-C does.
///
/// # Errors
/// What kill(2) says.
pub fn interrupt(child: &std::process::Child) -> io::Result<()> {
    // SAFETY: the call touches no memory; the child has not been reaped, so its process id is still its own.
    match unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets `signal` pass without effect from now on, in the whole process.
///
/// # Errors
/// What `signal` says.
pub fn ignore(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: to ignore a signal runs no code of ours.
    match unsafe { libc::signal(signal, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
