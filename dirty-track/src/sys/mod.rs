//! Thin typed wrappers of what the kernel and the processor offer and no crate wraps. The library's only
//! `unsafe` code.

pub mod collapse;
pub mod kvm;
pub mod maps;
pub mod pagemap;
pub mod ring;
pub(crate) mod simd;
pub mod stats;
pub mod uffd;
pub mod unmap;
pub(crate) mod zeroed;
