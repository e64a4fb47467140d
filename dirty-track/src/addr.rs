//! Guest-physical addresses, frame numbers and ranges of frames.
//!
//! An address in bytes and a frame number are both 64-bit integers, and mixing them up is a silent factor of
//! 4096. Here each is a type of its own, and every conversion is a named one.

use std::fmt;

/// Bytes of a page, the smallest unit that any tracker reports. x86-64 has no smaller one.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// [`PAGE_SIZE`] as the length of an array.
pub const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Bytes of a *block*: the 2 MiB that one huge mapping covers.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Pages (*leaves*) of a block.
pub const LEAVES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE_SIZE;

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The frame that holds this address.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// Whether the address is the first one of a page of `size`.
    pub const fn is_aligned(self, size: PageSize) -> bool {
        self.0.is_multiple_of(size.bytes())
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A guest frame number: a guest-physical address in units of [`PAGE_SIZE`].
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// Address of the frame's first byte. Frames at or above 2^52 have none; KVM knows no such memslot, and
    /// their address is cut off here as it is in hardware.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }

    /// Number of the block (guest-physical, counted from address 0) that the frame is a leaf of.
    pub const fn block(self) -> u64 {
        self.0 / LEAVES_PER_BLOCK
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gfn({:#x})", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The page sizes of x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "log", derive(serde::Serialize, serde::Deserialize))]
pub enum PageSize {
    /// 4 KiB: a leaf.
    #[cfg_attr(feature = "log", serde(rename = "4k"))]
    K4,
    /// 2 MiB: a block.
    #[cfg_attr(feature = "log", serde(rename = "2m"))]
    M2,
    /// 1 GiB.
    #[cfg_attr(feature = "log", serde(rename = "1g"))]
    G1,
}

impl PageSize {
    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::K4 => PAGE_SIZE,
            PageSize::M2 => BLOCK_SIZE,
            PageSize::G1 => 1 << 30,
        }
    }

    /// Size in pages of 4 KiB.
    pub const fn leaves(self) -> u64 {
        self.bytes() / PAGE_SIZE
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageSize::K4 => "4K",
            PageSize::M2 => "2M",
            PageSize::G1 => "1G",
        })
    }
}

/// A run of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First frame.
    pub start: Gfn,
    /// Number of frames.
    pub pages: u64,
}

impl PageRange {
    /// First frame after the range.
    pub const fn end(&self) -> Gfn {
        Gfn(self.start.0 + self.pages)
    }

    /// Whether `gfn` is one of the range's frames.
    pub const fn contains(&self, gfn: Gfn) -> bool {
        gfn.0 >= self.start.0 && gfn.0 - self.start.0 < self.pages
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }

    /// The range's frames in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + use<> {
        (self.start.0..self.end().0).map(Gfn)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{}", self.start.0, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_frames_convert() {
        assert_eq!(Gpa(0x1fff).gfn(), Gfn(1));
        assert_eq!(Gfn(1).gpa(), Gpa(0x1000));
        assert_eq!(Gfn(511).block(), 0);
        assert_eq!(Gfn(512).block(), 1);
        assert!(Gpa(4 << 20).is_aligned(PageSize::M2));
        assert!(!Gpa(5 << 20).is_aligned(PageSize::M2));
        assert_eq!(PageSize::G1.leaves(), 512 * PageSize::M2.leaves());
    }

    #[test]
    fn a_range_holds_its_first_frame_and_not_its_end() {
        let range = PageRange { start: Gfn(10), pages: 3 };
        assert!(!range.contains(Gfn(9)));
        assert!(range.contains(Gfn(10)));
        assert!(range.contains(Gfn(12)));
        assert!(!range.contains(Gfn(13)));
        assert_eq!(range.iter().collect::<Vec<_>>(), [Gfn(10), Gfn(11), Gfn(12)]);
        assert_eq!(range.bytes(), 3 * 4096);
    }
}
