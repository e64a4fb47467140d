//! The end-to-end tests as a payload: the same test executable that runs on this machine, run in the rig.

use crate::cargo;
use crate::rig::{Payload, quote};

/// Names the `vmm` executable that tests use, where there is no cargo to build it.
pub const VMM_ENV: &str = "VMM_BINARY";

/// Set in a rig, where everything takes a hundred times as long: to how many cases of a test in many run there.
pub const RIG_ENV: &str = "IN_RIG";

/// Words that every built-in guest of these tests gets besides, e.g. `interrupts=on`. Set in a rig that needs them.
pub const GUEST_ENV: &str = "GUEST_CMDLINE";

/// Where a rig places a stock Linux guest: `vmlinux`, `bzImage`, `initramfs`.
pub const IMAGES: &str = "/images";

/// Adds `vmm`, in release mode, as a command.
pub fn with_vmm(payload: Payload) -> Result<Payload, cargo::Error> {
    Ok(payload.put("/bin/vmm", cargo::vmm_binary()?))
}

/// The integration tests that need KVM and nothing else, so that they run on this machine and in the rig alike.
pub const HARNESSES: [&str; 4] = ["e2e", "cli", "kvm", "conformance"];

/// What runs on EPT, where the emulator is ten times slower again: each way of tracking under the conformance suite, and
/// those of the end-to-end tests that are about how KVM maps memory.
pub const ON_EPT: [(&str, &[&str]); 2] = [
    (
        "conformance",
        &[
            "--exact",
            "kvm_bitmap_conforms",
            "kvm_manual_conforms",
            "kvm_ring_conforms",
            "uffd_async_conforms",
            "exact_conforms",
        ],
    ),
    (
        "e2e",
        &[
            "--exact",
            "it_is_so_with_dirty_rings_that_fill_up",
            "reads_are_all_that_is_reported_beyond_the_ledger",
            "a_page_dropped_on_purpose_is_missed",
            "huge_mappings_are_split_by_writes_and_come_back_after_disarm",
        ],
    ),
];

/// Cases of a test in many that run in a rig whose host is not the default one.
pub const FEW: usize = 1;

/// The same on the default host.
pub const SOME: usize = 2;

/// `vmm` and test executables, each of which runs with its arguments, and so many cases of tests in many; the exit status
/// is that of the last that fails.
pub fn payload<'a, A: AsRef<str>>(
    harnesses: impl IntoIterator<Item = (&'a str, impl IntoIterator<Item = A>)>,
    cases: usize,
) -> Result<Payload, cargo::Error> {
    let mut script = format!("export {VMM_ENV}=/bin/vmm {RIG_ENV}={cases} CI=true\nfailed=0\n");
    script +=
        "(cd /sys/module; for name in npt ept pml; do grep -s . kvm_*/parameters/$name /dev/null; done)\n";
    let mut payload = with_vmm(Payload::default())?;
    for (name, arguments) in harnesses {
        let path = format!("/tests/{name}");
        script += &format!("echo running {path}\n{path}");
        arguments.into_iter().for_each(|argument| script += &format!(" {}", quote(argument.as_ref())));
        script += " || failed=$?\n";
        payload = payload.put(path, cargo::test_binary(name)?);
    }
    Ok(payload.with_script(script + "exit $failed"))
}

/// Whether this process runs in a rig.
pub fn in_rig() -> bool {
    std::env::var_os(RIG_ENV).is_some()
}

/// Of the `cases` of a test in many those that run here: in a rig just some, the first ones.
pub fn some<T>(cases: &[T]) -> &[T] {
    let some = std::env::var(RIG_ENV).map_or(usize::MAX, |text| text.parse().unwrap_or(SOME));
    &cases[..cases.len().min(some)]
}
