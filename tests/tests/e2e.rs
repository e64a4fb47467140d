//! End-to-end tests with the built-in guest: what the monitor reports is what the guest wrote. They need KVM
//! and nothing else, so the same executable runs on this machine and in the rig. Their limits are amounts of
//! work, never of time, because a guest in the rig is some hundred times slower.

use std::convert::Infallible;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dirty_track::addr::Gfn;
use dirty_track::rearm::{DenseSkip, Rearm};
use dirty_track::tracker::{Guarantees, Harvest, Kind, Slot, Tracker, TrackerError};
use dirty_track::walk::x86::{GuestTables, Mapping};
use dirty_track::walk::{Seen, Step, Walk};
use tests::conformance::{start, wait_until};
use tests::{e2e, skip};
use vmm::forecast::Link;
use vmm::ledger::{Agreement, Ledger};
use vmm::live::Observer;
use vmm::machine::{Machine, MachineConfig, MachineError, open_kvm};
use vmm::memory::{HugePages, MemoryConfig};
use vmm::track::TrackConfig;
use vmm::vcpu::End;

/// Of no account here.
const LINK: Link = Link { bytes_per_s: 1 << 30, downtime_s: 0.02 };

fn no_kvm(test: &str) -> bool {
    match open_kvm() {
        Ok(_) => false,
        Err(error) => {
            skip::skip(test, &error.to_string());
            true
        }
    }
}

fn config(cmdline: &str, cpus: u8, size: u64, huge: HugePages) -> MachineConfig {
    tests::conformance::config(cmdline, cpus, MemoryConfig { size, huge, ..MemoryConfig::default() })
}

/// Runs the guest for `epochs` epochs of at least `accesses` accesses each, and returns how each compares with
/// the ledger.
fn observe(observer: &mut Observer, epochs: usize, accesses: u64) -> Vec<Agreement> {
    observer.arm().unwrap();
    let progress = |observer: &Observer| observer.ledger().unwrap().accesses().unwrap();
    let mut agreements = Vec::new();
    for _ in 0..epochs {
        let begin = progress(observer);
        wait_until("the guest gets on", || progress(observer) - begin >= accesses);
        let epoch = observer.close_epoch().unwrap();
        agreements.push(epoch.ledger.expect("the ledger is checked"));
    }
    agreements
}

fn tracker(machine: &Machine, kind: Kind) -> Box<dyn Tracker> {
    if kind == Kind::KvmRing {
        // Whoever tries this first leaves the VM in a mode in which KVM protects nothing when a log is turned on.
        // The ring must not mind.
        machine.wait_for_ram();
        assert!(tracker(machine, Kind::KvmManual).arm().is_err());
    }
    machine.tracker(kind, &TrackConfig::default()).unwrap()
}

/// `kvm-manual` with another policy than to protect everything again.
fn leaving(machine: &Machine, rearm: Rearm) -> Box<dyn Tracker> {
    machine.tracker(Kind::KvmManual, &TrackConfig { rearm, ..TrackConfig::default() }).unwrap()
}

/// `config` as the tracker `kind` needs it: rings are so small that they fill up all the time.
fn prepared(kind: Kind, config: MachineConfig) -> MachineConfig {
    MachineConfig { dirty_ring: (kind == Kind::KvmRing).then_some(1024), ..config }
}

/// Ends the run and checks that the guest, which looks at all of its memory at the end, found it right, and
/// that an outside look at every page agrees.
fn end_well(machine: &Machine, observer: &Observer) {
    {
        let _still = machine.pause();
        assert_eq!(observer.ledger().unwrap().corrupt().unwrap(), [0u64; 0]);
    }
    observer.ask_guest_to_stop();
    wait_until("the guest ends", || machine.end().is_some());
    assert_eq!(machine.end(), Some(End::Reset));
    assert_eq!(machine.channel().status(), Some(0), "the guest found its memory wrong");
}

const MIB: u64 = 1 << 20;

