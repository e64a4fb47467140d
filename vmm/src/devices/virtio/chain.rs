//! A request as a device sees it: one descriptor chain, turned into slices of guest memory.
//!
//! `virtio-queue` walks descriptors; this module judges what it yields. It tells a chain that ended from one
//! that was cut off (a loop, an index outside of the table, a table outside of RAM), keeps device-readable
//! and device-writable buffers apart, and maps each to host memory once, so that a device works on slices
//! that are known to be RAM.

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::MS;
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use super::GuestRam;

/// A piece of guest RAM; writes through it are recorded in the dirty bitmap.
pub type RamSlice<'m> = VolatileSlice<'m, MS<'m, GuestRam>>;

/// A queue or chain that leaves the device no way to answer. The text says what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("broken virtqueue: {0}")]
pub struct BrokenChain(pub &'static str);

/// Guest buffers in the order of their descriptors, consumed from the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<RamSlice<'m>>,
}

impl<'m> Buffers<'m> {
    /// Bytes left. Below 2^32 (the sum over a chain is limited by the specification and by `virtio-queue`).
    pub fn len(&self) -> u64 {
        self.slices.iter().map(|s| s.len() as u64).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// What is left, piece by piece; none of the pieces is empty.
    pub fn slices(&self) -> &[RamSlice<'m>] {
        &self.slices
    }

    /// Drops the first `n` bytes, or all if there are fewer.
    pub fn advance(&mut self, mut n: usize) {
        let mut whole = 0;
        for slice in &mut self.slices {
            if n < slice.len() {
                // `n` is within the slice, so this cannot fail; if it did, nothing would be dropped.
                if let Ok(rest) = slice.offset(n) {
                    *slice = rest;
                }
                break;
            }
            n -= slice.len();
            whole += 1;
        }
        self.slices.drain(..whole);
    }

    /// Copies out and drops the first `N` bytes; `None`, dropping nothing, if there are fewer. Each byte of
    /// guest memory is read once, so that what is checked is what is used.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len() < N as u64 {
            return None;
        }
        let mut array = [0; N];
        let mut done = 0;
        for slice in &self.slices {
            if done == N {
                break;
            }
            done += slice.copy_to(&mut array[done..]);
        }
        self.advance(N);
        Some(array)
    }

    /// Copies the start of `bytes` to the buffers, as much as fits, and drops what was filled. Returns the
    /// number of bytes copied.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            // Writing to a slice from offset 0 fails only if the slice is empty, which none is.
            done += slice.write(&bytes[done..], 0).unwrap_or(0);
            if done == bytes.len() {
                break;
            }
        }
        self.advance(done);
        done
    }

    /// Splits off the last byte.
    pub fn pop_byte(&mut self) -> Option<RamSlice<'m>> {
        let last = self.slices.pop()?;
        let (rest, byte) = last.split_at(last.len() - 1).ok()?;
        if !rest.is_empty() {
            self.slices.push(rest);
        }
        Some(byte)
    }

    /// Shortens the buffers to at most `n` bytes.
    pub fn truncate(&mut self, n: usize) {
        let mut left = n;
        let mut keep = 0;
        for slice in &mut self.slices {
            if left == 0 {
                break;
            }
            if slice.len() > left
                && let Ok(part) = slice.subslice(0, left)
            {
                *slice = part;
            }
            left -= slice.len();
            keep += 1;
        }
        self.slices.truncate(keep);
    }
}

/// One request.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    /// What the driver gives to the device.
    pub readable: Buffers<'m>,
    /// Where the device may write. If the last writable descriptor is not in RAM this is empty: bytes at its
    /// end (a status) have nowhere to go.
    pub writable: Buffers<'m>,
    /// What is wrong with the buffers, though the chain itself is sound: such a request must fail.
    pub fault: Option<&'static str>,
}

