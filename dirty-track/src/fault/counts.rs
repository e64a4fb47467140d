//! What was decided, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Defines the counters once as atomics and once as numbers.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a [server](crate::fault::Server) has done since it was started.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counts {
            /// What was counted since `before`; of those who wait, how many do so now.
            pub fn since(&self, before: &Counts) -> Counts {
                let since = Counts { $($name: self.$name.saturating_sub(before.$name),)* };
                Counts { waiting: self.waiting, ..since }
            }
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)*
        }

        impl Counters {
            pub(super) fn now(&self) -> Counts {
                Counts { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Threads that wait for a page at this moment, as far as handlers have read of them.
    waiting,
    /// Faults of pages that were nowhere.
    missing,
    /// Faults of pages that only the mapping did not have.
    minor,
    /// Writes to protected pages.
    protected,
    /// Faults at addresses that no slot has.
    strange,
    /// Faults for which nothing was left to do: somebody else had been there.
    stale,
    /// Faults that had to be looked at again, because mappings changed just then.
    again,
    /// Faults that could not be served at once, each time.
    failures,
    /// Pages that were installed.
    installed,
    /// Of these, pages that came along.
    prefaulted,
    /// Of these, pages that were recorded as old.
    old,
    /// Old pages that were seen to be touched: written, that is, for nobody sees a mapped page being read.
    hits,
    /// Old pages that were unmapped without having been touched, as far as that was seen.
    unmapped_old,
    /// Pages that were dropped, or unmapped.
    removed,
    /// Pages whose protection was lifted.
    opened,
    /// Times that a whole block was opened for one write.
    blocks_opened,
    /// Huge mappings that were split for one write.
    splits,
    /// Calls that copied pages.
    copies,
    /// Calls that mapped the zero page.
    zeroes,
    /// Calls that mapped pages from a file's cache.
    continues,
    /// Calls that moved pages.
    moves,
}

impl Counts {
    /// Pages that came along and were not seen to be touched: an upper bound for those that came in vain. Pages that
    /// were only read are among them.
    pub fn untouched(&self) -> u64 {
        self.old.saturating_sub(self.hits)
    }
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Takes away what was [added](Counter::add).
    pub(super) fn take(&self, count: usize) {
        self.0.fetch_sub(count as u64, Ordering::Relaxed);
    }

    /// Has `count` more in it until the guard is dropped.
    pub(super) fn hold(&self, count: usize) -> Held<'_> {
        self.add(count);
        Held { counter: self, count: count as u64 }
    }
}

/// See [`Counter::hold`].
pub(super) struct Held<'a> {
    counter: &'a Counter,
    count: u64,
}

impl Held<'_> {
    /// One less.
    pub(super) fn one_done(&mut self) {
        let one = self.count.min(1);
        self.count -= one;
        self.counter.0.fetch_sub(one, Ordering::Relaxed);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.counter.0.fetch_sub(self.count, Ordering::Relaxed);
    }
}
