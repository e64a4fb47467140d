//! Debian packages without touching the machine: a private apt whose lists, cache and status lie below the
//! rig's cache directory.
//!
//! The rigs need software that a development machine seldom has (a recent QEMU, stock kernels, a static
//! busybox) and must not install. apt itself does the work, so the machine's proxies, keyrings and mirrors
//! count: an [`Archive`] is one Debian release (with its backports) from the mirror that the machine's own
//! sources name. Its dpkg status is empty, so apt resolves every shared library down to libc, and the
//! unpacked tree runs on a machine that has none of them.
//!
//! Versions in backports move. Nothing here names one: [`Archive::newest`] finds what the mirror has now.

use std::cmp::Ordering;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine has no apt, no Debian mirror or no network: there is nothing to try.
    #[error("{0}")]
    Unavailable(String),
    /// The mirror has no package of this kind.
    #[error("the mirror's {release} has no package named {pattern}")]
    NoPackage {
        /// The release that was searched, e.g. `bookworm`.
        release: String,
        /// What was looked for.
        pattern: String,
    },
    /// A tool of apt or dpkg failed.
    #[error("`{command}` failed ({status}): {stderr}")]
    Tool {
        /// The program and its arguments.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
    /// A file of the private apt could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// One Debian release and its backports, on the machine's mirror, with apt state of its own.
#[derive(Debug)]
pub struct Archive {
    release: String,
    conf: PathBuf,
    archives: PathBuf,
}

impl Archive {
    /// Opens `release` (a codename) with its state in `dir`, which is created, and fetches its package lists.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the machine is no Debian on x86-64, names no Debian mirror, or cannot reach it.
    pub fn open(release: &str, dir: &Path) -> Result<Archive, Error> {
        let mirror = Mirror::of_this_machine()?;
        let archives = dir.join("cache/archives");
        for sub in ["lists/partial", "cache/archives/partial"] {
            let sub = dir.join(sub);
            fs::create_dir_all(&sub).map_err(io_error("create", &sub))?;
        }
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(io_error("write", &path))
        };
        write("status", String::new())?;
        write("debian.sources", mirror.stanza(release))?;
        let at = dir.display();
        // Read after the machine's own configuration (`-c`), so that what is set here wins. The machine's
        // hooks are cleared: they would act on the machine's caches.
        write(
            "apt.conf",
            format!(
                "Dir::State \"{at}\";\nDir::State::lists \"{at}/lists\";\nDir::State::status \"{at}/status\";\n\
                 Dir::Cache \"{at}/cache\";\nDir::Cache::archives \"{at}/cache/archives\";\n\
                 Dir::Etc::sourcelist \"{at}/debian.sources\";\nDir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
                 #clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
                 #clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Pre-Install-Pkgs;\n\
                 APT::Sandbox::User \"\";\nAPT::Architecture \"amd64\";\nAPT::Architectures \"amd64\";\n\
                 APT::Default-Release \"\";\nAPT::Keep-Downloaded-Packages \"true\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
            ),
        )?;
        let archive = Archive { release: release.into(), conf: dir.join("apt.conf"), archives };
        // `update` warns and succeeds when it cannot reach the mirror; without lists nothing can be found.
        let update = run(archive.apt("apt-get").args(["-q", "update", "-o", "APT::Update::Error-Mode=any"]));
        update.map_err(|e| Error::Unavailable(format!("no package lists of Debian {release}: {e}")))?;
        Ok(archive)
    }

    /// The release's codename.
    pub fn release(&self) -> &str {
        &self.release
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.conf).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        command
    }

    /// The package with the highest version among those whose name starts with `prefix` and ends with `suffix`.
    ///
    /// # Errors
    /// [`Error::NoPackage`] when the release has none.
    pub fn newest(&self, prefix: &str, suffix: &str) -> Result<Package, Error> {
        let names = run(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        let mut best: Option<Package> = None;
        for name in names.lines().filter(|n| n.ends_with(suffix)) {
            // A name may be known only because something depends on it; such a one has no record.
            let Some(package) = self.candidate(name)? else { continue };
            if best.as_ref().is_none_or(|b| version_order(&package.version, &b.version).is_gt()) {
                best = Some(package);
            }
        }
        best.ok_or_else(|| Error::NoPackage {
            release: self.release.clone(),
            pattern: format!("{prefix}*{suffix}"),
        })
    }

    /// The newest version of the package `name`, or `None` if the release has none.
    fn candidate(&self, name: &str) -> Result<Option<Package>, Error> {
        let records =
            run(self.apt("apt-cache").args(["show", "--no-all-versions", name])).unwrap_or_default();
        let field =
            |key: &str| records.lines().find_map(|l| l.strip_prefix(key)).map(|v| v.trim().to_owned());
        let Some(version) = field("Version:") else { return Ok(None) };
        let depends = field("Depends:").unwrap_or_default();
        let depends = depends
            .split(',')
            .filter_map(|d| d.split(['|', '(']).next())
            .map(|d| d.trim().to_owned())
            .filter(|d| !d.is_empty())
            .collect();
        Ok(Some(Package { name: name.into(), version, depends }))
    }

    /// Downloads exactly the packages `names` and unpacks them into `tree`, without what they depend on.
    pub fn unpack(&self, names: &[&str], tree: &Path) -> Result<(), Error> {
        let staging = tree.with_extension("debs");
        fs::create_dir_all(&staging).map_err(io_error("create", &staging))?;
        run(self.apt("apt-get").args(["-q", "download"]).args(names).current_dir(&staging))?;
        unpack_all(&staging, tree)?;
        fs::remove_dir_all(&staging).map_err(io_error("remove", &staging))
    }

    /// Downloads the packages `names` and everything they need to run, and unpacks all of it into `tree`. Packages come
    /// from the backports if `backports`, else from the release itself. Returns the version of the first name.
    pub fn unpack_with_dependencies(
        &self,
        names: &[&str],
        backports: bool,
        tree: &Path,
    ) -> Result<String, Error> {
        // An interrupted download may have left packages of an older version.
        self.remove_downloads()?;
        let target = if backports { format!("{}-backports", self.release) } else { self.release.clone() };
        let install = ["-q", "-y", "--download-only", "--no-install-recommends", "install"];
        run(self.apt("apt-get").args(["-t", &target]).args(install).args(names))?;
        unpack_all(&self.archives, tree)?;
        let name = names.first().copied().unwrap_or_default();
        let deb = debs_in(&self.archives)?
            .into_iter()
            .find(|d| d.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&format!("{name}_"))))
            .ok_or_else(|| Error::NoPackage { release: target, pattern: name.into() })?;
        let version = run(Command::new("dpkg-deb").arg("-f").arg(&deb).arg("Version"))?.trim().to_owned();
        self.remove_downloads()?;
        Ok(version)
    }

    fn remove_downloads(&self) -> Result<(), Error> {
        for deb in debs_in(&self.archives)? {
            fs::remove_file(&deb).map_err(io_error("remove", &deb))?;
        }
        Ok(())
    }
}

