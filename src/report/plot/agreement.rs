//! The figure of a validation: request by request, distributions, and errors over load.

use plotters::style::{Color as _, RGBColor};

use super::PlotError;
use super::axis::{Scale, number, seconds};
use super::canvas::{self, Anchor, Canvas, Font, Marker};
use super::render::{AXIS, FAINT_INK, GRID, INK};
use crate::report::stats::sorted;

const MEASURED: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const SIMULATED: RGBColor = RGBColor(0xd5, 0x5e, 0x00);

/// Points of the scatter, at most: more are a blot. Evenly chosen, and said.
const MOST_POINTS: usize = 3_000;

const MARGIN: f64 = 24.0;
const SIDE: f64 = 300.0;
const GUTTER: f64 = 76.0;
const TOP: f64 = 84.0;
const FOOT: f64 = 92.0;

/// What is drawn. Times in seconds.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// TTFT of the same request: measured, simulated.
    pub pairs: Vec<(f64, f64)>,
    /// Load of a cell (as `load` says) and signed error of its median TTFT, per cent.
    pub residuals: Vec<(f64, f64)>,
    /// What the load is: `rho`, or requests a second.
    pub load: String,
    /// The title.
    pub title: String,
    /// How the results were made.
    pub footer: String,
}

/// A square of the figure.
struct Square {
    left: f64,
    x: Scale,
    y: Scale,
}

impl Square {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left + SIDE * self.x.place(x), TOP + SIDE * (1.0 - self.y.place(y)))
    }

    /// Grid, labels and names of the axes.
    fn draw(
        &self,
        canvas: &Canvas<'_>,
        title: &str,
        names: [&str; 2],
        label: [&dyn Fn(f64) -> String; 2],
    ) -> Result<(), PlotError> {
        let small = Font { size: 11.0, bold: false, color: FAINT_INK };
        let name = Font { size: 12.0, bold: false, color: INK };
        let bottom = TOP + SIDE;
        canvas.text(
            title,
            (self.left, TOP - 12.0),
            Anchor::Start,
            Font { size: 13.0, bold: true, color: INK },
        )?;
        for &tick in &self.x.ticks {
            let x = self.left + SIDE * self.x.place(tick);
            canvas.line(&[(x, TOP), (x, bottom)], GRID.to_rgba(), 1.0)?;
            canvas.text(&label[0](tick), (x, bottom + 16.0), Anchor::Middle, small)?;
        }
        for &tick in &self.y.ticks {
            let y = TOP + SIDE * (1.0 - self.y.place(tick));
            canvas.line(&[(self.left, y), (self.left + SIDE, y)], GRID.to_rgba(), 1.0)?;
            canvas.text(&label[1](tick), (self.left - 6.0, y + 4.0), Anchor::End, small)?;
        }
        let corner = [(self.left, TOP), (self.left, bottom), (self.left + SIDE, bottom)];
        canvas.line(&corner, AXIS.to_rgba(), 1.0)?;
        canvas.text(names[0], (self.left + SIDE / 2.0, bottom + 34.0), Anchor::Middle, name)?;
        canvas.text_upwards(names[1], (self.left - 54.0, TOP + SIDE / 2.0), name)
    }
}

/// The figure as SVG text.
pub fn svg(data: &Agreement) -> Result<String, PlotError> {
    if data.residuals.is_empty() {
        return Err(PlotError::NoRows);
    }
    let width = 2.0 * MARGIN + 3.0 * (GUTTER + SIDE);
    let height = TOP + SIDE + FOOT;
    let mut text = String::new();
    let canvas = Canvas::new(&mut text, width, height)?;
    canvas.text(
        &data.title,
        (MARGIN, MARGIN + 16.0),
        Anchor::Start,
        Font { size: 17.0, bold: true, color: INK },
    )?;
    let left = |i: usize| MARGIN + GUTTER + i as f64 * (GUTTER + SIDE);
    scatter(&canvas, left(0), data)?;
    distributions(&canvas, left(1), data)?;
    residuals(&canvas, left(2), data)?;
    let small = Font { size: 10.5, bold: false, color: FAINT_INK };
    canvas.text(&data.footer, (MARGIN, height - 14.0), Anchor::Start, small)?;
    canvas.finish()?;
    canvas::finish(&text, width, height, &data.title)
}

