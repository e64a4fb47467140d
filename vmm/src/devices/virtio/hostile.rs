//! Property tests: whatever a guest writes into registers, queues and buffers, the device ends its work,
//! does not panic, writes nothing but what the guest offered, and does not change a read-only disk.

use std::io::{Read, Seek};

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;

use super::VirtioDevice;
use super::blk::Blk;
use super::disk::{Disk, DiskConfig};
use super::rng::Rng;
use super::testing::*;

const SECTORS: u64 = 64;

/// Which device is under attack.
#[derive(Clone, Copy, Debug)]
enum Target {
    Blk,
    ReadonlyBlk,
    Rng,
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![3 => Just(Target::Blk), 2 => Just(Target::ReadonlyBlk), 1 => Just(Target::Rng)]
}

/// The device and the image behind it, if it has one.
fn device(target: Target) -> (Box<dyn VirtioDevice>, tempfile::NamedTempFile) {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), vec![0x5a; (SECTORS * 512) as usize]).unwrap();
    let config =
        DiskConfig { path: image.path().to_owned(), readonly: matches!(target, Target::ReadonlyBlk) };
    let device: Box<dyn VirtioDevice> = match target {
        Target::Rng => Box::new(Rng),
        _ => Box::new(Blk::new(Disk::open(&config).unwrap())),
    };
    (device, image)
}

/// Panics if the image has another size than before, or, on a device that must not write it, other contents.
fn check_image(target: Target, image: tempfile::NamedTempFile) {
    let mut file = image.into_file();
    file.rewind().unwrap();
    let mut contents = Vec::new();
    file.read_to_end(&mut contents).unwrap();
    assert_eq!(contents.len() as u64, SECTORS * 512);
    if !matches!(target, Target::Blk) {
        assert!(contents.iter().all(|&b| b == 0x5a), "a disk that is not to be written has changed");
    }
}

/// Lengths that requests have, and lengths at the edge of what there is.
fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![1u32, 16, 512, 1024, 4096, 513]),
        1 => prop::sample::select(vec![0u32, 15, 17, u32::MAX, 1 << 31, RAM as u32]),
        1 => 0u32..70_000,
    ]
}

/// A descriptor of a data buffer: mostly within the pages for data, at times over their end or far away.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => (DATA..RAM).prop_map(|a| a & !15),
        1 => DATA..RAM,
        1 => prop::sample::select(vec![RAM - 1, RAM, u64::MAX, u64::MAX - 511, 1 << 40]),
    ];
    let flags = prop_oneof![6 => 0u16..4, 1 => any::<u16>().prop_map(|flags| flags & !INDIRECT_FLAG)];
    let next = prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    (address, length(), flags, next)
}

/// An indirect descriptor, which may point into the middle of the table or have a bad length.
fn indirect() -> impl Strategy<Value = Descriptor> {
    let length = prop_oneof![4 => (1u32..20).prop_map(|n| n * 16), 1 => 0u32..600];
    ((0u64..4).prop_map(|n| INDIRECT + 16 * n), length, Just(INDIRECT_FLAG), 0u16..16)
}

/// A table of 16 or more descriptors: requests as a driver would make them, of which some descriptors have
/// been replaced by anything. Also returns where the requests start.
fn table() -> impl Strategy<Value = (Vec<Descriptor>, Vec<u16>)> {
    let data = (DATA..RAM - 0x1000, prop::sample::select(vec![512u32, 1024, 256, 20]));
    let request =
        ((DATA..RAM).prop_map(|a| a & !15), prop::collection::vec(data, 0..3), any::<bool>(), DATA..RAM);
    let bad = prop_oneof![3 => descriptor(), 1 => indirect()];
    let requests = prop::collection::vec(request, 4..8);
    (requests, prop::collection::vec((0usize..16, bad), 0..4)).prop_map(|(requests, bad)| {
        let mut table = Vec::new();
        let mut heads = Vec::new();
        for (header, data, writing, status) in requests {
            let flags = if writing { 0 } else { WRITE };
            let buffers = std::iter::once((header, 16, 0))
                .chain(data.into_iter().map(|(address, length)| (address, length, flags)));
            heads.push(table.len() as u16);
            for (address, length, flags) in buffers {
                let next = table.len() as u16 + 1;
                table.push((address, length, flags | NEXT, next));
            }
            table.push((status, 1, WRITE, 0));
        }
        table.resize(table.len().max(16), (DATA, 1, 0, 0));
        for (index, descriptor) in bad {
            table[index] = descriptor;
        }
        (table, heads)
    })
}

