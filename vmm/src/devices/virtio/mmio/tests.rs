//! The register file and the worker behind it, driven by a test driver.

use super::super::testing::*;
use super::super::{BrokenChain, Chain, VirtioDevice};
use super::*;

/// Two queues, 6 bytes of configuration, one feature; fills each writable buffer with the number of its
/// queue plus one.
struct Filler;

impl VirtioDevice for Filler {
    fn id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6]
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn activate(&mut self, _features: u64) {}
    fn handle(&mut self, queue: usize, mut chain: Chain<'_>) -> Result<u32, BrokenChain> {
        let room = chain.writable.len() as usize;
        Ok(chain.writable.write(&vec![queue as u8 + 1; room]) as u32)
    }
}

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

#[test]
fn identity_and_configuration() {
    let mut driver = Driver::new(Filler);
    assert_eq!(driver.get(0x0), 0x7472_6976);
    assert_eq!(driver.get(0x4), 2);
    assert_eq!(driver.get(0x8), 42);
    assert_eq!(driver.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.get(VIRTIO_MMIO_CONFIG_GENERATION), 0);
    assert_eq!(driver.config::<1>(0), [1]);
    assert_eq!(driver.config::<2>(1), [2, 3]);
    assert_eq!(driver.config::<8>(0), [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(driver.config::<4>(0xe00), [0; 4]);
    let mut out = [7; 4];
    driver.device.read(u64::MAX, &mut out);
    assert_eq!(out, [0; 4]);
    driver.device.write(u64::MAX, &[1; 4]);
}

#[test]
fn registers_are_read_and_written_in_32_bits_only() {
    let mut driver = Driver::new(Filler);
    for width in [0, 1, 2, 3, 8] {
        let mut data = vec![0xaa; width];
        driver.device.read(0, &mut data);
        assert_eq!(data, vec![0; width]);
        driver.device.write(u64::from(VIRTIO_MMIO_STATUS), &vec![1; width]);
        assert_eq!(driver.status(), 0);
    }
    let mut data = [0xaa; 4];
    driver.device.read(2, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn features_are_offered_in_two_halves() {
    let mut driver = Driver::new(Filler);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1 << 3 | 1 << 28 | 1 << 29);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn features_ok_needs_version_1_and_only_what_was_offered() {
    for (features, ok) in [(0, false), (1 << 3, false), (V1, true), (V1 | 1 << 3, true), (V1 | 2, false)] {
        let mut driver = Driver::new(Filler);
        driver.negotiate(features);
        assert_eq!(driver.status() == NEGOTIATED, ok, "{features:#x}");
        driver.set(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(driver.status() & 4 != 0, ok, "DRIVER_OK only after FEATURES_OK");
    }
}

#[test]
fn features_are_fixed_after_features_ok() {
    let mut driver = Driver::new(Filler);
    driver.negotiate(V1);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, 1 << 29);
    assert_eq!(driver.device.driver_features, V1);
}

#[test]
fn status_moves_forward_or_to_zero() {
    let mut driver = Driver::new(Filler);
    driver.set(VIRTIO_MMIO_STATUS, 2);
    assert_eq!(driver.status(), 0, "DRIVER without ACKNOWLEDGE");
    driver.negotiate(V1);
    driver.set(VIRTIO_MMIO_STATUS, 1);
    assert_eq!(driver.status(), NEGOTIATED, "bits cannot be cleared");
    driver.set(VIRTIO_MMIO_STATUS, NEGOTIATED | NEEDS_RESET);
    assert_eq!(driver.status(), NEGOTIATED, "NEEDS_RESET is not the driver's");
    driver.set(VIRTIO_MMIO_STATUS, NEGOTIATED | 0x80);
    driver.set(VIRTIO_MMIO_STATUS, RUNNING | 0x80);
    assert_eq!(driver.status(), NEGOTIATED | 0x80, "nothing follows FAILED");
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.status(), 0);
    driver.start(0);
    assert_eq!(driver.status(), RUNNING);
}

#[test]
fn queue_registers() {
    let mut driver = Driver::new(Filler);
    for (queue, max) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), max);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "too early");
    driver.negotiate(V1);
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 7);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "no such queue");
    driver.set_up_queue(16, DESC, AVAIL, USED);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 1);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 3);
    driver.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 3);
    driver.set(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.status(), RUNNING, "a queue that is ready does not change any more");
}

#[test]
fn a_request_is_answered_with_one_interrupt() {
    let mut driver = Driver::running(Filler, 0);
    let head = driver.submit(&[(DATA, 8, false), (DATA + 8, 3, true), (DATA + 100, 5, true)]);
    driver.kicked(0);
    driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert!(driver.kicked(0), "QueueNotify signals the queue's eventfd");
    driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 9);
    driver.serve();
    assert_eq!(driver.used(), [(u32::from(head), 8)]);
    assert_eq!(driver.bytes(DATA + 8, 4), [1, 1, 1, 0]);
    assert_eq!(driver.bytes(DATA + 100, 6), [1, 1, 1, 1, 1, 0]);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.serve();
    assert_eq!(driver.interrupts(), 0, "nothing to do, nothing to tell");
}

