//! Results as one HTML page that needs nothing beside it: what they say, the figure, the tables, how they were made.

use std::collections::BTreeMap;
use std::path::PathBuf;

use minijinja::{Environment, Value, context};

use super::cells::Cells;
use super::columns::{Row, varying};
use super::manifest::{self, Manifest};
use super::plot;
use super::results::{ResultRow, Source};
use super::settings::Mixture;
use super::stats;
use super::units::seconds;
use super::validation::{BudgetComparison, Validation};

/// A page that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// Nothing to report.
    #[error("the results have no rows: run `measure`, `simulate` or `sweep` first")]
    NoRows,
    /// The template: a bug.
    #[error("cannot write the page: {0}")]
    Template(#[from] minijinja::Error),
}

/// The page of `rows`, which were read from `files`. `figure` says how the figure is drawn; where it cannot be
/// drawn of such rows, the page says why.
pub fn html(
    rows: &[ResultRow],
    files: &[PathBuf],
    title: &str,
    figure: &plot::Options,
) -> Result<String, PageError> {
    if rows.is_empty() {
        return Err(PageError::NoRows);
    }
    let (figure, no_figure) = match plot::svg(rows, figure) {
        // A page's element, without the declaration of a file.
        Ok(svg) => (svg.find("<svg").map(|at| svg[at..].to_owned()), String::new()),
        Err(e) => (None, e.to_string()),
    };
    let cells = Cells::of(rows);
    let (validations, not_validated) = match Validation::each(rows) {
        Ok(each) => (each, String::new()),
        Err(e) => (Vec::new(), e.to_string()),
    };
    let manifests = manifest::of_results(files, rows.iter().filter_map(|r| r.manifest.as_deref()));
    let names = files.iter().filter_map(|f| f.file_name()).map(|n| n.to_string_lossy().into_owned());
    let mut environment = Environment::new();
    // The name's ending makes it escape what is put in.
    environment.add_template("page.html", include_str!("page.html"))?;
    let page = environment.get_template("page.html")?.render(context! {
        title,
        settings => plot::shared_settings(rows),
        answers => answers(rows),
        figure,
        no_figure,
        cells => context! { header => cells.header, lines => cells.lines },
        validations => validations.iter().map(validation).collect::<Vec<_>>(),
        not_validated,
        made => manifests.iter().map(made).collect::<Vec<_>>(),
        files => names.collect::<Vec<_>>(),
    })?;
    Ok(page)
}

/// A source, and values of the settings that vary.
type Configuration = (Source, Vec<String>);

/// From which budget on more slots bring nothing that shows, for each source and setting.
fn answers(rows: &[ResultRow]) -> Vec<String> {
    let named = Row::all(rows);
    let settings = varying(&named);
    let mut groups: Vec<(Configuration, Vec<&ResultRow>)> = Vec::new();
    for row in named.iter().filter(|r| r.row.ttft_median.is_some()) {
        let key =
            (row.row.source, settings.iter().map(|c| row.get(c).unwrap_or_default()).collect::<Vec<_>>());
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, of_key)) => of_key.push(row.row),
            None => groups.push((key, vec![row.row])),
        }
    }
    // What was measured comes first.
    groups.sort_by_key(|((source, _), _)| *source);
    let answer = |((source, values), rows): &(Configuration, Vec<&ResultRow>)| {
        let of = settings.iter().zip(values).map(|(c, v)| plot::describe_setting(c, v));
        let of = [source.to_string()].into_iter().chain(of).collect::<Vec<_>>().join(", ");
        if let Err(mixture) = Mixture::refuse(rows.iter().copied()) {
            return Some(format!("{of}: {mixture}."));
        }
        let mut budgets: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for row in rows {
            budgets.entry(row.gpu_loras).or_default().extend(row.ttft_median);
        }
        let medians: Vec<(u32, f64)> =
            budgets.iter().filter_map(|(b, runs)| Some((*b, stats::mean(runs)?))).collect();
        let least = medians.iter().map(|m| m.1).fold(f64::INFINITY, f64::min);
        let (knee, median) = medians.iter().find(|m| m.1 <= least * 1.1).filter(|_| medians.len() > 1)?;
        Some(format!(
            "{of}: from {knee} slots on the median TTFT is within 10 % of the least, {} of {}.",
            seconds(*median),
            seconds(least),
        ))
    };
    groups.iter().filter_map(answer).collect()
}

