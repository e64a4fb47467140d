//! Requests of every kind, good and bad, against an image.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::GuestMemoryBackend;

use super::super::disk::DiskConfig;
use super::super::testing::*;
use super::*;

const HEADER: u64 = 0x7000;
const STATUS: u64 = 0x7100;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

struct Rig {
    driver: Driver,
    image: tempfile::NamedTempFile,
}

impl Rig {
    /// An image of 256 KiB whose 8-byte words count up.
    fn new(readonly: bool) -> Rig {
        let image = tempfile::NamedTempFile::new().unwrap();
        let words: Vec<u8> = (0..32768u64).flat_map(u64::to_le_bytes).collect();
        image.as_file().write_all_at(&words, 0).unwrap();
        let disk = Disk::open(&DiskConfig { path: image.path().to_owned(), readonly }).unwrap();
        let features = if readonly { 0 } else { FLUSH };
        Rig { driver: Driver::running(Blk::new(disk), features), image }
    }

    /// Sends a request with the buffers of `data` between header and status; returns status and used
    /// length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.driver.store(HEADER, kind);
        self.driver.store(HEADER + 4, 0xdead_beefu32);
        self.driver.store(HEADER + 8, sector);
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS, 1, true));
        self.send(&buffers)
    }

    fn send(&mut self, buffers: &[Buffer]) -> (u8, u32) {
        self.driver.store(STATUS, 0xeeu8);
        let head = self.driver.submit(buffers);
        self.driver.serve();
        let used = self.driver.used();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, u32::from(head));
        (self.driver.load(STATUS), used[0].1)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (i, &(sector, count, flags)) in (0..).zip(ranges) {
            self.driver.store(DATA + 16 * i, sector);
            self.driver.store(DATA + 16 * i + 8, count);
            self.driver.store(DATA + 16 * i + 12, flags);
        }
        self.request(kind, 0, &[(DATA, 16 * ranges.len() as u32, false)]).0
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }

    /// Space that the image takes on the host, in units of 512 bytes.
    fn blocks(&self) -> u64 {
        self.image.as_file().sync_all().unwrap();
        self.image.as_file().metadata().unwrap().blocks()
    }
}

#[test]
fn configuration() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.driver.get(8), VIRTIO_ID_BLOCK);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), 512, "capacity");
    assert_eq!(u32::from_le_bytes(rig.driver.config(12)), 510, "seg_max");
    assert_eq!(u32::from_le_bytes(rig.driver.config(20)), 512, "blk_size");
    assert_eq!(rig.driver.config(24), [3], "physical_block_exp");
    assert_eq!(u32::from_le_bytes(rig.driver.config(28)), 2048, "opt_io_size");
    assert_eq!(u32::from_le_bytes(rig.driver.config(36)), MAX_DISCARD_SECTORS);
    assert_eq!(rig.driver.config(56), [1], "write_zeroes_may_unmap");
    assert_eq!(rig.driver.config(60), [0; 4], "the end");
    let writable = rig.driver.get(0x10);
    let readonly = Rig::new(true).driver.get(0x10);
    for feature in [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
        assert_eq!((writable >> feature & 1, readonly >> feature & 1), (1, 0));
    }
    assert_eq!((writable >> VIRTIO_BLK_F_RO & 1, readonly >> VIRTIO_BLK_F_RO & 1), (0, 1));
}

#[test]
fn reads_scatter_and_writes_gather() {
    let mut rig = Rig::new(false);
    let disk = rig.disk();
    let read = [(DATA, 100, true), (DATA + 0x1001, 0, true), (DATA + 0x2003, 924, true)];
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, &read), (OK, 1025));
    assert_eq!(rig.driver.bytes(DATA, 101), [&disk[1536..1636], &[0]].concat());
    assert_eq!(rig.driver.bytes(DATA + 0x2003, 925), [&disk[1636..2560], &[0]].concat());

    rig.driver.put(DATA, &[0x11; 300]);
    rig.driver.put(DATA + 0x1000, &[0x22; 212]);
    let write = [(DATA, 300, false), (DATA + 0x1000, 212, false)];
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 511, &write), (OK, 1));
    let mut expected = disk;
    expected[511 * 512..511 * 512 + 300].fill(0x11);
    expected[511 * 512 + 300..].fill(0x22);
    assert!(rig.disk() == expected);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn any_layout_of_the_descriptors_will_do() {
    let mut rig = Rig::new(false);
    rig.driver.store(HEADER, VIRTIO_BLK_T_IN);
    rig.driver.store(HEADER + 8, 1u64);
    // The header in three pieces, data and status in one.
    let buffers = [(HEADER, 3, false), (HEADER + 3, 9, false), (HEADER + 12, 4, false), (DATA, 513, true)];
    assert_eq!(rig.send(&buffers), (0xee, 513));
    assert!(rig.driver.bytes(DATA, 512) == rig.disk()[512..1024]);
    assert_eq!(rig.driver.load::<u8>(DATA + 512), OK);
    // Header and data in one.
    rig.driver.store(DATA, VIRTIO_BLK_T_OUT);
    rig.driver.store(DATA + 8, 0u64);
    rig.driver.put(DATA + 16, &[9; 512]);
    assert_eq!(rig.send(&[(DATA, 528, false), (STATUS, 1, true)]), (OK, 1));
    assert!(rig.disk()[..512] == [9; 512]);
}

