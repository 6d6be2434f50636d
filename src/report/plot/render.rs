//! Where everything stands and what colour it has.

use plotters::style::{Color as _, RGBColor};

use super::axis::{Scale, number, seconds};
use super::canvas::{self, Anchor, Canvas, Font, Marker};
use super::data::{Curve, Data, Panel, Point, Quantity};
use super::font::text_width;
use super::legend::Legend;
use super::page::Page;
use super::{Options, PlotError};
use crate::report::results::Source;

/// Text and hollow marks.
pub const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(super) const FAINT_INK: RGBColor = RGBColor(0x66, 0x66, 0x66);
pub(super) const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
pub(super) const AXIS: RGBColor = RGBColor(0x99, 0x99, 0x99);

/// Colours that people with any kind of colour vision tell apart (Okabe and Ito 2008), and shapes
/// that survive a grey printer.
pub fn look(quantity: Quantity) -> (RGBColor, Marker) {
    match quantity {
        Quantity::Median => (RGBColor(0x00, 0x72, 0xb2), Marker::Circle),
        Quantity::P99 => (RGBColor(0xd5, 0x5e, 0x00), Marker::Square),
        Quantity::Swaps => (RGBColor(0x00, 0x9e, 0x73), Marker::Triangle),
    }
}

pub(super) const MARGIN: f64 = 24.0;
/// Left of a row of panels: the axis title and tick labels.
pub(super) const GUTTER: f64 = 66.0;
const PANEL_GAP: f64 = 26.0;
const TTFT_HEIGHT: f64 = 290.0;
const SWAPS_HEIGHT: f64 = 84.0;
const BETWEEN: f64 = 18.0;
/// Below a row of panels: tick labels.
const FOOT: f64 = 26.0;
/// Tick labels nearer than this to the last one are left out, pixels.
const LABEL_ROOM: f64 = 6.0;

/// A vertical axis' title, and how its ticks are written.
pub(super) type Labels = (&'static str, fn(f64) -> String);

/// A rectangle in pixels.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

impl Frame {
    pub fn bottom(self) -> f64 {
        self.top + self.height
    }
}

/// Draws the whole figure.
pub fn svg(data: &Data, options: &Options) -> Result<String, PlotError> {
    let columns = match data.panels.len() {
        n @ 1..=3 => n,
        4 => 2,
        _ => 3,
    };
    let rows = data.panels.len().div_ceil(columns);
    let panel_width = [620.0, 400.0, 320.0][columns - 1];
    let inner = GUTTER + columns as f64 * panel_width + (columns - 1) as f64 * PANEL_GAP;
    let width = inner + 2.0 * MARGIN;

    let title = options.title.clone().unwrap_or_else(|| "Time to first token over adapter slots".to_owned());
    let page = Page::new(&title, &data.shared, options, inner)?;
    let legend = Legend::new(data, inner)?;
    let with_swaps = data.panels.iter().flat_map(|p| &p.curves).any(|c| c.quantity == Quantity::Swaps);
    let label_height = if data.panels.len() > 1 { 24.0 } else { 4.0 };
    let swaps_height = if with_swaps { BETWEEN + SWAPS_HEIGHT } else { 0.0 };
    let row_height = label_height + TTFT_HEIGHT + swaps_height + FOOT;
    let header = page.head_height() + legend.height() + 20.0;
    let grid_height = rows as f64 * row_height + (rows - 1) as f64 * 14.0;
    let height = (MARGIN + header + grid_height + page.foot_height() + MARGIN * 0.7).ceil();

    let mut text = String::new();
    let canvas = Canvas::new(&mut text, width, height)?;
    legend.draw(&canvas, (MARGIN, page.draw_head(&canvas)?))?;
    let y = MARGIN + header;

    let axes = Axes::new(data);
    for (i, panel) in data.panels.iter().enumerate() {
        let (column, row) = (i % columns, i / columns);
        let left = MARGIN + GUTTER + column as f64 * (panel_width + PANEL_GAP);
        let top = y + row as f64 * (row_height + 14.0);
        if !panel.label.is_empty() {
            let font = Font { size: 13.0, bold: true, color: INK };
            canvas.text(&panel.label, (left, top + 13.0), Anchor::Start, font)?;
        }
        let ttft = Frame { left, top: top + label_height, width: panel_width, height: TTFT_HEIGHT };
        axes.draw_panel(&canvas, panel, ttft, column == 0, with_swaps)?;
    }
    page.draw_foot(&canvas, y + grid_height)?;
    canvas.finish()?;
    canvas::finish(&text, width, height, &title)
}

/// The scales that all panels share.
pub(super) struct Axes<'a> {
    budgets: &'a [u32],
    pub ttft: Scale,
    swaps: Scale,
}

