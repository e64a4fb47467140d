//! Results that nobody measured, for tests: such as a run might have, odd ones, and none.

use crate::bench::results::{
    Bench, Better, Case, Figure, HostFacts, Limit, Results, Row, SCHEMA, Skipped, Table, Unit,
};

pub(super) fn figure(name: &str, unit: Unit, samples: &[f64]) -> Figure {
    let better = match unit {
        Unit::MibPerS => Better::Higher,
        Unit::Mib | Unit::Count => Better::Neither,
        _ => Better::Lower,
    };
    Figure::of(name, unit, better, samples.to_vec())
}

pub(super) fn bounded(figure: Figure, limit: Option<&str>) -> Figure {
    let limit = limit.map(|name| Limit { name: name.to_owned(), median: figure.median / 1.04, ratio: 1.04 });
    Figure { limit, ..figure }
}

pub(super) fn row(pairs: &[(&str, &str)], figures: Vec<Figure>) -> Row {
    Row { case: Case::of(pairs), figures, ..Row::default() }
}

pub(in crate::bench) fn empty() -> Results {
    Results {
        schema: SCHEMA,
        vmm: String::new(),
        began: String::new(),
        seconds: 0.0,
        quick: false,
        complete: true,
        host: HostFacts::default(),
        tables: Vec::new(),
        skipped: Vec::new(),
    }
}

/// What a host of today might say. Samples lie about a value as if the host were a little busy.
pub(super) fn realistic() -> Results {
    let mut tables = vec![limits()];
    for backing in ["thp", "none"] {
        tables.extend(["0 %", "0.1 %", "1 %", "10 %", "100 %"].map(|dirty| self::dirty(backing, dirty)));
    }
    tables.extend([stalls(), fault(), restore(), migrate(), boot()]);
    Results {
        vmm: "0.1.0".into(),
        began: "2025-11-22T07:45:00Z".into(),
        seconds: 1325.4,
        host: HostFacts {
            cpu: "AMD EPYC 9R14 96-Core Processor".into(),
            cpus: 16,
            memory: 64 << 30,
            kernel: "6.12.58".into(),
            kvm: "kvm_amd".into(),
            mmu: "TDP MMU".into(),
            in_vm: true,
            thp: Some("madvise".into()),
            governor: None,
            noise: 0.034,
            load: 0.42,
            pinned: true,
            auto: "kvm-manual".into(),
            sound: vec!["kvm-bitmap".into(), "kvm-manual".into()],
            ..HostFacts::default()
        },
        tables,
        skipped: vec![
            Skipped {
                what: "dirty on hugetlb-2m".into(),
                why: "no huge pages are reserved: see /proc/sys/vm/nr_hugepages".into(),
            },
            Skipped { what: "migration by QEMU over RDMA".into(), why: "no such device".into() },
        ],
        ..empty()
    }
}

/// Five samples about `value`; `busy` ones lie further apart.
fn about(name: &str, unit: Unit, value: f64, busy: bool) -> Figure {
    let width = if busy { 0.4 } else { 0.03 };
    let samples = [0.0, -0.8, 1.0, -0.4, 0.6].map(|part: f64| value * (1.0 + part * width));
    figure(name, unit, &samples)
}

fn limits() -> Table {
    let of = |what, figure| row(&[("what", what)], vec![figure]);
    Table {
        bench: Bench::Limits,
        title: "what the host can do".into(),
        rows: vec![
            of("memcpy", about("throughput", Unit::MibPerS, 11_240.0, false)),
            of("socket", about("throughput", Unit::MibPerS, 3180.0, false)),
            of("dirty log ioctl", about("call", Unit::Us, 1.92, false)),
            of("native fault", about("fault", Unit::Ns, 512.0, true)),
        ],
    }
}

