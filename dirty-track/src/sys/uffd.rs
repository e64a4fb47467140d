//! userfaultfd: write-protection, and faults of pages that are missing.
//!
//! A range that is registered for write-protection can be protected page by page. In asynchronous mode
//! (`UFFD_FEATURE_WP_ASYNC`) the kernel itself lifts the protection of a page that is written, and
//! [PAGEMAP_SCAN](super::pagemap) tells which those are. In synchronous mode the writer sleeps, and somebody who
//! reads the descriptor lifts it.
//!
//! [`fill`] has what serves a fault of a page that is missing, and [`message`] what such faults look like.
//!
//! The descriptor is never opened with `UFFD_USER_MODE_ONLY`: most of a guest's faults are taken by KVM on its
//! behalf, in kernel mode, and would be answered with `SIGBUS`.
//!
//! Source: Linux, include/uapi/linux/userfaultfd.h, fs/userfaultfd.c, mm/userfaultfd.c and
//! Documentation/admin-guide/mm/userfaultfd.rst.

pub mod fill;
pub mod lookout;
pub mod message;

use std::fs::File;
use std::io::{self, Read};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use libc::c_ulong;
use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_MOVE,
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED, UFFD_PAGEFAULT_FLAG_WP, UFFDIO_REGISTER_MODE_WP, uffd_msg, uffdio_api,
    uffdio_range, uffdio_register, uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use self::lookout::Lookout;
use super::kvm::check;

const USERFAULTFD_IOC_NEW: c_ulong = ioctl_expr(_IOC_NONE, 0xaa, 0, 0);
/// `UFFDIO_WRITEPROTECT_MODE_WP`: an expression in the header, so bindgen leaves it out.
const MODE_WP: u64 = 1;

// The numbers as a C compiler computes them from the header.
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f && size_of::<uffdio_api>() == 24);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00 && size_of::<uffdio_register>() == 32);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01 && size_of::<uffdio_range>() == 16);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06 && size_of::<uffdio_writeprotect>() == 24);

const MESSAGE: usize = size_of::<uffd_msg>();
/// Where a page fault's message has its flags and its address.
const FLAGS_AT: usize = offset_of!(uffd_msg, arg);
const ADDRESS_AT: usize = FLAGS_AT + 8;
const _: () = assert!(MESSAGE == 32 && FLAGS_AT == 8 && offset_of!(uffd_msg, event) == 0);

/// How a write to a protected page goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The kernel lifts the protection, and the writer never sleeps. Linux 6.7.
    Async,
    /// The writer sleeps until somebody lifts the protection. Linux 6.4, before which memory that was never
    /// touched could not be protected.
    Sync,
    /// As `Sync`, and faults of missing pages are served; whoever drops memory waits until that was read. Linux 6.4,
    /// or 6.8 if pages are to be moved.
    Serve {
        /// [`Uffd::take`] is going to be used.
        moves: bool,
    },
}

