//! A [`Profile`] of somebody's server, from nothing but its response times.
//!
//! What can be seen from outside is less than what micro-benchmarks see: a TTFT is front end and
//! prefill in one, a swap is what a request to an adapter that is not resident takes longer, and how
//! steps with prefills and decodes mix is not seen at all. Such profiles are marked as
//! [`Kind::BlackBox`], and what simulates with them says so.

mod asker;
mod model;
mod phases;

use std::time::Duration;

use serde::Serialize;

use super::{holdout, median, quantiles, tool};
use crate::loadgen::{Dialect, Endpoint, EndpointError, PrepareError};
use crate::profile::{
    AdapterCosts, CostModel, EngineFacts, HostCosts, Kind, Profile, ProfileError, Quantiles, SCHEMA_VERSION,
    SwapCosts,
};
use crate::report::machine::machine;
use crate::workload::tokenizer::Tokenizer;

use asker::Asker;

/// The server and what its operator knows of it.
#[derive(Clone, Debug)]
pub struct BlackBoxOptions {
    /// Where it is.
    pub endpoint: Endpoint,
    /// How it is spoken to.
    pub dialect: Dialect,
    /// What counts prompts where the server does not.
    pub tokenizer: Tokenizer,
    /// Name of the base model.
    pub model: String,
    /// Rank of its adapters.
    pub rank: u32,
    /// Adapters that it serves.
    pub total_loras: u32,
    /// Slots for adapters.
    pub gpu_loras: u32,
    /// Sequences that run at once, at most.
    pub max_num_seqs: u32,
    /// Tokens in a step, at most: longer prompts take several.
    pub max_num_batched_tokens: u32,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// Prompt and output tokens of one request, at most.
    pub max_model_len: u32,
    /// Tokens that its KV cache holds; none is as many as can be asked for.
    pub kv_tokens: Option<u64>,
    /// Longest prompt to time.
    pub longest: u32,
    /// How often each point is timed.
    pub repeats: u32,
    /// How long one request may take.
    pub timeout: Duration,
    /// Of prompts and their order.
    pub seed: u64,
}

/// A black-box calibration that failed.
#[derive(Debug, thiserror::Error)]
pub enum BlackBoxError {
    /// Every adapter fits: no swap can be provoked.
    #[error(
        "{total} adapters and {slots} slots: every adapter is resident, so what a swap costs cannot be seen; serve more \
         adapters (--total-loras) than --gpu-loras"
    )]
    AllResident {
        /// Adapters.
        total: u32,
        /// Slots.
        slots: u32,
    },
    /// The server.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The requests.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// A request that failed.
    #[error("a calibration request ({what}) failed: {why}")]
    Request {
        /// What was timed.
        what: String,
        /// The error.
        why: String,
    },
    /// Streams whose tokens do not come one by one.
    #[error(
        "the server sent the output of a batch of {batch} in too few messages to time its steps: it must stream token by \
         token"
    )]
    TooFewMessages {
        /// Sequences in the batch.
        batch: u32,
    },
    /// The fit came to nothing usable.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

/// One raw sample; times as the client saw them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BlackBoxSample {
    /// A small call: the HTTP layers' share of everything else.
    RoundTrip {
        /// How long.
        ns: f64,
    },
    /// A request to a resident adapter, alone on the server.
    Resident {
        /// Whether the fit has seen prompts of this length.
        held_out: bool,
        /// The server's count.
        prompt_tokens: u32,
        /// From sending.
        ttft_ns: f64,
    },
    /// A request to an adapter that is not resident, likewise alone.
    NotResident {
        /// The server's count.
        prompt_tokens: u32,
        /// From sending.
        ttft_ns: f64,
    },
    /// Decodes that run together.
    Decode {
        /// Whether the fit has seen batches of this size and context.
        held_out: bool,
        /// Sequences.
        batch: u32,
        /// Positions that each attends to, in the middle of the time looked at.
        context: f64,
        /// Distinct adapters.
        adapters: u32,
        /// Time from a token to the next.
        step_ns: f64,
    },
}

/// A profile and the samples that it was made from.
#[derive(Clone, Debug)]
pub struct BlackBoxCalibration {
    /// The costs.
    pub profile: Profile,
    /// Every sample.
    pub samples: Vec<BlackBoxSample>,
}

