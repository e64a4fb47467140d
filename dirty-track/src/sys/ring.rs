//! KVM's dirty rings: the capability, the memory that a vCPU's ring is shared through, and the reset.
//!
//! A ring is an array of (slot, page) entries in memory that KVM and user space share. KVM writes an entry and
//! then sets its DIRTY flag; user space reads it and then sets RESET in DIRTY's place; KVM_RESET_DIRTY_RINGS
//! write-protects the pages of such entries again and gives their places back. Each hand-over is a store with
//! release and a load with acquire order of the flags.
//!
//! Source: Linux, Documentation/virt/kvm/api.rst (KVM_CAP_DIRTY_LOG_RING) and virt/kvm/dirty_ring.c.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::{io, ptr, slice};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn,
};
use kvm_ioctls::{VcpuFd, VmFd};
use libc::{c_ulong, off_t};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use crate::addr::PAGE_SIZE;
use crate::sys::kvm;

const KVM_RESET_DIRTY_RINGS: c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xc7, 0);

// The number as a C compiler computes it from the header.
const _: () = assert!(KVM_RESET_DIRTY_RINGS == 0xaec7);

/// Flags of an entry: nothing (free, or KVM is writing it), dirty, or read and to be reset.
pub(crate) const DIRTY: u32 = 1;
/// See [`DIRTY`].
pub(crate) const RESET: u32 = 2;
const _: () = assert!(kvm_bindings::KVM_DIRTY_GFN_F_MASK == DIRTY | RESET);

/// Name of the capability, for errors.
pub(crate) const DIRTY_RING: &str = "KVM_CAP_DIRTY_LOG_RING";

/// Fewest entries of a ring: one page of memory. A host with hardware that logs by itself (PML) wants more.
pub const MIN_ENTRIES: u32 = PAGE_SIZE as u32 / size_of::<Entry>() as u32;

/// Most entries of a ring on this host; 0 when its KVM has no dirty rings (Linux before 5.11, or 32 bit).
pub fn max_entries(vm: &VmFd) -> u32 {
    let bytes = vm.check_extension_raw(capability(vm).into());
    u32::try_from(bytes).unwrap_or(0) / size_of::<Entry>() as u32
}

/// Of the two names of the capability the one that this host knows: since Linux 6.1 the one that asks for
/// acquire and release, which is what this module does in any case.
fn capability(vm: &VmFd) -> u32 {
    if vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()) > 0 {
        KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    } else {
        KVM_CAP_DIRTY_LOG_RING
    }
}

/// Gives each vCPU that `vm` will have a dirty ring of `entries`, in place of the slots' dirty bitmaps.
///
/// # Errors
/// `EINVAL` when `entries` is no power of two, is fewer than the host wants, when a vCPU exists, or when it has
/// been done already; `E2BIG` above [`max_entries`].
pub fn enable(vm: &VmFd, entries: u32) -> Result<(), errno::Error> {
    kvm::enable(vm, capability(vm), u64::from(entries) * size_of::<Entry>() as u64)
}

/// Write-protects the pages of all entries that were [taken](Ring::take), in all rings of `vm`, and gives
/// their places back to KVM. Returns how many entries that were.
///
/// Since Linux 6.17 KVM stops early when a signal is pending: then there are more, and it has to be done again.
/// But `kvm_dirty_ring_reset` gathers the pages of up to 64 entries, whose places are free already, to protect
/// them at once, and on its way out for the signal it forgets the last lot: pages that may be written from then
/// on without an entry. So signals wait meanwhile. A freezer or a debugger can still stop it early.
///
/// # Errors
/// `EINVAL` when the VM has no dirty rings.
pub fn reset(vm: &VmFd) -> Result<u32, errno::Error> {
    let _blocked = SignalsBlocked::new();
    // SAFETY: the ioctl takes no argument; it changes flags of entries, which are atomic on our side.
    let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS) };
    u32::try_from(ret).map_err(|_| errno::Error::last())
}

/// Keeps all signals from this thread, except those that cannot be kept, until it is dropped.
struct SignalsBlocked {
    former: libc::sigset_t,
}

impl SignalsBlocked {
    fn new() -> SignalsBlocked {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut former = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset initialises the set that pthread_sigmask reads; the latter writes `former`. Neither can
        // fail: the pointers are good, and so is the way to block.
        let former = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), former.as_mut_ptr());
            former.assume_init()
        };
        SignalsBlocked { former }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the mask was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.former, ptr::null_mut()) };
    }
}

/// What one entry of a ring says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyEntry {
    /// Number of the memslot as it was registered: slot id in the low 16 bits, address space in the high ones.
    pub slot: u32,
    /// The page, counted from the slot's start.
    pub page: u64,
}