impl<'a> Axes<'a> {
    fn new(data: &'a Data) -> Self {
        let points = |swaps: bool| {
            let curves = data.panels.iter().flat_map(|p| &p.curves);
            curves.filter(move |c| (c.quantity == Quantity::Swaps) == swaps).flat_map(|c| &c.points)
        };
        // An interval's lower end far below its point would stretch a logarithmic axis for nothing.
        let extent = |p: &Point| {
            let (low, high) = p.interval.map_or((p.value, p.value), |i| (i.low.max(p.value / 3.0), i.high));
            [p.value, low, high]
        };
        Self {
            budgets: &data.budgets,
            ttft: Scale::covering(points(false).flat_map(extent), true, 5),
            swaps: Scale::covering(points(true).flat_map(extent), false, 4),
        }
    }

    /// Those of a figure without swaps.
    pub fn of(budgets: &'a [u32], ttft: Scale) -> Self {
        Self { budgets, ttft, swaps: Scale::covering(std::iter::empty(), false, 1) }
    }

    fn draw_panel(
        &self,
        canvas: &Canvas<'_>,
        panel: &Panel,
        ttft: Frame,
        first: bool,
        with_swaps: bool,
    ) -> Result<(), PlotError> {
        let of = |swaps: bool| panel.curves.iter().filter(move |c| (c.quantity == Quantity::Swaps) == swaps);
        self.grid(canvas, ttft, &self.ttft, first.then_some(("time to first token", seconds as _)))?;
        let mut last = ttft;
        if with_swaps {
            last = Frame { top: ttft.bottom() + BETWEEN, height: SWAPS_HEIGHT, ..ttft };
            self.grid(canvas, last, &self.swaps, first.then_some(("swaps in a run", number as _)))?;
        }
        self.budget_labels(canvas, last)?;
        // Lines first, so that no line hides a point.
        for source in [Source::Simulated, Source::Measured] {
            for (frame, scale, swaps) in [(ttft, &self.ttft, false), (last, &self.swaps, true)] {
                for curve in of(swaps).filter(|c| c.source == source) {
                    let alone = !of(swaps).any(|c| c.quantity == curve.quantity && c.source != source);
                    self.curve(canvas, curve, frame, scale, alone)?;
                }
            }
        }
        Ok(())
    }

    pub fn x(&self, frame: Frame, budget: u32) -> f64 {
        // Half a step of air on both sides keeps markers off the frame.
        let log = |b: u32| f64::from(b.max(1)).log2();
        let (low, high) = match self.budgets {
            [] => (0.0, 1.0),
            [first, .., last] => (log(*first) - 0.35, log(*last) + 0.35),
            [only] => (log(*only) - 1.0, log(*only) + 1.0),
        };
        frame.left + (log(budget) - low) / (high - low) * frame.width
    }

    pub fn grid(
        &self,
        canvas: &Canvas<'_>,
        frame: Frame,
        scale: &Scale,
        labels: Option<Labels>,
    ) -> Result<(), PlotError> {
        for budget in self.budgets {
            let x = self.x(frame, *budget);
            canvas.line(&[(x, frame.top), (x, frame.bottom())], GRID.mix(0.6), 1.0)?;
        }
        for tick in &scale.ticks {
            let y = frame.bottom() - scale.place(*tick) * frame.height;
            canvas.line(&[(frame.left, y), (frame.left + frame.width, y)], GRID.to_rgba(), 1.0)?;
            if let Some((_, format)) = labels {
                let font = Font { size: 11.5, bold: false, color: INK };
                canvas.text(&format(*tick), (frame.left - 8.0, y + 4.2), Anchor::End, font)?;
            }
        }
        let bottom = frame.bottom();
        canvas.line(&[(frame.left, bottom), (frame.left + frame.width, bottom)], AXIS.to_rgba(), 1.0)?;
        if let Some((title, _)) = labels {
            let at = (MARGIN + 11.0, frame.top + frame.height / 2.0);
            canvas.text_upwards(title, at, Font { size: 12.5, bold: false, color: INK })?;
        }
        Ok(())
    }

