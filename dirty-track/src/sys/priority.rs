//! Threads that give way to all others.

/// From now on the calling thread runs when no other wants to (`SCHED_IDLE`, sched(7)). Should the kernel refuse, it runs as
/// before.
pub(crate) fn give_way() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the struct outlives the call, which reads it; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) };
}
