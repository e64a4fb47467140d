//! File and random-number I/O whose far end is guest memory.
//!
//! One system call moves data between a file and any number of guest buffers, without a copy in between.
//! Guest RAM may change under a call at any moment; that is the guest's affair, and it is why these take
//! [`VolatileSlice`]s and never make Rust references to the bytes.
//!
//! Every function that may have written guest memory marks the buffers it was given in the dirty bitmap
//! *after* the call, and marks all of them, whatever the call returned: an I/O error may come after bytes
//! have already been written, and a page too many is allowed where a page too few is not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most buffers that one call takes (`UIO_MAXIOV` of the kernel's `include/uapi/linux/uio.h`).
pub(super) const MAX_BUFFERS: usize = 1024;

/// Reads from `file` at byte `offset` into `buffers`, in order. Returns the number of bytes read: 0 at the
/// end of the file, and possibly fewer than there is room for. Buffers past the first 1024 are left alone.
///
/// # Errors
/// Those of `preadv(2)`; `offset` above `i64::MAX` is `EINVAL`.
pub(crate) fn read_at<B: BitmapSlice>(
    file: &File,
    buffers: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = to_off_t(offset)?;
    let buffers = &buffers[..buffers.len().min(MAX_BUFFERS)];
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let iov: Vec<_> =
        guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
    // SAFETY: every iovec covers exactly one slice of mapped guest memory, which the slices' lifetime and
    // the guards keep mapped during the call; `iov` has as many entries as are passed (at most 1024, so the
    // cast is lossless), and only the kernel writes through the pointers.
    let n = unsafe { libc::preadv(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset) };
    let result = usize::try_from(n).map_err(|_| io::Error::last_os_error());
    for buffer in buffers {
        buffer.bitmap().mark_dirty(0, buffer.len());
    }
    result
}

/// Writes `buffers`, in order, to `file` at byte `offset`. Returns the number of bytes written, possibly
/// fewer than there are. Buffers past the first 1024 are not written.
///
/// # Errors
/// Those of `pwritev(2)`; `offset` above `i64::MAX` is `EINVAL`.
pub(crate) fn write_at<B: BitmapSlice>(
    file: &File,
    buffers: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = to_off_t(offset)?;
    let guards: Vec<_> = buffers.iter().take(MAX_BUFFERS).map(VolatileSlice::ptr_guard).collect();
    let iov: Vec<_> = guards
        .iter()
        .map(|g| libc::iovec { iov_base: g.as_ptr().cast_mut().cast(), iov_len: g.len() })
        .collect();
    // SAFETY: as in `read_at`; pwritev only reads through the pointers.
    let n = unsafe { libc::pwritev(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes `head` and then `buffers` to `file`, which is a socket, all of them.
///
/// # Errors
/// Those of `writev(2)`. It is not known then how much was written.
pub(crate) fn send<B: BitmapSlice>(
    file: BorrowedFd<'_>,
    head: &[u8],
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<()> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let mut iov = Vec::with_capacity(1 + buffers.len());
    iov.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
    iov.extend(
        guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() }),
    );
    let mut rest = &mut iov[..];
    while !rest.is_empty() {
        let count = rest.len().min(MAX_BUFFERS) as libc::c_int;
        // SAFETY: every iovec covers `head`, which is borrowed, or a part of one slice of mapped guest memory, which the
        // slices' lifetime and the guards keep mapped during the call; writev only reads through the pointers.
        let written = unsafe { libc::writev(file.as_raw_fd(), rest.as_ptr(), count) };
        rest = behind(rest, moved(written)?);
    }
    Ok(())
}

/// Fills `buffers` with what comes from `file`, which is a socket.
///
/// # Errors
/// Those of `readv(2)`, and [`io::ErrorKind::UnexpectedEof`]. It is not known then how much was read.
pub(crate) fn receive<B: BitmapSlice>(
    file: BorrowedFd<'_>,
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<()> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut iov: Vec<_> =
        guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
    let mut rest = behind(&mut iov, 0);
    let mut outcome = Ok(());
    while !rest.is_empty() {
        let count = rest.len().min(MAX_BUFFERS) as libc::c_int;
        // SAFETY: as in `read_at`; what was read is taken off the front of the iovecs.
        match moved(unsafe { libc::readv(file.as_raw_fd(), rest.as_ptr(), count) }) {
            Ok(Some(0)) => outcome = Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => rest = behind(rest, read),
            Err(error) => outcome = Err(error),
        }
        if outcome.is_err() {
            break;
        }
    }
    for buffer in buffers {
        buffer.bitmap().mark_dirty(0, buffer.len());
    }
    outcome
}

/// What a system call has moved; `None`: it was interrupted before it had moved anything.
fn moved(result: libc::ssize_t) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            error => Err(error),
        },
    }
}

