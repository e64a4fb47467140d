//! Every tracker under the conformance suite, with the built-in guest, on the KVM at hand: this machine's, and the
//! rig's, where the same executable runs. And that a guest gets on under those that let it wait, whatever it has
//! agreed with KVM about waiting.
//!
//! `SOAK=N` repeats each plan with N times the epochs; see the README.

use std::fs;

use dirty_track::addr::PageSize;
use dirty_track::conformance::{self, Failure, Plan, Report};
use dirty_track::rearm::{DenseSkip, Rearm};
use dirty_track::tracker::{Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};
use tests::conformance::{Guest, config, start, wait_until};
use tests::hugetlb::Reserved;
use tests::{e2e, skip, tiny, virtio_disk};
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::Kernel;
use vmm::host;
use vmm::machine::{Machine, MachineConfig, open_kvm};
use vmm::memory::{Faults, HugePages, MemoryConfig};
use vmm::track::{TrackConfig, backing, facts};

const MIB: u64 = 1 << 20;
/// RAM of every guest here.
const MEMORY: u64 = 64 * MIB;

/// A guest's command line and the machine around it.
#[derive(Clone, Copy, Debug)]
struct Case {
    cmdline: &'static str,
    cpus: u8,
    huge: HugePages,
    shared: bool,
}

const fn case(cmdline: &'static str, cpus: u8, huge: HugePages, shared: bool) -> Case {
    Case { cmdline, cpus, huge, shared }
}

/// Backings, rings, numbers of vCPUs and workloads: each value of each with some values of the others.
const CASES: [Case; 7] = [
    case("workload=mixed region=48M reads=50", 2, HugePages::Thp, false),
    case("workload=rand region=32M", 1, HugePages::Thp, false),
    case("workload=fill region=16M", 4, HugePages::None, false),
    case("workload=hot region=32M map=4k", 2, HugePages::None, true),
    case("workload=zipf region=32M map=lazy around=16", 2, HugePages::Thp, true),
    case("workload=rand region=16M ring=0", 1, HugePages::Thp, false),
    case("workload=stride region=32M", 1, HugePages::None, true),
];

/// Entries of a dirty ring: few, so that it fills up.
const RING_ENTRIES: u32 = 1024;

/// Runs `case` and says what came of it. `track` names a tracker.
fn run(case: &Case, track: &TrackConfig, plan: &Plan) -> Result<Report, Box<dyn std::error::Error>> {
    let kind = track.kind.expect("the tracker is named");
    let fault = if kind == Kind::UffdServe { Faults::Uffd } else { Faults::Kernel };
    let memory = MemoryConfig { size: MEMORY, huge: case.huge, shared: case.shared, fault, prealloc: false };
    let cmdline = format!("{} passes=0 verify=on", case.cmdline);
    let mut config = config(&cmdline, case.cpus, memory);
    config.dirty_ring = (kind == Kind::KvmRing).then_some(RING_ENTRIES);
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("disk");
    config.disks.push(virtio_disk::make(&disk)?);
    let machine = start(config);
    let mut tracker = machine.tracker(kind, track)?;
    // The guarantees that the suite enforces are those of the table that users see; but for the unit asked for.
    let table = kind.guarantees(backing(memory));
    let table = Guarantees { granularity: table.granularity.max(track.unit), ..table };
    assert_eq!(tracker.guarantees(), table, "{kind}");
    let mut guest = Guest::with_disk(&machine, &disk);
    let report = conformance::run(&mut guest, &mut *tracker, plan)?;
    guest.end_well();
    Ok(report)
}

