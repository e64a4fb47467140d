//! Chains against a naive memory, and what is wrong with them when something is.

use std::fs::{self, File};
use std::path::Path;

use dirty_track::addr::{Gfn, PAGE_BYTES, PAGE_SIZE, PageRange};
use dirty_track::fault::PageSource;
use dirty_track::image::ImageWriter;
use dirty_track::log::{Compression, Header, LogWriter, SlotInfo, Span, StreamId};
use dirty_track::tracker::{Backing, Kind};
use kvm_bindings::kvm_clock_data;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::directory::{MEMORY, STATE, SUMS};
use super::*;
use crate::state::DeviceState;
use crate::state::parts::{DEVICES, VM};

/// Two slots with a hole between them.
const SLOTS: [SlotInfo; 2] =
    [SlotInfo { id: 0, first: 0, pages: 40 }, SlotInfo { id: 1, first: 64, pages: 24 }];
const END: u64 = 88;

/// A snapshot by hand.
struct Made {
    header: Header,
    ranges: Vec<PageRange>,
    parts: Vec<(&'static str, Vec<u8>)>,
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn range(start: u64, pages: u64) -> PageRange {
    PageRange { start: Gfn(start), pages }
}

/// One of a machine without vCPUs, which nobody could run.
fn made(id: u128, parent: Option<(u128, &str)>) -> Made {
    let shape = json!({ "memory": 64 * PAGE_SIZE, "cpus": 0, "disks": [], "rng": false, "builtin": true });
    let clock = serde_json::to_value(kvm_clock_data::default()).unwrap();
    let mut parts = vec![
        (SHAPE, bytes(&shape)),
        (VM, bytes(&json!({ "irqchips": [], "clock": clock }))),
        (DEVICES, bytes(&serde_json::to_value(DeviceState::default()).unwrap())),
    ];
    if let Some((_, path)) = parent {
        parts.push((PARENT, path.as_bytes().to_vec()));
    }
    let header = Header {
        id: StreamId(id),
        parent: parent.map(|(id, _)| StreamId(id)),
        page_size: PAGE_SIZE,
        slots: SLOTS.to_vec(),
        tracker: "none".into(),
        guarantees: Kind::None.guarantees(Backing::Private),
        contents: false,
        checked: true,
        creator: String::new(),
    };
    let ranges = if parent.is_some() { Vec::new() } else { vec![range(0, 40), range(64, 24)] };
    Made { header, ranges, parts }
}

impl Made {
    /// Writes it, with pages of these values.
    fn write(mut self, place: &Path, values: impl IntoIterator<Item = (u64, u8)>) {
        fs::create_dir(place).unwrap();
        let image = ImageWriter::create(&place.join(MEMORY), self.header.id, Gfn(END)).unwrap();
        for (gfn, value) in values {
            image.save(Gfn(gfn), &[value; PAGE_BYTES]).unwrap();
        }
        let digests = image.finish(&place.join(SUMS)).unwrap().digests;
        self.parts.push((DIGESTS, digests.iter().flat_map(|digest| digest.to_le_bytes()).collect()));
        let mut log =
            LogWriter::new(File::create(place.join(STATE)).unwrap(), self.header, Compression::None).unwrap();
        let mut epoch = log.epoch(0, 0).unwrap();
        epoch.ranges(self.ranges.iter().map(|&range| Span { range, flags: 0 })).unwrap();
        epoch.finish().unwrap();
        self.parts.iter().for_each(|(name, bytes)| log.state(name, bytes).unwrap());
        log.finish().unwrap();
    }

    fn part(mut self, name: &'static str, bytes: Option<&[u8]>) -> Made {
        self.parts.retain(|(other, _)| *other != name);
        self.parts.extend(bytes.map(|bytes| (name, bytes.to_vec())));
        self
    }
}

fn frames() -> impl Iterator<Item = u64> {
    (0..40).chain(64..88)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_page_is_what_the_newest_snapshot_that_has_it_says(
        layers in prop::collection::vec(prop::collection::btree_map(0..64usize, 0..3u8, 0..40), 1..5),
        asked in prop::collection::vec((0..64usize, 1..30u64), 1..8),
    ) {
        let home = tempfile::tempdir().unwrap();
        let all: Vec<_> = frames().collect();
        let mut expected = vec![0u8; END as usize];
        for (number, pages) in layers.iter().enumerate() {
            let parent = format!("../{}", number.wrapping_sub(1));
            let parent = (number > 0).then(|| (number as u128 - 1, parent.as_str()));
            let mut made = made(number as u128, parent);
            let values: Vec<_> = pages.iter().map(|(&page, &value)| (all[page], value)).collect();
            if number > 0 {
                made.ranges = values.iter().map(|(gfn, _)| range(*gfn, 1)).collect();
            }
            values.iter().for_each(|(gfn, value)| expected[*gfn as usize] = *value);
            made.write(&home.path().join(number.to_string()), values);
        }
        let (chain, saved) = Chain::open(&home.path().join((layers.len() - 1).to_string())).unwrap();
        prop_assert_eq!(chain.layers().len(), layers.len());
        prop_assert_eq!(saved.shape.memory, 64 * PAGE_SIZE);
        for (page, pages) in asked {
            let slot = if page < 40 { 40 } else { END };
            let asked = range(all[page], pages.min(slot - all[page]));
            let mut found = vec![7; asked.bytes() as usize];
            chain.fetch(asked, &mut found).unwrap();
            for (gfn, page) in asked.iter().zip(found.chunks(PAGE_BYTES)) {
                prop_assert!(page == [expected[gfn.0 as usize]; PAGE_BYTES], "{}", gfn);
            }
            let mut filled = Vec::new();
            PageSource::filled(&chain, asked, &mut |run| filled.extend(run.iter())).unwrap();
            let wanted: Vec<_> = asked.iter().filter(|gfn| expected[gfn.0 as usize] != 0).collect();
            prop_assert_eq!(&filled, &wanted);
            let (mut taken, mut buffer) = (Vec::new(), vec![0; 3 * PAGE_BYTES]);
            chain.filled(asked, &mut buffer, |run, bytes| {
                taken.extend(run.iter());
                assert!(run.iter().zip(bytes.chunks(PAGE_BYTES)).all(|(gfn, page)| page == [expected[gfn.0 as usize]; PAGE_BYTES]));
                Ok(())
            }).unwrap();
            prop_assert_eq!(taken, wanted);
        }
    }

    #[test]
    fn no_bytes_of_a_state_are_taken_for_another(at in 0..2000usize, bit in 0..8u8, cut in any::<bool>()) {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("it");
        made(1, None).write(&place, [(3, 1)]);
        let mut bytes = fs::read(place.join(STATE)).unwrap();
        let at = at % bytes.len();
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        fs::write(place.join(STATE), bytes).unwrap();
        // The minor version, and bytes behind it, may be those of a later program.
        let opened = Chain::open(&place).is_ok();
        prop_assert!(!opened || (!cut && (10..16).contains(&at)), "{} {}", at, bit);
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let mut number = 0;
    let mut refused = |made: Made, words: &str| {
        number += 1;
        let place = home.path().join(number.to_string());
        made.write(&place, [(5, 1)]);
        let error = Chain::open(&place).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(place.to_str().unwrap()), "{words}: {error}");
    };
    for part in [SHAPE, VM, DEVICES] {
        refused(made(1, None).part(part, None), "is no snapshot");
        for garbage in [&b"{"[..], b"", b"[]", b"nonsense", b"{\"memory\":-1}", &[0xff; 30]] {
            refused(made(1, None).part(part, Some(garbage)), "cannot be understood");
        }
    }
    let more = json!({ "memory": 65 * PAGE_SIZE, "cpus": 0, "disks": [], "rng": false, "builtin": true });
    refused(made(1, None).part(SHAPE, Some(&bytes(&more))), "other memslots");
    let cpus = json!({ "memory": 64 * PAGE_SIZE, "cpus": 2, "disks": [], "rng": false, "builtin": true });
    refused(made(1, None).part(SHAPE, Some(&bytes(&cpus))), "record of each vCPU");
    // It stands for itself, and has not all pages.
    refused(Made { ranges: vec![range(0, 40), range(65, 23)], ..made(1, None) }, "page of some");
    refused(made(1, Some((0, "../nowhere"))), "cannot be used");
    refused(made(1, Some((0, ""))).part(PARENT, None), "path of what it builds on");
}

#[test]
fn a_chain_that_is_not_the_one_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let place = |name: &str| home.path().join(name);
    made(1, None).write(&place("base"), [(1, 1)]);
    made(2, Some((1, "../base"))).write(&place("child"), []);
    assert!(Chain::open(&place("child")).is_ok());
    made(3, Some((7, "../base"))).write(&place("stranger"), []);
    assert!(matches!(Chain::open(&place("stranger")), Err(SnapshotError::WrongParent { .. })));
    // Two that build on each other, and one on itself.
    made(4, Some((5, "../b"))).write(&place("a"), []);
    made(5, Some((4, "../a"))).write(&place("b"), []);
    assert!(matches!(Chain::open(&place("a")), Err(SnapshotError::Endless(_))));
    made(6, Some((6, "."))).write(&place("self"), []);
    assert!(matches!(Chain::open(&place("self")), Err(SnapshotError::Endless(_))));
    // A parent of other memory.
    let mut other = made(8, None);
    other.header.slots[1].id = 9;
    other.write(&place("other"), []);
    made(9, Some((8, "../other"))).write(&place("of-other"), []);
    assert!(matches!(Chain::open(&place("of-other")), Err(SnapshotError::Parent { .. })));
    // A page of the base is wrong: whoever reads it is told, by file.
    let memory = place("base").join(MEMORY);
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(&memory).unwrap(),
        &[9],
        PAGE_SIZE,
    )
    .unwrap();
    let (chain, _) = Chain::open(&place("child")).unwrap();
    let error = chain.fetch(range(0, 4), &mut [0; 4 * PAGE_BYTES]).unwrap_err().to_string();
    assert!(error.contains(memory.to_str().unwrap()) && error.contains("page 0x1 "), "{error}");
}
