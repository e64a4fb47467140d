//! What is to be known before the figures are believed: of the run, of its host, and of what the marks mean.

use super::words::{MISSING, percent, took};
use crate::bench::auto;
use crate::bench::results::{NOISY, Results};
use crate::options::human_size;

/// The run, in a line.
pub(super) fn summary(results: &Results) -> String {
    let quick = if results.quick { "a quick run, " } else { "" };
    let emulated = if results.host.emulated { "on an emulated host, whose times mean little, " } else { "" };
    let complete = if results.complete { "complete" } else { "interrupted: what was measured until then" };
    format!(
        "vmm {}, {}, took {}, {quick}{emulated}{complete}",
        results.vmm,
        results.began,
        took(results.seconds)
    )
}

/// The host, and what follows for who chooses a tracker on it: names and values.
pub(super) fn host(results: &Results) -> Vec<(&'static str, String)> {
    let host = &results.host;
    let or_unknown = |fact: &Option<String>| fact.clone().unwrap_or_else(|| "not known".to_owned());
    let or_nothing = |text: &str| if text.is_empty() { MISSING.to_owned() } else { text.to_owned() };
    let kvm = [host.kvm.as_str(), host.mmu.as_str()];
    let kvm: Vec<_> = kvm.into_iter().filter(|text| !text.is_empty()).collect();
    let load = if host.load.is_finite() { format!("{:.2}", host.load) } else { MISSING.to_owned() };
    vec![
        ("processor", format!("{}, {} online", host.cpu, host.cpus)),
        ("memory", human_size(host.memory)),
        ("kernel", host.kernel.clone()),
        ("KVM", kvm.join(", ")),
        ("virtual machine", if host.in_vm { "yes: guests are nested" } else { "no" }.to_owned()),
        ("transparent huge pages", or_unknown(&host.thp)),
        ("frequency governor", or_unknown(&host.governor)),
        (
            "noise",
            format!(
                "half of the time, the same work took {} longer than at its fastest",
                percent(host.noise)
            ),
        ),
        ("load when it began", load),
        ("trackers that miss nothing", or_nothing(&host.sound.join(", "))),
        ("tracker of --track auto", or_nothing(&host.auto)),
        ("where another is better", auto::summary(results)),
        ("threads", if host.pinned { "on processors of their own" } else { "not pinned" }.to_owned()),
    ]
}

/// How figures are to be read: terms, and what they mean.
pub(super) fn reading() -> Vec<(&'static str, String)> {
    vec![
        ("figure", "The median of its samples. A dash stands where nothing was measured.".to_owned()),
        (
            "spread",
            "Half of what lies between the quartiles of the samples, as a part of their median: after ± in the \
             page, and a column of report.csv. Figures that differ by less may well be the same."
                .to_owned(),
        ),
        (
            "noisy",
            format!(
                "A spread above {}: marked by ~ in tables, and hollow in plots. It is not to be taken at its word.",
                percent(NOISY)
            ),
        ),
        (
            "ratio",
            "Where something bounds a figure, as the speed at which memory is copied bounds a migration's, that \
             was measured in the same turns. 1.04x is what the figure is to this limit, turn by turn."
                .to_owned(),
        ),
        ("↓ and ↑", "Less is better; more is better.".to_owned()),
        (
            "host",
            "The rows of a table were measured in turns, so that what else the host did fell on all of them. Its \
             noise and its load tell how much that was."
                .to_owned(),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::sample;
    use crate::bench::results::HostFacts;

    #[test]
    fn a_run_that_was_interrupted_says_so() {
        let run = Results { vmm: "1.2".into(), began: "then".into(), seconds: 61.0, ..sample::empty() };
        assert_eq!(summary(&run), "vmm 1.2, then, took 1 min 1 s, complete");
        let host = HostFacts { emulated: true, ..HostFacts::default() };
        assert!(summary(&Results { host, ..run.clone() }).contains("times mean little, complete"));
        let run = Results { quick: true, complete: false, ..run };
        assert_eq!(
            summary(&run),
            "vmm 1.2, then, took 1 min 1 s, a quick run, interrupted: what was measured until then"
        );
    }

    #[test]
    fn a_host_of_which_little_is_known_has_all_its_facts() {
        let unknown = HostFacts { noise: f64::NAN, ..HostFacts::default() };
        let facts = host(&Results { host: unknown, ..sample::empty() });
        assert_eq!(facts.len(), host(&sample::realistic()).len());
        assert!(facts.contains(&("frequency governor", "not known".to_owned())));
        assert!(reading().iter().any(|(_, text)| text.contains("10 %")));
    }
}
