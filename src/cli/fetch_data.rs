//! `lora-hbm fetch-data`.

use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::workload::data_folder::{LLAMA2_TOKENIZER_NAMES, data_folder};
use crate::workload::fetch::{self, Outcome};

/// The data folder is `$LORA_HBM_DATA`.
#[derive(Args, Debug, Serialize)]
#[command(
    after_help = "The data folder is $LORA_HBM_DATA, else $XDG_DATA_HOME/lora-hbm, else ~/.local/share/lora-hbm."
)]
pub struct FetchDataArgs {
    /// Fetch SmolLM2-135M-Instruct instead, a small real model to serve (93 MB)
    #[arg(long)]
    smollm2: bool,
}

pub fn run(args: &FetchDataArgs, ctx: &Context) -> Result<(), Failure> {
    let folder = data_folder();
    let mut say = |text: &str| {
        if !ctx.quiet {
            eprintln!("{text}");
        }
    };
    let there = |outcome| if outcome == Outcome::Present { "present" } else { "fetched" };
    if args.smollm2 {
        let (path, outcome) =
            fetch::fetch_smollm2(&folder, &mut say).map_err(|e| Failure::Failed(e.into()))?;
        if ctx.format == OutputFormat::Json {
            println!("{}", serde_json::json!({"smollm2": {"path": path, "outcome": there(outcome)}}));
        } else {
            println!("SmolLM2-135M-Instruct  {} {}", there(outcome), path.display());
            println!(
                "Serve it with: lora-hbm serve --model {} --total-loras 4 --gpu-loras 2",
                path.display()
            );
        }
        return Ok(());
    }
    let fetched = fetch::fetch(&folder, &mut say).map_err(|e| Failure::Failed(e.into()))?;
    let (sharegpt, tokenizer) = (&fetched.sharegpt, &fetched.tokenizer);
    if ctx.format == OutputFormat::Json {
        let json = serde_json::json!({
            "sharegpt": {"path": sharegpt.0, "outcome": there(sharegpt.1)},
            "tokenizer": {"path": tokenizer.0, "outcome": there(tokenizer.1)},
        });
        println!("{json}");
    } else {
        println!("ShareGPT's text    {:8} {}", there(sharegpt.1), sharegpt.0.display());
        println!("Llama-2 tokenizer  {:8} {}", there(tokenizer.1), tokenizer.0.display());
        println!(
            "Use them with --dataset {} --tokenizer {}",
            sharegpt.0.display(),
            LLAMA2_TOKENIZER_NAMES[0]
        );
    }
    Ok(())
}
