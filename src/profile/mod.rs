//! `profile.json`: the calibrated costs of one machine, model and engine, and the cost model they feed.

mod cost;
mod error;
mod feature;
mod scale;
mod shape;
mod shipped;

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use cost::CostModel;
pub(crate) use cost::{nearest, whole_ns};
pub use error::ProfileError;
pub use feature::{Feature, FeatureError, Steps, Term};
pub use scale::{Scale, ScaleError};
pub use shape::{History, StepShape, rounded_rows};

/// The version that this program writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// Calibrated costs with where they come from. Units are in the names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Where the costs come from.
    pub kind: Kind,
    /// When it was calibrated, RFC 3339.
    pub created: String,
    /// The program that calibrated it, with its commit.
    pub tool: String,
    /// What it was calibrated on.
    pub machine: serde_json::Value,
    /// The model's name.
    pub model: String,
    /// The adapters that were measured.
    pub adapter: AdapterCosts,
    /// The engine's limits and sizes.
    pub engine: EngineFacts,
    /// Cost of a step by its composition.
    pub step: StepCosts,
    /// Cost of a swap.
    pub swap: SwapCosts,
    /// Costs of the host around steps.
    pub host: HostCosts,
    /// Relative residuals of the step fit over the calibration samples.
    pub residuals: Quantiles,
    /// Relative errors on samples that the fit has not seen.
    pub holdout: Holdout,
    /// The raw samples, beside the profile.
    pub samples_file: Option<String>,
    /// SHA-256 of the profile with this field empty.
    pub sha256: String,
}

/// Where costs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Micro-benchmarks of this program's engine.
    Engine,
    /// Response times of somebody's server.
    BlackBox,
    /// A what-if copy of another profile.
    Scaled,
}

/// The adapters that were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterCosts {
    /// Ranks, ascending.
    pub ranks: Vec<u32>,
    /// Bytes that a swap copies at each rank.
    pub bytes: Vec<u64>,
}

/// The engine's limits and sizes, as far as they shape decisions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineFacts {
    /// `cpu` or `cuda`.
    pub device: String,
    /// Stored type of weights and cache.
    pub dtype: String,
    /// Compute threads (CPU).
    pub threads: u32,
    /// Transformer layers.
    pub layers: u32,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// Bytes of a KV block over all layers.
    pub kv_block_bytes: u64,
    /// Bytes of the weights.
    pub weights_bytes: u64,
    /// Bytes of the activations' workspace.
    pub workspace_bytes: u64,
    /// Memory that weights, workspace, slots and KV blocks share; none where the KV cache has a
    /// memory of its own.
    pub memory_bytes: Option<u64>,
    /// Memory of the KV cache alone, where it has its own.
    pub kv_memory_bytes: Option<u64>,
    /// Prompt and output tokens of one request, at most.
    pub max_model_len: u32,
    /// Tokens in a step, at most, as calibrated.
    pub max_num_batched_tokens: u32,
    /// Sequences in a step, at most, as calibrated.
    pub max_num_seqs: u32,
}

/// Cost of a step: the sum of features times coefficients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepCosts {
    /// Feature names; see [`Term`].
    pub features: Vec<String>,
    /// Nanoseconds for one unit of each.
    pub coef_ns: Vec<f64>,
}

/// Cost of a swap: `fixed_s + bytes / bytes_per_s`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwapCosts {
    /// From submission to completion, less the copy.
    pub fixed_s: f64,
    /// Copy rate with no step running.
    pub bytes_per_s: f64,
    /// Copy rate while a step runs.
    pub busy_bytes_per_s: f64,
    /// How much slower a step runs while a swap does: 0.05 is 5 %.
    pub step_slowdown: f64,
    /// What a step takes more that reads an adapter whose copy is under way, besides waiting for it. Profiles without it
    /// were made before anything measured it; where it is 0 it is not written, so that their hashes hold.
    #[serde(default, skip_serializing_if = "costs_nothing")]
    pub reading_s: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn costs_nothing(cost: &f64) -> bool {
    *cost == 0.0
}

