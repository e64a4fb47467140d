//! virtio-blk (virtio 1.2, section 5.2) on a raw image.
//!
//! Requests are answered one after the other with synchronous I/O, each read or write by one `preadv` or
//! `pwritev` between the image and the guest's own pages. What makes it fast where exits are slow is to have
//! few requests: the configuration asks the guest for large ones (see [`OPTIMAL_IO`]), and the worker takes
//! all that there are on one notification.
//!
//! Errors of the host become VIRTIO_BLK_S_IOERR; the guest goes on. The first of each kind is reported on
//! stderr with the name of the image.

use std::io;
use std::mem::offset_of;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    virtio_blk_config,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::{Disk, SECTOR};
use super::{BrokenChain, Buffers, Chain, VirtioDevice};

/// Twice what is usual, for the sake of [`MAX_SEGMENTS`]: a chain may be no longer than its queue.
const QUEUE_SIZE: u16 = 512;

/// Most data buffers of a request, besides header and status. Pages of a guest are often not adjacent, and
/// then each is a buffer: a queue of 256 would break 1 MiB of direct I/O, 256 pages, into two requests.
/// Linux's largest request by default is 1280 KiB (BLK_DEF_MAX_SECTORS), 320 pages.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// What we call the optimal size of an I/O, in bytes. Linux reads ahead twice this much on sequential access
/// (`blk_queue_io_opt` in block/blk-settings.c), so it is what decides how many exits a sequential read
/// takes; without it the guest asks for 128 KiB at a time.
pub const OPTIMAL_IO: u64 = 1 << 20;

/// Blocks of 2^3 sectors, the page of the host's page cache: smaller writes are read-modify-write there.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// Most sectors of one discard range (1 GiB), so that one request does not keep the device loop for long.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const MAX_DISCARD_SEGMENTS: u32 = 32;

/// Most sectors of one write-zeroes (32 MiB): less than a discard, because a host file system that cannot do
/// it makes us write zeroes.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
const MAX_WRITE_ZEROES_SEGMENTS: u32 = 1;

const CONFIG_LEN: usize = offset_of!(virtio_blk_config, max_secure_erase_sectors);

/// A disk.
pub struct Blk {
    disk: Disk,
    config: [u8; CONFIG_LEN],
    /// The driver does not flush: every write must be durable when it completes.
    writethrough: bool,
    /// Kinds of errors reported on stderr so far; each is reported once.
    reported: Vec<io::ErrorKind>,
}

/// The status of a request that failed.
struct Failed(u32);

const IOERR: Failed = Failed(VIRTIO_BLK_S_IOERR);
const UNSUPP: Failed = Failed(VIRTIO_BLK_S_UNSUPP);

/// The range of a discard or a write-zeroes (`struct virtio_blk_discard_write_zeroes`).
struct Range {
    sector: u64,
    count: u32,
    flags: u32,
}

impl Blk {
    /// A device for `disk`.
    pub fn new(disk: Disk) -> Blk {
        let config = config(&disk);
        Blk { disk, config, writethrough: false, reported: Vec::new() }
    }

