//! Running what is left of an experiment, row by row.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rayon::prelude::*;

use super::source::{SourceError, Sources};
use super::{Cell, Experiment, Run, Shard, SimulateError, Simulator, is_saturated};
#[cfg(feature = "server")]
use crate::report::decision_log::{DecisionLog, LogError};
use crate::report::files::FileError;
use crate::report::manifest::Manifest;
use crate::report::record::RequestRecord;
use crate::report::requests::{RequestsError, append_requests};
use crate::report::results::{ResultRow, ResultsError, Source, append_rows, read_rows};
use crate::workload::trace::Trace;

/// Simulated runs between two appends.
const CHUNK: usize = 64;

/// A sweep that stopped. What it had finished is in its file; `--resume` goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The results.
    #[error(transparent)]
    Results(#[from] ResultsError),
    /// The requests.
    #[error(transparent)]
    Requests(#[from] RequestsError),
    /// Another file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The workload.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A simulated run.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// A measured run.
    #[cfg(feature = "server")]
    #[error(transparent)]
    Measure(#[from] super::MeasureError),
    /// A decision log.
    #[cfg(feature = "server")]
    #[error(transparent)]
    Log(#[from] LogError),
    /// A run that is still to be measured has a decision log already: another results file has its row.
    #[cfg(feature = "server")]
    #[error(
        "{} is the decision log of a run that has ended: move it away, or name another folder in [output] decisions",
        .0.display()
    )]
    Logged(PathBuf),
    /// A run, by what its cell is called.
    #[error("{run}: {source}")]
    Run {
        /// The cell and the seed.
        run: String,
        /// What is wrong.
        source: Box<SweepError>,
    },
    /// `rho` of a full budget that there is no room for.
    #[error(
        "the load rho is a share of what total_loras slots sustain, and {0}. Lower total_loras, or set arrival_rate in place of \
         rho"
    )]
    NoFullBudget(SimulateError),
    /// `rho` without a profile.
    #[error("the load rho is a share of the saturation rate, which a profile gives: name one with --profile")]
    NoProfile,
    /// Going on from rows of another profile.
    #[error(
        "{} has {rows} rows made with another profile ({}… by {manifest}; this one is {}…), and two machines in one curve \
         are none: name another file with --out, or remove those rows",
        csv.display(),
        theirs.get(..12).unwrap_or(theirs),
        ours.get(..12).unwrap_or(ours)
    )]
    OtherProfile {
        /// The results.
        csv: PathBuf,
        /// How many of them.
        rows: usize,
        /// What they say they were made by.
        manifest: String,
        /// Hash of the profile that it names.
        theirs: String,
        /// Hash of the profile that is given now.
        ours: String,
    },
}

/// Where a sweep's results go and what it is run with.
#[derive(Debug)]
pub struct Sweep<'a> {
    /// The experiment.
    pub experiment: &'a Experiment,
    /// The simulator: for simulated runs, and for load given as `rho`.
    pub simulator: Option<&'a Simulator>,
    /// Which cells; none is all.
    pub shard: Option<Shard>,
    /// The results CSV.
    pub csv: PathBuf,
    /// Folder of requests files.
    pub requests: Option<PathBuf>,
    /// Folder of measured runs' decision logs.
    pub decisions: Option<PathBuf>,
    /// Name of the manifest, for the rows.
    pub manifest: Option<String>,
}

/// How far a sweep is.
#[derive(Clone, Debug)]
pub struct SweepProgress<'a> {
    /// Runs that are done.
    pub done: usize,
    /// Runs that were left at the start.
    pub total: usize,
    /// The run under way.
    pub run: Option<Run<'a>>,
    /// Its requests: ended and all.
    pub requests: (usize, usize),
}

/// An error of a run, which names it: there are many.
fn of(run: &Run<'_>, source: SweepError) -> SweepError {
    SweepError::Run { run: format!("{}, seed {}", run.cell.called(), run.seed), source: Box::new(source) }
}

