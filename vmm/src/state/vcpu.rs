//! The state of a vCPU, as KVM tells and takes it.
//!
//! Taken by the vCPU's own thread, between two instructions. The order in which it is given back matters: CPUID decides
//! what other state there can be; the local APIC needs the APIC base, which is a special register; the TSC-deadline timer
//! is a model-specific register that needs the APIC's timer mode; events come last, because the rest clears them (Linux,
//! Documentation/virt/kvm/api.rst).

use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::StateError;

/// Everything about one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Its number and APIC id.
    pub id: u8,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time-stamp counter, where the host knows.
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debugregs: Option<kvm_debugregs>,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Model-specific registers that a host says it has. A host may refuse to tell some of them of a guest that has not got
/// what they are about.
#[derive(Clone, Debug, Default)]
pub struct MsrNumbers(Vec<u32>);

impl MsrNumbers {
    /// Those of this host. Who has asked once need not wait for them later.
    ///
    /// # Errors
    /// What KVM says.
    pub fn of_host() -> Result<&'static MsrNumbers, StateError> {
        static NUMBERS: OnceLock<MsrNumbers> = OnceLock::new();
        if let Some(numbers) = NUMBERS.get() {
            return Ok(numbers);
        }
        let kvm = Kvm::new().map_err(StateError::kvm("open /dev/kvm"))?;
        let list = kvm.get_msr_index_list().map_err(StateError::kvm("list the model-specific registers"))?;
        Ok(NUMBERS.get_or_init(|| MsrNumbers(list.as_slice().to_vec())))
    }
}

/// Registers that one call reads.
const AT_ONCE: usize = 64;

/// Reads what there is of `numbers`.
fn msrs(fd: &VcpuFd, numbers: &MsrNumbers) -> Result<Vec<kvm_msr_entry>, StateError> {
    let failed = StateError::kvm("read the model-specific registers");
    let mut found = Vec::with_capacity(numbers.0.len());
    let mut rest = &numbers.0[..];
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(AT_ONCE)];
        let entries: Vec<_> =
            now.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut asked = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany)?;
        // It stops at the first that cannot be read: that one is left out.
        let read = fd.get_msrs(&mut asked).map_err(&failed)?;
        found.extend_from_slice(&asked.as_slice()[..read.min(now.len())]);
        rest = &rest[if read < now.len() { read + 1 } else { read }..];
    }
    Ok(found)
}

impl VcpuState {
    /// Takes the state of vCPU `id`, on its own thread.
    ///
    /// # Errors
    /// What KVM says.
    pub fn take(id: u8, fd: &VcpuFd, numbers: &MsrNumbers) -> Result<VcpuState, StateError> {
        let kvm = StateError::kvm;
        // Before the events: KVM may deliver what a pending APIC event is about while it tells of that.
        let mp_state = fd.get_mp_state().map_err(kvm("read a vCPU's run state"))?;
        let cpuid = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(kvm("read a vCPU's CPUID"))?;
        Ok(VcpuState {
            id,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: fd.get_tsc_khz().ok(),
            mp_state,
            regs: fd.get_regs().map_err(kvm("read a vCPU's registers"))?,
            sregs: fd.get_sregs().map_err(kvm("read a vCPU's segment registers"))?,
            xsave: fd.get_xsave().map_err(kvm("read a vCPU's extended state"))?,
            xcrs: fd.get_xcrs().ok(),
            debugregs: fd.get_debug_regs().ok(),
            lapic: fd.get_lapic().map_err(kvm("read a vCPU's local APIC"))?,
            msrs: msrs(fd, numbers)?,
            events: fd.get_vcpu_events().map_err(kvm("read a vCPU's pending events"))?,
        })
    }

    /// Gives it to a vCPU that has not run yet.
    ///
    /// # Errors
    /// What KVM says; [`StateError::Msr`] for a register that this host does not have.
    pub fn give(&self, fd: &VcpuFd) -> Result<(), StateError> {
        let kvm = StateError::kvm;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany)?;
        fd.set_cpuid2(&cpuid).map_err(kvm("set a vCPU's CPUID"))?;
        if let Some(khz) = self.tsc_khz.filter(|khz| fd.get_tsc_khz().ok() != Some(*khz)) {
            fd.set_tsc_khz(khz).map_err(|_| StateError::TscKhz(khz))?;
        }
        fd.set_mp_state(self.mp_state).map_err(kvm("set a vCPU's run state"))?;
        fd.set_sregs(&self.sregs).map_err(kvm("set a vCPU's segment registers"))?;
        fd.set_regs(&self.regs).map_err(kvm("set a vCPU's registers"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(kvm("set a vCPU's extended control registers"))?;
        }
        crate::sys::kvm::set_xsave(fd, &self.xsave).map_err(kvm("set a vCPU's extended state"))?;
        if let Some(debugregs) = &self.debugregs {
            fd.set_debug_regs(debugregs).map_err(kvm("set a vCPU's debug registers"))?;
        }
        fd.set_lapic(&self.lapic).map_err(kvm("set a vCPU's local APIC"))?;
        for msrs in self.msrs.chunks(AT_ONCE) {
            let wanted = Msrs::from_entries(msrs).map_err(|_| StateError::TooMany)?;
            let set = fd.set_msrs(&wanted).map_err(kvm("set the model-specific registers"))?;
            if let Some(refused) = msrs.get(set) {
                return Err(StateError::Msr { number: refused.index, value: refused.data });
            }
        }
        fd.set_vcpu_events(&self.events).map_err(kvm("set a vCPU's pending events"))?;
        Ok(())
    }

    /// What its guest was told of the processor, for a host that may not have all of it.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }
}
