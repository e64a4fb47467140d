//! What is about the points of a plot with two axes: its titles, the axes with their round values, and where labels find
//! room.

use super::axis::Axis;
use super::svg::{self, Path, SMALL, Svg, TEXT, TITLE};

/// Width of every plot. Not much: on a small screen it is as small as that, and its letters with it.
pub(super) const WIDTH: f64 = 520.0;

/// Between the edge and what is drawn.
pub(super) const MARGIN: f64 = 12.0;

/// Where the titles end.
pub(super) const TITLES: f64 = 50.0;

/// Between an axis and the points nearest to it, so that they are whole.
const PAD: f64 = 10.0;

/// What a plot says of itself.
#[derive(Clone, Debug)]
pub(super) struct Titles {
    pub title: String,
    /// What all of it has in common.
    pub about: String,
}

impl Titles {
    /// A picture of this height with them at its top, and with what it means if something in it is `noisy`.
    pub(super) fn begin(&self, height: f64, noisy: bool) -> Svg {
        let title = &self.title;
        let about = [self.about.as_str(), if noisy { "hollow: noisy" } else { "" }];
        let about: Vec<_> = about.into_iter().filter(|part| !part.is_empty()).collect();
        let about = about.join("; ");
        let label = if about.is_empty() { title.clone() } else { format!("{title} ({about})") };
        let mut svg = Svg::new(WIDTH, height, &label);
        svg.text("title", MARGIN, 25.0, &svg::fitting(title, WIDTH - 2.0 * MARGIN, TITLE));
        if !about.is_empty() {
            svg.text("faint", MARGIN, 43.0, &svg::fitting(&about, WIDTH - 2.0 * MARGIN, SMALL));
        }
        svg
    }
}

/// An axis and what is counted along it.
#[derive(Clone, Debug)]
pub(super) struct Along {
    pub axis: Axis,
    pub title: &'static str,
}

/// Where points are.
#[derive(Debug)]
pub(super) struct Frame {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
    x: Axis,
    y: Axis,
}

impl Frame {
    /// Begins a picture with axes, `height` of which is for points, and with `beside` to the right of them.
    pub(super) fn begin(
        (titles, noisy): (&Titles, bool),
        x: Along,
        y: Along,
        height: f64,
        beside: f64,
    ) -> (Svg, Frame) {
        let ticks = y.axis.ticks();
        let widest = ticks.iter().map(|(_, text)| svg::width(text, SMALL)).fold(0.0, f64::max);
        let (left, top) = (MARGIN + widest + 8.0, TITLES + 26.0);
        let frame = Frame {
            left,
            top,
            right: (WIDTH - MARGIN - beside).max(left + 100.0),
            bottom: top + height,
            x: x.axis,
            y: y.axis,
        };
        let mut svg = titles.begin(frame.bottom + 46.0, noisy);
        svg.text("faint", MARGIN, top - 10.0, y.title);
        for (place, text) in ticks {
            let y = frame.up(place);
            svg.path("grid", &Path::default().from(left, y).to(frame.right, y), None);
            svg.text("faint e", left - 6.0, y + 4.0, &text);
        }
        for (place, text) in frame.x.ticks() {
            let x = frame.across(place);
            svg.path("axis", &Path::default().from(x, frame.bottom).to(x, frame.bottom + 4.0), None);
            svg.text("faint m", x, frame.bottom + 18.0, &text);
        }
        svg.text("faint m", f64::midpoint(left, frame.right), frame.bottom + 37.0, x.title);
        frame.axes(&mut svg);
        (svg, frame)
    }

    fn axes(&self, svg: &mut Svg) {
        let Frame { left, right, bottom, .. } = *self;
        match self.x.gap().map(|gap| self.across(gap)) {
            None => svg.path("axis", &Path::default().from(left, bottom).to(right, bottom), None),
            Some(gap) => {
                let ends = Path::default().from(left, bottom).to(gap - 3.0, bottom).from(gap + 3.0, bottom);
                let strokes = [gap - 3.0, gap + 3.0].into_iter().fold(ends.to(right, bottom), |path, x| {
                    path.from(x - 2.0, bottom + 4.0).to(x + 2.0, bottom - 4.0)
                });
                svg.path("axis", &strokes, None);
            }
        }
        if let Some(gap) = self.y.gap().map(|gap| self.up(gap)) {
            let strokes = [gap - 3.0, gap + 3.0]
                .into_iter()
                .fold(Path::default(), |path, y| path.from(left - 4.0, y + 2.0).to(left + 4.0, y - 2.0));
            svg.path("axis", &strokes, None);
        }
    }

