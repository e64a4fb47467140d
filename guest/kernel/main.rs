//! The guest kernel. See the `guest` library for what it is and `abi` for how it speaks to its monitor.
//!
//! The order of things: [`entry`] boots into ring 3; [`primary_start`] reads what the monitor left ([`boot`]),
//! decides where everything lies, builds the page tables of the region ([`paging`]), starts the other vCPUs
//! ([`smp`]) and works ([`work`]). RAM is taken to be zero at first, as it is in a machine just made, so that
//! nothing has to be cleared and nothing is touched that is not used.

#![no_std]
#![no_main]
#![allow(unreachable_pub, reason = "some modules belong to the library as well")]

#[path = "../src/abi.rs"]
#[allow(dead_code, reason = "the monitor's side uses the rest")]
mod abi;
#[path = "../src/cmdline.rs"]
mod cmdline;
#[path = "../src/histogram.rs"]
mod histogram;
#[path = "../src/layout.rs"]
mod layout;
#[path = "../src/pattern.rs"]
mod pattern;

mod boot;
mod clock;
mod entry;
mod io;
mod paging;
mod serial;
mod smp;
mod trap;
mod work;

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use abi::{Control, CpuControl, Doorbell, MAX_CPUS, status};
use cmdline::{BadValue, Config};
use layout::{Layout, LayoutError};
use serial::Line;

/// What the monitor sees.
static CONTROL: Control = Control {
    magic: AtomicU64::new(0),
    epoch: AtomicU32::new(0),
    stop: AtomicU32::new(0),
    cpus: AtomicU32::new(0),
    passes: AtomicU32::new(0),
    region_gpa: AtomicU64::new(0),
    region_pages: AtomicU64::new(0),
    writes_gpa: AtomicU64::new(0),
    reads_gpa: AtomicU64::new(0),
    kernel_start: AtomicU64::new(0),
    kernel_end: AtomicU64::new(0),
    low_page: AtomicU64::new(0),
    cpu: [const {
        CpuControl {
            in_flight: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
        }
    }; MAX_CPUS],
};

/// What is decided once, by vCPU 0 before any other runs.
struct Machine {
    config: Config,
    layout: Layout,
    /// TSC cycles per millisecond, 0 when nobody knows.
    tsc_khz: u64,
}

struct Once(UnsafeCell<MaybeUninit<Machine>>);

// SAFETY: written by `set` alone, before there is anybody to read; read-only from then on.
unsafe impl Sync for Once {}

impl Once {
    fn set(&self, machine: Machine) -> &Machine {
        // SAFETY: only vCPU 0 runs yet, and it calls this once.
        unsafe { (*self.0.get()).write(machine) }
    }

    fn get(&self) -> &Machine {
        // SAFETY: vCPU 0 called `set` before it started the vCPU that calls this.
        unsafe { (*self.0.get()).assume_init_ref() }
    }
}

static MACHINE: Once = Once(UnsafeCell::new(MaybeUninit::uninit()));

/// vCPUs whose workload has ended.
static ENDED: AtomicU32 = AtomicU32::new(0);

/// vCPU 0 in ring 3, straight from [`entry`].
#[unsafe(no_mangle)]
extern "C" fn primary_start(start_info: u64) -> ! {
    trap::install();
    serial::install();
    // SAFETY: the PVH entry's contract.
    let boot = match unsafe { boot::read(start_info) } {
        Ok(boot) => boot,
        Err(message) => give_up(Line::new("error").text("message", message)),
    };
    let config = match Config::parse(boot.command_line(), |_| ()) {
        Ok(config) => config,
        Err(BadValue { word, expected }) => {
            give_up(Line::new("error").bytes("bad_value", word).text("expected", expected))
        }
    };
    if config.interrupts {
        trap::enable_interrupts();
    }
    let tsc_khz = clock::tsc_khz(&config);
    if tsc_khz == 0 && config.rate.is_some_and(|rate| rate > 0) {
        give_up(
            Line::new("error").text("message", "rate= needs tsc_khz=: no clock tells how fast the TSC is"),
        );
    }
    let small = config.map != cmdline::Mapping::Huge;
    let wanted = config.region.div_ceil(layout::PAGE);
    let layout = match layout::plan(boot.ranges(), entry::image().1, wanted, small) {
        Ok(layout) if layout.pages >= u64::from(config.cpus) => layout,
        Ok(_) | Err(LayoutError::NoMemory) => {
            give_up(Line::new("error").text("message", "not enough memory for a region"))
        }
        Err(LayoutError::TooLarge(pages)) => {
            let line = Line::new("error").text("message", "region= is larger than memory allows");
            give_up(line.number("most", pages * layout::PAGE))
        }
    };
    let machine = MACHINE.set(Machine { config, layout, tsc_khz });
    paging::open_window(machine);
    announce(machine);
    if let Err(came) = smp::start(machine) {
        let line = Line::new("error").text("message", "vCPUs did not come");
        give_up(line.number("cpus", u64::from(machine.config.cpus)).number("came", u64::from(came)))
    }
    io::ring(Doorbell::Ready, 0);
    if !machine.config.quiet {
        // Nothing but the unknown words can be new.
        _ = Config::parse(boot.command_line(), |word| Line::new("note").bytes("ignored", word).end());
        let line = Line::new("start").text("workload", machine.config.workload.name());
        line.number("cpus", u64::from(machine.config.cpus)).number("pages", layout.pages).end();
    }
    if let Some(crash) = machine.config.crash {
        trap::crash(crash);
    }
    smp::go();
    work::run(machine, 0);
    ENDED.fetch_add(1, SeqCst);
    while ENDED.load(SeqCst) < machine.config.cpus {
        core::hint::spin_loop();
    }
    finish(report(machine))
}

