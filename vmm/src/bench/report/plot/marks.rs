//! How contenders are told apart: by colours that differ for those who do not see red or green, and by shapes for everyone
//! else's doubts. A contender looks the same in all plots.

/// Colours in `style.css`.
const COLOURS: usize = 8;

/// Paths about a point. There is one less than colours, so that few contenders share both.
const SHAPES: [&str; COLOURS - 1] = [
    "m-4 0a4 4 0 1 0 8 0 4 4 0 1 0-8 0z",
    "m-3.7-3.7h7.4v7.4h-7.4z",
    "m0-5 4.8 8.3h-9.6z",
    "m0-5.2 5.2 5.2-5.2 5.2-5.2-5.2z",
    "m0 5 4.8-8.3h-9.6z",
    "m-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "m0-5 4.8 3.5-1.8 5.6h-6l-1.8-5.6z",
];

/// How much room a mark takes to each side.
pub(super) const RADIUS: f64 = 5.2;

/// The looks of a contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(usize);

impl Mark {
    /// Of the contender with this number.
    pub(super) fn of(number: usize) -> Mark {
        Mark(number)
    }

    /// Its class.
    pub(super) fn colour(self) -> String {
        format!("c{}", self.0 % COLOURS)
    }

    /// The class of its line, which tells those apart that share a colour.
    pub(super) fn line(self) -> &'static str {
        if (self.0 / COLOURS).is_multiple_of(2) { "line" } else { "line again" }
    }

    /// Steps about its place.
    pub(super) fn shape(self) -> &'static str {
        SHAPES.get(self.0 % SHAPES.len()).copied().unwrap_or_default()
    }
}

/// The class of a point.
pub(super) fn point(noisy: bool) -> &'static str {
    if noisy { "point noisy" } else { "point" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_contenders_look_different() {
        let looks: Vec<_> =
            (0..56).map(|number| (Mark::of(number).colour(), Mark::of(number).shape())).collect();
        for (index, look) in looks.iter().enumerate() {
            assert!(!looks[..index].contains(look), "{look:?}");
        }
        for colour in 0..COLOURS {
            assert_eq!(super::super::STYLE.matches(&format!(".c{colour}")).count(), 2);
        }
    }
}
