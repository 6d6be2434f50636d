//! From result rows to what is drawn: panels, curves, intervals, captions.

use std::collections::{BTreeMap, BTreeSet};

use super::words::{Natural, describe};
use super::{Options, PlotError};
use crate::report::columns::{Row, values, varying};
use crate::report::record::{RequestRecord, Status};
use crate::report::results::{ResultRow, Source};
use crate::report::settings::Mixture;
use crate::report::stats::{Interval, mean, mean_interval, quantile_interval, sorted};

/// Panels in one figure, at most.
pub const MOST_PANELS: usize = 6;

/// What a curve shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quantity {
    /// Median TTFT, seconds.
    Median,
    /// 99th percentile of TTFT, seconds.
    P99,
    /// Adapters copied during the run.
    Swaps,
}

impl Quantity {
    fn of(self, row: &ResultRow) -> Option<f64> {
        match self {
            Self::Median => row.ttft_median,
            Self::P99 => row.ttft_p99,
            Self::Swaps => row.swap_count.map(|n| n as f64),
        }
    }
}

/// One value over the budget axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// `gpu_loras`.
    pub budget: u32,
    /// Mean over the runs.
    pub value: f64,
    /// Where it may lie.
    pub interval: Option<Interval>,
    /// Whether a run's rate was above this budget's saturation rate.
    pub saturated: bool,
}

/// One quantity of one source, points by budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// What it shows.
    pub quantity: Quantity,
    /// Whence.
    pub source: Source,
    /// In order of budget.
    pub points: Vec<Point>,
}

/// The curves of rows that agree in all settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// In what they differ from other panels'; empty where there is one panel.
    pub label: String,
    /// Their curves.
    pub curves: Vec<Curve>,
}

/// What intervals mean in a figure.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Notes {
    /// Runs behind one measured point, where intervals come from several.
    pub measured_runs: BTreeSet<usize>,
    /// Whether some measured intervals are those of one run's requests.
    pub within_run: bool,
    /// Runs behind one simulated point.
    pub simulated_runs: BTreeSet<usize>,
}

/// Everything that is drawn, but for sizes and colours.
#[derive(Clone, Debug, PartialEq)]
pub struct Data {
    /// Every budget of every row.
    pub budgets: Vec<u32>,
    /// One or more, up to [`MOST_PANELS`].
    pub panels: Vec<Panel>,
    /// Settings that all rows share, as words.
    pub shared: Vec<String>,
    /// What intervals mean.
    pub notes: Notes,
}

/// Intervals of one run's own median and p99 at 95 %, from its requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WithinRun {
    median: Option<Interval>,
    p99: Option<Interval>,
}

impl WithinRun {
    /// Of the successful requests' TTFT. An end that so few requests do not bound is that of the
    /// sample.
    pub fn of(records: &[RequestRecord]) -> Self {
        let ok = records.iter().filter(|r| r.status == Status::Ok);
        let ttft = sorted(&ok.filter_map(|r| r.ttft_s).collect::<Vec<_>>());
        let interval = |q| {
            let bounds = quantile_interval(&ttft, q, 0.95);
            Some(Interval {
                low: bounds.low.or(ttft.first().copied())?,
                high: bounds.high.or(ttft.last().copied())?,
            })
        };
        Self { median: interval(0.5), p99: interval(0.99) }
    }
}

impl Data {
    /// Sorts rows into panels and curves.
    pub fn prepare(rows: &[ResultRow], options: &Options) -> Result<Self, PlotError> {
        let rows = Row::all(rows.iter().filter(|r| r.ttft_median.is_some()));
        if rows.is_empty() {
            return Err(PlotError::NoRows);
        }
        let by = if options.by.is_empty() { varying(&rows) } else { options.by.clone() };
        if let Some(unknown) = by.iter().find(|c| !rows[0].columns.contains_key(*c)) {
            return Err(PlotError::UnknownColumn(unknown.clone()));
        }
        let mut groups: BTreeMap<Vec<Natural>, Vec<&Row<'_>>> = BTreeMap::new();
        let mut order = Vec::new();
        for row in &rows {
            // What one row does not know is taken to be as in the others.
            let only =
                |c: &String| values(&rows, c).into_iter().next().filter(|_| values(&rows, c).len() == 1);
            let key = by.iter().map(|c| row.get(c).or_else(|| only(c)).unwrap_or_default());
            let key: Vec<Natural> = key.map(|text| Natural::new(text, &mut order)).collect();
            groups.entry(key).or_default().push(row);
        }
        if groups.len() > MOST_PANELS {
            return Err(PlotError::TooManyPanels { panels: groups.len(), columns: by });
        }
        let mut notes = Notes::default();
        let mut panels = Vec::new();
        for (key, rows) in &groups {
            let label: Vec<_> =
                by.iter().zip(key).map(|(column, value)| describe(column, &value.text)).collect();
            let label = if groups.len() > 1 { label.join(", ") } else { String::new() };
            agree(rows, &by, &label)?;
            panels.push(Panel { label, curves: curves(rows, options, &mut notes) });
        }
        let shared = shared(&rows, if groups.len() == 1 { &[] } else { &by });
        let budgets: BTreeSet<u32> = rows.iter().map(|r| r.row.gpu_loras).collect();
        Ok(Self { budgets: budgets.into_iter().collect(), panels, shared, notes })
    }
}