/// Costs of the host around steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCosts {
    /// From a step's result to the next submission.
    pub loop_s: f64,
    /// From a request's receipt to the queue, for an empty prompt.
    pub front_s: f64,
    /// The same, for each byte of prompt.
    pub tokenize_s_per_byte: f64,
    /// The same, once for a prompt of `handover_bytes` or more, which is tokenised on another thread.
    #[serde(default, skip_serializing_if = "costs_nothing")]
    pub handover_s: f64,
    /// Bytes of prompt from which that is so.
    #[serde(default, skip_serializing_if = "costs_nothing")]
    pub handover_bytes: f64,
    /// From a first token to its first byte.
    pub deliver_s: f64,
    /// Prompt bytes for each prompt token.
    pub bytes_per_token: f64,
}

/// Quantiles of a relative error, signed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantiles {
    /// 5 %.
    pub p05: f64,
    /// 25 %.
    pub p25: f64,
    /// Median.
    pub p50: f64,
    /// 75 %.
    pub p75: f64,
    /// 95 %.
    pub p95: f64,
}

/// How well the step fit predicts what it has not seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holdout {
    /// Samples held out.
    pub samples: usize,
    /// Mean absolute relative error.
    pub mean_abs_error: f64,
    /// The largest absolute relative error.
    pub max_abs_error: f64,
    /// Signed mean relative error.
    pub bias: f64,
}

