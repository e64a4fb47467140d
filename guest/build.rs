//! Builds the guest kernel with the toolchain that builds everything else.
//!
//! The kernel is a freestanding program, but it needs no target of its own: `rustc` for the host's target
//! makes one out of `#![no_std]`, a linker script and no start files. It runs without SSE, since one of the
//! hosts that it must run on cannot emulate SSE in ring 0 and since nothing ever enables it. `core` comes
//! compiled *with* SSE, so the kernel is linked with fat LTO, which compiles what it takes from `core` anew
//! (a test disassembles the result and looks for vector instructions).

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    // Cargo sets all three for every build script.
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let image = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("guest-kernel");
    let rustc = env::var_os("RUSTC").expect("set by cargo");

    let script = manifest.join("kernel/link.ld");
    for path in ["kernel", "src", "build.rs"] {
        println!("cargo:rerun-if-changed={}", manifest.join(path).display());
    }

    let mut command = Command::new(rustc);
    command.arg(manifest.join("kernel/main.rs")).arg("-o").arg(&image);
    command.args(["--edition=2024", "--crate-type=bin", "--crate-name=guest_kernel"]);
    command.args(["--target=x86_64-unknown-linux-gnu", "--cap-lints=warn"]);
    for option in [
        "opt-level=3",
        "panic=abort",
        "lto=fat",
        "codegen-units=1",
        "strip=symbols",
        "force-unwind-tables=no",
        "relocation-model=static",
        "code-model=small",
        "no-redzone=yes",
        "target-feature=+crt-static,-sse,-sse2,-sse3,-ssse3,-sse4.1,-sse4.2,-avx,-mmx,-fxsr",
        // A loop over memory must not become a call that is longer than the loop.
        "no-vectorize-loops",
        "no-vectorize-slp",
    ] {
        command.arg("-C").arg(option);
    }
    for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n"] {
        command.arg("-C").arg(format!("link-arg={argument}"));
    }
    command.arg("-C").arg(format!("link-arg=-Wl,-T,{}", script.display()));

    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("cannot run {command:?}: {error}");
            exit(1);
        }
    };
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("the guest kernel does not build:\n{messages}");
        exit(1);
    }
    // rustc warns that taking SSE away changes the ABI of floating-point arguments. The kernel has none.
    for block in messages.split("\n\n") {
        let known = ["ensure that the ABI", "target-feature", "warnings emitted", "warning emitted"];
        if !block.trim().is_empty() && !known.iter().any(|words| block.contains(words)) {
            for line in block.lines() {
                println!("cargo:warning={line}");
            }
        }
    }
}
