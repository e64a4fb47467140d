//! `vmm migrate`: asks a running monitor to move its machine, and follows it there.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use super::MigrateConfig;
use super::report::{MigrationReport, Phase};
use crate::api::client::{Client, ClientError, block_on, interruptions};

/// How often it is looked at.
const PROGRESS: Duration = Duration::from_millis(20);

/// Asks for the migration, and returns how it ended. Ctrl-C cancels it.
///
/// # Errors
/// See [`ClientError`]: it was refused, or the monitor broke off. How a migration that began has ended is in its report.
pub fn migrate(socket: &Path, config: &MigrateConfig, json: bool) -> Result<MigrationReport, ClientError> {
    let client = Client::new(socket);
    let request = json!({
        "to": config.to.to_string(),
        "downtime_ms": u64::try_from(config.downtime.as_millis()).unwrap_or(u64::MAX),
        "connections": config.connections,
        "compress": config.compress,
        "auto_converge": config.auto_converge,
        "postcopy": config.postcopy,
        "bytes_per_s": config.bandwidth,
        "tls_dir": config.tls_dir,
    });
    if config.to.is_open(config.tls_dir.as_deref()) {
        eprintln!("vmm: warning: the guest's memory goes to {} in the clear; --tls-dir hides it", config.to);
    }
    let progress = io::stderr().is_terminal() && !json;
    let report = block_on(async {
        // From before it begins, so that none is lost.
        let mut interrupted = interruptions()?;
        let begun = client.call::<Value>(Method::PUT, "/vm/migrate", Some(&request));
        tokio::pin!(begun);
        loop {
            tokio::select! {
                begun = &mut begun => {
                    begun?;
                    break;
                }
                _ = interrupted.recv() => cancel(&client).await?,
            }
        }
        loop {
            let report: MigrationReport = client.get("/vm/migrate").await?;
            if report.phase.is_over() {
                if progress {
                    eprint!("\r\x1b[K");
                }
                return Ok(report);
            }
            if progress {
                eprint!("\r\x1b[K{report}");
            }
            tokio::select! {
                () = tokio::time::sleep(PROGRESS) => {}
                _ = interrupted.recv() => cancel(&client).await?,
            }
        }
    })?;
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else if report.phase == Phase::Completed {
        eprintln!("{report}");
    } else {
        eprintln!("vmm: {report}");
    }
    Ok(report)
}

async fn cancel(client: &Client) -> Result<(), ClientError> {
    match client.call::<Value>(Method::DELETE, "/vm/migrate", None::<&()>).await {
        // Too late, or over: its report says.
        Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
