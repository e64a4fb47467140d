//! A vCPU and its thread: runs the guest, answers its exits, and stops at once when told to.

use std::fmt;
use std::sync::Arc;

use dirty_track::tracker::{RingHandle, kvm_ring};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::{Platform, Request};
use crate::gate::Gate;
use crate::host::KvmModule;
use crate::machine::{Doorman, LateRam};
use crate::memory::Ram;
use crate::sys::kick::Registration;

/// What makes kvm_pvm different, for whoever boots a kernel on it.
pub const PVM_HINT: &str = "this host runs guests by kvm_pvm, which emulates ring 0 instruction by instruction \
     and lacks some (SSE, xsave, int3): stock Linux does not boot on it. Use a host with VMX or SVM, or the \
     rig: `cargo run -p tests --bin rig -- vmm run ...`";

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// The guest asked for a reset.
    Reset,
    /// The guest turned the power off.
    PowerOff,
    /// The monitor stopped it.
    Stopped,
    /// It goes on elsewhere.
    Migrated,
    /// KVM cannot run it any further.
    Crash(Box<Crash>),
    /// The monitor could not keep it going, for this reason.
    Failed(String),
}

/// What is known about a guest that KVM cannot run any further.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Crash {
    /// Which vCPU.
    pub vcpu: u8,
    /// What happened, in words.
    pub what: String,
    /// Why that may be and what to do, when we know.
    pub hint: Option<String>,
    /// Instruction pointer.
    pub rip: u64,
    /// Bytes at the instruction pointer; empty when it is not mapped to RAM.
    pub code: Vec<u8>,
    /// The registers, by name.
    pub registers: Vec<(&'static str, u64)>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vCPU {}: {}", self.vcpu, self.what)?;
        write!(f, "  rip {:#018x}  code", self.rip)?;
        if self.code.is_empty() {
            write!(f, " (not in RAM)")?;
        }
        for byte in &self.code {
            write!(f, " {byte:02x}")?;
        }
        for (index, (name, value)) in self.registers.iter().enumerate() {
            if index % 4 == 0 {
                write!(f, "\n ")?;
            }
            write!(f, " {name:>6} {value:016x}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  {hint}")?;
        }
        Ok(())
    }
}

/// What a vCPU thread works with.
pub struct Vcpu {
    /// Its number and APIC id.
    pub id: u8,
    /// The vCPU.
    pub fd: VcpuFd,
    /// Its dirty ring, if it has one.
    pub ring: Option<RingHandle>,
    /// Ports and device memory.
    pub platform: Arc<Platform>,
    /// Orders.
    pub gate: Arc<Gate>,
    /// For accesses to RAM whose memslot is yet to come, and for the instruction bytes of a crash.
    pub ram: Arc<Ram>,
    /// Tells when RAM has all its memslots.
    pub late_ram: Arc<LateRam>,
    /// For the reason of a crash.
    pub module: KvmModule,
    /// Who hears the built-in guest's doorbell.
    pub doorman: Option<Arc<Doorman>>,
}

impl Vcpu {
    /// Runs the guest until it ends or is told to. The body of the vCPU's thread.
    pub fn run(mut self) -> End {
        let kicks = Registration::new(&mut self.fd);
        let gate = Arc::clone(&self.gate);
        let end = self.run_until_end(&kicks);
        drop(kicks);
        gate.leave();
        end
    }

    fn run_until_end(&mut self, kicks: &Registration) -> End {
        let surroundings = Surroundings {
            id: self.id,
            platform: Arc::clone(&self.platform),
            ram: Arc::clone(&self.ram),
            late_ram: Arc::clone(&self.late_ram),
            doorman: self.doorman.clone(),
        };
        loop {
            if !self.gate.is_open_to(self.id) {
                // Let KVM complete the access that the last exit was about: only then are the registers
                // those of an instruction boundary.
                kicks.set_immediate_exit(true);
                if let Ok(exit) = self.fd.run() {
                    // A multi-part access came out with its next part.
                    if let Some(end) = answer(exit, &surroundings) {
                        return end;
                    }
                    continue;
                }
                if !self.gate.pass(self.id, &self.fd) {
                    return End::Stopped;
                }
            }
            kicks.set_immediate_exit(false);
            if !self.gate.is_open_to(self.id) {
                // The order came between the check and the reset of the flag, and its kick with it.
                continue;
            }
            match self.fd.run() {
                Ok(
                    exit @ (VcpuExit::IoOut(..)
                    | VcpuExit::IoIn(..)
                    | VcpuExit::MmioRead(..)
                    | VcpuExit::MmioWrite(..)),
                ) => {
                    if let Some(end) = answer(exit, &surroundings) {
                        return end;
                    }
                }
                Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => return End::PowerOff,
                    kvm_bindings::KVM_SYSTEM_EVENT_RESET => return End::Reset,
                    _ => return self.crash(format!("system event {kind}")),
                },
                Ok(VcpuExit::Shutdown) => {
                    return self.crash(
                        "triple fault: an exception that the guest's own handlers could not take".into(),
                    );
                }
                Ok(VcpuExit::Unsupported(kvm_ring::FULL_EXIT)) => {
                    if let Some(Err(error)) = self.ring.as_ref().map(RingHandle::serve_full) {
                        // Its writes could not be recorded any more.
                        return End::Failed(format!("vCPU {} cannot go on: {error}", self.id));
                    }
                }
                Ok(VcpuExit::InternalError) => return self.internal_error(),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return self.crash(format!(
                        "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                    ));
                }
                Ok(other) => {
                    let what = format!("an exit that this monitor does not know: {other:?}");
                    return self.crash(what);
                }
                Err(error) => match error.errno() {
                    // EINTR: kicked. EAGAIN: a vCPU that waits for its SIPI was woken without one.
                    libc::EINTR | libc::EAGAIN => {}
                    _ => return self.crash(format!("KVM_RUN failed: {error}")),
                },
            }
        }
    }