/// Tracker and how it is used, ns of a first write, ms of a harvest of little and what each per cent adds, % of slow-down at
/// 1 % dirty, and bytes sent for each dirty one.
type Tracker = ([&'static str; 3], f64, (f64, f64), f64, f64);

const TRACKERS: [Tracker; 11] = [
    (["bare ioctls", "all", "-"], 1340.0, (0.011, 0.045), 2.6, 1.0),
    (["kvm-bitmap", "all", "-"], 1450.0, (0.031, 0.052), 3.1, 1.0),
    (["kvm-manual", "all", "-"], 1380.0, (0.014, 0.049), 2.9, 1.0),
    (["kvm-manual", "dense-skip", "-"], 980.0, (0.015, 0.050), 1.9, 1.4),
    (["kvm-ring", "all", "-"], 1890.0, (0.003, 0.110), 4.4, 1.0),
    (["uffd-sync", "all", "-"], 14_300.0, (0.006, 0.310), 38.0, 1.0),
    (["uffd-async", "all", "-"], 2240.0, (0.12, 0.018), 5.2, 1.0),
    (["exact", "all", "-"], 1520.0, (0.9, 0.9), 6.0, 0.35),
    (["uffd-serve", "all", "leaf"], 9100.0, (0.002, 0.02), 24.0, 1.0),
    (["uffd-serve", "all", "block"], 870.0, (0.001, 0.002), 1.1, 22.0),
    (["uffd-serve", "all", "adaptive"], 1210.0, (0.001, 0.006), 1.6, 4.0),
];

fn dirty(backing: &str, dirty: &str) -> Table {
    let share: f64 = dirty.trim_end_matches(" %").parse().unwrap_or_default();
    let case = |[tracker, rearm, split]: [&str; 3], figures| {
        let pairs = [
            ("tracker", tracker),
            ("rearm", rearm),
            ("split", split),
            ("dirty", dirty),
            ("pattern", "rand"),
            ("backing", backing),
            ("vcpus", "1"),
            ("memory", "128 MiB"),
        ];
        row(&pairs, figures)
    };
    let free = || about("dirty memory", Unit::Ms, 8.9 * (1.0 + share), false);
    let mut rows =
        vec![case(["untracked", "all", "-"], vec![about("populate", Unit::Ms, 38.0, false), free()])];
    rows.extend(TRACKERS.iter().map(|&(names, write, (least, each), slower, sent)| {
        let [tracker, ..] = names;
        let huge = if backing == "thp" { 1.7 } else { 1.0 };
        let (get, clear) = (least + each * share, 0.6 * each * share);
        let clears = tracker != "kvm-bitmap" && share > 0.0;
        let mut figures = vec![
            about("populate", Unit::Ms, 38.0, false),
            about("enable", Unit::Ms, 0.42, false),
            about("first dirty memory", Unit::Ms, 12.4 * (1.0 + share), false),
            bounded(free(), Some("untracked")),
            about("get dirty log", Unit::Ms, get, false),
        ];
        if clears {
            figures.push(about("clear dirty log", Unit::Ms, clear, tracker == "kvm-ring"));
        }
        let both = if clears { get + clear } else { get };
        figures.push(about("get and clear", Unit::Ms, both, tracker == "kvm-ring" && share == 10.0));
        if share > 0.0 {
            let busy = tracker == "uffd-sync" || share == 10.0 && tracker == "exact";
            let write = about("first write", Unit::Ns, write / huge * (1.0 + 0.4 / (1.0 + share)), busy);
            figures.push(bounded(write, Some("bare ioctls")));
            figures.push(about("slow-down", Unit::Percent, slower * share.sqrt(), tracker == "uffd-async"));
        }
        figures.push(about("sent", Unit::Mib, (1.28 * share * sent * huge).min(128.0), false));
        figures.push(about("host CPU", Unit::Ms, 3.4 + share, false));
        figures.push(about("disable", Unit::Ms, 0.8, false));
        case(names, figures)
    }));
    Table {
        bench: Bench::Dirty,
        title: format!("{dirty} of 128 MiB dirty in an epoch, rand, {backing}, 1 vCPU"),
        rows,
    }
}

fn stalls() -> Table {
    let of = |tracker, tail, most| {
        let figures =
            vec![about("stall p99.9", Unit::Us, tail, false), about("stall max", Unit::Us, most, true)];
        row(&[("tracker", tracker)], figures)
    };
    Table {
        bench: Bench::Dirty,
        title: "what a harvest holds up".into(),
        rows: vec![of("kvm-bitmap", 210.0, 900.0), of("kvm-ring", 18.0, 45.0)],
    }
}

fn fault() -> Table {
    let of = |access, policy, age, touch, hits: Option<f64>| {
        let mut figures = vec![
            about("pass", Unit::Ms, touch * 32.0, false),
            about("touch", Unit::Us, touch, false),
            about("p50", Unit::Us, touch * 0.8, false),
            about("p99", Unit::Us, touch * 6.0, true),
            about("max", Unit::Us, touch * 400.0, true),
        ];
        figures.extend(hits.map(|hits| about("hit rate", Unit::Percent, hits, false)));
        row(
            &[("access", access), ("policy", policy), ("age", age), ("split", "-"), ("source", "file")],
            figures,
        )
    };
    let rows = ["reads", "writes"].into_iter().flat_map(|access| {
        [
            of(access, "bare loop", "-", 9.1, None),
            of(access, "none", "young", 10.2, None),
            of(access, "around=64K", "young", 1.9, Some(71.0)),
            of(access, "block", "young", 0.6, Some(44.0)),
            of(access, "recorded", "old", 0.9, Some(97.0)),
            of(access, "host's kernel", "-", 0.7, None),
        ]
    });
    Table {
        bench: Bench::Fault,
        title: "a pass over memory that comes when it is asked for".into(),
        rows: rows.collect(),
    }
}

fn restore() -> Table {
    let of = |monitor, memory, way, output: f64, walk: Option<f64>, busy| {
        let mut figures = vec![about("first output", Unit::Ms, output, busy)];
        figures.extend(walk.map(|walk| about("first walk", Unit::Ms, output + walk, false)));
        figures.push(about("snapshot", Unit::Ms, output * 3.0, false));
        row(&[("monitor", monitor), ("way", way), ("memory", memory)], figures)
    };
    Table {
        bench: Bench::Restore,
        title: "from exec to a guest that runs again".into(),
        rows: vec![
            of("vmm", "128 MiB", "eager", 46.0, Some(21.0), false),
            of("vmm", "128 MiB", "lazy", 12.4, Some(310.0), false),
            of("vmm", "128 MiB", "map", 9.8, Some(36.0), false),
            of("vmm", "128 MiB", "recorded", 14.9, Some(61.0), true),
            of("vmm", "1 GiB", "eager", 340.0, Some(160.0), false),
            of("vmm", "1 GiB", "lazy", 12.9, Some(2480.0), false),
            of("vmm", "1 GiB", "map", 10.1, Some(288.0), false),
            of("QEMU", "128 MiB", "-", 171.0, Some(22.0), false),
            of("QEMU", "1 GiB", "-", 602.0, None, false),
        ],
    }
}

fn migrate() -> Table {
    let of = |monitor, how, written, total: f64, still: Option<f64>, busy| {
        let mut figures = vec![bounded(about("total", Unit::Ms, total, busy), Some("socket"))];
        figures.extend(still.map(|still| about("still", Unit::Ms, still, busy)));
        figures.push(about("throughput", Unit::MibPerS, 1024.0 / total * 1000.0, false));
        row(&[("monitor", monitor), ("how", how), ("written", written)], figures)
    };
    let rows =
        [("0 MB/s", 1.0, false), ("100 MB/s", 1.2, false), ("500 MB/s", 2.1, true), ("flat out", 9.0, false)];
    let rows = rows.into_iter().flat_map(|(written, slower, busy)| {
        [
            of("socket", "-", written, 322.0, None, false),
            of("vmm", "precopy", written, 352.0 * slower, Some(4.1 * slower), busy),
            of("QEMU", "precopy", written, 1003.0 * slower, Some(31.0 * slower * slower), false),
            of("QEMU multifd", "precopy", written, 571.0 * slower, Some(44.0 * slower), false),
            of("QEMU multifd, ring", "precopy", written, 560.0 * slower, Some(41.0 * slower), false),
        ]
    });
    let slow = "flat out, postcopy at 400 MiB/s";
    let switched = [
        of("vmm", "postcopy", slow, 6900.0, Some(17.0), false),
        of("QEMU", "postcopy", slow, 5200.0, Some(31.0), false),
    ];
    let rows = rows.chain(switched).collect();
    Table { bench: Bench::Migrate, title: "live migration of a guest of 1 GiB".into(), rows }
}

fn boot() -> Table {
    let of = |monitor, memory, byte, ring| {
        let figures = vec![
            about("first byte", Unit::Ms, byte, false),
            about("ring 3", Unit::Ms, ring, false),
            about("own memory", Unit::Mib, 4.2, false),
        ];
        row(&[("monitor", monitor), ("memory", memory)], figures)
    };
    Table {
        bench: Bench::Boot,
        title: "from exec to a guest that runs".into(),
        rows: vec![
            of("vmm", "128 MiB", 31.0, 182.0),
            of("QEMU", "128 MiB", 148.0, 402.0),
            of("vmm", "1 GiB", 34.0, 190.0),
            of("QEMU", "1 GiB", 151.0, 417.0),
        ],
    }
}

/// Names that are markup, and figures that are no numbers.
pub(super) fn odd() -> Results {
    const EVIL: &str = "<script>alert(\"1\")</script>|a,b\n\x1b[31m'`*&amp;\0\u{ffff}";
    let values: [&[f64]; 9] = [
        &[],
        &[f64::NAN],
        &[f64::INFINITY, 1.0],
        &[f64::NEG_INFINITY],
        &[0.0, -0.0],
        &[-12.5, -11.0],
        &[f64::MAX, f64::MIN],
        &[f64::MIN_POSITIVE, 1e-300],
        &[5.0, 900.0, 2.0],
    ];
    let names = [
        "first write",
        "get dirty log",
        "clear dirty log",
        "slow-down",
        "sent",
        "first output",
        "first walk",
        "total",
        "still",
        "first byte",
        "ring 3",
        EVIL,
    ];
    let units = [Unit::Ns, Unit::Ms, Unit::Percent, Unit::Count];
    let benches = [Bench::Limits, Bench::Dirty, Bench::Fault, Bench::Restore, Bench::Migrate, Bench::Boot];
    let mut tables = Vec::new();
    for bench in benches {
        let mut rows = vec![row(&[], Vec::new()), row(&[("tracker", EVIL), (EVIL, EVIL)], Vec::new())];
        for (number, samples) in values.iter().enumerate() {
            let names = names.iter().enumerate().filter(|(index, _)| index % 5 != number);
            let figures = names.map(|(index, name)| {
                let value = values[(number + index * (number % 2)) % values.len()];
                let figure = figure(
                    name,
                    units[(number + index) % units.len()],
                    if index < 4 { samples } else { value },
                );
                let ratio = samples.first().copied().unwrap_or(f64::NAN);
                let limit = Limit { name: EVIL.to_owned(), median: -ratio, ratio };
                Figure { limit: (index % 2 == 0).then_some(limit), ..figure }
            });
            let dirty = ["1 %", "0 %", "10 %", "-5 %", "nan %", "100 %", "1e400 %", EVIL, "1 %"];
            let tracker = format!("{EVIL}{}", number % 4);
            let pairs = [
                ("tracker", tracker.as_str()),
                ("monitor", EVIL),
                ("backing", if number % 2 == 0 { EVIL } else { "" }),
                ("dirty", dirty.get(number).copied().unwrap_or("1 %")),
                ("written", if number % 2 == 0 { "0 MB/s" } else { EVIL }),
            ];
            rows.push(row(&pairs, figures.collect()));
        }
        tables.push(Table { bench, title: EVIL.to_owned(), rows });
        tables.push(Table { bench, title: String::new(), rows: Vec::new() });
    }
    Results {
        vmm: EVIL.into(),
        began: EVIL.into(),
        seconds: f64::NAN,
        complete: false,
        host: HostFacts {
            cpu: EVIL.into(),
            kernel: EVIL.into(),
            kvm: EVIL.into(),
            thp: Some(EVIL.into()),
            noise: f64::INFINITY,
            load: f64::NAN,
            memory: u64::MAX,
            cpus: usize::MAX,
            ..HostFacts::default()
        },
        tables,
        skipped: vec![Skipped { what: EVIL.into(), why: EVIL.into() }],
        ..empty()
    }
}
