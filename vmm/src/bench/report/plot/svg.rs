//! A picture as SVG: the few shapes that plots are made of, with their looks by class (`style.css`).
//!
//! No coordinate is ever anything but a number in bounds, and no text is markup.

use std::fmt::Write;

use super::STYLE;
use crate::bench::report::markup::escape;

/// Sizes of letters, as in `style.css`.
pub(super) const TEXT: f64 = 13.0;
pub(super) const TITLE: f64 = 15.0;
pub(super) const SMALL: f64 = 12.0;

/// A picture that is being drawn, or was.
#[derive(Debug)]
pub(in crate::bench::report) struct Svg {
    width: f64,
    height: f64,
    label: String,
    body: String,
    /// Where in the body an element ends that has a tip, and its tag.
    tips: Vec<(usize, &'static str, String)>,
}

// Writing to a string does not fail.
impl Svg {
    /// An empty one; `label` is read to those who do not see it.
    pub(super) fn new(width: f64, height: f64, label: &str) -> Svg {
        let mut svg = Svg { width, height, label: label.to_owned(), body: String::new(), tips: Vec::new() };
        svg.rect("paper", 0.0, 0.0, width, height, None);
        svg
    }

    pub(in crate::bench::report) fn label(&self) -> &str {
        &self.label
    }

    /// Begins a group.
    pub(super) fn open(&mut self, class: &str) {
        let _ = writeln!(self.body, "<g class=\"{class}\">");
    }

    /// Ends the last group that began.
    pub(super) fn close(&mut self) {
        self.body += "</g>\n";
    }

    /// Stands on `y`; where `x` is of it, the class says: `e` its end, `m` its middle.
    pub(super) fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        let (x, y, text) = (coordinate(x), coordinate(y), escape(text));
        let _ = writeln!(self.body, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>");
    }

    /// With a `tip` for those who point at it.
    pub(super) fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64, tip: Option<&str>) {
        let (x, y) = (coordinate(x), coordinate(y));
        let (width, height) = (coordinate(width.max(0.0)), coordinate(height.max(0.0)));
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\""
        );
        self.end("rect", tip);
    }

    /// Nothing, if the path is empty.
    pub(super) fn path(&mut self, class: &str, path: &Path, tip: Option<&str>) {
        if path.0.is_empty() {
            return;
        }
        let _ = write!(self.body, "<path class=\"{class}\" d=\"{}\"", path.0);
        self.end("path", tip);
    }

    fn end(&mut self, tag: &'static str, tip: Option<&str>) {
        if let Some(tip) = tip {
            self.tips.push((self.body.len(), tag, tip.to_owned()));
        }
        self.body += "/>\n";
    }

    /// As a file of its own, without tips: those who point at a picture in a page do not reach what is in it.
    pub(in crate::bench::report) fn file(&self) -> String {
        self.with(&format!("<style>\n{STYLE}</style>\n{}", self.body)) + "\n"
    }

    /// As a part of a page that has [`STYLE`].
    pub(in crate::bench::report) fn inline(&self) -> String {
        let (mut body, mut rest) = (String::new(), self.body.as_str());
        for (end, tag, tip) in &self.tips {
            let done = self.body.len() - rest.len();
            let Some((before, after)) = rest.split_at_checked(end.saturating_sub(done)) else { continue };
            let _ = write!(body, "{before}><title>{}</title></{tag}>", escape(tip));
            rest = after.strip_prefix("/>").unwrap_or(after);
        }
        body += rest;
        self.with(&body)
    }

    fn with(&self, body: &str) -> String {
        let (width, height) = (coordinate(self.width), coordinate(self.height));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{}\">\n{body}</svg>",
            escape(&self.label),
        )
    }
}

/// A line, or several.
#[derive(Debug, Default)]
pub(super) struct Path(String);

impl Path {
    /// From each of these to the next.
    pub(super) fn through(corners: &[(f64, f64)]) -> Path {
        corners.iter().enumerate().fold(Path::default(), |path, (index, &(x, y))| {
            if index == 0 { path.from(x, y) } else { path.to(x, y) }
        })
    }

    /// Puts the pen down elsewhere.
    pub(super) fn from(mut self, x: f64, y: f64) -> Path {
        let _ = write!(self.0, "M{} {}", coordinate(x), coordinate(y));
        self
    }

    pub(super) fn to(mut self, x: f64, y: f64) -> Path {
        let _ = write!(self.0, "L{} {}", coordinate(x), coordinate(y));
        self
    }

    /// Goes on as `steps` say, in SVG's own terms and from where the pen is.
    pub(super) fn on(mut self, steps: &str) -> Path {
        self.0 += steps;
        self
    }
}

/// A tenth of a pixel is enough. What is no number should not come here, and is not passed on.
fn coordinate(value: f64) -> String {
    let value = if value.is_finite() { value.clamp(-1e5, 1e5) } else { 0.0 };
    let text = format!("{value:.1}");
    text.strip_suffix(".0").unwrap_or(&text).to_owned()
}

/// What `text` takes, or a little more.
pub(super) fn width(text: &str, size: f64) -> f64 {
    text.chars().map(|letter| part(letter) * size).sum()
}

/// What a letter takes as a part of its size, in the widest of the fonts that a reader may have.
fn part(letter: char) -> f64 {
    match letter {
        'i' | 'j' | 'l' | ' ' | '\u{2009}' | '.' | ',' | '-' => 0.37,
        'A'..='Z' | 'm' | 'w' | '%' | '~' | '+' | '…' => 0.86,
        letter if letter.is_ascii() => 0.64,
        _ => 1.0,
    }
}

/// As much of `text` as has room in so much.
pub(super) fn fitting(text: &str, room: f64, size: f64) -> String {
    if width(text, size) <= room {
        return text.to_owned();
    }
    let mut left = room - part('…') * size;
    let fits = |letter: &char| {
        left -= part(*letter) * size;
        left >= 0.0
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::markup;

    #[test]
    fn whatever_is_drawn_is_a_document() {
        let mut svg = Svg::new(100.0, 50.5, "<a> & \"b\"");
        svg.open("c1");
        svg.text("e", f64::NAN, f64::INFINITY, "</text>\0");
        svg.path("line", &Path::default().from(1.0, -1e300).to(1.25, 2.0).on("h3"), Some("<tip>"));
        svg.close();
        svg.rect("bar", 0.0, 0.0, -5.0, f64::NAN, None);
        let text = svg.file();
        assert_eq!(markup::wrong(&text), None);
        assert!(text.contains("M1 -100000L1.2 2h3"), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        assert!(!text.contains("tip"), "{text}");
        let inline = svg.inline();
        assert_eq!(markup::wrong(&inline), None);
        assert!(inline.contains("h3\"><title>&lt;tip&gt;</title></path>\n</g>"), "{inline}");
        assert!(!inline.contains("<style"), "{inline}");
    }

    #[test]
    fn what_has_no_room_is_cut() {
        assert_eq!(fitting("kvm-manual", 200.0, TEXT), "kvm-manual");
        let cut = fitting("kvm-manual", 50.0, TEXT);
        assert!(cut.starts_with("kvm") && cut.ends_with('…') && width(&cut, TEXT) <= 50.0, "{cut}");
        assert_eq!(fitting("kvm", -1.0, TEXT), "…");
    }
}
