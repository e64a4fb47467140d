//! Migration over TCP with TLS: who cannot show the right certificate brings nothing, gets nothing, and harms nobody.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tests::conformance::wait_until;
use tests::migration::free_tcp;
use tests::monitor::Monitor;
use tests::skip;

/// Somebody who signs certificates.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority { certificate, issuer: Issuer::new(params, key) }
    }

    /// Makes a certificate for `host`, and its key, the files of `side` in `directory`.
    fn sign(&self, directory: &Path, side: &str, host: &str, expired: bool) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        if expired {
            (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(2020, 1, 1));
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        fs::write(directory.join(format!("{side}-cert.pem")), certificate).unwrap();
        fs::write(directory.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// A directory with all that both sides need.
    fn directory(&self, root: &Path, name: &str) -> PathBuf {
        let directory = root.join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("ca-cert.pem"), &self.certificate).unwrap();
        self.sign(&directory, "server", "127.0.0.1", false);
        self.sign(&directory, "client", "a source", false);
        directory
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn just_the_right_certificates_move_a_guest() {
    let test = "just_the_right_certificates_move_a_guest";
    if let Err(error) = vmm::machine::open_kvm() {
        return skip::skip(test, &error.to_string());
    }
    let root = tempfile::tempdir().unwrap();
    let (ours, other) = (Authority::new(), Authority::new());
    let good = ours.directory(root.path(), "good");
    let foreign = other.directory(root.path(), "foreign");
    // Who trusts the right authority, and is known to another one.
    let impostor = other.directory(root.path(), "impostor");
    fs::copy(good.join("ca-cert.pem"), impostor.join("ca-cert.pem")).unwrap();
    let late = ours.directory(root.path(), "late");
    ours.sign(&late, "client", "a source", true);
    ours.sign(&late, "server", "127.0.0.1", true);
    let elsewhere = ours.directory(root.path(), "elsewhere");
    ours.sign(&elsewhere, "server", "127.0.0.2", false);

    let cmdline = "workload=mixed region=48M verify=on quiet=on passes=0";
    let source = Monitor::start(&["run", "--memory", "size=64M", "--cpus", "2", "--cmdline", cmdline]);
    wait_until("it serves", || source.socket().exists());
    wait_until("it has epochs", || !source.get("/dirty")["last"].is_null());
    let address = free_tcp();
    let there = Monitor::waiting_at(&address, &["--tls-dir", text(&good)]);
    let refused = |address: &str, directory: Option<&Path>, words: &[&str]| {
        let tls = directory.map(|directory| ["--tls-dir", text(directory)]);
        let (code, said) = source.migrated(address, tls.as_ref().map_or(&[], |tls| &tls[..]));
        assert_eq!(code, Some(1), "{directory:?}: {said}");
        assert!(words.iter().any(|words| said.to_string().contains(words)), "{directory:?}: {said}");
    };
    refused(&address, Some(&foreign), &["invalid peer certificate"]);
    refused(&address, Some(&impostor), &["alert", "broke off"]);
    refused(&address, Some(&late), &["alert", "broke off"]);
    refused(&address, None, &["--tls-dir", "broke off"]);
    refused(&address, Some(&root.path().join("nowhere")), &["ca-cert.pem", "client-cert.pem"]);
    refused("unix:/nowhere", Some(&good), &["TLS is for TCP"]);
    // A source with no certificate at all.
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ours.certificate.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(address.trim_start_matches("tcp:")).unwrap();
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream);
    assert!(stream.read(&mut [0; 8]).is_err());
    drop(stream);
    // It may have turned this one away before it says so.
    wait_until("it says why", || there.stderr().contains("peer sent no certificates"));
    let said = there.stderr();
    assert!(!said.contains("panicked") && !said.contains("in the clear"), "{said}");
    // Destinations that will not do.
    for (directory, words) in [
        (Some(&late), &["Expired", "expired"][..]),
        (Some(&elsewhere), &["NotValidForName", "not valid for name"]),
        (None, &["cannot connect"]),
    ] {
        let address = free_tcp();
        let tls = directory.map(|directory| ["--tls-dir", text(directory)]);
        let other = Monitor::waiting_at(&address, tls.as_ref().map_or(&[], |tls| &tls[..]));
        refused(&address, Some(&good), words);
        assert_eq!(other.stderr().contains("in the clear"), directory.is_none());
    }
    source.assert_runs("nobody got it");

    // The destination that turned them all away takes the right one in.
    let args = ["--tls-dir", text(&good), "--auto-converge", "--downtime", "300ms"];
    let args = [&args[..], &["--connections", "4", "--compress", "lz4"]].concat();
    let (code, report) = source.migrated(&address, &args);
    assert_eq!(code, Some(0), "{report}");
    wait_until("it serves", || there.socket().exists());
    wait_until("it has epochs", || !there.get("/dirty")["last"].is_null());
    there.assert_runs("it has come");
    // And sends it on, without compression.
    let address = free_tcp();
    let last = Monitor::waiting_at(&address, &["--tls-dir", text(&good)]);
    let (code, report) = there.migrated(&address, &args[..5]);
    assert_eq!(code, Some(0), "{report}");
    assert_ne!(report["bytes"], Value::from(0));
    wait_until("it serves", || last.socket().exists());
    last.end_well("it has come");
}