    /// Answers a request, whose status byte has been split off. Returns the number of bytes written to
    /// `chain.writable`, from its start on.
    fn request(&mut self, chain: &mut Chain<'_>) -> Result<u64, Failed> {
        if chain.fault.is_some() {
            return Err(IOERR);
        }
        let kind = chain.readable.read_array().map(u32::from_le_bytes).ok_or(IOERR)?;
        let _reserved: [u8; 4] = chain.readable.read_array().ok_or(IOERR)?;
        let sector = chain.readable.read_array().map(u64::from_le_bytes).ok_or(IOERR)?;
        match kind {
            VIRTIO_BLK_T_IN => {
                let length = chain.writable.len();
                if !self.disk.contains(sector, length) {
                    return Err(IOERR);
                }
                let result = self.disk.read(sector, &mut chain.writable);
                self.check("read", result)?;
                Ok(length)
            }
            VIRTIO_BLK_T_OUT => {
                if self.disk.readonly() || !self.disk.contains(sector, chain.readable.len()) {
                    return Err(IOERR);
                }
                let mut result = self.disk.write(sector, &mut chain.readable);
                if self.writethrough && result.is_ok() {
                    result = self.disk.flush();
                }
                self.check("write", result)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                let result = self.disk.flush();
                self.check("flush", result)?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(chain.writable.write(&self.id()) as u64),
            VIRTIO_BLK_T_DISCARD => {
                let limits = (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS);
                for range in self.ranges(&mut chain.readable, limits, 0)? {
                    let result = self.disk.discard(range.sector, range.count);
                    self.check("discard in", result)?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let limits = (MAX_WRITE_ZEROES_SEGMENTS, MAX_WRITE_ZEROES_SECTORS);
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                for range in self.ranges(&mut chain.readable, limits, flags)? {
                    let unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                    let mut result = self.disk.write_zeroes(range.sector, range.count, unmap);
                    if self.writethrough && result.is_ok() {
                        result = self.disk.flush();
                    }
                    self.check("write zeroes to", result)?;
                }
                Ok(0)
            }
            _ => Err(UNSUPP),
        }
    }

    /// Reads and checks the ranges of a discard or write-zeroes, all before any is acted on.
    fn ranges(
        &self,
        data: &mut Buffers<'_>,
        (max_ranges, max_sectors): (u32, u32),
        known_flags: u32,
    ) -> Result<Vec<Range>, Failed> {
        const LEN: u64 = 16;
        if self.disk.readonly()
            || data.is_empty()
            || !data.len().is_multiple_of(LEN)
            || data.len() / LEN > u64::from(max_ranges)
        {
            return Err(IOERR);
        }
        let mut ranges = Vec::new();
        while !data.is_empty() {
            let range = Range {
                sector: data.read_array().map(u64::from_le_bytes).ok_or(IOERR)?,
                count: data.read_array().map(u32::from_le_bytes).ok_or(IOERR)?,
                flags: data.read_array().map(u32::from_le_bytes).ok_or(IOERR)?,
            };
            if range.flags & !known_flags != 0 {
                return Err(UNSUPP);
            }
            if range.count > max_sectors || !self.disk.contains(range.sector, u64::from(range.count) * SECTOR)
            {
                return Err(IOERR);
            }
            // fallocate does not take an empty range.
            if range.count > 0 {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    /// What the guest sees as the disk's serial number: the start of the image's file name.
    fn id(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = self.disk.path().file_name().unwrap_or_default().as_encoded_bytes();
        for (to, from) in id.iter_mut().zip(name) {
            *to = *from;
        }
        id
    }

    fn check(&mut self, action: &str, result: io::Result<()>) -> Result<(), Failed> {
        let Err(error) = result else { return Ok(()) };
        if !self.reported.contains(&error.kind()) {
            self.reported.push(error.kind());
            let path = self.disk.path().display();
            let hint = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room on the host",
                io::ErrorKind::UnexpectedEof => "; it has become shorter than it was when it was opened",
                _ => "",
            };
            eprintln!(
                "vmm: cannot {action} the disk image {path}: {error}{hint}; the guest gets an I/O error"
            );
        }
        Err(IOERR)
    }
}

impl VirtioDevice for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
        if self.disk.readonly() {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, features: u64) {
        self.writethrough = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn handle(&mut self, _queue: usize, mut chain: Chain<'_>) -> Result<u32, BrokenChain> {
        let Some(status) = chain.writable.pop_byte() else {
            return Err(BrokenChain("a block request has no room for its status"));
        };
        let room = chain.writable.len();
        let (code, written) = match self.request(&mut chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failed(code)) => (code, 0),
        };
        status.copy_from(&[code as u8]);
        // The status counts only if there is no gap before it. A chain is shorter than 4 GiB.
        Ok((written + u64::from(written == room)) as u32)
    }
}

fn config(disk: &Disk) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    macro_rules! set {
        ($field:ident, $type:ty, $value:expr) => {{
            let value: $type = $value;
            put(offset_of!(virtio_blk_config, $field), &value.to_le_bytes());
        }};
    }
    set!(capacity, u64, disk.sectors());
    set!(seg_max, u32, MAX_SEGMENTS);
    set!(blk_size, u32, SECTOR as u32);
    set!(physical_block_exp, u8, PHYSICAL_BLOCK_EXP);
    set!(min_io_size, u16, 1 << PHYSICAL_BLOCK_EXP);
    set!(opt_io_size, u32, (OPTIMAL_IO / SECTOR) as u32);
    set!(num_queues, u16, 1);
    set!(max_discard_sectors, u32, MAX_DISCARD_SECTORS);
    set!(max_discard_seg, u32, MAX_DISCARD_SEGMENTS);
    set!(discard_sector_alignment, u32, 1 << PHYSICAL_BLOCK_EXP);
    set!(max_write_zeroes_sectors, u32, MAX_WRITE_ZEROES_SECTORS);
    set!(max_write_zeroes_seg, u32, MAX_WRITE_ZEROES_SEGMENTS);
    set!(write_zeroes_may_unmap, u8, 1);
    config
}

#[cfg(test)]
mod tests;