/// One case: every epoch's report equals the ledger.
fn reports_equal_the_ledger(kind: Kind, cmdline: &str, cpus: u8, huge: HugePages) {
    let config = config(&format!("{cmdline} passes=0 verify=on"), cpus, 96 * MIB, huge);
    let machine = start(prepared(kind, config));
    let mut observer = Observer::new(Arc::clone(&machine), tracker(&machine, kind), true, LINK);
    let agreements = observe(&mut observer, 6, 4000);
    for (epoch, agreement) in (1..).zip(&agreements) {
        assert!(
            agreement.is_exact(),
            "{kind}, {cmdline}, {cpus} vCPUs, {huge}: epoch {epoch}: {agreement:?}"
        );
        assert!(agreement.in_flight <= 2 * u64::from(cpus));
    }
    let wrote: u64 = agreements.iter().map(|agreement| agreement.wrote).sum();
    if kind == Kind::KvmRing {
        let most = agreements.iter().map(|agreement| agreement.wrote).max().unwrap_or(0);
        assert!(most > u64::from(cpus) * 1024, "{cmdline}: {most} pages fit into the rings");
    }
    assert!(wrote > 1000, "{cmdline}: the guest wrote only {wrote} pages, which proves little");
    end_well(&machine, &observer);
}

#[test]
fn what_is_reported_is_what_the_guest_wrote() {
    if no_kvm("what_is_reported_is_what_the_guest_wrote") {
        return;
    }
    let mut machines = [(1, HugePages::Thp), (2, HugePages::Thp), (1, HugePages::None)];
    for workload in ["fill", "seq", "rand", "zipf", "stride", "hot"] {
        // In the rig each workload has another one.
        machines.rotate_left(1);
        for &(cpus, huge) in &machines[..if e2e::in_rig() { 1 } else { 3 }] {
            reports_equal_the_ledger(Kind::KvmManual, &format!("workload={workload} region=64M"), cpus, huge);
        }
    }
}

#[test]
fn it_is_so_with_dirty_rings_that_fill_up() {
    const NAME: &str = "it_is_so_with_dirty_rings_that_fill_up";
    if no_kvm(NAME) {
        return;
    }
    if let Err(MachineError::DirtyRings(error @ TrackerError::Unsupported { .. })) =
        Machine::new(prepared(Kind::KvmRing, config("", 1, 64 * MIB, HugePages::None)))
    {
        skip::skip(NAME, &error.to_string());
        return;
    }
    for workload in ["fill", "rand"] {
        for cpus in [1, 2] {
            let cmdline = format!("workload={workload} region=64M");
            reports_equal_the_ledger(Kind::KvmRing, &cmdline, cpus, HugePages::Thp);
        }
    }
}

#[test]
fn a_machine_has_the_rings_that_it_was_made_with() {
    if no_kvm("a_machine_has_the_rings_that_it_was_made_with") {
        return;
    }
    let config = || config("", 1, 64 * MIB, HugePages::None);
    let odd = Machine::new(MachineConfig { dirty_ring: Some(1000), ..config() }).map(drop).unwrap_err();
    let unsupported = matches!(odd, MachineError::DirtyRings(TrackerError::Unsupported { .. }));
    let size = matches!(odd, MachineError::DirtyRings(TrackerError::RingSize { asked: 1000, .. }));
    assert!(unsupported || size, "{odd}");
    let without = Machine::new(config()).unwrap();
    assert!(matches!(
        without.tracker(Kind::KvmRing, &TrackConfig::default()).map(drop),
        Err(TrackerError::NoRings)
    ));
}

#[test]
fn it_is_so_whatever_maps_the_memory_in_the_guest() {
    if no_kvm("it_is_so_whatever_maps_the_memory_in_the_guest") {
        return;
    }
    for map in ["map=4k", "map=lazy", "map=lazy around=16"] {
        reports_equal_the_ledger(
            Kind::KvmManual,
            &format!("workload=rand region=32M {map}"),
            2,
            HugePages::Thp,
        );
    }
}

#[test]
fn it_is_so_in_ring_0() {
    if no_kvm("it_is_so_in_ring_0") {
        return;
    }
    reports_equal_the_ledger(Kind::KvmManual, "workload=rand region=16M ring=0", 1, HugePages::Thp);
}

#[test]
fn reads_are_all_that_is_reported_beyond_the_ledger() {
    if no_kvm("reads_are_all_that_is_reported_beyond_the_ledger") {
        return;
    }
    let machine = start(config("workload=mixed region=64M reads=50 verify=on", 2, 96 * MIB, HugePages::Thp));
    let mut observer = Observer::new(Arc::clone(&machine), tracker(&machine, Kind::KvmManual), true, LINK);
    for (epoch, agreement) in (1..).zip(observe(&mut observer, 6, 4000)) {
        assert_eq!(agreement.missed, 0, "epoch {epoch}: {agreement:?}");
        assert_eq!(agreement.stray, 0, "epoch {epoch}: {agreement:?}");
        assert_eq!(agreement.extra, agreement.extra_read, "epoch {epoch}: {agreement:?}");
    }
    end_well(&machine, &observer);
}

