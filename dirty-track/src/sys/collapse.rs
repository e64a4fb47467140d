//! MADV_COLLAPSE: one huge page in place of 512 small ones, now.
//!
//! Source: Linux, include/uapi/asm-generic/mman-common.h and mm/khugepaged.c (`madvise_collapse`).

use vmm_sys_util::errno;

use super::kvm::check;
use crate::addr::BLOCK_SIZE;
use crate::tracker::Slot;

/// Collapses the block at `offset` of `slot`. One that is huge already is no error. The contents stay.
///
/// # Errors
/// `EINVAL` when the block is not aligned in this process, not in the slot, write-protected by userfaultfd, or of
/// memory that has no huge pages, or on a kernel before Linux 6.1; `ENOMEM` when there is no huge page; `EAGAIN` and
/// `EBUSY` when a page is held by somebody at this moment.
pub fn collapse(slot: &Slot, offset: u64) -> Result<(), errno::Error> {
    if offset.checked_add(BLOCK_SIZE).is_none_or(|end| end > slot.len()) {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let start = slot.hva() + offset;
    // SAFETY: the range is in the slot's mapping, which the slot keeps alive; the advice moves contents to other
    // physical memory and changes none.
    check(unsafe { libc::madvise(start as *mut libc::c_void, BLOCK_SIZE as usize, libc::MADV_COLLAPSE) })
}
