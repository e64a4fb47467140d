//! `vmm migrate`: asks a running monitor to move its machine, and follows it there.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use super::MigrateConfig;
use super::report::{MigrationReport, Phase};
use crate::api::client::{Client, ClientError, block_on};

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
    });
    let progress = io::stderr().is_terminal() && !json;
    let report = block_on(async {
        client.call::<Value>(Method::PUT, "/vm/migrate", Some(&request)).await?;
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
                _ = tokio::signal::ctrl_c() => {
                    match client.call::<Value>(Method::DELETE, "/vm/migrate", None::<&()>).await {
                        // Too late, or over: its report says.
                        Ok(_) | Err(ClientError::Refused(_)) => {}
                        Err(error) => return Err(error),
                    }
                }
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