/// What looks like the header of a block request.
fn header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![12 => prop::sample::select(vec![0u32, 0, 1, 1, 4, 8, 11, 13]), 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0..SECTORS + 2, 1 => SECTORS - 2..SECTORS + 2, 1 => any::<u64>()];
    (kind, any::<u32>(), sector).prop_map(|(kind, reserved, sector)| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&reserved.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    })
}

/// Fills the pages for data with `headers`, over and over, each as often as fits, at every 16 bytes.
fn scatter(driver: &Driver, headers: &[[u8; 16]]) {
    let mut at = DATA;
    for header in headers.iter().cycle() {
        if at >= RAM {
            break;
        }
        driver.put(at, header);
        at += 16;
    }
}

/// One thing that a guest does.
#[derive(Clone, Debug)]
enum Op {
    Write { register: u32, value: u32 },
    WriteOdd { offset: u64, data: Vec<u8> },
    Read { offset: u64, length: usize },
    Start { features: u64, size: u16, rings: [u64; 3] },
    Memory { address: u64, value: u32 },
    Describe { table: u64, index: u16, descriptor: Descriptor },
    Table { table: Vec<Descriptor>, heads: Vec<u16> },
    Offer { head: u16 },
    Serve,
}

fn op() -> impl Strategy<Value = Op> {
    let value = || {
        prop_oneof![
            4 => prop::sample::select(vec![0u32, 1, 3, 11, 15, 16, 64, 128, DESC as u32, AVAIL as u32, USED as u32, RAM as u32]),
            1 => any::<u32>(),
        ]
    };
    let ring = prop_oneof![
        6 => prop::sample::select(vec![DESC, AVAIL, USED, INDIRECT, DATA]),
        1 => prop::sample::select(vec![0, RAM - 64, RAM, u64::MAX - 15]),
        1 => any::<u64>(),
    ];
    let rings = prop_oneof![4 => Just([DESC, AVAIL, USED]), 1 => [ring.clone(), ring.clone(), ring]];
    let size = prop_oneof![6 => Just(16u16), 1 => prop::sample::select(vec![0, 1, 2, 3, 256, u16::MAX])];
    let features = prop_oneof![Just(0u64), Just(1 << 29), Just(1 << 9), any::<u64>()];
    let table = prop::sample::select(vec![DESC, INDIRECT, DATA]);
    let any_descriptor = prop_oneof![4 => descriptor(), 1 => indirect(), 1 => any::<Descriptor>()];
    prop_oneof![
        3 => (prop::sample::select((0u32..0x40).map(|r| r * 4).collect::<Vec<_>>()), value())
            .prop_map(|(register, value)| Op::Write { register, value }),
        1 => (any::<u64>(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Op::WriteOdd { offset: offset % 0x1100, data }),
        1 => (0u64..0x1100, 0usize..9).prop_map(|(offset, length)| Op::Read { offset, length }),
        2 => (features, size, rings).prop_map(|(features, size, rings)| Op::Start { features, size, rings }),
        2 => (0..RAM - 4, value()).prop_map(|(address, value)| Op::Memory { address, value }),
        6 => (table, 0u16..16, any_descriptor)
            .prop_map(|(table, index, descriptor)| Op::Describe { table, index, descriptor }),
        3 => self::table().prop_map(|(table, heads)| Op::Table { table, heads }),
        3 => prop_oneof![8 => 0u16..16, 1 => any::<u16>()].prop_map(|head| Op::Offer { head }),
        5 => Just(Op::Serve),
    ]
}

fn run(driver: &mut Driver, op: Op) {
    match op {
        Op::Write { register, value } => driver.set(register, value),
        Op::WriteOdd { offset, data } => driver.device.write(offset, &data),
        Op::Read { offset, length } => driver.device.read(offset, &mut vec![0; length]),
        Op::Start { features, size, rings: [desc, avail, used] } => {
            driver.set(VIRTIO_MMIO_STATUS, 0);
            driver.negotiate(features | V1);
            driver.set_up_queue(size, desc, avail, used);
            driver.set(VIRTIO_MMIO_STATUS, RUNNING);
        }
        Op::Memory { address, value } => driver.store(address, value),
        Op::Describe { table, index, descriptor } => driver.describe(table, index, descriptor),
        Op::Table { table, heads } => {
            for (index, &descriptor) in (0..16).zip(&table) {
                driver.describe(DESC, index, descriptor);
            }
            heads.into_iter().for_each(|head| driver.offer(head));
        }
        Op::Offer { head } => driver.offer(head),
        Op::Serve => driver.serve(),
    }
}

/// 400 cases, or as many as PROPTEST_CASES says if that is more.
fn cases() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.max(400), failure_persistence: None, ..config }
}

