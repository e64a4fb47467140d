//! The table of trackers: what each can be relied on for, and whether it works on this host.

use std::io::{self, Write};

use dirty_track::addr::PageSize;
use dirty_track::tracker::{Backing, Kind};
use serde::Serialize;

use crate::host::Host;
use crate::track;

/// A tracker on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name, as `--track` takes it.
    pub name: &'static str,
    /// `--track auto` takes it here.
    pub auto: bool,
    /// It works here.
    pub works: bool,
    /// What is missing, if it does not.
    pub lacks: Option<&'static str>,
    /// What to know before it is used here.
    pub caveat: Option<&'static str>,
    /// Unit of a report over ordinary memory.
    pub granularity: String,
    /// Unit of a report over 2 MiB pages of hugetlb.
    pub granularity_hugetlb: String,
    /// Writes by the guest are seen.
    pub sees_guest_writes: bool,
    /// Writes by the monitor's devices are seen.
    pub sees_host_writes: bool,
    /// Pages that the guest only read may be reported.
    pub may_report_reads: bool,
    /// Huge mappings stay until they are written.
    pub keeps_huge: bool,
    /// The same for shared memory (a memfd).
    pub keeps_huge_shared: bool,
    /// A harvest tells which vCPU wrote a page.
    pub per_vcpu: bool,
}

/// The table for `host`.
pub fn rows(host: &Host) -> Vec<Row> {
    let facts = track::facts(host);
    let usable = host.kvm.facts.as_ref().is_some_and(|facts| facts.machine_error.is_none());
    let row = |kind: Kind| {
        let guarantees = kind.guarantees(Backing::Private);
        let lacks = if usable { kind.lacks(&facts) } else { Some("a KVM that can make machines") };
        Row {
            name: kind.name(),
            auto: usable && Kind::choose(&facts).0 == kind,
            works: lacks.is_none(),
            lacks,
            caveat: kind.caveat(&facts).filter(|_| lacks.is_none()),
            granularity: guarantees.granularity.to_string(),
            granularity_hugetlb: kind.guarantees(Backing::Hugetlb(PageSize::M2)).granularity.to_string(),
            sees_guest_writes: guarantees.sees_guest_writes,
            sees_host_writes: guarantees.sees_host_writes,
            may_report_reads: guarantees.may_report_reads,
            keeps_huge: guarantees.keeps_huge,
            keeps_huge_shared: kind.guarantees(Backing::Shared).keeps_huge,
            per_vcpu: guarantees.per_vcpu,
        }
    };
    Kind::ALL.into_iter().filter(|kind| *kind != Kind::None).map(row).collect()
}

/// Prints the table for people.
pub(super) fn print(out: &mut dyn Write, rows: &[Row]) -> io::Result<()> {
    writeln!(out, "Trackers (--track)")?;
    writeln!(
        out,
        "        {:<13}{:<14}{:<18}{:<19}{:<14}per vCPU",
        "", "granularity", "host writes seen", "reads reported", "stays huge"
    )?;
    let yes = |value: bool| if value { "yes" } else { "no" };
    for row in rows {
        let granularity = match row.granularity == row.granularity_hugetlb {
            true => row.granularity.clone(),
            false => format!("{}, hugetlb", row.granularity),
        };
        writeln!(
            out,
            "  {:<6}{:<13}{:<14}{:<18}{:<19}{:<14}{}",
            if row.works { "ok" } else { "no" },
            row.name,
            granularity,
            yes(row.sees_host_writes),
            if row.may_report_reads { "maybe" } else { "never" },
            match (row.keeps_huge, row.keeps_huge_shared) {
                (true, false) => "if private",
                (keeps, _) => yes(keeps),
            },
            yes(row.per_vcpu)
        )?;
        let lacks = row.lacks.map(|lacks| format!("needs {lacks}"));
        for note in lacks.into_iter().chain(row.caveat.map(str::to_owned)) {
            writeln!(out, "          {note}")?;
        }
    }
    if let Some(row) = rows.iter().find(|row| row.auto) {
        writeln!(out, "        `--track auto` takes {} here.", row.name)?;
    }
    writeln!(out, "        Over hugetlb, userfaultfd protects and reports pages of hugetlb's size.\n")
}
