//! The terminal: raw mode that is always undone, and its size.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::Mutex;

/// The settings to go back to, for [`restore`].
static SAVED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);

fn saved() -> std::sync::MutexGuard<'static, Option<(RawFd, libc::termios)>> {
    SAVED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Undoes raw mode, if a terminal is in it: what [`RawMode`] does when dropped, for a way out on which nothing is
/// dropped.
pub fn restore() {
    if let Some((fd, settings)) = saved().take() {
        // SAFETY: the settings are the terminal's own; if it is gone by now, there is nothing to restore.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &settings) };
    }
}

/// Raw mode on a terminal, restored when dropped. One at a time.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal `fd` into raw mode, but keeps output processing, so that `\n` still ends a line.
    ///
    /// # Errors
    /// `ENOTTY` when it is not a terminal.
    pub fn enter(fd: RawFd) -> io::Result<RawMode> {
        let mut saved = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the struct when it returns 0, and only then do we read it.
        let saved = unsafe {
            if libc::tcgetattr(fd, saved.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            saved.assume_init()
        };
        let mut raw = saved;
        // SAFETY: cfmakeraw changes the struct that it is given; tcsetattr reads it.
        unsafe {
            libc::cfmakeraw(&mut raw);
            raw.c_oflag |= libc::OPOST;
            if libc::tcsetattr(fd, libc::TCSANOW, &raw) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        *self::saved() = Some((fd, saved));
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Rows and columns of the terminal `fd`, or `None` when it is not one or does not say.
pub fn size(fd: RawFd) -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ fills a winsize; an all-zero one is valid as well.
    let size = unsafe {
        if libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr()) != 0 {
            return None;
        }
        size.assume_init()
    };
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
