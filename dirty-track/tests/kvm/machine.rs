//! The smallest machine that can write to its memory: vCPUs in flat 32-bit protected mode, at CPL0, that walk
//! lists of addresses and store a value at each, or only read there.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use dirty_track::addr::{Gfn, PAGE_SIZE};
use dirty_track::region::RegionBitmap;
use dirty_track::tracker::{DirtyRings, Harvest, RingHandle, Slot, TrackerError, kvm_ring};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::mapping::Mapping;

/// Where the code is, and after it the list of addresses; a memslot of its own that nobody tracks.
const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
const CODE_SLOT_PAGES: u64 = 64;
/// With dirty rings, each vCPU's list has one page, and a run makes no more stores than a ring keeps in reserve
/// below its soft limit (64, less what an interrupted run may report twice): a KVM that emulates CPL0 looks at
/// the ring only between runs.
const STORES_WITH_RING: usize = 56;
/// Most addresses that one call can store at.
pub(crate) const MAX_STORES: usize = ((CODE_SLOT_PAGES - 1) * PAGE_SIZE / 4) as usize;

/// `esi`: the list, `ecx`: its length, `eax`: the value.
const PROGRAM: [u8; 11] = [
    0x8b, 0x1e, // next: mov ebx, [esi]
    0x83, 0xc6, 0x04, // add esi, 4
    0x89, 0x03, // mov [ebx], eax
    0x49, // dec ecx
    0x75, 0xf6, // jnz next
    0xf4, // hlt
];

/// Where the other program is: the same with a load in place of the store.
const READER: u64 = CODE + 0x40;
const READER_PROGRAM: [u8; 11] = [
    0x8b, 0x1e, // next: mov ebx, [esi]
    0x83, 0xc6, 0x04, // add esi, 4
    0x8b, 0x03, // mov eax, [ebx]
    0x49, // dec ecx
    0x75, 0xf6, // jnz next
    0xf4, // hlt
];

/// A virtual machine with slots to track.
pub(crate) struct Machine {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: GuestMemoryMmap<RegionBitmap>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) rings: Option<DirtyRings>,
    // Last: the others have views of it. A tracker that outlives both machine and vCPU has views of nothing.
    _mappings: Arc<Vec<Mapping>>,
}

/// One of its vCPUs.
pub(crate) struct Writer {
    vcpu: VcpuFd,
    list: u64,
    ring: Option<RingHandle>,
    /// How often its ring was full.
    pub(crate) fulls: usize,
    memory: GuestMemoryMmap<RegionBitmap>,
    _mappings: Arc<Vec<Mapping>>,
}

