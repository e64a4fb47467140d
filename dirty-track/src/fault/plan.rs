//! From a fault and what is recorded of its block to what is to be done: a pure function.

use crate::addr::LEAVES_PER_BLOCK;
use crate::fault::serve::Served;
use crate::fault::{Age, Prefault, Split};
use crate::stage2::{Block, Leaves};
use crate::sys::uffd::message::Cause;

/// What decides how faults are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// What a write to a protected page opens.
    pub split: Split,
    /// What comes along with a missing page.
    pub prefault: Prefault,
    /// How that is recorded.
    pub age: Age,
}

/// Where a slot's pages come from, as far as a plan depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// They are zero.
    Zero,
    /// They are copied from a buffer.
    Buffer,
    /// The mapped file has them.
    Cache,
    /// They are moved from elsewhere, which cannot be done write-protected.
    Staged,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) own: Leaves,
    pub(super) present: Leaves,
    pub(super) protected: Leaves,
    pub(super) dirty: Leaves,
    pub(super) dropped: Leaves,
    /// What the split policy remembers.
    pub(super) heat: u8,
    /// Of the working set.
    pub(super) recorded: Leaves,
    pub(super) origin: Origin,
    /// The slot's memory consists of huge pages, and of nothing smaller.
    pub(super) huge: bool,
    /// Its memory may have huge pages, and takes them if they are moved there.
    pub(super) moves: bool,
    /// Every first write is to be seen. Otherwise a page that was asked for counts as dirty as soon as it is there,
    /// and costs no second fault when it is written.
    pub(super) track: bool,
}

impl View {
    pub(super) fn of(block: &Block<'_>, recorded: Leaves, slot: &Served, track: bool) -> View {
        View {
            own: block.own(),
            present: block.present(),
            protected: block.protected(),
            dirty: block.dirty(),
            dropped: block.dropped(),
            heat: block.heat(),
            recorded,
            origin: slot.origin,
            huge: slot.huge,
            moves: slot.moves,
            track,
        }
    }

    /// Whether `leaves` are moved if they are put there: only as a whole block, which is a huge page then, and only if they
    /// need no protection, which cannot come with them.
    fn moved(&self, leaves: Leaves, protected: bool) -> bool {
        self.moves && self.origin == Origin::Buffer && leaves == Leaves::ALL && !protected
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Pages are to be put where none are.
    Install(Install),
    /// The protection of these leaves is to be lifted.
    Open(Leaves),
}

/// Pages to put where none are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Install {
    /// With what the slot's source has, or with what the mapped file's cache has.
    pub(super) filled: Leaves,
    /// That cache.
    pub(super) cached: bool,
    /// Not copied but moved, as a huge page.
    pub(super) moved: bool,
    /// With zeros.
    pub(super) zeroed: Leaves,
    /// All of them write-protected.
    pub(super) protected: bool,
    /// The leaf that faulted is opened after that.
    pub(super) open: bool,
    /// It is about to be written.
    pub(super) written: bool,
    /// The zero page will do: nothing of it is about to be written, nor to be seen when it is.
    pub(super) zero_page: bool,
}

/// What to do about a fault at `leaf` of a block.
pub(super) fn plan(view: &View, leaf: usize, cause: Cause, policies: &Policies) -> Plan {
    let (write, cached) = match cause {
        Cause::Protected => {
            let opens = policies.split.opens(leaf, &view.protected, &view.dirty, view.heat);
            return Plan::Open(if view.huge { view.own } else { opens });
        }
        Cause::Missing { write } => (write, false),
        Cause::Minor { write } => (write, true),
    };
    let one = Leaves::one(leaf);
    let absent = view.own & !view.present;
    let set = match view.huge {
        true => view.own,
        false => policies.prefault.installs(leaf, &absent, &view.recorded),
    };
    // The kernel knows better what is missing. A page that was there has lost its contents by now.
    let gone = view.dropped | view.present & one;
    let (filled, zeroed) = match view.origin {
        _ if cached && view.huge => (set, Leaves::NONE),
        _ if cached => (set & !view.dropped | one, Leaves::NONE),
        // The cache has not even the page that faulted: there is a hole in the file.
        Origin::Zero | Origin::Cache => (Leaves::NONE, set),
        // A huge page is one thing.
        Origin::Buffer | Origin::Staged if view.huge => match gone.contains(leaf) {
            true => (Leaves::NONE, set),
            false => (set, Leaves::NONE),
        },
        Origin::Buffer | Origin::Staged => (set & !gone, set & gone),
    };
    let leaf_open = write || !view.track;
    let along = !((filled | zeroed) & !one).is_empty() && !view.huge;
    let protected = match along {
        _ if view.origin == Origin::Staged && !cached => false,
        true => view.track || policies.age == Age::Old,
        false => !leaf_open,
    };
    let open = leaf_open && protected;
    let zero_page = !write && !protected && !view.huge;
    let moved = !cached && view.moved(filled, protected);
    Plan::Install(Install { filled, cached, moved, zeroed, protected, open, written: write, zero_page })
}