impl Sweep<'_> {
    /// The rows that the CSV has already.
    pub fn rows(&self) -> Result<Vec<ResultRow>, SweepError> {
        if self.csv.exists() { Ok(read_rows(&self.csv)?) } else { Ok(Vec::new()) }
    }

    /// Refuses to go on from `rows` that another profile has a part in: simulated ones, where more are to be simulated, and
    /// where the load is `rho`, whose rate is the profile's, any with such a load. Rows without a manifest that names a
    /// profile are warned of: nothing says what they were made with.
    pub fn check_profile(&self, source: Source, rows: &[ResultRow]) -> Result<(), SweepError> {
        let Some(simulator) = self.simulator else { return Ok(()) };
        let has_rho = self.experiment.cells().iter().any(|cell| cell.workload.rho.is_some());
        let depends = |row: &&ResultRow| {
            let predicted = source == Source::Simulated && row.source == Source::Simulated;
            predicted || (has_rho && row.rho.is_some())
        };
        let mut made_by: BTreeMap<Option<&str>, usize> = BTreeMap::new();
        for row in rows.iter().filter(depends) {
            *made_by.entry(row.manifest.as_deref()).or_default() += 1;
        }
        let ours = &simulator.profile().sha256;
        for (name, rows) in made_by {
            let read = |name| Manifest::read(self.csv.with_file_name(name)).ok()?.profile_sha256;
            match name.and_then(read) {
                Some(theirs) if theirs == *ours => {}
                Some(theirs) => {
                    let (csv, manifest) = (self.csv.clone(), name.unwrap_or_default().to_owned());
                    return Err(SweepError::OtherProfile { csv, rows, manifest, theirs, ours: ours.clone() });
                }
                None => tracing::warn!(
                    "{} has {rows} rows of which no manifest beside it says what profile they were made with: they are \
                     taken to be of this one",
                    self.csv.display()
                ),
            }
        }
        Ok(())
    }

    /// What is left to run of this source, `rows` being there.
    pub fn left(&self, source: Source, rows: &[ResultRow]) -> Vec<Run<'_>> {
        let mut pending = self.experiment.pending(self.shard, source, rows);
        if source == Source::Simulated {
            // Repeats of one trace tell of a machine's spread; a simulation has none.
            pending.retain(|run| run.repeat == 0);
        }
        pending
    }

    /// Requests a second of a cell; none are the trace's own times.
    fn rate(&self, cell: &Cell, sources: &mut Sources, seed: u64) -> Result<Option<f64>, SweepError> {
        let Some(rho) = cell.workload.rho else { return Ok(cell.workload.arrival_rate) };
        let simulator = self.simulator.ok_or(SweepError::NoProfile)?;
        let burst = sources.burst(&cell.engine, &cell.workload, seed)?;
        match simulator.saturation_rate(&cell.at_full_budget(), &burst) {
            Ok(most) => Ok(Some(rho * most)),
            Err(e) if e.is_of_the_budget() => Err(SweepError::NoFullBudget(e)),
            Err(e) => Err(e.into()),
        }
    }

    /// The same for every budget: common random numbers.
    fn trace(&self, run: &Run<'_>, sources: &mut Sources) -> Result<(Option<f64>, Trace), SweepError> {
        if let Some(path) = &run.cell.workload.trace
            && self.experiment.replicate.seeds.len() > 1
            && !sources.draws(&run.cell.workload)?
        {
            return Err(SourceError::NothingDrawn { path: path.clone() }.into());
        }
        let rate = self.rate(run.cell, sources, run.seed)?;
        Ok((rate, sources.trace(&run.cell.engine, &run.cell.workload, rate, run.seed)?))
    }

    fn row(
        &self,
        run: &Run<'_>,
        source: Source,
        trace: &Trace,
        records: &[RequestRecord],
        fill: impl FnOnce(&mut ResultRow),
    ) -> Result<ResultRow, SweepError> {
        let context = run.cell.run_context_on(trace, source, run.seed, run.repeat);
        let warm: Vec<RequestRecord>;
        let records = match run.cell.workload.warm_up {
            0 => records,
            first => {
                warm = records.iter().filter(|r| r.id >= first).cloned().collect();
                &warm
            }
        };
        let mut row = ResultRow::from_records(records, &context);
        row.manifest.clone_from(&self.manifest);
        fill(&mut row);
        if let (Some(folder), Some(key)) = (&self.requests, row.run_key()) {
            std::fs::create_dir_all(folder).map_err(|e| FileError::write(folder, e))?;
            let path = folder.join(key.file_name());
            // A run that was interrupted before its row was written is done again from the start.
            if path.exists() {
                std::fs::remove_file(&path).map_err(|e| FileError::write(&path, e))?;
            }
            append_requests(&path, records)?;
        }
        Ok(row)
    }

    /// Simulates what is left, on all cores. Gives the new rows.
    pub fn simulate(&self, progress: impl Fn(SweepProgress<'_>)) -> Result<Vec<ResultRow>, SweepError> {
        let simulator = self.simulator.ok_or(SweepError::NoProfile)?;
        let pending = self.left(Source::Simulated, &self.rows()?);
        let mut rows = Vec::new();
        for chunk in pending.chunks(CHUNK) {
            progress(SweepProgress { done: rows.len(), total: pending.len(), run: None, requests: (0, 0) });
            let done: Vec<Result<ResultRow, SweepError>> = chunk
                .par_iter()
                .map_init(Sources::default, |sources, run| {
                    self.simulated(run, simulator, sources).map_err(|e| of(run, e))
                })
                .collect();
            // What is finished is kept, whatever became of the others.
            let (done, failed): (Vec<_>, Vec<_>) = done.into_iter().partition(Result::is_ok);
            let done: Vec<ResultRow> = done.into_iter().flatten().collect();
            if !done.is_empty() {
                append_rows(&self.csv, &done)?;
            }
            if let Some(Err(e)) = failed.into_iter().next() {
                return Err(e);
            }
            rows.extend(done);
        }
        Ok(rows)
    }

    fn simulated(
        &self,
        run: &Run<'_>,
        simulator: &Simulator,
        sources: &mut Sources,
    ) -> Result<ResultRow, SweepError> {
        let Cell { engine, workload, .. } = run.cell;
        let (rate, trace) = self.trace(run, sources)?;
        let simulated = simulator.run(engine, &trace)?;
        // What num_requests cuts off of a trace may be more than this engine takes: then nothing is known.
        let burst = sources.burst(engine, workload, run.seed).ok();
        let saturation = burst.and_then(|burst| simulator.saturation_rate(engine, &burst).ok());
        self.row(run, Source::Simulated, &trace, &simulated.records, |row| {
            row.arrival_rate = rate;
            row.duration_seconds = Some(simulated.totals.end as f64 * 1e-9);
            row.swap_count = Some(simulated.totals.swaps);
            row.saturated = rate.zip(saturation).map(|(rate, saturation)| is_saturated(rate, saturation));
        })
    }

    /// The cell of the first run that is left to measure.
    #[cfg(feature = "server")]
    pub fn first_to_measure(&self) -> Result<Option<&Cell>, SweepError> {
        let pending = self.left(Source::Measured, &self.rows()?);
        Ok(pending.first().map(|run| run.cell))
    }

    /// Refuses to measure what is left where it has a decision log that must be kept, or where none can be written.
    #[cfg(feature = "server")]
    pub fn check_logs(&self, rows: &[ResultRow]) -> Result<(), SweepError> {
        if let Some(folder) = &self.decisions {
            std::fs::create_dir_all(folder).map_err(|e| FileError::write(folder, e))?;
        }
        self.left(Source::Measured, rows).iter().try_for_each(|run| self.log_files(run).map(drop))
    }

    /// Where a run's decision log is written, and where it is put once the run's row is there; none if nobody asks for
    /// it. What lies under the first name is left of a run that was interrupted.
    #[cfg(feature = "server")]
    fn log_files(&self, run: &Run<'_>) -> Result<Option<(PathBuf, PathBuf)>, SweepError> {
        let Some(folder) = &self.decisions else { return Ok(None) };
        let name = run.key(Source::Measured).file_name();
        let (part, whole) = (folder.join(format!("{name}.part")), folder.join(name));
        if whole.exists() { Err(SweepError::Logged(whole)) } else { Ok(Some((part, whole))) }
    }

    /// Measures what is left, one run after another, each on an engine started for it. Gives the new rows.
    #[cfg(feature = "server")]
    pub fn measure(
        &self,
        engines: &mut super::Engines,
        progress: impl Fn(SweepProgress<'_>),
    ) -> Result<Vec<ResultRow>, SweepError> {
        let pending = self.left(Source::Measured, &self.rows()?);
        let mut sources = Sources::default();
        let mut rows = Vec::new();
        for run in &pending {
            let (rate, trace) = self.trace(run, &mut sources).map_err(|e| of(run, e))?;
            let (done, total) = (rows.len(), pending.len());
            let files = self.log_files(run)?;
            let log = match &files {
                Some((part, _)) => {
                    let header =
                        engines.loaded(&run.cell.engine)?.log_header(run.cell.engine.gpu_loras as usize);
                    Some(DecisionLog::to_file(part, &header)?)
                }
                None => None,
            };
            let measured = engines.run(&run.cell.engine, &trace, log, |ended, all| {
                progress(SweepProgress { done, total, run: Some(*run), requests: (ended, all) });
            });
            let measured = measured.map_err(|e| of(run, e.into()))?;
            let row = self.row(run, Source::Measured, &trace, &measured.records, |row| {
                row.arrival_rate = rate;
                row.duration_seconds = Some(measured.wall_s);
                row.swap_count = Some(measured.swaps);
                row.saturated = crate::loadgen::saturated(&measured.records);
            })?;
            append_rows(&self.csv, std::slice::from_ref(&row))?;
            if let Some((part, whole)) = files {
                std::fs::rename(part, &whole).map_err(|e| FileError::write(&whole, e))?;
            }
            rows.push(row);
        }
        Ok(rows)
    }
}
