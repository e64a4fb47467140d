//! `--track`: which tracker the user wants, with its settings.

use std::fmt;
use std::str::FromStr;

use dirty_track::addr::PageSize;
use dirty_track::rate::Sampler;
use dirty_track::rearm::Rearm;
use dirty_track::tracker::{Backing, HostFacts, Kind};

use crate::host::{Host, KvmModule};
use crate::memory::{Faults, MemoryConfig};
use crate::options::{self, OptionError};

/// Entries of a vCPU's dirty ring unless told otherwise: 16 MiB of first writes between two harvests.
pub const RING_ENTRIES: u32 = 4096;

/// What `--track` calls a rate without a tracker, from a sample.
pub const SAMPLED: &str = "sampled";

/// What `--track` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackConfig {
    /// The tracker; `None`: the one that suits the host.
    pub kind: Option<Kind>,
    /// Without a tracker: sample this many pages of each GiB.
    pub sampled: Option<u64>,
    /// Entries of each vCPU's dirty ring, for `kvm-ring`.
    pub ring_entries: u32,
    /// What is protected again when an epoch ends, for `kvm-manual`.
    pub rearm: Rearm,
    /// What `uffd-sync` opens to the guest on a write: a leaf, or the whole block.
    pub unit: PageSize,
}

impl Default for TrackConfig {
    fn default() -> TrackConfig {
        TrackConfig {
            kind: None,
            sampled: None,
            ring_entries: RING_ENTRIES,
            rearm: Rearm::All,
            unit: PageSize::K4,
        }
    }
}

impl From<Kind> for TrackConfig {
    fn from(kind: Kind) -> TrackConfig {
        TrackConfig { kind: Some(kind), ..TrackConfig::default() }
    }
}

impl TrackConfig {
    /// The tracker to use on a host with `facts` for memory whose faults are handled like that; with a reason, if
    /// nobody asked for that one.
    pub fn choose(&self, facts: &HostFacts, fault: Faults) -> (Kind, Option<&'static str>) {
        match self.kind {
            Some(Kind::Exact | Kind::UffdSync) if fault == Faults::Uffd => {
                let why = "memory has one userfaultfd, and who serves its faults sees each first write, and no read";
                (Kind::UffdServe, Some(why))
            }
            Some(kind) => (kind, None),
            None => {
                let (kind, why) = Kind::choose(facts);
                (kind, Some(why))
            }
        }
    }

    /// That there is something to leave armed, if not all is armed again.
    ///
    /// # Errors
    /// Why not.
    pub fn check_rearm(&self) -> Result<(), String> {
        match self.kind {
            None | Some(Kind::KvmManual) => Ok(()),
            _ if self.rearm == Rearm::All => Ok(()),
            _ => Err(format!("--rearm is for --track kvm-manual: {self} has no log bits to leave set")),
        }
    }

    /// Why this tracker cannot be had for memory whose faults are handled like that.
    pub fn refused(&self, fault: Faults) -> Option<&'static str> {
        match (self.kind, fault) {
            (Some(Kind::UffdServe), Faults::Kernel) => Some(
                "uffd-serve is the tracker of memory whose faults are served here: use --memory fault=uffd",
            ),
            (Some(Kind::UffdAsync), Faults::Uffd) => {
                Some("memory with fault=uffd has its userfaultfd already: use --track exact")
            }
            _ => None,
        }
    }
}

impl FromStr for TrackConfig {
    type Err = OptionError;

