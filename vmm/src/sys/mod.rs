//! Everything unsafe of the monitor, in small pieces with safe faces.

pub mod affinity;
pub mod cpu_time;
pub mod guest_io;
pub mod kick;
pub mod kvm;
pub mod mmap;
pub mod probe;
pub(crate) mod rename;
pub mod signals;
pub(crate) mod splice;
pub mod tty;
