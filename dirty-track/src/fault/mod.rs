//! Serving the guest's faults: pages that are missing, and pages whose first write is to be seen.
//!
//! # Why
//! A guest that is restored, or migrated while it runs, can start before its memory is there, if somebody brings each
//! page as it is touched; and a guest whose memory is tracked can have each first write noted. Both are faults that a
//! userfaultfd hands to a [`Server`]. What it does about one is decided by [policies](Policies): what a write
//! [opens](Split), what [comes along](Prefault) with a missing page, and whether that is taken for [used](Age).
//!
//! # The way of a fault
//! event, **plan** (a pure function of the fault, the block's [record](crate::stage2) and the policies), **allocate**
//! (what may wait or fail, before anything is visible), **install** (the kernel fills a page or leaves it as it was),
//! record, wake. `EEXIST`, `EAGAIN` and `ENOENT` mean that somebody else was there: whoever sleeps looks again. An
//! error of a [source](PageSource) keeps the guest's thread asleep, is [reported](Server::failure), and is tried again.
//!
//! # What comes unasked
//! What was recorded of an earlier run ([`Config::ahead`]), and then all the rest if [`Config::fill`] says so, is brought in
//! by threads that go on from the block that the guest asked for last: who walks through memory finds the next blocks there,
//! and who asks for a page of a block that is on its way waits for that. A block that comes whole, and that nobody tracks,
//! is moved into the guest instead of copied ([`Config::huge`]): it was fetched into a huge page, and is one for the guest.
//!
//! A handler looks for the next fault for a while before it sleeps ([`lookout`](crate::sys::uffd::lookout)): to be woken
//! takes longer than to serve.
//!
//! # Who tracks such memory
//! No second userfaultfd can be registered there, so the server is a tracker itself: [`FaultTracker`]. It never misses a
//! write. It has more than was written where the policies say so ([`Split::Block`], moved pages), which is marked as
//! coarse, and where a harvest protects a page again while a second thread's message about it is on its way: the page
//! is opened once more, and reported once more.
//!
//! # What the guest must not be offered
//! Asynchronous page faults: a monitor clears bits 4, 10 and 14 of EAX in the guest's CPUID leaf 0x40000001
//! (Documentation/virt/kvm/x86/cpuid.rst: ASYNC_PF, ASYNC_PF_VMEXIT, ASYNC_PF_INT). With them KVM keeps a page that it
//! has fetched on a list until it can tell the guest, which takes an APIC that is enabled
//! (`kvm_arch_can_dequeue_async_page_present`). A Linux guest takes interrupts some time earlier, and from then on its
//! faults are asynchronous. A page that a harvest protects again meanwhile is on the list (`kvm_find_async_pf_gfn`):
//! KVM takes the next fault on it for one that it is seeing to, asks nobody, and the vCPU faults for ever. (Firmware
//! enables the APIC before; Linux disables it for a moment all the same.) Without them KVM has nothing to tell and
//! empties its list at once. It still takes a vCPU that waits for halted, and lets interrupts through. The same holds
//! for [`UffdSync`](crate::tracker::UffdSync), and for no tracker whose faults the kernel resolves itself. Seen on Linux
//! 6.12 and 7.2.

pub mod age;
mod agree;
mod claims;
mod counts;
mod error;
mod plan;
pub mod prefault;
mod serve;
mod server;
pub mod source;
pub mod split;
mod sweep;
mod text;
pub mod track;
pub mod working_set;

pub use age::Age;
pub use counts::Counts;
pub use error::FaultError;
pub use plan::Policies;
pub use prefault::{Prefault, Window};
pub use server::{Config, Server};
pub use source::{FileRegion, PageSource, Source};
pub use split::{Split, Threshold};
pub use text::ParseError;
pub use track::FaultTracker;
pub use working_set::WorkingSet;

pub use crate::sys::uffd::fill::Staging;
