use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;

use super::format::{HEAD, Head, PAGES_HEAD, PRELUDE, kind};
use super::*;
use crate::addr::{Gfn, Gpa, PAGE_BYTES, PageRange};
use crate::tracker::{Backing, Kind};

const ID: StreamId = StreamId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);

fn range(first: u64, pages: u64) -> PageRange {
    PageRange { start: Gfn(first), pages }
}

fn header() -> Header {
    Header {
        id: ID,
        parent: None,
        page_size: 4096,
        slots: vec![
            SlotInfo { id: 0, first: 0, pages: 300 },
            SlotInfo { id: 1, first: 300, pages: 100 },
            SlotInfo { id: 7, first: 0x10_0000, pages: 64 },
        ],
        tracker: "kvm-manual".to_owned(),
        guarantees: Kind::KvmManual.guarantees(Backing::Private),
        contents: true,
        checked: true,
        creator: "a test".to_owned(),
    }
}

/// A memory: what is not in it is zeros. A page is as many times its byte.
#[derive(Clone, Debug, Default, PartialEq)]
struct Memory(BTreeMap<u64, u8>);

impl Memory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) {
        for (page, to) in to.chunks_mut(PAGE_BYTES).enumerate() {
            let byte = self.0.get(&(gpa.gfn().0 + page as u64)).copied().unwrap_or(0);
            to.fill(0);
            // Zeros for the most part; but the last byte tells.
            to[PAGE_BYTES - 1] = byte;
            to[..usize::from(byte)].fill(byte);
        }
    }
}

impl Image for Memory {
    fn write(&mut self, range: PageRange, contents: &[u8]) -> io::Result<()> {
        for (gfn, page) in range.iter().zip(contents.chunks(PAGE_BYTES)) {
            self.0.insert(gfn.0, page[PAGE_BYTES - 1]);
        }
        Ok(())
    }

    fn zero(&mut self, range: PageRange) -> io::Result<()> {
        self.0.retain(|gfn, _| !range.contains(Gfn(*gfn)));
        Ok(())
    }
}

/// What was said, in order.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    Dirty(Vec<Span>),
    Vcpu(u32, Vec<Span>),
    State(String, Vec<u8>),
}

fn spans(ranges: &[PageRange]) -> impl Iterator<Item = Span> + '_ {
    ranges.iter().map(|&range| Span { range, flags: 0 })
}

/// A log of `epochs`, each the ranges that were written and the byte that was written to all of their pages.
fn log(epochs: &[(Vec<PageRange>, u8)], compression: Compression) -> (Vec<u8>, Memory) {
    let mut memory = Memory::default();
    let mut log = LogWriter::new(Vec::new(), header(), compression).unwrap();
    for (number, (ranges, byte)) in epochs.iter().enumerate() {
        for gfn in ranges.iter().flat_map(PageRange::iter) {
            match byte {
                0 => memory.0.remove(&gfn.0),
                // Here and there a page of zeros among the others.
                byte => memory.0.insert(gfn.0, if gfn.0 % 5 == 3 { 0 } else { *byte }),
            };
        }
        memory.0.retain(|_, byte| *byte != 0);
        let mut epoch = log.epoch(number as u64 * 100, 100).unwrap();
        epoch.ranges(spans(ranges)).unwrap();
        epoch.vcpu(3, spans(ranges)).unwrap();
        for &range in ranges {
            epoch
                .pages(range, |gpa, to| {
                    memory.read(gpa, to);
                    Ok(())
                })
                .unwrap();
        }
        let end = epoch.finish().unwrap();
        assert_eq!(end.dirty, ranges.iter().map(|range| range.pages).sum::<u64>());
        assert_eq!(end.pages + end.zero, end.dirty);
    }
    log.state("vcpu0", b"registers").unwrap();
    log.state("empty", b"").unwrap();
    (log.finish().unwrap().0, memory)
}

