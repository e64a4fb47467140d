//! The picture as PNG.

use std::convert::Infallible;
use std::io;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::{FONT_7X14, FONT_10X20};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::text::{Alignment, Text};

use super::canvas::{Anchor, Canvas, Colour};

pub(super) struct Png {
    width: u32,
    height: u32,
    /// Three bytes a pixel.
    pixels: Vec<u8>,
}

impl Png {
    pub(super) fn new(width: u32, height: u32) -> Png {
        Png { width, height, pixels: vec![0; (width * height * 3) as usize] }
    }

    fn set(&mut self, x: i32, y: i32, Colour(red, green, blue): Colour) {
        if (0..self.width as i32).contains(&x) && (0..self.height as i32).contains(&y) {
            let at = (y as usize * self.width as usize + x as usize) * 3;
            self.pixels[at..at + 3].copy_from_slice(&[red, green, blue]);
        }
    }

    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = ::png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(::png::ColorType::Rgb);
        encoder.set_depth(::png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(io::Error::other)?;
        writer.write_image_data(&self.pixels).map_err(io::Error::other)?;
        writer.finish().map_err(io::Error::other)?;
        Ok(bytes)
    }
}

impl OriginDimensions for Png {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Png {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            self.set(at.x, at.y, Colour(colour.r(), colour.g(), colour.b()));
        }
        Ok(())
    }
}

impl Canvas for Png {
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: Colour) {
        let at = |place: f64| place.round() as i32;
        for row in at(y)..at(y + height) {
            for column in at(x)..at(x + width) {
                self.set(column, row, colour);
            }
        }
    }

    fn line(&mut self, from_x: f64, y: f64, to_x: f64, colour: Colour) {
        for x in (from_x as i32..to_x as i32).filter(|x| x / 4 % 2 == 0) {
            self.set(x, y.round() as i32, colour);
        }
    }

    fn text(&mut self, x: f64, y: f64, anchor: Anchor, size: u32, colour: Colour, text: &str) {
        let font = if size > 14 { &FONT_10X20 } else { &FONT_7X14 };
        let style = MonoTextStyle::new(font, Rgb888::new(colour.0, colour.1, colour.2));
        let alignment = match anchor {
            Anchor::Start => Alignment::Left,
            Anchor::Middle => Alignment::Center,
            Anchor::End => Alignment::Right,
        };
        let at = Point::new(x.round() as i32, y.round() as i32);
        let Ok(_) = Text::with_alignment(text, at, style, alignment).draw(self);
    }
}
