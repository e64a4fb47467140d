//! MADV_DONTNEED of shared memory: what is mapped is not any more, and what is in it stays.
//!
//! Source: Linux, mm/madvise.c (`madvise_dontneed_single_vma`) and mm/memory.c (`zap_pte_range`); madvise(2).

use std::io;
use std::ops::Range;

use vmm_sys_util::errno;

use super::kvm::check;
use super::maps;
use crate::addr::{PAGE_SHIFT, PAGE_SIZE};
use crate::tracker::Slot;

/// A slot all of which is shared memory in small pages, of a memfd or a file: what is unmapped there is not lost.
#[derive(Debug)]
pub struct SharedSlot(Slot);

impl SharedSlot {
    /// Looks how `slot` is mapped; `None` when some of it is private, or of a hugetlb pool.
    ///
    /// # Errors
    /// What reading /proc says.
    pub fn new(slot: Slot) -> io::Result<Option<SharedSlot>> {
        let mut at = slot.hva();
        while at < slot.hva() + slot.len() {
            let vma = maps::vma_at(at)?;
            if !vma.shared || vma.page_size != PAGE_SIZE {
                return Ok(None);
            }
            at = vma.end;
        }
        Ok(Some(SharedSlot(slot)))
    }

    /// The slot.
    pub fn slot(&self) -> &Slot {
        &self.0
    }

    /// Unmaps `pages`, counted from the slot's start, from this process and, by its MMU notifier, from KVM's guests.
    /// The next access to one maps it again, with what is in it.
    ///
    /// # Errors
    /// `EINVAL` for pages beyond the slot, or memory that is locked.
    pub fn unmap(&self, pages: Range<usize>) -> Result<(), errno::Error> {
        if pages.start > pages.end || pages.end as u64 > self.0.frames().pages {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let start = self.0.hva() + ((pages.start as u64) << PAGE_SHIFT);
        // SAFETY: the range is in the slot's mapping, which the slot keeps alive and as it was; all of it is shared, so
        // the pages stay in the file, and no contents change.
        check(unsafe {
            libc::madvise(start as *mut libc::c_void, pages.len() << PAGE_SHIFT, libc::MADV_DONTNEED)
        })
    }
}
