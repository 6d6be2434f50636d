//! Reading a Hugging Face `config.json`.

use serde::Deserialize;
use serde_json::Value;

use super::rope::{RopeError, RopeScaling};
use super::spec::{Dtype, Family, ModelSpec};

/// A configuration that the engine cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a field of the wrong type or missing.
    #[error("{model}: config.json cannot be read: {source}")]
    Malformed {
        /// The model's name.
        model: String,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// Understood, and not implemented.
    #[error("{model}: {what} is not supported; {supported}")]
    Unsupported {
        /// The model's name.
        model: String,
        /// The field and its value.
        what: String,
        /// What would be.
        supported: &'static str,
    },
    /// Fields that contradict each other.
    #[error("{model}: {what}")]
    Inconsistent {
        /// The model's name.
        model: String,
        /// The contradiction.
        what: String,
    },
}

/// The fields that matter, of both families, with the families' own names.
#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    tie_word_embeddings: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Value>,
    quantization_config: Option<Value>,

    intermediate_size: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f32>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f32>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,

    ffn_dim: Option<usize>,
    activation_function: Option<String>,
    do_layer_norm_before: Option<bool>,
    word_embed_proj_dim: Option<usize>,
    enable_bias: Option<bool>,
    layer_norm_elementwise_affine: Option<bool>,
    #[serde(rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: Option<bool>,
}

/// Parses the text of a `config.json`; `name` is what the user calls the model.
pub fn parse(name: &str, text: &str) -> Result<ModelSpec, ConfigError> {
    let raw: Raw = serde_json::from_str(text)
        .map_err(|source| ConfigError::Malformed { model: name.to_owned(), source })?;
    Reader { name, raw }.spec()
}

/// The ids of an `eos_token_id`: one, a list or null. None if it is something else.
pub(super) fn token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(all)) => all.iter().map(id).collect(),
        Some(one) => Some(vec![id(one)?]),
    }
}

struct Reader<'a> {
    name: &'a str,
    raw: Raw,
}

