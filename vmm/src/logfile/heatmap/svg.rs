//! The picture as SVG.

use std::fmt::Write;

use super::canvas::{Anchor, Canvas, Colour};

pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Svg {
        Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"system-ui, sans-serif\">\n<g shape-rendering=\"crispEdges\">\n"
        ))
    }

    pub(super) fn finish(self) -> String {
        self.0 + "</g>\n</svg>\n"
    }
}

fn hex(Colour(red, green, blue): Colour) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

// Writing to a string does not fail.
impl Canvas for Svg {
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: Colour) {
        let fill = hex(colour);
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>"
        );
    }

    fn line(&mut self, from_x: f64, y: f64, to_x: f64, colour: Colour) {
        let stroke = hex(colour);
        let _ = writeln!(
            self.0,
            "<line x1=\"{from_x:.1}\" y1=\"{y:.1}\" x2=\"{to_x:.1}\" y2=\"{y:.1}\" stroke=\"{stroke}\" \
             stroke-dasharray=\"4 4\"/>"
        );
    }

    fn text(&mut self, x: f64, y: f64, anchor: Anchor, size: u32, colour: Colour, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        // The name of a tracker comes from the log.
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let fill = hex(colour);
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{text}</text>"
        );
    }
}