impl Profile {
    /// Reads and checks a profile.
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ProfileError::Read { path: name.clone(), source })?;
        Self::parse(&name, &text)
    }

    /// Checks a profile's text; `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Self, ProfileError> {
        let form = |source| ProfileError::Form { path: name.to_owned(), source };
        let value: serde_json::Value = serde_json::from_str(text).map_err(form)?;
        if let Some(found) = value.get("schema_version").and_then(serde_json::Value::as_u64)
            && found != u64::from(SCHEMA_VERSION)
        {
            return Err(ProfileError::Schema { path: name.to_owned(), found });
        }
        let profile: Self = serde_json::from_value(value).map_err(form)?;
        let found = profile.hash();
        if found != profile.sha256 {
            return Err(ProfileError::Hash { path: name.to_owned(), found, said: profile.sha256 });
        }
        profile.check()?;
        Ok(profile)
    }

    /// SHA-256 of the profile with an empty hash field.
    pub fn hash(&self) -> String {
        let unsigned = Self { sha256: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&unsigned).unwrap_or_default();
        Sha256::digest(json).iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Writes its own hash into it.
    pub fn signed(mut self) -> Self {
        self.sha256 = self.hash();
        self
    }

    /// Refuses costs that cannot be.
    pub fn check(&self) -> Result<(), ProfileError> {
        let not_negative = |what: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                Err(ProfileError::Value { what: what.to_owned(), value, expected: "a cost is 0 or more" })
            }
        };
        let positive = |what: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(ProfileError::Value { what: what.to_owned(), value, expected: "it must be over 0" })
            }
        };
        for (feature, &coef) in self.step.features.iter().zip(&self.step.coef_ns) {
            feature.parse::<Term>()?;
            not_negative(&format!("step cost of '{feature}'"), coef)?;
            if coef > cost::MOST_NS {
                return Err(ProfileError::Value {
                    what: format!("step cost of '{feature}'"),
                    value: coef,
                    expected: "it must be under 1e13 ns",
                });
            }
        }
        positive("number of step features", self.step.features.len() as f64)?;
        if self.step.features.len() != self.step.coef_ns.len() {
            return Err(ProfileError::Value {
                what: "number of step coefficients".to_owned(),
                value: self.step.coef_ns.len() as f64,
                expected: "there must be as many as features",
            });
        }
        not_negative("swap.fixed_s", self.swap.fixed_s)?;
        positive("swap.bytes_per_s", self.swap.bytes_per_s)?;
        positive("swap.busy_bytes_per_s", self.swap.busy_bytes_per_s)?;
        not_negative("swap.step_slowdown", self.swap.step_slowdown)?;
        not_negative("swap.reading_s", self.swap.reading_s)?;
        not_negative("host.loop_s", self.host.loop_s)?;
        not_negative("host.front_s", self.host.front_s)?;
        not_negative("host.tokenize_s_per_byte", self.host.tokenize_s_per_byte)?;
        not_negative("host.handover_s", self.host.handover_s)?;
        not_negative("host.handover_bytes", self.host.handover_bytes)?;
        not_negative("host.deliver_s", self.host.deliver_s)?;
        not_negative("host.bytes_per_token", self.host.bytes_per_token)?;
        positive("engine.kv_block_bytes", self.engine.kv_block_bytes as f64)?;
        positive("engine.block_size", f64::from(self.engine.block_size))?;
        positive("engine.layers", f64::from(self.engine.layers))?;
        positive("number of calibrated ranks", self.adapter.ranks.len() as f64)?;
        if let Some(w) = self.adapter.ranks.windows(2).find(|w| w[0] >= w[1]) {
            return Err(ProfileError::Value {
                what: "list of calibrated ranks".to_owned(),
                value: f64::from(w[1]),
                expected: "ranks must rise from one to the next",
            });
        }
        if self.adapter.ranks.len() != self.adapter.bytes.len() {
            return Err(ProfileError::Value {
                what: "number of adapter sizes".to_owned(),
                value: self.adapter.bytes.len() as f64,
                expected: "there must be as many as ranks",
            });
        }
        Ok(())
    }

    /// Refuses a profile of another model.
    pub fn expect_model(&self, asked: &str) -> Result<(), ProfileError> {
        if self.model == asked {
            return Ok(());
        }
        Err(ProfileError::Model { profile: self.model.clone(), asked: asked.to_owned() })
    }

    /// Bytes that a swap copies at `rank`, interpolated between calibrated ranks.
    pub fn adapter_bytes(&self, rank: u32) -> Result<u64, ProfileError> {
        let AdapterCosts { ranks, bytes } = &self.adapter;
        let outside = || ProfileError::Rank { rank, measured: ranks.clone() };
        let above = ranks.iter().position(|&r| r >= rank).ok_or_else(outside)?;
        if ranks[above] == rank {
            return Ok(bytes[above]);
        }
        let below = above.checked_sub(1).ok_or_else(outside)?;
        let share = f64::from(rank - ranks[below]) / f64::from(ranks[above] - ranks[below]);
        Ok((bytes[below] as f64 + share * (bytes[above] as f64 - bytes[below] as f64)).round() as u64)
    }

    /// KV blocks left beside `gpu_loras` slots for adapters of up to `max_rank`, with blocks of
    /// `block_size` tokens; at least one request of `max_model_len` must fit. `kv_memory` is what the KV cache
    /// gets, as the engine's `--kv-memory`: instead of a memory of its own, or of all that the rest leaves.
    pub fn kv_blocks(
        &self,
        gpu_loras: usize,
        max_rank: u32,
        block_size: usize,
        max_model_len: usize,
        kv_memory: Option<u64>,
    ) -> Result<usize, ProfileError> {
        let e = &self.engine;
        let block_bytes = (e.kv_block_bytes / u64::from(e.block_size)).max(1) * block_size.max(1) as u64;
        let needed = (max_model_len.div_ceil(block_size.max(1)) as u64).saturating_mul(block_bytes);
        let adapter = self.adapter_bytes(max_rank)?;
        // What is taken beside the cache whatever the budget is.
        let taken = e.weights_bytes + e.workspace_bytes;
        let of = |slots: u64| slots.saturating_mul(adapter).saturating_add(taken);
        if let Some(asked) = kv_memory.filter(|&asked| asked < needed) {
            return Err(ProfileError::KvMemoryTooSmall { asked, needed, max_model_len });
        }
        let Some(available) = e.memory_bytes else {
            let cache = kv_memory.or(e.kv_memory_bytes).unwrap_or(0);
            if cache < needed {
                return Err(ProfileError::ModelLen { max_model_len, needed, room: cache });
            }
            return Ok((cache / block_bytes) as usize);
        };
        let room = available.saturating_sub(of(gpu_loras as u64));
        let cache = kv_memory.unwrap_or(room);
        if room < cache || cache < needed {
            // Who is at fault: the slots, unless it would be too much beside a single one.
            let most = available.saturating_sub(of(1));
            return Err(match kv_memory {
                Some(asked) if asked > most => {
                    ProfileError::KvMemoryTooLarge { asked, room: most, available }
                }
                None if needed > most => ProfileError::ModelLen { max_model_len, needed, room: most },
                _ => ProfileError::Slots {
                    gpu_loras,
                    kv_memory: kv_memory.is_some(),
                    required: of(gpu_loras as u64).saturating_add(kv_memory.unwrap_or(needed)),
                    available,
                },
            });
        }
        Ok((cache / block_bytes) as usize)
    }
}

#[cfg(test)]
pub(crate) mod tests;
