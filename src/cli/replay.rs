//! `lora-hbm replay`: is the simulator the same machine as the engine that wrote a decision log?

use std::path::PathBuf;

use clap::Args;
use lora_sched::{Evict, SwapMode};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::experiment::policy;
use crate::report::decision_log;
use crate::sim::{Recorded, replay};

#[derive(Args, Debug, Serialize)]
pub struct ReplayArgs {
    /// Decision log of `serve --decision-log`
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<PathBuf>,
    /// Another eviction rule than the log's: then the replay should fail
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    evict: Option<String>,
    /// Another policy than the log's: then the replay should fail
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// Another swap mode than the log's: then the replay should fail
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_mode: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct ReplaySettings {
    log: Option<PathBuf>,
    evict: Option<String>,
    policy: Option<String>,
    swap_mode: Option<String>,
}

pub fn run(args: &ReplayArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: ReplaySettings = ctx.resolve("replay", args)?;
    let path = settings.log.ok_or_else(|| {
        Failure::usage("replay needs a decision log: write one with `lora-hbm serve --decision-log FILE`")
    })?;
    let usage = |e: lora_sched::UnknownChoice| Failure::Usage(e.into());
    let evict = settings.evict.map(|e| e.parse::<Evict>()).transpose().map_err(usage)?;
    let policy = settings.policy.as_deref().map(policy).transpose().map_err(usage)?;
    let swap_mode = settings.swap_mode.map(|m| m.parse::<SwapMode>()).transpose().map_err(usage)?;

    let (header, lines) = decision_log::read(&path).map_err(|e| Failure::Failed(e.into()))?;
    let recorded = Recorded::new(&header, &lines).map_err(|e| Failure::Failed(e.into()))?;
    if recorded.is_empty() {
        return Err(Failure::failed(format!(
            "{} has no step that ended: there is nothing to replay. A server writes its decisions as they end: send it \
             requests, stop it when they are answered, and replay then",
            path.display()
        )));
    }
    let mut config = recorded.config.clone();
    config.evict = evict.unwrap_or(config.evict);
    config.policy = policy.unwrap_or(config.policy);
    config.swap_mode = swap_mode.unwrap_or(config.swap_mode);
    let report = replay(&recorded, config).map_err(|e| Failure::Failed(e.into()))?;

    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&report).map_err(Failure::failed)?),
        OutputFormat::Table => {
            let mut table = ui::table(&["", "engine", "alike"]);
            let mut row = |what: &str, all: usize, alike: usize| {
                table.add_row([what.to_owned(), all.to_string(), alike.to_string()]);
            };
            row("steps", report.steps, report.steps_alike);
            row("swaps", report.swaps, report.swaps_alike);
            if report.fetches > 0 {
                row("reads from disk", report.fetches, report.fetches_alike);
            }
            row("first tokens", report.first_tokens, report.first_tokens_alike);
            println!("{table}");
            println!("largest TTFT difference: {}", ui::seconds(report.worst_ttft_difference_s));
            if report.under_way > 0 {
                println!(
                    "the log ends before {} of its requests do: what they had yet to do is left out",
                    report.under_way
                );
            }
            if let Some(difference) = &report.first_difference {
                println!("first difference: {difference}");
            }
        }
    }
    if report.holds() { Ok(()) } else { Err(Failure::Unmet("the simulator decided otherwise".to_owned())) }
}