/// Says on the terminal, past the capture of the test's output, that `test` is skipped: it must be seen.
/// Once for each reason, however many backings it holds for.
pub(crate) fn skip(test: &str, why: impl Display) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("SKIPPED: {test}: {why}");
    if SAID.lock().unwrap().insert(line.clone()) {
        // A closed stderr is no reason to fail.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Whether this runs under an emulator, where everything takes a hundred times as long.
pub(crate) fn in_rig() -> bool {
    std::env::var_os("IN_RIG").is_some()
}

/// `/dev/kvm`, or `None` and a line on the terminal that says that `test` is skipped.
pub(crate) fn kvm(test: &str) -> Option<Kvm> {
    Kvm::new().inspect_err(|error| skip(test, format_args!("cannot open /dev/kvm: {error}"))).ok()
}

impl Machine {
    /// A machine with a slot of `pages` pages at each frame of `slots`, which are above the first MiB.
    pub(crate) fn new(kvm: &Kvm, slots: &[(Gfn, u64)]) -> (Machine, Writer) {
        Machine::over(kvm, slots, || None)
    }

    /// The same, with the memory of each slot being the start of a file of its own, mapped shared, where `file`
    /// gives one.
    pub(crate) fn over(
        kvm: &Kvm,
        slots: &[(Gfn, u64)],
        file: impl Fn() -> Option<File>,
    ) -> (Machine, Writer) {
        let vm = kvm.create_vm().unwrap().into();
        let (machine, mut writers) = Machine::build(kvm, vm, slots, 1, None, file);
        (machine, writers.remove(0))
    }

    /// A machine with `cpus` vCPUs.
    pub(crate) fn with_vcpus(kvm: &Kvm, slots: &[(Gfn, u64)], cpus: u64) -> (Machine, Vec<Writer>) {
        Machine::build(kvm, kvm.create_vm().unwrap().into(), slots, cpus, None, || None)
    }

    /// The same with `cpus` vCPUs, each of which has a dirty ring of `entries`. None, and a line on the terminal
    /// that says that `test` is skipped, on a host without rings.
    pub(crate) fn with_rings(
        test: &str,
        kvm: &Kvm,
        slots: &[(Gfn, u64)],
        cpus: u64,
        entries: u32,
    ) -> Option<(Machine, Vec<Writer>)> {
        let vm = Arc::new(kvm.create_vm().unwrap());
        let rings = match DirtyRings::enable(vm.clone(), entries) {
            Err(error @ TrackerError::Unsupported { .. }) => {
                skip(test, error);
                return None;
            }
            // PML wants more in reserve.
            Err(TrackerError::Enable { .. }) => DirtyRings::enable(vm.clone(), 4 * entries).unwrap(),
            other => other.unwrap(),
        };
        Some(Machine::build(kvm, vm, slots, cpus, Some(rings), || None))
    }

    fn build(
        kvm: &Kvm,
        vm: Arc<VmFd>,
        slots: &[(Gfn, u64)],
        cpus: u64,
        rings: Option<DirtyRings>,
        file: impl Fn() -> Option<File>,
    ) -> (Machine, Vec<Writer>) {
        let mappings: Vec<_> = [(Gfn(CODE >> 12), CODE_SLOT_PAGES)]
            .iter()
            .chain(slots)
            .enumerate()
            .map(|(index, (gfn, pages))| {
                let len = pages * PAGE_SIZE;
                let file = if index == 0 { None } else { file() };
                let file = file.inspect(|file| file.set_len(len).unwrap());
                (gfn.gpa(), Mapping::new(gfn.gpa(), len as usize, file.as_ref()))
            })
            .collect();
        let regions = mappings.iter().map(|(gpa, mapping)| mapping.region(*gpa)).collect();
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        let mappings = Arc::new(mappings.into_iter().map(|(_, mapping)| mapping).collect());
        let mut tracked = Vec::new();
        for (id, region) in (0..).zip(memory.iter()) {
            let slot = Slot::of_region(id, 0, region);
            register(&vm, &slot, region.len());
            if id > 0 {
                tracked.push(slot);
            }
        }
        memory.write_slice(&PROGRAM, GuestAddress(CODE)).unwrap();
        memory.write_slice(&READER_PROGRAM, GuestAddress(READER)).unwrap();

        let writer = |id: u64| {
            let vcpu = vm.create_vcpu(id).unwrap();
            vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
            let mut sregs = vcpu.get_sregs().unwrap();
            for segment in
                [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss, &mut sregs.cs]
            {
                (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
                (segment.present, segment.dpl, segment.s, segment.type_) = (1, 0, 1, 3);
                segment.selector = 16;
            }
            (sregs.cs.type_, sregs.cs.selector) = (11, 8);
            sregs.cr0 |= 1;
            vcpu.set_sregs(&sregs).unwrap();
            let ring = rings.as_ref().map(|rings| rings.add_vcpu(&vcpu).unwrap());
            Writer {
                vcpu,
                memory: memory.clone(),
                list: LIST + id * PAGE_SIZE,
                ring,
                fulls: 0,
                _mappings: Arc::clone(&mappings),
            }
        };
        let writers = (0..cpus).map(writer).collect();
        (Machine { vm, memory, slots: tracked, rings, _mappings: mappings }, writers)
    }

    /// Registers `slot`, one of its own, with KVM after it was [unplugged](Machine::unplug).
    pub(crate) fn plug(&self, slot: &Slot) {
        register(&self.vm, slot, slot.len());
    }

    /// Has KVM forget `slot`, which the guest does not use.
    pub(crate) fn unplug(&self, slot: &Slot) {
        register(&self.vm, slot, 0);
    }

    /// All tracked memory, one `u32` for each page: the one that the guest's stores go to.
    pub(crate) fn stamps(&self) -> Vec<(Gfn, u32)> {
        self.slots.iter().flat_map(|slot| slot.frames().iter()).map(|gfn| (gfn, self.stamp(gfn))).collect()
    }

    /// The `u32` that the guest stored last in a page.
    pub(crate) fn stamp(&self, gfn: Gfn) -> u32 {
        self.memory.read_obj(GuestAddress(gfn.gpa().0 + STAMP_OFFSET)).unwrap()
    }
}

/// Registers `slot` with `vm`, or has it forgotten with a `len` of 0.
fn register(vm: &VmFd, slot: &Slot, len: u64) {
    let region = kvm_userspace_memory_region {
        slot: slot.id(),
        flags: 0,
        guest_phys_addr: slot.gpa().0,
        memory_size: len,
        userspace_addr: slot.hva(),
    };
    // SAFETY: the slot is of one of the machine's regions, each of which is mapped for as long as the mappings, which
    // the machine and its vCPUs all hold.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
}

/// Where in a page the guest stores.
const STAMP_OFFSET: u64 = 0x7f8;

impl Writer {
    /// Has the guest store `value` in each page of `pages`, in that order; returns when it has.
    pub(crate) fn write(&mut self, pages: &[Gfn], value: u32) {
        self.run(CODE, pages, value);
    }

    /// Has the guest read each page of `pages`, in that order.
    pub(crate) fn read(&mut self, pages: &[Gfn]) {
        self.run(READER, pages, 0);
    }

    fn run(&mut self, program: u64, pages: &[Gfn], value: u32) {
        assert!(!pages.is_empty() && pages.len() <= MAX_STORES);
        let at_once = if self.ring.is_some() { STORES_WITH_RING } else { MAX_STORES };
        for pages in pages.chunks(at_once) {
            self.prepare(program, pages, value);
            while !self.go_on() {
                self.fulls += 1;
                self.ring.as_ref().expect("a ring is full").serve_full().unwrap();
            }
        }
    }

    /// Prepares what [`Writer::write`] does, for [`Writer::go_on`]. With a ring, a few dozen pages at most.
    pub(crate) fn begin(&mut self, pages: &[Gfn], value: u32) {
        self.prepare(CODE, pages, value);
    }

    fn prepare(&mut self, program: u64, pages: &[Gfn], value: u32) {
        let list: Vec<u8> =
            pages.iter().flat_map(|gfn| ((gfn.gpa().0 + STAMP_OFFSET) as u32).to_le_bytes()).collect();
        self.memory.write_slice(&list, GuestAddress(self.list)).unwrap();
        let regs = kvm_regs {
            rip: program,
            rsi: self.list,
            rcx: pages.len() as u64,
            rax: value.into(),
            rflags: 2,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Runs the guest. False: its ring is full, and not all is done.
    pub(crate) fn go_on(&mut self) -> bool {
        match self.vcpu.run().unwrap() {
            VcpuExit::Hlt => true,
            VcpuExit::Unsupported(kvm_ring::FULL_EXIT) => false,
            exit => panic!("the guest stopped with {exit:?}"),
        }
    }

    /// The vCPU.
    pub(crate) fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }
}

/// The frames of a harvest, one by one.
pub(crate) fn frames(harvest: &Harvest<'_>) -> Vec<Gfn> {
    harvest.runs().flat_map(|run| run.iter()).collect()
}
