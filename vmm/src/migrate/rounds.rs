//! What a precopy does after each round: a pure function of what was seen.

use std::time::Duration;

use dirty_track::addr::PAGE_SIZE;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limits {
    /// How long the guest may stand still.
    pub(super) downtime: Duration,
    /// Slow the guest down if it writes faster than can be sent.
    pub(super) auto_converge: bool,
    /// Switch to postcopy if it does.
    pub(super) postcopy: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Send what is dirty while the guest runs.
    Again,
    /// The same, with the vCPUs held back for so many percent of their time.
    Slow(u8),
    /// Stop the guest, and send the rest.
    Stop,
    /// Stop the guest, and let the destination ask for the rest.
    Postcopy,
    /// The guest writes faster than can be sent, and nothing may be done about it.
    GiveUp,
}

/// What is sent in a moment, whatever the allowance.
const FEW: u64 = 128;

/// Besides the pages, the state has to go, and answers to come.
const STATE: f64 = 0.001;

/// Rounds without getting on before something is done about it.
const PATIENCE: u32 = 2;

/// Rounds without getting on before it is given up.
const LAST: u32 = 30;

/// Most rounds that are spent on less than the allowance.
const POLISH: u32 = 6;

/// How much slower it becomes at first, and each time after that, in percent.
const SLOW: (u8, u8) = (20, 15);
const SLOWEST: u8 = 99;

/// How a precopy has gone so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rounds {
    /// Pages that were owed after the round before.
    last: Option<u64>,
    /// Bytes per second.
    rate: f64,
    stuck: u32,
    polished: u32,
    slow: u8,
}

impl Rounds {
    /// A round took `seconds` to send `bytes`; `owed` pages have become dirty meanwhile.
    pub(super) fn next(&mut self, bytes: u64, seconds: f64, owed: u64, limits: &Limits) -> Next {
        if seconds > 0.0 {
            let rate = bytes as f64 / seconds;
            // A few pages tell nothing about a link but that it is no slower.
            let tells = bytes >= 4 << 20 || self.rate == 0.0;
            self.rate = if tells { rate } else { rate.max(self.rate) };
        }
        let shrinks = self.last.is_none_or(|last| owed * 4 < last * 3);
        self.last = Some(owed);
        let fits = self.downtime(owed).is_some_and(|time| time <= limits.downtime.as_secs_f64());
        if owed <= FEW && fits {
            return Next::Stop;
        }
        if fits {
            self.polished += 1;
            // As little as can be had for a few short rounds more.
            return if shrinks && self.polished <= POLISH { Next::Again } else { Next::Stop };
        }
        if shrinks {
            return Next::Again;
        }
        self.stuck += 1;
        match limits {
            _ if self.stuck < PATIENCE => Next::Again,
            Limits { postcopy: true, .. } => Next::Postcopy,
            Limits { auto_converge: true, .. } if self.slow < SLOWEST => {
                self.slow = if self.slow == 0 { SLOW.0 } else { (self.slow + SLOW.1).min(SLOWEST) };
                Next::Slow(self.slow)
            }
            _ if self.stuck < LAST => Next::Again,
            _ => Next::GiveUp,
        }
    }

    /// Bytes per second of the last round that tells; 0 before.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    /// Seconds that the guest would stand still for `owed` pages, once a rate is known.
    pub(super) fn downtime(&self, owed: u64) -> Option<f64> {
        (self.rate > 0.0).then(|| (owed * PAGE_SIZE) as f64 / self.rate + STATE)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits =
        Limits { downtime: Duration::from_millis(20), auto_converge: false, postcopy: false };

    /// A guest that dirties `dirty` bytes per second of `memory` over a link of `link`: what is owed at the end, and the
    /// decision; how often it went on.
    fn run(memory: f64, dirty: f64, link: f64, limits: Limits) -> (u64, Next, u32) {
        let (mut rounds, mut bytes, mut slow) = (Rounds::default(), memory, 0.0);
        for round in 0..200 {
            let seconds = bytes / link;
            let owed = (dirty * (1.0 - slow) * seconds).min(memory);
            let pages = (owed / 4096.0) as u64;
            match rounds.next(bytes as u64, seconds, pages, &limits) {
                Next::Again => {}
                Next::Slow(percent) => slow = f64::from(percent) / 100.0,
                end => return (pages, end, round),
            }
            bytes = owed.max(4096.0);
        }
        panic!("it never ends");
    }

    #[test]
    fn a_guest_that_can_be_followed_stands_still_for_little() {
        let (pages, next, rounds) = run(1e9, 5e8, 5e9, LIMITS);
        assert_eq!(next, Next::Stop);
        assert!(pages <= 300 && rounds < 8, "{pages} {rounds}");
        assert_eq!(run(1e9, 0.0, 5e9, LIMITS), (0, Next::Stop, 0));
    }

    #[test]
    fn a_guest_that_cannot_is_dealt_with_as_allowed() {
        assert_eq!(run(1e9, 1e10, 1e9, LIMITS).1, Next::GiveUp);
        assert_eq!(run(1e9, 1e10, 1e9, Limits { postcopy: true, ..LIMITS }).1, Next::Postcopy);
        assert_eq!(run(1e9, 3e9, 1e9, Limits { auto_converge: true, ..LIMITS }).1, Next::Stop);
        let patient = Limits { downtime: Duration::from_secs(2), ..LIMITS };
        assert_eq!(run(1e9, 1e10, 1e9, patient).1, Next::Stop);
    }

    #[test]
    fn a_hiccup_of_a_busy_host_is_no_slow_link() {
        let mut rounds = Rounds::default();
        let limits = Limits { downtime: Duration::from_millis(20), ..LIMITS };
        rounds.next(4 << 20, 0.7, 392, &limits);
        assert!(rounds.downtime(392).unwrap() > 0.2);
        // 1.6 MiB in 16 ms, again and again: as much as may be owed.
        let next = (0..3).map(|_| rounds.next(392 * 4096, 0.016, 392, &limits)).last();
        assert_eq!(next, Some(Next::Stop));
        // And one large round says that it has become slow.
        rounds.next(8 << 20, 1.0, 392, &limits);
        assert_eq!(rounds.rate(), f64::from(8 << 20));
    }

    proptest! {
        #[test]
        fn it_always_ends_and_never_stops_for_longer_than_allowed(
            memory in 1e6..1e11f64, dirty in 0.0..2e10f64, link in 1e6..2e10f64, ms in 1..1000u64,
            auto_converge in any::<bool>(), postcopy in any::<bool>(),
        ) {
            let limits = Limits { downtime: Duration::from_millis(ms), auto_converge, postcopy };
            let (pages, next, _) = run(memory, dirty, link, limits);
            if next == Next::Stop {
                prop_assert!(pages as f64 * 4096.0 / link <= ms as f64 / 1000.0);
            }
            prop_assert!(next != Next::Postcopy || postcopy);
        }
    }
}
