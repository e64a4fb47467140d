//! What the tracker adds to the ioctls that it must issue, and to the guest's first writes: `kvm-manual` against a
//! minimal loop over the same memslots of the same running guest, turn by turn.
//!
//! The guest rings after each pass and stands still until it is answered. Each answer is a harvest, by the bare
//! loop and by the tracker in turns; the pass that follows runs over pages that this harvest protected. So harvest
//! and pass of both kinds are medians of the same run on the same memory.
//!
//! `cargo bench -p tests --bench harvest`

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use dirty_track::bitmap::words_for;
use dirty_track::sys::kvm::LoggedSlot;
use dirty_track::tracker::{Kind, Tracker};
use guest::abi::Doorbell;
use tests::conformance::config;
use vmm::machine::{Machine, open_kvm};
use vmm::memory::{HugePages, MemoryConfig};
use vmm::track::TrackConfig;

/// Passes that are not counted: first touches, and KVM's first faults.
const WARM_UP: usize = 2;

/// What happened in one turn.
struct Turn {
    harvest: Duration,
    pages: u64,
    /// The pass that ran over what the harvest protected.
    pass: Duration,
}

/// GET, then CLEAR in the chunks that the tracker uses, and nothing else.
struct Bare {
    slots: Vec<(LoggedSlot, Vec<u64>, usize)>,
}

/// Pages that one CLEAR covers: KVM holds its MMU lock meanwhile. The tracker's own number.
const CHUNK: usize = 1 << 15;

impl Bare {
    fn of(machine: &Machine) -> Bare {
        let slots = machine.slots().into_iter().map(|slot| {
            let pages = slot.frames().pages as usize;
            let mut logged = LoggedSlot::new(Arc::clone(machine.vm()), slot);
            // On already, by the tracker: this makes the wrapper know.
            logged.set_logging(true).unwrap();
            (logged, vec![0; words_for(pages)], pages)
        });
        Bare { slots: slots.collect() }
    }

    fn harvest(&mut self) -> u64 {
        let mut found = 0;
        for (slot, words, pages) in &mut self.slots {
            slot.get_dirty_log(words).unwrap();
            for (chunk, bits) in words.chunks(CHUNK / 64).enumerate() {
                if bits.iter().all(|word| *word == 0) {
                    continue;
                }
                let first = chunk * CHUNK;
                slot.clear_dirty_log(first as u64, CHUNK.min(*pages - first) as u32, bits).unwrap();
                found += bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            }
        }
        found
    }
}

/// `passes` turns of each kind: (bare, tracker).
fn turns(cmdline: &str, passes: usize) -> (Vec<Turn>, Vec<Turn>) {
    type Parts = (Box<dyn Tracker>, Bare);
    let parts: Arc<Mutex<Option<Parts>>> = Arc::default();
    let for_bell = Arc::clone(&parts);
    let (report, reports) = mpsc::channel();
    let state = Mutex::new((0usize, None::<(Instant, Duration, u64)>));
    let doorman = move |_: u8, bell: Doorbell, _: u32| {
        if bell != Doorbell::Pass {
            return;
        }
        let now = Instant::now();
        let mut parts = for_bell.lock().unwrap();
        let Some((tracker, bare)) = parts.as_mut() else { return };
        let mut state = state.lock().unwrap();
        let (turn, last) = &mut *state;
        if let Some((since, harvest, pages)) = last.take() {
            // The receiver has gone when it has enough.
            let _ = report.send((*turn, Turn { harvest, pages, pass: now - since }));
        }
        *turn += 1;
        let begin = Instant::now();
        let pages = if turn.is_multiple_of(2) {
            bare.harvest()
        } else {
            let harvest = tracker.harvest().unwrap();
            let pages = harvest.count();
            harvest.commit();
            pages
        };
        *last = Some((Instant::now(), begin.elapsed(), pages));
    };
    let memory = MemoryConfig { size: 1 << 30, huge: HugePages::Thp, ..MemoryConfig::default() };
    let mut config = config(&format!("{cmdline} passes=0 barrier=on"), 1, memory);
    config.doorman = Some(Arc::new(doorman));
    let machine = Machine::new(config).unwrap();
    machine.start().unwrap();
    machine.wait_for_ram();
    let mut tracker = machine.tracker(Kind::KvmManual, &TrackConfig::default()).unwrap();
    tracker.arm().unwrap();
    *parts.lock().unwrap() = Some((tracker, Bare::of(&machine)));
    let (mut bare, mut tracked) = (Vec::new(), Vec::new());
    for (turn, measured) in reports.iter().skip(2 * WARM_UP).take(2 * passes) {
        if turn.is_multiple_of(2) { bare.push(measured) } else { tracked.push(measured) }
    }
    machine.stop();
    *parts.lock().unwrap() = None;
    (bare, tracked)
}

fn median(turns: &[Turn], value: fn(&Turn) -> f64) -> f64 {
    let mut values: Vec<f64> = turns.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    if let Err(error) = open_kvm() {
        return println!("SKIPPED: {error}");
    }
    println!("kvm-manual over a 1 GiB guest, medians; ratio: tracker / bare ioctls");
    println!(
        "{:<26}{:>9}{:>12}{:>12}{:>8}{:>14}{:>14}{:>8}",
        "dirty", "pages", "bare µs", "tracker µs", "ratio", "bare ns/write", "tracker ns", "ratio"
    );
    let cases = [
        ("0 %", "workload=read region=8M pages=64", 201),
        ("1 %", "workload=rand pages=2600", 101),
        ("100 % of 960 MiB", "workload=fill region=960M", 5),
    ];
    for (name, cmdline, passes) in cases {
        let (bare, tracked) = turns(cmdline, passes);
        let micros = |turns: &[Turn]| median(turns, |turn| turn.harvest.as_secs_f64() * 1e6);
        let pages = median(&tracked, |turn| turn.pages as f64);
        let per_write = |turns: &[Turn]| median(turns, |turn| turn.pass.as_secs_f64() * 1e9) / pages.max(1.0);
        let (b, t) = (micros(&bare), micros(&tracked));
        print!("{name:<26}{pages:>9}{b:>12.1}{t:>12.1}{:>8.2}", t / b);
        match pages as u64 {
            0..100 => println!(),
            _ => println!(
                "{:>14.0}{:>14.0}{:>8.2}",
                per_write(&bare),
                per_write(&tracked),
                per_write(&tracked) / per_write(&bare)
            ),
        }
    }
}
