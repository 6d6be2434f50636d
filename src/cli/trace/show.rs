//! `lora-hbm trace show`.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::super::failure::Failure;
use super::super::settings::{Context, OutputFormat};
use crate::experiment::lenient;
use crate::report::stats::{Summary, std_dev};
use crate::workload::import;
use crate::workload::trace::Trace;

#[derive(Args, Debug, Serialize)]
pub struct ShowArgs {
    /// A trace: this program's JSONL, Azure's CSV or Mooncake's JSONL
    #[arg(required_unless_present = "dataset")]
    #[serde(skip)]
    file: Option<PathBuf>,
    /// A ShareGPT file instead: its records and how many prompts are in each regime
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dataset: Option<PathBuf>,
    /// Tokenizer that counts the dataset's prompts [default: byte-level]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Settings {
    dataset: Option<PathBuf>,
    #[serde(deserialize_with = "lenient::text")]
    tokenizer: Option<String>,
}

pub fn run(args: &ShowArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: Settings = ctx.resolve("trace", args)?;
    if let Some(file) = &args.file {
        let (trace, skipped) = import::read_any(file)?;
        if skipped > 0 {
            tracing::warn!("{skipped} requests without prompt or output tokens are left out");
        }
        print_trace(&file.display().to_string(), &trace, ctx);
        return Ok(());
    }
    show_dataset(&settings, ctx)
}

#[cfg(feature = "engine")]
fn show_dataset(settings: &Settings, ctx: &Context) -> Result<(), Failure> {
    use super::super::ui;
    use crate::workload::prompts::read_sharegpt;
    use crate::workload::regime::Regime;
    use crate::workload::tokenizer::Tokenizer;

    let Some(path) = &settings.dataset else { return Err(Failure::usage("give a trace, or --dataset")) };
    let tokenizer =
        Tokenizer::resolve(settings.tokenizer.as_deref()).map_err(|e| Failure::Failed(e.into()))?;
    let bar = ui::bar(path.metadata().map_or(0, |m| m.len()) >> 20, "reading the dataset (MB)");
    let read = read_sharegpt(path, &tokenizer, |_| true, |at| bar.set_position(at >> 20));
    bar.finish_and_clear();
    let (prompts, report) = read.map_err(|e| Failure::Failed(e.into()))?;
    let inside = |regime: Regime| prompts.iter().filter(|p| regime.tokens().contains(&p.tokens)).count();
    let (short, long) = (inside(Regime::Short), inside(Regime::Long));
    let longest = prompts.iter().map(|p| p.tokens).max().unwrap_or_default();
    if ctx.format == OutputFormat::Json {
        let json = json!({
            "dataset": path, "tokenizer": tokenizer.source().to_string(), "records": report.records,
            "with_human_turn": report.with_human_turn, "dropped_bytes": report.dropped_bytes,
            "short": short, "long": long, "longest": longest,
        });
        println!("{json}");
        return Ok(());
    }
    println!("dataset            {}", path.display());
    println!("tokenizer          {}", tokenizer.source());
    println!("whole records      {}", report.records);
    println!("with a human turn  {}", report.with_human_turn);
    println!("short (256-1024)   {short}");
    println!("long (2048-4096)   {long}");
    println!("longest prompt     {longest} tokens");
    if let Some(dropped) = report.said() {
        println!("note               {dropped}");
    }
    Ok(())
}

#[cfg(not(feature = "engine"))]
fn show_dataset(settings: &Settings, _: &Context) -> Result<(), Failure> {
    Err(Failure::usage(format!(
        "counting {:?} needs a tokenizer, which this build has not: build with the feature `engine`",
        settings.dataset
    )))
}

/// Says what is in a trace.
pub fn print_trace(name: &str, trace: &Trace, ctx: &Context) {
    let prompts: Vec<f64> = trace.requests.iter().map(|r| f64::from(r.prompt_tokens)).collect();
    let outputs: Vec<f64> = trace.requests.iter().map(|r| f64::from(r.output_tokens)).collect();
    let gaps: Vec<f64> = trace.requests.windows(2).map(|w| w[1].arrival_s - w[0].arrival_s).collect();
    let variation = std_dev(&gaps).zip(crate::report::stats::mean(&gaps)).map(|(sd, mean)| sd / mean);
    // By number, not in a list of all numbers up to the largest: an adapter may have any.
    let mut counts: HashMap<u32, u64> = HashMap::new();
    trace.requests.iter().filter_map(|r| r.adapter).for_each(|a| *counts.entry(a).or_default() += 1);
    let distinct = counts.len();
    let busiest = counts.values().copied().max().unwrap_or_default() as f64 / trace.requests.len() as f64;
    let texts = trace.requests.iter().filter(|r| r.prompt.is_some()).count();
    let (prompts, outputs) = (Summary::of(&prompts), Summary::of(&outputs));
    if ctx.format == OutputFormat::Json {
        let json = json!({
            "trace": name, "header": trace.header, "requests": trace.requests.len(),
            "duration_s": trace.duration_s(), "rate": trace.mean_rate(), "gap_cv": variation,
            "prompt_tokens": prompts, "output_tokens": outputs, "adapters": distinct,
            "busiest_adapter_share": busiest, "texts": texts,
        });
        println!("{json}");
        return;
    }
    let lengths = |s: Option<Summary>| {
        s.map(|s| format!("min {}, median {}, mean {:.1}, max {}", s.min, s.median, s.mean, s.max))
            .unwrap_or_default()
    };
    println!("trace          {name}");
    println!("source         {}", trace.header.source);
    println!("requests       {} ({texts} with their text)", trace.requests.len());
    println!(
        "arrivals       {:.3} s, {:.3}/s, gaps' coefficient of variation {:.2}",
        trace.duration_s(),
        trace.mean_rate().unwrap_or_default(),
        variation.unwrap_or_default()
    );
    println!("prompt tokens  {}", lengths(prompts));
    println!("output tokens  {}", lengths(outputs));
    println!(
        "adapters       {distinct} different ones, the busiest has {:.1} % of the requests; popularity: {} (seed {})",
        busiest * 1e2,
        trace.header.popularity,
        trace.header.seed
    );
}
