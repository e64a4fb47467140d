//! How old a page is that came along with another.
//!
//! A working set should hold the pages that the guest touched. A page that was prefaulted was not touched, and once
//! it is mapped nobody is told when it is. What is known, and what is not:
//!
//! - **Written**: known exactly, while it is still write-protected. An old page is installed write-protected, and its
//!   first write is a fault that makes it young and dirty. (Young pages that come along are write-protected too where
//!   memory is tracked; where it is not, nothing is told about them.)
//! - **Read**: not known to a handler of faults. Reading a mapped page is no fault. userfaultfd cannot install a page
//!   with its accessed bit clear (Linux, mm/userfaultfd.c, `mfill_atomic_install_pte` makes every one young), and
//!   what bits there are the host's own reclaim changes at any time. So a page that is only read stays old in the
//!   record, and what is counted as prefaulted in vain is an upper bound.
//! - **Age in the host**: memory that came along can be given to the host's reclaim as cold (`MADV_COLD`), which
//!   clears the accessed bits of its mappings in this process. It does not reach KVM's second-level tables, and pages
//!   that are mapped in another process as well are passed over.
//!
//! An exact account of reads needs the mapping gone, so that each access is a fault again.

use std::fmt;
use std::str::FromStr;

use crate::fault::text::ParseError;

/// How pages are recorded that came along with another.
///
/// As text, which [`FromStr`] reads and [`Display`](fmt::Display) writes: `old`, `young`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Age {
    /// As not touched, until they are seen to be.
    #[default]
    Old,
    /// Like the page that faulted: its first write costs nothing, where memory is not tracked.
    Young,
}

impl FromStr for Age {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Age, ParseError> {
        match text {
            "old" => Ok(Age::Old),
            "young" => Ok(Age::Young),
            _ => Err(ParseError::Policy {
                what: "prefault age",
                given: text.to_owned(),
                choices: "old or young",
            }),
        }
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Age::Old => "old",
            Age::Young => "young",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_read_and_written() {
        for (text, age) in [("old", Age::Old), ("young", Age::Young)] {
            assert_eq!(text.parse(), Ok(age));
            assert_eq!(age.to_string(), text);
        }
        assert!(matches!("Old".parse::<Age>(), Err(ParseError::Policy { what: "prefault age", .. })));
    }
}
