//! The mapping at an address: its page size, and whether it is shared.
//!
//! PROCMAP_QUERY (Linux 6.11) looks one mapping up. /proc/self/smaps says the same on every kernel, but walks the
//! page tables of the whole process for it.
//!
//! Source: Linux, include/uapi/linux/fs.h and fs/proc/task_mmu.c (`do_procmap_query`).

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use libc::c_ulong;
use linux_raw_sys::general::{procmap_query, procmap_query_flags};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

const PROCMAP_QUERY: c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, b'f' as u32, 17, size_of::<procmap_query>() as u32);

// The number as a C compiler computes it from the header.
const _: () = assert!(PROCMAP_QUERY == 0xc068_6611);

/// A mapping of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// Address after its last byte.
    pub end: u64,
    /// Bytes of a page: 4 KiB (transparent huge pages too), or the page size of its hugetlb pool.
    pub page_size: u64,
    /// Whether it was mapped `MAP_SHARED`.
    pub shared: bool,
}

/// The mapping that `address` is in.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] when nothing is mapped there; what opening or reading /proc says.
pub fn vma_at(address: u64) -> io::Result<Vma> {
    match query(address) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            find(BufReader::new(File::open("/proc/self/smaps")?), address)
        }
        other => other,
    }
}

fn query(address: u64) -> io::Result<Vma> {
    let maps = File::open("/proc/self/maps")?;
    let mut query = procmap_query {
        size: size_of::<procmap_query>() as u64,
        query_flags: 0,
        query_addr: address,
        vma_start: 0,
        vma_end: 0,
        vma_flags: 0,
        vma_page_size: 0,
        vma_offset: 0,
        inode: 0,
        dev_major: 0,
        dev_minor: 0,
        vma_name_size: 0,
        build_id_size: 0,
        vma_name_addr: 0,
        build_id_addr: 0,
    };
    // SAFETY: the ioctl reads and fills the struct, which outlives the call; with no room for a name and for a
    // build id it writes to nothing else.
    if unsafe { ioctl_with_mut_ref(&maps, PROCMAP_QUERY, &mut query) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let shared = query.vma_flags & procmap_query_flags::PROCMAP_QUERY_VMA_SHARED as u64 != 0;
    Ok(Vma { end: query.vma_end, page_size: query.vma_page_size, shared })
}

/// The mapping that `address` is in, by the text of an smaps file.
fn find(smaps: impl BufRead, address: u64) -> io::Result<Vma> {
    let mut found = None;
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or("");
        let range = first.split_once('-').and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        if let Some((start, end)) = range {
            let shared = words.next().is_some_and(|permissions| permissions.ends_with('s'));
            found = (start..end).contains(&address).then_some((end, shared));
        } else if let (Some((end, shared)), "KernelPageSize:") = (found, first) {
            let kib: u64 = words.next().and_then(|size| size.parse().ok()).unwrap_or(4);
            return Ok(Vma { end, page_size: kib << 10, shared });
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_found_both_ways() {
        let here = [0u8; 64];
        let address = here.as_ptr() as u64;
        let vma = vma_at(address).unwrap();
        assert!(vma.end > address && vma.page_size == 4096 && !vma.shared);
        let smaps = BufReader::new(File::open("/proc/self/smaps").unwrap());
        let slow = find(smaps, address).unwrap();
        assert_eq!((slow.page_size, slow.shared), (4096, false));
        assert!(slow.end > address);
        assert_eq!(vma_at(4096).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_mapping_is_the_one_that_the_address_is_in() {
        let smaps = "1000-2000 rw-p 0 00:00 0\nSize: 4 kB\nKernelPageSize:        4 kB\nVmFlags: rd wr\n\
                     200000-400000 rw-s 0 00:0f 5 /x (deleted)\nSize: 2048 kB\nKernelPageSize:     2048 kB\n";
        let at = |address| find(smaps.as_bytes(), address).ok();
        assert_eq!(at(0x1fff), Some(Vma { end: 0x2000, page_size: 4096, shared: false }));
        assert_eq!(at(0x200000), Some(Vma { end: 0x400000, page_size: 2 << 20, shared: true }));
        assert_eq!(at(0x2000), None);
        assert_eq!(at(0x400000), None);
    }
}