/// With blocks left writable, no write is missed, and what is reported without having been written is said to
/// be coarse; a guest that is nowhere dense stays exact.
#[test]
fn blocks_left_writable_lose_nothing() {
    if no_kvm("blocks_left_writable_lose_nothing") {
        return;
    }
    for (workload, cpus, dense) in
        [("fill", 1, true), ("fill", 2, true), ("seq", 1, true), ("hot", 2, true), ("rand rate=4M", 1, false)]
    {
        let cmdline = format!("workload={workload} region=32M passes=0 verify=on");
        let machine = start(config(&cmdline, cpus, 96 * MIB, HugePages::Thp));
        let skip = Rearm::DenseSkip(DenseSkip::new(384, 3).unwrap());
        let tracker = leaving(&machine, skip);
        let mut observer = Observer::new(Arc::clone(&machine), tracker, true, LINK);
        // Each page three times or so, where the guest writes flat out.
        let accesses = if dense { 24_000 } else { 500 };
        for (epoch, agreement) in (1..).zip(observe(&mut observer, 12, accesses)) {
            let context = format!("{workload}, {cpus} vCPUs, epoch {epoch}: {agreement:?}");
            assert_eq!((agreement.missed, agreement.stray), (0, 0), "{context}");
            assert_eq!(agreement.extra, agreement.extra_read + agreement.extra_coarse, "{context}");
        }
        let coarse = observer.totals().coarse_pages;
        assert_eq!(coarse > 0, dense, "{workload}: {coarse} coarse pages");
        end_well(&machine, &observer);
    }
}

/// A guest that rewrites all of its region in each epoch takes faults for it under `all`, and next to none with
/// its blocks left writable. KVM counts them.
#[test]
fn blocks_left_writable_cost_no_faults() {
    if no_kvm("blocks_left_writable_cost_no_faults") {
        return;
    }
    const PAGES: u64 = 32 * MIB / 4096;
    let faults = |rearm| {
        let machine =
            start(config("workload=fill region=32M passes=0 verify=on", 1, 96 * MIB, HugePages::Thp));
        let mut observer = Observer::new(Arc::clone(&machine), leaving(&machine, rearm), true, LINK);
        observe(&mut observer, 3, 3 * PAGES);
        let before = observer.totals().faults;
        for _ in 0..8 {
            let begin = observer.ledger().unwrap().accesses().unwrap();
            wait_until("the guest gets on", || {
                observer.ledger().unwrap().accesses().unwrap() - begin >= 3 * PAGES
            });
            let agreement = observer.close_epoch().unwrap().ledger.unwrap();
            assert_eq!((agreement.missed, agreement.stray), (0, 0), "{agreement:?}");
        }
        let faults = observer.totals().faults - before;
        end_well(&machine, &observer);
        faults
    };
    let all = faults(Rearm::All);
    if all == 0 {
        return skip::skip("blocks_left_writable_cost_no_faults", "this KVM does not count page faults");
    }
    // KVM's counter is read a while after the harvest, so up to a pass of the first epoch counts as before it.
    assert!(all >= 7 * PAGES, "{all} faults");
    let skipped = faults(Rearm::DenseSkip(DenseSkip::default()));
    assert!(skipped < all / 20, "{skipped} faults with dense-skip, {all} without");
}

/// A tracker that loses one page of each harvest, the highest: the ledger must tell.
struct Forgetful(Box<dyn Tracker>);

impl Tracker for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }

    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        self.0.arm()
    }

    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError> {
        let mut harvest = self.0.harvest()?;
        let victim = harvest.runs().flat_map(|run| run.iter()).last();
        assert!(harvest.discard(victim.expect("the guest writes all the time")));
        Ok(harvest)
    }

    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError> {
        self.0.set_slots(slots)
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        self.0.disarm()
    }
}

#[test]
fn a_page_dropped_on_purpose_is_missed() {
    if no_kvm("a_page_dropped_on_purpose_is_missed") {
        return;
    }
    let machine = start(config("workload=rand region=64M", 1, 96 * MIB, HugePages::Thp));
    let forgetful = Box::new(Forgetful(tracker(&machine, Kind::KvmManual)));
    let mut observer = Observer::new(Arc::clone(&machine), forgetful, true, LINK);
    for agreement in observe(&mut observer, 3, 4000) {
        // The dropped page may be the one in flight, which is excused.
        assert!(agreement.missed == 1 || agreement.in_flight > 0, "{agreement:?}");
        assert!(agreement.missed <= 1, "{agreement:?}");
    }
    assert!(observer.totals().missed >= 1 && observer.totals().contradicted());
}

