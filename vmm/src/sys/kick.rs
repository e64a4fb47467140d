//! Getting a vCPU thread out of `KVM_RUN`, without a window in which the kick is lost.
//!
//! A signal alone is lost when it arrives between the thread's last look at its orders and the ioctl. So the
//! signal handler sets `immediate_exit` in the thread's own `kvm_run`: if the thread is about to enter, the
//! ioctl returns EINTR at once; if it is inside, the signal itself brings it out (Documentation/virt/kvm/api.rst,
//! "immediate_exit").

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null elsewhere.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {
    // A const-initialised Cell without a destructor: reading it takes no lock and allocates nothing, so it is
    // fit for a signal handler.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null means that `Registration` set it on this thread and has not been dropped yet, so
        // the kvm_run page behind it is mapped; the byte is accessed atomically.
        unsafe { &*flag }.store(1, Ordering::Relaxed);
    }
}

/// Installs the signal's handler, once.
fn handle_kicks() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one; the handler is async-signal-safe (see there), and
        // no SA_RESTART lets system calls return EINTR, which is the point.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigaction(signal_number(), &action, ptr::null_mut());
        }
    });
}

/// While this lives, [`kick`] brings the current thread out of its vCPU's `KVM_RUN`.
#[derive(Debug)]
pub struct Registration {
    flag: *const AtomicU8,
}

impl Registration {
    /// Registers the current thread as the one that runs `vcpu`. The vCPU must outlive the registration.
    pub fn new(vcpu: &mut VcpuFd) -> Registration {
        handle_kicks();
        let flag = (&raw mut vcpu.get_kvm_run().immediate_exit).cast::<AtomicU8>().cast_const();
        IMMEDIATE_EXIT.set(flag);
        Registration { flag }
    }

    /// Arranges for the next `KVM_RUN` to return EINTR before it enters the guest. A run like that completes
    /// an I/O or MMIO access that was pending, and does nothing else.
    pub fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the vCPU outlives the registration (contract of `new`), so its kvm_run is mapped.
        unsafe { &*self.flag }.store(u8::from(on), Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// Kicks the thread behind `thread` out of `KVM_RUN`, or out of its next one.
///
/// # Errors
/// `ESRCH` when the thread has ended.
pub fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    // A thread that has only just been started has not registered itself: without a handler the signal would end the
    // process.
    handle_kicks();
    // SAFETY: the handle has not been joined, so its pthread_t is valid.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), signal_number()) };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}
