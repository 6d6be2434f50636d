//! Where everything stands and what colour it has.

use plotters::style::{Color as _, RGBColor};

use super::{Lines, Panel, Point};
use crate::report::binds::Binds;
use crate::report::plot::axis::{Scale, number, seconds};
use crate::report::plot::canvas::{self, Anchor, Canvas, Font, Marker};
use crate::report::plot::font::text_width;
use crate::report::plot::page::{Page, faint};
use crate::report::plot::render::{Axes, Frame, GUTTER, INK, MARGIN};
use crate::report::plot::{Options, PlotError};

/// From light to heavy, told apart with any kind of colour vision (Okabe and Ito 2008).
pub(super) const COLORS: [RGBColor; 5] = [
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x22, 0x22, 0x22),
];

const GAP: f64 = 22.0;
const HEIGHT: f64 = 190.0;
const LABEL: f64 = 23.0;
const FOOT: f64 = 24.0;
const BETWEEN: f64 = 10.0;
const LEGEND_ROW: f64 = 19.0;
const LEGEND_GAP: f64 = 20.0;
const LEGEND_SIZE: f64 = 12.0;

fn shape(binds: Binds) -> (Marker, &'static str) {
    match binds {
        Binds::Prefill => (Marker::Circle, "prefill"),
        Binds::Slot => (Marker::Square, "slot"),
        Binds::Swap => (Marker::Triangle, "swap"),
        Binds::Kv => (Marker::Diamond, "KV blocks"),
        Binds::Queue => (Marker::Down, "queue"),
    }
}

/// Draws the whole figure.
pub fn svg(figure: &Lines, options: &Options) -> Result<String, PlotError> {
    let rows = figure.panels.len().div_ceil(figure.columns);
    let panel_width = [620.0, 440.0, 300.0, 230.0][figure.columns.min(4) - 1];
    let inner = GUTTER + figure.columns as f64 * panel_width + (figure.columns - 1) as f64 * GAP;
    let width = inner + 2.0 * MARGIN;
    let title = options
        .title
        .clone()
        .unwrap_or_else(|| format!("Median time to first token over adapter slots, {}", figure.source));
    let page = Page::new(&title, &figure.shared, options, inner)?;
    let legend = legend(figure, inner)?;
    let header = page.head_height() + legend.len() as f64 * LEGEND_ROW + 18.0;
    let row_height = LABEL + HEIGHT + FOOT;
    let grid_height = rows as f64 * row_height + (rows - 1) as f64 * BETWEEN;
    let height = (MARGIN + header + grid_height + page.foot_height() + MARGIN * 0.7).ceil();

    let mut text = String::new();
    let canvas = Canvas::new(&mut text, width, height)?;
    let mut y = page.draw_head(&canvas)?;
    for row in &legend {
        draw_legend(&canvas, row, y)?;
        y += LEGEND_ROW;
    }
    y = MARGIN + header;

    let axes = Axes::of(&figure.budgets, scale(figure));
    for (i, panel) in figure.panels.iter().enumerate() {
        let (column, row) = (i % figure.columns, i / figure.columns);
        let left = MARGIN + GUTTER + column as f64 * (panel_width + GAP);
        let top = y + row as f64 * (row_height + BETWEEN);
        canvas.text(
            &panel.label,
            (left, top + 13.0),
            Anchor::Start,
            Font { size: 12.5, bold: true, color: INK },
        )?;
        if let Some(rate) = panel.full_rate {
            let said = format!("ρ 1 is {}/s", number(rate));
            canvas.text(&said, (left + panel_width, top + 13.0), Anchor::End, faint(11.5))?;
        }
        let frame = Frame { left, top: top + LABEL, width: panel_width, height: HEIGHT };
        axes.grid(&canvas, frame, &axes.ttft, (column == 0).then_some(("median TTFT", seconds as _)))?;
        axes.budget_labels(&canvas, frame)?;
        draw_panel(&canvas, &axes, panel, frame)?;
    }
    page.draw_foot(&canvas, y + grid_height)?;
    canvas.finish()?;
    canvas::finish(&text, width, height, &title)
}

/// Of all that a longer trace would not change: what is saturated grows with it, and stands at the upper edge.
fn scale(figure: &Lines) -> Scale {
    let points = || figure.panels.iter().flat_map(|p| p.lines.iter().flatten());
    let all_saturated = points().all(|p| p.saturated);
    let values = points().filter(|p| all_saturated || !p.saturated).flat_map(|p| {
        let (low, high) = p.range.map_or((p.median_s, p.median_s), |r| (r.low, r.high));
        [low, p.median_s, high]
    });
    Scale::covering(values, true, 5)
}

