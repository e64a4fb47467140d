//! Trackers: the ways of knowing which pages were written, behind one trait.
//!
//! # Contract
//! - After [`arm`](Tracker::arm) has returned, every write to a slot is in the next [`harvest`](Tracker::harvest)
//!   or in a later one. What was written before is not owed. Writes made while `arm` runs may go either way.
//! - A harvest closes the epoch: a page is write-protected (or its log bit cleared) *before* it is handed out,
//!   so whoever copies it afterwards has either the newest contents or a promise that the page is in the next
//!   harvest. The API has no other order: pages come out of a harvest, and a harvest is made by protecting.
//! - A harvest is a transaction; see [`Harvest`].
//! - A tracker may be armed, harvested and disarmed at any time, while vCPUs run, and its slots may be
//!   [changed](Tracker::set_slots).
//! - What a tracker does not see, or sees only coarsely, it says in its [`Guarantees`].
//!
//! # Adding a tracker
//! The policy (what is owed, what is cleared when) is kept apart from the mechanism (the ioctls), so that it
//! can be held against a model without KVM; the private module `dirty_log` shows the pattern.

pub(crate) mod change;
mod chosen;
mod dirty_log;
pub mod exact;
pub(crate) mod harvest;
mod kind;
pub mod kvm_bitmap;
pub mod kvm_manual;
pub mod kvm_ring;
pub mod none;
#[cfg(test)]
mod sim;
mod slot;
pub mod uffd_async;
pub mod uffd_sync;
pub(crate) mod wp_slot;

pub use exact::Exact;
pub use harvest::{Harvest, SlotSet};
pub use kind::{Backing, HostFacts, Kind, UnknownKind};
pub use kvm_bitmap::KvmBitmap;
pub use kvm_manual::KvmManual;
pub use kvm_ring::{DirtyRings, KvmRing, RingHandle};
pub use none::Untracked;
pub use slot::Slot;
pub use uffd_async::UffdAsync;
pub use uffd_sync::UffdSync;
use vmm_sys_util::errno;

use crate::addr::{PageRange, PageSize};
use crate::fault::FaultError;
use crate::sys::uffd::UffdError;

/// A way of knowing which pages of a virtual machine were written.
///
/// The [module](self) has the contract. The trait is object safe, and a tracker may wrap another one.
pub trait Tracker: Send {
    /// The name by which a user chooses the tracker, such as `kvm-manual`.
    fn name(&self) -> &'static str;

    /// What its harvests can be relied on for.
    fn guarantees(&self) -> Guarantees;

    /// Begins to track. The first epoch starts before this returns.
    ///
    /// # Errors
    /// [`TrackerError::AlreadyArmed`], or what the host refused; nothing is tracked then.
    fn arm(&mut self) -> Result<(), TrackerError>;

    /// Closes the epoch and yields the pages that were written in it.
    ///
    /// Leave the guest some time between harvests. Each takes KVM's locks and flushes TLBs; one right after
    /// the other, they keep vCPUs from making any progress on some hosts (seen with NPT and no TDP MMU).
    ///
    /// # Errors
    /// [`TrackerError::NotArmed`], or what the host refused. No page is lost: those that had already been
    /// collected are in the next harvest that succeeds.
    fn harvest(&mut self) -> Result<Harvest<'_>, TrackerError>;

