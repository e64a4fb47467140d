//! KVM's binary statistics (KVM_GET_STATS_FD, Linux 5.14): counters of a VM or of a vCPU, by name.
//!
//! The file begins with a header, an id string and a table of descriptors that never change; only the block of
//! values does. So the table is read once, names are resolved to a [`StatId`] once, and a [`Stats::refresh`]
//! is a single `pread` into a buffer that is used again each time.
//!
//! What comes out of the file is checked, although it is the kernel's: a size that makes no sense is an error
//! and never an allocation or an index.
//!
//! Source: Linux, Documentation/virt/kvm/api.rst (KVM_GET_STATS_FD), include/uapi/linux/kvm.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::{VcpuFd, VmFd};
use libc::c_ulong;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

const KVM_GET_STATS_FD: c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xce, 0);
const _: () = assert!(KVM_GET_STATS_FD == 0xaece);

/// Bytes of `struct kvm_stats_header`.
const HEADER_LEN: usize = 24;
/// Bytes of `struct kvm_stats_desc` without the name that follows it.
const DESC_LEN: usize = 16;
/// More descriptors than any kernel has (there are about 70), so that a hostile count stays affordable.
const MAX_DESCS: u32 = 4096;
/// Likewise for the room that a name takes (48 bytes).
const MAX_NAME: u32 = 256;
/// Likewise for the block of values (about 4 KiB, most of it histograms).
const MAX_DATA: u64 = 1 << 20;

/// Why statistics could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// The host has no KVM_CAP_BINARY_STATS_FD, or is out of file descriptors.
    #[error("cannot open KVM's statistics: {0}")]
    Open(errno::Error),
    /// The file could not be read.
    #[error("cannot read KVM's statistics: {0}")]
    Read(#[from] io::Error),
    /// The file contradicts its own format.
    #[error("KVM's statistics are malformed: {0}")]
    Malformed(&'static str),
}

/// A counter that [`Stats::find`] has found. It belongs to the [`Stats`] that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatId {
    /// Index of the first value in the block of values.
    first: usize,
}

/// The statistics of one VM or vCPU.
#[derive(Debug)]
pub struct Stats<F = File> {
    source: F,
    layout: Layout,
    /// The block of values as it was read last.
    values: Vec<u8>,
}

impl Stats {
    /// Opens the statistics of a VM, such as `pages_4k`, `pages_2m` and `pages_1g` (the sizes of its
    /// second-level mappings, in numbers of mappings).
    ///
    /// # Errors
    /// [`StatsError`].
    pub fn of_vm(vm: &VmFd) -> Result<Stats, StatsError> {
        Stats::open(vm)
    }

    /// Opens the statistics of a vCPU, such as `pf_taken`, `pf_fixed`, `exits`. They stay readable when the
    /// vCPU's own file descriptor has gone to its thread.
    ///
    /// # Errors
    /// [`StatsError`].
    pub fn of_vcpu(vcpu: &VcpuFd) -> Result<Stats, StatsError> {
        Stats::open(vcpu)
    }

    fn open(fd: &impl AsRawFd) -> Result<Stats, StatsError> {
        // SAFETY: the ioctl takes no argument and touches no memory of ours.
        let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD) };
        if stats < 0 {
            return Err(StatsError::Open(errno::Error::last()));
        }
        // SAFETY: the kernel has just made this file descriptor for us; nobody else has it.
        Stats::new(unsafe { File::from_raw_fd(stats) })
    }
}

impl<F: FileExt> Stats<F> {
    fn new(source: F) -> Result<Stats<F>, StatsError> {
        let layout = Layout::read(&source)?;
        let values = vec![0; layout.data_len];
        let mut stats = Stats { source, layout, values };
        stats.refresh()?;
        Ok(stats)
    }

    /// The counter called `name`; `None` when this kernel has none. A histogram is found by its first bucket.
    pub fn find(&self, name: &str) -> Option<StatId> {
        self.layout.fields.iter().find(|field| field.name == name).map(|field| StatId { first: field.first })
    }

