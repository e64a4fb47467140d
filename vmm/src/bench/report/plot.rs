//! The pictures of a report: which there are, and what they are called. One that would be empty is not drawn.

mod axis;
mod bars;
mod cost;
mod dirty;
mod frame;
mod frontier;
mod marks;
mod svg;
mod timeline;

use self::svg::Svg;
use crate::bench::results::Results;

/// How all plots look; a page that shows them inline needs it once.
pub(super) const STYLE: &str = include_str!("plot/style.css");

/// A picture.
#[derive(Debug)]
pub(super) struct Plot {
    /// The name of its file.
    pub file: String,
    pub svg: Svg,
}

/// All for which there are figures.
pub(super) fn all(results: &Results) -> Vec<Plot> {
    let mut plots: Vec<Plot> = Vec::new();
    let drawn =
        cost::plots(results).into_iter().chain(frontier::plots(results)).chain(timeline::plots(results));
    for (name, svg) in drawn {
        let name = slug(&name);
        // Different backings may well have the same name in a file.
        let taken = |file: &String| plots.iter().any(|plot| plot.file == *file);
        let names =
            std::iter::once(format!("{name}.svg")).chain((2..).map(|more| format!("{name}-{more}.svg")));
        let file = names.into_iter().find(|file| !taken(file)).unwrap_or_default();
        plots.push(Plot { file, svg });
    }
    plots
}

/// Letters of a file's name, which has an end and may have a number.
const LONGEST: usize = 60;

/// A name for a file, which needs no quoting anywhere.
fn slug(name: &str) -> String {
    let letters = name.chars().map(|letter| match letter.to_ascii_lowercase() {
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '-',
    });
    let name = letters.take(LONGEST).collect::<String>();
    name.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

/// What can be drawn: nothing that is no number, and nothing that no machine measures.
fn drawable(value: f64) -> Option<f64> {
    (value.is_finite() && value.abs() <= 1e12).then_some(if value.abs() < 1e-9 { 0.0 } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{markup, sample};

    #[test]
    fn pictures_are_well_formed_and_small_and_hold_only_numbers() {
        for results in [sample::realistic(), sample::odd()] {
            let plots = all(&results);
            assert!(plots.len() > 4);
            for Plot { file, svg } in plots {
                let text = svg.file();
                assert_eq!(markup::wrong(&text), None, "{file}");
                assert!(text.starts_with("<svg xmlns=") && text.ends_with("</svg>\n"), "{file}");
                assert!(!text.contains("NaN") && !text.contains("inf"), "{file}: {text}");
                assert!(!text.contains("<script"), "{file}");
                assert!(text.len() < 16 << 10, "{file} takes {} bytes", text.len());
            }
        }
        assert!(all(&sample::empty()).is_empty());
    }

    #[test]
    fn files_have_different_and_tame_names() {
        let results = sample::odd();
        let mut names: Vec<_> = all(&results).into_iter().map(|plot| plot.file).collect();
        assert!(
            names.iter().all(|name| name
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-.".contains(letter)))
        );
        let many = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), many);
        assert_eq!(slug(&"x".repeat(1000)).len(), LONGEST);
        assert_eq!(slug("../First write,\n2 MiB"), "first-write-2-mib");
    }

    #[test]
    fn only_numbers_are_drawn() {
        assert_eq!(drawable(1.5), Some(1.5));
        assert_eq!(drawable(-1e-300), Some(0.0));
        for bad in [f64::NAN, f64::INFINITY, f64::MIN, 1e13] {
            assert_eq!(drawable(bad), None);
        }
    }
}