/// A package as the mirror offers it now.
#[derive(Clone, Debug)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its full Debian version.
    pub version: String,
    /// Names of what it depends on (of alternatives, the first).
    pub depends: Vec<String>,
}

fn debs_in(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(dir).map_err(io_error("list", dir))?;
    let mut debs: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "deb")).collect();
    debs.sort();
    Ok(debs)
}

fn unpack_all(debs: &Path, tree: &Path) -> Result<(), Error> {
    fs::create_dir_all(tree).map_err(io_error("create", tree))?;
    for deb in debs_in(debs)? {
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(tree))?;
    }
    Ok(())
}

/// Orders two Debian versions as dpkg does.
fn version_order(a: &str, b: &str) -> Ordering {
    let is = |op: &str| {
        let compare = Command::new("dpkg").args(["--compare-versions", a, op, b]).status();
        compare.is_ok_and(|status| status.success())
    };
    match (is("lt"), is("gt")) {
        (true, _) => Ordering::Less,
        (_, true) => Ordering::Greater,
        _ => Ordering::Equal,
    }
}

/// Runs a tool without a stdin and returns what it wrote to stdout.
fn run(command: &mut Command) -> Result<String, Error> {
    let shown = format!("{command:?}").replace('"', "");
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let program = command.get_program().to_string_lossy().into_owned();
            return Err(Error::Unavailable(format!("this machine has no `{program}` (not a Debian?)")));
        }
        Err(e) => {
            return Err(Error::Tool { command: shown, status: "not started".into(), stderr: e.to_string() });
        }
    };
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = stderr.lines().rev().take(4).collect();
        return Err(Error::Tool {
            command: shown,
            status: output.status.to_string(),
            stderr: tail.into_iter().rev().collect::<Vec<_>>().join("; "),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where the machine's own sources say that Debian's main archive is.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    signed_by: Option<String>,
    trusted: Option<String>,
}

impl Mirror {
    /// Reads the machine's sources, both the one-line and the deb822 form.
    fn of_this_machine() -> Result<Mirror, Error> {
        if !cfg!(target_arch = "x86_64") {
            return Err(Error::Unavailable("the rig's packages are for x86-64".into()));
        }
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        let mut parts: Vec<PathBuf> = fs::read_dir("/etc/apt/sources.list.d")
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect();
        parts.sort();
        files.append(&mut parts);
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            let found = match file.extension().and_then(|x| x.to_str()) {
                Some("sources") => Mirror::in_deb822(&text),
                Some("list") => Mirror::in_list(&text),
                _ => None,
            };
            if let Some(mirror) = found {
                return Ok(mirror);
            }
        }
        Err(Error::Unavailable(
            "apt's sources name no Debian main archive (the rig takes its packages from Debian)".into(),
        ))
    }

    /// The first deb822 stanza that offers a Debian release's main component.
    fn in_deb822(text: &str) -> Option<Mirror> {
        let text: String = text.lines().filter(|l| !l.starts_with('#')).flat_map(|l| [l, "\n"]).collect();
        text.split("\n\n").find_map(|stanza| {
            // A field's value goes on in the following lines that begin with a space: an inline key does.
            let field = |key: &str| {
                let mut lines = stanza.lines().skip_while(|line| {
                    line.split_once(':').is_none_or(|(name, _)| !name.eq_ignore_ascii_case(key))
                });
                let mut value = lines.next()?.split_once(':')?.1.trim().to_owned();
                for line in lines.take_while(|line| line.starts_with([' ', '\t'])) {
                    value += "\n";
                    value += line;
                }
                Some(value)
            };
            let enabled = field("Enabled").is_none_or(|v| v != "no");
            let binary = field("Types")?.split_whitespace().any(|t| t == "deb");
            let main = field("Components")?.split_whitespace().any(|c| c == "main");
            let release = field("Suites")?.split_whitespace().any(is_release);
            let uri = field("URIs")?.split_whitespace().next()?.to_owned();
            (enabled && binary && main && release).then(|| Mirror {
                uri,
                signed_by: field("Signed-By"),
                trusted: field("Trusted"),
            })
        })
    }

    /// The first `deb` line that offers a Debian release's main component.
    fn in_list(text: &str) -> Option<Mirror> {
        text.lines().find_map(|line| {
            let rest = line.trim().strip_prefix("deb ")?.trim();
            let (options, rest) = match rest.strip_prefix('[') {
                Some(rest) => rest.split_once(']')?,
                None => ("", rest),
            };
            let mut words = rest.split_whitespace();
            let (uri, suite) = (words.next()?, words.next()?);
            let option = |key: &str| {
                options.split_whitespace().find_map(|o| o.split_once('=').filter(|(k, _)| *k == key))
            };
            (is_release(suite) && words.any(|c| c == "main")).then(|| Mirror {
                uri: uri.into(),
                signed_by: option("signed-by").map(|(_, v)| v.into()),
                trusted: option("trusted").map(|(_, v)| v.into()),
            })
        })
    }

    /// A deb822 source of `release` and its backports on this mirror.
    fn stanza(&self, release: &str) -> String {
        let mut stanza = format!(
            "Types: deb\nURIs: {}\nSuites: {release} {release}-backports\nComponents: main\n",
            self.uri
        );
        for (key, value) in [("Signed-By", &self.signed_by), ("Trusted", &self.trusted)] {
            if let Some(value) = value {
                stanza += &format!("{key}: {value}\n");
            }
        }
        stanza
    }
}

