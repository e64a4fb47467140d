//! Processor time: what a busy host does not change, as far as anything does not.

use std::time::Duration;

/// What the calling thread has had, a guest's included if it is a vCPU's.
pub fn of_thread() -> Duration {
    time_of(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What all threads of this process have had.
pub fn of_process() -> Duration {
    time_of(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn time_of(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, which is ours and outlives it. These clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
