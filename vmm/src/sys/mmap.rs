//! Mappings with an alignment, as guest RAM needs them.
//!
//! The kernel maps a huge page only where virtual and physical addresses agree modulo its size, both in the
//! host's tables and in KVM's second-level table (which compares HVA with GPA, `kvm_alloc_memslot_metadata`
//! in arch/x86/kvm/x86.c). `mmap` promises 4 KiB, so we reserve more and trim.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

/// What a [`Mapping`] maps.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Private anonymous memory, not reserved against the commit limit.
    Anonymous,
    /// Private anonymous memory of the hugetlb pool with pages of `1 << shift` bytes; all of it is reserved
    /// at once, so that a fault cannot fail later.
    Hugetlb {
        /// 21 or 30.
        shift: u32,
    },
    /// The file from its start, shared.
    Shared(&'a File),
    /// The file from `offset` on, private: what is written is not the file's. Not reserved against the commit limit.
    Private {
        /// The file.
        file: &'a File,
        /// A multiple of 4096.
        offset: u64,
    },
}

/// Advice on huge pages for a range of a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugeAdvice {
    /// `MADV_HUGEPAGE`.
    Huge,
    /// `MADV_NOHUGEPAGE`.
    Small,
}

/// A readable and writable mapping that unmaps itself.
#[derive(Debug)]
pub struct Mapping {
    addr: *mut u8,
    len: usize,
}

// SAFETY: a Mapping is an address range that it owns; it has no thread affinity and hands out only an
// address, whose use is the business of whoever dereferences it.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the value.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at an address that is a multiple of `align` (a power of two, at least 4096).
    ///
    /// # Errors
    /// What `mmap` says: `ENOMEM` when the address space, the commit limit or the hugetlb pool is too small.
    pub fn new(len: usize, align: usize, backing: Backing<'_>) -> io::Result<Mapping> {
        debug_assert!(align.is_power_of_two() && align >= 4096);
        let reserve = len.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new PROT_NONE mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserve,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (base as usize).next_multiple_of(align);
        let offset = match backing {
            Backing::Private { offset, .. } => offset,
            _ => 0,
        };
        let (flags, fd) = match backing {
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
            Backing::Hugetlb { shift } => (
                libc::MAP_PRIVATE
                    | libc::MAP_ANONYMOUS
                    | libc::MAP_HUGETLB
                    | ((shift as i32) << libc::MAP_HUGE_SHIFT),
                -1,
            ),
            Backing::Shared(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            Backing::Private { file, .. } => (libc::MAP_PRIVATE | libc::MAP_NORESERVE, file.as_raw_fd()),
        };
        // SAFETY: MAP_FIXED replaces a part of the reservation that was just made and that nobody else knows.
        let addr = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                offset as libc::off_t,
            )
        };
        if addr == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: the whole reservation is ours, and the failed mmap may only have unmapped a part of it.
            unsafe { libc::munmap(base, reserve) };
            return Err(error);
        }
        let head = start - base as usize;
        let tail = reserve - head - len;
        // SAFETY: the ranges before and behind the mapping belong to the reservation and to nobody else. A
        // failure would leave address space reserved and do no harm.
        unsafe {
            if head > 0 {
                libc::munmap(base, head);
            }
            if tail > 0 {
                libc::munmap((start + len) as *mut libc::c_void, tail);
            }
        }
        Ok(Mapping { addr: addr.cast(), len })
    }

    /// The first byte.
    pub fn addr(&self) -> *mut u8 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping has no bytes (it always has).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Has all of it mapped, writable, as if each page had been written to (`MADV_POPULATE_WRITE`, Linux 5.14).
    ///
    /// # Errors
    /// What `madvise` says: `ENOMEM` or `EHWPOISON`; `EINVAL` before Linux 5.14.
    pub fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping, and populating it changes no contents.
        let result = unsafe { libc::madvise(self.addr.cast(), self.len, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Drops `offset..offset + len`, in whole pages, clipped to the mapping: private memory is missing then, and zero when it
    /// is touched.
    ///
    /// # Errors
    /// What `madvise` says.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        // SAFETY: the range lies inside our own mapping. Its contents change, as those of memory that a guest has do at
        // any time; nobody has references to them.
        let result = unsafe { libc::madvise(self.addr.add(offset).cast(), len, libc::MADV_DONTNEED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Advises the kernel on huge pages in `offset..offset + len`, clipped to the mapping.
    ///
    /// # Errors
    /// `EINVAL` on a kernel without transparent huge pages.
    pub fn advise(&self, offset: usize, len: usize, advice: HugeAdvice) -> io::Result<()> {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        if len == 0 {
            return Ok(());
        }
        let advice = match advice {
            HugeAdvice::Huge => libc::MADV_HUGEPAGE,
            HugeAdvice::Small => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: the range lies inside our own mapping, and this advice changes no contents.
        let result = unsafe { libc::madvise(self.addr.add(offset).cast(), len, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and is unmapped once, here.
        unsafe { libc::munmap(self.addr.cast(), self.len) };
    }
}

/// A view of `mapping` for vm-memory, with `bitmap` to mark what is written through it. The view does not own
/// the memory: keep the mapping for as long as the view.
///
/// # Errors
/// When vm-memory refuses the range.
pub fn view<B: vm_memory::bitmap::Bitmap>(
    mapping: &Mapping,
    bitmap: B,
) -> Result<MmapRegion<B>, MmapRegionError> {
    let builder = MmapRegionBuilder::new_with_bitmap(mapping.len, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE);
    // SAFETY: the pointer is that of a mapping of this length, readable and writable; `Ram` keeps it for as
    // long as the view.
    unsafe { builder.with_raw_mmap_pointer(mapping.addr) }.build()
}

/// Creates a memfd of `len` bytes; from the hugetlb pool when `huge_shift` is given.
///
/// # Errors
/// What `memfd_create` and `ftruncate` say.
pub fn memfd(name: &std::ffi::CStr, len: u64, huge_shift: Option<u32>) -> io::Result<File> {
    let flags =
        libc::MFD_CLOEXEC | huge_shift.map_or(0, |shift| libc::MFD_HUGETLB | (shift << libc::MFD_HUGE_SHIFT));
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just given us this descriptor; nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_aligned_as_asked_and_writable_to_the_last_byte() {
        for align in [4096, 2 << 20, 1 << 30] {
            let mapping = Mapping::new(3 << 20, align, Backing::Anonymous).unwrap();
            assert_eq!(mapping.addr() as usize % align, 0);
            // SAFETY: both bytes lie inside the mapping, which nobody else uses.
            unsafe {
                mapping.addr().write(1);
                mapping.addr().add(mapping.len() - 1).write(2);
            }
        }
    }

    #[test]
    fn too_much_is_an_error() {
        assert!(Mapping::new(usize::MAX - 4096, 4096, Backing::Anonymous).is_err());
        assert!(Mapping::new(1 << 50, 4096, Backing::Anonymous).is_err());
    }
}
