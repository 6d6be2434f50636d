//! `lora-hbm compare`: two configurations told apart.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::report::comparison::{Comparison, compare};
use crate::report::results::read_rows;

#[derive(Args, Debug, Serialize)]
pub struct CompareArgs {
    /// Results CSV of one configuration, of several seeds
    a: PathBuf,
    /// Results CSV of another, on the same seeds best
    b: PathBuf,
}

pub fn run(args: &CompareArgs, ctx: &Context) -> Result<(), Failure> {
    let rows = |path: &PathBuf| read_rows(path).map_err(|e| Failure::Failed(e.into()));
    let found = compare(&rows(&args.a)?, &rows(&args.b)?).map_err(|e| Failure::Usage(e.into()))?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&found).map_err(Failure::failed)?),
        OutputFormat::Table => print(&found, args),
    }
    Ok(())
}

fn print(found: &[Comparison], args: &CompareArgs) {
    println!("A is {}, B is {}", args.a.display(), args.b.display());
    for comparison in found {
        println!("\n{}", comparison.what);
        let mut table = ui::table(&["statistic", "A", "B", "B - A, 95 % interval", "verdict"]);
        for d in &comparison.differences {
            let verdict = match (d.told_apart(), d.difference_s.low > 0.0) {
                (false, _) => "not told apart",
                (true, true) => "A is lower",
                (true, false) => "B is lower",
            };
            table.add_row([
                d.statistic.to_owned(),
                ui::seconds(d.a_s),
                ui::seconds(d.b_s),
                format!("{} to {}", ui::seconds(d.difference_s.low), ui::seconds(d.difference_s.high)),
                verdict.to_owned(),
            ]);
        }
        println!("{table}");
        match comparison.pairs {
            0 => println!("independent traces"),
            n => println!("{n} pairs on the same traces"),
        }
    }
}