impl Mode {
    /// Features that it cannot do without: bit, name, and the kernel that brought it.
    fn features(self) -> &'static [(u32, &'static str, &'static str)] {
        const ASYNC: (u32, &str, &str) = (UFFD_FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC", "6.7");
        const UNPOPULATED: (u32, &str, &str) =
            (UFFD_FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED", "6.4");
        const SHMEM: (u32, &str, &str) =
            (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "5.19");
        const FLAG: (u32, &str, &str) =
            (UFFD_FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP", "5.7");
        match self {
            Mode::Async => &[FLAG, SHMEM, UNPOPULATED, ASYNC],
            Mode::Sync => &[FLAG, SHMEM, UNPOPULATED],
            Mode::Serve { moves } => {
                const SERVE: [(u32, &str, &str); 11] = [
                    FLAG,
                    SHMEM,
                    UNPOPULATED,
                    (UFFD_FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM", "4.11"),
                    (UFFD_FEATURE_MISSING_HUGETLBFS, "UFFD_FEATURE_MISSING_HUGETLBFS", "4.11"),
                    (UFFD_FEATURE_MINOR_SHMEM, "UFFD_FEATURE_MINOR_SHMEM", "5.14"),
                    (UFFD_FEATURE_MINOR_HUGETLBFS, "UFFD_FEATURE_MINOR_HUGETLBFS", "5.13"),
                    (UFFD_FEATURE_EVENT_REMOVE, "UFFD_FEATURE_EVENT_REMOVE", "4.11"),
                    (UFFD_FEATURE_EVENT_UNMAP, "UFFD_FEATURE_EVENT_UNMAP", "4.12"),
                    (UFFD_FEATURE_EVENT_REMAP, "UFFD_FEATURE_EVENT_REMAP", "4.11"),
                    (UFFD_FEATURE_MOVE, "UFFD_FEATURE_MOVE", "6.8"),
                ];
                if moves { &SERVE } else { &SERVE[..SERVE.len() - 1] }
            }
        }
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// Not allowed.
    #[error(
        "no permission to use userfaultfd for faults of the kernel: run as root (CAP_SYS_PTRACE), set \
         `sysctl vm.unprivileged_userfaultfd=1`, or give yourself access to /dev/userfaultfd ({0})"
    )]
    Permission(io::Error),
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD): choose one of KVM's own logs instead")]
    Absent,
    /// The kernel is too old, or is no x86-64 one.
    #[error(
        "this kernel's userfaultfd has no {feature}, which came with Linux {since}: choose another tracker"
    )]
    Feature {
        /// Name of the feature, as in the kernel's header.
        feature: &'static str,
        /// The first kernel with it.
        since: &'static str,
    },
    /// Anything else.
    #[error("cannot open a userfaultfd: {0}")]
    Open(io::Error),
}

/// A userfaultfd. Closing it lifts every protection and wakes everybody who sleeps.
#[derive(Debug)]
pub struct Uffd(File);

