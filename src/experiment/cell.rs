//! One point of an experiment.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::settings::{EngineSettings, WorkloadSettings};
use crate::report::digest::{canonical_json, sha256};
use crate::report::results::{RunContext, Source, rank_column};
use crate::report::settings;
use crate::workload::trace::Trace;

/// Engine and workload settings, complete. Equal settings have equal keys, in every experiment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    key: String,
    /// What serves.
    pub engine: EngineSettings,
    /// What is asked of it.
    pub workload: WorkloadSettings,
}

impl Cell {
    /// A cell of these settings; its key follows from them.
    pub fn new(engine: EngineSettings, workload: WorkloadSettings) -> Self {
        let mut cell = Self { key: String::new(), engine, workload };
        cell.key = cell.hash();
        cell
    }

    /// The first 16 hexadecimal digits of the SHA-256 of the settings' canonical JSON.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What a message calls it.
    pub(super) fn called(&self) -> String {
        let EngineSettings { gpu_loras, total_loras, .. } = self.engine;
        let rank = rank_column(&self.engine.ranks()).unwrap_or_default();
        format!("cell {} (gpu_loras {gpu_loras} of {total_loras}, rank {rank})", self.key)
    }

    /// [`Self::run_context`] of a run on `trace`, which has what the cell leaves to a trace file.
    pub fn run_context_on(&self, trace: &Trace, source: Source, seed: u64, repeat: u32) -> RunContext {
        RunContext {
            num_requests: Some(trace.requests.len() as u64),
            popularity: Some(trace.header.popularity.clone()),
            max_tokens: trace.common_output_tokens(),
            ..self.run_context(source, seed, repeat)
        }
    }

    /// What results call the prompts, as `measure` and `simulate` do: the regime, or the trace file's name.
    fn regime_column(&self) -> String {
        match &self.workload.trace {
            Some(path) => Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            None => self.workload.regime.to_string(),
        }
    }

    /// What a result row says of a run of this cell; rate under load `rho`, counts, duration and
    /// manifest are the caller's to add, and what only a trace file tells is none.
    pub fn run_context(&self, source: Source, seed: u64, repeat: u32) -> RunContext {
        let (engine, workload) = (&self.engine, &self.workload);
        RunContext {
            arrival_rate: workload.arrival_rate,
            num_requests: workload.num_requests,
            model: Some(engine.model.clone()),
            rank: rank_column(&engine.ranks()),
            policy: Some(engine.policy.to_string()),
            evict: Some(engine.evict.to_string()),
            swap_mode: Some(engine.swap_mode.to_string()),
            popularity: workload.popularity.map(|p| p.to_string()),
            seed: Some(seed),
            repeat: Some(repeat),
            max_num_seqs: Some(engine.max_num_seqs),
            max_tokens: workload.max_tokens,
            arrivals: Some(workload.arrivals.to_string()),
            rho: workload.rho,
            cell: Some(self.key.clone()),
            settings: Some(self.settings()),
            ..RunContext::new(source, engine.total_loras, engine.gpu_loras, &self.regime_column())
        }
    }

    /// The settings that no column of a row tells, as [`ResultRow::settings`](crate::report::results::ResultRow::settings)
    /// has them.
    fn settings(&self) -> String {
        // `gpu_loras` to `rho` have columns under these or other names.
        const TOLD: [&str; 16] = [
            "model",
            "total_loras",
            "gpu_loras",
            "max_r",
            "ranks",
            "max_num_seqs",
            "policy",
            "evict",
            "swap_mode",
            "regime",
            "arrival_rate",
            "rho",
            "num_requests",
            "max_tokens",
            "popularity",
            "arrivals",
        ];
        let of = |here: serde_json::Value, default: serde_json::Value| {
            let here = if let serde_json::Value::Object(fields) = here { fields } else { Default::default() };
            here.into_iter().filter(move |(name, value)| {
                !TOLD.contains(&name.as_str()) && default.get(name) != Some(value)
            })
        };
        let engine = of(json!(self.engine), json!(EngineSettings::default()))
            // Rows have a column `seed`, which is the trace's.
            .map(|(name, value)| (if name == "seed" { "engine_seed".to_owned() } else { name }, value));
        let workload = of(json!(self.workload), json!(WorkloadSettings::default()));
        let text = |value: serde_json::Value| match value {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        };
        settings::join(&engine.chain(workload).map(|(name, value)| (name, text(value))).collect())
    }

    fn hash(&self) -> String {
        let settings = json!({ "engine": self.engine, "workload": self.workload });
        let mut key = sha256(canonical_json(&settings).as_bytes());
        key.truncate(16);
        key
    }
}