/// Leaves of a block that are worth a huge page, if nothing of the block is there.
const WORTH_A_HUGE_PAGE: usize = LEAVES_PER_BLOCK as usize / 2;

/// What to do of the leaves `wanted` of a block before anybody faulted.
pub(super) fn ahead(view: &View, wanted: Leaves, age: Age) -> Install {
    let missing = wanted & view.own & !view.present & !view.dropped;
    let protected = view.origin != Origin::Staged && (view.track || age == Age::Old);
    let nothing_there = (view.present | view.dropped).is_empty();
    let leaves = match missing.count() {
        0 => missing,
        _ if view.huge => view.own,
        WORTH_A_HUGE_PAGE.. if nothing_there && view.moved(view.own, protected) => view.own,
        _ => missing,
    };
    let zero = view.origin == Origin::Zero;
    Install {
        filled: if zero { Leaves::NONE } else { leaves },
        cached: view.origin == Origin::Cache,
        moved: view.moved(leaves, protected),
        zeroed: if zero { leaves } else { Leaves::NONE },
        protected,
        open: false,
        written: false,
        zero_page: false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fault::{Threshold, Window};

    fn view() -> View {
        View {
            own: Leaves::range(16..512),
            present: Leaves::range(100..110),
            protected: Leaves::range(100..105),
            dirty: Leaves::range(105..110),
            dropped: Leaves::range(64..66),
            heat: 0,
            recorded: Leaves::NONE,
            origin: Origin::Buffer,
            huge: false,
            moves: false,
            track: false,
        }
    }

    const READ: Cause = Cause::Missing { write: false };
    const WRITE: Cause = Cause::Missing { write: true };

    #[test]
    fn a_missing_page_brings_its_window() {
        let policies = Policies::default();
        let install = Install {
            filled: Leaves::range(66..80),
            cached: false,
            moved: false,
            zeroed: Leaves::range(64..66),
            protected: true,
            open: true,
            written: true,
            zero_page: false,
        };
        let read = Install { written: false, ..install };
        assert_eq!(plan(&view(), 70, WRITE, &policies), Plan::Install(install));
        // Untracked, what was asked for is open even if it is only read.
        assert_eq!(plan(&view(), 70, READ, &policies), Plan::Install(read));
        let tracked = View { track: true, ..view() };
        assert_eq!(plan(&tracked, 70, READ, &policies), Plan::Install(Install { open: false, ..read }));
        assert_eq!(plan(&tracked, 70, WRITE, &policies), Plan::Install(install));
        // Young pages of memory that nobody tracks are open.
        let young = Policies { age: Age::Young, ..policies };
        let open = Install { protected: false, open: false, ..install };
        assert_eq!(plan(&view(), 70, WRITE, &young), Plan::Install(open));
        let zero = Install { zero_page: true, written: false, ..open };
        assert_eq!(plan(&view(), 70, READ, &young), Plan::Install(zero));
        let Plan::Install(moved) = plan(&View { origin: Origin::Staged, ..tracked }, 70, READ, &policies)
        else {
            panic!("a missing page is not opened")
        };
        assert!(!moved.protected && !moved.open);
    }

    #[test]
    fn what_was_there_and_is_missing_has_lost_its_contents() {
        let none = Policies { prefault: Prefault::None, ..Policies::default() };
        let view = View { track: true, ..view() };
        let Plan::Install(install) = plan(&view, 103, READ, &none) else { panic!("it is missing") };
        assert_eq!((install.filled, install.zeroed), (Leaves::NONE, Leaves::one(103)));
        // A file has its own contents, whatever became of the mapping.
        let view = View { origin: Origin::Cache, ..view };
        let minor = plan(&view, 103, Cause::Minor { write: false }, &none);
        let Plan::Install(install) = minor else { panic!("it is missing") };
        assert_eq!((install.filled, install.zeroed), (Leaves::one(103), Leaves::NONE));
    }

    #[test]
    fn a_block_is_moved_if_it_comes_whole_and_needs_no_protection() {
        let empty = View {
            own: Leaves::ALL,
            present: Leaves::NONE,
            protected: Leaves::NONE,
            dirty: Leaves::NONE,
            dropped: Leaves::NONE,
            moves: true,
            ..view()
        };
        let moved = |view: &View, prefault, age| {
            let Plan::Install(install) =
                plan(view, 70, WRITE, &Policies { prefault, age, ..Policies::default() })
            else {
                panic!("it is missing")
            };
            install.moved
        };
        assert!(moved(&empty, Prefault::Block, Age::Young));
        assert!(!moved(&empty, Prefault::Block, Age::Old));
        assert!(!moved(&empty, Prefault::default(), Age::Young));
        let not = [
            View { track: true, ..empty },
            View { present: Leaves::one(3), ..empty },
            View { dropped: Leaves::one(3), ..empty },
            View { moves: false, ..empty },
            View { origin: Origin::Zero, ..empty },
        ];
        assert!(not.iter().all(|view| !moved(view, Prefault::Block, Age::Young)));
        // Ahead of any fault, with the rest of the block if most of it is wanted.
        let (half, less) = (Leaves::range(0..WORTH_A_HUGE_PAGE), Leaves::range(1..WORTH_A_HUGE_PAGE));
        let install = ahead(&empty, half, Age::Young);
        assert_eq!((install.moved, install.filled), (true, Leaves::ALL));
        for (view, wanted, age) in [(empty, less, Age::Young), (empty, half, Age::Old)] {
            let install = ahead(&view, wanted, age);
            assert_eq!((install.moved, install.filled), (false, wanted));
        }
        for view in not {
            let install = ahead(&view, half, Age::Young);
            assert!(!install.moved && half.includes(&(install.filled | install.zeroed)));
        }
    }

    fn policies() -> impl Strategy<Value = Policies> {
        let split = prop_oneof![
            Just(Split::Leaf),
            Just(Split::Block),
            (1..=512u64).prop_map(|leaves| Split::Adaptive(Threshold::new(leaves).unwrap())),
        ];
        let prefault = prop_oneof![
            Just(Prefault::None),
            Just(Prefault::Block),
            Just(Prefault::Recorded),
            (12..=21u32).prop_map(|bits| Prefault::Around(Window::new(1 << bits).unwrap())),
        ];
        let age = prop_oneof![Just(Age::Old), Just(Age::Young)];
        (split, prefault, age).prop_map(|(split, prefault, age)| Policies { split, prefault, age })
    }

    proptest! {
        #[test]
        fn a_plan_serves_the_fault_and_changes_nothing_that_is_there(
            leaf in 16..512usize,
            words in any::<[[u64; 8]; 4]>(),
            which in 0..4usize,
            kind in 0..5usize,
            (track, moves) in any::<(bool, bool)>(),
            policies in policies(),
        ) {
            let origin = [Origin::Zero, Origin::Buffer, Origin::Cache, Origin::Staged][which];
            let own = Leaves::range(16..512);
            let present = Leaves(words[0]) & own;
            let view = View {
                own,
                present,
                protected: Leaves(words[1]) & present,
                dirty: Leaves(words[2]) & own,
                dropped: Leaves(words[3]) & own & !present,
                heat: words[3][0] as u8,
                recorded: Leaves(words[3]),
                origin,
                huge: false,
                moves,
                track,
            };
            let write = kind % 2 == 1;
            let cause = match kind {
                0 | 1 => Cause::Missing { write },
                2 | 3 => Cause::Minor { write },
                _ => Cause::Protected,
            };
            match plan(&view, leaf, cause, &policies) {
                Plan::Open(leaves) => {
                    prop_assert!(cause == Cause::Protected && leaves.contains(leaf));
                    prop_assert!((view.protected | Leaves::one(leaf)).includes(&leaves));
                }
                Plan::Install(install) => {
                    let all = install.filled | install.zeroed;
                    prop_assert!(cause != Cause::Protected && all.contains(leaf));
                    prop_assert!((install.filled & install.zeroed).is_empty());
                    prop_assert!((own & !present | Leaves::one(leaf)).includes(&all));
                    // What was dropped never gets its old contents back; a file has none but the newest.
                    let stale = install.filled & view.dropped & !Leaves::one(leaf);
                    prop_assert!(stale.is_empty());
                    prop_assert!(kind > 1 || !(install.filled & view.dropped).contains(leaf));
                    // A write goes on at once, and one that is to be seen is.
                    prop_assert!(!write || install.open || !install.protected);
                    prop_assert_eq!((install.written, install.cached), (write, kind > 1));
                    if track && (origin != Origin::Staged || install.cached) {
                        prop_assert!(install.protected || (write && all == Leaves::one(leaf)));
                        prop_assert!(write || !install.open);
                    }
                    prop_assert!(!(install.zero_page && (write || install.protected)));
                    prop_assert!(origin != Origin::Staged || install.cached || !install.protected);
                }
            }
        }
    }
}