#[test]
fn what_is_out_of_bounds_fails_and_touches_nothing() {
    let mut rig = Rig::new(false);
    let before = rig.disk();
    for writing in [false, true] {
        let kind = if writing { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        for (sector, length) in [(512, 512), (511, 1024), (0, 511), (0, 513), (u64::MAX, 512), (1 << 55, 512)]
        {
            let (status, used) = rig.request(kind, sector, &[(DATA, length, !writing)]);
            assert_eq!((status, used), (IOERR, u32::from(writing)), "{sector} {length}");
        }
        for bad in [(RAM, 512, !writing), (RAM - 256, 512, !writing), (u64::MAX - 10, 512, !writing)] {
            let good = (DATA, 512, !writing);
            assert_eq!(rig.request(kind, 0, &[good, bad]).0, IOERR);
            assert_eq!(rig.request(kind, 0, &[bad, good]).0, IOERR);
        }
    }
    assert_eq!(rig.driver.bytes(DATA, 1024), [0; 1024]);
    assert!(rig.disk() == before);
    assert_eq!(rig.driver.status(), RUNNING);
}

#[test]
fn a_readonly_disk_is_not_changed() {
    let mut rig = Rig::new(true);
    let before = rig.disk();
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
    assert!(rig.disk() == before);
}

#[test]
fn headers_that_are_too_short_or_unknown() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.send(&[(HEADER, 15, false), (STATUS, 1, true)]), (IOERR, 1));
    assert_eq!(rig.send(&[(STATUS, 1, true)]), (IOERR, 1));
    assert_eq!(rig.send(&[(STATUS, 1, true), (HEADER, 16, false)]), (IOERR, 1));
    for kind in [2, 3, 9, 14, 16, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[]), (UNSUPP, 1));
    }
    assert_eq!(rig.driver.status(), RUNNING);
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_device() {
    for buffers in [
        &[(HEADER, 16, false)][..],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(HEADER, 16, false), (DATA, 512, true), (RAM, 1, true)],
    ] {
        let mut rig = Rig::new(false);
        rig.driver.submit(buffers);
        rig.driver.serve();
        assert!(rig.driver.used().is_empty());
        assert_eq!(rig.driver.status(), RUNNING | NEEDS_RESET);
    }
}

#[test]
fn a_status_may_lie_on_its_own_request() {
    let mut rig = Rig::new(false);
    rig.driver.store(HEADER, VIRTIO_BLK_T_FLUSH);
    rig.driver.submit(&[(HEADER, 16, false), (HEADER, 1, true)]);
    rig.driver.serve();
    assert_eq!(rig.driver.used().len(), 1);
    assert_eq!(rig.driver.load::<u8>(HEADER), OK);
    // The status in the descriptor table itself, over the address of the first descriptor.
    rig.driver.submit(&[(HEADER, 16, false), (DESC, 1, true)]);
    rig.driver.serve();
    assert_eq!(rig.driver.used().len(), 1);
}

#[test]
fn the_id_is_the_name_of_the_image() {
    let mut rig = Rig::new(false);
    let name = rig.image.path().file_name().unwrap().as_encoded_bytes().to_vec();
    let mut id = [0; 20];
    let length = name.len().min(20);
    id[..length].copy_from_slice(&name[..length]);
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(rig.driver.bytes(DATA, 20), id);
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 5, true)]), (OK, 6));
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 40, true)]), (OK, 20));
}

