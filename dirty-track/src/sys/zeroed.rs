//! Words that cost nothing until they are used, and then lie in huge pages.
//!
//! The bitmap of a guest of terabytes is hundreds of megabytes. Memory that the allocator has fresh from the
//! kernel is zero already, and writing the zeros once more would make the kernel provide all of it. And it is
//! read from one end to the other at each harvest: with small pages a quarter of that time goes into finding
//! out where they are.

use std::sync::atomic::AtomicU64;

/// Size of a huge page on x86-64, and on most others.
const HUGE_PAGE: usize = 2 << 20;

/// `len` words of zero.
pub(crate) fn zeroed_words(len: usize) -> Vec<u64> {
    let words = vec![0u64; len];
    advise_huge(&words);
    words
}

/// `len` atomic words of zero.
pub(crate) fn zeroed_atomics(len: usize) -> Box<[AtomicU64]> {
    // SAFETY: an AtomicU64 is a u64 in memory, and zero bytes are one.
    let words = unsafe { Box::<[AtomicU64]>::new_zeroed_slice(len).assume_init() };
    advise_huge(&words);
    words
}

/// Asks the kernel for huge pages where `words` fill whole ones. Should it have none to give, or none at all,
/// nothing is different but the speed.
fn advise_huge<T>(words: &[T]) {
    let start = (words.as_ptr() as usize).next_multiple_of(HUGE_PAGE);
    let end = (words.as_ptr() as usize + size_of_val(words)) / HUGE_PAGE * HUGE_PAGE;
    if start >= end {
        return;
    }
    // SAFETY: the range lies within `words`, and the advice changes neither contents nor access.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
}
