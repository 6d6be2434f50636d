//! Where a cell's requests come from.

use std::path::{Path, PathBuf};

use super::{EngineSettings, Simulator, WorkloadSettings};
use crate::workload::arrivals::Arrivals;
use crate::workload::import;
use crate::workload::pool::PromptPool;
use crate::workload::regime::Regime;
use crate::workload::replay::{Replay, replay_trace};
use crate::workload::spec::{Amount, WorkloadError, WorkloadSpec, generate_trace};
use crate::workload::trace::{NO_ADAPTERS, Trace};

/// Requests that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// An impossible workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A trace that cannot be read.
    #[error("{0:#}")]
    Trace(anyhow::Error),
    /// A trace that cannot be used as the cell says.
    #[error("{path}: {source}")]
    Replay {
        /// Its file.
        path: String,
        /// Why.
        source: WorkloadError,
    },
    /// More requests than the trace has, at the trace's times.
    #[error(
        "num_requests is {asked} and the trace {path} has {there} requests: lower it, leave it out for the whole trace, \
         or set other arrivals than \"trace\""
    )]
    TooShort {
        /// Its file.
        path: String,
        /// Asked for.
        asked: u64,
        /// In the trace.
        there: u64,
    },
    /// A warm-up that takes all of a trace.
    #[error("warm_up is {warm_up} and leaves none of the {there} requests of the trace {path}: lower it")]
    WarmUp {
        /// Requests to leave out.
        warm_up: u64,
        /// The trace's file.
        path: String,
        /// Requests there are.
        there: usize,
    },
    /// Several seeds where nothing is drawn.
    #[error(
        "[replicate] has several seeds, and times, lengths and adapters are all those of the trace {path}: every seed would \
         be the same run. Give one seed, or draw anew with arrivals or popularity"
    )]
    NothingDrawn {
        /// The trace's file.
        path: String,
    },
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

/// When requests come.
#[derive(Clone, Copy)]
struct Times {
    arrivals: Arrivals,
    rate: Option<f64>,
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
        let times = Times { arrivals: workload.arrivals, rate };
        let trace = self.made(engine, workload, times, workload.num_requests, seed)?;
        match &workload.trace {
            Some(path) if workload.warm_up >= trace.requests.len() as u64 => Err(SourceError::WarmUp {
                warm_up: workload.warm_up,
                path: path.clone(),
                there: trace.requests.len(),
            }),
            _ => Ok(trace),
        }
    }

    /// Requests like a cell's for [`Simulator::saturation_rate`]: as many as that takes,
    /// whatever the cell's own number of them is, else the same `rho` would be another load for another number. A trace
    /// that is shorter comes over again.
    pub fn burst(
        &mut self,
        engine: &EngineSettings,
        workload: &WorkloadSettings,
        seed: u64,
    ) -> Result<Trace, SourceError> {
        // Any times will do: they all come at once.
        let times = Times { arrivals: Arrivals::Fixed, rate: Some(1.0) };
        self.made(engine, workload, times, Some(Simulator::burst(engine)), seed)
    }

    /// Whether another seed is another run: something is drawn, be it times, lengths or adapters.
    pub fn draws(&mut self, workload: &WorkloadSettings) -> Result<bool, SourceError> {
        let Some(path) = &workload.trace else { return Ok(true) };
        if workload.arrivals != Arrivals::Trace || workload.popularity.is_some() {
            return Ok(true);
        }
        Ok(self.read_trace(Path::new(path))?.header.popularity == NO_ADAPTERS)
    }

    /// `requests` of none is the whole trace.
    fn made(
        &mut self,
        engine: &EngineSettings,
        workload: &WorkloadSettings,
        Times { arrivals, rate }: Times,
        requests: Option<u64>,
        seed: u64,
    ) -> Result<Trace, SourceError> {
        let ranks = engine.ranks();
        if let Some(path) = &workload.trace {
            let replay = Replay {
                arrivals,
                rate,
                popularity: workload.popularity,
                total_loras: engine.total_loras,
                amount: requests.map(Amount::Requests),
                max_tokens: workload.max_tokens,
                seed,
                ranks,
            };
            return replay_trace(self.read_trace(Path::new(path))?, &replay).map_err(|e| match e {
                WorkloadError::TraceTooShort { asked, there } => {
                    SourceError::TooShort { path: path.clone(), asked, there }
                }
                source => SourceError::Replay { path: path.clone(), source },
            });
        }
        let spec = WorkloadSpec {
            regime: workload.regime,
            arrivals: if arrivals == Arrivals::Trace { Arrivals::Poisson } else { arrivals },
            rate: rate.unwrap_or(f64::NAN),
            popularity: workload.popularity.unwrap_or_default(),
            total_loras: engine.total_loras,
            amount: Amount::Requests(requests.unwrap_or(workload.requests())),
            max_tokens: workload.output_tokens(),
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