fn soak() -> u32 {
    std::env::var("SOAK").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Every case, as often as asked for.
fn conforms(kind: Kind) {
    conform(&format!("{kind} conforms"), &kind.into(), e2e::some(&CASES));
}

fn conform(test: &str, track: &TrackConfig, cases: &[Case]) {
    let kind = track.kind.expect("the tracker is named");
    if let Err(error) = open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let facts = facts(&host::probe());
    if let Some(lacks) = kind.lacks(&facts) {
        return skip::skip(test, &format!("this host lacks {lacks}"));
    }
    let mut reported = 0;
    for (seed, case) in (1..).zip(cases) {
        if case.cmdline.contains("ring=0")
            && kind.caveat(&facts).is_some_and(|caveat| caveat.contains("ring 3 only"))
        {
            skip::skip(test, "writes in ring 0: not on this host, as the table of trackers says");
            continue;
        }
        reported += conforms_in(track, case, seed);
    }
    println!("{test}: {reported} pages reported, none missed");
}

/// One case; the number of pages reported.
fn conforms_in(track: &TrackConfig, case: &Case, seed: u64) -> u64 {
    let times = soak();
    let plan = Plan { seed, sharp: 3 * times, racing: 6 * times, ..Plan::default() };
    match run(case, track, &plan) {
        Ok(report) => {
            println!("{track:?}: {case:?}: {report}");
            report.reported
        }
        Err(failure) => panic!("{track:?}: {case:?}: {failure}"),
    }
}

#[test]
fn kvm_bitmap_conforms() {
    conforms(Kind::KvmBitmap);
}

#[test]
fn kvm_manual_conforms() {
    conforms(Kind::KvmManual);
}

#[test]
fn kvm_ring_conforms() {
    conforms(Kind::KvmRing);
}

#[test]
fn uffd_sync_conforms() {
    conforms(Kind::UffdSync);
}

#[test]
fn uffd_sync_by_blocks_conforms() {
    let track = TrackConfig { unit: PageSize::M2, ..Kind::UffdSync.into() };
    conform("uffd-sync by 2M conforms", &track, &CASES[..if e2e::in_rig() { 1 } else { 2 }]);
}

#[test]
fn kvm_manual_with_dense_skip_conforms() {
    let rearm = Rearm::DenseSkip(DenseSkip::new(64, 2).expect("in range"));
    let track = TrackConfig { rearm, ..Kind::KvmManual.into() };
    // One guest has dense blocks, the other has none.
    let cases = [CASES[2], CASES[1]];
    conform("kvm-manual with dense-skip conforms", &track, &cases[..if e2e::in_rig() { 1 } else { 2 }]);
}

#[test]
fn uffd_async_conforms() {
    conforms(Kind::UffdAsync);
}

#[test]
fn uffd_serve_conforms() {
    conforms(Kind::UffdServe);
}

#[test]
fn exact_conforms() {
    conforms(Kind::Exact);
}

/// All of them over pages of hugetlb, one after the other: the host has to have the pages.
#[test]
fn all_conform_over_hugetlb() {
    let test = "all_conform_over_hugetlb";
    if let Err(error) = open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let _pages = match Reserved::pages(MEMORY / (2 * MIB)) {
        Ok(pages) => pages,
        Err(why) => return skip::skip(test, &why),
    };
    let facts = facts(&host::probe());
    let trackers = Kind::ALL.into_iter().filter(|kind| *kind != Kind::None);
    for (seed, kind) in (100..).zip(trackers) {
        if let Some(lacks) = kind.lacks(&facts) {
            skip::skip(test, &format!("{kind}: this host lacks {lacks}"));
            continue;
        }
        // In the rig private memory and a file take turns.
        let backings = [seed % 2 == 0, seed % 2 == 1];
        for &shared in &backings[..if e2e::in_rig() { 1 } else { 2 }] {
            conforms_in(
                &kind.into(),
                &case("workload=rand region=16M", 2, HugePages::Hugetlb2M, shared),
                seed,
            );
        }
    }
}

/// A tracker with one fault, which the suite must find.
struct Faulty {
    inner: Box<dyn Tracker>,
    fault: Fault,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Loses some pages of each harvest.
    DropsPages,
    /// Forgets a harvest that was not committed.
    ForgetsDropped,
    /// Claims not to report reads.
    HidesReads,
    /// Is armed twice.
    ArmsTwice,
}

impl Tracker for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn guarantees(&self) -> Guarantees {
        let may_report_reads = self.fault != Fault::HidesReads;
        Guarantees { may_report_reads, ..self.inner.guarantees() }
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        match self.inner.arm() {
            Err(TrackerError::AlreadyArmed) if self.fault == Fault::ArmsTwice => Ok(()),
            outcome => outcome,
        }
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        if self.fault == Fault::ForgetsDropped {
            self.inner.harvest()?.commit();
        }
        let mut harvest = self.inner.harvest()?;
        if self.fault == Fault::DropsPages {
            // One alone may be a page that is the same again.
            let victims: Vec<_> = harvest.runs().flat_map(|run| run.iter()).step_by(4).collect();
            victims.into_iter().for_each(|victim| {
                harvest.discard(victim);
            });
        }
        Ok(harvest)
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.inner.set_slots(slots)
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.inner.disarm()
    }
}

/// A suite that lets these pass would prove nothing about the others.
#[test]
fn faults_are_found() {
    if let Err(error) = open_kvm() {
        return skip::skip("faults_are_found", &error.to_string());
    }
    let broken = |workload: &str, fault: Fault, plan: Plan| {
        let memory = MemoryConfig { size: MEMORY, huge: HugePages::Thp, ..MemoryConfig::default() };
        let machine = start(config(&format!("{workload} region=32M passes=0"), 1, memory));
        let mut tracker =
            Faulty { inner: machine.tracker(Kind::KvmManual, &TrackConfig::default()).unwrap(), fault };
        conformance::run(&mut Guest::of(&machine), &mut tracker, &plan)
    };
    let found = |outcome: Result<Report, Failure>| outcome.expect_err("the fault was not found");
    let (writes, mixed) = ("workload=rand", "workload=mixed reads=50");
    let plan = Plan::default();
    let failure = found(broken(writes, Fault::DropsPages, Plan { drop_every: 0, ..plan }));
    assert!(matches!(failure, Failure::Missed { .. } | Failure::MissedHost { .. }), "{failure}");
    // Without the ledger, the copy tells.
    let failure = found(broken(writes, Fault::DropsPages, Plan { drop_every: 0, sharp: 0, ..plan }));
    assert!(matches!(failure, Failure::Differs { .. }), "{failure}");
    let failure = found(broken(writes, Fault::ForgetsDropped, plan));
    assert!(matches!(failure, Failure::Missed { .. } | Failure::Forgotten { .. }), "{failure}");
    match broken(mixed, Fault::HidesReads, plan) {
        // A KVM that keeps what it logs mapped has no read faults to report.
        Ok(report) => assert_eq!(report.extra, 0, "reads were reported and passed"),
        Err(failure) => assert!(matches!(failure, Failure::Extra { done: "read", .. }), "{failure}"),
    }
    let failure = found(broken(mixed, Fault::ArmsTwice, plan));
    assert!(matches!(failure, Failure::Protocol(_)), "{failure}");
}

