//! Outside bytes, as a fuzzer makes them up: each function takes any bytes, and whatever they are, it returns. The targets
//! in `fuzz/` call these, and so does a test, with what is kept in `fuzz/corpus/`.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use dirty_track::addr::PageRange;
use dirty_track::log::{Event, Header, Image, LogReader, replay};
use twox_hash::XxHash3_64;

use crate::api;
use crate::memory::{MemoryConfig, Ram};
use crate::migrate::destination;
use crate::state::parts::Parts;

/// A dirty log, as it is and with checksums and numbers that are right: no fuzzer finds those.
///
/// # Panics
/// See [`agree`].
pub fn log(bytes: &[u8]) {
    agree(bytes);
    agree(&sealed(bytes));
}

/// The same log with each record's number and checksum as they should be, as far as records can be told apart.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    const PRELUDE: usize = 16;
    const HEAD: usize = 24;
    const APART: u8 = 10;
    let mut log = bytes.to_vec();
    let (mut rest, mut number, mut seed) = (log.get_mut(PRELUDE..), 0u64, 0);
    while let Some(records) = rest.filter(|records| records.len() >= HEAD) {
        let length = HEAD + u32::from_le_bytes([records[8], records[9], records[10], records[11]]) as usize;
        let Some((record, behind)) = records.split_at_mut_checked(length) else { break };
        record[16..HEAD].copy_from_slice(&number.to_le_bytes());
        let mut covered = length;
        // Its contents are in no checksum.
        if let (APART, Some(&[a, b, c, d])) = (record[12], record[HEAD..].first_chunk()) {
            let entries = u32::from_le_bytes([a, b, c, d]) as usize;
            covered = length.min(HEAD + 8 + entries.saturating_mul(16).min(length));
        }
        let sum = XxHash3_64::oneshot_with_seed(seed, &record[8..covered]);
        record[..8].copy_from_slice(&sum.to_le_bytes());
        if number == 0
            && let Ok(header) = serde_json::from_slice::<Header>(&record[HEAD..])
        {
            seed = header.id.0 as u64 ^ (header.id.0 >> 64) as u64;
        }
        number += 1;
        rest = Some(behind);
    }
    log
}

/// A dirty log is read, read with what is apart passed over, and replayed: all three agree on whether it is whole.
///
/// # Panics
/// When they do not.
fn agree(bytes: &[u8]) {
    let read = |takes: bool| -> Option<u64> {
        let mut log = LogReader::new(bytes).ok()?;
        let mut pages = 0;
        while let Some(event) = log.read().ok()? {
            match event {
                Event::Ahead(spans) => {
                    pages += spans.iter().map(|span| span.range.pages).sum::<u64>();
                    if takes {
                        log.contents(|input, spans| {
                            let bytes = spans.iter().map(|span| span.range.bytes()).sum();
                            let taken = io::copy(&mut io::Read::take(input, bytes), &mut io::sink())?;
                            if taken == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
                        })
                        .ok()?;
                    }
                }
                Event::Pages(range, contents) => {
                    assert_eq!(contents.len() as u64, range.bytes());
                    pages += range.pages;
                }
                _ => {}
            }
        }
        Some(pages)
    };
    let whole = read(false);
    assert_eq!(whole, read(true));
    if let Ok(mut log) = LogReader::new(bytes)
        && log.header().contents
    {
        let mut written = Count(0);
        let outcome = replay(&mut log, &mut written);
        assert_eq!(outcome.is_ok().then_some(written.0), whole);
    }
}

/// An image that nobody keeps.
struct Count(u64);

impl Image for Count {
    fn write(&mut self, range: PageRange, _contents: &[u8]) -> io::Result<()> {
        self.0 += range.pages;
        Ok(())
    }

    fn zero(&mut self, _range: PageRange) -> io::Result<()> {
        Ok(())
    }
}

/// A machine's state: lines of a record's name, a space, and the record.
pub fn state(bytes: &[u8]) {
    let mut parts = Parts::default();
    for line in bytes.split(|byte| *byte == b'\n') {
        let name = line.split(|byte| *byte == b' ').next().unwrap_or_default();
        let record = line.get(name.len() + 1..).unwrap_or_default();
        if parts.add(&String::from_utf8_lossy(name), record).is_err() {
            return;
        }
    }
    // Whether they are all there.
    let _ = parts.finish(2);
}

/// What a source sends to a destination with 64 MiB of memory, from its first note to the end of its log, whose checksums
/// are right.
///
/// # Panics
/// When the system has no sockets.
pub fn connection(bytes: &[u8]) {
    let length =
        bytes.get(4..8).map_or(0, |length| u32::from_le_bytes([length[0], length[1], length[2], length[3]]));
    let (hello, log) = bytes.split_at(bytes.len().min(8usize.saturating_add(length as usize)));
    let bytes = [hello, &sealed(log)].concat();
    static RAM: OnceLock<Ram> = OnceLock::new();
    let ram = RAM.get_or_init(|| {
        Ram::new(MemoryConfig { size: 64 << 20, ..MemoryConfig::default() }).expect("there is memory")
    });
    let (mut source, destination) = UnixStream::pair().expect("there are sockets");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A destination that has heard enough closes its side.
            let _ = source.write_all(&bytes);
            let _ = source.shutdown(Shutdown::Write);
            // What it answers.
            let _ = io::copy(&mut source, &mut io::sink());
        });
        let _ = destination::rehearse(destination, ram);
    });
}

/// The body of a request to the control socket.
pub fn request(bytes: &[u8]) {
    api::understand(bytes);
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn the_corpora_are_green() {
        type Target = (&'static str, fn(&[u8]));
        let targets: [Target; 4] = [
            ("log", super::log),
            ("state", super::state),
            ("connection", super::connection),
            ("request", super::request),
        ];
        for (name, target) in targets {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
            let mut files = 0;
            for file in fs::read_dir(corpus).unwrap() {
                target(&fs::read(file.unwrap().path()).unwrap());
                files += 1;
            }
            assert!(files > 0, "{name}");
        }
    }
}
