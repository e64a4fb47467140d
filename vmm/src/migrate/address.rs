//! Where a migration goes to.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a destination waits, and a source connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of a host.
    Tcp(String),
    /// A command's standard input and output, as `sh` runs it.
    Exec(String),
}

impl Address {
    /// Whether what goes there can be read on the way.
    pub fn is_open(&self, tls_dir: Option<&Path>) -> bool {
        matches!(self, Address::Tcp(_)) && tls_dir.is_none()
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
            Some(("tcp", rest)) => match rest.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                    Ok(Address::Tcp(rest.to_owned()))
                }
                _ => Err(format!("{text:?}: a TCP address is tcp:HOST:PORT")),
            },
            Some(("exec", command)) if !command.trim().is_empty() => Ok(Address::Exec(command.to_owned())),
            _ => Err(format!("{text:?} is no address: use unix:PATH, tcp:HOST:PORT or exec:COMMAND")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
            Address::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "unix:/run/a:b",
            "tcp:10.0.0.1:4444",
            "tcp:[::1]:4444",
            "exec:ssh host vmm run --incoming exec:-",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for bad in ["", "unix:", "tcp:4444", "tcp::1", "tcp:host:99999", "exec: ", "/run/socket", "udp:a:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
