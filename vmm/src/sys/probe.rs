//! Questions to the kernel that only an ioctl answers.
//!
//! Source: Linux, include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h (PAGEMAP_SCAN).

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use libc::c_ulong;
use linux_raw_sys::general::{PAGE_IS_PRESENT, UFFD_API, pm_scan_arg, uffdio_api};
use linux_raw_sys::ioctl::UFFDIO_API;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_val};

const USERFAULTFD_IOC_NEW: c_ulong = ioctl_expr(_IOC_NONE, 0xaa, 0, 0);
const PAGEMAP_SCAN: c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, b'f' as u32, 16, size_of::<pm_scan_arg>() as u32);

// The numbers as a C compiler computes them from the headers.
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);

/// The feature bits (`UFFD_FEATURE_*`) of the kernel's userfaultfd, asked through /dev/userfaultfd or, where
/// that is absent or forbidden, through the system call.
///
/// # Errors
/// What the system call says: `EPERM` without CAP_SYS_PTRACE (unless vm.unprivileged_userfaultfd is set),
/// `ENOSYS` on a kernel without it.
pub fn userfaultfd_features() -> io::Result<u64> {
    let uffd = device_userfaultfd().or_else(|_| syscall_userfaultfd())?;
    let mut api = uffdio_api { api: UFFD_API.into(), features: 0, ioctls: 0 };
    // SAFETY: the ioctl reads and fills the struct, which outlives the call.
    match unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API.into(), &mut api) } {
        0 => Ok(api.features),
        _ => Err(io::Error::last_os_error()),
    }
}

fn device_userfaultfd() -> io::Result<OwnedFd> {
    let device = File::open("/dev/userfaultfd")?;
    // SAFETY: the ioctl's argument is a plain set of flags.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW, libc::O_CLOEXEC as c_ulong) };
    owned(fd.into())
}

fn syscall_userfaultfd() -> io::Result<OwnedFd> {
    // SAFETY: the system call's argument is a plain set of flags.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
}

/// A file descriptor that the kernel has just returned, or the error in `errno`.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: not negative means that the call which the caller made just now opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the kernel has the ioctl PAGEMAP_SCAN (Linux 6.7): asks it for one page of this process.
///
/// # Errors
/// `ENOTTY` on a kernel without it; what opening /proc/self/pagemap says.
pub fn pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let page = (&raw const pagemap as u64) & !0xfff;
    let mut scan = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start: page,
        end: page + 4096,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_PRESENT.into(),
        category_anyof_mask: 0,
        return_mask: 0,
    };
    // SAFETY: the ioctl reads and fills the struct, which outlives the call; with an empty vector and no
    // write-protect flag it writes to nothing else and changes no mapping.
    match unsafe { ioctl_with_mut_ref(&pagemap, PAGEMAP_SCAN, &mut scan) } {
        result if result >= 0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