/// Reads all of a log.
fn read(bytes: &[u8]) -> Result<(Vec<Said>, End), ReadError> {
    let mut reader = LogReader::new(bytes)?;
    let (mut said, mut end) = (Vec::new(), None);
    while let Some(event) = reader.read()? {
        match event {
            Event::Ranges(spans) => said.push(Said::Dirty(spans.to_vec())),
            Event::Vcpu(vcpu, spans) => said.push(Said::Vcpu(vcpu, spans.to_vec())),
            Event::State { name, bytes } => said.push(Said::State(name.to_owned(), bytes.to_vec())),
            Event::End(at_end) => end = Some(at_end),
            _ => {}
        }
    }
    assert_eq!(reader.bytes_read(), bytes.len() as u64);
    assert!(reader.read().unwrap().is_none());
    Ok((said, end.expect("the end is an event")))
}

fn small() -> Vec<u8> {
    log(&[(vec![range(1, 3), range(310, 70)], 7), (vec![range(2, 1)], 0)], Compression::None).0
}

/// Where the records of a sound log begin, and where it ends.
fn records(log: &[u8]) -> Vec<usize> {
    let mut at = vec![PRELUDE];
    while let Some(head) = log.get(at[at.len() - 1]..).filter(|rest| rest.len() >= HEAD) {
        at.push(at[at.len() - 1] + HEAD + Head::get(head).payload);
    }
    at
}

/// The ranges of an epoch: ascending, within the slots.
fn ranges() -> impl Strategy<Value = Vec<PageRange>> {
    prop::collection::vec((0..400u64, 1..150u64), 0..6).prop_map(|mut parts| {
        parts.sort_unstable();
        let mut ranges: Vec<PageRange> = Vec::new();
        for (first, pages) in parts {
            let first = ranges.last().map_or(first, |last| last.end().0.max(first));
            let end = if first < 300 { 300 } else { 400 };
            if first < end {
                ranges.push(range(first, pages.min(end - first)));
            }
        }
        ranges
    })
}

fn compression() -> impl Strategy<Value = Compression> {
    prop::sample::select(vec![Compression::None, Compression::Lz4, Compression::Zstd])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_is_read(
        epochs in prop::collection::vec((ranges(), 0..200u8), 0..4),
        compression in compression(),
    ) {
        let (bytes, memory) = log(&epochs, compression);
        let (said, end) = read(&bytes).unwrap();
        let mut expected = Vec::new();
        for (ranges, _) in epochs.iter().filter(|(ranges, _)| !ranges.is_empty()) {
            expected.push(Said::Dirty(spans(ranges).collect()));
            expected.push(Said::Vcpu(3, spans(ranges).collect()));
        }
        expected.push(Said::State("vcpu0".to_owned(), b"registers".to_vec()));
        expected.push(Said::State("empty".to_owned(), Vec::new()));
        prop_assert_eq!(said, expected);
        prop_assert_eq!((end.epochs, end.states), (epochs.len() as u64, 2));
        let mut image = Memory::default();
        let replayed = replay(&mut LogReader::new(&bytes[..]).unwrap(), &mut image).unwrap();
        prop_assert_eq!(replayed, end);
        prop_assert_eq!(image, memory);
    }

    #[test]
    fn damage_is_found(at in 0..1u32 << 16, bit in 0..8u8, compression in compression()) {
        let (mut bytes, _) = log(&[(vec![range(1, 3), range(310, 70)], 7)], compression);
        let at = at as usize % bytes.len();
        bytes[at] ^= 1 << bit;
        // The minor version may be another one, and what is beyond it is not used.
        prop_assert_eq!(read(&bytes).is_err(), !(10..16).contains(&at));
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), keep in 0..400usize) {
        let mut log = small();
        log.truncate(keep);
        log.extend_from_slice(&bytes);
        let _ = read(&log);
    }

    /// With a checksum that fits, so that what is behind it is looked at.
    #[test]
    fn no_record_makes_a_reader_panic(
        kind in 0..12u8,
        payload in prop::collection::vec(any::<u8>(), 0..120),
        in_epoch: bool,
    ) {
        let mut log = begun(in_epoch);
        append(&mut log, kind, &payload, 1 + u64::from(in_epoch));
        let _ = read(&log);
    }
}

#[test]
fn a_log_that_was_cut_off_is_not_taken_for_a_whole_one() {
    let bytes = log(&[(vec![range(1, 2)], 7), (vec![range(2, 1)], 0)], Compression::None).0;
    for length in 0..bytes.len() {
        match read(&bytes[..length]) {
            Err(ReadError::NotALog) => assert!(length < PRELUDE),
            Err(ReadError::Truncated { at }) => assert_eq!(at, length as u64),
            other => panic!("{length} bytes: {other:?}"),
        }
    }
}

