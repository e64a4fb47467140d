//! Our own machine, with the built-in guest, as a subject of the conformance suite.

use std::time::{Duration, Instant};
use std::{io, path::Path, sync::Arc, thread};

use dirty_track::addr::{Gfn, PAGE_SIZE, PageRange};
use dirty_track::conformance::{self, Page, Subject, SubjectError};
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::Kernel;
use vmm::fault::FaultConfig;
use vmm::ledger::Ledger;
use vmm::machine::{Machine, MachineConfig, Paused};
use vmm::memory::MemoryConfig;
use vmm::timing::Timing;

use crate::e2e;
use crate::virtio_disk::Driver;

/// How long a guest may make no progress before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A machine with the built-in guest under `cmdline` and what [`e2e::GUEST_ENV`] says.
pub fn config(cmdline: &str, cpus: u8, memory: MemoryConfig) -> MachineConfig {
    let besides = std::env::var(e2e::GUEST_ENV).unwrap_or_default();
    MachineConfig {
        memory,
        cpus,
        kernel: Kernel::BuiltIn,
        initrd: None,
        cmdline: format!("{cmdline} quiet=on {besides}"),
        disks: Vec::new(),
        rng: false,
        console: Box::new(io::sink()),
        timing: Timing::start(),
        doorman: None,
        fault: FaultConfig::default(),
        from: None,
        dirty_ring: None,
    }
}

/// Starts the built-in guest and waits for its workload.
pub fn start(config: MachineConfig) -> Arc<Machine> {
    let machine = Arc::new(Machine::new(config).unwrap());
    machine.start().unwrap();
    wait_until("the workload runs", || machine.channel().begun().read().is_ok());
    machine.wait_for_ram();
    machine
}

/// Returns when `reached` says so.
///
/// # Panics
/// When it does not say so for longer than anything takes.
pub fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// A machine whose built-in guest is at work.
pub struct Guest<'a> {
    machine: &'a Machine,
    ledger: Ledger,
    still: Option<Paused<'a>>,
    disk: Option<Driver<'a>>,
}

impl<'a> Guest<'a> {
    /// The guest of `machine`, which has announced its ledger.
    pub fn of(machine: &'a Machine) -> Guest<'a> {
        let control = machine.channel().control().expect("the guest has announced itself");
        let ledger = Ledger::attach(Arc::clone(machine.ram()), control).expect("it is our own guest");
        Guest { machine, ledger, still: None, disk: None }
    }

    /// The same, with the host's writes made by the machine's virtio disk, whose file is at `path`.
    pub fn with_disk(machine: &'a Machine, path: &Path) -> Guest<'a> {
        let mut guest = Guest::of(machine);
        let area = guest.host_area();
        let page = Gfn(area.end().0 - 1);
        guest.disk = Some(Driver::start(machine, path, page).expect("the machine has a disk"));
        guest
    }

    /// Ends the workload: the guest looks at all of its memory once more, and what it finds is its status.
    pub fn end_well(self) {
        drop(self.still);
        self.ledger.stop().unwrap();
        wait_until("the guest ends", || self.machine.end().is_some());
        assert_eq!(self.machine.channel().status(), Some(0), "the guest found its memory wrong");
    }
}

impl Subject for Guest<'_> {
    fn ram(&self) -> Vec<PageRange> {
        let regions = self.machine.ram().regions().iter();
        let frames = |gpa: u64, len: u64| PageRange { start: Gfn(gpa / PAGE_SIZE), pages: len / PAGE_SIZE };
        regions.map(|region| frames(region.gpa, region.len)).collect()
    }

    /// What is left above the guest's region.
    fn host_area(&self) -> PageRange {
        let ram = self.ram()[0];
        let entered = self.ledger.entered(0).expect("the ledger was read before");
        let ends = entered
            .own
            .iter()
            .chain([&entered.region])
            .map(|range| range.end())
            .filter(|end| *end <= ram.end());
        let start = ends.max().unwrap_or(ram.start);
        // A driver's queue is at the end.
        let end = ram.end().0 - u64::from(self.disk.is_some());
        PageRange { start, pages: end - start.0 }
    }

    fn stop(&mut self) {
        self.still = Some(self.machine.pause());
    }

    fn go(&mut self) {
        self.still = None;
    }

    fn begin_epoch(&mut self, epoch: u32) -> Result<(), SubjectError> {
        Ok(self.ledger.begin(epoch)?)
    }

    fn let_work(&mut self, accesses: u64) -> Result<(), SubjectError> {
        let begin = self.ledger.accesses()?;
        let deadline = Instant::now() + PATIENCE;
        while self.ledger.accesses()? - begin < accesses {
            if let Some(end) = self.machine.end() {
                return Err(format!("the guest has ended: {end:?}").into());
            }
            if Instant::now() > deadline {
                return Err("the guest does not get on".into());
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn ledger(&mut self, epoch: u32) -> Result<conformance::Ledger, SubjectError> {
        let entered = self.ledger.entered(epoch)?;
        let queue = self.disk.as_ref().map(|disk| PageRange { start: disk.page(), pages: 1 });
        Ok(conformance::Ledger {
            region: Some(entered.region),
            wrote: entered.wrote,
            read: entered.read,
            in_flight: entered.in_flight,
            own: entered.own.into_iter().chain(queue).collect(),
        })
    }

    fn read(&self, gfn: Gfn, page: &mut Page) -> Result<(), SubjectError> {
        Ok(self.machine.ram().mem().read_slice(page, GuestAddress(gfn.gpa().0))?)
    }

    /// As a disk's data arrive: by a read into guest memory.
    fn write(&self, gfn: Gfn, page: &Page) -> Result<(), SubjectError> {
        if let Some(disk) = &self.disk {
            return Ok(disk.read_into(gfn, page)?);
        }
        let at = GuestAddress(gfn.gpa().0);
        Ok(self.machine.ram().mem().read_exact_volatile_from(at, &mut &page[..], page.len())?)
    }
}