    /// Changes which memslots, and which [pages](Slot::choose) of them, are tracked; armed or not, while vCPUs run.
    ///
    /// Armed, it begins to track what is new before it returns: a write to it from then on is in a later harvest,
    /// what was written before is not owed (but may be reported once), so whoever keeps a copy makes one of it
    /// afterwards, as after [`arm`](Tracker::arm). What is not in `slots` any more is forgotten, and what was owed of
    /// it. The slots that stay go on as if nothing had happened. A slot stays when it is the same memslot of the same
    /// region, whichever of its pages are tracked.
    ///
    /// **With KVM it goes in this order:** a slot is registered first and then given to the tracker; a slot is taken
    /// from the tracker first and then deleted. So a slot that takes the number, the guest addresses or the memory of
    /// another one comes in a second call. (A tracker that ends to log a slot that was deleted already would
    /// register it again.)
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`] and [`TrackerError::BadRange`]: nothing has changed. What the host refused: when it
    /// is something about beginning to track, nothing has changed either; when it is about ending it
    /// ([`SetLogging`](TrackerError::SetLogging) or [`Register`](TrackerError::Register) with `on: false`), the change
    /// is made, but what could not be let go is tracked on. The tracker stays armed and loses nothing in either case.
    fn set_slots(&mut self, slots: Vec<Slot>) -> Result<(), TrackerError>;

    /// Stops tracking, and forgets every page not yet committed.
    ///
    /// # Errors
    /// [`TrackerError::NotArmed`], or what the host refused; the tracker is still armed then, and disarming
    /// can be tried again.
    fn disarm(&mut self) -> Result<(), TrackerError>;
}

/// What a tracker's harvests can be relied on for.
///
/// Every tracker reports at least the pages that it sees written. These say what it does not see, and what it
/// may report besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "log", derive(serde::Serialize, serde::Deserialize))]
pub struct Guarantees {
    /// Writes by the guest are seen. `false` only for a tracker that tracks nothing. One host breaks it for
    /// one tracker: kvm_pvm overruns the rings of [`kvm_ring`] when the guest writes at CPL0.
    pub sees_guest_writes: bool,
    /// Writes by the host through vm-memory (device models) are seen.
    pub sees_host_writes: bool,
    /// A page that the guest only read may be reported.
    pub may_report_reads: bool,
    /// The unit of a report: a write to one byte reports this much.
    pub granularity: PageSize,
    /// Arming and harvesting leave huge mappings huge until they are written.
    pub keeps_huge: bool,
    /// A harvest tells which vCPU wrote a page.
    pub per_vcpu: bool,
}

/// Why a tracker could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackerError {
    /// `arm` on an armed tracker.
    #[error("the tracker is armed already: disarm it first")]
    AlreadyArmed,
    /// `harvest` or `disarm` on a tracker that is not armed.
    #[error("the tracker is not armed: arm it first")]
    NotArmed,
    /// A slot that cannot be tracked.
    #[error("memslot {id} cannot be tracked: {why}")]
    BadSlot {
        /// The memslot's number.
        id: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A range of pages that cannot be tracked.
    #[error("the pages {range} (first frame and number) cannot be tracked: {why}")]
    BadRange {
        /// The range.
        range: PageRange,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host's KVM lacks something that this tracker is made of.
    #[error("this host's KVM has no {capability}, which {tracker} needs: choose another tracker")]
    Unsupported {
        /// Name of the capability, as in the kernel's header.
        capability: &'static str,
        /// Name of the tracker.
        tracker: &'static str,
    },
    /// KVM has the capability but would not enable it.
    #[error("cannot enable {capability}: {source}")]
    Enable {
        /// Name of the capability, as in the kernel's header.
        capability: &'static str,
        /// KVM's answer.
        source: errno::Error,
    },
    /// A memslot's dirty logging could not be switched.
    #[error("cannot switch dirty logging of memslot {slot} {}: {source}", if *.on { "on" } else { "off" })]
    SetLogging {
        /// The memslot's number.
        slot: u32,
        /// To what it was to be switched.
        on: bool,
        /// KVM's answer; `EINVAL` means that the slot is registered with other addresses or another size.
        source: errno::Error,
    },
    /// KVM_GET_DIRTY_LOG failed.
    #[error("cannot read the dirty log of memslot {slot}: {source}")]
    GetLog {
        /// The memslot's number.
        slot: u32,
        /// KVM's answer; `ENOENT` means that somebody else turned the slot's logging off, `ENXIO` that the VM has
        /// dirty rings instead of bitmaps.
        source: errno::Error,
    },
    /// KVM_CLEAR_DIRTY_LOG failed.
    #[error("cannot clear {pages} pages from page {first} of the dirty log of memslot {slot}: {source}")]
    ClearLog {
        /// The memslot's number.
        slot: u32,
        /// First page, counted from the slot's start.
        first: usize,
        /// Number of pages.
        pages: usize,
        /// KVM's answer.
        source: errno::Error,
    },
    /// A dirty ring of a size that no ring can have.
    #[error(
        "a dirty ring of {asked} entries: it takes a power of two from {min} to {max} (a host may want more)"
    )]
    RingSize {
        /// Entries that were asked for.
        asked: u32,
        /// Fewest that any host accepts.
        min: u32,
        /// Most that this host accepts.
        max: u32,
    },
    /// A VM without dirty rings.
    #[error("the virtual machine has no dirty rings: they must be enabled before its first vCPU is made")]
    NoRings,
    /// A vCPU's dirty ring could not be mapped.
    #[error("cannot map the dirty ring of vCPU {vcpu}: {source}")]
    MapRing {
        /// The vCPU, counted in the order in which they were added.
        vcpu: usize,
        /// What the system said; `EFAULT` means that it is a vCPU of another VM.
        source: errno::Error,
    },
    /// KVM_RESET_DIRTY_RINGS failed, or did not do all that was asked of it.
    #[error("cannot reset the dirty rings, {left} entries are left: {source}")]
    ResetRings {
        /// Entries that were read and whose pages are not protected again.
        left: u64,
        /// KVM's answer; `EINTR` means that it stopped early every time, which somebody else who resets the
        /// rings of this VM can bring about as well.
        source: errno::Error,
    },
    /// A tracker's thread could not be started.
    #[error("cannot start the thread that empties the dirty rings: {source}")]
    Thread {
        /// What the system said.
        source: std::io::Error,
    },
    /// No userfaultfd that this tracker could use.
    #[error(transparent)]
    Userfaultfd(#[from] UffdError),
    /// The process's page tables cannot be looked at.
    #[error("cannot open /proc/self/pagemap: {0}: is /proc mounted?")]
    Pagemap(std::io::Error),
    /// A memslot's memory could not be registered with userfaultfd, or not be released from it.
    #[error(
        "cannot {} the memory of memslot {slot} {} userfaultfd: {source}{}",
        if *.on { "register" } else { "release" },
        if *.on { "with" } else { "from" },
        register_hint(source.errno(), *.on)
    )]
    Register {
        /// The memslot's number.
        slot: u32,
        /// Whether it was to be registered.
        on: bool,
        /// The kernel's answer.
        source: errno::Error,
    },
    /// UFFDIO_WRITEPROTECT failed.
    #[error("cannot write-protect {pages} pages from page {first} of memslot {slot}: {source}")]
    WriteProtect {
        /// The memslot's number.
        slot: u32,
        /// First page, counted from the slot's start.
        first: usize,
        /// Number of pages.
        pages: usize,
        /// The kernel's answer; `ENOENT` means that something else is mapped there by now.
        source: errno::Error,
    },
    /// PAGEMAP_SCAN failed.
    #[error("cannot look for written pages from page {first} of memslot {slot} on: {source}")]
    Scan {
        /// The memslot's number.
        slot: u32,
        /// First page, counted from the slot's start.
        first: usize,
        /// The kernel's answer; `EPROTO` means that it made no progress.
        source: errno::Error,
    },
    /// The thread that resolves write faults could not be started.
    #[error("cannot start the thread that resolves write faults: {0}")]
    Handler(std::io::Error),
    /// [`FaultTracker`](crate::fault::FaultTracker) over memory that no server serves.
    #[error(
        "nobody serves the faults of this memory, which is what uffd-serve tracks by: choose another tracker"
    )]
    NotServed,
    /// Faults cannot be served such that writes are seen.
    #[error(transparent)]
    Serve(#[from] Box<FaultError>),
    /// That thread could not open a page for somebody who waits to write to it, and tries again.
    #[error("cannot lift the write-protection of a page: {0}")]
    Resolve(errno::Error),
}

impl From<FaultError> for TrackerError {
    fn from(error: FaultError) -> TrackerError {
        match error {
            FaultError::Slots(error) => error,
            FaultError::Userfaultfd(error) => TrackerError::Userfaultfd(error),
            error => TrackerError::Serve(Box::new(error)),
        }
    }
}

/// What to make of an error of UFFDIO_REGISTER.
fn register_hint(errno: i32, on: bool) -> &'static str {
    match errno {
        libc::EINVAL if on => {
            " (anonymous, shared and hugetlb memory can be; a file on a disk only by uffd-async)"
        }
        libc::EBUSY if on => " (another userfaultfd has it: one tracker at a time)",
        _ => "",
    }
}
