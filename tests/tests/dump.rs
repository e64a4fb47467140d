//! Live dumps: what a replay makes of a log is what the guest's memory was, bit for bit.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dirty_track::addr::PAGE_SIZE;
use dirty_track::log::{Compression, LogReader, replay};
use dirty_track::tracker::Kind;
use tests::conformance::{config, start, wait_until};
use tests::skip;
use vm_memory::{Bytes, GuestAddress};
use vmm::dump::{Dump, DumpConfig};
use vmm::forecast::Link;
use vmm::host;
use vmm::live::Observer;
use vmm::logfile;
use vmm::machine::{Machine, open_kvm};
use vmm::memory::{Faults, MemoryConfig, Ram};
use vmm::track::{TrackConfig, facts};

const MIB: u64 = 1 << 20;

/// Of no account here.
const LINK: Link = Link { bytes_per_s: 1 << 30, downtime_s: 0.02 };

const EPOCHS: u64 = 4;

/// Holds `image` against `ram`, which nobody writes to.
fn assert_same(image: &File, ram: &Ram, context: &str) {
    let (mut ours, mut theirs) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for region in ram.regions() {
        for gpa in (region.gpa..region.gpa + region.len).step_by(MIB as usize) {
            let len = MIB.min(region.gpa + region.len - gpa) as usize;
            ram.mem().read_slice(&mut ours[..len], GuestAddress(gpa)).unwrap();
            image.read_exact_at(&mut theirs[..len], gpa).unwrap();
            if ours[..len] != theirs[..len] {
                let at = (0..len).find(|&at| ours[at] != theirs[at]).unwrap_or(len);
                let page = (gpa + at as u64) / PAGE_SIZE;
                panic!("{context}: page {page:#x} differs, at {:#x}", gpa + at as u64);
            }
        }
    }
}

/// Writes a log of `machine` that stands for itself, and holds what it makes of nothing against memory, while the vCPUs
/// stand still for its last epoch.
fn dump_and_replay(machine: &Arc<Machine>, kind: Kind, compress: Compression, context: &str) {
    let tracker = machine.tracker(kind, &TrackConfig::default()).unwrap();
    let mut observer = Observer::new(Arc::clone(machine), tracker, true, LINK);
    observer.arm().unwrap();
    let ram = machine.ram();
    let config = DumpConfig { pages: true, full: true, compress, epochs: EPOCHS, interval_ms: 0 };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let out = File::create(&path).unwrap();
    let mut dump = Some(Dump::begin(out, ram, kind.name(), observer.guarantees(), config).unwrap());
    // The guest writes meanwhile.
    dump.as_mut().unwrap().all(ram).unwrap();
    while let Some(mut log) = dump.take() {
        let begin = observer.ledger().unwrap().accesses().unwrap();
        wait_until("the guest gets on", || observer.ledger().unwrap().accesses().unwrap() - begin >= 1500);
        let last = log.is_at_last();
        let epoch = observer.close_epoch_with(last, |harvest, seconds| {
            log.epoch(harvest, ram, seconds).unwrap();
            if !last {
                dump = Some(log);
                return;
            }
            let (_, end) = log.finish().unwrap();
            assert_eq!(end.epochs, EPOCHS + 1);
            let mut image = tempfile::tempfile_in(&directory).unwrap();
            let region = ram.regions().last().unwrap();
            image.set_len(region.gpa + region.len).unwrap();
            let mut log = LogReader::new(File::open(&path).unwrap()).unwrap();
            assert_eq!(replay(&mut log, &mut image).unwrap(), end);
            assert_same(&image, ram, context);
        });
        let agreement = epoch.unwrap().ledger.unwrap();
        assert_eq!((agreement.missed, agreement.stray), (0, 0), "{context}: {agreement:?}");
    }
    // The same by the command's own functions, against the log itself.
    let image = directory.path().join("image");
    logfile::apply(&path, None, &image).unwrap();
    logfile::verify(&path, Some(&image)).unwrap();
    let page = fs::OpenOptions::new().write(true).open(&image).unwrap();
    page.write_all_at(b"wrong", 5 * MIB + 1234).unwrap();
    let error = logfile::verify(&path, Some(&image)).unwrap_err();
    assert!(error.to_string().contains("0x500000"), "{error}");
    observer.disarm().unwrap();
}

/// Every tracker that this host has, with every compression.
#[test]
fn a_replay_is_what_memory_was() {
    let test = "a_replay_is_what_memory_was";
    if let Err(error) = open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let facts = facts(&host::probe());
    let ways = [Compression::None, Compression::Lz4, Compression::Zstd];
    for (index, kind) in Kind::ALL.into_iter().filter(|kind| *kind != Kind::None).enumerate() {
        if let Some(lacks) = kind.lacks(&facts) {
            skip::skip(test, &format!("{kind}: this host lacks {lacks}"));
            continue;
        }
        let fault = if kind == Kind::UffdServe { Faults::Uffd } else { Faults::Kernel };
        let shared = index % 2 == 1;
        let memory = MemoryConfig { size: 64 * MIB, shared, fault, ..MemoryConfig::default() };
        let mut config = config("workload=mixed region=24M passes=0 verify=on", 2, memory);
        config.dirty_ring = (kind == Kind::KvmRing).then_some(1024);
        let machine = start(config);
        let compress = ways[index % ways.len()];
        dump_and_replay(&machine, kind, compress, &format!("{kind}, {compress}"));
        machine.stop();
    }
}