fn scatter(canvas: &Canvas<'_>, left: f64, data: &Agreement) -> Result<(), PlotError> {
    let all = data.pairs.iter().flat_map(|p| [p.0, p.1]).filter(|v| *v > 0.0);
    let scale = Scale::covering(all, true, 5);
    let square = Square { left, x: scale.clone(), y: scale };
    let every = data.pairs.len().div_ceil(MOST_POINTS).max(1);
    let title = match (data.pairs.len(), every) {
        (0, _) => "Requests (no requests files)".to_owned(),
        (n, 1) => format!("{n} requests"),
        (n, every) => format!("{n} requests, every {every}th drawn"),
    };
    square.draw(canvas, &title, ["TTFT, measured", "TTFT, simulated"], [&seconds, &seconds])?;
    let ends = (square.x.low, square.x.high);
    canvas.line(&[square.at(ends.0, ends.0), square.at(ends.1, ends.1)], AXIS.to_rgba(), 1.0)?;
    for &(measured, simulated) in data.pairs.iter().step_by(every) {
        let (x, y) = square.at(measured, simulated);
        let dot = [(x - 1.3, y - 1.3), (x + 1.3, y - 1.3), (x + 1.3, y + 1.3), (x - 1.3, y + 1.3)];
        canvas.polygon(&dot, MEASURED.mix(0.35))?;
    }
    Ok(())
}

fn distributions(canvas: &Canvas<'_>, left: f64, data: &Agreement) -> Result<(), PlotError> {
    let all = data.pairs.iter().flat_map(|p| [p.0, p.1]).filter(|v| *v > 0.0);
    let share = Scale { log: false, low: 0.0, high: 1.0, ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0] };
    let square = Square { left, x: Scale::covering(all, true, 5), y: share };
    let percent = |v: f64| format!("{:.0} %", v * 100.0);
    square.draw(canvas, "Distributions", ["TTFT", "requests up to it"], [&seconds, &percent])?;
    let sides = [(MEASURED, "measured", false), (SIMULATED, "simulated", true)];
    for (i, (color, name, second)) in sides.into_iter().enumerate() {
        let values: Vec<f64> = data.pairs.iter().map(|p| if second { p.1 } else { p.0 }).collect();
        let values = sorted(&values);
        let n = values.len();
        let every = n.div_ceil(400).max(1);
        let mut points: Vec<(f64, f64)> = values
            .iter()
            .enumerate()
            .filter(|(i, _)| i % every == 0)
            .map(|(i, v)| square.at(*v, (i + 1) as f64 / n as f64))
            .collect();
        points.extend(values.last().map(|v| square.at(*v, 1.0)));
        if points.len() > 1 {
            canvas.line(&points, color.to_rgba(), 1.6)?;
        }
        let y = TOP + SIDE - 28.0 + 16.0 * i as f64;
        let at = (left + SIDE - 8.0, y);
        canvas.text(name, at, Anchor::End, Font { size: 11.5, bold: true, color })?;
    }
    Ok(())
}

fn residuals(canvas: &Canvas<'_>, left: f64, data: &Agreement) -> Result<(), PlotError> {
    let most = data.residuals.iter().map(|r| r.1.abs()).fold(1.0, f64::max);
    let half = Scale::covering(std::iter::once(most), false, 4);
    let ticks: Vec<f64> =
        half.ticks.iter().rev().map(|t| -t).chain(half.ticks.iter().skip(1).copied()).collect();
    let error = Scale { log: false, low: -half.high, high: half.high, ticks };
    let square = Square { left, x: Scale::covering(data.residuals.iter().map(|r| r.0), false, 5), y: error };
    let percent = |v: f64| format!("{v:+} %").replace("+0 %", "0 %").replace("-0 %", "0 %");
    square.draw(
        canvas,
        "Error of the median",
        [&data.load, "simulated over measured"],
        [&number, &percent],
    )?;
    canvas.line(&[square.at(square.x.low, 0.0), square.at(square.x.high, 0.0)], AXIS.to_rgba(), 1.0)?;
    for &(load, error) in &data.residuals {
        canvas.marker(square.at(load, error), Marker::Circle, SIMULATED, false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_shows_what_it_is_given_and_the_same_each_time() {
        let data = Agreement {
            pairs: (1..200).map(|i| (0.01 * f64::from(i), 0.0101 * f64::from(i))).collect(),
            residuals: vec![(0.2, -1.5), (0.8, 3.0)],
            load: "rho".to_owned(),
            title: "Simulated against measured".to_owned(),
            footer: "test".to_owned(),
        };
        let drawn = svg(&data).unwrap();
        for part in ["199 requests", "measured", "simulated", "Error of the median", "rho"] {
            assert!(drawn.contains(part), "{part} is missing");
        }
        assert_eq!(drawn, svg(&data).unwrap());
        let without = svg(&Agreement { pairs: Vec::new(), ..data.clone() }).unwrap();
        assert!(without.contains("no requests files"));
        assert!(svg(&Agreement::default()).is_err());
    }
}
