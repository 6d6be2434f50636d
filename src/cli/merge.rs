//! `lora-hbm merge`: results of shards into one file.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::report::files::{check_writable, write_atomic};
use crate::report::results::{ResultRow, RunKey, read_rows, to_csv};

#[derive(Args, Debug, Serialize)]
pub struct MergeArgs {
    /// Results CSVs
    #[arg(required = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<PathBuf>,
    /// The file to write; it must be new or one of FILES
    #[arg(short, long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MergeSettings {
    files: Vec<PathBuf>,
    out: Option<PathBuf>,
}

pub fn run(args: &MergeArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: MergeSettings = ctx.resolve("merge", args)?;
    let out = settings.out.ok_or_else(|| Failure::usage("merge needs -o OUT, the file to write"))?;
    if out.exists() && !settings.files.contains(&out) {
        return Err(Failure::usage(format!(
            "{} exists and is not one of the files to merge: name it among them, or write to another file",
            out.display()
        )));
    }
    check_writable(&out).map_err(Failure::failed)?;
    let mut merged = Merged::default();
    for path in &settings.files {
        for row in read_rows(path).map_err(Failure::failed)? {
            merged.add(row);
        }
    }
    let text = to_csv(&out, &[], &merged.rows).map_err(Failure::failed)?;
    write_atomic(&out, text.as_bytes()).map_err(Failure::failed)?;
    let Merged { rows, duplicates, conflicts, .. } = &merged;
    match ctx.format {
        OutputFormat::Json => println!(
            "{}",
            serde_json::json!({
                "out": out, "rows": rows.len(), "duplicates_dropped": duplicates, "conflicts_dropped": conflicts,
            })
        ),
        OutputFormat::Table => println!(
            "{} rows of {} files in {}; {duplicates} duplicates dropped",
            rows.len(),
            settings.files.len(),
            out.display()
        ),
    }
    if *conflicts > 0 {
        tracing::warn!(
            "{conflicts} of the dropped rows had other numbers for a run that an earlier file has: the earlier ones were kept"
        );
    }
    Ok(())
}

/// Rows in the order in which they first came.
#[derive(Default)]
struct Merged {
    rows: Vec<ResultRow>,
    seen: HashMap<RunKey, usize>,
    duplicates: usize,
    /// Duplicates whose other columns differ from the row that was kept.
    conflicts: usize,
}

impl Merged {
    /// Keeps the first row of each run. Rows outside any experiment have no cell and are the same run
    /// only if they are the same in every column.
    fn add(&mut self, row: ResultRow) {
        let kept = match row.run_key() {
            Some(key) => self.seen.get(&key).map(|i| &self.rows[*i]),
            None => self.rows.iter().find(|kept| **kept == row),
        };
        if let Some(kept) = kept {
            self.duplicates += 1;
            self.conflicts += usize::from(*kept != row);
            return;
        }
        if let Some(key) = row.run_key() {
            self.seen.insert(key, self.rows.len());
        }
        self.rows.push(row);
    }
}