proptest! {
    #![proptest_config(cases())]

    /// Registers, rings and descriptors in any order and with any contents.
    #[test]
    fn no_sequence_of_accesses_harms_the_monitor(
        target in target(),
        headers in prop::collection::vec(header(), 1..20),
        started in any::<bool>(),
        ops in prop::collection::vec(op(), 1..80),
    ) {
        let (device, image) = device(target);
        let mut driver = Driver::boxed(device);
        if started {
            driver.start(0);
        }
        scatter(&driver, &headers);
        for op in ops {
            run(&mut driver, op);
        }
        // However it was left, a reset brings it back.
        driver.restart(16, 0);
        prop_assert_eq!(driver.status(), RUNNING);
        driver.store(DATA, 0u64);
        driver.store(DATA + 8, 0u64);
        driver.submit(&[(DATA, 16, false), (DATA + 512, 513, true)]);
        driver.serve();
        prop_assert_eq!(driver.used().len(), 1);
        prop_assert_eq!(driver.status(), RUNNING);
        check_image(target, image);
    }

    /// Sound rings, hostile descriptors: bytes change only in the used ring and where a device-writable
    /// descriptor is.
    #[test]
    fn only_what_was_offered_is_written(
        target in target(),
        event_idx in any::<bool>(),
        headers in prop::collection::vec(header(), 1..20),
        (mut table, heads) in table(),
        (indirect_table, _) in table(),
        odd_head in prop_oneof![4 => Just(None), 1 => (0u16..20).prop_map(Some)],
    ) {
        let (device, image) = device(target);
        let mut driver = Driver::boxed(device);
        driver.start(u64::from(event_idx) << 29);
        scatter(&driver, &headers);
        table.truncate(16);
        let mut writable = vec![(USED, 4096)];
        for (at, descriptors) in [(DESC, &table), (INDIRECT, &indirect_table)] {
            for (index, &descriptor) in (0..).zip(descriptors) {
                driver.describe(at, index, descriptor);
                if descriptor.2 & WRITE != 0 {
                    writable.push((descriptor.0, u64::from(descriptor.1)));
                }
            }
        }
        for head in heads.into_iter().chain(odd_head) {
            driver.offer(head);
        }
        let before = driver.bytes(0, RAM as usize);
        driver.serve();
        let after = driver.bytes(0, RAM as usize);
        for (address, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            prop_assert!(
                before == after || writable.iter().any(|&(from, length)| (from..from.saturating_add(length)).contains(&address)),
                "byte {address:#x} was not the device's to write"
            );
        }
        check_image(target, image);
    }
}
