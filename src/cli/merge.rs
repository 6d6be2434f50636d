//! `lora-hbm merge`: results of shards into one file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::report::files::{check_writable, write_atomic};
use crate::report::manifest;
use crate::report::results::{ResultRow, RunKey, read_rows, to_csv};

#[derive(Args, Debug, Serialize)]
pub struct MergeArgs {
    /// Results CSVs
    #[arg(required = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<PathBuf>,
    /// The file to write; it must be new or one of FILES. Manifests stay where they are, and its rows name them from
    /// its own folder
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
    if out.exists() && !settings.files.iter().any(|file| is_same(file, &out)) {
        return Err(Failure::usage(format!(
            "{} exists and is not one of the files to merge: name it among them, or write to another file",
            out.display()
        )));
    }
    check_writable(&out).map_err(Failure::failed)?;
    let mut merged = Merged::default();
    for path in &settings.files {
        let rows = read_rows(path).map_err(Failure::failed)?;
        for (manifest, row) in manifest::of_rows(path, &rows).into_iter().zip(rows) {
            merged.add(manifest, row);
        }
    }
    let rows = merged.rows_of(&out);
    let text = to_csv(&out, &[], &rows).map_err(Failure::failed)?;
    write_atomic(&out, text.as_bytes()).map_err(Failure::failed)?;
    let Merged { duplicates, conflicts, .. } = &merged;
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

/// Whether both are one file, however they are written.
fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Rows in the order in which they first came.
#[derive(Default)]
struct Merged {
    /// Without their manifests: where one lies says nothing of a run.
    rows: Vec<ResultRow>,
    manifests: Vec<Option<PathBuf>>,
    seen: HashMap<RunKey, usize>,
    duplicates: usize,
    /// Duplicates whose other columns differ from the row that was kept.
    conflicts: usize,
}

impl Merged {
    /// Keeps the first row of each run. Rows outside any experiment have no cell and are the same run
    /// only if they are the same in every column, and have the same manifest or copies of one.
    fn add(&mut self, manifest: Option<PathBuf>, row: ResultRow) {
        let row = ResultRow { manifest: None, ..row };
        let kept = match row.run_key() {
            Some(key) => self.seen.get(&key).copied(),
            None => (0..self.rows.len()).find(|&i| {
                self.rows[i] == row && is_alike(self.manifests[i].as_deref(), manifest.as_deref())
            }),
        };
        if let Some(kept) = kept {
            self.duplicates += 1;
            self.conflicts += usize::from(self.rows[kept] != row);
            return;
        }
        if let Some(key) = row.run_key() {
            self.seen.insert(key, self.rows.len());
        }
        self.rows.push(row);
        self.manifests.push(manifest);
    }

    /// The rows, with their manifests as `out` names them.
    fn rows_of(&self, out: &Path) -> Vec<ResultRow> {
        let named =
            |manifest: &Option<PathBuf>| manifest.as_deref().map(|path| manifest::name_from(out, path));
        self.rows
            .iter()
            .zip(&self.manifests)
            .map(|(row, manifest)| ResultRow { manifest: named(manifest), ..row.clone() })
            .collect()
    }
}

/// Whether two manifests are one, or copies of one.
fn is_alike(a: Option<&Path>, b: Option<&Path>) -> bool {
    let text = |path: &Path| std::fs::read(path).ok();
    a == b || a.map(text) == b.map(text)
}
