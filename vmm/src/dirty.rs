//! `vmm dirty`: the live verbs about dirty memory, as clients of a running monitor.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::client::{Client, ClientError, block_on, interruptions};
use crate::board::DumpStatus;
use crate::dump::DumpConfig;
use crate::live::{Epoch, Totals};
use crate::options::human_size;
use crate::panel::{self, Subject, grouped};
use crate::sampled::{Look, Looks};
use crate::snapshot::{Request, SnapshotReport};

/// What `GET /dirty` answers.
#[derive(Debug, Deserialize)]
struct Dirty {
    tracker: String,
    armed: bool,
    last: Option<Epoch>,
    totals: Option<Totals>,
    look: Option<Look>,
    looks: Option<Looks>,
}

/// How often the progress of a dump is looked at.
const PROGRESS: Duration = Duration::from_millis(20);

/// `vmm dirty dump`: asks for a dump, waits for its end and says how much it was. Ctrl-C ends it as it should be.
///
/// # Errors
/// See [`ClientError`]; a dump that ended before its end is one, too.
pub fn dump(socket: &Path, config: DumpConfig, output: &Path, json: bool) -> Result<(), ClientError> {
    let client = Client::new(socket);
    let status = block_on(async {
        let mut interrupted = interruptions()?;
        let mut request = serde_json::to_value(config)?;
        if output == Path::new("-") {
            let stream = async {
                let mut out = io::stdout().lock();
                client.stream("/dirty/dump", &request, &mut out).await
            };
            tokio::pin!(stream);
            tokio::select! {
                outcome = &mut stream => drop(outcome?),
                _ = interrupted.recv() => {
                    // What is left of the stream is its end.
                    let (ended, outcome) = tokio::join!(end(&client), &mut stream);
                    ended?;
                    outcome?;
                }
            }
            return client.get::<DumpStatus>("/dirty/dump").await;
        }
        request["path"] = json!(absolute(output)?);
        client.call::<Value>(Method::POST, "/dirty/dump", Some(&request)).await?;
        let progress = io::stderr().is_terminal() && !json;
        loop {
            let status: DumpStatus = client.get("/dirty/dump").await?;
            if progress {
                eprint!("\r\x1b[K{}", describe(&status));
            }
            if !status.running {
                if progress {
                    eprint!("\r\x1b[K");
                }
                return Ok(status);
            }
            tokio::select! {
                () = tokio::time::sleep(PROGRESS) => {}
                _ = interrupted.recv() => drop(end(&client).await?),
            }
        }
    })?;
    if let Some(error) = status.error {
        return Err(ClientError::Refused(error));
    }
    match (json, output == Path::new("-")) {
        (true, false) => println!("{}", serde_json::to_string(&status)?),
        (true, true) => eprintln!("{}", serde_json::to_string(&status)?),
        (false, _) => eprintln!("{}", describe(&status)),
    }
    Ok(())
}

/// Ends the dump. One that has just ended by itself is as good.
async fn end(client: &Client) -> Result<(), ClientError> {
    match client.call::<Value>(Method::DELETE, "/dirty/dump", None::<&()>).await {
        Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

fn describe(status: &DumpStatus) -> String {
    let mut text = format!(
        "{} epochs, {} dirty pages, {}",
        status.epochs,
        grouped(status.dirty),
        human_size(status.bytes)
    );
    if status.pages + status.zero > 0 {
        text.push_str(&format!(
            " with the contents of {} pages ({} more are all zeros)",
            grouped(status.pages),
            grouped(status.zero)
        ));
    }
    text
}

/// The monitor may have another working directory.
fn absolute(path: &Path) -> Result<PathBuf, ClientError> {
    std::path::absolute(path).map_err(ClientError::Write)
}

/// `vmm snapshot`: asks for a snapshot, and says how it went.
///
/// # Errors
/// See [`ClientError`].
pub fn snapshot(socket: &Path, output: &Path, diff: bool, json: bool) -> Result<(), ClientError> {
    let client = Client::new(socket);
    let request = Request { path: absolute(output)?, diff };
    let report: SnapshotReport = block_on(client.call(Method::PUT, "/vm/snapshot", Some(&request)))?;
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        eprintln!(
            "{}: {} pages, {} of them zeros, in {:.2} s by {}; the guest stood still for {:.2} ms",
            output.display(),
            grouped(report.pages),
            grouped(report.zero),
            report.seconds,
            report.method.name(),
            report.still_us / 1000.0,
        );
    }
    Ok(())
}

/// `vmm dirty watch`: a line for each epoch, until Ctrl-C or the machine's end.
///
/// # Errors
/// See [`ClientError`].
pub fn watch(socket: &Path, json: bool) -> Result<(), ClientError> {
    let client = Client::new(socket);
    block_on(async {
        let mut interrupted = interruptions()?;
        let mut seen = 0;
        loop {
            let target = format!("/dirty?after={seen}");
            let raw: Value = tokio::select! {
                answer = client.get(&target) => match answer {
                    // The machine has ended.
                    Err(ClientError::Http(_) | ClientError::Connect { .. }) if seen > 0 => return Ok(()),
                    answer => answer?,
                },
                _ = interrupted.recv() => return Ok(()),
            };
            let dirty = Dirty::deserialize(&raw)?;
            let line = match (&dirty.last, &dirty.look) {
                (Some(epoch), _) if epoch.epoch != seen => {
                    seen = epoch.epoch;
                    if json { raw["last"].to_string() } else { panel::line(&subject(), epoch) }
                }
                (None, Some(look)) if look.epoch != seen => {
                    seen = look.epoch;
                    if json { raw["look"].to_string() } else { panel::sampled_line(look) }
                }
                _ if !dirty.armed => return Err(ClientError::Refused("nothing is tracked".into())),
                _ => continue,
            };
            // A reader that has gone does not want the rest.
            if writeln!(io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
    })
}

/// Of lines that show nothing of it but colours.
fn subject() -> Subject {
    Subject {
        ram: 0,
        huge: String::new(),
        cpus: 1,
        tracker: "",
        chosen_because: None,
        bandwidth: 0,
        colour: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

/// `vmm dirty rate`: how fast the guest dirties memory, and what follows.
///
/// # Errors
/// See [`ClientError`].
pub fn rate(socket: &Path, json: bool) -> Result<(), ClientError> {
    let client = Client::new(socket);
    let raw: Value = block_on(client.get("/dirty"))?;
    let dirty = Dirty::deserialize(&raw)?;
    if json {
        let forecast = |name: &str| raw["last"][name].clone();
        let rate = match &dirty.look {
            Some(_) => raw["look"]["rate"].clone(),
            None => forecast("rate"),
        };
        println!(
            "{}",
            json!({
                "tracker": dirty.tracker, "rate": rate, "vcpu_rates": forecast("vcpu_rates"),
                "untracked": forecast("untracked"), "precopy": forecast("precopy"),
            })
        );
        return Ok(());
    }
    let text = match (&dirty.last, &dirty.totals, &dirty.look, &dirty.looks) {
        (Some(epoch), Some(totals), ..) => panel::rates(epoch, totals),
        (_, _, Some(look), Some(_)) => panel::sampled_line(look),
        _ if dirty.armed => "no epoch has ended yet".into(),
        _ => return Err(ClientError::Refused("nothing is tracked".into())),
    };
    println!("{text}");
    Ok(())
}