/// Settings that all rows share and that are not among `named`, as words.
pub(super) fn shared(rows: &[Row<'_>], named: &[String]) -> Vec<String> {
    let settings = rows.first().into_iter().flat_map(Row::settings);
    let only = |c: &str| {
        let mut all = values(rows, c).into_iter();
        let value = all.next()?;
        all.next().is_none().then(|| describe(c, &value))
    };
    settings.filter(|c| !named.iter().any(|n| n == c)).filter_map(only).collect()
}

/// Whether rows of one panel agree in what they are not grouped by.
pub(super) fn agree(rows: &[&Row<'_>], by: &[String], label: &str) -> Result<(), PlotError> {
    let name = || if label.is_empty() { "the figure".to_owned() } else { format!("panel '{label}'") };
    let implied = |c: &str| c == "arrival_rate" && rows.iter().all(|r| r.row.rho.is_some());
    let settings = rows.first().into_iter().flat_map(|row| row.settings());
    for column in settings.filter(|c| !by.iter().any(|b| b == c) && !implied(c)) {
        let found: BTreeSet<String> = rows.iter().filter_map(|r| r.get(column)).collect();
        if found.len() > 1 {
            let (column, values) = (column.to_owned(), found.into_iter().collect());
            return Err(PlotError::Mixed { label: name(), column, values });
        }
    }
    Mixture::refuse(rows.iter().map(|r| r.row)).map_err(|mixture| PlotError::Alike { label: name(), mixture })
}

fn curves(rows: &[&Row<'_>], options: &Options, notes: &mut Notes) -> Vec<Curve> {
    let mut curves = Vec::new();
    for quantity in [Quantity::Median, Quantity::P99, Quantity::Swaps] {
        for source in [Source::Measured, Source::Simulated] {
            let mut runs: BTreeMap<u32, Vec<&ResultRow>> = BTreeMap::new();
            for row in rows.iter().filter(|r| r.row.source == source && quantity.of(r.row).is_some()) {
                runs.entry(row.row.gpu_loras).or_default().push(row.row);
            }
            let points: Vec<_> = runs
                .iter()
                .filter_map(|(&b, rows)| point(b, quantity, source, rows, options, notes))
                .collect();
            if !points.is_empty() {
                curves.push(Curve { quantity, source, points });
            }
        }
    }
    curves
}

/// The mean over runs with what may be said of its spread: of measured runs Student's interval from
/// three on and their range at two, of simulated ones their range, of one run its requests' interval
/// where they are at hand.
fn point(
    budget: u32,
    quantity: Quantity,
    source: Source,
    rows: &[&ResultRow],
    options: &Options,
    notes: &mut Notes,
) -> Option<Point> {
    let all: Vec<f64> = rows.iter().filter_map(|r| quantity.of(r)).collect();
    let interval = match (source, all.len()) {
        (_, 1) => {
            rows[0].run_key().and_then(|key| options.within_run.get(&key)).and_then(|w| match quantity {
                Quantity::Median => w.median,
                Quantity::P99 => w.p99,
                Quantity::Swaps => None,
            })
        }
        (Source::Measured, 3..) => mean_interval(&all, 0.95),
        _ => range(&all),
    };
    if quantity == Quantity::Median {
        match (source, all.len()) {
            (Source::Measured, 1) => notes.within_run |= interval.is_some(),
            (Source::Measured, n) => _ = notes.measured_runs.insert(n),
            (Source::Simulated, n) => _ = notes.simulated_runs.insert(n),
        }
    }
    // A bar of no length says nothing and cannot be drawn.
    let interval = interval.filter(|i| i.high > i.low);
    let saturated = rows.iter().any(|r| r.saturated == Some(true));
    Some(Point { budget, value: mean(&all)?, interval, saturated })
}

/// From the least to the greatest.
pub(super) fn range(values: &[f64]) -> Option<Interval> {
    let ordered = sorted(values);
    Some(Interval { low: *ordered.first()?, high: *ordered.last()? })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::report::results::{RunContext, RunKey};

    fn row(source: Source, budget: u32, regime: &str, repeat: u32, ttft: f64) -> ResultRow {
        let mut context = RunContext::new(source, 128, budget, regime);
        (context.seed, context.repeat, context.cell) =
            (Some(1), Some(repeat), Some(format!("{budget:016x}")));
        let mut row = ResultRow::from_records(&[], &context);
        (row.ttft_median, row.ttft_p99) = (Some(ttft), Some(2.0 * ttft));
        row
    }

    fn prepare(rows: &[ResultRow]) -> Data {
        Data::prepare(rows, &Options::default()).unwrap()
    }

    #[test]
    fn repeats_become_one_point_with_students_interval() {
        let rows: Vec<_> = (0..5).map(|i| row(Source::Measured, 4, "short", i, f64::from(i + 1))).collect();
        let data = prepare(&rows);
        assert_eq!((data.panels.len(), data.panels[0].curves.len()), (1, 2));
        let point = data.panels[0].curves[0].points[0];
        let interval = point.interval.unwrap();
        assert_eq!((point.budget, point.value), (4, 3.0));
        assert!((interval.high - 4.963_243).abs() < 1e-5, "{interval:?}");
        assert_eq!(data.notes.measured_runs, BTreeSet::from([5]));
    }

    #[test]
    fn simulated_seeds_become_a_band_of_their_range() {
        let rows: Vec<_> = (0..5).map(|i| row(Source::Simulated, 4, "short", i, f64::from(i + 1))).collect();
        let point = prepare(&rows).panels[0].curves[0].points[0];
        assert_eq!(point.interval, Some(Interval { low: 1.0, high: 5.0 }));
    }

    #[test]
    fn a_single_run_takes_its_interval_from_its_requests() {
        let rows = [row(Source::Measured, 4, "short", 0, 1.0)];
        assert_eq!(prepare(&rows).panels[0].curves[0].points[0].interval, None);
        let key: RunKey = rows[0].run_key().unwrap();
        let bounds = Some(Interval { low: 0.9, high: 1.2 });
        let within_run = HashMap::from([(key, WithinRun { median: bounds, p99: None })]);
        let data = Data::prepare(&rows, &Options { within_run, ..Options::default() }).unwrap();
        assert_eq!(data.panels[0].curves[0].points[0].interval, bounds);
        assert_eq!(data.panels[0].curves[1].points[0].interval, None);
        assert!(data.notes.within_run);
    }

    #[test]
    fn panels_follow_the_rows_and_share_the_budgets() {
        let rows = [
            row(Source::Measured, 8, "short", 0, 1.0),
            row(Source::Measured, 2, "long", 0, 3.0),
            row(Source::Simulated, 4, "short", 0, 2.0),
        ];
        let data = prepare(&rows);
        let labels: Vec<_> = data.panels.iter().map(|p| p.label.as_str()).collect();
        assert_eq!(labels, ["short prompts", "long prompts"]);
        assert_eq!(data.budgets, [2, 4, 8]);
        assert_eq!(data.shared, ["128 adapters"]);
    }

    #[test]
    fn what_a_row_does_not_know_is_taken_to_be_as_in_the_others() {
        let mut rows =
            [row(Source::Measured, 8, "short", 0, 1.0), row(Source::Simulated, 8, "short", 0, 1.0)];
        rows[1].policy = Some("skip".to_owned());
        assert_eq!(prepare(&rows).panels.len(), 1);
    }

    /// Two configurations with the same columns.
    fn alike(settings: [Option<&str>; 2]) -> [ResultRow; 2] {
        let row = |cell: &str, settings: Option<&str>| ResultRow {
            cell: Some(cell.to_owned()),
            settings: settings.map(str::to_owned),
            ..row(Source::Simulated, 8, "short", 0, 1.0)
        };
        [row("a", settings[0]), row("b", settings[1])]
    }

    #[test]
    fn settings_without_a_column_make_panels_too() {
        let data = prepare(&alike([Some("device=cuda"), Some("device=cuda;prefetch=2")]));
        let labels: Vec<_> = data.panels.iter().map(|p| p.label.as_str()).collect();
        assert_eq!(labels, ["prefetch 2", "prefetch default"]);
        assert_eq!(data.shared, ["128 adapters", "short prompts", "device cuda"]);
    }

    #[test]
    fn configurations_that_look_alike_are_not_averaged() {
        let refused = Data::prepare(&alike([None, None]), &Options::default()).unwrap_err().to_string();
        assert!(refused.contains("the figure: the rows at 8 slots are of the cells a and b"), "{refused}");
    }

    #[test]
    fn runs_without_a_ttft_are_nothing_to_plot() {
        let mut rows = [row(Source::Measured, 8, "short", 0, 1.0)];
        rows[0].ttft_median = None;
        assert!(matches!(Data::prepare(&rows, &Options::default()), Err(PlotError::NoRows)));
    }
}
