//! What a picture is drawn on. The origin is at the top left, a unit is a pixel.

/// Red, green, blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Colour(pub(super) u8, pub(super) u8, pub(super) u8);

impl Colour {
    /// The colour `share` of the way to `other`.
    pub(super) fn towards(self, other: Colour, share: f64) -> Colour {
        let mix =
            |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * share).round() as u8;
        Colour(mix(self.0, other.0), mix(self.1, other.1), mix(self.2, other.2))
    }
}

/// Which part of a text is at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

pub(super) trait Canvas {
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: Colour);
    /// A dashed horizontal line.
    fn line(&mut self, from_x: f64, y: f64, to_x: f64, colour: Colour);
    /// `y` is where the text stands, `size` the height of its letters' box: 14 or 20.
    fn text(&mut self, x: f64, y: f64, anchor: Anchor, size: u32, colour: Colour, text: &str);
}
