//! A virtual machine: RAM, vCPUs, devices, put together in the order that makes it start fast.
//!
//! The order matters. A memslot that is added after the interrupt controllers exist costs 5 to 8 ms (KVM waits
//! for an SRCU grace period), one that is added before costs 0.1 ms. So: RAM, memslots, irqchip, devices,
//! vCPUs, and the guest's own bytes last.
//!
//! Some RAM may come even later: [`late_ram`].

mod late_ram;
mod outcome;
mod paused;
mod virtio;

use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};

use dirty_track::fault::{FaultError, FaultTracker, PageSource, Server};
use dirty_track::sys::kvm;
use dirty_track::sys::stats::{Stats, StatsError};
use dirty_track::tracker::{
    DirtyRings, Exact, HostFacts, Kind, KvmBitmap, KvmManual, KvmRing, Slot, Tracker, TrackerError,
    UffdAsync, UffdSync, Untracked,
};
use guest::abi::Doorbell;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::VirtioSlot;
use crate::boot::{self, BootError, Kernel};
use crate::devices::virtio::QueueWorker;
use crate::devices::virtio::disk::{Disk, DiskConfig, DiskError, DiskLock};
use crate::devices::virtio::mmio::TransportError;
use crate::devices::{GuestChannel, Platform};
use crate::fault::{self, FaultConfig};
use crate::gate::Gate;
use crate::host::{self, KvmModule};
use crate::memory::{Faults, MemoryConfig, MemoryError, Ram};
use crate::state::{MachineState, StateError};
use crate::sys::kick;
use crate::timing::{Phase, Timing};
use crate::track::TrackConfig;
use crate::vcpu::{End, Vcpu};
use crate::{acpi, cpuid, layout};

pub use late_ram::LateRam;
use late_ram::starts_low;
use outcome::{OrEnd, Outcome};
pub use paused::Paused;

/// Most vCPUs: APIC ids of 8 bits, 255 being the broadcast.
pub const MAX_CPUS: u8 = 254;

/// A vCPU thread calls KVM and device code, none of it deep.
const VCPU_STACK: usize = 128 << 10;

/// Hears the built-in guest's doorbell, on the thread of the vCPU that rang, which waits meanwhile.
/// Arguments: vCPU, what was rung, payload.
pub type Doorman = dyn Fn(u8, Doorbell, u32) + Send + Sync;

/// What a machine is to be.
pub struct MachineConfig {
    /// RAM.
    pub memory: MemoryConfig,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// What to boot.
    pub kernel: Kernel,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks, in the order of their devices.
    pub disks: Vec<DiskConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Where the serial port writes to.
    pub console: Box<dyn Write + Send>,
    /// Clock for the phases of the start.
    pub timing: Timing,
    /// Who hears the built-in guest's doorbell.
    pub doorman: Option<Arc<Doorman>>,
    /// How faults are served, where RAM is such that they are.
    pub fault: FaultConfig,
    /// What the machine goes on from, instead of booting the kernel.
    pub from: Option<Box<From>>,
    /// Entries of each vCPU's dirty ring, a power of two. Such a machine can have the tracker `kvm-ring` and none on
    /// KVM's bitmap. Not for a guest that writes at CPL0 under kvm_pvm.
    pub dirty_ring: Option<u32>,
}

