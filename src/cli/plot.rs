//! `lora-hbm plot`: results CSVs to a figure.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::experiment::lenient;
use crate::report::files::check_writable;
use crate::report::plot::data::WithinRun;
use crate::report::plot::{Options, PlotError, footer, paths, write};
use crate::report::requests::read_requests;
use crate::report::results::{ResultRow, RunKey, read_rows};

#[derive(Args, Debug, Serialize)]
pub struct PlotArgs {
    /// Results CSVs, measured and simulated together
    #[arg(required = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    csv: Vec<PathBuf>,
    /// The figure; both OUT.svg and OUT.png are written [default: beside the first CSV]
    #[arg(short, long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
    /// A panel for each value of these columns [default: every setting that varies]
    #[arg(long, value_name = "COLUMN", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<Vec<String>>,
    /// A line in each panel for each value of this column, such as rho, marked by what binds
    #[arg(long, value_name = "COLUMN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<String>,
    /// The figure's title
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    /// Folder of requests files, from which single runs get intervals
    #[arg(long, value_name = "FOLDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<PathBuf>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct PlotSettings {
    csv: Vec<PathBuf>,
    out: Option<PathBuf>,
    #[serde(deserialize_with = "lenient::list")]
    by: Vec<String>,
    lines: Option<String>,
    #[serde(deserialize_with = "lenient::text")]
    title: Option<String>,
    requests: Option<PathBuf>,
}

pub fn run(args: &PlotArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: PlotSettings = ctx.resolve("plot", args)?;
    let Some(first) = settings.csv.first() else { return Err(Failure::usage("plot needs a results CSV")) };
    let base = settings.out.clone().unwrap_or_else(|| first.with_extension(""));
    let (svg, png) = paths(&base);
    for path in [&svg, &png] {
        check_writable(path).map_err(Failure::failed)?;
    }
    let mut rows: Vec<ResultRow> = Vec::new();
    for path in &settings.csv {
        rows.extend(read_rows(path).map_err(Failure::failed)?);
    }
    let within_run = match &settings.requests {
        Some(folder) => intervals(folder, &rows)?,
        None => HashMap::new(),
    };
    let footer = footer(&settings.csv, &rows);
    let options =
        Options { by: settings.by, lines: settings.lines, title: settings.title, footer, within_run };
    write(&base, &rows, &options).map_err(|e| match e {
        PlotError::UnknownColumn(_)
        | PlotError::TooManyPanels { .. }
        | PlotError::TooManyLines { .. }
        | PlotError::Mixed { .. }
        | PlotError::Alike { .. } => Failure::Usage(e.into()),
        _ => Failure::Failed(e.into()),
    })?;
    match ctx.format {
        OutputFormat::Json => {
            println!("{}", serde_json::json!({ "svg": svg, "png": png, "rows": rows.len() }))
        }
        OutputFormat::Table => println!("{} rows drawn: {} and {}", rows.len(), svg.display(), png.display()),
    }
    Ok(())
}

/// Draws results with everything else as by default; says where the two files are.
pub(super) fn draw(
    csv: &[PathBuf],
    requests: Option<&Path>,
    base: &Path,
) -> Result<(PathBuf, PathBuf), Failure> {
    let mut rows = Vec::new();
    for path in csv {
        rows.extend(read_rows(path).map_err(Failure::failed)?);
    }
    let within_run = requests.map(|folder| intervals(folder, &rows)).transpose()?.unwrap_or_default();
    let options = Options { footer: footer(csv, &rows), within_run, ..Options::default() };
    write(base, &rows, &options).map_err(|e| Failure::Failed(e.into()))
}

/// What each run's own requests say of its median and p99.
fn intervals(folder: &Path, rows: &[ResultRow]) -> Result<HashMap<RunKey, WithinRun>, Failure> {
    let mut intervals = HashMap::new();
    for key in rows.iter().filter_map(ResultRow::run_key) {
        let path = folder.join(key.file_name());
        if path.exists() {
            let records = read_requests(&path).map_err(Failure::failed)?;
            intervals.insert(key, WithinRun::of(&records));
        }
    }
    if intervals.is_empty() {
        return Err(Failure::usage(format!(
            "{} has no requests file of any run in these CSVs: give the folder that the sweep wrote them to",
            folder.display()
        )));
    }
    Ok(intervals)
}
