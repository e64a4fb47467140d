//! What a live migration by precopy would take.

use crate::rate::{Curve, RateError, positive};

/// A precopy to be predicted: all of memory is sent while the guest runs, then in each round what was dirtied
/// in the round before, until the rest can be sent within the downtime.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Precopy {
    /// Pages of guest memory to send.
    pub pages: u64,
    /// Bytes that the link, and whoever reads the pages, move in a second.
    pub bytes_per_s: f64,
    /// Bytes that a page takes on the link: 4096 and the framing, or less when it is compressed.
    pub bytes_per_page: f64,
    /// Seconds that the guest may stand still.
    pub downtime_s: f64,
    /// Rounds after which no more are tried.
    pub max_rounds: u32,
}

/// How it would go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Whether the guest stands still no longer than it may.
    pub converges: bool,
    /// Rounds while the guest runs, the first one included.
    pub rounds: u32,
    /// Seconds from the beginning to the moment when everything was sent.
    pub total_s: f64,
    /// Those of them in which the guest stands still. Switching over comes on top.
    pub downtime_s: f64,
    /// Pages sent, those sent again counted again.
    pub pages_sent: f64,
}

impl Precopy {
    /// Predicts it for a guest that dirties as `curve` says. Give the curve of the guest *as it will run
    /// during the migration*: under a log, that is what the log measured.
    ///
    /// It stops, as migrations do, when the rest fits; and, without converging, when `max_rounds` are over or a
    /// round leaves no less than 99.9 % of what the one before had left: more rounds would not help.
    ///
    /// # Errors
    /// [`RateError::NotPositive`] for a bandwidth or page size that is none, or a downtime below zero.
    pub fn predict(&self, curve: &Curve) -> Result<Prediction, RateError> {
        let per_page = positive("the bytes that a page takes", self.bytes_per_page)?
            / positive("the bandwidth in bytes per second", self.bytes_per_s)?;
        if self.downtime_s.is_nan() || self.downtime_s < 0.0 {
            return Err(RateError::NotPositive { what: "the downtime in seconds", value: self.downtime_s });
        }
        let all = self.pages as f64;
        let (mut left, mut total, mut sent, mut rounds) = (all, 0.0, 0.0, 0);
        loop {
            let round = left * per_page;
            total += round;
            sent += left;
            rounds += 1;
            let next = curve.pages_in(round).min(all);
            let rest = next * per_page;
            let converges = rest <= self.downtime_s;
            if converges || rounds >= self.max_rounds || next >= left * 0.999 {
                return Ok(Prediction {
                    converges,
                    rounds,
                    total_s: total + rest,
                    downtime_s: rest,
                    pages_sent: sent + next,
                });
            }
            left = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rate::Point;
    use crate::rate::guest::{Guest, Writer};

    fn migration(pages: u64, pages_per_s: f64, downtime_s: f64) -> Precopy {
        Precopy {
            pages,
            bytes_per_s: pages_per_s * 4096.0,
            bytes_per_page: 4096.0,
            downtime_s,
            max_rounds: 30,
        }
    }

    /// Plays the migration with the simulated guest.
    fn play(guest: &mut Guest, precopy: Precopy) -> Prediction {
        let per_page = precopy.bytes_per_page / precopy.bytes_per_s;
        let mut played =
            Prediction { converges: false, rounds: 0, total_s: 0.0, downtime_s: 0.0, pages_sent: 0.0 };
        let mut left = precopy.pages as f64;
        loop {
            played.total_s += left * per_page;
            played.pages_sent += left;
            played.rounds += 1;
            let before = left;
            left = guest.epoch(left * per_page, 0.0).faults as f64;
            played.converges = left * per_page <= precopy.downtime_s;
            if played.converges || played.rounds >= precopy.max_rounds || left >= before * 0.999 {
                played.downtime_s = left * per_page;
                played.total_s += played.downtime_s;
                played.pages_sent += left;
                return played;
            }
        }
    }

    #[test]
    fn predictions_are_what_happens() {
        for (writer, writes_per_s, pages_per_s) in [
            (Writer::Uniform { pages: 20_000 }, 50_000.0, 100_000.0),
            (Writer::Uniform { pages: 5_000 }, 200_000.0, 100_000.0),
            (Writer::Zipf { pages: 50_000 }, 100_000.0, 60_000.0),
            (Writer::Sequential { pages: 1_000_000 }, 30_000.0, 100_000.0),
        ] {
            let mut guest = Guest::new(writer, writes_per_s, 3);
            let points: Vec<_> = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
                .map(|seconds| Point { seconds, pages: guest.epoch(seconds, 0.0).faults })
                .into();
            let curve = Curve::fit(&points).unwrap();
            let precopy = migration(100_000, pages_per_s, 0.05);
            let (predicted, played) = (precopy.predict(&curve).unwrap(), play(&mut guest, precopy));
            assert_eq!(predicted.converges, played.converges, "{writer:?}: {predicted:?} {played:?}");
            assert!(
                (predicted.total_s / played.total_s - 1.0).abs() < 0.1,
                "{writer:?}: {predicted:?} {played:?}"
            );
            if !played.converges {
                assert!((predicted.downtime_s / played.downtime_s - 1.0).abs() < 0.1, "{writer:?}");
            }
        }
    }

    #[test]
    fn bad_input_is_refused() {
        let curve = Curve::fit(&[Point { seconds: 1.0, pages: 10 }]).unwrap();
        for (bandwidth, downtime) in [(0.0, 1.0), (f64::NAN, 1.0), (1.0, -1.0), (1.0, f64::NAN)] {
            assert!(migration(100, bandwidth, downtime).predict(&curve).is_err());
        }
        let idle = Curve::fit(&[Point { seconds: 1.0, pages: 0 }]).unwrap();
        let prediction = migration(100, 10.0, 0.0).predict(&idle).unwrap();
        assert_eq!((prediction.converges, prediction.rounds, prediction.total_s), (true, 1, 10.0));
        let nothing = migration(0, 10.0, 0.0).predict(&idle).unwrap();
        assert_eq!((nothing.converges, nothing.total_s), (true, 0.0));
    }

    proptest! {
        #[test]
        fn predictions_end_and_add_up(
            pages in 0..1u64 << 30,
            pages_per_s in 1.0..1e7f64,
            downtime in 0.0..2.0f64,
            points in prop::collection::vec((1e-3..10.0f64, 0..1u64 << 24), 1..6),
        ) {
            let points: Vec<_> = points.into_iter().map(|(seconds, pages)| Point { seconds, pages }).collect();
            let curve = Curve::fit(&points).unwrap();
            let precopy = migration(pages, pages_per_s, downtime);
            let prediction = precopy.predict(&curve).unwrap();
            prop_assert!(prediction.rounds <= 30);
            prop_assert_eq!(prediction.converges, prediction.downtime_s <= downtime);
            prop_assert!((prediction.pages_sent / pages_per_s - prediction.total_s).abs() <= 1e-6 * prediction.total_s);
            prop_assert!(prediction.pages_sent >= pages as f64);
            let faster = Precopy { bytes_per_s: precopy.bytes_per_s * 2.0, ..precopy };
            let faster = faster.predict(&curve).unwrap();
            prop_assert!(faster.converges || !prediction.converges);
        }
    }
}