/// Bands, then lines, then markers: nothing hides a marker.
fn draw_panel(canvas: &Canvas<'_>, axes: &Axes<'_>, panel: &Panel, frame: Frame) -> Result<(), PlotError> {
    let y = |value: f64| frame.bottom() - axes.ttft.place(value) * frame.height;
    let at = |p: &Point, value: f64| (axes.x(frame, p.budget), y(value));
    for (points, color) in panel.lines.iter().zip(COLORS) {
        let banded: Vec<_> = points.iter().filter_map(|p| Some((p, p.range?))).collect();
        let upper = banded.iter().map(|(p, r)| at(p, r.high));
        let lower = banded.iter().rev().map(|(p, r)| at(p, r.low));
        if banded.len() > 1 {
            canvas.polygon(&upper.chain(lower).collect::<Vec<_>>(), color.mix(0.16))?;
        }
    }
    for (points, color) in panel.lines.iter().zip(COLORS) {
        let line: Vec<_> = points.iter().map(|p| at(p, p.median_s)).collect();
        canvas.line(&line, color.to_rgba(), 1.8)?;
    }
    for (points, color) in panel.lines.iter().zip(COLORS) {
        for point in points {
            let marker = point.binds.map_or(Marker::Circle, |b| shape(b).0);
            canvas.marker(at(point, point.median_s), marker, color, point.saturated)?;
        }
    }
    Ok(())
}

enum Mark {
    Line(RGBColor),
    Shape(Marker, bool),
    None,
}

struct Entry {
    mark: Mark,
    text: String,
    width: f64,
}

impl Mark {
    /// From its left end to its text.
    fn indent(&self) -> f64 {
        match self {
            Self::Line(_) => 30.0,
            Self::Shape(..) => 17.0,
            Self::None => 0.0,
        }
    }
}

/// Entries broken into rows of at most `width` pixels.
fn legend(figure: &Lines, width: f64) -> Result<Vec<Vec<Entry>>, PlotError> {
    let points: Vec<&Point> = figure.panels.iter().flat_map(|p| p.lines.iter().flatten()).collect();
    let mut groups = vec![Vec::new()];
    for (name, color) in figure.names.iter().zip(COLORS) {
        groups[0].push((Mark::Line(color), name.clone()));
    }
    let runs = figure.runs.iter().next_back().copied().unwrap_or(1);
    if runs > 1 {
        groups[0].push((Mark::None, format!("band: range of {runs} {} traces", figure.source)));
    }
    let mut shapes = Vec::new();
    for binds in [Binds::Prefill, Binds::Queue, Binds::Slot, Binds::Swap, Binds::Kv] {
        if points.iter().any(|p| p.binds == Some(binds)) {
            let (marker, word) = shape(binds);
            shapes.push((Mark::Shape(marker, false), word.to_owned()));
        }
    }
    if !shapes.is_empty() {
        shapes.insert(0, (Mark::None, "largest part of the mean TTFT:".to_owned()));
    }
    if points.iter().any(|p| p.saturated) {
        shapes.push((
            Mark::Shape(Marker::Circle, true),
            "hollow: rate above 0.95 of saturation, at the top where beyond the scale".to_owned(),
        ));
    }
    groups.push(shapes);
    let mut rows: Vec<Vec<Entry>> = Vec::new();
    for group in groups {
        let mut used = f64::INFINITY;
        for (mark, text) in group {
            let entry = Entry { width: mark.indent() + text_width(&text, LEGEND_SIZE, false)?, mark, text };
            if used + entry.width > width {
                rows.push(Vec::new());
                used = 0.0;
            }
            used += entry.width + LEGEND_GAP;
            if let Some(row) = rows.last_mut() {
                row.push(entry);
            }
        }
    }
    Ok(rows)
}

fn draw_legend(canvas: &Canvas<'_>, row: &[Entry], top: f64) -> Result<(), PlotError> {
    let base = top + 13.0;
    let middle = base - LEGEND_SIZE * 0.36;
    let mut x = MARGIN;
    for entry in row {
        match entry.mark {
            Mark::Line(color) => canvas.line(&[(x, middle), (x + 24.0, middle)], color.to_rgba(), 2.4)?,
            Mark::Shape(marker, hollow) => canvas.marker((x + 5.5, middle), marker, INK, hollow)?,
            Mark::None => {}
        }
        let font = Font { size: LEGEND_SIZE, bold: false, color: INK };
        canvas.text(&entry.text, (x + entry.mark.indent(), base), Anchor::Start, font)?;
        x += entry.width + LEGEND_GAP;
    }
    Ok(())
}
