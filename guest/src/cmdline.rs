//! The guest's command line: words of the form `key=value`, told apart by blanks.
//!
//! What is not understood falls into two classes. A word with an unknown key belongs to somebody else (a
//! monitor adds `console=` and the like) and is left aside; a known key with a bad value ends the run.

use crate::abi::MAX_CPUS;

/// What the vCPUs do, each in its own shard of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Writes from the first page on; every pass begins there again. One pass unless told otherwise.
    Fill,
    /// Writes in order; every pass goes on where the last one ended.
    Seq,
    /// Writes at random, every page as likely as any other.
    Rand,
    /// Writes by Zipf's law (exponent 1), the ranks scattered over the shard.
    Zipf,
    /// Writes every `stride`-th page, then the same one page further on, until all have had their turn.
    Stride,
    /// Nine writes of ten at random in the first `hot` percent of the shard, the tenth in the rest.
    Hot,
    /// Reads in order and checks what it reads.
    Read,
    /// A small hot set that moves now and then, a front that advances, a few strays, and reads between them.
    Mixed,
    /// Reads every page and checks it against the ledger. One pass unless told otherwise.
    Verify,
}

/// How the region is mapped by the guest's own page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// 4 KiB pages, accessed and dirty bits clear at first. Every vCPU fills in the tables of its shard
    /// before it starts, which costs 8 bytes a page.
    Small,
    /// 2 MiB pages, accessed and dirty bits set from the outset, as a kernel maps its own memory.
    Huge,
    /// 4 KiB pages, by the guest's own page-fault handler.
    Lazy,
}

/// A way to come to grief on purpose, to see what the monitor makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// A write to an address that is not mapped: the guest's own handler reports the exception.
    Fault,
    /// A triple fault.
    Triple,
    /// `int3` in ring 0, which KVM cannot emulate where it must emulate ring 0; elsewhere an exception.
    Emulation,
    /// Ring 0, interrupts off, `hlt`: nothing will ever happen again.
    Halt,
}

/// Everything that the command line decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `workload=`
    pub workload: Workload,
    /// `region=` in bytes; 0: as much as there is.
    pub region: u64,
    /// `pages=` accesses in one pass, all vCPUs together; 0: as many as the region has pages.
    pub pages: u64,
    /// `passes=`; `None`: the workload's own default; 0: until stopped.
    pub passes: Option<u32>,
    /// `rate=` in bytes of pages written (or, by a workload that only reads, read) per second, all vCPUs
    /// together; 0: flat out; `None`: the workload's own default.
    pub rate: Option<u64>,
    /// `seed=` of everything random.
    pub seed: u64,
    /// `reads=` in percent of all accesses; `None`: the workload's own default.
    pub reads: Option<u8>,
    /// `stride=` in pages, from 1.
    pub stride: u64,
    /// `hot=` in percent of the shard, 1 to 99.
    pub hot: u8,
    /// `cpus=` vCPUs to use, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// `tsc_khz=`; 0: not known.
    pub tsc_khz: u64,
    /// `map=`
    pub map: Mapping,
    /// `around=` pages that one page fault maps, the faulting one among them: a power of two, 1 to 512.
    pub around: u64,
    /// `ring=`: whether the workload runs in ring 0.
    pub ring0: bool,
    /// `interrupts=`: enable interrupts, though none is asked for.
    pub interrupts: bool,
    /// `populate=`: touch every page of the region before the workload begins, changing nothing.
    pub populate: bool,
    /// `nonzero=`: what `populate=` does, and it leaves no page all zeros: the last word of each becomes its number.
    pub nonzero: bool,
    /// `barrier=`: ring the doorbell at the end of every pass.
    pub barrier: bool,
    /// `beat=`: print one byte after so many accesses of vCPU 0, so that who listens knows how far it is; 0: never.
    pub beat: u64,
    /// `verify=`: check the whole region when all passes are done.
    pub verify: bool,
    /// `latency=`: time every access and report percentiles.
    pub latency: bool,
    /// `quiet=`: print nothing but the results.
    pub quiet: bool,
    /// `crash=`: instead of the workload.
    pub crash: Option<Crash>,
}

