//! What the log's form costs, for an epoch of which one page of a hundred is dirty, in runs and one by one: written and read,
//! each next to the naive form, in which every page has its number in front and nothing is checked.

use std::hint::black_box;
use std::io::{self, Read, Write};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dirty_track::addr::{Gfn, PAGE_BYTES, PageRange};
use dirty_track::log::{Compression, Event, Header, LogReader, LogWriter, SlotInfo, Span, StreamId};
use dirty_track::tracker::{Backing, Kind};

/// Pages of 256 MiB.
const PAGES: u64 = 1 << 16;

fn header() -> Header {
    Header {
        id: StreamId(1),
        parent: None,
        page_size: PAGE_BYTES as u64,
        slots: vec![SlotInfo { id: 0, first: 0, pages: PAGES }],
        tracker: "none".into(),
        guarantees: Kind::None.guarantees(Backing::Private),
        contents: true,
        checked: true,
        creator: "a benchmark".into(),
    }
}

/// One page of a hundred, in runs of so many.
fn runs(pages: u64) -> Vec<PageRange> {
    (0..PAGES - pages)
        .step_by(100 * pages as usize)
        .map(|start| PageRange { start: Gfn(start), pages })
        .collect()
}

fn encode(memory: &[u8], runs: &[PageRange], contents: bool, out: Vec<u8>) -> Vec<u8> {
    let mut log = LogWriter::new(out, header(), Compression::None).unwrap();
    let mut epoch = log.epoch(0, 1).unwrap();
    epoch.ranges(runs.iter().map(|&range| Span { range, flags: 0 })).unwrap();
    for &run in runs.iter().filter(|_| contents) {
        epoch
            .pages(run, |gpa, to| {
                to.copy_from_slice(&memory[gpa.0 as usize..][..to.len()]);
                Ok(())
            })
            .unwrap();
    }
    epoch.finish().unwrap();
    log.finish().unwrap().0
}

fn decode(mut bytes: &[u8]) -> u64 {
    let mut log = LogReader::new(&mut bytes).unwrap();
    let mut sum = 0;
    while let Some(event) = log.read().unwrap() {
        sum += match event {
            Event::Ranges(spans) => spans.iter().map(|span| span.range.pages).sum(),
            Event::Pages(range, contents) => range.pages + u64::from(black_box(contents)[0]),
            _ => 0,
        };
    }
    sum
}

fn encode_naively(memory: &[u8], runs: &[PageRange], contents: bool, mut out: Vec<u8>) -> Vec<u8> {
    for gfn in runs.iter().flat_map(|run| run.start.0..run.end().0) {
        out.write_all(&gfn.to_le_bytes()).unwrap();
        if contents {
            out.write_all(&memory[gfn as usize * PAGE_BYTES..][..PAGE_BYTES]).unwrap();
        }
    }
    out
}

fn decode_naively(mut bytes: &[u8], contents: bool) -> u64 {
    let (mut sum, mut number, mut page) = (0, [0; 8], [0; PAGE_BYTES]);
    while bytes.read_exact(&mut number).is_ok() {
        sum += u64::from(black_box(number)[0]);
        if contents {
            bytes.read_exact(&mut page).map_err(io::Error::other).unwrap();
            sum += u64::from(black_box(&page)[0]);
        }
    }
    sum
}

fn codec(bencher: &mut Criterion) {
    let memory: Vec<u8> = (0..PAGES * PAGE_BYTES as u64).map(|byte| (byte % 251 + 1) as u8).collect();
    for (name, contents) in [("ranges", false), ("contents", true)] {
        let mut group = bencher.benchmark_group(name);
        for length in [1, 64] {
            let runs = runs(length);
            let pages: u64 = runs.iter().map(|run| run.pages).sum();
            group.throughput(Throughput::Elements(pages));
            let room = || Vec::with_capacity(pages as usize * (PAGE_BYTES + 64) + 4096);
            let (ours, naive) =
                (encode(&memory, &runs, contents, room()), encode_naively(&memory, &runs, contents, room()));
            let mut out = room();
            group.bench_function(format!("write, runs of {length}"), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    out = encode(&memory, &runs, contents, std::mem::take(&mut out));
                });
            });
            group.bench_function(format!("write, runs of {length}, naive"), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    out = encode_naively(&memory, &runs, contents, std::mem::take(&mut out));
                });
            });
            group.bench_function(format!("read, runs of {length}"), |bencher| bencher.iter(|| decode(&ours)));
            group.bench_function(format!("read, runs of {length}, naive"), |bencher| {
                bencher.iter(|| decode_naively(&naive, contents));
            });
        }
    }
}

criterion_group!(benches, codec);
criterion_main!(benches);
