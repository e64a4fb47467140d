//! Where the bits of a bitmap change, found with the widest vectors that the processor has.
//!
//! Runs of set bits are what a dirty bitmap is read for, and the bitmap of a large guest is hundreds of
//! megabytes of mostly nothing. Going through it run by run costs a mispredicted branch for nearly every run;
//! here no branch depends on a single bit. A run begins and ends where a bit differs from the one before it,
//! so one word's *changes* are `word ^ (word << 1 | last bit of the word before)`, and the positions of their
//! set bits are, in turn, a start, an end, a start. The work is in two steps, block by block:
//!
//! 1. **Filter:** the changes of a block of words; those that are not zero are packed together with where
//!    they belong.
//! 2. **Flatten:** each packed word's bits become positions, several of them at a time; what is written too
//!    much is overwritten by the next word's.
//!
//! The contract is that of [`Path::changes`]; every path gives the same answer. The portable path and AVX2
//! are one piece of code, compiled twice. AVX-512 (Intel since Ice Lake, AMD since Zen 4) has instructions
//! that pack (`vpcompressq`) and flatten (`vpcompressb`), and those are used by name.

/// Positions that one call of [`Path::changes`] has room for.
///
/// 2 KiB: small enough to lie in an iterator, large enough that the call itself does not count.
pub(crate) const POSITIONS: usize = 512;

/// The buffer for [`Path::changes`].
pub(crate) type Positions = [u32; POSITIONS];

/// What a call of [`Path::changes`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Words that were dealt with.
    pub(crate) words: usize,
    /// Positions that were written.
    pub(crate) positions: usize,
}

/// Words that are filtered at once.
const BLOCK: usize = 64;

/// Bits of a word.
const BITS: usize = u64::BITS as usize;

/// Words that one call looks at, at most: their positions are less than 2^32. Tests want to get there soon.
pub(crate) const MOST_WORDS: usize = if cfg!(test) { 1000 } else { 1 << 25 };

/// A way through the words that this processor can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path(Kind);