#[test]
fn indices_wrap() {
    let mut driver = Driver::running(Filler, EVENT_IDX);
    for i in 0..70_000u32 {
        let head = driver.submit(&[(DATA, 4, true)]);
        driver.store(AVAIL + 4 + 2 * 16, i as u16);
        driver.serve();
        assert_eq!(driver.used(), [(u32::from(head), 4)]);
        assert_eq!(driver.interrupts(), 1, "request {i}");
    }
}

#[test]
fn a_burst_takes_one_interrupt_and_no_notification() {
    for features in [0, EVENT_IDX] {
        let mut driver = Driver::running(Filler, features);
        for _ in 0..10 {
            driver.submit(&[(DATA, 4, true)]);
        }
        driver.serve();
        assert_eq!(driver.used().len(), 10);
        assert_eq!(driver.interrupts(), 1);
    }
}

#[test]
fn event_idx_says_when_to_interrupt_and_when_to_notify() {
    let mut driver = Driver::running(Filler, EVENT_IDX);
    driver.store(AVAIL + 4 + 2 * 16, 2u16);
    for i in 0u16..5 {
        driver.submit(&[(DATA, 4, true)]);
        driver.serve();
        assert_eq!(driver.interrupts(), u64::from(i == 2), "only the used entry that was asked for");
        let avail_event: u16 = driver.load(USED + 4 + 8 * 16);
        assert_eq!(avail_event, i + 1, "the next request is to be notified");
    }
}

#[test]
fn without_event_idx_the_flags_suppress() {
    let mut driver = Driver::running(Filler, 0);
    driver.store(AVAIL, 1u16);
    driver.submit(&[(DATA, 4, true)]);
    driver.serve();
    assert_eq!((driver.used().len(), driver.interrupts()), (1, 0));
    assert_eq!(driver.load::<u16>(USED), 0, "notifications are on again");
}

#[test]
fn indirect_tables() {
    let mut driver = Driver::running(Filler, 0);
    driver.chain(INDIRECT, 0, 3, &[(DATA, 8, false), (DATA + 8, 3, true), (DATA + 100, 5, true)]);
    driver.describe(DESC, 0, (INDIRECT, 48, INDIRECT_FLAG, 0));
    driver.offer(0);
    driver.serve();
    assert_eq!(driver.used(), [(0, 8)]);
    assert_eq!(driver.bytes(DATA + 100, 6), [1, 1, 1, 1, 1, 0]);
}

#[test]
fn nothing_is_served_before_driver_ok_and_all_of_it_after() {
    let mut driver = Driver::new(Filler);
    driver.negotiate(V1);
    driver.set_up_queue(16, DESC, AVAIL, USED);
    driver.submit(&[(DATA, 4, true)]);
    driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    driver.serve();
    assert!(driver.used().is_empty());
    driver.kicked(0);
    driver.set(VIRTIO_MMIO_STATUS, RUNNING);
    assert!(driver.kicked(0), "what was offered early is looked at");
    driver.serve();
    assert_eq!(driver.used().len(), 1);
}

#[test]
fn reset_and_failed_stop_the_queues() {
    for status in [0, RUNNING | 0x80] {
        let mut driver = Driver::running(Filler, 0);
        driver.submit(&[(DATA, 4, true)]);
        driver.serve();
        driver.submit(&[(DATA, 4, true)]);
        driver.set(VIRTIO_MMIO_STATUS, status);
        driver.serve();
        assert_eq!(driver.used().len(), 1);
        assert_eq!(driver.status(), status);
        if status == 0 {
            assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
            driver.set(VIRTIO_MMIO_QUEUE_SEL, 0);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
        }
        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.start(0);
        driver.submit(&[(DATA, 4, true)]);
        driver.serve();
        assert_eq!(driver.used().len(), 1, "it works again");
    }
}

#[test]
fn a_disabled_queue_is_not_served() {
    let mut driver = Driver::running(Filler, 0);
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.submit(&[(DATA, 4, true)]);
    driver.serve();
    assert!(driver.used().is_empty());
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "only a reset brings it back");
}

#[test]
fn a_pause_keeps_requests_in_the_queue() {
    let mut driver = Driver::running(Filler, 0);
    let pause = driver.device.handle().pause();
    let second = driver.device.handle().pause();
    driver.submit(&[(DATA, 4, true)]);
    driver.serve();
    drop(second);
    driver.serve();
    assert!(driver.used().is_empty());
    driver.kicked(0);
    drop(pause);
    assert!(driver.kicked(0), "a resumed device looks at its queues");
    driver.serve();
    assert_eq!(driver.used().len(), 1);
}

