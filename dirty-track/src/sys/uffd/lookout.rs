//! How long a handler looks for the next fault before it goes to sleep.
//!
//! Whoever sleeps has to be woken, and where processors sleep too that takes longer than to serve a fault: on a host
//! that is itself a virtual machine, some 40 us each time. A guest that touches its memory page after page asks again
//! a few microseconds after it was woken itself; a handler that still looks then answers at once. A guest that asks
//! now and then gets nothing from it, and nobody should look for that in vain.
//!
//! So it is with vCPUs that halt, and the rule is the one by which KVM polls for those (`halt_poll_ns`: `grow_halt_poll_ns`
//! and `shrink_halt_poll_ns` in virt/kvm/kvm_main.c): a fault that came soon after looking had ended makes the window
//! longer; one that came late makes an end of looking. What it costs at most is therefore one window for each pause
//! of the guest, and all of one processor while faults come in close succession, most of which goes into serving them.
//!
//! Where there are more threads to run than processors, a handler that looks would take time from whoever could ask it.
//! So it offers the processor between two looks. If somebody takes it (an involuntary context switch, getrusage(2)), the
//! next faults are waited for asleep: twice as many each time, up to [`MOST_ASLEEP`], and fewer the more often nobody
//! minds.

use std::mem;
use std::thread;
use std::time::{Duration, Instant};

/// The longest window, and what counts as soon.
pub const LONGEST: Duration = Duration::from_micros(200);

/// The first window.
const SHORTEST: Duration = Duration::from_micros(10);

/// Faults that are at least waited for asleep after others needed the processor.
const LEAST_ASLEEP: u32 = 16;

/// And at most.
pub const MOST_ASLEEP: u32 = 1024;

/// What a handler knows of the pace at which faults come, and of who else wants its processor.
#[derive(Clone, Debug, Default)]
pub struct Lookout {
    window: Duration,
    /// Faults still to be waited for asleep.
    asleep: u32,
    /// How many they were when that began.
    penalty: u32,
}

impl Lookout {
    /// How long to look this time.
    pub fn window(&self) -> Duration {
        match self.asleep {
            0 => self.window,
            _ => Duration::ZERO,
        }
    }

    /// What was waited for came after `waited`, whether it was looked for or slept for. While it was looked for, somebody
    /// else may have had the processor.
    pub fn came(&mut self, waited: Duration, contended: bool) {
        if contended {
            self.penalty = (self.penalty * 2).clamp(LEAST_ASLEEP, MOST_ASLEEP);
            self.asleep = self.penalty;
            return;
        }
        match self.asleep.checked_sub(1) {
            Some(left) => self.asleep = left,
            None => self.penalty -= self.penalty.div_ceil(16),
        }
        if waited > LONGEST {
            self.window = Duration::ZERO;
        } else if waited > self.window {
            self.window = (self.window * 2).clamp(SHORTEST, LONGEST);
        }
    }

    /// Calls `look` until it has found something or the window is over, and says whether somebody else had the processor
    /// meanwhile.
    pub(super) fn look<T>(&self, began: Instant, mut look: impl FnMut() -> Option<T>) -> (Option<T>, bool) {
        let window = self.window();
        if window.is_zero() {
            return (None, false);
        }
        let (before, mut found) = (switches(), None);
        while found.is_none() && began.elapsed() < window {
            thread::yield_now();
            found = look();
        }
        (found, switches() != before)
    }
}

/// How often this thread had to leave its processor to another.
fn switches() -> libc::c_long {
    // SAFETY: all zeros are a value of the struct, which is plain numbers.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: the call fills the struct, which outlives it. It cannot fail with these arguments.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_nivcsw
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(50);
    const LATE: Duration = Duration::from_millis(1);

    fn after(waits: &[Duration]) -> Lookout {
        let mut lookout = Lookout::default();
        waits.iter().for_each(|&wait| lookout.came(wait, false));
        lookout
    }

    #[test]
    fn looks_as_long_as_faults_take_to_come_and_not_at_all_if_they_come_late() {
        assert_eq!(after(&[]).window(), Duration::ZERO);
        assert_eq!(after(&[LATE; 9]).window(), Duration::ZERO);
        let enough = after(&[SOON; 9]).window();
        assert!(enough >= SOON && enough < SOON * 2, "{enough:?}");
        assert_eq!(after(&[LONGEST; 9]).window(), LONGEST);
        assert_eq!(after(&[SOON, SOON, SOON, LATE]).window(), Duration::ZERO);
    }

    /// Waits asleep until it looks again, and says how often.
    fn asleep(lookout: &mut Lookout) -> u32 {
        let mut faults = 0;
        while lookout.window().is_zero() {
            lookout.came(SOON, false);
            faults += 1;
        }
        faults
    }

    #[test]
    fn who_is_in_the_way_looks_less_and_less() {
        let mut lookout = after(&[SOON; 9]);
        let contended = |lookout: &mut Lookout| {
            lookout.came(SOON, true);
            asleep(lookout)
        };
        assert_eq!(contended(&mut lookout), LEAST_ASLEEP);
        assert!(contended(&mut lookout) > LEAST_ASLEEP * 3 / 2);
        for _ in 0..20 {
            contended(&mut lookout);
        }
        assert!(contended(&mut lookout) > MOST_ASLEEP / 2);
        // Until nobody minds any more.
        (0..1000).for_each(|_| lookout.came(SOON, false));
        assert_eq!(contended(&mut lookout), LEAST_ASLEEP);
    }

    #[test]
    fn looking_ends_with_what_is_found_or_with_the_window() {
        let lookout = after(&[LONGEST; 9]);
        let mut looks = 0;
        let (found, _) = lookout.look(Instant::now(), || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert!(found.is_none() && looks < 3 || found == Some(3));
        assert_eq!(lookout.look(Instant::now(), || None::<()>).0, None);
        assert_eq!(Lookout::default().look(Instant::now(), || Some(())), (None, false));
    }
}
