//! Panels of several lines each: median TTFT over `gpu_loras`, a line for each value of one setting (the load,
//! say), a marker that says which resource binds.

mod render;

use std::collections::{BTreeMap, BTreeSet};

use super::data::{agree, range, shared};
use super::words::{Natural, describe};
use super::{Options, PlotError};
use crate::report::binds::Binds;
use crate::report::columns::{Row, values, varying};
use crate::report::results::{ResultRow, Source};
use crate::report::stats::{Interval, mean};

pub use render::svg;

/// Panels, at most.
const MOST_PANELS: usize = 12;
/// Lines, at most: there are as many colours.
const MOST_LINES: usize = render::COLORS.len();
/// Panels beside each other where no second column says how many.
const ABREAST: usize = 3;

/// A budget of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    budget: u32,
    /// Mean of the runs' medians, seconds.
    median_s: f64,
    /// Their range, where there are several.
    range: Option<Interval>,
    /// Whether a run's rate was above this budget's saturation rate.
    saturated: bool,
    /// What requests waited for longest; none where the rows do not say.
    binds: Option<Binds>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Panel {
    label: String,
    /// The rate that is load 1, requests a second, where lines are loads.
    full_rate: Option<f64>,
    /// One a line of the figure; empty where the panel has none.
    lines: Vec<Vec<Point>>,
}

/// Everything that is drawn, but for sizes and colours.
#[derive(Clone, Debug, PartialEq)]
pub struct Lines {
    budgets: Vec<u32>,
    panels: Vec<Panel>,
    /// Panels beside each other.
    columns: usize,
    /// What each line is, in words.
    names: Vec<String>,
    /// Settings that all rows share, as words.
    shared: Vec<String>,
    source: Source,
    /// Runs behind a point.
    runs: BTreeSet<usize>,
}

impl Lines {
    /// Sorts rows into panels and lines: a line for each value of the column `by_line`.
    pub fn prepare(rows: &[ResultRow], by_line: &str, options: &Options) -> Result<Self, PlotError> {
        let rows = Row::all(rows.iter().filter(|r| r.ttft_median.is_some()));
        let Some(first) = rows.first() else { return Err(PlotError::NoRows) };
        let by = panel_columns(&rows, by_line, options);
        let fixed: Vec<String> = by.iter().cloned().chain([by_line.to_owned()]).collect();
        if let Some(unknown) = fixed.iter().find(|c| !first.columns.contains_key(*c)) {
            return Err(PlotError::UnknownColumn(unknown.clone()));
        }
        let mut order = Vec::new();
        let mut key = |row: &Row<'_>, columns: &[String]| -> Vec<Natural> {
            let text = columns.iter().map(|c| row.get(c).unwrap_or_default());
            text.map(|text| Natural::new(text, &mut order)).collect()
        };
        let mut groups: BTreeMap<Vec<Natural>, BTreeMap<Vec<Natural>, Vec<&Row<'_>>>> = BTreeMap::new();
        for row in &rows {
            let panel = groups.entry(key(row, &by)).or_default();
            panel.entry(key(row, &fixed[by.len()..])).or_default().push(row);
        }
        let names: BTreeSet<&Natural> = groups.values().flat_map(|p| p.keys().map(|k| &k[0])).collect();
        if groups.len() > MOST_PANELS || names.len() > MOST_LINES {
            return Err(PlotError::TooManyLines {
                panels: groups.len(),
                lines: names.len(),
                most: (MOST_PANELS, MOST_LINES),
                columns: by,
            });
        }
        let mut figure = Self {
            budgets: rows.iter().map(|r| r.row.gpu_loras).collect::<BTreeSet<_>>().into_iter().collect(),
            panels: Vec::new(),
            columns: match by.last() {
                Some(last) if by.len() > 1 => values(&rows, last).len(),
                _ => groups.len().min(ABREAST),
            },
            names: names.iter().map(|n| describe(by_line, &n.text)).collect(),
            shared: shared(&rows, &fixed),
            source: first.row.source,
            runs: BTreeSet::new(),
        };
        for (key, by_name) in &groups {
            let label: Vec<_> = by.iter().zip(key).map(|(c, value)| describe(c, &value.text)).collect();
            let label = label.join(", ");
            for rows in by_name.values() {
                agree(rows, &fixed, &label)?;
                one_source(rows, first.row.source, &label)?;
            }
            let of_name =
                |name: &&Natural| by_name.iter().find(|(k, _)| k[0] == **name).map(|(_, rows)| rows);
            let lines = names.iter().map(|n| of_name(n).map_or_else(Vec::new, |r| figure.line(r))).collect();
            let all = by_name.values().flatten().map(|r| r.row);
            let full_rate = if by_line == "rho" { full_rate(all) } else { None };
            figure.panels.push(Panel { label, full_rate, lines });
        }
        Ok(figure)
    }

    fn line(&mut self, rows: &[&Row<'_>]) -> Vec<Point> {
        let mut runs: BTreeMap<u32, Vec<&ResultRow>> = BTreeMap::new();
        for row in rows {
            runs.entry(row.row.gpu_loras).or_default().push(row.row);
        }
        let mut points = Vec::new();
        for (budget, rows) in runs {
            self.runs.insert(rows.len());
            let medians: Vec<f64> = rows.iter().filter_map(|r| r.ttft_median).collect();
            let Some(median_s) = mean(&medians) else { continue };
            points.push(Point {
                budget,
                median_s,
                range: range(&medians).filter(|r| r.high > r.low),
                saturated: rows.iter().any(|r| r.saturated == Some(true)),
                binds: Binds::of(rows.iter().copied()),
            });
        }
        points
    }
}