#[test]
fn queues_that_are_no_queues_need_a_reset() {
    for (size, desc, avail, used) in [
        (0, DESC, AVAIL, USED),
        (3, DESC, AVAIL, USED),
        (32, DESC, AVAIL, USED),
        (u16::MAX, DESC, AVAIL, USED),
        (16, DESC + 8, AVAIL, USED),
        (16, DESC, AVAIL + 1, USED),
        (16, DESC, AVAIL, USED + 2),
        (16, RAM, AVAIL, USED),
        (16, RAM - 16, AVAIL, USED),
        (16, DESC, RAM - 4, USED),
        (16, DESC, AVAIL, RAM - 4),
        (16, !0xf, AVAIL, USED),
        (16, DESC, !1, USED),
        (16, DESC, AVAIL, !3),
    ] {
        let mut driver = Driver::new(Filler);
        driver.negotiate(V1);
        driver.set_up_queue(size, desc, avail, used);
        driver.set(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(driver.status(), RUNNING | NEEDS_RESET, "{size} {desc:#x} {avail:#x} {used:#x}");
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2);
        assert_eq!(driver.interrupts(), 1);
        driver.serve();
        driver.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn ready_without_addresses_needs_a_reset() {
    let mut driver = Driver::new(Filler);
    driver.negotiate(V1);
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    driver.set(VIRTIO_MMIO_STATUS, RUNNING);
    driver.store(2, 1u16);
    driver.serve();
    assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
}

#[test]
fn chains_that_cannot_be_answered_need_a_reset() {
    type Case = (&'static str, fn(&mut Driver));
    let cases: [Case; 9] = [
        ("loop", |d| {
            d.describe(DESC, 0, (DATA, 4, NEXT | WRITE, 1));
            d.describe(DESC, 1, (DATA, 4, NEXT | WRITE, 0));
            d.offer(0);
        }),
        ("head outside of the table", |d| d.offer(16)),
        ("next outside of the table", |d| {
            d.describe(DESC, 0, (DATA, 4, NEXT | WRITE, 16));
            d.offer(0);
        }),
        ("available index jumps", |d| {
            d.describe(DESC, 0, (DATA, 4, WRITE, 0));
            d.store(AVAIL + 2, 17u16);
        }),
        ("indirect table outside of RAM", |d| {
            d.describe(DESC, 0, (RAM - 8, 32, INDIRECT_FLAG, 0));
            d.offer(0);
        }),
        ("indirect table of odd length", |d| {
            d.chain(INDIRECT, 0, 1, &[(DATA, 4, true)]);
            d.describe(DESC, 0, (INDIRECT, 17, INDIRECT_FLAG, 0));
            d.offer(0);
        }),
        ("indirect table without entries", |d| {
            d.describe(DESC, 0, (INDIRECT, 0, INDIRECT_FLAG, 0));
            d.offer(0);
        }),
        ("indirect table in an indirect table", |d| {
            d.describe(INDIRECT, 0, (INDIRECT, 16, INDIRECT_FLAG, 0));
            d.describe(DESC, 0, (INDIRECT, 16, INDIRECT_FLAG, 0));
            d.offer(0);
        }),
        ("more descriptors than the queue has, in an indirect table", |d| {
            d.chain(INDIRECT, 0, 200, &[(DATA, 4, true); 17]);
            d.describe(DESC, 0, (INDIRECT, 17 * 16, INDIRECT_FLAG, 0));
            d.offer(0);
        }),
    ];
    for (name, make) in cases {
        let mut driver = Driver::running(Filler, 0);
        make(&mut driver);
        driver.serve();
        assert!(driver.used().is_empty(), "{name}");
        assert_eq!(driver.status(), RUNNING | NEEDS_RESET, "{name}");
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2, "{name}");
        driver.submit(&[(DATA, 4, true)]);
        driver.serve();
        assert!(driver.used().is_empty(), "{name}: a broken device serves nothing");
        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.start(0);
        driver.submit(&[(DATA, 4, true)]);
        driver.serve();
        assert_eq!(driver.used().len(), 1, "{name}: a reset mends it");
    }
}

#[test]
fn a_queue_that_never_empties_yields_the_loop() {
    /// Keeps its own queue full, as a second vCPU could.
    struct Feeder(GuestRam, u16);
    impl VirtioDevice for Feeder {
        fn id(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            0
        }
        fn config(&self) -> &[u8] {
            &[]
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn activate(&mut self, _features: u64) {}
        fn handle(&mut self, _queue: usize, _chain: Chain<'_>) -> Result<u32, BrokenChain> {
            use vm_memory::Bytes;
            self.1 = self.1.wrapping_add(1);
            self.0.write_obj(self.1, GuestAddress(AVAIL + 2)).unwrap();
            Ok(0)
        }
    }
    let mem = GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = Box::new(Feeder(mem.clone(), 1));
    let (device, worker) = MmioTransport::new(mem.clone(), device, irq.try_clone().unwrap()).unwrap();
    let mut driver = Driver::running(Filler, 0);
    (driver.mem, driver.device, driver.worker) = (mem, device, worker);
    driver.start(0);
    driver.submit(&[(DATA, 4, true)]);
    driver.kicked(0);
    driver.serve();
    assert_eq!(driver.used().len() % 16, 0);
    assert!(driver.kicked(0), "it kicked itself to go on later");
    assert_eq!(irq.read().unwrap(), 8, "one interrupt per pass, so that the driver hears of results");
}
