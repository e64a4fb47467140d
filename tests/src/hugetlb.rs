//! Pages of hugetlb for a test, taken from a host that has none, and given back.

use std::fs;

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Pages that the pool got for us; it has its old size again when this goes.
#[derive(Debug)]
pub struct Reserved {
    before: u64,
}

impl Reserved {
    /// Makes room for `pages` more pages of 2 MiB, if this user may and the host has that much memory in one piece.
    ///
    /// # Errors
    /// Why not, in words for a line that says what is skipped.
    pub fn pages(pages: u64) -> Result<Reserved, String> {
        let size = || -> Result<u64, String> {
            let text = fs::read_to_string(POOL).map_err(|e| format!("cannot read {POOL}: {e}"))?;
            text.trim().parse().map_err(|e| format!("{POOL} makes no sense: {e}"))
        };
        let before = size()?;
        fs::write(POOL, (before + pages).to_string()).map_err(|e| format!("cannot write to {POOL}: {e}"))?;
        let reserved = Reserved { before };
        match size()? {
            now if now >= before + pages => Ok(reserved),
            now => Err(format!("the host has only {} of {pages} huge pages to give", now - before.min(now))),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, self.before.to_string()) {
            eprintln!("cannot set {POOL} back to {}: {error}", self.before);
        }
    }
}