fn validation(v: &Validation) -> Value {
    context! { what => &v.what, budgets => v.budgets.iter().map(budget).collect::<Vec<_>>(), said => v.said() }
}

fn budget(b: &BudgetComparison) -> Vec<String> {
    let percent = |p: f64| format!("{p:+.1} %");
    let count = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.1}"));
    vec![
        if b.saturated { format!("{} (saturated)", b.gpu_loras) } else { b.gpu_loras.to_string() },
        b.runs.to_string(),
        seconds(b.median.measured_s),
        seconds(b.median.simulated_s),
        percent(b.median.error_percent),
        seconds(b.p90.measured_s),
        seconds(b.p90.simulated_s),
        percent(b.p90.error_percent),
        percent(b.mean.error_percent),
        count(b.swaps.0),
        count(b.swaps.1),
    ]
}

fn made(m: &Manifest) -> Value {
    let ended = match (&m.ended, m.complete) {
        (Some(ended), true) => ended.clone(),
        (Some(ended), false) => format!("{ended}, not complete"),
        (None, _) => "not at its end".to_owned(),
    };
    let profile = m.profile_sha256.as_deref().map(|sha| sha.get(..12).unwrap_or(sha).to_owned());
    context! {
        command => &m.command,
        tool => m.tool.describe(),
        machine => m.machine.describe(),
        started => &m.started,
        ended,
        profile => profile.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::RunContext;

    fn row(source: Source, budget: u32, ttft: f64) -> ResultRow {
        let context = RunContext {
            model: Some("<tiny>".to_owned()),
            arrival_rate: Some(2.0),
            seed: Some(1),
            ..RunContext::new(source, 128, budget, "short")
        };
        let mut row = ResultRow::from_records(&[], &context);
        row.ttft_median = Some(ttft);
        (row.ttft_mean, row.ttft_p90, row.ttft_p99) = (Some(ttft), Some(2.0 * ttft), Some(3.0 * ttft));
        row
    }

    fn page(rows: &[ResultRow]) -> Result<String, PageError> {
        html(rows, &[PathBuf::from("nowhere/a&b.csv")], "A <title>", &plot::Options::default())
    }

    #[test]
    fn it_has_the_answer_the_figure_and_the_errors_and_escapes_what_it_is_given() {
        let mut rows = Vec::new();
        for (budget, ttft) in [(2, 1.0), (8, 0.105), (128, 0.1)] {
            rows.push(row(Source::Measured, budget, ttft));
            rows.push(row(Source::Simulated, budget, 1.1 * ttft));
        }
        let page = page(&rows).unwrap();
        for part in [
            "A &lt;title&gt;",
            "measured: from 8 slots on the median TTFT is within 10 % of the least, 105.0 ms of 100.0 ms.",
            "<figure><svg",
            "<td>+10.0 %</td>",
            "a&amp;b.csv",
            "No manifest lies beside the results.",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!page.contains("<title>A <") && !page.contains("<?xml"));
    }

    #[test]
    fn configurations_that_look_alike_have_no_answer() {
        let of = |cell: &str, source, budget| ResultRow {
            cell: Some(format!("{cell}{budget}")),
            ..row(source, budget, 1.0)
        };
        let mut rows = Vec::new();
        for (cell, source) in [("a", Source::Measured), ("b", Source::Measured), ("a", Source::Simulated)] {
            rows.extend([2, 128].map(|budget| of(cell, source, budget)));
        }
        let page = page(&rows).unwrap();
        for part in [
            "measured: the rows at 2 slots are of the cells a2 and b2",
            "No figure: the figure: the rows at 2 slots",
            "Not validated: ",
            "simulated: from 2 slots on",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_said_and_nothing_is_refused() {
        let mut rows: Vec<ResultRow> = (0..9)
            .map(|i| ResultRow { max_num_seqs: Some(i + 1), ..row(Source::Simulated, 2, 1.0) })
            .collect();
        assert!(page(&rows).unwrap().contains("No figure: "));
        rows.clear();
        assert!(matches!(page(&rows), Err(PageError::NoRows)));
    }
}
