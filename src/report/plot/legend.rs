//! What the marks mean, in a row above the panels where no data is.

use plotters::style::{Color as _, RGBColor};

use super::PlotError;
use super::canvas::{Anchor, Canvas, Font, Marker};
use super::data::{Curve, Data, Notes, Quantity};
use super::font::text_width;
use super::render::{INK, look};
use crate::report::results::Source;

const SIZE: f64 = 12.0;
const LINE: f64 = 24.0;
const POINT: f64 = 11.0;
const INDENT: f64 = 6.0;
const GAP: f64 = 20.0;
const ROW: f64 = 19.0;

/// One mark and its meaning.
pub struct Entry {
    mark: Mark,
    text: String,
    width: f64,
}

enum Mark {
    Measured(Marker, RGBColor),
    Simulated(RGBColor),
    Hollow,
    None,
}

impl Mark {
    /// Width in pixels.
    fn width(&self) -> f64 {
        match self {
            Self::Measured(..) | Self::Hollow => POINT,
            Self::Simulated(_) => LINE,
            Self::None => 0.0,
        }
    }

    /// From the mark's left end to its text.
    fn indent(&self) -> f64 {
        if matches!(self, Self::None) { 0.0 } else { self.width() + INDENT }
    }
}

/// Entries broken into rows.
pub struct Legend {
    rows: Vec<Vec<Entry>>,
}

impl Legend {
    /// Of all marks that `data` has, in rows of at most `width` pixels.
    pub fn new(data: &Data, width: f64) -> Result<Self, PlotError> {
        let curves: Vec<&Curve> = data.panels.iter().flat_map(|p| &p.curves).collect();
        let mut marks = Vec::new();
        for (quantity, name) in [(Quantity::Median, "median"), (Quantity::P99, "p99")] {
            for source in [Source::Measured, Source::Simulated] {
                if curves.iter().any(|c| c.quantity == quantity && c.source == source) {
                    let (color, marker) = look(quantity);
                    let mark = match source {
                        Source::Measured => Mark::Measured(marker, color),
                        Source::Simulated => Mark::Simulated(color),
                    };
                    marks.push((mark, format!("{name}, {source}")));
                }
            }
        }
        if curves.iter().any(|c| c.source == Source::Measured && c.points.iter().any(|p| p.saturated)) {
            marks.push((Mark::Hollow, "rate above 0.95 of saturation".to_owned()));
        }
        marks.extend(notes(&data.notes).into_iter().map(|text| (Mark::None, text)));
        let mut rows: Vec<Vec<Entry>> = Vec::new();
        let mut used = f64::INFINITY;
        for (mark, text) in marks {
            let entry = Entry { width: mark.indent() + text_width(&text, SIZE, false)?, mark, text };
            if used + entry.width > width {
                rows.push(Vec::new());
                used = 0.0;
            }
            used += entry.width + GAP;
            if let Some(row) = rows.last_mut() {
                row.push(entry);
            }
        }
        Ok(Self { rows })
    }

    /// Height in pixels.
    pub fn height(&self) -> f64 {
        self.rows.len() as f64 * ROW
    }

    /// Draws it with its top left corner at a point.
    pub fn draw(&self, canvas: &Canvas<'_>, (left, top): (f64, f64)) -> Result<(), PlotError> {
        for (i, row) in self.rows.iter().enumerate() {
            let base = top + i as f64 * ROW + 13.0;
            let middle = base - SIZE * 0.36;
            let mut x = left;
            for entry in row {
                let at = (x + entry.mark.width() / 2.0, middle);
                match entry.mark {
                    Mark::Measured(marker, color) => {
                        let bar = color.to_rgba();
                        canvas.line(&[(at.0, middle - 7.5), (at.0, middle + 7.5)], bar, 1.3)?;
                        canvas.marker(at, marker, color, false)?;
                    }
                    Mark::Simulated(color) => {
                        canvas.line(&[(x, middle), (x + LINE, middle)], color.to_rgba(), 2.0)?;
                    }
                    Mark::Hollow => canvas.marker(at, Marker::Circle, INK, true)?,
                    Mark::None => {}
                }
                let font = Font { size: SIZE, bold: false, color: INK };
                canvas.text(&entry.text, (x + entry.mark.indent(), base), Anchor::Start, font)?;
                x += entry.width + GAP;
            }
        }
        Ok(())
    }
}

/// What bars and bands are, in words.
fn notes(notes: &Notes) -> Vec<String> {
    let count = |runs: &std::collections::BTreeSet<usize>| match (runs.first(), runs.last()) {
        (Some(a), Some(b)) if a == b => format!("{a}"),
        (Some(a), Some(b)) => format!("{a}–{b}"),
        _ => String::new(),
    };
    let mut texts = Vec::new();
    match notes.measured_runs.last() {
        Some(3..) => {
            texts.push(format!("bars: 95 % interval of the mean of {} runs", count(&notes.measured_runs)))
        }
        Some(_) => texts.push("bars: range of 2 runs".to_owned()),
        None => {}
    }
    if notes.within_run {
        texts.push("bars: 95 % interval within one run".to_owned());
    }
    if notes.simulated_runs.last().is_some_and(|n| *n > 1) {
        texts.push(format!("band: range of {} simulated runs", count(&notes.simulated_runs)));
    }
    texts
}