/// Calls to time the HTTP layers with.
const ROUND_TRIPS: usize = 30;

/// Times a server that has nothing else to do, and fits its costs. `progress` is told what is under way and
/// the share done.
///
/// # Errors
/// If a request fails, if no swap can be provoked, or if the server does not stream token by token.
pub async fn calibrate_black_box(
    options: &BlackBoxOptions,
    mut progress: impl FnMut(&str, f64),
) -> Result<BlackBoxCalibration, BlackBoxError> {
    if options.total_loras <= options.gpu_loras {
        return Err(BlackBoxError::AllResident { total: options.total_loras, slots: options.gpu_loras });
    }
    let mut samples = Vec::new();
    let mut asker = Asker::new(options);
    progress("warm-up", 0.0);
    asker.warm_up().await?;
    progress("round trips", 0.05);
    let path = match options.dialect {
        Dialect::Generate => "/health",
        Dialect::Completions(_) => "/v1/models",
    };
    for _ in 0..ROUND_TRIPS {
        samples.push(BlackBoxSample::RoundTrip { ns: options.endpoint.round_trip(path).await? * 1e9 });
    }
    phases::resident(&mut asker, &mut samples, |share| progress("resident adapters", 0.1 + 0.35 * share))
        .await?;
    phases::not_resident(&mut asker, &mut samples, |share| progress("other adapters", 0.45 + 0.25 * share))
        .await?;
    phases::decodes(&mut asker, &mut samples, |share| progress("decodes", 0.7 + 0.3 * share)).await?;
    let profile = fit(options, &samples)?;
    Ok(BlackBoxCalibration { profile, samples })
}

/// From samples to costs; the clock and the network play no part here.
fn fit(options: &BlackBoxOptions, samples: &[BlackBoxSample]) -> Result<Profile, BlackBoxError> {
    let front_ns = median(samples.iter().filter_map(|s| match s {
        BlackBoxSample::RoundTrip { ns } => Some(*ns),
        _ => None,
    }));
    let points = model::points(options, samples, front_ns);
    let (unseen, seen): (Vec<_>, Vec<_>) = points.into_iter().partition(|p| p.held_out);
    let step = model::fit_steps(&seen);
    let max_model_len = options.max_model_len;
    let at_most = u64::from(max_model_len.next_multiple_of(options.block_size));
    let kv_tokens = options.kv_tokens.unwrap_or(u64::from(options.max_num_seqs) * at_most);
    let mut profile = Profile {
        schema_version: SCHEMA_VERSION,
        kind: Kind::BlackBox,
        created: chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
        tool: tool(),
        // The client's: of the server's nothing is known.
        machine: serde_json::to_value(machine()).unwrap_or_default(),
        model: options.model.clone(),
        // A swap's bytes are not seen: all of its cost is `fixed_s`.
        adapter: AdapterCosts { ranks: vec![options.rank], bytes: vec![0] },
        engine: EngineFacts {
            device: format!("a server ({})", options.endpoint.url()),
            dtype: "unknown".to_owned(),
            threads: 0,
            layers: 1,
            block_size: options.block_size,
            // The cache is known in tokens, if at all: a byte stands for one.
            kv_block_bytes: u64::from(options.block_size),
            weights_bytes: 0,
            workspace_bytes: 0,
            memory_bytes: None,
            kv_memory_bytes: Some(kv_tokens),
            max_model_len,
            max_num_batched_tokens: options.max_num_batched_tokens,
            max_num_seqs: options.max_num_seqs,
        },
        step,
        swap: SwapCosts {
            fixed_s: model::swap_ns(samples) * 1e-9,
            bytes_per_s: 1.0,
            busy_bytes_per_s: 1.0,
            step_slowdown: 0.0,
            reading_s: 0.0,
        },
        host: HostCosts {
            loop_s: 0.0,
            front_s: front_ns * 1e-9,
            tokenize_s_per_byte: 0.0,
            handover_s: 0.0,
            handover_bytes: 0.0,
            deliver_s: 0.0,
            bytes_per_token: 0.0,
        },
        residuals: Quantiles::default(),
        holdout: holdout(&[]),
        samples_file: None,
        sha256: String::new(),
    };
    let cost = CostModel::new(&profile)?;
    let errors = |points: &[model::Point]| points.iter().map(|p| p.error(&cost)).collect::<Vec<f64>>();
    profile.residuals = quantiles(&errors(&seen));
    profile.holdout = holdout(&errors(&unseen));
    Ok(profile.signed())
}