/// A known key with a value that it cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadValue<'a> {
    /// The whole word.
    pub word: &'a [u8],
    /// What would have been right.
    pub expected: &'static str,
}

impl Config {
    /// What an empty command line means.
    pub const DEFAULT: Config = Config {
        workload: Workload::Mixed,
        region: 0,
        pages: 0,
        passes: None,
        rate: None,
        seed: 1,
        reads: None,
        stride: 16,
        hot: 10,
        cpus: 1,
        tsc_khz: 0,
        map: Mapping::Huge,
        around: 1,
        ring0: false,
        interrupts: false,
        populate: false,
        nonzero: false,
        barrier: false,
        beat: 0,
        verify: false,
        latency: false,
        quiet: false,
        crash: None,
    };

    /// Reads `line`. Words that it does not know go to `unknown`; of a key given twice the last one counts.
    pub fn parse<'a>(line: &'a [u8], mut unknown: impl FnMut(&'a [u8])) -> Result<Config, BadValue<'a>> {
        let mut config = Config::DEFAULT;
        for word in line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()) {
            let mut parts = word.splitn(2, |&b| b == b'=');
            let (key, value) = (parts.next().unwrap_or_default(), parts.next());
            match config.set(key, value.unwrap_or_default()) {
                Ok(true) => (),
                Ok(false) => unknown(word),
                Err(expected) => return Err(BadValue { word, expected }),
            }
        }
        Ok(config)
    }

    /// Takes one value; `Ok(false)` when nobody knows the key, `Err` with what would have been right.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<bool, &'static str> {
        match key {
            b"workload" => self.workload = workload(value)?,
            b"region" => self.region = size(value).filter(|&bytes| bytes > 0).ok_or("a size like 512M")?,
            b"pages" => self.pages = number(value, 1, u64::MAX)?,
            b"passes" => self.passes = Some(number(value, 0, u64::from(u32::MAX))? as u32),
            b"rate" => {
                let bytes = value.strip_suffix(b"/s").unwrap_or(value);
                self.rate = Some(size(bytes).ok_or("bytes per second, like 100M/s")?);
            }
            b"seed" => self.seed = number(value, 0, u64::MAX)?,
            b"reads" => self.reads = Some(percent(value, 0, 100)?),
            b"stride" => self.stride = number(value, 1, 1 << 40)?,
            b"hot" => self.hot = percent(value, 1, 99)?,
            b"cpus" => {
                let cpus = number(value, 1, u64::MAX).map_err(|_| "a number from 1 to 64")?;
                self.cpus = cpus.min(MAX_CPUS as u64) as u32;
            }
            b"tsc_khz" => self.tsc_khz = number(value, 0, 1 << 30)?,
            b"map" => {
                self.map = match value {
                    b"4k" => Mapping::Small,
                    b"2m" => Mapping::Huge,
                    b"lazy" => Mapping::Lazy,
                    _ => return Err("4k, 2m or lazy"),
                }
            }
            b"around" => {
                let expected = "a power of two from 1 to 512";
                let pages = number(value, 1, 512).map_err(|_| expected)?;
                self.around = Some(pages).filter(|pages| pages.is_power_of_two()).ok_or(expected)?;
            }
            b"ring" => {
                self.ring0 = match value {
                    b"0" => true,
                    b"3" => false,
                    _ => return Err("0 or 3"),
                }
            }
            b"interrupts" => self.interrupts = switch(value)?,
            b"populate" => self.populate = switch(value)?,
            b"nonzero" => self.nonzero = switch(value)?,
            b"barrier" => self.barrier = switch(value)?,
            b"beat" => self.beat = number(value, 0, u64::MAX)?,
            b"verify" => self.verify = switch(value)?,
            b"latency" => self.latency = switch(value)?,
            b"crash" => {
                self.crash = Some(match value {
                    b"fault" => Crash::Fault,
                    b"triple" => Crash::Triple,
                    b"emulation" => Crash::Emulation,
                    b"halt" => Crash::Halt,
                    _ => return Err("fault, triple, emulation or halt"),
                });
            }
            // Linux has a bare `quiet` of its own, which a monitor's default command line may hold.
            b"quiet" => self.quiet = value.is_empty() || switch(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Passes to make, 0 for no end.
    pub fn passes(&self) -> u32 {
        let once = matches!(self.workload, Workload::Fill | Workload::Verify);
        self.passes.unwrap_or(u32::from(once))
    }

    /// Share of accesses that read, in percent.
    pub fn reads(&self) -> u8 {
        match self.workload {
            Workload::Read | Workload::Verify => 100,
            Workload::Mixed => self.reads.unwrap_or(25),
            _ => self.reads.unwrap_or(0),
        }
    }
}

impl Workload {
    /// The word for it on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Fill => "fill",
            Workload::Seq => "seq",
            Workload::Rand => "rand",
            Workload::Zipf => "zipf",
            Workload::Stride => "stride",
            Workload::Hot => "hot",
            Workload::Read => "read",
            Workload::Mixed => "mixed",
            Workload::Verify => "verify",
        }
    }
}

