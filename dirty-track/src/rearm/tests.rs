//! The policy against a naive oracle, and against a simulated guest whose log works as KVM's does.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn skip(threshold: u64, for_epochs: u64) -> Rearm {
    Rearm::DenseSkip(DenseSkip::new(threshold, for_epochs).unwrap())
}

fn policy() -> impl Strategy<Value = Rearm> {
    let threshold = prop_oneof![Just(1), Just(384), Just(512), 1..=512u64];
    let epochs = prop_oneof![4 => 1..5u64, 1 => Just(250)];
    prop_oneof![1 => Just(Rearm::All), 6 => (threshold, epochs).prop_map(|(leaves, epochs)| skip(leaves, epochs))]
}

fn to_words(pages: usize, set: &BTreeSet<usize>) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(64)];
    set.iter().for_each(|page| words[page / 64] |= 1 << (page % 64));
    words
}

fn to_set(words: &[u64]) -> BTreeSet<usize> {
    bitmap::runs(words).flatten().collect()
}

/// A slot as KVM and the hardware hold it: a page is writable, and then its bit is set, or it is protected.
struct Guest {
    rearm: SlotRearm,
    pages: usize,
    /// Pages whose bit is set.
    log: BTreeSet<usize>,
    /// Write faults so far.
    faults: usize,
}

/// An epoch's end.
struct Closed {
    reported: BTreeSet<usize>,
    coarse: BTreeSet<usize>,
    /// Protected again.
    protected: BTreeSet<usize>,
    /// Faults in the epoch.
    faults: usize,
}

impl Guest {
    fn new(policy: Rearm, pages: usize) -> Guest {
        Guest { rearm: SlotRearm::new(policy, pages), pages, log: BTreeSet::new(), faults: 0 }
    }

    fn write(&mut self, page: usize) {
        self.faults += usize::from(self.log.insert(page));
    }

    fn close(&mut self) -> Closed {
        let mut words = to_words(self.pages, &self.log);
        let mut coarse = vec![0; words.len()];
        self.rearm.coarse(&words, |word, bits| {
            assert!(coarse[word] == 0 && bits != 0);
            coarse[word] = bits;
        });
        self.rearm.plan(&mut words);
        let protected = to_set(&words);
        let reported = self.log.clone();
        self.log = self.log.difference(&protected).copied().collect();
        Closed { reported, coarse: to_set(&coarse), protected, faults: std::mem::take(&mut self.faults) }
    }
}

/// The oracle's notion of a block.
#[derive(Clone, Debug, PartialEq)]
enum Naive {
    Exact,
    Open { left: u64 },
    Probed(BTreeSet<usize>),
}

/// The table in the module's documentation, once more, in floating point and with sets. Which leaves are
/// probed is the plan's own choice, `chosen`; the oracle checks that it was a fair one.
fn naive(
    policy: Rearm,
    block: usize,
    state: &Naive,
    dirty: &BTreeSet<usize>,
    leaves: usize,
    chosen: &BTreeSet<usize>,
) -> (Naive, BTreeSet<usize>) {
    let all = dirty.clone();
    let none = BTreeSet::new();
    let Rearm::DenseSkip(skip) = policy else { return (Naive::Exact, all) };
    let threshold = skip.threshold() as f64 / 512.0;
    match state {
        Naive::Exact if !dirty.is_empty() && dirty.len() as f64 / leaves as f64 >= threshold => {
            (Naive::Open { left: 1 + block as u64 % skip.for_epochs() }, none)
        }
        Naive::Exact => (Naive::Exact, all),
        Naive::Open { left: 1 } => (Naive::Probed(chosen.clone()), dirty & chosen),
        Naive::Open { left } => (Naive::Open { left: left - 1 }, none),
        Naive::Probed(probes) => {
            let hit = (dirty & probes).len() as f64 / probes.len() as f64;
            if hit >= threshold / 2.0 {
                (Naive::Open { left: skip.for_epochs() }, none)
            } else {
                (Naive::Exact, all)
            }
        }
    }
}

/// For each block in each epoch, how many of its leaves the guest writes: nothing, little, about half, all.
fn density() -> impl Strategy<Value = usize> {
    prop_oneof![3 => Just(0), 1 => 1..20usize, 1 => 200..400usize, 3 => Just(512)]
}

