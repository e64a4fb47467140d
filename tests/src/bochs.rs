//! Bochs as the emulator under L1: an Intel CPU with VMX and EPT, where QEMU's TCG has AMD's SVM and NPT only.
//!
//! It interprets, about a hundred million instructions a second on one CPU, so it is for what cannot be had otherwise:
//! mainline `kvm_intel` with its page-modification log. It differs from QEMU in three ways that matter here:
//!
//! - It loads no kernel by itself. L1 boots from a CD that `genisoimage` makes and ISOLINUX reads.
//! - It knows no power-off that ends it quietly. L1 resets by a triple fault (`reboot=t`), at which Bochs, told not to
//!   reset, gives up: a panic of *Bochs* is how every run ends, a crash of L1's kernel included. The status file tells
//!   them apart.
//! - Bochs 3.0 has two faults in its VMX. It wants the descriptor of posted interrupts aligned to a page
//!   (`VMenterLoadCheckVmControls`), so KVM must not use them. And when it enters an L2 that has interrupts disabled, as
//!   L1 has them at that moment, L1's own stay blocked until the next exit (`VMenterLoadCheckGuestState` asks for the
//!   controls of the guest before it is one): an L2 that keeps them disabled and never exits has L1 for itself for ever.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::store::{self, Bochs, Kernel};

/// Instructions that make a second of L1's time: about what the emulator does in one of ours. L1's clock must be told
/// the same, because Bochs counts instructions in the TSC while CPUID speaks of 3.5 GHz.
const INSTRUCTIONS_PER_SECOND: u32 = 100_000_000;

/// Parameters of `kvm_intel` with the page-modification log.
pub const KVM_WITH_PML: &str = "pml=1 enable_apicv=0";

/// Parameters of `kvm_intel` without it.
pub const KVM_WITHOUT_PML: &str = "pml=0 enable_apicv=0";

/// What the built-in guest has to be told, or L1 would wait for its exits.
pub const GUEST: &str = "interrupts=on";

/// Why the CD could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be written or copied.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The tool that makes the CD failed.
    #[error("genisoimage made no CD ({status}): {said}")]
    Iso {
        /// How it ended.
        status: String,
        /// What it said.
        said: String,
    },
}

/// What L1 consists of, and where the files of one run go.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The directory of this run's files.
    pub dir: &'a Path,
    /// L1's kernel.
    pub kernel: &'a Kernel,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its command line.
    pub cmdline: &'a str,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// The file that receives what L1 writes to its second serial port.
    pub status: PathBuf,
}

impl Run<'_> {
    /// Makes the CD and the configuration, and returns the emulator's command. L1's first serial port is its stdout.
    pub fn command(&self, bochs: &Bochs) -> Result<Command, Error> {
        let cd = self.dir.join("cd.iso");
        self.make_cd(bochs, &cd)?;
        let configuration = self.write("bochsrc", &self.configuration(bochs, &cd))?;
        let mut command = bochs.program("usr/bin/bochs-bin");
        command.arg("-q").arg("-f").arg(configuration);
        command.env("LTDL_LIBRARY_PATH", bochs.tree.join("usr/lib/x86_64-linux-gnu/bochs/plugins"));
        command.env("BXSHARE", bochs.tree.join("usr/share/bochs"));
        Ok(command)
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf, Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(path)
    }

    /// A CD that boots by El Torito without emulation.
    fn make_cd(&self, bochs: &Bochs, cd: &Path) -> Result<(), Error> {
        let menu = format!(
            "DEFAULT l1\nPROMPT 0\nLABEL l1\nLINUX /vmlinuz\nINITRD /initrd\nAPPEND {} reboot=t tsc_early_khz={}\n",
            self.cmdline,
            INSTRUCTIONS_PER_SECOND / 1000
        );
        let menu = self.write("isolinux.cfg", &menu)?;
        // The boot information table is written into this very file.
        let loader = self.dir.join("isolinux.bin");
        fs::copy(bochs.tree.join("usr/lib/ISOLINUX/isolinux.bin"), &loader)
            .map_err(|source| Error::Write { path: loader.clone(), source })?;
        let module = bochs.tree.join("usr/lib/syslinux/modules/bios/ldlinux.c32");
        let mut command = bochs.program("usr/bin/genisoimage");
        command.args(["-quiet", "-graft-points", "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot"]);
        command.args(["-boot-load-size", "4", "-boot-info-table", "-o"]).arg(cd);
        for (name, file) in [
            ("isolinux.bin", &loader),
            ("isolinux.cfg", &menu),
            ("ldlinux.c32", &module),
            ("vmlinuz", &self.kernel.bzimage()),
            ("initrd", &self.initrd),
        ] {
            command.arg(format!("{name}={}", graft(file)));
        }
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|e| Error::Iso { status: "not started".into(), said: e.to_string() })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::Iso { status: output.status.to_string(), said });
        }
        Ok(())
    }

    fn configuration(&self, bochs: &Bochs, cd: &Path) -> String {
        let share = bochs.tree.join("usr/share");
        let (bios, vga) = (share.join("bochs/BIOS-bochs-latest"), share.join("vgabios/vgabios.bin"));
        let log = self.dir.join("bochs.log");
        let Run { memory_mib, status, .. } = self;
        format!(
            "config_interface: textconfig\n\
             display_library: rfb, options=\"timeout=0\"\n\
             romimage: file={bios:?}\n\
             vgaromimage: file={vga:?}\n\
             cpu: model=corei7_skylake_x, count=1, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0\n\
             memory: guest={memory_mib}, host={memory_mib}\n\
             sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n\
             ata0-master: type=cdrom, path={cd:?}, status=inserted\n\
             boot: cdrom\n\
             clock: sync=none\n\
             com1: enabled=1, mode=file, dev=\"/proc/self/fd/1\"\n\
             com2: enabled=1, mode=file, dev={status:?}\n\
             log: {log:?}\n\
             panic: action=fatal\nerror: action=ignore\ninfo: action=ignore\ndebug: action=ignore\n"
        )
    }
}

impl Bochs {
    /// A program of these packages, with their own libraries.
    fn program(&self, path: &str) -> Command {
        let mut command = store::loader(&self.tree);
        command.arg(self.tree.join(path));
        command
    }
}

/// `path` as `-graft-points` reads it: `=` divides the two names.
fn graft(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace('=', "\\=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_name_for_genisoimage() {
        assert_eq!(graft(Path::new("/a=b/c\\d")), "/a\\=b/c\\\\d");
    }
}
