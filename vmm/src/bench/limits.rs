//! What the host itself can do: the limits that figures are told against, and how steady the host is.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::results::{Bench, Better, Case, Unit};
use super::turns::{Contender, Quantity, Readings};
use super::{BenchError, Group, Plan, stats};
use crate::memory::{HugePages, MemoryConfig, Ram};

static THROUGHPUT: Quantity = Quantity::decisive("throughput", Unit::MibPerS, Better::Higher);
static FAULT: Quantity = Quantity::decisive("fault", Unit::Ns, Better::Lower);

const MIB: usize = 1 << 20;

pub(super) fn groups(plan: &Plan) -> Vec<Group<'static>> {
    let mib = plan.scale.of(16, 128, 512);
    let limit = |what: &str, measure: fn(usize, &mut Readings) -> Result<(), BenchError>| Contender {
        case: Case::of(&[("what", what)]),
        limit: None,
        measure: Box::new(move |readings| measure(mib, readings)),
    };
    let contenders = vec![
        limit("memcpy", memcpy),
        limit("socket", |mib, readings| {
            readings.add(&THROUGHPUT, mib as f64 / socket(mib)?.as_secs_f64());
            Ok(())
        }),
        limit("native fault, 4 KiB", |mib, readings| native_fault(mib, HugePages::None, readings)),
        limit("native fault, 2 MiB", |mib, readings| native_fault(mib, HugePages::Thp, readings)),
    ];
    let expected = Duration::from_millis(mib as u64) * plan.turns();
    let title = "what this host itself can do".to_owned();
    vec![Group { bench: Bench::Limits, title, lacks: None, expected, effort: plan.effort(), contenders }]
}

/// How much longer than at its fastest the same work takes, half of the time at least; and how much is done in a second at its
/// fastest, in MiB that are copied.
pub(super) fn steadiness() -> (f64, f64) {
    let (from, mut to) = (vec![1u8; MIB], vec![2u8; MIB]);
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        let began = Instant::now();
        std::hint::black_box(&mut to[..]).copy_from_slice(std::hint::black_box(&from));
        times.push(began.elapsed().as_secs_f64());
    }
    let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
    (stats::median(&times) / fastest - 1.0, 1.0 / fastest)
}

fn memcpy(mib: usize, readings: &mut Readings) -> Result<(), BenchError> {
    let (from, mut to) = (vec![1u8; mib * MIB], vec![2u8; mib * MIB]);
    for _ in 0..2 {
        let began = Instant::now();
        std::hint::black_box(&mut to[..]).copy_from_slice(std::hint::black_box(&from));
        readings.add(&THROUGHPUT, mib as f64 / began.elapsed().as_secs_f64());
    }
    Ok(())
}

/// How long it takes to copy so many MiB through a Unix socket, in pieces of 1 MiB, from memory to memory that is there, both
/// of them as a guest's.
pub(super) fn socket(mib: usize) -> Result<Duration, BenchError> {
    let failed = |what| move |source| BenchError::System { what, source };
    let memory = || {
        let config = MemoryConfig { size: (mib * MIB) as u64, prealloc: true, ..MemoryConfig::default() };
        Ram::new(config).map_err(|error| BenchError::Machine(error.into()))
    };
    let (from, to) = (memory()?, memory()?);
    let filler: Vec<u8> = (0..MIB).map(|byte| byte as u8 | 1).collect();
    let pieces = move || (0..mib).map(|piece| GuestAddress((piece * MIB) as u64));
    for piece in pieces() {
        from.mem().write_slice(&filler, piece).map_err(|error| failed("fill memory")(io_error(error)))?;
    }
    let (here, mut there) = UnixStream::pair().map_err(failed("make a socket"))?;
    let began = Instant::now();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || -> std::io::Result<()> {
            for piece in pieces() {
                to.mem().read_exact_volatile_from(piece, &mut Whole(&mut there), MIB).map_err(io_error)?;
            }
            there.write_all(b"!")
        });
        // Dropped when anything fails: the receiver does not wait then.
        let mut here = here;
        for piece in pieces() {
            from.mem()
                .write_all_volatile_to(piece, &mut here, MIB)
                .map_err(|error| failed("write to a socket")(io_error(error)))?;
        }
        here.read_exact(&mut [0]).map_err(failed("read from a socket"))?;
        match receiver.join() {
            Ok(outcome) => outcome.map_err(failed("read from a socket")),
            Err(_) => Err(failed("read from a socket")(std::io::ErrorKind::Other.into())),
        }
    })?;
    Ok(began.elapsed())
}

fn io_error(error: impl std::error::Error + Send + Sync + 'static) -> std::io::Error {
    std::io::Error::other(error)
}

/// A reader that is read until a piece is whole.
struct Whole<'a>(&'a mut UnixStream);

impl vm_memory::ReadVolatile for Whole<'_> {
    fn read_volatile<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        buffer: &mut vm_memory::VolatileSlice<'_, B>,
    ) -> Result<usize, vm_memory::VolatileMemoryError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_volatile(&mut buffer.offset(done)?)? {
                0 => break,
                more => done += more,
            }
        }
        Ok(done)
    }
}

/// The first touch of memory that the host's kernel brings.
fn native_fault(mib: usize, huge: HugePages, readings: &mut Readings) -> Result<(), BenchError> {
    let config = MemoryConfig { size: (mib * MIB) as u64, huge, ..MemoryConfig::default() };
    let ram = Ram::new(config).map_err(|error| BenchError::Machine(error.into()))?;
    let unit = if huge == HugePages::None { 4096 } else { 2 * MIB };
    let began = Instant::now();
    for at in (0..mib * MIB).step_by(unit) {
        ram.mem()
            .write_obj(1u8, GuestAddress(at as u64))
            .map_err(|error| BenchError::System { what: "touch memory", source: io_error(error) })?;
    }
    readings.add(&FAULT, began.elapsed().as_secs_f64() * 1e9 / (mib * MIB / unit) as f64);
    Ok(())
}