/// What a machine goes on from.
#[derive(Debug)]
pub struct From {
    /// Its memory, as [`MachineConfig::memory`] says.
    pub ram: Ram,
    /// Everything else; `None` if that is [given](Machine::give_state) before the machine is started. Its disks are then
    /// somebody else's until they are [taken](Machine::take_disks).
    pub state: Option<MachineState>,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No /dev/kvm.
    #[error(
        "this host has no /dev/kvm: load kvm_intel or kvm_amd, turn virtualization on in the firmware, or run \
         in the rig, which needs none: `cargo run -p tests --bin rig -- vmm run` (`vmm doctor` tells more)"
    )]
    NoKvm,
    /// /dev/kvm may not be opened.
    #[error(
        "no permission to open /dev/kvm: add yourself to its group (`sudo usermod -aG kvm $USER`, then log in again), or run as root"
    )]
    Permission,
    /// Something else at /dev/kvm.
    #[error("what is at /dev/kvm is not KVM: load kvm_intel or kvm_amd (`vmm doctor` tells more)")]
    NotKvm,
    /// A KVM call failed.
    #[error("cannot {what}: {source}")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// An unusable KVM.
    #[error("this host's KVM speaks API version {0}, and 12 is needed: use a kernel that is newer")]
    ApiVersion(i32),
    /// Too many or too few vCPUs.
    #[error("{asked} vCPUs: this host runs 1 to {max}")]
    Cpus {
        /// What was asked for.
        asked: u8,
        /// The most there can be.
        max: usize,
    },
    /// Dirty rings.
    #[error(transparent)]
    DirtyRings(#[from] TrackerError),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Serving its faults.
    #[error("cannot serve the guest's faults: {0}; use fault=kernel to run without")]
    Fault(#[from] FaultError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] TransportError),
    /// More virtio devices than interrupt lines.
    #[error("{asked} disks and other virtio devices: there are interrupt lines for {max}; use fewer")]
    Devices {
        /// What was asked for.
        asked: usize,
        /// The most there can be.
        max: usize,
    },
    /// The state that it is to go on from.
    #[error(transparent)]
    State(#[from] StateError),
    /// The processor that it was on.
    #[error(transparent)]
    Cpuid(#[from] cpuid::CpuidError),
    /// A system resource.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn system_error(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::System { what, source }
}

/// Opens /dev/kvm and checks that it can be used.
///
/// # Errors
/// [`MachineError::NoKvm`], [`MachineError::Permission`] or [`MachineError::ApiVersion`].
pub fn open_kvm() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => MachineError::NoKvm,
        libc::EACCES | libc::EPERM => MachineError::Permission,
        _ => MachineError::Kvm { what: "open /dev/kvm", source },
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        ..0 => Err(MachineError::NotKvm),
        other => Err(MachineError::ApiVersion(other)),
    }
}

/// A machine. Dropping it stops it.
pub struct Machine {
    // Fields drop in this order: threads are gone (see Drop) before the VM, and the VM before its RAM.
    threads: Mutex<Threads>,
    vm: Arc<VmFd>,
    platform: Arc<Platform>,
    gate: Arc<Gate>,
    outcome: Arc<Outcome>,
    vcpu_stats: Mutex<Vec<Stats>>,
    workers: Mutex<Vec<QueueWorker>>,
    disks: Vec<DiskLock>,
    late_ram: Arc<LateRam>,
    /// Before RAM, of which it has views.
    fault: OnceLock<Arc<Server>>,
    /// How faults are to be served.
    fault_config: FaultConfig,
    physical_bits: u32,
    ram: Arc<Ram>,
    module: KvmModule,
    dirty_rings: Option<DirtyRings>,
    cpus: usize,
    timing: Timing,
}

/// The vCPUs, before and after they have threads.
#[derive(Default)]
struct Threads {
    waiting: Vec<Vcpu>,
    running: Vec<(u8, JoinHandle<()>)>,
}

impl Machine {
    /// Builds the machine, ready to [`start`](Machine::start).
    ///
    /// # Errors
    /// See [`MachineError`]. Nothing is left behind.
    pub fn new(mut config: MachineConfig) -> Result<Machine, MachineError> {
        let timing = config.timing.clone();
        let kvm = open_kvm()?;
        let module = host::kvm_module();
        let max = kvm.get_max_vcpus().min(usize::from(MAX_CPUS));
        if config.cpus == 0 || usize::from(config.cpus) > max {
            return Err(MachineError::Cpus { asked: config.cpus, max });
        }

        let boots = config.from.is_none();
        let comes = config.from.as_ref().is_some_and(|from| from.state.is_none());
        if let Some(From { state: Some(state), .. }) = config.from.as_deref() {
            cpuid::check(&kvm, module, state)?;
        }
        let gate = Arc::new(Gate::new(usize::from(config.cpus)));
        let outcome = Arc::new(Outcome::new().map_err(system_error("create an eventfd"))?);
        if let Some(source) = config.fault.source.take() {
            let (outcome, gate) = (Arc::clone(&outcome), Arc::clone(&gate));
            config.fault.source = Some(Arc::new(OrEnd { source, outcome, gate }));
        }
        let (ram, state) = match config.from.take() {
            Some(from) => (from.ram, from.state),
            None => (Ram::new(config.memory)?, None),
        };
        let ram = Arc::new(ram);
        let fault = OnceLock::new();
        // Memory that is yet to come is served when it is there.
        if config.memory.fault == Faults::Uffd && (boots || state.is_some()) {
            let fill = config.fault.source.is_some();
            ram.expect_service();
            let server =
                fault::start(slots_of(&ram), config.memory, config.cpus, config.fault.clone(), fill)?;
            let _ = fault.set(Arc::new(server));
        }
        timing.mark(Phase::Memory);

        let vm = Arc::new(kvm.create_vm().map_err(kvm_error("create a virtual machine"))?);
        let dirty_rings =
            config.dirty_ring.map(|entries| DirtyRings::enable(Arc::clone(&vm), entries)).transpose()?;
        let low = module == KvmModule::Pvm && boots && starts_low(&config);
        let at_once = if low { 1 } else { ram.regions().len() };
        let late_ram = Arc::new(LateRam::new(at_once));
        add_memslots(&vm, &ram, 0..late_ram.first).map_err(kvm_error("give RAM to the virtual machine"))?;
        // Only Intel hosts need these; elsewhere they are accepted and ignored, or absent.
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(layout::KVM_TSS as usize).map_err(kvm_error("place the TSS"))?;
        }
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
                .map_err(kvm_error("place the identity map"))?;
        }
        vm.create_irq_chip().map_err(kvm_error("create the interrupt controllers"))?;
        let disks =
            config.disks.iter().map(|disk| if comes { Disk::open_as_it_is(disk) } else { Disk::open(disk) });
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let locks = disks.iter().map(Disk::lock).collect::<Result<Vec<_>, _>>()?;
        let (transports, workers, slots) = virtio::connect(&vm, &ram, disks, config.rng)?;
        let console = std::mem::replace(&mut config.console, Box::new(io::sink()));
        let platform = Platform::new(console, transports, timing.clone());
        let platform = Arc::new(platform.map_err(system_error("create the devices"))?);
        vm.register_irqfd(platform.serial().interrupt(), layout::COM1_GSI)
            .map_err(kvm_error("connect the serial port's interrupt"))?;
        timing.mark(Phase::Vm);

        let base = cpuid::supported(&kvm, module).map_err(kvm_error("ask for the supported CPUID"))?;
        let mut waiting = Vec::with_capacity(usize::from(config.cpus));
        let mut vcpu_stats = Vec::with_capacity(usize::from(config.cpus));
        for id in 0..config.cpus {
            let fd = vm.create_vcpu(u64::from(id)).map_err(kvm_error("create a vCPU"))?;
            // Before the segment registers: Linux 7.2 refuses them otherwise.
            fd.set_cpuid2(&cpuid::for_cpu(base, id, config.cpus)).map_err(kvm_error("set a vCPU's CPUID"))?;
            // A host without them just has fewer figures to show.
            vcpu_stats.extend(Stats::of_vcpu(&fd).ok());
            let ring = dirty_rings.as_ref().map(|rings| rings.add_vcpu(&fd)).transpose()?;
            waiting.push(Vcpu {
                id,
                fd,
                ring,
                platform: Arc::clone(&platform),
                gate: Arc::clone(&gate),
                ram: Arc::clone(&ram),
                late_ram: Arc::clone(&late_ram),
                module,
                doorman: config.doorman.clone(),
            });
        }
        if comes {
            // The guest stands still when this is needed.
            cpuid::able(&kvm, module).map_err(kvm_error("ask for the supported CPUID"))?;
        }
        timing.mark(Phase::Vcpus);

        match &state {
            Some(state) => restore(state, &vm, &waiting, &platform)?,
            None if boots => load(&config, &ram, &waiting[0].fd, &slots)?,
            None => {}
        }
        timing.mark(Phase::Loaded);

        Ok(Machine {
            threads: Mutex::new(Threads { waiting, running: Vec::new() }),
            vm,
            platform,
            gate,
            outcome,
            vcpu_stats: Mutex::new(vcpu_stats),
            workers: Mutex::new(workers),
            disks: locks,
            late_ram,
            fault,
            fault_config: config.fault,
            physical_bits: cpuid::physical_bits(base),
            ram,
            module,
            dirty_rings,
            cpus: usize::from(config.cpus),
            timing,
        })
    }

    /// Gives a machine that was made without it the state that it goes on from, before it is started.
    ///
    /// # Errors
    /// What makes no sense, and what KVM refuses: the machine cannot be started then.
    pub fn give_state(&self, state: &MachineState) -> Result<(), MachineError> {
        cpuid::check(&open_kvm()?, self.module, state)?;
        restore(state, &self.vm, &self.threads().waiting, &self.platform)
    }

    /// Serves the faults of memory of a machine that was made without its state from `source`, as far as it is missing,
    /// before the machine is started.
    ///
    /// # Errors
    /// What the fault server says.
    pub fn serve_faults(&self, source: Arc<dyn PageSource>) -> Result<Arc<Server>, MachineError> {
        let config = FaultConfig { source: Some(source), ..self.fault_config.clone() };
        self.ram.expect_service();
        let server = fault::start(self.slots(), self.ram.config(), self.cpus as u8, config, false)?;
        Ok(Arc::clone(self.fault.get_or_init(|| Arc::new(server))))
    }

    /// Says that the machine has ended here, and goes on elsewhere. Its vCPUs stand still, and stay so.
    pub fn gone(&self) {
        self.hold();
        self.outcome.report(End::Migrated);
    }

    /// Starts the vCPU threads. A second call does nothing.
    ///
    /// # Errors
    /// When the system has no more threads; those started are stopped when the machine is dropped.
    pub fn start(&self) -> Result<(), MachineError> {
        let mut threads = self.threads();
        while let Some(vcpu) = threads.waiting.pop() {
            let (id, outcome) = (vcpu.id, Arc::clone(&self.outcome));
            let thread = thread::Builder::new()
                .name(format!("vcpu{}", vcpu.id))
                .stack_size(VCPU_STACK)
                .spawn(move || outcome.report(vcpu.run()))
                .map_err(system_error("start a vCPU thread"))?;
            threads.running.push((id, thread));
        }
        self.timing.mark(Phase::Started);
        drop(threads);
        self.add_late_ram()
    }

    /// Adds the memslots that the guest was started without.
    fn add_late_ram(&self) -> Result<(), MachineError> {
        let late = self.late_ram.first..self.ram.regions().len();
        if late.is_empty() {
            self.late_ram.arrived();
            return Ok(());
        }
        let (vm, ram) = (Arc::clone(&self.vm), Arc::clone(&self.ram));
        let (late_ram, outcome) = (Arc::clone(&self.late_ram), Arc::clone(&self.outcome));
        let thread = thread::Builder::new().name("late-ram".into()).stack_size(VCPU_STACK).spawn(move || {
            if let Err(error) = add_memslots(&vm, &ram, late) {
                outcome.report(End::Failed(format!("cannot give the guest the rest of its RAM: {error}")));
            }
            late_ram.arrived();
        });
        // It ends by itself, soon, and nothing waits for its end but `LateRam::wait`.
        thread.map(drop).map_err(system_error("start a thread"))
    }

    /// Stops all vCPUs between two instructions, until the guard is dropped. Returns when they stand still.
    pub fn pause(&self) -> Paused<'_> {
        self.gate.close(|| self.kick());
        Paused { machine: self }
    }

    /// Stops all vCPUs as [`pause`](Machine::pause) does, until [`release`](Machine::release).
    pub fn hold(&self) {
        self.gate.close(|| self.kick());
    }

    /// Keeps vCPUs that have not been started yet from running when they are, until [`release`](Machine::release).
    pub fn hold_start(&self) {
        self.gate.shut();
    }

    /// Undoes one [`hold`](Machine::hold).
    pub fn release(&self) {
        self.gate.open();
    }

    /// Holds these vCPUs back, or does not any more.
    pub(crate) fn hold_back(&self, vcpus: &[u8], hold: bool) {
        vcpus.iter().for_each(|&vcpu| self.gate.hold_back(vcpu, hold));
        if hold {
            for (_, thread) in self.threads().running.iter().filter(|(id, _)| vcpus.contains(id)) {
                // ESRCH: that thread has ended.
                let _ = kick::kick(thread);
            }
        }
    }

    /// Locks the disks, those that are not locked: from now on they are this machine's.
    ///
    /// # Errors
    /// [`DiskError::Locked`], when somebody else has one: the guest must not run then.
    pub fn take_disks(&self) -> Result<(), DiskError> {
        self.disks.iter().try_for_each(DiskLock::take)
    }

    /// Unlocks the disks, for a machine that stands still.
    ///
    /// # Errors
    /// What the system says.
    pub fn give_disks(&self) -> Result<(), DiskError> {
        self.disks.iter().try_for_each(DiskLock::give)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        // Two lists, whole between any two statements.
        self.threads.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn kick(&self) {
        for (_, thread) in &self.threads().running {
            // ESRCH: that thread has ended, so it stands still.
            let _ = kick::kick(thread);
        }
    }

    /// Stops the machine for good, because it cannot go on for this reason.
    pub fn give_up(&self, reason: &str) {
        self.outcome.report(End::Failed(reason.to_owned()));
        self.stop();
    }

    /// Whether it has been stopped for good. Its memory is nobody's any more then, and no fault is served.
    pub fn is_stopped(&self) -> bool {
        self.gate.is_stopped()
    }

    /// Stops the machine for good and waits for its threads. Idempotent.
    pub fn stop(&self) {
        self.gate.stop();
        self.kick();
        if let Some(server) = self.fault.get() {
            // Who waits for a page that cannot be had would wait for ever. It does not run on with what it gets: the kick is
            // pending.
            server.let_go();
        }
        let threads = std::mem::take(&mut *self.threads());
        for (_, thread) in threads.running {
            // A panicked vCPU thread has printed its message; there is nothing to add.
            let _ = thread.join();
        }
    }

    /// How the machine ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.outcome.end()
    }

    /// Readable when the machine has ended by itself.
    pub fn ended(&self) -> &EventFd {
        self.outcome.ended()
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Devices.
    pub fn platform(&self) -> &Arc<Platform> {
        &self.platform
    }

    /// The built-in guest's side channel.
    pub fn channel(&self) -> &GuestChannel {
        self.platform.channel()
    }

    /// The KVM module that runs it.
    pub fn module(&self) -> KvmModule {
        self.module
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> usize {
        self.cpus
    }

    /// Waits until all of RAM has its memslots. Returns at once before the machine is started.
    pub fn wait_for_ram(&self) {
        if !self.threads().running.is_empty() {
            self.late_ram.wait();
        }
    }

    /// What the choice of a tracker depends on, as far as KVM knows; userfaultfd is not asked.
    pub fn tracking_facts(&self) -> HostFacts {
        HostFacts {
            manual_protect: kvm::manual_protect_modes(&self.vm),
            emulates_kernel: self.module == KvmModule::Pvm,
            ..HostFacts::default()
        }
    }

    /// The tracker `kind` over all of RAM, with the settings of `config`. Arm it after [`Machine::wait_for_ram`].
    /// Harvests of `kvm-ring` number the vCPUs as the machine does.
    ///
    /// # Errors
    /// When the host or the machine cannot do it, and why.
    pub fn tracker(&self, kind: Kind, config: &TrackConfig) -> Result<Box<dyn Tracker>, TrackerError> {
        let (vm, slots) = (Arc::clone(&self.vm), self.slots());
        Ok(match kind {
            Kind::None => Box::new(Untracked::new(slots)?),
            Kind::KvmBitmap => Box::new(KvmBitmap::new(vm, slots)?),
            Kind::KvmManual => Box::new(KvmManual::new(vm, slots)?.with_rearm(config.rearm)),
            Kind::KvmRing => {
                Box::new(KvmRing::new(self.dirty_rings.as_ref().ok_or(TrackerError::NoRings)?, slots)?)
            }
            Kind::UffdSync => Box::new(UffdSync::new(slots, config.unit)?),
            Kind::UffdAsync => Box::new(UffdAsync::new(slots)?),
            Kind::UffdServe => {
                Box::new(FaultTracker::new(Arc::clone(self.fault.get().ok_or(TrackerError::NotServed)?)))
            }
            Kind::Exact => Box::new(Exact::new(vm, slots)?),
        })
    }

    /// Bits of a physical address, as the guest's CPUID says.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// The virtual machine, for a tracker of somebody else's making.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The memslots of all of RAM.
    pub fn slots(&self) -> Vec<Slot> {
        slots_of(&self.ram)
    }

    /// Who serves the guest's faults, if it is not the kernel.
    pub fn fault(&self) -> Option<&Arc<Server>> {
        self.fault.get()
    }

    /// The halves of the virtio devices that belong on a device loop. They can be taken once; without a loop
    /// the devices answer nothing.
    pub fn take_workers(&self) -> Vec<QueueWorker> {
        std::mem::take(&mut *self.workers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// The VM's statistics.
    ///
    /// # Errors
    /// When the host's KVM has none.
    pub fn vm_stats(&self) -> Result<Stats, StatsError> {
        Stats::of_vm(&self.vm)
    }

    /// Takes the statistics of the vCPUs, empty where the host has none. They can be taken once, until they are
    /// [given back](Machine::give_vcpu_stats).
    pub fn take_vcpu_stats(&self) -> Vec<Stats> {
        std::mem::take(&mut *self.vcpu_stats.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Gives back what was taken.
    pub fn give_vcpu_stats(&self, stats: Vec<Stats>) {
        *self.vcpu_stats.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = stats;
    }
}

/// Puts what the machine boots from into its memory, and its first vCPU at its entry.
fn load(
    config: &MachineConfig,
    ram: &Ram,
    boot_cpu: &VcpuFd,
    slots: &[VirtioSlot],
) -> Result<(), MachineError> {
    let mut cmdline = config.cmdline.clone();
    if config.kernel == Kernel::BuiltIn {
        // In front, because of a key given twice the guest takes the last one: the user's.
        cmdline = format!("cpus={} {cmdline}", config.cpus);
        // A host that does not know its own frequency leaves the guest to measure it.
        if let Ok(khz) = boot_cpu.get_tsc_khz() {
            cmdline = format!("tsc_khz={khz} {cmdline}");
        }
    }
    let rsdp = acpi::write(ram.mem(), config.cpus, slots)?;
    boot::write_gdt(ram.mem())?;
    let entry = boot::load(ram.mem(), &config.kernel, cmdline.trim(), config.initrd.as_deref(), rsdp)?;
    let mut sregs = boot_cpu.get_sregs().map_err(kvm_error("read a vCPU's registers"))?;
    let regs = boot::set_entry(entry, &mut sregs);
    boot_cpu.set_sregs(&sregs).map_err(kvm_error("set a vCPU's segment registers"))?;
    boot_cpu.set_regs(&regs).map_err(kvm_error("set a vCPU's registers"))
}

/// Gives the machine the state that it goes on from.
fn restore(state: &MachineState, vm: &VmFd, vcpus: &[Vcpu], platform: &Platform) -> Result<(), MachineError> {
    let ids = state.vcpus.iter().map(|vcpu| vcpu.id);
    if !ids.eq(vcpus.iter().map(|vcpu| vcpu.id)) {
        let why = "it has another number of vCPUs";
        return Err(StateError::Device { device: "the machine".into(), why }.into());
    }
    for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
        state.give(&vcpu.fd)?;
    }
    state.vm.give(vm)?;
    Ok(platform.restore(&state.devices)?)
}

fn slots_of(ram: &Ram) -> Vec<Slot> {
    ram.mem().iter().enumerate().map(|(id, region)| Slot::of_region(id as u32, 0, region)).collect()
}

fn add_memslots(vm: &VmFd, ram: &Ram, slots: Range<usize>) -> Result<(), kvm_ioctls::Error> {
    for slot in slots {
        crate::sys::kvm::add_memslot(vm, slot as u32, &ram.regions()[slot])?;
    }
    Ok(())
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
