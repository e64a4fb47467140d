//! QEMU as the peer inside the rig: the same emulator package that makes L1, placed in L1 with its libraries,
//! where it runs guests by KVM on its `microvm` machine. What it boots, and how fast, is the yardstick.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::rig::Payload;
use crate::store::{self, Qemu};

/// Where QEMU lies in L1.
const ROOT: &str = "/qemu";

/// Firmware that the microvm machine loads.
const FIRMWARE: [&str; 5] = [
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/kvmvapic.bin",
];

/// Places QEMU in L1 as the command `qemu-microvm`: the machine, the accelerator and a serial console on
/// stdio are set, the rest is the caller's arguments.
///
/// # Errors
/// When the loader cannot tell which libraries the emulator needs.
pub fn with_qemu(payload: Payload, qemu: &Qemu) -> io::Result<Payload> {
    let libraries = libraries(qemu)?;
    let mut payload = payload.put(format!("{ROOT}/bin/qemu"), qemu.executable());
    for library in libraries {
        let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
        payload = payload.put(format!("{ROOT}/lib/{name}"), library);
    }
    for firmware in FIRMWARE {
        let name = firmware.rsplit('/').next().unwrap_or(firmware);
        payload = payload.put(format!("{ROOT}/share/{name}"), qemu.tree.join(firmware));
    }
    let script = format!(
        "#!/bin/sh\nexec {ROOT}/lib/ld-linux-x86-64.so.2 --library-path {ROOT}/lib {ROOT}/bin/qemu \
         -L {ROOT}/share -M microvm,accel=kvm,pit=off,rtc=off -cpu host -nodefaults -no-user-config \
         -display none -no-reboot -serial stdio \"$@\"\n"
    );
    Ok(payload.put_bytes("/bin/qemu-microvm", script))
}

/// The shared libraries that the emulator is loaded with, as its own loader lists them, and that loader.
fn libraries(qemu: &Qemu) -> io::Result<Vec<PathBuf>> {
    let output = qemu.loader().arg("--list").arg(qemu.executable()).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    // Lines are `name => path (address)`; the loader itself and the vDSO have no arrow.
    let mut paths: Vec<PathBuf> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| Some(PathBuf::from(line.split_once(" => ")?.1.split(" (").next()?)))
        .collect();
    paths.retain(|path| path.file_name() != qemu.loader_path().file_name());
    paths.push(qemu.loader_path());
    Ok(paths)
}

impl Qemu {
    /// The emulator. It runs through [`Qemu::loader`], so that its libraries need not fit this machine's.
    pub fn executable(&self) -> PathBuf {
        self.tree.join("usr/bin/qemu-system-x86_64")
    }

    /// The dynamic loader that belongs to the emulator.
    pub fn loader_path(&self) -> PathBuf {
        store::loader_path(&self.tree)
    }

    /// A command that starts the loader with the emulator's libraries; the executable comes next.
    pub fn loader(&self) -> Command {
        store::loader(&self.tree)
    }
}
