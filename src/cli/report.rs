//! `lora-hbm report`: results CSVs to one HTML page.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::report::files::{check_writable, write_atomic};
use crate::report::page::html;
use crate::report::plot::{Options, PlotError, svg};
use crate::report::results::read_rows;

#[derive(Args, Debug, Serialize)]
pub struct ReportArgs {
    /// Results CSVs, measured and simulated together
    #[arg(required = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    csv: Vec<PathBuf>,
    /// The page [default: beside the first CSV]
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
    /// Its title
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    /// In the figure a line for each value of this column, such as rho, as in `plot --lines`
    #[arg(long, value_name = "COLUMN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ReportSettings {
    csv: Vec<PathBuf>,
    out: Option<PathBuf>,
    title: Option<String>,
    lines: Option<String>,
}

pub fn run(args: &ReportArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: ReportSettings = ctx.resolve("report", args)?;
    let Some(first) = settings.csv.first() else { return Err(Failure::usage("report needs a results CSV")) };
    let out = settings.out.clone().unwrap_or_else(|| first.with_extension("html"));
    check_writable(&out).map_err(Failure::failed)?;
    let mut rows = Vec::new();
    for path in &settings.csv {
        rows.extend(read_rows(path).map_err(Failure::failed)?);
    }
    let title = settings.title.as_deref().unwrap_or("TTFT over gpu_loras");
    let figure = Options { lines: settings.lines, ..Options::default() };
    // The page says why it has no figure, but lines that were asked for must be there, as in `plot`.
    if figure.lines.is_some()
        && let Err(e) = svg(&rows, &figure)
        && !matches!(e, PlotError::NoRows | PlotError::Draw(_))
    {
        return Err(Failure::Usage(e.into()));
    }
    let page = html(&rows, &settings.csv, title, &figure).map_err(|e| Failure::Failed(e.into()))?;
    write_atomic(&out, page.as_bytes()).map_err(Failure::failed)?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::json!({ "html": out, "rows": rows.len() })),
        OutputFormat::Table => println!("{} rows in {}", rows.len(), out.display()),
    }
    Ok(())
}
