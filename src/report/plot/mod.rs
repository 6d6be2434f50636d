//! The figure: median and p99 TTFT over `gpu_loras`, measured and simulated together, swaps below.
//!
//! Result rows become [`data::Data`], that becomes an SVG, and the PNG is rendered from that SVG with
//! an embedded font, so that both show the same thing on every machine. The same rows give the same
//! bytes.

pub mod agreement;
mod axis;
mod canvas;
pub mod data;
mod font;
mod legend;
mod lines;
mod page;
mod render;
mod words;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::columns::Row;
use super::files::{self, FileError};
use super::manifest;
use super::results::{ResultRow, RunKey};
use super::settings::Mixture;
use crate::profile::Kind;
use data::{Data, WithinRun};

/// How much larger the PNG is than the SVG's nominal size.
pub const PNG_SCALE: f32 = 2.0;

/// A figure that cannot be drawn.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nothing to draw.
    #[error("no row has a TTFT: there is nothing to plot")]
    NoRows,
    /// More panels than a reader can compare.
    #[error(
        "the rows would make {panels} panels by {}, and {} are the most: plot fewer rows, or choose the columns with --by",
        columns.join(", "),
        data::MOST_PANELS
    )]
    TooManyPanels {
        /// How many there would be.
        panels: usize,
        /// The columns that tell them apart.
        columns: Vec<String>,
    },
    /// More panels or lines than there is room for.
    #[error(
        "the rows would make {panels} panels by {} of {lines} lines, and {} of {} are the most: plot fewer rows, or \
         choose the columns with --by and --lines",
        columns.join(", "),
        most.0,
        most.1
    )]
    TooManyLines {
        /// How many panels.
        panels: usize,
        /// How many lines.
        lines: usize,
        /// How many of each there may be.
        most: (usize, usize),
        /// The columns that tell panels apart.
        columns: Vec<String>,
    },
    /// Rows of different settings in one panel.
    #[error(
        "rows of {label} differ in {column} ({}): add {column} to --by, or plot rows of one value",
        values.join(", ")
    )]
    Mixed {
        /// The panel.
        label: String,
        /// The setting.
        column: String,
        /// Its values.
        values: Vec<String>,
    },
    /// Rows of different settings in one panel, which no column says.
    #[error("{label}: {mixture}")]
    Alike {
        /// The panel.
        label: String,
        /// The rows.
        mixture: Mixture,
    },
    /// `--by` a column that results do not have.
    #[error("there is no column '{0}' in a results CSV to plot by")]
    UnknownColumn(String),
    /// The drawing itself failed.
    #[error("cannot draw the figure: {0}")]
    Draw(String),
}

/// What the caller may choose.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Columns whose values make panels; empty is every setting that varies.
    pub by: Vec<String>,
    /// A column whose values are lines in each panel, with what binds at each budget, instead of the usual curves;
    /// panels by two columns are then a grid.
    pub lines: Option<String>,
    /// The title; none is a plain one.
    pub title: Option<String>,
    /// How the results were made, for the foot of the figure.
    pub footer: String,
    /// Intervals of single runs, drawn where no repeats are.
    pub within_run: HashMap<RunKey, WithinRun>,
}

/// The figure of `rows` as SVG text.
pub fn svg(rows: &[ResultRow], options: &Options) -> Result<String, PlotError> {
    match &options.lines {
        Some(column) => lines::svg(&lines::Lines::prepare(rows, column, options)?, options),
        None => render::svg(&Data::prepare(rows, options)?, options),
    }
}

/// An SVG of this module as PNG bytes, [`PNG_SCALE`] times its nominal size.
pub fn png(svg: &str) -> Result<Vec<u8>, PlotError> {
    font::png(svg, PNG_SCALE)
}

/// Draws `rows` into `base.svg` and `base.png`, whatever extension `base` has, and says where they are.
pub fn write(
    base: impl AsRef<Path>,
    rows: &[ResultRow],
    options: &Options,
) -> Result<(PathBuf, PathBuf), PlotError> {
    let (svg_path, png_path) = paths(base);
    let svg = svg(rows, options)?;
    let png = png(&svg)?;
    files::write_atomic(&svg_path, svg.as_bytes())?;
    files::write_atomic(&png_path, &png)?;
    Ok((svg_path, png_path))
}

/// Where [`write()`] puts the two files.
pub fn paths(base: impl AsRef<Path>) -> (PathBuf, PathBuf) {
    let base = base.as_ref();
    let stem = match base.extension().and_then(|e| e.to_str()) {
        Some("svg" | "png" | "csv") => base.with_extension(""),
        _ => base.to_owned(),
    };
    let with = |extension: &str| {
        let mut name = stem.clone().into_os_string();
        name.push(extension);
        PathBuf::from(name)
    };
    (with(".svg"), with(".png"))
}

/// The settings that all rows share, in words.
pub(super) fn shared_settings(rows: &[ResultRow]) -> Vec<String> {
    data::shared(&Row::all(rows), &[])
}

/// A setting's value in words.
pub(super) fn describe_setting(column: &str, value: &str) -> String {
    words::describe(column, value)
}

/// A [footer](Options::footer) that says where the numbers come from: files, days, and what the
/// manifests beside the files tell of machine and program.
pub fn footer(csv: &[PathBuf], rows: &[ResultRow]) -> String {
    let files: Vec<_> =
        csv.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned()).collect();
    let days: BTreeSet<_> = rows.iter().filter_map(|r| r.run_timestamp.get(..10)).collect();
    let mut parts = vec![files.join(", ")];
    parts.extend(days.first().map(|first| match days.last() {
        Some(last) if last != first => format!("{first} to {last}"),
        _ => (*first).to_owned(),
    }));
    // Measured and simulated rows of one file have manifests of their own, which the rows name.
    let manifests = manifest::of_results(csv, rows.iter().filter_map(|r| r.manifest.as_deref()));
    let machines: BTreeSet<_> = manifests.iter().map(|m| m.machine.describe()).collect();
    let tools: BTreeSet<_> = manifests.iter().map(|m| m.tool.describe()).collect();
    parts.extend(machines);
    parts.extend(tools);
    if manifests.iter().any(|m| m.profile_kind == Some(Kind::BlackBox)) {
        parts.push("simulated with a black-box profile".to_owned());
    }
    if manifests.iter().any(|m| !manifests.iter().any(|other| other.finished(m))) {
        parts.push("incomplete run".to_owned());
    }
    parts.join(" · ")
}