/// A value other than `Portable` is made only after the processor was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Path {
    /// The fastest one. Asking costs a load and a test: std remembers what the processor said.
    pub(crate) fn best() -> Path {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Path(Kind::Avx512);
            }
            if has_avx2() {
                return Path(Kind::Avx2);
            }
        }
        Path(Kind::Portable)
    }

    /// Every path that this processor can go.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Path> {
        let mut paths = vec![Path(Kind::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            paths.extend(has_avx2().then_some(Path(Kind::Avx2)));
            paths.extend(has_avx512().then_some(Path(Kind::Avx512)));
        }
        paths
    }

    /// Finds where, from word `from` of `words` on, a bit differs from the one before it (before the first
    /// word, all bits are zero), and writes the positions to `out` in ascending order. Position 0 is bit 0 of
    /// word `from`.
    ///
    /// It ends when all words are dealt with, when `out` may be too full for the next word's, or when
    /// positions become too large. At least one word is dealt with unless there is none.
    #[inline]
    pub(crate) fn changes(self, words: &[u64], from: usize, out: &mut Positions) -> Changes {
        match self.0 {
            Kind::Portable => portable_changes(words, from, out),
            // SAFETY: the value exists, so the processor has AVX2, BMI1, LZCNT and POPCNT.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2_changes(words, from, out) },
            // SAFETY: the value exists, so the processor has what `has_avx512` asks for.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::changes(words, from, out) },
        }
    }

    /// Number of set bits of `words`.
    pub(crate) fn count(self, words: &[u64]) -> usize {
        match self.0 {
            Kind::Portable => count_words(words),
            // SAFETY: the value exists, so the processor has AVX2, BMI1, LZCNT and POPCNT.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2_count(words) },
            // SAFETY: the value exists, so the processor has what `has_avx512` asks for.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::count(words) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("avx512vpopcntdq")
}

/// Words from `from` on that one call looks at.
fn end_of_call(words: &[u64], from: usize) -> usize {
    words.len().min(from + MOST_WORDS)
}

/// The changes of word `index`.
#[inline(always)]
fn changes_of(words: &[u64], index: usize) -> u64 {
    let before = if index == 0 { 0 } else { words[index - 1] >> (BITS - 1) };
    words[index] ^ (words[index] << 1 | before)
}

/// Writes the positions of the bits of `changes`, whose bit 0 is position `base`, to `out` from `at` on.
/// There must be room for 64. Returns where to go on.
#[inline(always)]
fn flatten(mut changes: u64, base: u32, out: &mut Positions, at: usize) -> usize {
    let count = changes.count_ones() as usize;
    let room = &mut out[at..at + BITS];
    let mut done = 0;
    while done < count {
        // Four at a time, wanted or not: the branch is then taken equally often for most words.
        for slot in &mut room[done..done + 4] {
            *slot = base.wrapping_add(changes.trailing_zeros());
            changes &= changes.wrapping_sub(1);
        }
        done += 4;
    }
    at + count
}

/// [`Path::changes`] without instructions of a particular processor.
#[inline(always)]
fn generic_changes(words: &[u64], from: usize, out: &mut Positions) -> Changes {
    let end = end_of_call(words, from);
    let mut at = 0;
    let mut block = from;
    while block < end {
        let mut block_end = end.min(block + BLOCK);
        let mut found = [0u64; BLOCK];
        if block > 0 && block_end - block == BLOCK {
            // Fixed lengths and no conditions: this becomes vector instructions.
            let (now, before) = (&words[block..block + BLOCK], &words[block - 1..block - 1 + BLOCK]);
            let mut any = 0;
            for ((found, now), before) in found.iter_mut().zip(now).zip(before) {
                *found = now ^ (now << 1 | before >> (BITS - 1));
                any |= *found;
            }
            if any == 0 {
                block = block_end;
                continue;
            }
        } else {
            // The first word has none before it. One alone, so that the next blocks are whole ones.
            if block == 0 {
                block_end = 1;
            }
            for index in block..block_end {
                found[index - block] = changes_of(words, index);
            }
        }
        let mut packed = [0u8; BLOCK];
        let mut count = 0;
        for (index, &found) in found.iter().enumerate().take(block_end - block) {
            packed[count] = index as u8;
            count += usize::from(found != 0);
        }
        for &index in &packed[..count] {
            let index = usize::from(index);
            if at + BITS > POSITIONS {
                return Changes { words: block + index - from, positions: at };
            }
            let base = ((block + index - from) * BITS) as u32;
            at = flatten(found[index % BLOCK], base, out, at);
        }
        block = block_end;
    }
    Changes { words: block - from, positions: at }
}

#[inline(always)]
fn count_words(words: &[u64]) -> usize {
    words.iter().map(|word| word.count_ones() as usize).sum()
}

fn portable_changes(words: &[u64], from: usize, out: &mut Positions) -> Changes {
    generic_changes(words, from, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,lzcnt,popcnt")]
fn avx2_changes(words: &[u64], from: usize, out: &mut Positions) -> Changes {
    generic_changes(words, from, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,lzcnt,popcnt")]
fn avx2_count(words: &[u64]) -> usize {
    count_words(words)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{BITS, BLOCK, Changes, POSITIONS, Positions, changes_of, count_words, end_of_call, flatten};

    /// Words of a vector.
    const LANES: usize = 8;

    /// Vectors of a block.
    const VECTORS: usize = BLOCK / LANES;

    /// Words that are asked for ahead of time: a page. The processor's own prefetcher stops at page ends, and
    /// with few pages dirty the wait for memory is most of the time.
    const PREFETCH: usize = 4096 / size_of::<u64>();

    /// 0, 1, 2... : the number of each bit of a word, as bytes.
    static BIT_NUMBERS: [u8; BITS] = {
        let mut numbers = [0; BITS];
        let mut bit = 0;
        while bit < BITS {
            numbers[bit] = bit as u8;
            bit += 1;
        }
        numbers
    };

    /// A block's changes that are not zero, packed. The last vector that is stored may reach beyond what
    /// counts, so there is room for one more.
    struct Packed {
        changes: [u64; BLOCK + LANES],
        bases: [u32; BLOCK + LANES],
        count: usize,
    }

    /// [`super::Path::changes`].
    #[target_feature(enable = "avx2,bmi1,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq")]
    pub(super) fn changes(words: &[u64], from: usize, out: &mut Positions) -> Changes {
        let end = end_of_call(words, from);
        let mut at = 0;
        let mut block = from;
        if block == 0 && block < end {
            // The first word has none before it.
            at = flatten(changes_of(words, 0), 0, out, at);
            block = 1;
        }
        let mut packed = Packed { changes: [0; BLOCK + LANES], bases: [0; BLOCK + LANES], count: 0 };
        while block < end {
            let block_end = end.min(block + BLOCK);
            let base = ((block - from) * BITS) as u32;
            if !filter(&words[block - 1..block_end], base, &mut packed) {
                block = block_end;
                continue;
            }
            for index in 0..packed.count {
                let base = packed.bases[index];
                if at + BITS > POSITIONS {
                    return Changes { words: base as usize / BITS, positions: at };
                }
                at = flatten_vector(packed.changes[index], base, out, at);
            }
            block = block_end;
        }
        Changes { words: block - from, positions: at }
    }

    /// Packs the changes of all `words` but the first, at most a block of them; bit 0 of the second word is
    /// position `base`. Says whether there are any; if not, `packed` is as it was.
    #[inline]
    #[target_feature(enable = "avx2,bmi1,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq")]
    fn filter(words: &[u64], base: u32, packed: &mut Packed) -> bool {
        let count = words.len() - 1;
        assert!(count <= BLOCK);
        let mut found = [_mm512_setzero_si512(); VECTORS];
        let mut any = _mm512_setzero_si512();
        if count == BLOCK {
            for (vector, found) in found.iter_mut().enumerate() {
                // SAFETY: BLOCK + 1 words, of which these are numbers `vector * LANES` to
                // `vector * LANES + LANES`, and `vector` is less than BLOCK / LANES.
                let (before, now) = unsafe {
                    let first = words.as_ptr().add(vector * LANES).cast::<i64>();
                    (_mm512_loadu_epi64(first), _mm512_loadu_epi64(first.add(1)))
                };
                *found = _mm512_xor_si512(now, _mm512_shldi_epi64::<1>(now, before));
                any = _mm512_or_si512(any, *found);
                // A hint: it reads nothing, and faults at no address.
                let later = words.as_ptr().wrapping_add(vector * LANES + PREFETCH);
                _mm_prefetch::<_MM_HINT_T0>(later.cast());
            }
        } else {
            for (vector, found) in found.iter_mut().enumerate() {
                let left = count.saturating_sub(vector * LANES).min(LANES);
                let lanes = ((1u32 << left) - 1) as __mmask8;
                // SAFETY: lanes that lie beyond `count` are masked out and not read; the address of a vector
                // that has no lane at all is made without claiming that it lies in `words`.
                let (before, now) = unsafe {
                    let first = words.as_ptr().wrapping_add(vector * LANES).cast::<i64>();
                    (
                        _mm512_maskz_loadu_epi64(lanes, first),
                        _mm512_maskz_loadu_epi64(lanes, first.wrapping_add(1)),
                    )
                };
                *found = _mm512_xor_si512(now, _mm512_shldi_epi64::<1>(now, before));
                // Where there is no word there is no change, whatever the last word ends with.
                *found = _mm512_maskz_mov_epi64(lanes, *found);
                any = _mm512_or_si512(any, *found);
            }
        }
        if _mm512_test_epi64_mask(any, any) == 0 {
            return false;
        }
        let step = _mm256_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448);
        let mut bases = _mm256_add_epi32(_mm256_set1_epi32(base as i32), step);
        let mut at = 0;
        for found in found {
            let lanes = _mm512_test_epi64_mask(found, found);
            // SAFETY: each vector adds at most LANES to `at`, so `at` is at most BLOCK - LANES before the
            // last one, and both arrays have room for BLOCK + LANES.
            unsafe {
                let changes = packed.changes.as_mut_ptr().add(at).cast::<i64>();
                _mm512_storeu_epi64(changes, _mm512_maskz_compress_epi64(lanes, found));
                let to = packed.bases.as_mut_ptr().add(at).cast::<i32>();
                _mm256_storeu_epi32(to, _mm256_maskz_compress_epi32(lanes, bases));
            }
            at += lanes.count_ones() as usize;
            bases = _mm256_add_epi32(bases, _mm256_set1_epi32((LANES * BITS) as i32));
        }
        packed.count = at;
        true
    }

    /// [`flatten`], 16 positions at a time.
    #[inline]
    #[target_feature(enable = "avx2,bmi1,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq")]
    fn flatten_vector(changes: u64, base: u32, out: &mut Positions, at: usize) -> usize {
        let count = changes.count_ones() as usize;
        let room = &mut out[at..at + BITS];
        // SAFETY: BIT_NUMBERS is 64 bytes long.
        let numbers = unsafe { _mm512_loadu_epi8(BIT_NUMBERS.as_ptr().cast()) };
        let mut numbers = _mm512_maskz_compress_epi8(changes, numbers);
        let base = _mm512_set1_epi32(base as i32);
        let mut done = 0;
        loop {
            let positions = _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(numbers)), base);
            // SAFETY: `room` is 64 long, and `done` is 0, 16, 32 or 48: a word has at most 64 bits set.
            unsafe { _mm512_storeu_epi32(room.as_mut_ptr().add(done).cast(), positions) };
            done += 16;
            if done >= count {
                return at + count;
            }
            // The next 16 bytes come down to where the last 16 were.
            numbers = _mm512_shuffle_i64x2::<0b00_11_10_01>(numbers, numbers);
        }
    }

    /// Number of set bits of `words`.
    #[target_feature(enable = "avx2,bmi1,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq")]
    pub(super) fn count(words: &[u64]) -> usize {
        count_words(words)
    }
}
