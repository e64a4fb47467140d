//! Which processor a thread runs on.

/// Keeps the calling thread on one of the processors that it may use, the `index`th. Threads that it starts afterwards stay
/// there, too. False when it cannot be done.
pub fn pin(index: usize) -> bool {
    // SAFETY: a set of processors is plain bits, for which zeroes are valid.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the call writes at most `size` bytes, which is what `allowed` has.
    if unsafe { libc::sched_getaffinity(0, size, &mut allowed) } != 0 {
        return false;
    }
    let all = 0..libc::CPU_SETSIZE as usize;
    // SAFETY: the index is below CPU_SETSIZE.
    let Some(cpu) = all.filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &allowed) }).nth(index) else {
        return false;
    };
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the index is below CPU_SETSIZE.
    unsafe { libc::CPU_SET(cpu, &mut one) };
    // SAFETY: the call reads `size` bytes of a set that outlives it.
    unsafe { libc::sched_setaffinity(0, size, &one) == 0 }
}