/// Every other vCPU in ring 3, straight from [`entry`].
#[unsafe(no_mangle)]
extern "C" fn secondary_start(cpu: u32) -> ! {
    let machine = MACHINE.get();
    if machine.config.interrupts {
        trap::enable_interrupts();
    }
    smp::arrive();
    work::run(machine, cpu);
    ENDED.fetch_add(1, SeqCst);
    smp::sleep()
}

/// Tells the monitor where everything is.
fn announce(machine: &Machine) {
    let layout = &machine.layout;
    CONTROL.cpus.store(machine.config.cpus, Relaxed);
    CONTROL.region_gpa.store(layout.region, Relaxed);
    CONTROL.region_pages.store(layout.pages, Relaxed);
    CONTROL.writes_gpa.store(layout.writes, Relaxed);
    CONTROL.reads_gpa.store(layout.reads, Relaxed);
    CONTROL.kernel_start.store(entry::image().0, Relaxed);
    CONTROL.kernel_end.store(layout.end, Relaxed);
    CONTROL.low_page.store(if machine.config.cpus > 1 { entry::TRAMPOLINE as u64 } else { 0 }, Relaxed);
    CONTROL.magic.store(abi::MAGIC, SeqCst);
    io::ring(Doorbell::Announce, (&raw const CONTROL as usize as u32) >> 4);
}

/// Prints each vCPU's results; the status of the run.
fn report(machine: &Machine) -> u32 {
    let mut all_corrupt = 0;
    for cpu in 0..machine.config.cpus as usize {
        let counts = &CONTROL.cpu[cpu];
        let (writes, reads) = (counts.writes.load(Relaxed), counts.reads.load(Relaxed));
        let corrupt = counts.corrupt.load(Relaxed);
        all_corrupt += corrupt;
        let figures = &work::FIGURES[cpu];
        let cycles = figures.busy.load(Relaxed);
        let mut line = Line::new("result").number("cpu", cpu as u64);
        line = line.text("workload", machine.config.workload.name());
        line = line
            .number("writes", writes)
            .number("reads", reads)
            .number("faults", counts.faults.load(Relaxed));
        line = line.number("corrupt", corrupt).number("cycles", cycles);
        if machine.tsc_khz > 0 {
            let nanoseconds =
                |cycles: u64| (u128::from(cycles) * 1_000_000 / u128::from(machine.tsc_khz)) as u64;
            if let Some(each) = nanoseconds(cycles).checked_div(figures.accesses.load(Relaxed)) {
                line = line.number("ns_per_access", each);
            }
            if machine.config.latency {
                for (name, figure) in ["p50_ns", "p99_ns", "p999_ns", "max_ns"].iter().zip(&figures.latency) {
                    line = line.number(name, nanoseconds(figure.load(Relaxed)));
                }
            }
        }
        line.end();
    }
    if all_corrupt > 0 { status::CORRUPT } else { status::GOOD }
}

/// Ends the run over something that the command line or the machine does not allow.
fn give_up(line: Line) -> ! {
    line.end();
    finish(status::UNABLE)
}

/// Ends the run: tells our monitor, then tries what ends the run under any other.
fn finish(status: u32) -> ! {
    io::ring(Doorbell::Done, status);
    // QEMU's isa-debug-exit, whose exit status will be twice this plus one.
    io::out8(0xf4, status as u8 + 16);
    // The keyboard controller's reset line.
    io::out8(0x64, 0xfe);
    trap::triple_fault()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    Line::new("error").text("message", "the guest kernel broke an invariant of its own").end();
    finish(status::EXCEPTION)
}
