//! Running a cell on a real engine, over HTTP, in this process.

use super::EngineSettings;
use crate::engine::server::{LocalError, LocalServer};
use crate::engine::setup::{self, Loaded, SetupError};
use crate::loadgen::{Endpoint, EndpointError, Lag, LoadOptions, PrepareError, prepare, run_load};
use crate::report::decision_log::DecisionLog;
use crate::report::record::RequestRecord;
use crate::workload::trace::Trace;

/// A cell that cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// Settings that the engine does not take.
    #[error("{0}")]
    Settings(String),
    /// The engine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The server.
    #[error(transparent)]
    Server(#[from] LocalError),
    /// The client.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The prompts.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The run ended before its time.
    #[error("the run was cut short: {0}")]
    CutShort(String),
}

/// What came of a measured run.
#[derive(Clone, Debug)]
pub struct Measured {
    /// One a request, in order of the trace.
    pub records: Vec<RequestRecord>,
    /// Adapters copied into a slot, preloading left out.
    pub swaps: u64,
    /// How late the client was.
    pub lag: Lag,
    /// From the first scheduled arrival to the last byte, seconds.
    pub wall_s: f64,
}

/// Engines by their settings: adapters are made once for all budgets.
#[derive(Debug, Default)]
pub struct Engines {
    loaded: Option<(setup::EngineSettings, Loaded)>,
}

impl Engines {
    /// Model, tokenizer and adapters for these settings.
    pub fn loaded(&mut self, engine: &EngineSettings) -> Result<&Loaded, MeasureError> {
        let settings = engine.for_engine().map_err(MeasureError::Settings)?;
        let any_budget = setup::EngineSettings { gpu_loras: 0, ..settings.clone() };
        let cached = self.loaded.take().filter(|(k, _)| *k == any_budget);
        let entry = match cached {
            Some(entry) => entry,
            None => (any_budget, Loaded::load(settings)?),
        };
        Ok(&self.loaded.insert(entry).1)
    }

    /// How long an engine's start and end take, its weights and adapters being there, seconds.
    pub fn start_s(&mut self, engine: &EngineSettings) -> Result<f64, MeasureError> {
        let loaded = self.loaded(engine)?;
        let begun = std::time::Instant::now();
        LocalServer::start(loaded, engine.gpu_loras as usize, None)?.stop();
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Starts an engine, sends it the trace, and stops it. `progress` is told how many requests have
    /// ended, of how many.
    pub fn run(
        &mut self,
        engine: &EngineSettings,
        trace: &Trace,
        log: Option<DecisionLog>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Measured, MeasureError> {
        let loaded = self.loaded(engine)?;
        let prepared = prepare(trace, loaded.tokenizer())?;
        let server = LocalServer::start(loaded, engine.gpu_loras as usize, log)?;
        let endpoint = Endpoint::new(&server.url(), None)?;
        let options = LoadOptions::default();
        let load = run_load(&endpoint, &prepared, &options, |p| progress(p.ended, p.total));
        let outcome = server.block_on(load);
        let swaps = server.engine().swap_stats().runtime.swap_count;
        server.stop();
        match outcome.cut_short {
            Some(why) => Err(MeasureError::CutShort(why)),
            None => {
                Ok(Measured { records: outcome.records, swaps, lag: outcome.lag, wall_s: outcome.wall_s })
            }
        }
    }
}