/// The `count` leaves of a block that an epoch writes, spread by `salt`.
fn spread(count: usize, salt: u64) -> impl Iterator<Item = usize> {
    let odd = (mix(salt) | 1) as usize;
    (0..count).map(move |index| (index.wrapping_mul(odd).wrapping_add(salt as usize)) % 512)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Every page written is reported, what is reported and was not written is coarse, coarse pages were
    /// writable, and the plan is the oracle's.
    #[test]
    fn plans_are_those_of_the_oracle_and_lose_nothing(
        policy in policy(),
        tail in prop_oneof![Just(0usize), Just(1), Just(63), Just(65), Just(511), 1..512usize],
        epochs in prop::collection::vec(prop::collection::vec(density(), 4), 1..24),
    ) {
        let pages = 3 * 512 + tail;
        let mut guest = Guest::new(policy, pages);
        let mut states = vec![Naive::Exact; pages.div_ceil(512)];
        for (epoch, densities) in epochs.iter().enumerate() {
            let writable = guest.log.clone();
            let mut written = BTreeSet::new();
            for (block, &count) in densities.iter().enumerate() {
                for leaf in spread(count, (epoch * 4 + block) as u64) {
                    let page = block * 512 + leaf;
                    if page < pages {
                        guest.write(page);
                        written.insert(page);
                    }
                }
            }
            let closed = guest.close();
            prop_assert!(written.is_subset(&closed.reported), "missed");
            let unknown = &closed.reported - &written;
            prop_assert!(unknown.is_subset(&closed.coarse), "reported, not written and not coarse");
            prop_assert!(writable.is_subset(&closed.coarse), "writable since the epoch began and not coarse");
            prop_assert!(closed.protected.is_subset(&closed.reported), "protects what was not reported");

            for (block, state) in states.iter_mut().enumerate() {
                let (start, end) = (block * 512, (block * 512 + 512).min(pages));
                let of = |set: &BTreeSet<usize>| -> BTreeSet<usize> { set.range(start..end).copied().collect() };
                let coarse = of(&closed.coarse);
                match state {
                    Naive::Exact => prop_assert_eq!(coarse, BTreeSet::new(), "coarse without cause"),
                    Naive::Open { .. } => prop_assert_eq!(coarse, of(&closed.reported)),
                    Naive::Probed(probes) => prop_assert_eq!(coarse, &of(&closed.reported) - probes),
                }
                let plan_probes = probes(block, guest.rearm.epoch, end - start);
                let chosen: BTreeSet<_> = to_set(&plan_probes).iter().map(|leaf| start + leaf).collect();
                prop_assert_eq!(chosen.len(), PROBES.min(end - start));
                prop_assert!(chosen.iter().all(|&page| page < end));
                let (next, protect) = naive(policy, block, state, &of(&closed.reported), end - start, &chosen);
                prop_assert_eq!(of(&closed.protected), protect, "block {} in {:?}", block, state);
                *state = next;
            }
            prop_assert_eq!(
                guest.rearm.open_blocks(),
                states.iter().filter(|state| **state != Naive::Exact).count()
            );
        }
    }

    /// A block that is written no more is found out: after its stay open and a probe it is exact and clean.
    #[test]
    fn what_cools_becomes_exact(threshold in 1..=512u64, for_epochs in 1..40u64, hot in 1..60usize) {
        let pages = 5 * 512;
        let mut guest = Guest::new(skip(threshold, for_epochs), pages);
        for _ in 0..hot {
            (0..pages).for_each(|page| guest.write(page));
            guest.close();
        }
        for _ in 0..for_epochs + 1 {
            guest.close();
        }
        prop_assert_eq!(guest.rearm.open_blocks(), 0);
        prop_assert!(guest.close().reported.is_empty());
        guest.write(700);
        let closed = guest.close();
        prop_assert_eq!(closed.reported, BTreeSet::from([700]));
        prop_assert!(closed.coarse.is_empty());
    }

    /// Going back to `all` closes every block at the next epoch's end, which is still said to be coarse.
    #[test]
    fn a_change_of_policy_takes_effect_at_the_epochs_end(epochs in 1..20usize) {
        let mut guest = Guest::new(skip(1, 8), 1024);
        for _ in 0..epochs {
            (0..1024).for_each(|page| guest.write(page));
            guest.close();
        }
        guest.rearm.set_policy(Rearm::All);
        let closed = guest.close();
        prop_assert!(closed.reported.len() >= 1024 - 2 * PROBES);
        prop_assert_eq!(&closed.coarse, &closed.reported);
        prop_assert_eq!(closed.protected, closed.reported);
        prop_assert_eq!(guest.rearm.open_blocks(), 0);
        prop_assert!(guest.close().reported.is_empty());
    }
}

/// A guest that rewrites everything pays for probes only, in each epoch about the same.
#[test]
fn a_dense_guest_pays_for_probes_only() {
    const BLOCKS: usize = 128;
    let policy = DenseSkip::default();
    let mut guest = Guest::new(Rearm::DenseSkip(policy), BLOCKS * 512);
    let mut costs = Vec::new();
    for _ in 0..60 {
        (0..BLOCKS * 512).for_each(|page| guest.write(page));
        costs.push(guest.close().faults);
    }
    assert_eq!(costs[0], BLOCKS * 512);
    let most = PROBES * BLOCKS / usize::from(policy.for_epochs);
    assert!(costs[1..].iter().all(|&faults| faults <= most), "{costs:?}");
    assert!(costs[1..].iter().sum::<usize>() > 0, "never probed: {costs:?}");
}

/// Nothing that is not dense is ever coarse, and its cost and its reports are those of `all`.
#[test]
fn a_sparse_guest_is_exact() {
    let mut guest = Guest::new(Rearm::DenseSkip(DenseSkip::default()), 4096);
    for epoch in 0..50 {
        let written: BTreeSet<_> = (0..100).map(|index| below(epoch * 1000 + index, 4096) as usize).collect();
        written.iter().for_each(|&page| guest.write(page));
        let closed = guest.close();
        assert_eq!((&closed.reported, closed.faults), (&written, written.len()));
        assert!(closed.coarse.is_empty());
        assert_eq!(closed.protected, written);
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    assert_eq!(DenseSkip::new(0, 1), Err(RearmError::Threshold(0)));
    assert_eq!(DenseSkip::new(513, 1), Err(RearmError::Threshold(513)));
    assert_eq!(DenseSkip::new(1, 0), Err(RearmError::Epochs(0)));
    assert_eq!(DenseSkip::new(1, 251), Err(RearmError::Epochs(251)));
    assert_eq!(DenseSkip::new(1, 1 << 40), Err(RearmError::Epochs(1 << 40)));
}
