//! From response times to the cost model's terms.

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVector};

use super::{BlackBoxOptions, BlackBoxSample};
use crate::calibrate::terms::ranges;
use crate::calibrate::{fit_costs, median};
use crate::profile::{CostModel, Feature, StepCosts, StepShape, Term};

/// Steps that were timed together: one decode, or the chunks of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Point {
    /// Whether the fit may not see it.
    pub(super) held_out: bool,
    steps: Vec<StepShape>,
    ns: f64,
}

impl Point {
    /// Relative error of a model: (predicted − measured) / measured.
    pub(super) fn error(&self, cost: &CostModel) -> f64 {
        let predicted: f64 = self.steps.iter().map(|s| cost.step_ns(s) as f64).sum();
        predicted / self.ns - 1.0
    }
}

/// What repeats have in common, and what came out. Samples of one key make one point by their median: a
/// disturbed one does not count.
pub(super) fn points(options: &BlackBoxOptions, samples: &[BlackBoxSample], front_ns: f64) -> Vec<Point> {
    let mut prefills: BTreeMap<(u32, bool), Vec<f64>> = BTreeMap::new();
    // Keyed by context in whole positions: repeats differ by fractions.
    let mut decodes: BTreeMap<(u32, u32, u64, bool), Vec<f64>> = BTreeMap::new();
    for sample in samples {
        match *sample {
            BlackBoxSample::Resident { held_out, prompt_tokens, ttft_ns } => {
                prefills.entry((prompt_tokens, held_out)).or_default().push(ttft_ns);
            }
            BlackBoxSample::Decode { held_out, batch, context, adapters, step_ns } => {
                let key = (batch, adapters, context.round() as u64, held_out);
                decodes.entry(key).or_default().push(step_ns);
            }
            BlackBoxSample::RoundTrip { .. } | BlackBoxSample::NotResident { .. } => {}
        }
    }
    let prefills = prefills.into_iter().map(|((tokens, held_out), ns)| Point {
        held_out,
        steps: chunks(options, tokens),
        // Never nothing: the HTTP layers alone took as long.
        ns: (median(ns.into_iter()) - front_ns).max(1.0),
    });
    let decodes = decodes.into_iter().map(|((batch, adapters, context, held_out), ns)| Point {
        held_out,
        steps: vec![decode(options, batch, adapters, context)],
        ns: median(ns.into_iter()).max(1.0),
    });
    prefills.chain(decodes).collect()
}

/// The steps of a prompt of `tokens`, alone on the server.
fn chunks(options: &BlackBoxOptions, tokens: u32) -> Vec<StepShape> {
    let (tokens, most) = (u64::from(tokens), u64::from(options.max_num_batched_tokens));
    let chunk = |start: u64| {
        let len = most.min(tokens - start);
        StepShape {
            tokens: len,
            prefills: 1,
            prefill_pairs: len * start + len * (len + 1) / 2,
            prefill_span: start + len,
            samples: u64::from(start + len == tokens),
            adapters: 1,
            adapter_ranks: u64::from(options.rank),
            lora_tokens: len,
            lora_token_ranks: len * u64::from(options.rank),
            ..StepShape::default()
        }
    };
    (0..tokens.div_ceil(most)).map(|i| chunk(i * most)).collect()
}

fn decode(options: &BlackBoxOptions, batch: u32, adapters: u32, context: u64) -> StepShape {
    let batch = u64::from(batch);
    StepShape {
        tokens: batch,
        decodes: batch,
        decode_context: batch * context,
        samples: batch,
        adapters: u64::from(adapters),
        adapter_ranks: u64::from(adapters) * u64::from(options.rank),
        lora_tokens: batch,
        lora_token_ranks: batch * u64::from(options.rank),
        ..StepShape::default()
    }
}

/// Few terms: what is seen from outside does not tell more apart.
fn terms() -> Vec<Term> {
    let tokens = ranges(&[0, 64, 256, 1024]).map(|(from, to)| Feature::Tokens { from, to });
    let others = [
        Feature::Prefills { from: 0, to: None },
        Feature::PrefillPairs,
        Feature::Decodes { from: 0, to: None },
        Feature::DecodeContext { from: 0, to: None },
        Feature::Adapters,
    ];
    [Feature::Step].into_iter().chain(tokens).chain(others).map(Term::from).collect()
}

/// As of micro-benchmarks.
pub(super) fn fit_steps(points: &[Point]) -> StepCosts {
    let terms = terms();
    let counts = DMatrix::from_fn(points.len(), terms.len(), |row, column| {
        points[row].steps.iter().map(|s| terms[column].of(s) as f64).sum()
    });
    let measured = DVector::from_fn(points.len(), |row, _| points[row].ns);
    fit_costs(&terms, &counts, &measured)
}

/// What a request to an adapter that is not resident takes longer: the median over samples, each less the
/// median of resident ones of its length. Never negative.
pub(super) fn swap_ns(samples: &[BlackBoxSample]) -> f64 {
    let resident = |tokens: u32| {
        let of_length = samples.iter().filter_map(|s| match *s {
            BlackBoxSample::Resident { prompt_tokens, ttft_ns, .. } => {
                Some((prompt_tokens.abs_diff(tokens), ttft_ns))
            }
            _ => None,
        });
        let of_length: Vec<(u32, f64)> = of_length.collect();
        let nearest = of_length.iter().map(|s| s.0).min().unwrap_or(0);
        median(of_length.iter().filter(|s| s.0 == nearest).map(|s| s.1))
    };
    let extra = samples.iter().filter_map(|s| match *s {
        BlackBoxSample::NotResident { prompt_tokens, ttft_ns } => Some(ttft_ns - resident(prompt_tokens)),
        _ => None,
    });
    median(extra).max(0.0)
}