#[test]
fn a_machine_stands_still_while_paused_and_goes_on_afterwards() {
    if no_kvm("a_machine_stands_still_while_paused_and_goes_on_afterwards") {
        return;
    }
    let machine = start(config("workload=rand region=64M verify=on", 2, 96 * MIB, HugePages::Thp));
    let mut observer = Observer::new(Arc::clone(&machine), tracker(&machine, Kind::KvmManual), true, LINK);
    observer.arm().unwrap();
    let progress = || observer.ledger().unwrap().accesses().unwrap();
    for round in 0..50 {
        {
            let _still = machine.pause();
            let _twice = (round % 2 == 0).then(|| machine.pause());
            let before = progress();
            thread::sleep(Duration::from_millis(round % 3));
            assert_eq!(progress(), before, "a paused guest moved");
        }
        let before = progress();
        wait_until("the guest goes on", || progress() > before);
    }
    end_well(&machine, &observer);
}

#[test]
fn guests_of_any_size_start_and_use_all_of_their_memory() {
    if no_kvm("guests_of_any_size_start_and_use_all_of_their_memory") {
        return;
    }
    // Not touched but for a page here and there: 4000 random pages of up to 63 GiB.
    for size in [64 * MIB, 1024 * MIB, 3072 * MIB, 4096 * MIB, 65536 * MIB] {
        let machine = start(config("workload=rand pages=500", 1, size, HugePages::None));
        let mut observer =
            Observer::new(Arc::clone(&machine), tracker(&machine, Kind::KvmManual), true, LINK);
        for agreement in observe(&mut observer, 2, 1000) {
            assert!(agreement.is_exact(), "{size}: {agreement:?}");
        }
        let pages = observer.ledger().unwrap().pages();
        assert!(pages * 4096 >= size / 2, "{size}: the guest found only {pages} pages for its region");
    }
}

/// As the kernel's own dirty_log_page_splitting_test has it: nothing is huge any more once everything was written
/// under the log, and as much as before is huge again when logging is off and memory has been touched.
#[test]
fn huge_mappings_are_split_by_writes_and_come_back_after_disarm() {
    let test = "huge_mappings_are_split_by_writes_and_come_back_after_disarm";
    if no_kvm(test) {
        return;
    }
    let cmdline = "workload=fill region=64M passes=0 populate=on verify=on";
    let machine = start(config(cmdline, 1, 96 * MIB, HugePages::Thp));
    let Ok(mut stats) = machine.vm_stats() else { return skip::skip(test, "this KVM has no statistics") };
    let Some(id) = stats.find("pages_2m") else {
        return skip::skip(test, "this KVM does not count mappings");
    };
    let mut huge = || {
        stats.refresh().unwrap();
        stats.get(id)
    };
    let mut observer = Observer::new(Arc::clone(&machine), tracker(&machine, Kind::KvmManual), true, LINK);
    let pass = |observer: &Observer| {
        let begin = observer.ledger().unwrap().accesses().unwrap();
        wait_until("the guest has written all of its region", || {
            observer.ledger().unwrap().accesses().unwrap() - begin >= 2 * observer.ledger().unwrap().pages()
        });
    };
    observer.arm().unwrap();
    observer.disarm().unwrap();
    pass(&observer);
    let before = huge();
    if before == 0 {
        return skip::skip(test, "the host gave the guest no huge pages");
    }

    observer.arm().unwrap();
    pass(&observer);
    let epoch = observer.close_epoch().unwrap();
    assert!(epoch.ledger.is_some_and(|agreement| agreement.is_exact()));
    let region = observer.ledger().unwrap().pages() / 512;
    let split = huge();
    assert!(
        split <= before - region.min(before),
        "{before} mappings were huge, {split} still are, {region} were written"
    );

    observer.disarm().unwrap();
    pass(&observer);
    let after = huge();
    assert!(after >= before, "{before} mappings were huge before tracking, {after} are again");
    end_well(&machine, &observer);
}