    fn internal_error(&mut self) -> End {
        let suberror = crate::sys::kvm::internal_suberror(&mut self.fd);
        let what = match suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                "KVM had to emulate an instruction that it cannot emulate".into()
            }
            other => format!("KVM internal error {other}"),
        };
        let hint = (self.module == KvmModule::Pvm).then(|| PVM_HINT.to_owned());
        self.describe(what, hint)
    }

    fn crash(&self, what: String) -> End {
        self.describe(what, None)
    }

    fn describe(&self, what: String, hint: Option<String>) -> End {
        let regs = self.fd.get_regs().unwrap_or_default();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        End::Crash(Box::new(Crash {
            vcpu: self.id,
            what,
            hint,
            rip: regs.rip,
            code: self.code_at(sregs.cs.base.wrapping_add(regs.rip)),
            registers: registers(&regs, &sregs),
        }))
    }

    /// Up to 16 bytes of code at a linear address, as far as they are mapped to RAM.
    fn code_at(&self, linear: u64) -> Vec<u8> {
        let mut code = Vec::new();
        for offset in 0..16 {
            let mut byte = [0];
            let translation = self.fd.translate_gva(linear.wrapping_add(offset));
            let readable = translation.is_ok_and(|t| {
                t.valid != 0 && self.ram.mem().read_slice(&mut byte, GuestAddress(t.physical_address)).is_ok()
            });
            if !readable {
                break;
            }
            code.push(byte[0]);
        }
        code
    }
}

/// What an exit is answered from; apart from the vCPU, whose run page the exit borrows.
struct Surroundings {
    id: u8,
    platform: Arc<Platform>,
    ram: Arc<Ram>,
    late_ram: Arc<LateRam>,
    doorman: Option<Arc<Doorman>>,
}

/// Answers a port or memory access.
fn answer(exit: VcpuExit<'_>, around: &Surroundings) -> Option<End> {
    match exit {
        VcpuExit::IoOut(port, data) => match around.platform.port_write(port, data)? {
            Request::Reset => return Some(End::Reset),
            Request::PowerOff => return Some(End::PowerOff),
            Request::Doorbell(bell, payload) => {
                if let Some(doorman) = &around.doorman {
                    doorman(around.id, bell, payload);
                }
            }
        },
        VcpuExit::IoIn(port, data) => around.platform.port_read(port, data),
        VcpuExit::MmioRead(gpa, data) if around.is_ram(gpa, data.len()) => {
            around.late_ram.wait();
            // Cannot fail: it is RAM.
            let _ = around.ram.mem().read_slice(data, GuestAddress(gpa));
        }
        VcpuExit::MmioWrite(gpa, data) if around.is_ram(gpa, data.len()) => {
            around.late_ram.wait();
            // Cannot fail: it is RAM.
            let _ = around.ram.mem().write_slice(data, GuestAddress(gpa));
        }
        VcpuExit::MmioRead(gpa, data) => around.platform.mmio_read(gpa, data),
        VcpuExit::MmioWrite(gpa, data) => around.platform.mmio_write(gpa, data),
        _ => {}
    }
    None
}

impl Surroundings {
    fn is_ram(&self, gpa: u64, len: usize) -> bool {
        self.ram.mem().check_range(GuestAddress(gpa), len)
    }
}

fn registers(regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<(&'static str, u64)> {
    vec![
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rflags", regs.rflags),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
        ("cs", u64::from(sregs.cs.selector)),
        ("ss", u64::from(sregs.ss.selector)),
    ]
}
