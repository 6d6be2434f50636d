//! Experiments: a TOML file resolved into cells, each with everything that its runs depend on.
//!
//! ```toml
//! [engine]                     # settings of `serve`
//! model = "tiny"
//! [workload]                   # settings of `measure`
//! arrival_rate = 2.0           # with a `trace`, its requests, adapters and output tokens hold unless they are set
//! [axes]                       # any setting of the two tables above: every combination is a cell
//! gpu_loras = [2, 4, 8]
//! rank = [8, 64]
//! [replicate]                  # what is done again in each cell
//! seeds = [42, 43]             # on another trace
//! repeats = 5                  # on the same one
//! [[exclude]]                  # combinations to leave out
//! gpu_loras = 8
//! rank = [64]
//! [output]
//! csv = "results.csv"
//! requests = "requests"        # folders with a file a run: its requests,
//! decisions = "decisions"      # and the decision log of each measured one
//! ```
//!
//! A cell's [key](Cell::key) is the hash of its resolved settings, so that resuming, sharding and
//! merging agree on it whatever the file was called and however it was written.

mod cell;
#[cfg(feature = "server")]
mod engine;
mod factor;
mod fields;
pub mod lenient;
#[cfg(feature = "server")]
mod measure;
mod parse;
mod plan;
mod settings;
mod shard;
mod simulate;
mod size;
mod slo;
mod source;
mod sweep;
mod tally;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::report::files::{self, FileError};
use crate::report::results::{ResultRow, RunKey, Source};

pub use cell::Cell;
pub use factor::{FactorError, Target, cost_factor};
#[cfg(feature = "server")]
pub use measure::{Engines, MeasureError, Measured};
pub use plan::{BudgetPlan, Plan, PlanError, Planner, Seen, Verdict};
pub use settings::{EngineSettings, Impossible, WorkloadSettings, policy};
pub use shard::{Shard, UnknownShard};
pub use simulate::{Asked, BURST, SimulateError, Simulated, Simulator, is_saturated};
pub use size::{SizeError, parse_size};
pub use slo::{NotAnSlo, Slo};
pub use source::{SourceError, Sources};
pub use sweep::{Sweep, SweepError, SweepProgress};
pub use tally::Tally;

/// An experiment that cannot be read or makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not TOML.
    #[error("{} is not TOML: {source}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<toml::de::Error>,
    },
    /// Something in it is unknown or impossible.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What, where, and what to write instead.
        message: String,
    },
}

/// What is done again in every cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Replicate {
    /// Seeds of the traces.
    pub seeds: Vec<u64>,
    /// Runs on each trace.
    pub repeats: u32,
}

impl Default for Replicate {
    fn default() -> Self {
        Self { seeds: vec![42], repeats: 1 }
    }
}

/// Where results go, relative to the working directory; none is the caller's choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Output {
    /// The results CSV.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub csv: Option<PathBuf>,
    /// Folder of requests JSONL files, one a run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<PathBuf>,
    /// Folder of decision logs, one a measured run. A log has `.part` behind its name until its run's row is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decisions: Option<PathBuf>,
    /// The figure that `sweep` draws of the CSV, as SVG and PNG.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plot: Option<PathBuf>,
}

/// A resolved experiment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Experiment {
    /// Its name: the file's, without folder and ending.
    pub name: String,
    cells: Vec<Cell>,
    /// What is done again in every cell.
    pub replicate: Replicate,
    /// Where results go.
    pub output: Output,
}

/// One run of one cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run<'a> {
    /// What is run.
    pub cell: &'a Cell,
    /// The trace's seed.
    pub seed: u64,
    /// Which of the runs on that trace, from 0.
    pub repeat: u32,
}

impl Run<'_> {
    /// By what its row and its files are known.
    pub fn key(&self, source: Source) -> RunKey {
        RunKey { source, cell: self.cell.key().to_owned(), seed: self.seed, repeat: self.repeat }
    }
}

impl Experiment {
    /// Reads and resolves a file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ExperimentError> {
        let path = path.as_ref();
        Self::parse(&files::read_text(path)?, path)
    }

    /// Resolves a file's text; `path` names it in messages.
    pub fn parse(text: &str, path: impl AsRef<Path>) -> Result<Self, ExperimentError> {
        let path = path.as_ref();
        let table: toml::Table =
            text.parse().map_err(|e| ExperimentError::Toml { path: path.to_owned(), source: Box::new(e) })?;
        let (cells, replicate, output) = parse::resolve(&table)
            .map_err(|message| ExperimentError::Invalid { path: path.to_owned(), message })?;
        let name = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        Ok(Self { name, cells, replicate, output })
    }

    /// The cells, in a fixed order: axes by name, the last one changing fastest, values as written.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Every run of the cells in `shard` (all of them without one), seeds and repeats outermost: an
    /// interrupted sweep has whole curves of fewer replicates rather than part of a curve.
    pub fn runs(&self, shard: Option<Shard>) -> Vec<Run<'_>> {
        let mut runs = Vec::new();
        for repeat in 0..self.replicate.repeats {
            for &seed in &self.replicate.seeds {
                let cells = self.cells.iter().filter(|c| shard.is_none_or(|s| s.contains(c.key())));
                runs.extend(cells.map(|cell| Run { cell, seed, repeat }));
            }
        }
        runs
    }

    /// [`Experiment::runs`] without those that `rows` has already from the same source.
    pub fn pending(&self, shard: Option<Shard>, source: Source, rows: &[ResultRow]) -> Vec<Run<'_>> {
        let done: HashSet<RunKey> = rows.iter().filter_map(ResultRow::run_key).collect();
        let mut runs = self.runs(shard);
        runs.retain(|run| !done.contains(&run.key(source)));
        runs
    }
}

/// The reference experiment's budgets: 2, 4, 8 … and the total.
pub fn seed_budgets(total_loras: u32) -> Vec<u32> {
    let mut budgets: Vec<u32> = (1..u32::BITS).map(|i| 1u32 << i).take_while(|&b| b < total_loras).collect();
    budgets.push(total_loras);
    budgets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_s_budgets_double_up_to_the_total_however_large_it_is() {
        assert_eq!(seed_budgets(1), [1]);
        assert_eq!(seed_budgets(128), [2, 4, 8, 16, 32, 64, 128]);
        assert_eq!(seed_budgets(100), [2, 4, 8, 16, 32, 64, 100]);
        let most = seed_budgets(3_000_000_000);
        assert_eq!((most.len(), most[30]), (32, 1 << 31));
        assert_eq!(most[31], 3_000_000_000);
    }
}