/// The words of an entry: std's atomics in memory that KVM shares, or those of a model.
pub(crate) trait Words {
    /// The flags.
    fn flags(&self, order: Ordering) -> u32;
    /// Changes the flags.
    fn set_flags(&self, flags: u32, order: Ordering);
    /// The memslot's number, in no order of its own.
    fn slot(&self) -> u32;
    /// The page, in no order of its own.
    fn page(&self) -> u64;
}

/// An entry in shared memory, as `kvm_dirty_gfn`.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

impl Words for Entry {
    fn flags(&self, order: Ordering) -> u32 {
        self.flags.load(order)
    }

    fn set_flags(&self, flags: u32, order: Ordering) {
        self.flags.store(flags, order);
    }

    fn slot(&self) -> u32 {
        self.slot.load(Ordering::Relaxed)
    }

    fn page(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }
}

/// Whether `entry` is dirty and was not taken.
pub(crate) fn is_dirty(entry: &impl Words) -> bool {
    entry.flags(Ordering::Acquire) & DIRTY != 0
}

/// Takes `entry` if it is dirty: from then on it is KVM's to be reset. The order is checked by a model (`kvm_ring`).
pub(crate) fn take(entry: &impl Words) -> Option<DirtyEntry> {
    if !is_dirty(entry) {
        return None;
    }
    // KVM does not touch an entry between its two hand-overs, so these are the values that came with the flag. Read
    // before RESET is stored: from then on it may be another entry's.
    let taken = DirtyEntry { slot: entry.slot(), page: entry.page() };
    entry.set_flags(RESET, Ordering::Release);
    Some(taken)
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());

/// The dirty ring of one vCPU, mapped.
///
/// The mapping keeps the vCPU's ring alive: what it holds can be read when the vCPU's thread, and even its file
/// descriptor, are gone.
#[derive(Debug)]
pub struct Ring {
    entries: NonNull<Entry>,
    /// A power of two.
    len: u32,
    /// Entries taken since the ring was mapped, modulo 2^32: the next one to look at.
    next: u32,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread; all accesses to it are atomic.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of `vcpu`, which belongs to a VM for which [`enable`] was called with `entries`, and which
    /// nobody else reads the ring of.
    ///
    /// # Errors
    /// `EFAULT` when the vCPU has no ring of that size (where Linux can tell: since 5.14), and what `mmap` says.
    pub fn map(vcpu: &VcpuFd, entries: u32) -> Result<Ring, errno::Error> {
        if !entries.is_power_of_two() || entries < MIN_ENTRIES {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let offset = off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, bytes) = (vcpu.as_raw_fd(), Ring::bytes(entries));
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(errno::Error::last());
        }
        let entries_at = NonNull::new(at.cast()).ok_or(errno::Error::new(libc::ENOMEM))?;
        let ring = Ring { entries: entries_at, len: entries, next: 0 };
        // A ring that is shorter than its mapping would be a SIGBUS later. Asked for now, it is an error.
        // SAFETY: reading what was just mapped changes nothing; a failure is reported and not signalled.
        if unsafe { libc::madvise(at, bytes, libc::MADV_POPULATE_READ) } < 0 {
            let error = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT);
            // EINVAL: a kernel that does not know this advice. The VM was made for rings of this size.
            if error != libc::EINVAL {
                return Err(errno::Error::new(error));
            }
        }
        Ok(ring)
    }

    fn bytes(entries: u32) -> usize {
        entries as usize * size_of::<Entry>()
    }

    fn entry(&self, index: u32) -> &Entry {
        // SAFETY: the mapping has `len` entries, is page-aligned, and lives as long as `self`. KVM writes to it
        // meanwhile, which atomics allow.
        let entries = unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.len as usize) };
        &entries[(index & (self.len - 1)) as usize]
    }

    /// Entries that the ring has room for.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether no entry is waiting to be taken.
    pub fn is_empty(&self) -> bool {
        !self.holds(1)
    }

    /// Whether at least `entries` are waiting to be taken. It looks at one of them.
    pub fn holds(&self, entries: u32) -> bool {
        let last = self.next.wrapping_add(entries.wrapping_sub(1));
        entries <= self.len && is_dirty(self.entry(last))
    }

    /// Takes the oldest dirty entry that was not taken yet. Its page can be written without another entry
    /// until the next [`reset`] of the rings, and its place is occupied until then.
    pub fn take(&mut self) -> Option<DirtyEntry> {
        let taken = take(self.entry(self.next));
        self.next = self.next.wrapping_add(u32::from(taken.is_some()));
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), Ring::bytes(self.len)) };
    }
}