/// Where [`counter`]'s guest counts.
const COUNT: u32 = 0x20_0000;

/// A kernel that takes KVM's asynchronous page faults if they are offered, as Linux does (Documentation/virt/kvm/x86/msr.rst,
/// MSR_KVM_ASYNC_PF_EN), and enables interrupts before it has an APIC that is enabled, as Linux does. Then it counts
/// up the word at [`COUNT`] for ever.
fn counter() -> Vec<u8> {
    const FEATURES: u32 = 0x4000_0001;
    const ASYNC_PF_INT: u8 = 14;
    const MSR_ASYNC_PF_INT: u32 = 0x4b56_4d06;
    const MSR_ASYNC_PF_EN: u32 = 0x4b56_4d02;
    const VECTOR: u32 = 0xf3;
    /// A page for KVM's words, and the bits for enabled and by interrupt.
    const ENABLE: u32 = (COUNT + 0x1000) | 1 | 8;
    let eax = |value: u32| [&[0xb8][..], &value.to_le_bytes()].concat();
    // mov ecx, msr; mov eax, value; xor edx, edx; wrmsr
    let write = |msr: u32, value: u32| {
        [&[0xb9][..], &msr.to_le_bytes(), &eax(value), &[0x31, 0xd2, 0x0f, 0x30]].concat()
    };
    let enable = [write(MSR_ASYNC_PF_INT, VECTOR), write(MSR_ASYNC_PF_EN, ENABLE)].concat();
    [
        eax(FEATURES),
        vec![0x0f, 0xa2],                     // cpuid
        vec![0x0f, 0xba, 0xe0, ASYNC_PF_INT], // bt eax, ASYNC_PF_INT
        vec![0x73, enable.len() as u8],       // jnc over `enable`
        enable,
        vec![0xfb],                                         // sti
        [&[0xff, 0x05][..], &COUNT.to_le_bytes()].concat(), // inc dword [COUNT]
        vec![0xeb, 0xf8],                                   // jmp to the line before
    ]
    .concat()
}

/// Rounds of protecting and writing.
const ROUNDS: usize = 20;

/// More faults than a guest needs that does nothing but to write the same page again, by thousands.
const TOO_MANY_FAULTS: u64 = 10_000;

/// Where KVM brings pages asynchronously, one that was brought and is protected again has to be brought again.
#[test]
fn guests_that_take_asynchronous_faults_get_on() {
    let test = "guests_that_take_asynchronous_faults_get_on";
    if let Err(error) = open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let facts = facts(&host::probe());
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, tiny::kernel(&counter())).unwrap();
    for kind in [Kind::UffdSync, Kind::UffdServe, Kind::UffdAsync, Kind::Exact] {
        if let Some(lacks) = kind.lacks(&facts) {
            skip::skip(test, &format!("{kind}: this host lacks {lacks}"));
            continue;
        }
        let fault = if kind == Kind::UffdServe { Faults::Uffd } else { Faults::Kernel };
        let memory = MemoryConfig { size: MEMORY, fault, ..MemoryConfig::default() };
        let config = MachineConfig { kernel: Kernel::File(kernel.clone()), ..config("", 1, memory) };
        let machine = Machine::new(config).unwrap();
        let mut tracker = machine.tracker(kind, &kind.into()).unwrap();
        let count = || machine.ram().mem().read_obj::<u32>(GuestAddress(COUNT.into())).unwrap();
        let mut stats = machine.take_vcpu_stats().pop();
        let mut faults = || {
            let Some(stats) = &mut stats else { return 0 };
            stats.refresh().unwrap();
            stats.find("pf_taken").map_or(0, |id| stats.get(id))
        };
        machine.start().unwrap();
        wait_until("the guest counts", || count() > 0);
        tracker.arm().unwrap();
        for round in 0..ROUNDS {
            let (counted, taken) = (count(), faults());
            wait_until("the guest counts on", || {
                let taken = faults() - taken;
                assert!(taken < TOO_MANY_FAULTS, "{kind}: stuck in round {round} after {taken} faults");
                count() > counted
            });
            tracker.harvest().unwrap().commit();
        }
        machine.stop();
    }
}
