//! Drawing in pixels with fractions on plotters' SVG backend, which knows whole ones only.

use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::PlotError;
use super::font::FAMILY;

/// Backend units in one nominal pixel.
const FINE: f64 = 10.0;
/// plotters takes a font's size for its line height and divides by this.
const LINE_HEIGHT: f64 = 1.24;

/// Where text stands relative to its point.
#[derive(Clone, Copy, PartialEq)]
pub enum Anchor {
    /// The point is at the left end.
    Start,
    /// The point is in the middle.
    Middle,
    /// The point is at the right end.
    End,
}

/// How text looks.
#[derive(Clone, Copy)]
pub struct Font {
    /// Size, pixels.
    pub size: f64,
    /// Semi-bold instead of regular.
    pub bold: bool,
    /// Colour.
    pub color: RGBColor,
}

/// A marker's shape.
#[derive(Clone, Copy)]
pub enum Marker {
    /// For medians.
    Circle,
    /// For tails.
    Square,
    /// For counts.
    Triangle,
    /// On its point.
    Diamond,
    /// A triangle upside down.
    Down,
}

/// A surface of so many nominal pixels; the origin is at the top left.
pub struct Canvas<'a> {
    area: DrawingArea<SVGBackend<'a>, Shift>,
}

type Drawn = Result<(), PlotError>;

impl<'a> Canvas<'a> {
    /// Draws into `text`, on white.
    pub fn new(text: &'a mut String, width: f64, height: f64) -> Result<Self, PlotError> {
        let area =
            SVGBackend::with_string(text, (fine(width) as u32, fine(height) as u32)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        Ok(Self { area })
    }

    /// Ends the drawing.
    pub fn finish(self) -> Drawn {
        self.area.present().map_err(failed)
    }

    /// A line through points; none where they all fall on one.
    pub fn line(&self, points: &[(f64, f64)], color: RGBAColor, width: f64) -> Drawn {
        let path: Vec<_> = points.iter().map(|p| place(*p)).collect();
        if path.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        self.area.draw(&PathElement::new(path, color.stroke_width(fine(width) as u32))).map_err(failed)
    }

    /// A filled outline.
    pub fn polygon(&self, points: &[(f64, f64)], color: RGBAColor) -> Drawn {
        let path: Vec<_> = points.iter().map(|p| place(*p)).collect();
        self.area.draw(&Polygon::new(path, color.filled())).map_err(failed)
    }

    /// A marker; a hollow one is white inside.
    pub fn marker(&self, at: (f64, f64), shape: Marker, color: RGBColor, hollow: bool) -> Drawn {
        let (outer, inner) = if hollow { (color, WHITE) } else { (WHITE, color) };
        for (radius, color) in [(5.2, outer), (if hollow { 3.4 } else { 4.2 }, inner)] {
            match shape {
                Marker::Circle => {
                    let circle = Circle::new(place(at), fine(radius), color.filled());
                    self.area.draw(&circle).map_err(failed)?;
                }
                Marker::Square => {
                    let r = radius * 0.88;
                    let corners = [(-r, -r), (r, -r), (r, r), (-r, r)].map(|(x, y)| (at.0 + x, at.1 + y));
                    self.polygon(&corners, color.to_rgba())?;
                }
                Marker::Diamond => {
                    let r = radius * 1.16;
                    let corners = [(0.0, -r), (r, 0.0), (0.0, r), (-r, 0.0)];
                    self.polygon(&corners.map(|(x, y)| (at.0 + x, at.1 + y)), color.to_rgba())?;
                }
                Marker::Down => {
                    let r = radius * 1.12;
                    let corners = [(0.0, r), (r * 0.95, -r * 0.7), (-r * 0.95, -r * 0.7)];
                    self.polygon(&corners.map(|(x, y)| (at.0 + x, at.1 + y)), color.to_rgba())?;
                }
                Marker::Triangle => {
                    let r = radius * 1.12;
                    let corners = [(0.0, -r), (r * 0.95, r * 0.7), (-r * 0.95, r * 0.7)];
                    self.polygon(&corners.map(|(x, y)| (at.0 + x, at.1 + y)), color.to_rgba())?;
                }
            }
        }
        Ok(())
    }

    /// A line of text whose baseline is at the point's height.
    pub fn text(&self, text: &str, at: (f64, f64), anchor: Anchor, font: Font) -> Drawn {
        self.draw_text(text, at, anchor, font, FontTransform::None)
    }

    /// A line of text that reads upwards, centred on the point's height; its baseline is at the
    /// point's left-right place.
    pub fn text_upwards(&self, text: &str, at: (f64, f64), font: Font) -> Drawn {
        self.draw_text(text, at, Anchor::Middle, font, FontTransform::Rotate270)
    }

    fn draw_text(
        &self,
        text: &str,
        at: (f64, f64),
        anchor: Anchor,
        font: Font,
        turn: FontTransform,
    ) -> Drawn {
        let h = match anchor {
            Anchor::Start => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::End => HPos::Right,
        };
        let style = if font.bold { FontStyle::Bold } else { FontStyle::Normal };
        let style = FontDesc::new(FontFamily::Name(FAMILY), font.size * FINE * LINE_HEIGHT, style)
            .transform(turn.clone())
            .color(&font.color)
            .pos(Pos::new(h, VPos::Bottom));
        // The backend lifts the baseline of such text by half an x-height, 0.273 em in Inter.
        let lift = font.size * 0.273;
        let at = if matches!(turn, FontTransform::None) { (at.0, at.1 + lift) } else { (at.0 + lift, at.1) };
        self.area.draw(&Text::new(text.to_owned(), place(at), style)).map_err(failed)
    }
}

/// The finished text at its nominal size, with a title for readers that cannot see.
pub fn finish(text: &str, width: f64, height: f64, title: &str) -> Result<String, PlotError> {
    let end = text.find('>').ok_or_else(|| PlotError::Draw("the backend wrote no SVG".to_owned()))?;
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {} {}\">\n\
         <title>{title}</title>{}",
        fine(width),
        fine(height),
        &text[end + 1..]
    ))
}

fn fine(pixels: f64) -> i32 {
    (pixels * FINE).round() as i32
}

fn place(at: (f64, f64)) -> (i32, i32) {
    (fine(at.0), fine(at.1))
}

fn failed<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> PlotError {
    PlotError::Draw(error.to_string())
}
