//! virtio-rng (virtio 1.2, section 5.4): fills the driver's buffers with the host kernel's random bytes.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{BrokenChain, Chain, VirtioDevice};
use crate::sys::guest_io;

/// Most bytes that one request yields; a driver that wants more asks again. Bounds the time that one request
/// keeps the device loop (about 0.2 ms for 64 KiB).
pub const MAX_BYTES: usize = 64 << 10;

const QUEUE_SIZES: [u16; 1] = [64];

/// An entropy source.
pub struct Rng;

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, _features: u64) {}

    fn handle(&mut self, _queue: usize, mut chain: Chain<'_>) -> Result<u32, BrokenChain> {
        if chain.fault.is_some() {
            return Ok(0);
        }
        chain.writable.truncate(MAX_BYTES);
        let mut written = 0;
        while let Some(buffer) = chain.writable.slices().first() {
            match guest_io::random(buffer) {
                Ok(0) => break,
                Ok(n) => {
                    chain.writable.advance(n);
                    written += n as u32;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The driver is told how much it got; with nothing at all it will try again.
                Err(_) => break,
            }
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn fills_what_is_writable_and_nothing_else() {
        let mut driver = Driver::running(Rng, 0);
        assert_eq!(driver.get(8), VIRTIO_ID_RNG);
        driver.submit(&[(DATA, 64, true), (DATA + 100, 100, true)]);
        driver.serve();
        assert_eq!(driver.used(), [(0, 164)]);
        let bytes = driver.bytes(DATA, 300);
        // 64 zeroes at random: once in 2^512.
        assert!(bytes[..64].iter().any(|&b| b != 0) && bytes[100..200].iter().any(|&b| b != 0));
        assert!(bytes[64..100].iter().chain(&bytes[200..]).all(|&b| b == 0));
    }

    #[test]
    fn a_request_has_a_limit() {
        let mut driver = Driver::running(Rng, 0);
        driver.submit(&[(DATA, 60 << 10, true), (DATA + (60 << 10), 60 << 10, true)]);
        driver.serve();
        assert_eq!(driver.used(), [(0, MAX_BYTES as u32)]);
        let end = DATA + MAX_BYTES as u64;
        assert!(driver.bytes(end - 64, 64).iter().any(|&b| b != 0));
        assert!(driver.bytes(end, 56 << 10).iter().all(|&b| b == 0));
    }

    #[test]
    fn bad_buffers_get_nothing() {
        let mut driver = Driver::running(Rng, 0);
        for buffer in [(RAM, 64, true), (DATA, 64, false), (DATA, 0, true)] {
            driver.submit(&[buffer]);
            driver.serve();
            assert_eq!(driver.used()[0].1, 0);
        }
        assert_eq!(driver.bytes(DATA, 64), [0; 64]);
    }
}
