//! The method: contenders are measured in turns, A B A B, until what is said of them is certain enough or the time is up, and
//! what one shows is divided by what its limit showed in the same turn. A host that is slower for a minute is so for all of
//! them.

use std::time::{Duration, Instant};

use super::BenchError;
use super::progress::{Interrupt, Progress};
use super::results::{Better, Case, Figure, Limit, Row, Unit};
use super::stats;

/// Something that can be measured of a contender.
#[derive(Debug)]
pub(super) struct Quantity {
    pub(super) name: &'static str,
    pub(super) unit: Unit,
    pub(super) better: Better,
    /// Whether turns go on until it is certain.
    pub(super) decides: bool,
}

impl Quantity {
    pub(super) const fn new(name: &'static str, unit: Unit, better: Better) -> Quantity {
        Quantity { name, unit, better, decides: false }
    }

    pub(super) const fn decisive(name: &'static str, unit: Unit, better: Better) -> Quantity {
        Quantity { name, unit, better, decides: true }
    }
}

/// What one turn shows of a contender.
#[derive(Debug, Default)]
pub(super) struct Readings(Vec<(&'static Quantity, f64)>);

impl Readings {
    /// Adds a sample. One that is no number is none.
    pub(super) fn add(&mut self, quantity: &'static Quantity, value: f64) {
        if value.is_finite() {
            self.0.push((quantity, value));
        }
    }
}

/// One that is measured.
pub(super) struct Contender<'a> {
    pub(super) case: Case,
    /// The index of the contender that is its limit, and what that is called.
    pub(super) limit: Option<(usize, &'static str)>,
    #[allow(clippy::type_complexity, reason = "a closure")]
    pub(super) measure: Box<dyn FnMut(&mut Readings) -> Result<(), BenchError> + 'a>,
}

/// How long turns go on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// Turns at least.
    pub(super) least: usize,
    /// Turns at most.
    pub(super) most: usize,
    /// No turn but the least begins after this.
    pub(super) time: Duration,
    /// The standard error of a median that is certain enough, as a part of it.
    pub(super) certain: f64,
}

/// What turned out in one turn, by quantity.
type Turn = Vec<(&'static Quantity, Vec<f64>)>;

/// Measures `contenders` in turns. One that cannot be measured has no row, and `fails` hears why. Interrupted, it returns what
/// has been measured until then.
pub(super) fn in_turns(
    mut contenders: Vec<Contender<'_>>,
    effort: Effort,
    progress: &Progress,
    interrupt: &Interrupt,
    mut fails: impl FnMut(&Case, &BenchError),
) -> Vec<Row> {
    let mut turns: Vec<Vec<Turn>> = contenders.iter().map(|_| Vec::new()).collect();
    let mut failed = vec![false; contenders.len()];
    let began = Instant::now();
    for turn in 0..effort.most {
        for (index, contender) in contenders.iter_mut().enumerate() {
            if failed[index] || interrupt.seen() {
                continue;
            }
            progress.at(&contender.case);
            let mut readings = Readings::default();
            match (contender.measure)(&mut readings) {
                Ok(()) => turns[index].push(by_quantity(readings)),
                // Whoever ends the run may have ended what it was about, too.
                Err(_) if interrupt.seen() => {}
                Err(error) => {
                    failed[index] = true;
                    fails(&contender.case, &error);
                }
            }
        }
        let certain = || {
            let mut samples = turns.iter().flat_map(|turns| decisive(turns));
            samples.all(|samples| stats::uncertainty(&samples) <= effort.certain)
        };
        let enough = turn + 1 >= effort.least && (began.elapsed() > effort.time || certain());
        if enough || interrupt.seen() {
            break;
        }
    }
    let row = |(index, contender): (usize, &Contender<'_>)| {
        let limit = contender.limit.map(|(limit, name)| (turns[limit].as_slice(), name));
        let figures = figures(&turns[index], limit);
        let yardstick = contenders.iter().any(|other| other.limit.is_some_and(|(limit, _)| limit == index));
        (!figures.is_empty()).then(|| Row { case: contender.case.clone(), yardstick, figures })
    };
    contenders.iter().enumerate().filter_map(row).collect()
}

fn by_quantity(readings: Readings) -> Turn {
    let mut turn = Turn::new();
    for (quantity, value) in readings.0 {
        match turn.iter_mut().find(|(known, _)| std::ptr::eq(*known, quantity)) {
            Some((_, samples)) => samples.push(value),
            None => turn.push((quantity, vec![value])),
        }
    }
    turn
}

/// The samples of each decisive quantity.
fn decisive(turns: &[Turn]) -> Vec<Vec<f64>> {
    quantities(turns)
        .into_iter()
        .filter(|quantity| quantity.decides)
        .map(|quantity| samples(turns, quantity))
        .collect()
}

/// In the order in which they came.
fn quantities(turns: &[Turn]) -> Vec<&'static Quantity> {
    let mut found: Vec<&'static Quantity> = Vec::new();
    for (quantity, _) in turns.iter().flatten() {
        if !found.iter().any(|known| std::ptr::eq(*known, *quantity)) {
            found.push(quantity);
        }
    }
    found
}

fn samples(turns: &[Turn], quantity: &Quantity) -> Vec<f64> {
    turns.iter().flat_map(|turn| in_turn(turn, quantity)).copied().collect()
}

fn in_turn<'a>(turn: &'a Turn, quantity: &Quantity) -> &'a [f64] {
    turn.iter().find(|(known, _)| std::ptr::eq(*known, quantity)).map_or(&[], |(_, samples)| samples)
}