    pub fn budget_labels(&self, canvas: &Canvas<'_>, frame: Frame) -> Result<(), PlotError> {
        let font = Font { size: 11.5, bold: false, color: INK };
        let mut free_from = f64::NEG_INFINITY;
        for budget in self.budgets {
            let x = self.x(frame, *budget);
            let bottom = frame.bottom();
            canvas.line(&[(x, bottom), (x, bottom + 4.0)], AXIS.to_rgba(), 1.0)?;
            let half = text_width(&budget.to_string(), font.size, false)? / 2.0;
            if x - half >= free_from {
                canvas.text(&budget.to_string(), (x, bottom + 17.0), Anchor::Middle, font)?;
                free_from = x + half + LABEL_ROOM;
            }
        }
        Ok(())
    }

    /// A simulated curve is a line, in a band where it was replicated; measured points have bars, and
    /// a thin line where no simulated curve leads the eye.
    fn curve(
        &self,
        canvas: &Canvas<'_>,
        curve: &Curve,
        frame: Frame,
        scale: &Scale,
        alone: bool,
    ) -> Result<(), PlotError> {
        let (color, marker) = look(curve.quantity);
        let y = |value: f64| frame.bottom() - scale.place(value) * frame.height;
        let at = |p: &Point| (self.x(frame, p.budget), y(p.value));
        let line: Vec<_> = curve.points.iter().map(at).collect();
        if curve.source == Source::Simulated {
            let banded: Vec<_> = curve.points.iter().filter_map(|p| Some((p, p.interval?))).collect();
            let upper = banded.iter().map(|(p, i)| (self.x(frame, p.budget), y(i.high)));
            let lower = banded.iter().rev().map(|(p, i)| (self.x(frame, p.budget), y(i.low)));
            let outline: Vec<_> = upper.chain(lower).collect();
            if banded.len() > 1 {
                canvas.polygon(&outline, color.mix(0.16))?;
            }
            canvas.line(&line, color.to_rgba(), 2.0)?;
            if let [only] = curve.points.as_slice() {
                let (x, y) = at(only);
                canvas.line(&[(x - 9.0, y), (x + 9.0, y)], color.to_rgba(), 2.0)?;
            }
            return Ok(());
        }
        if alone {
            canvas.line(&line, color.mix(0.5), 1.3)?;
        }
        for point in &curve.points {
            let (x, _) = at(point);
            if let Some(interval) = point.interval {
                let (low, high) = (y(interval.low), y(interval.high));
                canvas.line(&[(x, low), (x, high)], color.to_rgba(), 1.3)?;
                for end in [low, high] {
                    canvas.line(&[(x - 4.0, end), (x + 4.0, end)], color.to_rgba(), 1.3)?;
                }
            }
            canvas.marker(at(point), marker, color, point.saturated)?;
        }
        Ok(())
    }
}

/// Breaks `text` at `separator` into lines of at most `width` pixels; a piece that is longer by
/// itself stays whole.
pub(super) fn wrap(
    text: &str,
    separator: &str,
    width: f64,
    size: f64,
    bold: bool,
) -> Result<Vec<String>, PlotError> {
    let mut lines: Vec<String> = Vec::new();
    for piece in text.split(separator).filter(|p| !p.is_empty()) {
        if let Some(line) = lines.last_mut() {
            let longer = format!("{line}{separator}{piece}");
            if text_width(&longer, size, bold)? <= width {
                *line = longer;
                continue;
            }
        }
        lines.push(piece.to_owned());
    }
    Ok(lines)
}