/// What of `iov` is left behind its first `bytes`.
pub(super) fn behind(iov: &mut [libc::iovec], bytes: impl Into<Option<usize>>) -> &mut [libc::iovec] {
    let (mut bytes, mut done) = (bytes.into().unwrap_or(0), 0);
    for part in iov.iter_mut() {
        let here = part.iov_len.min(bytes);
        part.iov_base = part.iov_base.wrapping_byte_add(here);
        part.iov_len -= here;
        bytes -= here;
        if part.iov_len > 0 {
            break;
        }
        done += 1;
    }
    &mut iov[done..]
}

/// Fills the start of `buffer` with random bytes from the kernel. Returns how many: possibly fewer than
/// there is room for.
///
/// # Errors
/// Those of `getrandom(2)`. It blocks only before the host's generator has been seeded, once per boot.
pub(crate) fn random<B: BitmapSlice>(buffer: &VolatileSlice<'_, B>) -> io::Result<usize> {
    let guard = buffer.ptr_guard_mut();
    // SAFETY: the pointer and length are those of one slice of mapped guest memory, kept mapped by the
    // slice's lifetime and the guard.
    let n = unsafe { libc::getrandom(guard.as_ptr().cast(), guard.len(), 0) };
    let result = usize::try_from(n).map_err(|_| io::Error::last_os_error());
    buffer.bitmap().mark_dirty(0, buffer.len());
    result
}

/// Whether all of `memory`, at most a page, is zeros at this moment.
pub(crate) fn is_zero<B: BitmapSlice>(memory: &VolatileSlice<'_, B>) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    let guard = memory.ptr_guard();
    let len = guard.len().min(ZEROS.len());
    let is_zero = |part: Range<usize>| {
        // SAFETY: both ranges have as many bytes that stay mapped during the call. The guest may write meanwhile; the C
        // library only compares, and what it answers was true of each byte at some moment of the call.
        unsafe { libc::memcmp(guard.as_ptr().add(part.start).cast(), ZEROS.as_ptr().cast(), part.len()) == 0 }
    };
    // What is not zeros mostly shows at an end or in the middle: then the rest need not be brought into the cache.
    let middle = len / 2;
    let probed = [0..PROBE.min(len), middle..len.min(middle + PROBE), len.saturating_sub(PROBE)..len];
    probed.into_iter().all(is_zero) && is_zero(0..len)
}

/// Bytes that are looked at first.
const PROBE: usize = 16;

fn to_off_t(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::memory::{MemoryConfig, Ram};

    #[test]
    fn one_bit_anywhere_is_not_zeros() {
        let ram = Ram::new(MemoryConfig { size: 16 << 20, ..MemoryConfig::default() }).unwrap();
        for len in [1, 7, 16, 17, 40, 4096] {
            let page = GuestAddress(4096);
            let memory = ram.mem().get_slice(page, len).unwrap();
            assert!(is_zero(&memory));
            for at in 0..len {
                let at = GuestAddress(4096 + at as u64);
                ram.mem().write_obj(0x10u8, at).unwrap();
                assert!(!is_zero(&memory), "{len} {at:?}");
                ram.mem().write_obj(0u8, at).unwrap();
            }
            ram.mem().write_obj(1u8, GuestAddress(4096 + len as u64)).unwrap();
            assert!(is_zero(&memory));
            ram.mem().write_obj(0u8, GuestAddress(4096 + len as u64)).unwrap();
        }
    }
}