/// Whether `suite` is a Debian release itself (not its updates, security fixes or backports).
fn is_release(suite: &str) -> bool {
    let names = ["bullseye", "bookworm", "trixie", "forky", "duke", "sid"];
    let aliases = ["oldoldstable", "oldstable", "stable", "testing", "unstable"];
    names.contains(&suite) || aliases.contains(&suite)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mirror_in_a_deb822_file() {
        let text = "Types: deb\n# a remark\nURIs: http://mirror/debian-security\nSuites: bookworm-security\n\
                    Components: main\n\nTypes: deb deb-src\nURIs: http://mirror/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /keys.gpg\n";
        let mirror = Mirror::in_deb822(text).unwrap();
        assert_eq!(mirror.uri, "http://mirror/debian");
        assert_eq!(mirror.signed_by.as_deref(), Some("/keys.gpg"));
        assert!(mirror.stanza("trixie").contains("Suites: trixie trixie-backports\n"));
        let inline = text.replace("/keys.gpg", "\n -----BEGIN\n .\n KEY");
        assert!(
            Mirror::in_deb822(&inline).unwrap().stanza("trixie").ends_with(": \n -----BEGIN\n .\n KEY\n")
        );
        assert_eq!(Mirror::in_deb822(&text.replace("bookworm bookworm-updates", "noble")), None);
    }

    #[test]
    fn finds_the_mirror_in_a_list_file() {
        let text = "# deb http://no/ bookworm main\ndeb-src http://src/ bookworm main\n\
                    deb http://updates/ bookworm-updates main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian trixie non-free main\n";
        let mirror = Mirror::in_list(text).unwrap();
        assert_eq!(mirror.uri, "http://mirror/debian");
        assert_eq!(mirror.signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn orders_versions_as_dpkg_does() {
        if Command::new("dpkg").arg("--version").output().is_err() {
            return crate::skip::skip("orders_versions_as_dpkg_does", "no dpkg");
        }
        assert_eq!(version_order("6.12.95-1~bpo12+1", "6.12.94-1"), Ordering::Greater);
        assert_eq!(version_order("6.1.9-1", "6.1.176-1"), Ordering::Less);
        assert_eq!(version_order("1:1.0", "1:1.0"), Ordering::Equal);
    }
}