#[test]
fn records_are_in_their_place_or_refused() {
    let bytes = small();
    let at = records(&bytes);
    assert!(read(&bytes).is_ok() && at.len() > 8);
    let record = |number: usize| bytes[at[number]..at[number + 1]].to_vec();
    let others = |edit: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut all: Vec<_> = (0..at.len() - 1).map(record).collect();
        edit(&mut all);
        let mut log = bytes[..PRELUDE].to_vec();
        all.iter().for_each(|record| log.extend_from_slice(record));
        read(&log).unwrap_err()
    };
    for number in 1..at.len() - 2 {
        let error = others(&|all| drop(all.remove(number)));
        assert!(matches!(error, ReadError::Order { .. }), "without {number}: {error}");
        let error = others(&|all| all.insert(number, all[number].clone()));
        assert!(matches!(error, ReadError::Order { .. }), "twice {number}: {error}");
        let error = others(&|all| all.swap(number, number + 1));
        assert!(matches!(error, ReadError::Order { .. }), "{number} and the next: {error}");
    }
    let mut foreign =
        LogWriter::new(Vec::new(), Header { id: StreamId(5), ..header() }, Compression::None).unwrap();
    foreign.epoch(0, 100).unwrap().finish().unwrap();
    let foreign = foreign.finish().unwrap().0;
    let from = records(&foreign);
    let error = others(&|all| all[1] = foreign[from[1]..from[2]].to_vec());
    assert!(matches!(error, ReadError::Damaged { record: 1, .. }), "another log's: {error}");
}

/// A log with a header, and perhaps the beginning of an epoch.
fn begun(in_epoch: bool) -> Vec<u8> {
    let mut log = LogWriter::new(Vec::new(), header(), Compression::None).unwrap();
    log.epoch(0, 0).unwrap();
    let bytes = log.into_out();
    let at = records(&bytes);
    bytes[..at[1 + usize::from(in_epoch)]].to_vec()
}

fn append(log: &mut Vec<u8>, kind: u8, payload: &[u8], number: u64) {
    let mut record = vec![0; HEAD];
    record.extend_from_slice(payload);
    Head::seal(&mut record, kind, number, ID.seed());
    log.extend_from_slice(&record);
}

/// What a reader says to one more record of a log whose epoch has begun.
fn refused(kind: u8, payload: &[u8]) -> ReadError {
    let mut log = begun(true);
    append(&mut log, kind, payload, 2);
    read(&log).unwrap_err()
}

fn entry(first: u64, pages: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &pages.to_le_bytes(), &[0; 4]].concat()
}

fn pages_head(first: u64, pages: u32, encoding: u8) -> Vec<u8> {
    [&first.to_le_bytes()[..], &pages.to_le_bytes(), &[encoding, 0, 0, 0]].concat()
}