impl Uffd {
    /// Opens one for `mode`, through /dev/userfaultfd or, where that is absent or forbidden, through the system
    /// call.
    ///
    /// # Errors
    /// See [`UffdError`].
    pub fn open(mode: Mode) -> Result<Uffd, UffdError> {
        let uffd = Uffd::new()?;
        let wanted = mode.features().iter().fold(0, |bits, (bit, ..)| bits | u64::from(*bit));
        match uffd.handshake(wanted) {
            Ok(_) => Ok(uffd),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                // EINVAL does not say which feature it is; a second descriptor may be asked what there is.
                let offered = Uffd::new()?.handshake(0).map_err(UffdError::Open)?;
                let missing = mode.features().iter().find(|(bit, ..)| offered & u64::from(*bit) == 0);
                Err(missing.map_or(UffdError::Open(error), |&(_, feature, since)| UffdError::Feature {
                    feature,
                    since,
                }))
            }
            Err(error) => Err(UffdError::Open(error)),
        }
    }

    fn new() -> Result<Uffd, UffdError> {
        let fd =
            through_device().or_else(|_| through_syscall()).map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => UffdError::Permission(error),
                Some(libc::ENOSYS) => UffdError::Absent,
                _ => UffdError::Open(error),
            })?;
        Ok(Uffd(fd.into()))
    }

    /// Enables `features`, and returns what the kernel has.
    fn handshake(&self, features: u64) -> io::Result<u64> {
        let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call.
        match unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_API.into(), &mut api) } {
            0 => Ok(api.features),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Registers `len` bytes from `start` for write-protection. Nothing is protected by that.
    ///
    /// # Errors
    /// `EINVAL` when something is not mapped there, or by something that cannot be protected (a file on a disk);
    /// `EBUSY` when another userfaultfd has a part of it.
    pub fn register(&self, start: u64, len: u64) -> Result<(), errno::Error> {
        self.register_for(start, len, UFFDIO_REGISTER_MODE_WP)
    }

    fn register_for(&self, start: u64, len: u64, mode: u32) -> Result<(), errno::Error> {
        let range = uffdio_range { start, len };
        let mut register = uffdio_register { range, mode: mode.into(), ioctls: 0 };
        // SAFETY: the ioctl reads and fills the struct, which outlives the call. It marks mappings of this
        // process and changes neither their contents nor who may access them.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER.into(), &mut register) })
    }

    /// Undoes [`register`](Uffd::register), and lifts every protection in the range. It does not
    /// [wake](Uffd::wake) those who sleep.
    ///
    /// # Errors
    /// `EINVAL` when something else is mapped there now.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), errno::Error> {
        let range = uffdio_range { start, len };
        // SAFETY: the ioctl reads the struct, which outlives the call, and changes no contents of memory.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_UNREGISTER.into(), &range) })
    }

    /// Protects `len` bytes from `start`, touched before or not. When it returns, no write to them goes
    /// unnoticed, through KVM's second-level tables neither: its MMU notifier has zapped the whole range there.
    ///
    /// # Errors
    /// `ENOENT` when the range is not registered, `EINVAL` when it is no multiple of the backing's page size,
    /// `EAGAIN` when mappings change at this moment, `ENOMEM` when there is no memory for page tables.
    pub fn protect(&self, start: u64, len: u64) -> Result<(), errno::Error> {
        self.write_protect(start, len, MODE_WP)
    }

    /// Lifts the protection of `len` bytes from `start`, and wakes who sleeps there.
    ///
    /// # Errors
    /// As for [`protect`](Uffd::protect).
    pub fn unprotect(&self, start: u64, len: u64) -> Result<(), errno::Error> {
        self.write_protect(start, len, 0)
    }

    fn write_protect(&self, start: u64, len: u64, mode: u64) -> Result<(), errno::Error> {
        let mut change = uffdio_writeprotect { range: uffdio_range { start, len }, mode };
        // SAFETY: the ioctl reads the struct, which outlives the call. Protection makes writers wait, or take a
        // fault; it changes no contents of memory.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_WRITEPROTECT.into(), &mut change) })
    }

    /// Wakes everybody who sleeps on `len` bytes from `start`. Whoever finds the page still protected reports
    /// it anew and sleeps again.
    ///
    /// # Errors
    /// `EINVAL` when the range is empty or no multiple of 4 KiB.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), errno::Error> {
        let range = uffdio_range { start, len };
        // SAFETY: the ioctl reads the struct, which outlives the call, and touches no memory.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE.into(), &range) })
    }

    /// Waits until somebody waits for a page, or until `stop` is signalled; that wins. `lookout` says how long to look
    /// before going to sleep, and learns from it.
    ///
    /// # Errors
    /// What `poll` says. `EINTR` is not one of them.
    pub fn wait(&self, stop: &EventFd, lookout: &mut Lookout) -> io::Result<Wait> {
        let began = Instant::now();
        let (found, contended) = lookout.look(began, || self.poll(stop, 0).transpose());
        let outcome = match found {
            Some(outcome) => outcome,
            None => loop {
                if let Some(outcome) = self.poll(stop, -1).transpose() {
                    break outcome;
                }
            },
        };
        lookout.came(began.elapsed(), contended);
        outcome
    }

    /// What there is within `timeout` milliseconds (-1: for ever), unless a signal comes in between.
    fn poll(&self, stop: &EventFd, timeout: libc::c_int) -> io::Result<Option<Wait>> {
        let event = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [event(stop.as_raw_fd()), event(self.0.as_raw_fd())];
        // SAFETY: the array outlives the call and has as many entries as the call is told.
        match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } {
            0 => Ok(None),
            1.. => Ok(Some(if fds[0].revents != 0 { Wait::Stopped } else { Wait::Faults })),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Takes the address of one write that waits, if there is any. It is handed out once.
    ///
    /// Not several at a time, although there may be: whoever waits for the same page is woken with the first, and a
    /// message about it that was taken already would be stale by the time it is looked at.
    ///
    /// # Errors
    /// What `read` says; nothing to read is no error.
    pub fn fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        match (&self.0).read(&mut message) {
            Ok(MESSAGE) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let field = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| message[at + byte]));
        let protected = field(FLAGS_AT) & u64::from(UFFD_PAGEFAULT_FLAG_WP) != 0;
        let fault = u32::from(message[0]) == UFFD_EVENT_PAGEFAULT && protected;
        Ok(fault.then(|| field(ADDRESS_AT)))
    }
}

/// Why [`Uffd::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Somebody waits for a page.
    Faults,
    /// The event was signalled.
    Stopped,
}

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

fn through_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the ioctl's argument is a plain set of flags.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW, FLAGS as c_ulong) };
    owned(fd.into())
}

fn through_syscall() -> io::Result<OwnedFd> {
    // SAFETY: the system call's argument is a plain set of flags.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })
}

/// A file descriptor that the kernel has just returned, or the error in `errno`.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: not negative means that the call which the caller made just now opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
