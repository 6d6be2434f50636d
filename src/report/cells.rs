//! Results by cell: a line each, told from the others by the settings that vary.

use std::collections::BTreeSet;

use super::columns::{Row, varying};
use super::results::ResultRow;
use super::stats;
use super::units::seconds;

/// A table of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cells {
    pub(crate) header: Vec<String>,
    pub(crate) lines: Vec<Vec<String>>,
}

impl Cells {
    /// Means over each cell's runs, in the order in which the cells first come, with 95 % intervals where there are
    /// several traces. Rows of no experiment are of one cell if they have the same settings. Cells that no setting tells
    /// apart have their keys beside them.
    pub(crate) fn of(rows: &[ResultRow]) -> Self {
        let rows = Row::all(rows);
        let sources: BTreeSet<_> = rows.iter().map(|r| r.row.source).collect();
        let mut named = vec!["gpu_loras".to_owned()];
        named.extend((sources.len() > 1).then(|| "source".to_owned()));
        // The rate has a column of its own anyway.
        named.extend(varying(&rows).into_iter().filter(|c| c != "arrival_rate"));
        let cells = cells(&rows);
        let names = |runs: &[&Row<'_>], named: &[String]| -> Vec<String> {
            named.iter().map(|c| runs[0].get(c).unwrap_or_default()).collect()
        };
        let told: BTreeSet<_> = cells
            .iter()
            .map(|runs| (names(runs, &named), runs[0].row.rho.is_none().then(|| runs[0].get("arrival_rate"))))
            .collect();
        if told.len() < cells.len() {
            named.push("cell".to_owned());
        }
        let statistics = ["rate", "runs", "TTFT median", "mean", "p90", "p99", "swaps", ""];
        let header = named.iter().cloned().chain(statistics.map(str::to_owned)).collect();
        let line = |runs: &Vec<&Row<'_>>| names(runs, &named).into_iter().chain(means(runs)).collect();
        Self { header, lines: cells.iter().map(line).collect() }
    }
}

/// The runs of each cell.
fn cells<'a>(rows: &'a [Row<'a>]) -> Vec<Vec<&'a Row<'a>>> {
    let key = |row: &Row<'_>| {
        let of = match &row.row.cell {
            Some(cell) => vec![cell.clone()],
            None => row.settings().map(|c| row.get(c).unwrap_or_default()).collect(),
        };
        (row.row.source, row.row.gpu_loras, of)
    };
    let mut cells: Vec<((_, _, Vec<String>), Vec<&Row<'_>>)> = Vec::new();
    for row in rows {
        let key = key(row);
        match cells.iter_mut().find(|(k, _)| *k == key) {
            Some((_, runs)) => runs.push(row),
            None => cells.push((key, vec![row])),
        }
    }
    cells.into_iter().map(|(_, runs)| runs).collect()
}

fn means(runs: &[&Row<'_>]) -> impl Iterator<Item = String> {
    let values =
        |of: fn(&ResultRow) -> Option<f64>| runs.iter().filter_map(|r| of(r.row)).collect::<Vec<_>>();
    let traces: BTreeSet<_> = runs.iter().map(|r| r.row.seed).collect();
    let time = |of| {
        let values = values(of);
        let mean = stats::mean(&values).map_or_else(String::new, seconds);
        // Repeats of one trace tell of the machine, not of the traffic.
        match stats::mean_interval(&values, 0.95).filter(|_| traces.len() == runs.len()) {
            Some(i) => format!("{mean} ± {}", seconds((i.high - i.low) / 2.0)),
            None => mean,
        }
    };
    let number = |of, digits| stats::mean(&values(of)).map_or_else(String::new, |v| format!("{v:.digits$}"));
    let saturated = runs.iter().any(|r| r.row.saturated == Some(true));
    [
        number(|r| r.arrival_rate, 2),
        runs.len().to_string(),
        time(|r| r.ttft_median),
        time(|r| r.ttft_mean),
        time(|r| r.ttft_p90),
        time(|r| r.ttft_p99),
        number(|r| r.swap_count.map(|n| n as f64), 1),
        if saturated { "saturated" } else { "" }.to_owned(),
    ]
    .into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::{RunContext, Source};

    fn row(source: Source, budget: u32, seqs: u32, seed: u64, ttft: f64) -> ResultRow {
        let context = RunContext {
            max_num_seqs: Some(seqs),
            arrival_rate: Some(seed as f64),
            seed: Some(seed),
            ..RunContext::new(source, 128, budget, "short")
        };
        let mut row = ResultRow::from_records(&[], &context);
        (row.ttft_median, row.cell) = (Some(ttft), Some(format!("{seqs}-{budget}")));
        row
    }

    #[test]
    fn a_cell_has_a_line_that_names_what_varies() {
        use Source::Simulated;
        let rows = [
            row(Simulated, 2, 16, 1, 0.1),
            row(Simulated, 2, 64, 1, 1.0),
            row(Simulated, 2, 16, 2, 0.3),
            row(Simulated, 4, 16, 1, 0.05),
        ];
        let cells = Cells::of(&rows);
        assert_eq!(cells.header[..5], ["gpu_loras", "max_num_seqs", "rate", "runs", "TTFT median"]);
        let firsts: Vec<_> = cells.lines.iter().map(|l| l[..4].join(" ")).collect();
        assert_eq!(firsts, ["2 16 1.50 2", "2 64 1.00 1", "4 16 1.00 1"]);
        assert!(cells.lines[0][4].starts_with("200.0 ms ± ") && cells.lines[1][4] == "1.00 s");
        let both = [row(Simulated, 2, 16, 1, 0.1), row(Source::Measured, 2, 16, 1, 0.1)];
        let cells = Cells::of(&both);
        assert_eq!((cells.header[1].as_str(), cells.lines.len()), ("source", 2));
    }

    #[test]
    fn cells_are_told_apart_by_any_setting_or_else_by_their_keys() {
        let of = |cell: &str, settings: Option<&str>| ResultRow {
            cell: Some(cell.to_owned()),
            settings: settings.map(str::to_owned),
            ..row(Source::Simulated, 2, 16, 1, 0.1)
        };
        let cells = Cells::of(&[of("a", Some("default")), of("b", Some("prefetch=2"))]);
        assert_eq!(cells.header[..2], ["gpu_loras", "prefetch"]);
        assert_eq!((cells.lines[0][1].as_str(), cells.lines[1][1].as_str()), ("default", "2"));
        let cells = Cells::of(&[of("a", None), of("b", None)]);
        assert_eq!(cells.header[..2], ["gpu_loras", "cell"]);
        assert_eq!((cells.lines[0][1].as_str(), cells.lines[1][1].as_str()), ("a", "b"));
    }
}