#[test]
fn hostile_records_are_refused() {
    for (first, pages) in
        [(400, 1), (299, 2), (0x10_003f, 2), (u64::MAX, 1), (u64::MAX - 1, u32::MAX), (5, 0)]
    {
        for kind in [kind::RANGES, kind::ZERO] {
            let error = refused(kind, &entry(first, pages));
            assert!(matches!(error, ReadError::OutsideSlots { .. }), "{first:#x}+{pages}: {error}");
        }
        let payload = [pages_head(first, pages, 0), vec![0; pages.min(2) as usize * PAGE_BYTES]].concat();
        let error = refused(kind::PAGES, &payload);
        assert!(
            matches!(error, ReadError::OutsideSlots { .. } | ReadError::Senseless { .. }),
            "{first:#x}+{pages}: {error}"
        );
    }
    let senseless = |kind: u8, payload: &[u8], word: &str| match refused(kind, payload) {
        ReadError::Senseless { why, .. } => assert!(why.contains(word), "{why}"),
        error => panic!("{word}: {error}"),
    };
    senseless(kind::RANGES, &[entry(5, 3), entry(7, 1)].concat(), "overlap");
    senseless(kind::RANGES, &[entry(5, 3), entry(2, 1)].concat(), "order");
    senseless(kind::RANGES, &entry(5, 3)[..15], "part of an entry");
    senseless(kind::VCPU, &[0; 7], "too short");
    senseless(kind::PAGES, &[0; PAGES_HEAD - 1], "too short");
    senseless(kind::PAGES, &pages_head(0, 257, 0), "more than a record may");
    senseless(kind::PAGES, &[pages_head(0, 2, 0), vec![1; PAGE_BYTES]].concat(), "so many pages");
    senseless(kind::PAGES, &[pages_head(0, 1, 9), vec![1; PAGE_BYTES]].concat(), "encoding");
    senseless(kind::PAGES, &[pages_head(0, 1, 1), vec![1; 100]].concat(), "decompressed");
    senseless(kind::PAGES, &[pages_head(0, 1, 2), vec![1; 100]].concat(), "decompressed");
    // What would fill more than the pages that it is said to be.
    let bomb = lz4_flex::block::compress(&vec![0; 64 << 20]);
    senseless(kind::PAGES, &[pages_head(0, 1, 1), bomb].concat(), "decompressed");
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    senseless(kind::PAGES, &[pages_head(0, 1, 2), bomb].concat(), "decompressed");
    senseless(kind::EPOCH_END, br#"{"dirty":1,"pages":0,"zero":0}"#, "number of pages");
    senseless(kind::STATE, &[0; 8], "not where");
    senseless(kind::HEADER, b"{}", "not where");
    senseless(kind::EPOCH, br#"{"number":1,"at_ns":0,"took_ns":0}"#, "not where");
    assert!(matches!(refused(kind::EPOCH_END, b"{"), ReadError::Json { .. }));
    assert!(matches!(refused(kind::EPOCH_END, &[b'['; 100_000]), ReadError::Json { .. }));
    assert!(matches!(refused(99, b""), ReadError::Unknown { kind: 99, .. }));
    // A length that nobody would wait for.
    let mut log = begun(true);
    append(&mut log, kind::PAGES, &[], 2);
    let at = log.len() - HEAD + 8;
    log[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(read(&log).unwrap_err(), ReadError::TooLong { .. }));
}

#[test]
fn headers_that_make_no_sense_are_refused_by_both_sides() {
    let slot = |first, pages| SlotInfo { id: 0, first, pages };
    for slots in [
        vec![slot(0, 0)],
        vec![slot(10, 5), slot(14, 1)],
        vec![slot(10, 5), slot(0, 1)],
        vec![slot(u64::MAX, 1)],
        vec![slot(1 << 40, 1)],
    ] {
        let header = Header { slots, ..header() };
        let error = LogWriter::new(Vec::new(), header.clone(), Compression::None).unwrap_err();
        assert!(matches!(error, WriteError::Header(_)), "{error}");
        let mut log = small()[..PRELUDE].to_vec();
        let mut record = vec![0; HEAD];
        record.extend_from_slice(&serde_json::to_vec(&header).unwrap());
        Head::seal(&mut record, kind::HEADER, 0, 0);
        log.extend_from_slice(&record);
        assert!(matches!(read(&log).unwrap_err(), ReadError::Senseless { .. }));
    }
}

#[test]
fn versions_are_kept_apart() {
    let mut newer = small();
    newer[8] = 2;
    assert!(matches!(read(&newer).unwrap_err(), ReadError::Version(2, 0)));
    // A later minor version has a record that may be passed over.
    let mut log = begun(true);
    append(&mut log, 200, b"news", 2);
    append(&mut log, kind::EPOCH_END, br#"{"dirty":0,"pages":0,"zero":0,"more":[]}"#, 3);
    append(&mut log, kind::END, br#"{"epochs":1,"total":{"dirty":0,"pages":0,"zero":0},"states":0}"#, 4);
    assert_eq!(read(&log).unwrap().1.epochs, 1);
}

#[test]
fn a_writer_refuses_what_no_reader_would_take() {
    let mut log = LogWriter::new(Vec::new(), header(), Compression::None).unwrap();
    let mut epoch = log.epoch(0, 0).unwrap();
    let error = epoch.ranges(spans(&[range(299, 2)])).unwrap_err();
    assert!(matches!(error, WriteError::OutsideSlots(_)), "{error}");
    let error = epoch.pages(range(0, 1), |_, _| Err(io::Error::other("gone"))).unwrap_err();
    assert!(matches!(error, WriteError::Memory { .. }), "{error}");
    assert!(matches!(log.epoch(0, 0).unwrap_err(), WriteError::Unfinished));
    let log = LogWriter::new(Vec::new(), header(), Compression::None);
    let error = log.unwrap().state("large", &vec![0; MAX_PAYLOAD]).unwrap_err();
    assert!(matches!(error, WriteError::TooLong { .. }), "{error}");
}

/// A file, as `vmm log apply` writes one.
#[test]
fn a_file_is_an_image() {
    let (bytes, memory) =
        log(&[(vec![range(1, 3), range(310, 70)], 7), (vec![range(2, 1)], 0)], Compression::Lz4);
    let mut file = tempfile();
    file.set_len(400 << 12).unwrap();
    replay(&mut LogReader::new(&bytes[..]).unwrap(), &mut file).unwrap();
    let mut contents = Vec::new();
    io::Seek::rewind(&mut file).unwrap();
    io::Read::read_to_end(&mut file, &mut contents).unwrap();
    let mut expected = vec![0; 400 << 12];
    memory.read(Gpa(0), &mut expected);
    assert!(contents == expected);
    let mut header = header();
    header.contents = false;
    let bytes = LogWriter::new(Vec::new(), header, Compression::None).unwrap().finish().unwrap().0;
    let error = replay(&mut LogReader::new(&bytes[..]).unwrap(), &mut file).unwrap_err();
    assert!(matches!(error, ReplayError::NoContents), "{error}");
}

/// A file without a name.
fn tempfile() -> std::fs::File {
    vmm_sys_util::tempfile::TempFile::new().unwrap().into_file()
}

#[test]
fn contents_go_apart_and_come_as_they_went() {
    let page = |gfn: u64| vec![gfn as u8 | 1; PAGE_BYTES];
    let pages = |range: PageRange| range.iter().flat_map(|gfn| page(gfn.0)).collect::<Vec<_>>();
    let unchecked = Header { checked: false, ..header() };
    for compression in [Compression::None, Compression::Lz4] {
        let mut log = LogWriter::new(Vec::new(), unchecked.clone(), compression).unwrap();
        let mut epoch = log.epoch(0, 0).unwrap();
        let (apart, copied) = ([range(2, 100), range(0x10_0000, 2), range(150, 130)], range(300, 20));
        let contents = apart.map(pages).concat();
        epoch.pages_apart(&apart, |out| io::Write::write_all(out, &contents)).unwrap();
        epoch
            .pages(copied, |gpa, to| {
                to.copy_from_slice(&pages(PageRange {
                    start: gpa.gfn(),
                    pages: (to.len() / PAGE_BYTES) as u64,
                }));
                Ok(())
            })
            .unwrap();
        epoch.zeros([range(290, 3), range(350, 1)]).unwrap();
        let mut refused = |ranges: &[PageRange]| epoch.pages_apart(ranges, |_| Ok(())).unwrap_err();
        assert!(matches!(refused(&[range(0, 257)]), WriteError::TooLong { .. }));
        assert!(matches!(refused(&[]), WriteError::TooLong { .. }));
        assert!(matches!(refused(&[range(0, 1), range(390, 11)]), WriteError::OutsideSlots(_)));
        epoch.finish().unwrap();
        let mut bytes = log.finish().unwrap().0;
        let log_bytes = bytes.len();
        bytes.extend_from_slice(b"what comes after");

        for taken in [true, false] {
            let mut log = LogReader::new(&bytes[..]).unwrap();
            let mut seen = Vec::new();
            while let Some(event) = log.read().unwrap() {
                match event {
                    Event::Pages(range, contents) => {
                        assert_eq!(contents, pages(range));
                        seen.push(range);
                    }
                    Event::Ahead(spans) => {
                        seen.extend(spans.iter().map(|span| span.range));
                        if taken {
                            let mut to = vec![0; contents.len()];
                            log.contents(|input, spans| {
                                assert!(spans.iter().map(|span| span.range).eq(apart));
                                io::Read::read_exact(input, &mut to)
                            })
                            .unwrap();
                            assert_eq!(to, contents);
                        }
                        // There is nothing more to take.
                        if taken {
                            log.contents(|_, _| panic!("it was taken")).unwrap();
                        }
                    }
                    _ => {}
                }
            }
            assert_eq!(seen, [&apart[..], &[copied]].concat());
            assert_eq!(log.bytes_read() as usize, log_bytes);
            assert_eq!(log.into_input(), b"what comes after");
        }
        let mut memory = Memory::default();
        replay(&mut LogReader::new(&bytes[..]).unwrap(), &mut memory).unwrap();
        assert_eq!(memory.0.len(), 232 + 20);
        assert!(memory.0.iter().all(|(gfn, byte)| *byte == *gfn as u8 | 1));

        // Contents are in no checksum; everything else is.
        let heads = records(&bytes[..log_bytes])[2];
        for (at, sound) in
            [(heads + HEAD + 8 + 3 * 16 + 5, true), (heads + HEAD + 9, false), (log_bytes - 30, false)]
        {
            let mut damaged = bytes[..log_bytes].to_vec();
            damaged[at] ^= 1;
            match read(&damaged) {
                Ok(_) => assert!(sound, "{at}"),
                Err(error) => assert!(matches!(error, ReadError::Damaged { .. }) && !sound, "{at}: {error}"),
            }
        }
    }
    let mut checked = LogWriter::new(Vec::new(), header(), Compression::None).unwrap();
    let mut epoch = checked.epoch(0, 0).unwrap();
    assert!(matches!(epoch.pages_apart(&[range(0, 1)], |_| Ok(())), Err(WriteError::Checked)));
}

#[test]
fn hostile_records_apart_are_refused() {
    let apart = |entries: u32, payload: &[u8]| [&entries.to_le_bytes()[..], &[0; 4], payload].concat();
    let contents = |pages: usize| vec![1; pages * PAGE_BYTES];
    let refused = |checked: bool, payload: &[u8]| {
        let header = Header { checked, ..header() };
        let mut log = LogWriter::new(Vec::new(), header, Compression::None).unwrap();
        log.epoch(0, 0).unwrap();
        let mut log = log.into_out();
        let (mut record, number) = ([vec![0; HEAD], payload.to_vec()].concat(), 2);
        let entries =
            payload.get(..4).map_or(0, |count| u32::from_le_bytes(count.try_into().unwrap()) as usize);
        let covered = (HEAD + 8).saturating_add(entries.saturating_mul(16)).min(record.len());
        let more = record.len() - covered;
        Head::seal_before(&mut record[..covered], more, kind::APART, number, ID.seed());
        log.extend_from_slice(&record);
        match read(&log).unwrap_err() {
            ReadError::Senseless { why, .. } => why,
            ReadError::OutsideSlots { .. } => "outside",
            error => panic!("{error}"),
        }
    };
    let sound = apart(1, &[entry(5, 1), contents(1)].concat());
    assert!(refused(true, &sound).contains("not where"));
    // It is the log that ends too early, not the record that is wrong.
    let header = Header { checked: false, ..header() };
    let mut log = LogWriter::new(Vec::new(), header, Compression::None).unwrap();
    let mut epoch = log.epoch(0, 0).unwrap();
    epoch.pages_apart(&[range(5, 1)], |out| io::Write::write_all(out, &contents(1))).unwrap();
    assert!(matches!(read(&log.into_out()).unwrap_err(), ReadError::Truncated { .. }));

    assert!(refused(false, &[0; 7]).contains("too short"));
    for (entries, payload, word) in [
        (0, vec![], "no pages"),
        (0, contents(1), "no pages"),
        (1, [entry(5, 0), contents(1)].concat(), "outside"),
        (1, [entry(399, 2), contents(2)].concat(), "outside"),
        (2, [entry(5, 1), entry(400, 1), contents(2)].concat(), "outside"),
        (1, [entry(5, 2), contents(1)].concat(), "so many pages"),
        (1, [entry(5, 1), contents(2)].concat(), "so many pages"),
        (1, entry(5, 1), "so many pages"),
        (2, entry(5, 1), "so many pages"),
        (u32::MAX, entry(5, 1), "so many pages"),
        (1, entry(5, 1)[..15].to_vec(), "part of an entry"),
        (1, [entry(0, 257), contents(257)].concat(), "more than a record may"),
        (2, [entry(0, 256), entry(300, 1), contents(257)].concat(), "more than a record may"),
    ] {
        let why = refused(false, &apart(entries, &payload));
        assert!(why.contains(word), "{entries} {word}: {why}");
    }
}