impl<'m> Chain<'m> {
    /// Maps the buffers of `descriptors` in `mem`. `max` is the number of descriptors that a chain may have
    /// (the queue size: virtio 1.2, section 2.7.5.3.1, holds for indirect tables as well).
    ///
    /// # Errors
    /// [`BrokenChain`] if the chain does not end as a chain should.
    pub fn map(
        mem: &'m GuestRam,
        descriptors: DescriptorChain<&'m GuestRam>,
        max: u16,
    ) -> Result<Chain<'m>, BrokenChain> {
        let mut chain = Chain::default();
        let mut count = 0;
        let mut ended = false;
        let mut writing = false;
        for descriptor in descriptors {
            count += 1;
            if count > u32::from(max) {
                return Err(BrokenChain("a descriptor chain is longer than its queue"));
            }
            ended = !descriptor.has_next();
            let buffers = if descriptor.is_write_only() {
                writing = true;
                &mut chain.writable
            } else {
                if writing {
                    chain.fault = Some("a readable descriptor follows a writable one");
                }
                &mut chain.readable
            };
            for slice in GuestMemoryBackend::get_slices(mem, descriptor.addr(), descriptor.len() as usize) {
                match slice {
                    Ok(slice) => buffers.slices.push(slice),
                    Err(_) => {
                        chain.fault = Some("a buffer is not in RAM");
                        buffers.slices.clear();
                    }
                }
            }
        }
        // virtio-queue ends a chain without a word when the next descriptor cannot be had: then the last one
        // still announces another. The same silence at the first one leaves `ended` false.
        if !ended {
            return Err(BrokenChain("a descriptor chain loops or leaves its table"));
        }
        Ok(chain)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Advance(usize),
        ReadArray,
        Write(usize),
        PopByte,
        Truncate(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0usize..40).prop_map(Op::Advance),
            Just(Op::ReadArray),
            (0usize..40).prop_map(Op::Write),
            Just(Op::PopByte),
            (0usize..200).prop_map(Op::Truncate),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Buffers in pieces are the same as the addresses of their bytes in a row.
        #[test]
        fn buffers_are_a_row_of_bytes(
            lengths in prop::collection::vec(1usize..30, 0..8),
            ops in prop::collection::vec(op(), 0..12),
        ) {
            let mem = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mut contents: Vec<u8> = (0..0x1000).map(|i| (i % 251) as u8).collect();
            mem.write_slice(&contents, GuestAddress(0)).unwrap();
            // Pieces of these lengths, 64 bytes apart.
            let mut buffers = Buffers::default();
            let mut row = Vec::new();
            for (i, length) in lengths.into_iter().enumerate() {
                let slice = GuestMemoryBackend::get_slice(&mem, GuestAddress(64 * i as u64), length);
                buffers.slices.push(slice.unwrap());
                row.extend(64 * i..64 * i + length);
            }
            for op in ops {
                match op {
                    Op::Advance(n) => {
                        buffers.advance(n);
                        row.drain(..n.min(row.len()));
                    }
                    Op::ReadArray => {
                        let expected: Option<Vec<u8>> =
                            (row.len() >= 16).then(|| row.drain(..16).map(|at| contents[at]).collect());
                        prop_assert_eq!(buffers.read_array::<16>().map(Vec::from), expected);
                    }
                    Op::Write(n) => {
                        let bytes: Vec<u8> = (0..n).map(|i| 255 - i as u8).collect();
                        prop_assert_eq!(buffers.write(&bytes), n.min(row.len()));
                        for (at, byte) in row.drain(..n.min(row.len())).zip(bytes) {
                            contents[at] = byte;
                        }
                    }
                    Op::PopByte => {
                        let byte = buffers.pop_byte().map(|slice| {
                            assert_eq!(slice.len(), 1);
                            slice.load::<u8>(0, std::sync::atomic::Ordering::Relaxed).unwrap()
                        });
                        prop_assert_eq!(byte, row.pop().map(|at| contents[at]));
                    }
                    Op::Truncate(n) => {
                        buffers.truncate(n);
                        row.truncate(n);
                    }
                }
                prop_assert_eq!(buffers.len(), row.len() as u64);
                prop_assert_eq!(buffers.is_empty(), row.is_empty());
                prop_assert!(buffers.slices().iter().all(|slice| !slice.is_empty()));
            }
            let mut after = vec![0; 0x1000];
            mem.read_slice(&mut after, GuestAddress(0)).unwrap();
            prop_assert!(after == contents);
        }
    }
}