    /// `auto`, or a tracker's name with its settings, as in `kvm-ring,entries=8192` or `uffd-sync,unit=2m`.
    fn from_str(text: &str) -> Result<TrackConfig, OptionError> {
        let (name, settings) = text.split_once(',').unwrap_or((text, ""));
        let kind = match name {
            "auto" => None,
            SAMPLED => Some(Kind::None),
            name => Some(name.parse::<Kind>().map_err(|error| OptionError::Value {
                key: "--track".into(),
                value: name.into(),
                expected: format!("{error}, {SAMPLED} and auto"),
            })?),
        };
        let mut config = TrackConfig { kind, ..TrackConfig::default() };
        config.sampled = (name == SAMPLED).then_some(Sampler::PER_GIB);
        let keys: &[&str] = match kind {
            Some(Kind::None) if config.sampled.is_some() => &["per-gib"],
            Some(Kind::KvmRing) => &["entries"],
            Some(Kind::UffdSync) => &["unit"],
            _ => &[],
        };
        for (key, value) in options::key_values(settings, keys)? {
            let wrong = |expected: &str| OptionError::Value {
                key: key.into(),
                value: value.into(),
                expected: expected.into(),
            };
            match key {
                "per-gib" => {
                    let pages = value.parse().ok().filter(|pages| (1..=1 << 18).contains(pages));
                    config.sampled = Some(pages.ok_or_else(|| wrong("a number of pages, as in 512"))?);
                }
                "entries" => {
                    let entries = value.parse().ok().filter(|entries: &u32| entries.is_power_of_two());
                    config.ring_entries = entries.ok_or_else(|| wrong("a power of two, as in 4096"))?;
                }
                _ => {
                    config.unit = match value {
                        "4k" => PageSize::K4,
                        "2m" => PageSize::M2,
                        _ => return Err(wrong("4k or 2m")),
                    };
                }
            }
        }
        Ok(config)
    }
}

impl fmt::Display for TrackConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sampled {
            Some(_) => f.write_str(SAMPLED),
            None => f.write_str(self.kind.map_or("auto", Kind::name)),
        }
    }
}

/// What a tracker's choice depends on, as a probe of the host found it.
pub fn facts(host: &Host) -> HostFacts {
    let capability = |name| host.kvm.facts.as_ref().map_or(0, |facts| facts.capability(name));
    HostFacts {
        manual_protect: capability("MANUAL_DIRTY_LOG_PROTECT2").into(),
        ring_bytes: capability("DIRTY_LOG_RING").max(capability("DIRTY_LOG_RING_ACQ_REL")).into(),
        uffd_wp: host.interfaces.has_userfault("PAGEFAULT_FLAG_WP"),
        uffd_wp_unpopulated: host.interfaces.has_userfault("WP_UNPOPULATED"),
        uffd_wp_async: host.interfaces.has_userfault("WP_ASYNC"),
        pagemap_scan: host.interfaces.pagemap_scan,
        emulates_kernel: host.kvm.module == KvmModule::Pvm,
    }
}

/// What is behind the RAM that `memory` describes.
pub fn backing(memory: MemoryConfig) -> Backing {
    match memory.huge.hugetlb_shift() {
        Some(30) => Backing::Hugetlb(PageSize::G1),
        Some(_) => Backing::Hugetlb(PageSize::M2),
        None if memory.shared => Backing::Shared,
        None => Backing::Private,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_settings_are_read() {
        let parse = |text: &str| text.parse::<TrackConfig>();
        assert_eq!(parse("auto"), Ok(TrackConfig::default()));
        assert_eq!(parse("kvm-manual"), Ok(Kind::KvmManual.into()));
        assert_eq!(
            parse("kvm-ring,entries=1024"),
            Ok(TrackConfig { ring_entries: 1024, ..Kind::KvmRing.into() })
        );
        assert_eq!(
            parse("uffd-sync,unit=2m"),
            Ok(TrackConfig { unit: PageSize::M2, ..Kind::UffdSync.into() })
        );
        assert_eq!(parse("sampled,per-gib=64"), Ok(TrackConfig { sampled: Some(64), ..Kind::None.into() }));
        for bad in [
            "none,per-gib=1",
            "sampled,per-gib=0",
            "",
            "kvm",
            "kvm-ring,entries=1000",
            "kvm-manual,entries=1024",
            "uffd-sync,unit=1g",
            "auto,x=1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
