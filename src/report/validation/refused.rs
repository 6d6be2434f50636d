//! Rows that are not of one sweep, whatever their columns say.

use crate::report::results::{ResultRow, Source};
use crate::report::settings::Mixture;

/// Rates of one load differ by no more than this part of them.
const ROUNDING: f64 = 1e-6;

/// Rows that cannot be held against each other.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ValidationError {
    /// Two configurations that look alike.
    #[error("{what}: {mixture}")]
    Alike {
        /// What the rows have in common.
        what: String,
        /// The rows.
        mixture: Mixture,
    },
    /// One load at two rates.
    #[error(
        "{what}: rows of {trace} came at {} and at {} requests a second, so their load was reckoned from two profiles: \
         simulate and measure both with one profile, or take the rows of one rate",
        rates.0,
        rates.1
    )]
    Rates {
        /// What the rows have in common.
        what: String,
        /// Their trace.
        trace: String,
        /// Two of their rates.
        rates: (f64, f64),
    },
    /// Two predictions of one run.
    #[error(
        "{what}: at {gpu_loras} slots {trace} was simulated twice with different outcomes ({} and {} s mean TTFT), by two \
         profiles or programs: take the rows of one",
        means.0,
        means.1
    )]
    Predictions {
        /// What the rows have in common.
        what: String,
        /// The budget.
        gpu_loras: u32,
        /// The trace.
        trace: String,
        /// Mean TTFT of each, seconds.
        means: (f64, f64),
    },
}

/// The trace of a row, in words.
fn trace(row: &ResultRow) -> String {
    row.seed.map_or_else(|| "a trace without a seed".to_owned(), |seed| format!("seed {seed}"))
}

fn differ(a: f64, b: f64) -> bool {
    (a - b).abs() > ROUNDING * a.abs().max(b.abs())
}

/// Refuses rows of one sweep that are of several. `what` names it.
pub(super) fn refuse(what: &str, rows: &[ResultRow]) -> Result<(), ValidationError> {
    let what = || what.to_owned();
    Mixture::refuse(rows).map_err(|mixture| ValidationError::Alike { what: what(), mixture })?;
    for (i, row) in rows.iter().enumerate() {
        // What has no load has its rate among the settings that the rows share.
        for before in rows[..i].iter().filter(|b| row.rho.is_some() && b.seed == row.seed) {
            if let Some(rates) = before.arrival_rate.zip(row.arrival_rate).filter(|(a, b)| differ(*a, *b)) {
                return Err(ValidationError::Rates { what: what(), trace: trace(row), rates });
            }
        }
    }
    let simulated: Vec<&ResultRow> = rows.iter().filter(|r| r.source == Source::Simulated).collect();
    for (i, row) in simulated.iter().enumerate() {
        let same = |b: &&&ResultRow| (b.gpu_loras, b.seed) == (row.gpu_loras, row.seed);
        // A simulation has no chance in it: twice the same is once.
        for before in simulated[..i].iter().filter(same) {
            if let Some(means) = before.ttft_mean.zip(row.ttft_mean).filter(|(a, b)| differ(*a, *b)) {
                let (what, gpu_loras, trace) = (what(), row.gpu_loras, trace(row));
                return Err(ValidationError::Predictions { what, gpu_loras, trace, means });
            }
        }
    }
    Ok(())
}