#[cfg(test)]
mod tests {
    use super::phases::lengths;
    use super::*;

    fn options() -> BlackBoxOptions {
        BlackBoxOptions {
            endpoint: Endpoint::new("http://127.0.0.1:1", None).unwrap(),
            dialect: Dialect::Generate,
            tokenizer: Tokenizer::byte_level(),
            model: "m".to_owned(),
            rank: 8,
            total_loras: 4,
            gpu_loras: 2,
            max_num_seqs: 16,
            max_num_batched_tokens: 512,
            block_size: 16,
            max_model_len: 2048,
            kv_tokens: None,
            longest: 1024,
            repeats: 3,
            timeout: Duration::from_secs(9),
            seed: 0,
        }
    }

    /// Samples of a server with these costs, in milliseconds: 1 a round trip, 5 a step, 0.04 a prompt token,
    /// 0.5 a decode, 30 a swap.
    fn samples(options: &BlackBoxOptions) -> Vec<BlackBoxSample> {
        let ms = 1e6;
        let ttft = |n: u32| {
            let steps = f64::from(n.div_ceil(options.max_num_batched_tokens));
            (1.0 + 5.0 * steps + 0.04 * f64::from(n)) * ms
        };
        let mut samples = vec![BlackBoxSample::RoundTrip { ns: ms }; 3];
        for (n, held_out) in lengths(options.longest) {
            samples.push(BlackBoxSample::Resident { held_out, prompt_tokens: n, ttft_ns: ttft(n) });
            // One that was disturbed.
            samples.push(BlackBoxSample::Resident { held_out, prompt_tokens: n, ttft_ns: ttft(n) });
            samples.push(BlackBoxSample::Resident { held_out, prompt_tokens: n, ttft_ns: ttft(n) * 9.0 });
        }
        for n in [16, 81] {
            samples.push(BlackBoxSample::NotResident { prompt_tokens: n, ttft_ns: ttft(n) + 30.0 * ms });
        }
        for batch in [1, 2, 4, 8, 16] {
            let step_ns = (5.0 + 0.54 * f64::from(batch)) * ms;
            samples.push(BlackBoxSample::Decode {
                held_out: batch == 4,
                batch,
                context: 56.0,
                adapters: batch.min(2),
                step_ns,
            });
        }
        samples
    }

    #[test]
    fn known_costs_are_found_again() {
        let options = options();
        let profile = fit(&options, &samples(&options)).unwrap();
        assert_eq!(profile.kind, Kind::BlackBox);
        assert!((profile.swap.fixed_s - 0.03).abs() < 1e-9, "{:?}", profile.swap);
        assert!((profile.host.front_s - 0.001).abs() < 1e-12);
        assert!(profile.holdout.samples >= 4, "{:?}", profile.holdout);
        assert!(profile.holdout.max_abs_error < 0.02, "{:?}", profile.holdout);
        let check = Profile::parse("p", &serde_json::to_string(&profile).unwrap());
        assert_eq!(check.unwrap().kind, Kind::BlackBox);
        assert_eq!(profile.kv_blocks(2, 8, 16, 2048, None).unwrap(), 16 * 128);
    }

    #[test]
    fn a_held_out_error_is_seen() {
        let options = options();
        let mut samples = samples(&options);
        for sample in &mut samples {
            if let BlackBoxSample::Resident { held_out: true, ttft_ns, .. } = sample {
                *ttft_ns *= 2.0;
            }
        }
        let profile = fit(&options, &samples).unwrap();
        assert!(profile.holdout.mean_abs_error > 0.3, "{:?}", profile.holdout);
    }

    #[test]
    fn lengths_reach_from_short_to_longest_and_hold_some_out() {
        let lengths = lengths(1000);
        assert_eq!((lengths[0], lengths[lengths.len() - 1]), ((16, false), (1000, false)));
        assert!(lengths.windows(2).all(|w| w[0].0 < w[1].0), "{lengths:?}");
        assert!((3..6).contains(&lengths.iter().filter(|l| l.1).count()), "{lengths:?}");
        assert_eq!(phases::lengths(16), [(16, false)]);
    }
}