/// The columns whose values make panels: those asked for, or whatever else varies.
fn panel_columns(rows: &[Row<'_>], by_line: &str, options: &Options) -> Vec<String> {
    if !options.by.is_empty() {
        return options.by.clone();
    }
    varying(rows).into_iter().filter(|c| c != by_line).collect()
}

/// Refuses measured and simulated rows in one line: their markers would mean different things.
fn one_source(rows: &[&Row<'_>], source: Source, label: &str) -> Result<(), PlotError> {
    match rows.iter().find(|r| r.row.source != source) {
        None => Ok(()),
        Some(other) => Err(PlotError::Mixed {
            label: format!("panel '{label}'"),
            column: "source".to_owned(),
            values: vec![source.to_string(), other.row.source.to_string()],
        }),
    }
}

/// The rate that is load 1, on average over traces.
fn full_rate<'a>(rows: impl Iterator<Item = &'a ResultRow>) -> Option<f64> {
    mean(&rows.filter_map(|r| Some(r.arrival_rate? / r.rho?)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::RunContext;

    fn row(rank: &str, seqs: u32, rho: f64, budget: u32, ttft: f64) -> ResultRow {
        let context = RunContext {
            rank: Some(rank.to_owned()),
            max_num_seqs: Some(seqs),
            rho: Some(rho),
            arrival_rate: Some(rho * 20.0),
            seed: Some(1),
            ..RunContext::new(Source::Simulated, 128, budget, "short")
        };
        let mut row = ResultRow::from_records(&[], &context);
        (row.ttft_median, row.ttft_slot_mean, row.ttft_kv_mean) = (Some(ttft), Some(0.3), Some(0.1));
        row
    }

    #[test]
    fn panels_are_a_grid_with_a_line_for_each_load() {
        let mut rows = Vec::new();
        for rank in ["8", "64", "16"] {
            for seqs in [16, 128] {
                for rho in [0.8, 0.5] {
                    rows.extend([2, 8].map(|b| row(rank, seqs, rho, b, rho / f64::from(b))));
                }
            }
        }
        let lines = Lines::prepare(&rows, "rho", &Options::default()).unwrap();
        let labels: Vec<&str> = lines.panels.iter().map(|p| p.label.as_str()).collect();
        assert_eq!(
            labels[..3],
            ["rank 8, up to 16 sequences", "rank 8, up to 128 sequences", "rank 16, up to 16 sequences"]
        );
        assert_eq!((lines.columns, lines.panels.len(), lines.budgets.as_slice()), (2, 6, [2, 8].as_slice()));
        assert_eq!(lines.names, ["load ρ 0.5", "load ρ 0.8"]);
        let panel = &lines.panels[5];
        assert!((panel.full_rate.unwrap() - 20.0).abs() < 1e-9);
        let last = panel.lines[1][1];
        assert_eq!((last.budget, last.median_s, last.binds), (8, 0.1, Some(Binds::Slot)));
    }

    #[test]
    fn what_differs_unseen_is_refused() {
        let mut rows = [row("8", 16, 0.5, 2, 0.1), row("8", 16, 0.5, 4, 0.1)];
        rows[1].source = Source::Measured;
        let refused = |rows: &[ResultRow], options: &Options| {
            Lines::prepare(rows, "rho", options).unwrap_err().to_string()
        };
        assert!(refused(&rows, &Options::default()).contains("source"));
        rows[1] = row("16", 16, 0.5, 4, 0.1);
        let by = Options { by: vec!["max_num_seqs".to_owned()], ..Options::default() };
        assert!(refused(&rows, &by).contains("rank (16, 8)"));
        let many: Vec<_> = (0..9).map(|i| row("8", 16, f64::from(i) / 10.0, 2, 0.1)).collect();
        assert!(refused(&many, &Options::default()).contains("9 lines"));
    }
}
