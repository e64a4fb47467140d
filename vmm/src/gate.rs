//! Where vCPU threads stop: between two instructions of the guest, at once, and for as long as somebody wants.
//!
//! Only a vCPU's own thread talks to its vCPU (KVM makes any other wait until that comes out of the guest). Whoever wants
//! to know something about a vCPU that stands still sends its thread on an errand.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use kvm_ioctls::VcpuFd;

/// What vCPU threads are told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    Run,
    Pause,
    Stop,
}

/// The gate that all vCPU threads of a machine pass before each entry into the guest.
pub struct Gate {
    /// Copy of the order in `state`, for the check on the way into the guest.
    order: AtomicU8,
    /// Which vCPUs are held back by themselves.
    held_back: Vec<AtomicBool>,
    state: Mutex<GateState>,
    changed: Condvar,
}

/// Something to be done with each vCPU by its own thread.
pub type Errand = Arc<dyn Fn(u8, &VcpuFd) + Send + Sync>;

struct GateState {
    /// How many want the machine to stand still.
    pauses: usize,
    stop: bool,
    /// Threads that have not ended.
    alive: usize,
    /// Threads that stand at the gate.
    parked: usize,
    errand: Option<Errand>,
    /// How many errands there have been.
    sent: u64,
    /// Threads that have not come back from the last one.
    under_way: usize,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("order", &self.order).finish_non_exhaustive()
    }
}

impl Gate {
    /// An open gate for `vcpus` threads.
    pub fn new(vcpus: usize) -> Gate {
        Gate {
            order: AtomicU8::new(Order::Run as u8),
            held_back: (0..vcpus).map(|_| AtomicBool::new(false)).collect(),
            state: Mutex::new(GateState {
                pauses: 0,
                stop: false,
                alive: vcpus,
                parked: 0,
                errand: None,
                sent: 0,
                under_way: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        // Counters are consistent between any two statements here.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn publish(&self, state: &GateState) {
        let order = if state.stop {
            Order::Stop
        } else if state.pauses > 0 {
            Order::Pause
        } else {
            Order::Run
        };
        self.order.store(order as u8, Ordering::Release);
        self.changed.notify_all();
    }

    /// Closes the gate, calls `kick` to bring the threads out of the guest, and returns when all of them that
    /// still live stand at it.
    pub fn close(&self, kick: impl FnOnce()) {
        let mut state = self.lock();
        state.pauses += 1;
        self.publish(&state);
        drop(state);
        kick();
        let mut state = self.lock();
        while state.parked < state.alive && !state.stop {
            state = self.wait(state);
        }
    }

    /// Closes the gate and waits for nobody: for threads that have not been started yet.
    pub fn shut(&self) {
        let mut state = self.lock();
        state.pauses += 1;
        self.publish(&state);
    }

    /// Opens the gate again, when as many opened as closed it.
    pub fn open(&self) {
        let mut state = self.lock();
        state.pauses = state.pauses.saturating_sub(1);
        self.publish(&state);
    }

    /// Sends all threads home.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.publish(&state);
    }

    /// Whether all threads were sent home.
    pub fn is_stopped(&self) -> bool {
        self.lock().stop
    }

    /// Holds one vCPU back, or does not any more; whoever does so kicks it.
    pub(crate) fn hold_back(&self, vcpu: u8, hold: bool) {
        let _state = self.lock();
        if let Some(held_back) = self.held_back.get(usize::from(vcpu)) {
            held_back.store(hold, Ordering::Release);
        }
        self.changed.notify_all();
    }

    fn is_held_back(&self, vcpu: u8) -> bool {
        self.held_back.get(usize::from(vcpu)).is_some_and(|held_back| held_back.load(Ordering::Acquire))
    }

    /// Whether the thread of `vcpu` may pass the gate: the check on the hot path.
    pub(crate) fn is_open_to(&self, vcpu: u8) -> bool {
        self.order.load(Ordering::Acquire) == Order::Run as u8 && !self.is_held_back(vcpu)
    }

    /// Has each thread that stands at the gate run `errand` once, with its vCPU, and waits for all of them. Only
    /// while the gate is [closed](Gate::close), and by one at a time.
    pub fn send(&self, errand: Errand) {
        let mut state = self.lock();
        state.sent += 1;
        state.errand = Some(errand);
        state.under_way = state.parked;
        self.changed.notify_all();
        while state.under_way > 0 && !state.stop {
            state = self.wait(state);
        }
        state.errand = None;
    }

    /// Waits at the gate, and runs errands meanwhile. False: go home.
    pub(crate) fn pass(&self, id: u8, fd: &VcpuFd) -> bool {
        let mut state = self.lock();
        let mut seen = state.sent;
        state.parked += 1;
        self.changed.notify_all();
        while (state.pauses > 0 || self.is_held_back(id)) && !state.stop {
            match state.errand.clone().filter(|_| seen != state.sent) {
                Some(errand) => {
                    seen = state.sent;
                    drop(state);
                    errand(id, fd);
                    state = self.lock();
                    state.under_way -= 1;
                    self.changed.notify_all();
                }
                None => state = self.wait(state),
            }
        }
        state.parked -= 1;
        !state.stop
    }

    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        state.alive -= 1;
        self.changed.notify_all();
    }
}
