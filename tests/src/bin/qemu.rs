//! Debian's QEMU as one executable file, for `vmm bench --qemu`: downloads the package if need be, writes a script that starts
//! it with its own loader and libraries, and prints where that is.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tests::store::{Store, target_dir};

fn main() -> ExitCode {
    match write() {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("qemu: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write() -> Result<PathBuf, Box<dyn std::error::Error>> {
    let qemu = Store::open().qemu()?;
    let loader = qemu.loader();
    let quoted = |word: &Path| format!("'{}'", word.display().to_string().replace('\'', "'\\''"));
    let mut words = vec![quoted(Path::new(loader.get_program()))];
    words.extend(loader.get_args().map(|word| quoted(Path::new(word))));
    words.push(quoted(&qemu.executable()));
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        words.extend(["-L".to_owned(), quoted(&qemu.tree.join(firmware))]);
    }
    let path = std::path::absolute(target_dir())?.join("rig/qemu-system-x86_64");
    let script = format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "));
    let mut file =
        tempfile::NamedTempFile::new_in(path.parent().ok_or("a target directory without a name")?)?;
    file.write_all(script.as_bytes())?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o755))?;
    file.persist(&path)?;
    Ok(path)
}
