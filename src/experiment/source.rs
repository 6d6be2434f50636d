//! Where a cell's requests come from.

use std::path::{Path, PathBuf};

use super::{EngineSettings, WorkloadSettings};
use crate::workload::arrivals::Arrivals;
use crate::workload::import;
use crate::workload::pool::PromptPool;
use crate::workload::regime::Regime;
use crate::workload::replay::{Replay, replay_trace};
use crate::workload::spec::{Amount, WorkloadError, WorkloadSpec, generate_trace};
use crate::workload::trace::Trace;

/// Requests that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// An impossible workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A trace that cannot be read.
    #[error("{0:#}")]
    Trace(anyhow::Error),
    /// Texts that cannot be read or counted.
    #[error("{0}")]
    Prompts(String),
}

/// What was read last, so that the cells of an experiment share it.
#[derive(Debug, Default)]
pub struct Sources {
    pool: Option<(PoolKey, PromptPool)>,
    trace: Option<(PathBuf, Trace)>,
}

#[derive(Clone, Debug, PartialEq)]
struct PoolKey {
    regime: Regime,
    dataset: Option<String>,
    tokenizer: Option<String>,
}

impl Sources {
    /// A cell's trace of a seed, with arrivals at `rate` (which a cell with `rho` does not know).
    pub fn trace(
        &mut self,
        engine: &EngineSettings,
        workload: &WorkloadSettings,
        rate: Option<f64>,
        seed: u64,
    ) -> Result<Trace, SourceError> {
        let amount = Amount::Requests(workload.num_requests);
        let ranks = engine.ranks();
        if let Some(path) = &workload.trace {
            let replay = Replay {
                arrivals: workload.arrivals,
                rate,
                popularity: Some(workload.popularity),
                total_loras: engine.total_loras,
                amount: Some(amount),
                max_tokens: Some(workload.max_tokens),
                seed,
                ranks,
            };
            return Ok(replay_trace(self.read_trace(Path::new(path))?, &replay)?);
        }
        let spec = WorkloadSpec {
            regime: workload.regime,
            arrivals: if workload.arrivals == Arrivals::Trace {
                Arrivals::Poisson
            } else {
                workload.arrivals
            },
            rate: rate.unwrap_or(f64::NAN),
            popularity: workload.popularity,
            total_loras: engine.total_loras,
            amount,
            max_tokens: workload.max_tokens,
            seed,
            ranks,
        };
        Ok(generate_trace(&spec, self.pool(workload)?)?)
    }

    fn read_trace(&mut self, path: &Path) -> Result<&Trace, SourceError> {
        let cached = self.trace.take().filter(|(p, _)| p == path);
        let entry = match cached {
            Some(entry) => entry,
            None => (path.to_owned(), import::read_any(path).map_err(SourceError::Trace)?.0),
        };
        Ok(&self.trace.insert(entry).1)
    }

    fn pool(&mut self, workload: &WorkloadSettings) -> Result<&PromptPool, SourceError> {
        let key = PoolKey {
            regime: workload.regime,
            dataset: workload.dataset.clone(),
            tokenizer: workload.tokenizer.clone(),
        };
        let cached = self.pool.take().filter(|(k, _)| *k == key);
        let entry = match cached {
            Some(entry) => entry,
            None => {
                let pool = match &key.dataset {
                    Some(path) => counted(Path::new(path), key.regime, key.tokenizer.as_deref())?,
                    None => PromptPool::embedded(key.regime),
                };
                (key, pool)
            }
        };
        Ok(&self.pool.insert(entry).1)
    }
}

#[cfg(feature = "engine")]
fn counted(path: &Path, regime: Regime, tokenizer: Option<&str>) -> Result<PromptPool, SourceError> {
    let error = |e: &dyn std::fmt::Display| SourceError::Prompts(e.to_string());
    let (tokenizer, _) =
        crate::workload::tokenizer::Tokenizer::resolve_or_byte_level(tokenizer).map_err(|e| error(&e))?;
    let (pool, report) =
        crate::workload::prompts::sharegpt_pool(path, regime, &tokenizer, |_| {}).map_err(|e| error(&e))?;
    if let Some(dropped) = report.said() {
        tracing::warn!("{}: {dropped}", path.display());
    }
    Ok(pool)
}

#[cfg(not(feature = "engine"))]
fn counted(path: &Path, _: Regime, _: Option<&str>) -> Result<PromptPool, SourceError> {
    Err(SourceError::Prompts(format!(
        "{} holds texts, and this program was built without tokenizers: build it with the feature 'engine'",
        path.display()
    )))
}
