//! The bitmap as vm-memory sees it: vm-memory counts in bytes, and looks at parts of it through slices.

use std::fmt;
use std::ops::Range;

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::addr::{PAGE_SHIFT, PAGE_SIZE};
use crate::bitmap::DirtyBitmap;

/// The pages that have one of the `len` bytes from `offset` on. Bytes beyond the end of the address space do
/// not exist.
#[inline]
fn pages_of_bytes(offset: usize, len: usize) -> Range<usize> {
    if len == 0 {
        return 0..0;
    }
    offset >> PAGE_SHIFT..offset.saturating_add(len).div_ceil(PAGE_SIZE as usize)
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> DirtyBitmap {
        DirtyBitmap::new(len.div_ceil(PAGE_SIZE as usize))
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = SliceAt<'a, DirtyBitmap>;
}

/// Marks every write, from the first one on. Memory that is tracked only now and then is better served by
/// [`RegionBitmap`](crate::region::RegionBitmap).
impl Bitmap for DirtyBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.set_range(pages_of_bytes(offset, len));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.get(offset >> PAGE_SHIFT)
    }

    fn slice_at(&self, offset: usize) -> SliceAt<'_, DirtyBitmap> {
        SliceAt::new(self, offset)
    }
}

/// A vm-memory bitmap seen from some byte on.
///
/// vm-memory's own `RefSlice` wraps around at the end of the address space and then marks some other page;
/// here an offset that is too large stays too large, and marks nothing.
pub struct SliceAt<'a, B> {
    bitmap: &'a B,
    base: usize,
}

impl<'a, B> SliceAt<'a, B> {
    pub(crate) fn new(bitmap: &'a B, base: usize) -> SliceAt<'a, B> {
        SliceAt { bitmap, base }
    }
}

impl<B> Clone for SliceAt<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for SliceAt<'_, B> {}

impl<B> fmt::Debug for SliceAt<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SliceAt").field("base", &self.base).finish_non_exhaustive()
    }
}

impl<'a, B: Bitmap> WithBitmapSlice<'_> for SliceAt<'a, B> {
    type S = SliceAt<'a, B>;
}

impl<B: Bitmap> BitmapSlice for SliceAt<'_, B> {}

impl<'a, B: Bitmap> Bitmap for SliceAt<'a, B> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_dirty(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.dirty_at(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> SliceAt<'a, B> {
        SliceAt { bitmap: self.bitmap, base: self.base.saturating_add(offset) }
    }
}