    /// Where a value is, from the left.
    pub(super) fn x(&self, value: f64) -> f64 {
        self.across(self.x.place(value))
    }

    /// Where a value is, from the top.
    pub(super) fn y(&self, value: f64) -> f64 {
        self.up(self.y.place(value))
    }

    /// Whether something lies between these two that the axis leaves out.
    pub(super) fn apart(&self, from: f64, to: f64) -> bool {
        self.x.gap().is_some_and(|gap| (self.x.place(from) < gap) != (self.x.place(to) < gap))
    }

    fn across(&self, place: f64) -> f64 {
        self.left + PAD + place * (self.right - self.left - 2.0 * PAD)
    }

    fn up(&self, place: f64) -> f64 {
        self.bottom - PAD - place * (self.bottom - self.top - 2.0 * PAD)
    }
}

/// Places for labels that want to be at these places of a column, `gap` apart from each other at least, and between `low`
/// and `high` if there is room for them all.
pub(super) fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = wanted.iter().copied().enumerate().collect();
    order.sort_by(|(_, one), (_, other)| one.total_cmp(other));
    let mut least = low;
    for (_, place) in &mut order {
        *place = place.max(least);
        least = *place + gap;
    }
    let mut most = high;
    for (_, place) in order.iter_mut().rev() {
        *place = place.min(most);
        most = *place - gap;
    }
    order.sort_by_key(|(index, _)| *index);
    order.into_iter().map(|(_, place)| place).collect()
}

/// A rectangle that is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Taken {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

impl Taken {
    /// What is this near to a line, which goes straight across or straight up.
    pub(super) fn about(from: (f64, f64), to: (f64, f64), near: f64) -> Taken {
        Taken {
            left: from.0.min(to.0) - near,
            top: from.1.min(to.1) - near,
            right: from.0.max(to.0) + near,
            bottom: from.1.max(to.1) + near,
        }
    }

    fn over(&self, other: &Taken) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }
}

/// A place for the label `text` of what is at `x` and `y`: near to it, in the picture, and over nothing of `taken` if there
/// is such a place.
pub(super) fn beside(text: &str, x: f64, y: f64, frame: &Frame, taken: &[Taken]) -> Taken {
    let width = svg::width(text, TEXT);
    let sides = |rise: f64| {
        let aside = if rise == 0.0 { 9.0 } else { 13.0 };
        [(x + aside, y + rise), (x - aside - width, y + rise), (x - width / 2.0, y + rise)]
    };
    let rises = [0.0, -13.0, 13.0, -20.0, 20.0, -28.0, 28.0, -36.0, 36.0, -48.0, 48.0, -60.0, 60.0];
    let boxes = rises.into_iter().flat_map(sides).map(|(left, middle)| Taken {
        left,
        top: middle - 7.5,
        right: left + width,
        bottom: middle + 7.5,
    });
    let inside = |place: &Taken| {
        place.left > frame.left + 3.0
            && place.right < WIDTH - 4.0
            && place.top > frame.top - 8.0
            && place.bottom < frame.bottom - 1.0
    };
    let over = |place: &Taken| taken.iter().filter(|other| other.over(place)).count();
    let within = boxes.filter(inside);
    within.min_by_key(over).unwrap_or(Taken {
        left: (WIDTH - 4.0 - width).max(frame.left),
        top: y - 7.5,
        right: WIDTH - 4.0,
        bottom: y + 7.5,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_apart_and_in_order() {
        assert_eq!(spread(&[10.0, 50.0], 15.0, 0.0, 100.0), [10.0, 50.0]);
        assert_eq!(spread(&[50.0, 49.0, 51.0], 15.0, 0.0, 100.0), [64.0, 49.0, 79.0]);
        assert_eq!(spread(&[99.0, 98.0], 15.0, 0.0, 100.0), [100.0, 85.0]);
        assert!(spread(&[], 15.0, 0.0, 100.0).is_empty());
    }

    #[test]
    fn labels_find_a_place_of_their_own() {
        let titles = Titles { title: "t".into(), about: String::new() };
        let along = |values: &[f64]| Along { axis: Axis::linear(values), title: "x" };
        let (_, frame) = Frame::begin((&titles, false), along(&[1.0]), along(&[1.0]), 240.0, 0.0);
        let mut taken = Vec::new();
        for _ in 0..6 {
            let place = beside("kvm-manual", 300.0, 200.0, &frame, &taken);
            assert!(taken.iter().all(|other| !place.over(other)), "{place:?} {taken:?}");
            taken.push(place);
        }
        // Where there is none, it is at least in the picture.
        assert!(beside(&"x".repeat(200), 300.0, 200.0, &frame, &taken).left >= 0.0);
    }
}