fn workload(value: &[u8]) -> Result<Workload, &'static str> {
    use Workload::{Fill, Hot, Mixed, Rand, Read, Seq, Stride, Verify, Zipf};
    [Fill, Seq, Rand, Zipf, Stride, Hot, Read, Mixed, Verify]
        .into_iter()
        .find(|workload| workload.name().as_bytes() == value)
        .ok_or("fill, seq, rand, zipf, stride, hot, read, mixed or verify")
}

fn switch(value: &[u8]) -> Result<bool, &'static str> {
    match value {
        b"on" => Ok(true),
        b"off" => Ok(false),
        _ => Err("on or off"),
    }
}

fn percent(value: &[u8], least: u64, most: u64) -> Result<u8, &'static str> {
    Ok(number(value, least, most).map_err(|_| "a percentage")? as u8)
}

/// A decimal number in `least..=most`.
fn number(value: &[u8], least: u64, most: u64) -> Result<u64, &'static str> {
    digits(value).filter(|n| (least..=most).contains(n)).ok_or("a number in range")
}

fn digits(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0u64, |sum, &b| {
        b.is_ascii_digit().then_some(())?;
        sum.checked_mul(10)?.checked_add(u64::from(b - b'0'))
    })
}

/// A number with a suffix K, M, G or T (either case, powers of 1024), or without one, in bytes.
fn size(value: &[u8]) -> Option<u64> {
    let (last, rest) = value.split_last()?;
    let shift = match last.to_ascii_uppercase() {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => return digits(value),
    };
    digits(rest)?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Config, BadValue<'_>> {
        Config::parse(line.as_bytes(), |word| panic!("unknown word {:?}", String::from_utf8_lossy(word)))
    }

    #[test]
    fn nothing_means_the_defaults() {
        assert_eq!(parse(""), Ok(Config::DEFAULT));
        assert_eq!(parse(" \t\n "), Ok(Config::DEFAULT));
        assert_eq!((Config::DEFAULT.passes(), Config::DEFAULT.reads()), (0, 25));
    }

    #[test]
    fn every_key_is_taken() {
        let config = parse(
            "workload=zipf region=1G pages=7 passes=3 rate=5M/s seed=9 reads=30 stride=2 hot=5 cpus=4 \
             tsc_khz=2100000 map=lazy around=16 ring=0 interrupts=on populate=on nonzero=on barrier=on beat=5 verify=on \
             latency=on quiet=on crash=halt",
        );
        let expected = Config {
            workload: Workload::Zipf,
            region: 1 << 30,
            pages: 7,
            passes: Some(3),
            rate: Some(5 << 20),
            seed: 9,
            reads: Some(30),
            stride: 2,
            hot: 5,
            cpus: 4,
            tsc_khz: 2_100_000,
            map: Mapping::Lazy,
            around: 16,
            ring0: true,
            interrupts: true,
            populate: true,
            nonzero: true,
            barrier: true,
            beat: 5,
            verify: true,
            latency: true,
            quiet: true,
            crash: Some(Crash::Halt),
        };
        assert_eq!(config, Ok(expected));
    }

    #[test]
    fn workloads_have_their_own_defaults() {
        let config = |line| parse(line).expect("a good line");
        assert_eq!(config("workload=fill").passes(), 1);
        assert_eq!(config("workload=verify").passes(), 1);
        assert_eq!(config("workload=fill passes=0").passes(), 0);
        assert_eq!(config("workload=seq").passes(), 0);
        assert_eq!(config("workload=read reads=3").reads(), 100);
        assert_eq!(config("workload=rand").reads(), 0);
    }

    #[test]
    fn sizes_take_suffixes() {
        for (text, bytes) in
            [("1", 1), ("4096", 4096), ("3k", 3072), ("2M", 2 << 20), ("1g", 1 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(size(text.as_bytes()), Some(bytes), "{text}");
        }
        for text in ["", "K", "1KB", "-1", "+1", "0x10", "1.5G", "1 ", "18446744073709551616", "16777216T"] {
            assert_eq!(size(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_last_of_a_key_counts_and_cpus_are_capped() {
        let config = parse("seed=1 seed=2 cpus=4000000000").expect("a good line");
        assert_eq!((config.seed, config.cpus), (2, MAX_CPUS as u32));
    }

    #[test]
    fn strangers_are_left_aside() {
        let mut strangers = Vec::new();
        let config = Config::parse(b"console=ttyS0 root=/dev/vda seed=3 ro = =x Seed=4", |word| {
            strangers.push(word.to_vec());
        });
        assert_eq!(config.map(|config| config.seed), Ok(3));
        assert_eq!(strangers, [&b"console=ttyS0"[..], b"root=/dev/vda", b"ro", b"=", b"=x", b"Seed=4"]);
    }

    #[test]
    fn bad_values_are_refused_with_what_would_do() {
        for word in [
            "workload=",
            "workload=nope",
            "workload",
            "region=",
            "region=0",
            "region=99999999999T",
            "pages=0",
            "pages=-1",
            "pages=18446744073709551616",
            "passes=4294967296",
            "rate=fast",
            "rate=1M/min",
            "seed=",
            "seed=1e9",
            "reads=101",
            "stride=0",
            "hot=0",
            "hot=100",
            "cpus=0",
            "cpus=",
            "tsc_khz=-5",
            "map=1g",
            "around=0",
            "around=3",
            "around=1024",
            "ring=1",
            "interrupts=yes",
            "barrier=yes",
            "verify=",
            "latency=1",
            "quiet=maybe",
            "crash=now",
            "seed=1=2",
        ] {
            let error = parse(word).expect_err(word);
            assert_eq!(error.word, word.as_bytes());
            assert!(!error.expected.is_empty());
        }
    }

    proptest! {
        #[test]
        fn no_line_breaks_the_parser(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Config::parse(&line, |_| ());
        }

        #[test]
        fn what_is_accepted_is_in_range(key in "cpus|hot|around|stride|reads|pages", value in "[0-9]{1,21}") {
            let line = format!("{key}={value}");
            if let Ok(config) = parse(&line) {
                prop_assert!((1..=64).contains(&config.cpus));
                prop_assert!((1..=99).contains(&config.hot));
                prop_assert!((1..=512).contains(&config.around) && config.around.is_power_of_two());
                prop_assert!(config.stride >= 1);
                prop_assert!(config.reads() <= 100);
            }
        }
    }
}
