//! Which page comes next: the access patterns, and the randomness behind them.
//!
//! Whole numbers only (the kernel has no floating point), and no division on the way to the next page.

use crate::abi::mix;

/// A small, fast generator (SplitMix64): every seed gives a sequence of its own.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence number `stream` of the family `seed`.
    pub fn new(seed: u64, stream: u64) -> Rng {
        Rng(mix(seed ^ mix(stream.wrapping_add(0x6a09_e667_f3bc_c909))))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n` (0 for an `n` of 0). The bias is below `n / 2^64`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// True in `percent` cases of a hundred.
    pub fn chance(&mut self, percent: u8) -> bool {
        // 32 bits of precision.
        (self.bits() >> 32) * 100 < u64::from(percent) << 32
    }
}

/// A sequence of page numbers, all below the number of pages that the pattern was made for (at least 1).
pub trait Pattern {
    /// The next page.
    fn next(&mut self, rng: &mut Rng) -> u64;
    /// A new pass begins.
    fn restart(&mut self, _rng: &mut Rng) {}
}

/// One page after the other, and around again.
#[derive(Clone, Debug)]
pub struct Sequential {
    pages: u64,
    next: u64,
    /// Whether every pass begins at page 0.
    rewinds: bool,
}

impl Sequential {
    /// All of `pages`, from 0 on; `rewinds`: every pass begins at 0.
    pub fn new(pages: u64, rewinds: bool) -> Sequential {
        Sequential { pages, next: 0, rewinds }
    }
}

impl Pattern for Sequential {
    fn next(&mut self, _rng: &mut Rng) -> u64 {
        let page = self.next;
        self.next = if page + 1 == self.pages { 0 } else { page + 1 };
        page
    }

    fn restart(&mut self, _rng: &mut Rng) {
        if self.rewinds {
            self.next = 0;
        }
    }
}

/// Every page as likely as any other.
#[derive(Clone, Debug)]
pub struct Uniform {
    /// Number of pages.
    pub pages: u64,
}

impl Pattern for Uniform {
    fn next(&mut self, rng: &mut Rng) -> u64 {
        rng.below(self.pages)
    }
}

/// Every `stride`-th page, then those one page further on.
#[derive(Clone, Debug)]
pub struct Strided {
    pages: u64,
    stride: u64,
    next: u64,
    first: u64,
}

impl Strided {
    /// `stride` is at least 1; one beyond `pages` counts as `pages`.
    pub fn new(pages: u64, stride: u64) -> Strided {
        Strided { pages, stride: stride.min(pages), next: 0, first: 0 }
    }
}

impl Pattern for Strided {
    fn next(&mut self, _rng: &mut Rng) -> u64 {
        let page = self.next;
        self.next += self.stride;
        if self.next >= self.pages {
            self.first = if self.first + 1 == self.stride { 0 } else { self.first + 1 };
            self.next = self.first;
        }
        page
    }
}

/// Nine accesses of ten go to the first pages, at random, the tenth to the rest.
#[derive(Clone, Debug)]
pub struct Hot {
    hot: u64,
    cold: u64,
}

impl Hot {
    /// `percent` of `pages`, at least one page, is hot.
    pub fn new(pages: u64, percent: u8) -> Hot {
        let hot = (pages / 100 * u64::from(percent) + pages % 100 * u64::from(percent) / 100).max(1);
        Hot { hot, cold: pages - hot }
    }
}

impl Pattern for Hot {
    fn next(&mut self, rng: &mut Rng) -> u64 {
        if self.cold == 0 || rng.chance(90) { rng.below(self.hot) } else { self.hot + rng.below(self.cold) }
    }
}

/// Zipf's law with exponent 1: the page of rank `r` (from 1) is drawn with a probability in proportion to
/// `1 / r`. Exact, without a table: an octave of ranks is drawn uniformly, then a rank in it uniformly, which
/// proposes rank `r` of the octave from `2^k` on in proportion to `1 / 2^k`; it is accepted with probability
/// `2^k / r`. Ranks are scattered over the pages by a permutation, so that hot pages are no neighbours.
#[derive(Clone, Debug)]
pub struct Zipf {
    pages: u64,
    octaves: u64,
    scatter: Scatter,
}

impl Zipf {
    /// For up to 2^32 pages.
    pub fn new(pages: u64) -> Zipf {
        Zipf { pages, octaves: u64::from(64 - pages.leading_zeros()), scatter: Scatter::new(pages) }
    }

    /// A rank from 1 to the number of pages.
    pub fn rank(&self, rng: &mut Rng) -> u64 {
        loop {
            let bits = rng.bits();
            let octave = (self.octaves * (bits >> 48)) >> 16;
            let first = 1u64 << octave;
            let rank = first | (bits & (first - 1));
            if rank <= self.pages && (rng.bits() >> 33) * rank < first << 31 {
                return rank;
            }
        }
    }
}

impl Pattern for Zipf {
    fn next(&mut self, rng: &mut Rng) -> u64 {
        let rank = self.rank(rng);
        self.scatter.of(rank - 1)
    }
}

/// A permutation of the numbers below some `n` that leaves no order in them.
#[derive(Clone, Debug)]
pub struct Scatter {
    pages: u64,
    mask: u64,
    shift: u32,
}

impl Scatter {
    /// Of the numbers below `pages`.
    pub fn new(pages: u64) -> Scatter {
        let bits = 64 - pages.saturating_sub(1).leading_zeros();
        Scatter { pages, mask: (1u64 << bits) - 1, shift: bits / 2 + 1 }
    }

    /// Where `x`, which must be below `pages`, goes.
    pub fn of(&self, mut x: u64) -> u64 {
        // Each step permutes the numbers of so many bits; those that land outside walk on along their cycle.
        loop {
            x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15) & self.mask;
            x ^= x >> self.shift;
            x = x.wrapping_mul(0xd1b5_4a32_d192_ed03) & self.mask;
            x ^= x >> self.shift;
            if x < self.pages {
                return x;
            }
        }
    }
}

/// What a machine at work might do, on a footprint that stays modest however much RAM there is: 78 of 100
/// accesses in a hot set (2% of the pages, up to 64 MiB) that moves when it has seen enough, 20 at a front
/// that advances page by page, 2 strays somewhere in one window (a quarter of the pages, up to 256 MiB).
#[derive(Clone, Debug)]
pub struct Mixture {
    pages: u64,
    hot: u64,
    hot_first: u64,
    hot_left: u64,
    front: u64,
    stray: u64,
}

/// Accesses that the hot set of a [`Mixture`] gets per page of it, before it moves.
const HOT_ACCESSES: u64 = 32;

impl Mixture {
    /// For `pages` pages.
    pub fn new(pages: u64) -> Mixture {
        let hot = (pages / 50).clamp(1, 16 << 10);
        Mixture {
            pages,
            hot,
            hot_first: pages / 4 * 3,
            hot_left: hot * HOT_ACCESSES,
            front: 0,
            stray: (pages / 4).clamp(1, 64 << 10),
        }
    }
}

impl Pattern for Mixture {
    fn next(&mut self, rng: &mut Rng) -> u64 {
        let bits = rng.bits();
        // The upper half decides the kind, the lower half the place.
        let (kind, place) = (((bits >> 32) * 100) >> 32, bits & 0xffff_ffff);
        let page = if kind < 78 {
            if self.hot_left == 0 {
                self.hot_left = self.hot * HOT_ACCESSES;
                self.hot_first = rng.below(self.pages);
            }
            self.hot_left -= 1;
            self.hot_first + ((place * self.hot) >> 32)
        } else if kind < 98 {
            self.front = if self.front + 1 >= self.pages { 0 } else { self.front + 1 };
            self.front
        } else {
            (self.pages - self.stray) / 2 + ((place * self.stray) >> 32)
        };
        if page >= self.pages { page - self.pages } else { page }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Page counts with edges in them.
    const SIZES: [u64; 9] = [1, 2, 3, 50, 100, 511, 512, 1000, 4096];

    fn draw(pattern: &mut impl Pattern, rng: &mut Rng, count: u64) -> Vec<u64> {
        (0..count).map(|_| pattern.next(rng)).collect()
    }

    #[test]
    fn no_pattern_leaves_its_pages() {
        fn check(mut pattern: impl Pattern, pages: u64) {
            let mut rng = Rng::new(5, pages);
            for _ in 0..3 {
                pattern.restart(&mut rng);
                let drawn = draw(&mut pattern, &mut rng, 20_000);
                assert!(drawn.iter().all(|&page| page < pages), "{pages} pages");
            }
        }
        for pages in SIZES.into_iter().chain([1 << 27]) {
            check(Sequential::new(pages, false), pages);
            check(Sequential::new(pages, true), pages);
            check(Uniform { pages }, pages);
            check(Strided::new(pages, 7), pages);
            check(Strided::new(pages, 1 << 40), pages);
            check(Hot::new(pages, 1), pages);
            check(Hot::new(pages, 99), pages);
            check(Zipf::new(pages), pages);
            check(Mixture::new(pages), pages);
        }
    }

    #[test]
    fn sequential_goes_round_and_fill_begins_again() {
        let mut rng = Rng::new(1, 1);
        let mut seq = Sequential::new(3, false);
        assert_eq!(draw(&mut seq, &mut rng, 7), [0, 1, 2, 0, 1, 2, 0]);
        seq.restart(&mut rng);
        assert_eq!(seq.next(&mut rng), 1);
        let mut fill = Sequential::new(3, true);
        assert_eq!(draw(&mut fill, &mut rng, 2), [0, 1]);
        fill.restart(&mut rng);
        assert_eq!(fill.next(&mut rng), 0);
    }

    #[test]
    fn a_stride_covers_every_page_once_a_round() {
        for pages in SIZES {
            for stride in [1, 2, 3, 16, 512, 5000] {
                let drawn = draw(&mut Strided::new(pages, stride), &mut Rng::new(1, 1), 2 * pages);
                for round in drawn.chunks(pages as usize) {
                    assert_eq!(
                        round.iter().collect::<HashSet<_>>().len() as u64,
                        pages,
                        "{pages} by {stride}"
                    );
                }
            }
        }
        assert_eq!(draw(&mut Strided::new(8, 3), &mut Rng::new(1, 1), 8), [0, 3, 6, 1, 4, 7, 2, 5]);
    }

    #[test]
    fn uniform_is_even() {
        let mut counts = [0u32; 64];
        for page in draw(&mut Uniform { pages: 64 }, &mut Rng::new(3, 0), 64_000) {
            counts[page as usize] += 1;
        }
        // Six standard deviations about 1000.
        assert!(counts.iter().all(|count| (810..1190).contains(count)), "{counts:?}");
    }

    #[test]
    fn hot_pages_get_nine_tenths() {
        let hot = draw(&mut Hot::new(1000, 10), &mut Rng::new(3, 0), 100_000);
        let share = hot.iter().filter(|&&page| page < 100).count();
        assert!((89_000..91_000).contains(&share), "{share}");
        assert_eq!(hot.iter().collect::<HashSet<_>>().len(), 1000);
    }

    #[test]
    fn zipf_follows_its_law() {
        // Neither a power of two nor near one, so that the last octave is cut off in its midst.
        let (pages, draws) = (1_400u64, 1_000_000u64);
        let zipf = Zipf::new(pages);
        let mut rng = Rng::new(11, 0);
        let mut counts = vec![0u64; pages as usize + 1];
        for _ in 0..draws {
            counts[zipf.rank(&mut rng) as usize] += 1;
        }
        assert_eq!(counts[0], 0);
        let harmonic: f64 = (1..=pages).map(|rank| 1.0 / rank as f64).sum();
        // Single ranks at the top, then bands of them, against the exact shares.
        let bands =
            [(1u32, 1), (2, 2), (3, 3), (4, 4), (5, 7), (8, 15), (100, 127), (128, 200), (1024, 1400)];
        for (first, last) in bands {
            let share: f64 = (first..=last).map(|rank| 1.0 / f64::from(rank) / harmonic).sum();
            let expected = share * draws as f64;
            let found: u64 = counts[first as usize..=last as usize].iter().sum();
            let deviation = (expected * (1.0 - share)).sqrt();
            assert!(
                (found as f64 - expected).abs() < 6.0 * deviation,
                "ranks {first} to {last}: {found} of {expected:.0}"
            );
        }
    }

    #[test]
    fn scatter_is_a_permutation_without_order() {
        for pages in SIZES {
            let scatter = Scatter::new(pages);
            let places: Vec<_> = (0..pages).map(|x| scatter.of(x)).collect();
            assert_eq!(places.iter().collect::<HashSet<_>>().len() as u64, pages);
            if pages >= 100 {
                let neighbours = places.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 1).count();
                assert!(neighbours as u64 <= pages / 20, "{pages}: {neighbours}");
            }
        }
    }

    #[test]
    fn the_mixture_keeps_its_footprint_small() {
        let pages = 16 << 20; // 64 GiB
        let drawn = draw(&mut Mixture::new(pages), &mut Rng::new(1, 0), 200_000);
        let touched = drawn.iter().collect::<HashSet<_>>().len();
        // The hot set, as many strays and a front of a fifth of the accesses.
        assert!((40_000..70_000).contains(&touched), "{touched}");
    }

    #[test]
    fn seeds_and_streams_differ_and_repeat() {
        let sequence = |seed, stream| draw(&mut Uniform { pages: 1 << 40 }, &mut Rng::new(seed, stream), 8);
        assert_eq!(sequence(1, 0), sequence(1, 0));
        assert_ne!(sequence(1, 0), sequence(1, 1));
        assert_ne!(sequence(1, 0), sequence(2, 0));
        assert_ne!(sequence(0, 1), sequence(1, 0));
        let mut rng = Rng::new(4, 4);
        let quarter = (0..100_000).filter(|_| rng.chance(25)).count();
        assert!((24_000..26_000).contains(&quarter), "{quarter}");
        assert!((0..1000).all(|_| rng.chance(100) && !rng.chance(0)));
    }
}