#[test]
fn discard_gives_space_back() {
    let mut rig = Rig::new(false);
    let before = rig.blocks();
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (16, 0, 0), (256, 256, 0)]), OK);
    let disk = rig.disk();
    assert_eq!(disk.len(), 256 << 10);
    assert!(disk[4096..8192].iter().all(|&b| b == 0));
    assert!(disk[128 << 10..].iter().all(|&b| b == 0));
    assert_eq!(disk[8192..8200], 1024u64.to_le_bytes());
    assert!(rig.blocks() <= before - 256, "a hole is where the range was");
}

#[test]
fn write_zeroes_zeroes_and_keeps_space_unless_told() {
    for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
        let mut rig = Rig::new(false);
        let before = rig.blocks();
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(7, 10, flags)]), OK);
        let disk = rig.disk();
        assert!(disk[7 * 512..17 * 512].iter().all(|&b| b == 0));
        assert_eq!(disk[7 * 512 - 8..7 * 512], 447u64.to_le_bytes());
        assert_eq!(disk[17 * 512..17 * 512 + 8], 1088u64.to_le_bytes());
        assert_eq!(rig.blocks() < before, flags != 0);
    }
}

#[test]
fn bad_ranges_are_refused_before_any_is_acted_on() {
    let mut rig = Rig::new(false);
    let before = rig.disk();
    let good = (8, 8, 0);
    for (bad, status) in [
        ((512, 1, 0), IOERR),
        ((0, 513, 0), IOERR),
        ((u64::MAX, 2, 0), IOERR),
        ((0, u32::MAX, 0), IOERR),
        ((0, 8, 1), UNSUPP),
        ((0, 8, 2), UNSUPP),
    ] {
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[good, bad]), status, "{bad:?}");
    }
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[good; 33]), IOERR, "too many");
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[good; 2]), IOERR, "too many");
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[]), IOERR);
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15, false)]).0, IOERR);
    assert!(rig.disk() == before);
}

#[test]
fn a_full_host_is_an_io_error_and_the_guest_goes_on() {
    // Writing to this device is what writing to a full file system is.
    let mut disk = Rig::new(false);
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let disk_on_full = Disk::for_test(full, "full.img", 512);
    disk.driver = Driver::running(Blk::new(disk_on_full), FLUSH);
    for _ in 0..2 {
        assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    }
    assert_eq!(disk.driver.status(), RUNNING);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn an_image_that_shrank_is_an_io_error() {
    let mut rig = Rig::new(false);
    rig.image.as_file().set_len(1000).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 1024, true)]), (IOERR, 0));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes() {
    let mut blk = Blk::new(Disk::for_test(tempfile::tempfile().unwrap(), "x", 1));
    blk.activate(V1);
    assert!(blk.writethrough);
    blk.activate(V1 | FLUSH);
    assert!(!blk.writethrough);
}

#[test]
fn what_the_device_writes_is_marked_dirty() {
    let mut rig = Rig::new(false);
    let region = rig.driver.mem.iter().next().unwrap();
    let bitmap = region.get_mmap().bitmap().clone();
    bitmap.start();
    let dirty = || {
        let mut pages = Vec::new();
        bitmap.drain(|word, bits| {
            pages.extend((0..64).filter(|i| bits >> i & 1 != 0).map(|i| word as u64 * 64 + i));
        });
        pages
    };
    let page = |address: u64| address >> 12;

    // The driver of this test writes through the same memory: its rings and header are marked as well.
    let read = [(DATA + 0xf00, 512, true), (DATA + 0x5000, 512, true)];
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &read).0, OK);
    let data = [page(DATA), page(DATA) + 1, page(DATA) + 5];
    let expected = |data: &[u64]| [&[page(DESC), page(AVAIL), page(USED), page(STATUS)], data].concat();
    assert_eq!(dirty(), expected(&data));

    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]).0, OK);
    assert_eq!(dirty(), expected(&[]), "what the device reads stays clean");

    rig.image.as_file().set_len(512).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 1024, true)]).0, IOERR);
    assert_eq!(dirty(), expected(&[page(DATA)]), "a read that failed has written, too");
}

#[test]
fn the_largest_request() {
    let mut rig = Rig::new(false);
    let disk = rig.disk();
    rig.driver.restart(512, FLUSH);
    // With header and status, as many as the queue has.
    let data: Vec<Buffer> = (0..510).map(|i| (DATA + 256 * i, 256, true)).collect();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 100, &data), (OK, 510 * 256 + 1));
    assert!(rig.driver.bytes(DATA, 510 * 256) == disk[100 * 512..355 * 512]);
}