fn figures(turns: &[Turn], limit: Option<(&[Turn], &str)>) -> Vec<Figure> {
    let mut figures = Vec::new();
    for quantity in quantities(turns) {
        let mut figure = Figure::of(quantity.name, quantity.unit, quantity.better, samples(turns, quantity));
        figure.limit = limit.and_then(|(limit, name)| bound(turns, limit, name, quantity));
        figures.push(figure);
    }
    figures
}

/// What a quantity is to the same of its limit, turn by turn.
fn bound(turns: &[Turn], limit: &[Turn], name: &str, quantity: &Quantity) -> Option<Limit> {
    let ratios: Vec<f64> = turns
        .iter()
        .zip(limit)
        .filter_map(|(turn, limit)| {
            let ratio = stats::median(in_turn(turn, quantity)) / stats::median(in_turn(limit, quantity));
            ratio.is_finite().then_some(ratio)
        })
        .collect();
    if ratios.is_empty() {
        return None;
    }
    let median = stats::median(&samples(limit, quantity));
    Some(Limit { name: name.to_owned(), median, ratio: stats::median(&ratios) })
}

#[cfg(test)]
mod tests {
    use super::*;

    static TIME: Quantity = Quantity::decisive("time", Unit::Ms, Better::Lower);

    const EFFORT: Effort = Effort { least: 2, most: 9, time: Duration::from_secs(60), certain: 0.02 };

    fn contender<'a>(
        name: &str,
        limit: Option<(usize, &'static str)>,
        mut next: impl FnMut() -> Option<f64> + 'a,
    ) -> Contender<'a> {
        let measure = move |readings: &mut Readings| match next() {
            Some(value) => {
                readings.add(&TIME, value);
                Ok(())
            }
            None => Err(BenchError::Guest("it does not".into())),
        };
        Contender { case: Case::of(&[("who", name)]), limit, measure: Box::new(measure) }
    }

    #[test]
    fn a_slow_minute_is_everybodys() {
        // The host gets slower and slower; the one always takes twice as long as the other.
        let slowness = |factor: f64| {
            let mut turn = 0.0;
            move || {
                turn += 1.0;
                Some(factor * turn)
            }
        };
        let contenders = vec![
            contender("limit", None, slowness(1.0)),
            contender("ours", Some((0, "the limit")), slowness(2.0)),
        ];
        let rows = in_turns(contenders, EFFORT, &Progress::silent(), &Interrupt::never(), |_, _| panic!());
        let figure = rows[1].figure("time").unwrap();
        assert_eq!(figure.samples.len(), 9);
        assert!(figure.noisy);
        assert_eq!(figure.limit, Some(Limit { name: "the limit".into(), median: 5.0, ratio: 2.0 }));
        assert_eq!(rows[0].figures[0].limit, None);
        assert!(rows[0].yardstick && !rows[1].yardstick);
    }

    #[test]
    fn turns_end_when_all_is_certain() {
        let steady = vec![contender("steady", None, || Some(3.0))];
        let rows = in_turns(steady, EFFORT, &Progress::silent(), &Interrupt::never(), |_, _| panic!());
        assert_eq!(rows[0].figures[0].samples, [3.0; 2]);
    }

    #[test]
    fn who_fails_is_left_out_and_the_others_go_on() {
        let mut left = 1;
        let fails = contender("fails", None, move || {
            left -= 1;
            (left >= 0).then_some(1.0)
        });
        let (mut heard, none) = (Vec::new(), contender("never", None, || None));
        let contenders = vec![fails, none, contender("goes on", None, || Some(1.0))];
        let rows = in_turns(contenders, EFFORT, &Progress::silent(), &Interrupt::never(), |case, _| {
            heard.push(case.get("who").to_owned());
        });
        assert_eq!(heard, ["never", "fails"]);
        // What the first one showed before is true.
        let seen: Vec<_> =
            rows.iter().map(|row| (row.case.get("who"), row.figures[0].samples.len())).collect();
        assert_eq!(seen, [("fails", 1), ("goes on", 2)]);
    }

    #[test]
    fn what_was_measured_before_an_interruption_is_kept() {
        let interrupt = Interrupt::never();
        let first = contender("first", None, || {
            interrupt.ask();
            Some(1.0)
        });
        let rows = in_turns(
            vec![first, contender("second", None, || panic!("it is over"))],
            EFFORT,
            &Progress::silent(),
            &interrupt,
            |_, _| panic!(),
        );
        assert_eq!(rows.len(), 1);
    }
}
