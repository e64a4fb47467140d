//! See `vmm::fuzz::connection`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm::fuzz::connection(bytes));
