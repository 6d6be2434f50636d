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
pub(crate) mod tests {
    use super::*;

    /// A profile with round costs: a step is 1 ms and 20 µs a token, a swap is 1 ms.
    pub(crate) fn round() -> Profile {
        Profile {
            schema_version: SCHEMA_VERSION,
            kind: Kind::Engine,
            created: "2026-01-01T00:00:00Z".to_owned(),
            tool: "test".to_owned(),
            machine: serde_json::Value::Null,
            model: "tiny".to_owned(),
            adapter: AdapterCosts { ranks: vec![8, 16], bytes: vec![1_000_000, 2_000_000] },
            engine: EngineFacts {
                device: "cpu".to_owned(),
                dtype: "f32".to_owned(),
                threads: 1,
                layers: 4,
                block_size: 16,
                kv_block_bytes: 1 << 14,
                weights_bytes: 1 << 24,
                workspace_bytes: 1 << 24,
                memory_bytes: None,
                kv_memory_bytes: Some(1 << 30),
                max_model_len: 4352,
                max_num_batched_tokens: 4096,
                max_num_seqs: 16,
            },
            step: StepCosts {
                features: vec!["step".to_owned(), "tokens:0-".to_owned()],
                coef_ns: vec![1e6, 2e4],
            },
            swap: SwapCosts {
                fixed_s: 0.0,
                bytes_per_s: 1e9,
                busy_bytes_per_s: 1e9,
                step_slowdown: 0.0,
                reading_s: 0.0,
            },
            host: HostCosts {
                loop_s: 0.0,
                front_s: 0.0,
                tokenize_s_per_byte: 0.0,
                deliver_s: 0.0,
                bytes_per_token: 4.0,
            },
            residuals: Quantiles::default(),
            holdout: Holdout::default(),
            samples_file: None,
            sha256: String::new(),
        }
        .signed()
    }

    fn refuse(change: impl Fn(&mut Profile)) -> String {
        let mut profile = round();
        change(&mut profile);
        let text = serde_json::to_string(&profile.signed()).unwrap();
        Profile::parse("p.json", &text).unwrap_err().to_string()
    }

    #[test]
    fn round_trips() {
        let text = serde_json::to_string_pretty(&round()).unwrap();
        assert_eq!(Profile::parse("p.json", &text).unwrap(), round());
    }

    #[test]
    fn bad_profiles_are_refused_with_the_reason() {
        assert!(refuse(|p| p.schema_version = 7).contains("schema version 7"));
        assert!(refuse(|p| p.step.coef_ns[1] = -3.0).contains("'tokens:0-' is -3"));
        assert!(refuse(|p| p.step.features[0] = "luck".to_owned()).contains("'luck'"));
        assert!(refuse(|p| p.swap.bytes_per_s = 0.0).contains("bytes_per_s is 0"));
        assert!(refuse(|p| _ = p.step.coef_ns.pop()).contains("as many as features"));

        let text = serde_json::to_string(&round()).unwrap();
        let edited = text.replace("20000.0", "10000.0");
        assert!(Profile::parse("p.json", &edited).unwrap_err().to_string().contains("changed after"));
        let missing = text.replace("\"swap\"", "\"swop\"");
        assert!(Profile::parse("p.json", &missing).unwrap_err().to_string().contains("swop"));
        assert!(round().expect_model("facebook/opt-125m").is_err());
    }

    #[test]
    fn a_profile_from_before_there_was_a_cost_of_reading_keeps_its_hash() {
        let before = serde_json::to_string(&round()).unwrap();
        assert!(!before.contains("reading_s"));
        assert_eq!(Profile::parse("before.json", &before).unwrap().swap.reading_s, 0.0);
        let mut profile = round();
        profile.swap.reading_s = 2e-4;
        let profile = profile.signed();
        let text = serde_json::to_string(&profile).unwrap();
        assert_eq!(Profile::parse("p.json", &text).unwrap(), profile);
        let edited = text.replace("\"reading_s\":0.0002", "\"reading_s\":0.0001");
        assert!(Profile::parse("p.json", &edited).unwrap_err().to_string().contains("changed after"));
    }

    #[test]
    fn ranks_between_calibrated_ones_are_interpolated_and_others_refused() {
        let profile = round();
        assert_eq!(profile.adapter_bytes(8).unwrap(), 1_000_000);
        assert_eq!(profile.adapter_bytes(12).unwrap(), 1_500_000);
        assert!(profile.adapter_bytes(4).is_err());
        assert!(profile.adapter_bytes(32).is_err());
    }

    #[test]
    fn slots_take_memory_from_the_kv_cache_where_they_share_it() {
        let mut profile = round();
        profile.engine.memory_bytes = Some((1 << 25) + 10_000_000 + 300 * (1 << 14));
        profile.engine.kv_memory_bytes = None;
        assert_eq!(profile.kv_blocks(10, 8, 16, 4352, None).unwrap(), 300);
        let error = profile.kv_blocks(11, 8, 16, 4352, None).unwrap_err();
        assert!(error.to_string().contains("lower --gpu-loras"), "{error}");
        // A cache of a given size, as long as there is room for it.
        assert_eq!(profile.kv_blocks(10, 8, 16, 4352, Some(280 << 14)).unwrap(), 280);
        assert!(profile.kv_blocks(10, 8, 16, 4352, Some(301 << 14)).is_err());
    }

    #[test]
    fn what_does_not_fit_names_the_flag_that_is_at_fault() {
        let mut shared = round();
        shared.engine.memory_bytes = Some((1 << 25) + 10_000_000 + 300 * (1 << 14));
        shared.engine.kv_memory_bytes = None;
        let refused = |profile: &Profile, slots, model_len, kv_memory| {
            profile.kv_blocks(slots, 8, 16, model_len, kv_memory).unwrap_err()
        };
        // Ten slots and 300 blocks fit; a request of 4,352 tokens takes 272 blocks.
        for (slots, model_len, kv_blocks, says, of_the_budget) in [
            (11, 4352, None, "11 slots leave no room for one request: required 49.01 MB", true),
            (10, 4352, Some(301), "lower --gpu-loras or --kv-memory", true),
            (1, 4352, Some(271), "raise --kv-memory, or lower --max-model-len", false),
            (
                10,
                4352,
                Some(1 << 40),
                "weights and one slot leave 13.92 MB of 48.47 MB: lower --kv-memory",
                false,
            ),
            (10, 1_000_000, None, "of KV cache and there is room for 13.92 MB: lower --max-model-len", false),
        ] {
            let error = refused(&shared, slots, model_len, kv_blocks.map(|n: u64| n << 14));
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.is_of_the_budget(), of_the_budget, "{error}");
            assert!(of_the_budget || !error.to_string().contains("--gpu-loras"), "{error}");
        }
        // A cache with a memory of its own does not care for slots.
        let own = refused(&round(), 2, 2_000_000, None).to_string();
        assert!(own.contains("there is room for 1.07 GB: lower --max-model-len"), "{own}");
        let small = refused(&round(), 2, 4352, Some(1024)).to_string();
        assert!(small.starts_with("--kv-memory 1.02 kB holds no request of 4352 tokens"), "{small}");
    }
}