/// The built-in guest has one address space, and all that it writes is its own.
#[test]
fn dirty_pages_have_an_owner() {
    if no_kvm("dirty_pages_have_an_owner") {
        return;
    }
    for (cpus, map) in [(1, "2m"), (2, "4k")] {
        let cmdline = format!("workload=rand region=32M map={map} passes=0 verify=on");
        let machine = start(config(&cmdline, cpus, 64 * MIB, HugePages::Thp));
        let mut observer =
            Observer::new(Arc::clone(&machine), tracker(&machine, Kind::KvmManual), true, LINK);
        observer.show_owners();
        observer.arm().unwrap();
        let begin = observer.ledger().unwrap().accesses().unwrap();
        wait_until("the guest gets on", || observer.ledger().unwrap().accesses().unwrap() - begin >= 2000);
        let epoch = observer.close_epoch().unwrap();
        let owners = epoch.owners.expect("it was asked for");
        let [space] = &owners[..] else { panic!("{owners:?}") };
        assert_eq!(space.vcpus, (0..cpus).collect::<Vec<_>>());
        assert!(space.complete && space.user_pages <= space.pages && space.pages <= epoch.dirty_pages);
        let wrote = epoch.ledger.unwrap().wrote;
        assert!(wrote > 1000 && space.user_pages >= wrote, "{wrote} written, {space:?}");
        assert!(space.runs.iter().all(|run| run.user && run.writable));
        end_well(&machine, &observer);
    }
}

/// The guest's own demand paging does as the monitor's: of the pages that one of its faults maps, those that came along
/// have no accessed bit, and a walk over its tables tells them from the ones that it touched.
#[test]
fn what_came_along_in_the_guests_own_tables_is_old() {
    let test = "what_came_along_in_the_guests_own_tables_is_old";
    if no_kvm(test) {
        return;
    }
    for (reads, around) in [(0, 16), (100, 16), (50, 1)] {
        let cmdline =
            format!("workload=rand region=32M map=lazy around={around} reads={reads} rate=4M passes=0");
        let machine = start(config(&cmdline, 1, 64 * MIB, HugePages::None));
        let control = machine.channel().control().expect("the guest has announced itself");
        let ledger = Ledger::attach(Arc::clone(machine.ram()), control).unwrap();
        wait_until("the guest gets on", || ledger.accesses().unwrap() >= 200);
        let still = machine.pause();
        let entered = ledger.entered(0).unwrap();
        let (vcpu, registers) = still.system_registers()[0];
        assert_eq!(vcpu, 0);
        let paging = vmm::owners::paging(&registers, 52).expect("the guest runs in 64-bit mode");
        let tables = GuestTables::new(machine.ram().mem(), paging, 1 << 20).unwrap();
        let (mut old, mut young, mut dirty) = (Vec::new(), Vec::new(), Vec::new());
        Walk::new(&tables)
            .huge(|_| Ok(Step::Handled))
            .leaves(|pages, mapping: Mapping| {
                let frames = (mapping.gfn.0..).map(Gfn).take((pages.end - pages.start) as usize);
                for gfn in frames.filter(|gfn| mapping.user && entered.region.contains(*gfn)) {
                    if mapping.accessed { &mut young } else { &mut old }.push(gfn);
                    dirty.extend(mapping.dirty.then_some(gfn));
                }
                Ok::<_, Infallible>(Seen::All)
            })
            .run(tables.pages())
            .unwrap();
        let listed = |words: &[&Vec<u64>]| -> Vec<Gfn> {
            let pages = 0..entered.region.pages;
            let has = |page: u64| words.iter().any(|words| words[page as usize / 64] >> (page % 64) & 1 != 0);
            pages.filter(|page| has(*page)).map(|page| Gfn(entered.region.start.0 + page)).collect()
        };
        // The page that is in flight may have been touched and not be entered, or the other way round.
        let settled = |mut pages: Vec<Gfn>| {
            pages.retain(|gfn| !entered.in_flight.contains(gfn));
            pages.sort_unstable();
            pages
        };
        let touched = settled(listed(&[&entered.wrote, &entered.read]));
        assert!(touched.len() > 100, "{} pages touched", touched.len());
        assert_eq!(settled(young), touched, "reads={reads} around={around}: accessed");
        assert_eq!(settled(dirty), settled(listed(&[&entered.wrote])), "reads={reads}: dirty");
        // A window of 16 is full; some were hit twice.
        let mapped = old.len() + touched.len();
        assert!(if around == 1 { old.len() <= 1 } else { mapped > 10 * touched.len() }, "{} old", old.len());
        drop(still);
        ledger.stop().unwrap();
        wait_until("the guest ends", || machine.end().is_some());
        assert_eq!(machine.channel().status(), Some(0));
    }
}