    /// All counters with their values as of the last [`refresh`](Stats::refresh).
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.layout.fields.iter().map(|field| (field.name.as_str(), self.at(field.first)))
    }

    /// Reads the values anew. Nothing is allocated.
    ///
    /// # Errors
    /// [`StatsError::Read`]; the values are not to be relied on then.
    pub fn refresh(&mut self) -> Result<(), StatsError> {
        Ok(self.source.read_exact_at(&mut self.values, self.layout.data_offset)?)
    }

    /// The value of a counter as of the last [`refresh`](Stats::refresh); 0 for an id of other statistics that
    /// these do not reach to.
    pub fn get(&self, id: StatId) -> u64 {
        self.at(id.first)
    }

    fn at(&self, index: usize) -> u64 {
        let (values, _) = self.values.as_chunks::<8>();
        values.get(index).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Where what is.
#[derive(Debug)]
struct Layout {
    fields: Vec<Field>,
    data_offset: u64,
    data_len: usize,
}

#[derive(Debug)]
struct Field {
    name: String,
    /// Index of its first value.
    first: usize,
}

impl Layout {
    fn read(source: &impl FileExt) -> Result<Layout, StatsError> {
        let mut header = [0; HEADER_LEN];
        source.read_exact_at(&mut header, 0)?;
        // flags, name_size, num_desc, id_offset, desc_offset, data_offset
        let [_, name_size, num_desc, _, desc_offset, data_offset] = words(&header);
        if name_size == 0 || name_size > MAX_NAME || num_desc > MAX_DESCS {
            return Err(StatsError::Malformed("the header's counts are out of range"));
        }
        let stride = DESC_LEN + name_size as usize;
        let mut table = vec![0; stride * num_desc as usize];
        source.read_exact_at(&mut table, u64::from(desc_offset))?;

        let mut fields = Vec::with_capacity(num_desc as usize);
        let mut data_len = 0;
        for desc in table.chunks_exact(stride) {
            let (fixed, name) = desc.split_at(DESC_LEN);
            let mut fixed_bytes = [0; DESC_LEN];
            fixed_bytes.copy_from_slice(fixed);
            // flags, exponent and size (16 bits each), offset, bucket_size
            let [_, exponent_and_size, offset, _] = words(&fixed_bytes);
            let size = u64::from(exponent_and_size >> 16);
            let end = u64::from(offset) + 8 * size;
            if size == 0 || offset % 8 != 0 || end > MAX_DATA {
                return Err(StatsError::Malformed("a descriptor points outside the values"));
            }
            let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
            let Ok(name) = std::str::from_utf8(&name[..len]) else {
                return Err(StatsError::Malformed("a counter's name is not text"));
            };
            data_len = data_len.max(end as usize);
            fields.push(Field { name: name.to_owned(), first: offset as usize / 8 });
        }
        Ok(Layout { fields, data_offset: u64::from(data_offset), data_len })
    }
}

/// `bytes` as little-endian 32-bit words.
fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u32; WORDS] {
    const { assert!(BYTES == 4 * WORDS) };
    let (chunks, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(chunks[index]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A statistics file in memory.
    #[derive(Clone, Debug)]
    struct Image(Vec<u8>);

    impl FileExt for Image {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or(&[]);
            let len = rest.len().min(buffer.len());
            buffer[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
    }

    /// Two counters and a histogram of three buckets, with names of up to 15 bytes.
    fn image() -> Image {
        let mut bytes = Vec::new();
        // flags, name_size, num_desc, id_offset, desc_offset, data_offset
        for word in [0u32, 16, 3, 24, 40, 40 + 3 * 32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(*b"kvm-1\0\0\0\0\0\0\0\0\0\0\0");
        for (name, size, offset) in
            [(*b"pages_4k", 1u16, 0u32), (*b"hist\0\0\0\0", 3, 16), (*b"pages_2m", 1, 8)]
        {
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(0u16.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(name);
            bytes.extend([0; 8]);
        }
        for value in [11u64, 22, 1, 2, 3] {
            bytes.extend(value.to_le_bytes());
        }
        Image(bytes)
    }

    #[test]
    fn names_lead_to_values() {
        let mut stats = Stats::new(image()).unwrap();
        assert_eq!(stats.iter().collect::<Vec<_>>(), [("pages_4k", 11), ("hist", 1), ("pages_2m", 22)]);
        let huge = stats.find("pages_2m").unwrap();
        assert_eq!(stats.find("pages_1g"), None);
        let at = stats.source.0.len() - 32;
        stats.source.0[at] = 23;
        assert_eq!(stats.get(huge), 22);
        stats.refresh().unwrap();
        assert_eq!(stats.get(huge), 23);
    }

    proptest! {
        /// Whatever a file says, it is read or refused; sizes in it are not believed.
        #[test]
        fn a_damaged_file_is_an_error_or_harmless(
            damage in prop::collection::vec((0..140usize, prop_oneof![Just(0u8), Just(0xff), any::<u8>()]), 1..6),
            len in 0..200usize,
        ) {
            let mut image = image();
            for (at, byte) in damage {
                if let Some(old) = image.0.get_mut(at) {
                    *old = byte;
                }
            }
            image.0.truncate(len);
            if let Ok(mut stats) = Stats::new(image) {
                prop_assert!(stats.values.len() as u64 <= MAX_DATA);
                stats.refresh().unwrap();
                prop_assert!(stats.iter().count() <= 3);
            }
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let with = |at: usize, word: u32| {
            let mut image = image();
            image.0[at..at + 4].copy_from_slice(&word.to_le_bytes());
            Stats::new(image).map(drop)
        };
        assert!(matches!(with(4, 0), Err(StatsError::Malformed(_))), "no room for names");
        assert!(matches!(with(4, u32::MAX), Err(StatsError::Malformed(_))), "too much room for names");
        assert!(matches!(with(8, u32::MAX), Err(StatsError::Malformed(_))), "too many descriptors");
        assert!(matches!(with(48, u32::MAX - 7), Err(StatsError::Malformed(_))), "values out of range");
        assert!(matches!(with(48, 4), Err(StatsError::Malformed(_))), "values not aligned");
        assert!(matches!(with(16, u32::MAX), Err(StatsError::Read(_))), "a table past the end");
        assert!(matches!(with(20, u32::MAX), Err(StatsError::Read(_))), "values past the end");
    }
}