impl Reader<'_> {
    fn unsupported(&self, what: String, supported: &'static str) -> ConfigError {
        ConfigError::Unsupported { model: self.name.to_owned(), what, supported }
    }

    fn inconsistent(&self, what: String) -> ConfigError {
        ConfigError::Inconsistent { model: self.name.to_owned(), what }
    }

    fn spec(&self) -> Result<ModelSpec, ConfigError> {
        if let Some(q) = &self.raw.quantization_config {
            return Err(self.unsupported(
                format!("quantization_config ({})", q["quant_method"]),
                "weights must be float32, float16 or bfloat16",
            ));
        }
        let spec = match self.family()? {
            Family::Llama => self.llama()?,
            Family::Opt => self.opt()?,
        };
        self.check(&spec)?;
        Ok(spec)
    }

    fn family(&self) -> Result<Family, ConfigError> {
        let known = |arch: &str| match arch {
            "LlamaForCausalLM" => Some(Family::Llama),
            "OPTForCausalLM" => Some(Family::Opt),
            _ => None,
        };
        const SUPPORTED: &str = "architectures are LlamaForCausalLM and OPTForCausalLM";
        if let Some(arch) = self.raw.architectures.first() {
            return known(arch).ok_or_else(|| self.unsupported(format!("architecture {arch}"), SUPPORTED));
        }
        match self.raw.model_type.as_deref() {
            Some("llama") => Ok(Family::Llama),
            Some("opt") => Ok(Family::Opt),
            other => Err(self.unsupported(format!("model_type {}", other.unwrap_or("(none)")), SUPPORTED)),
        }
    }

    fn dtype(&self) -> Result<Dtype, ConfigError> {
        match self.raw.torch_dtype.as_deref().or(self.raw.dtype.as_deref()) {
            None | Some("float32") => Ok(Dtype::F32),
            Some("float16") => Ok(Dtype::F16),
            Some("bfloat16") => Ok(Dtype::Bf16),
            Some(other) => Err(self.unsupported(
                format!("torch_dtype {other}"),
                "number formats are float32, float16 and bfloat16",
            )),
        }
    }

    fn eos(&self) -> Result<Vec<u32>, ConfigError> {
        token_ids(self.raw.eos_token_id.as_ref())
            .ok_or_else(|| self.inconsistent("eos_token_id is neither a token id nor a list of them".into()))
    }

    /// The fields that both families share; the rest is filled in by each.
    fn common(&self, family: Family) -> Result<ModelSpec, ConfigError> {
        let raw = &self.raw;
        Ok(ModelSpec {
            name: self.name.to_owned(),
            family,
            dtype: self.dtype()?,
            vocab_size: raw.vocab_size,
            hidden: raw.hidden_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_attention_heads,
            head_dim: raw.hidden_size / raw.num_attention_heads.max(1),
            intermediate: 0,
            max_positions: raw.max_position_embeddings,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tie_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            bos: raw.bos_token_id,
            eos: self.eos()?,
        })
    }

    fn llama(&self) -> Result<ModelSpec, ConfigError> {
        let raw = &self.raw;
        match raw.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(act) => {
                return Err(self.unsupported(format!("hidden_act {act}"), "the Llama family's is silu"));
            }
        }
        let mut spec = self.common(Family::Llama)?;
        spec.intermediate =
            raw.intermediate_size.ok_or_else(|| self.inconsistent("intermediate_size is missing".into()))?;
        spec.kv_heads = raw.num_key_value_heads.unwrap_or(spec.heads);
        spec.head_dim = raw.head_dim.unwrap_or(spec.head_dim);
        spec.norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        (spec.rope_theta, spec.rope_scaling) = self.rope()?;
        spec.tie_embeddings = raw.tie_word_embeddings.unwrap_or(false);
        spec.attention_bias = raw.attention_bias.unwrap_or(false);
        spec.mlp_bias = raw.mlp_bias.unwrap_or(false);
        Ok(spec)
    }

    /// Older files have `rope_theta` and `rope_scaling`, newer ones both inside `rope_parameters`.
    fn rope(&self) -> Result<(f32, RopeScaling), ConfigError> {
        if let Some(part) = self.raw.partial_rotary_factor.filter(|p| *p != 1.0) {
            return Err(
                self.unsupported(format!("partial_rotary_factor {part}"), "positions must turn whole heads")
            );
        }
        let mut scaling = RopeScaling::None;
        for rope in [&self.raw.rope_scaling, &self.raw.rope_parameters].into_iter().flatten() {
            let found = RopeScaling::parse(rope).map_err(|e| match e {
                RopeError::Unsupported(kind) => self.unsupported(
                    format!("rope scaling of type {kind}"),
                    "types of rope scaling are default, linear and llama3",
                ),
                RopeError::Field(field) => {
                    self.inconsistent(format!("rope scaling's {field} is missing or out of range"))
                }
            })?;
            if found != RopeScaling::None {
                scaling = found;
            }
        }
        let nested = self.raw.rope_parameters.as_ref().and_then(|r| r.get("rope_theta")?.as_f64());
        Ok((self.raw.rope_theta.or(nested.map(|t| t as f32)).unwrap_or(10_000.0), scaling))
    }

    fn opt(&self) -> Result<ModelSpec, ConfigError> {
        let raw = &self.raw;
        match raw.activation_function.as_deref() {
            None | Some("relu") => {}
            Some(act) => {
                return Err(
                    self.unsupported(format!("activation_function {act}"), "the OPT family's is relu")
                );
            }
        }
        let must = |value: Option<bool>, wanted: bool, field: &str, supported| match value {
            Some(v) if v != wanted => Err(self.unsupported(format!("{field} {v}"), supported)),
            _ => Ok(()),
        };
        must(raw.do_layer_norm_before, true, "do_layer_norm_before", "the norm must come before each part")?;
        must(raw.enable_bias, true, "enable_bias", "linear layers must have biases")?;
        must(
            raw.layer_norm_elementwise_affine,
            true,
            "layer_norm_elementwise_affine",
            "norms must have weights",
        )?;
        must(raw.remove_final_layer_norm, false, "_remove_final_layer_norm", "the last norm must be there")?;
        if let Some(dim) = raw.word_embed_proj_dim.filter(|d| *d != raw.hidden_size) {
            return Err(self.unsupported(
                format!("word_embed_proj_dim {dim} with hidden_size {}", raw.hidden_size),
                "embeddings must be as wide as the hidden state",
            ));
        }
        let mut spec = self.common(Family::Opt)?;
        spec.intermediate = raw.ffn_dim.ok_or_else(|| self.inconsistent("ffn_dim is missing".into()))?;
        spec.tie_embeddings = raw.tie_word_embeddings.unwrap_or(true);
        spec.attention_bias = true;
        spec.mlp_bias = true;
        Ok(spec)
    }

    fn check(&self, spec: &ModelSpec) -> Result<(), ConfigError> {
        let sizes = [
            ("vocab_size", spec.vocab_size),
            ("hidden_size", spec.hidden),
            ("num_hidden_layers", spec.layers),
            ("num_attention_heads", spec.heads),
            ("num_key_value_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
            ("intermediate size", spec.intermediate),
            ("max_position_embeddings", spec.max_positions),
        ];
        if let Some((field, _)) = sizes.iter().find(|(_, v)| *v == 0) {
            return Err(self.inconsistent(format!("{field} is 0")));
        }
        if self.raw.head_dim.is_none() && !spec.hidden.is_multiple_of(spec.heads) {
            return Err(self.inconsistent(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                spec.hidden, spec.heads
            )));
        }
        if !spec.heads.is_multiple_of(spec.kv_heads) {
            return Err(self.inconsistent(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                spec.heads, spec.kv_heads
            )));
        }
        if spec.family == Family::Llama && !spec.head_dim.is_multiple_of(2) {
            return Err(self.inconsistent(format!("head_dim {} is odd", spec.head_dim)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = include_str!("../../../configs/models/llama-2-7b.json");
    const OPT: &str = include_str!("../../../configs/models/opt-125m.json");

    fn with(text: &str, field: &str, value: Value) -> String {
        let mut json: Value = serde_json::from_str(text).unwrap();
        json[field] = value;
        json.to_string()
    }

    fn refusal(text: &str, field: &str, value: Value) -> String {
        parse("m", &with(text, field, value)).unwrap_err().to_string()
    }

    #[test]
    fn unsupported_fields_are_named() {
        for (text, field, value, said) in [
            (LLAMA, "rope_scaling", serde_json::json!({"type": "yarn"}), "yarn"),
            (LLAMA, "rope_scaling", serde_json::json!({"type": "linear"}), "factor is missing"),
            (LLAMA, "partial_rotary_factor", serde_json::json!(0.5), "partial_rotary_factor 0.5"),
            (LLAMA, "hidden_act", "gelu".into(), "hidden_act gelu"),
            (LLAMA, "architectures", serde_json::json!(["MambaForCausalLM"]), "MambaForCausalLM"),
            (LLAMA, "quantization_config", serde_json::json!({"quant_method": "gptq"}), "gptq"),
            (LLAMA, "torch_dtype", "float8_e4m3fn".into(), "float8_e4m3fn"),
            (LLAMA, "num_key_value_heads", 5.into(), "num_key_value_heads 5"),
            (OPT, "do_layer_norm_before", false.into(), "do_layer_norm_before false"),
            (OPT, "word_embed_proj_dim", 512.into(), "word_embed_proj_dim 512"),
            (OPT, "activation_function", "gelu".into(), "activation_function gelu"),
        ] {
            let message = refusal(text, field, value);
            assert!(message.contains(said), "{field}: {message}");
        }
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let new =
            with(LLAMA, "rope_parameters", serde_json::json!({"rope_theta": 5e5, "rope_type": "default"}));
        let mut json: Value = serde_json::from_str(&new).unwrap();
        json.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(parse("m", &json.to_string()).unwrap().rope_theta, 5e5);
        assert_eq!(parse("m", &with(LLAMA, "rope_theta", 1e6.into())).unwrap().rope_theta, 1e6);
        let linear = RopeScaling::Linear { factor: 2.0 };
        let old = with(LLAMA, "rope_scaling", serde_json::json!({"type": "linear", "factor": 2.0}));
        let new = with(LLAMA, "rope_parameters", serde_json::json!({"rope_type": "linear", "factor": 2.0}));
        for text in [old, new] {
            assert_eq!(parse("m", &text).unwrap().rope_scaling, linear);
        }
    }

    #[test]
    fn eos_is_one_id_or_several() {
        assert_eq!(parse("m", LLAMA).unwrap().eos, [2]);
        assert_eq!(parse("m", &with(LLAMA, "eos_token_id", serde_json::json!([2, 7]))).unwrap().eos, [2, 7]);
    }

    #[test]
    fn truncated_json_is_refused() {
        assert!(matches!(parse("m", &LLAMA[..40]), Err(ConfigError::Malformed { .. })));
    }
}
