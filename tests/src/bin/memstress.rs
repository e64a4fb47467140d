//! A small memory stressor for Linux guests: dirties a known amount of memory in a known order, and can
//! check afterwards that every page holds what was written last.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// Words of 8 bytes in a page.
const PAGE_WORDS: usize = 512;

/// Dirties memory in a known way.
#[derive(Debug, Parser)]
struct Options {
    /// Memory to use: bytes, or with a suffix K, M or G
    #[arg(long, default_value = "64M", value_parser = size)]
    size: usize,
    /// In which order, and how much of each page
    #[arg(long, value_enum, default_value_t = Pattern::Seq)]
    pattern: Pattern,
    /// How often to write every page
    #[arg(long, default_value_t = 1)]
    passes: u64,
    /// Determines the order of `rand` and what is written
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Check every page at the end
    #[arg(long)]
    verify: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pattern {
    /// One word of each page, ascending
    Seq,
    /// One word of each page, in a random order
    Rand,
    /// Every word of each page, ascending
    Fill,
}

fn size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| format!("{text} is not a size like 64M"))?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))?;
    if bytes < 8 * PAGE_WORDS { Err("at least one page (4K) is needed".into()) } else { Ok(bytes) }
}

/// The word that pass `pass` leaves in word `word` of page `page`. Never 0.
fn value(options: &Options, pass: u64, page: usize, word: usize) -> u64 {
    let place = (page * PAGE_WORDS + word) as u64;
    guest::abi::mix(options.seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (pass << 56)) | 1
}

/// The one word of `page` that `Seq` and `Rand` write; the same in each pass.
fn chosen_word(options: &Options, page: usize) -> usize {
    (guest::abi::mix(options.seed ^ page as u64) % PAGE_WORDS as u64) as usize
}

/// The page that comes `n`th in pass `pass`: each of `pages` comes once.
///
/// `Rand` walks a power of two with a linear congruential generator of full period and drops what is too
/// high, so this is an iterator and not a formula.
fn order(options: &Options, pass: u64, pages: usize) -> Box<dyn Iterator<Item = usize>> {
    if options.pattern != Pattern::Rand {
        return Box::new(0..pages);
    }
    let span = pages.next_power_of_two();
    // Full period modulo a power of two: multiplier 1 mod 4, increment odd (Hull and Dobell).
    let multiplier = (guest::abi::mix(options.seed) as usize & !3) | 1;
    let increment = guest::abi::mix(options.seed ^ pass) as usize | 1;
    let mut at = pass as usize % span;
    Box::new(
        (0..span)
            .map(move |_| {
                at = at.wrapping_mul(multiplier).wrapping_add(increment) & (span - 1);
                at
            })
            .filter(move |page| *page < pages),
    )
}

fn write_pass(options: &Options, memory: &mut [u64], pass: u64) {
    for page in order(options, pass, memory.len() / PAGE_WORDS) {
        let words = match options.pattern {
            Pattern::Fill => 0..PAGE_WORDS,
            Pattern::Seq | Pattern::Rand => {
                let word = chosen_word(options, page);
                word..word + 1
            }
        };
        for word in words {
            memory[page * PAGE_WORDS + word] = value(options, pass, page, word);
        }
    }
}

/// Pages that do not hold what the last pass wrote, or hold something where nothing was written.
fn corrupt_pages(options: &Options, memory: &[u64]) -> usize {
    let last = options.passes.wrapping_sub(1);
    let page_is_right = |(page, words): (usize, &[u64])| {
        let chosen = chosen_word(options, page);
        words.iter().enumerate().all(|(word, found)| {
            let written = options.passes > 0 && (options.pattern == Pattern::Fill || word == chosen);
            *found == if written { value(options, last, page, word) } else { 0 }
        })
    };
    memory.chunks_exact(PAGE_WORDS).enumerate().filter(|chunk| !page_is_right(*chunk)).count()
}

fn main() -> ExitCode {
    let options = Options::parse();
    let pages = options.size / (8 * PAGE_WORDS);
    let mut memory = vec![0_u64; pages * PAGE_WORDS];
    for pass in 0..options.passes {
        write_pass(&options, &mut memory, pass);
    }
    let written = options.passes * pages as u64;
    println!("memstress: {pages} pages, {} passes, {written} page writes", options.passes);
    if options.verify {
        let corrupt = corrupt_pages(&options, &memory);
        println!("memstress: {corrupt} corrupt pages");
        if corrupt > 0 {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pattern: Pattern, pages: usize) -> (Options, Vec<u64>) {
        let options = Options { size: pages * 4096, pattern, passes: 3, seed: 7, verify: true };
        (options, vec![0; pages * PAGE_WORDS])
    }

    #[test]
    fn every_order_has_each_page_once() {
        for pattern in [Pattern::Seq, Pattern::Rand, Pattern::Fill] {
            for pages in [1, 2, 5, 64, 1000] {
                for pass in 0..4 {
                    let (options, _) = options(pattern, pages);
                    let mut seen: Vec<usize> = order(&options, pass, pages).collect();
                    seen.sort_unstable();
                    assert_eq!(seen, (0..pages).collect::<Vec<_>>(), "{pattern:?}");
                }
            }
        }
    }

    #[test]
    fn verification_finds_a_changed_a_stale_and_a_stray_word() {
        for pattern in [Pattern::Seq, Pattern::Rand, Pattern::Fill] {
            let (options, mut memory) = options(pattern, 33);
            for pass in 0..options.passes {
                write_pass(&options, &mut memory, pass);
            }
            assert_eq!(corrupt_pages(&options, &memory), 0);
            let place = 5 * PAGE_WORDS + chosen_word(&options, 5);
            let right = memory[place];
            for wrong in [right ^ 1 << 40, value(&options, 1, 5, chosen_word(&options, 5)), 0] {
                memory[place] = wrong;
                assert_eq!(corrupt_pages(&options, &memory), 1, "{pattern:?}");
            }
            memory[place] = right;
            memory[place ^ 1] ^= 2;
            assert_eq!(corrupt_pages(&options, &memory), 1, "{pattern:?}");
        }
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("4096"), Ok(4096));
        for bad in ["", "M", "4095", "1.5G", "99999999999999999999", "99999999999G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
