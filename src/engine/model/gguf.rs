//! Models in GGUF files: the shape from the metadata, the tensors under their Hugging Face names.

use std::path::Path;

use super::rope::RopeScaling;
use super::spec::{Dtype, Family, ModelSpec};
use super::weights::WeightError;
use crate::workload::gguf::{Gguf, GgufError};

/// Divisors of the rotary frequencies, which some converters write as a tensor.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// A GGUF file whose tensors are read as those of a checkpoint of the same model.
#[derive(Debug)]
pub struct GgufWeights {
    file: Gguf,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl GgufWeights {
    /// Opens a file: its shape under the name that the user gave, and its weights.
    ///
    /// # Errors
    /// If it is no GGUF file, or of a model that the engine does not run.
    pub fn open(name: &str, path: &Path) -> Result<(ModelSpec, Self), GgufError> {
        let file = Gguf::open(path)?;
        let spec = read_spec(name, &file)?;
        let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
        let weights = Self { file, heads, kv_heads, head_dim };
        weights.check_names(&spec)?;
        Ok((spec, weights))
    }

    /// The file.
    pub fn file(&self) -> &Gguf {
        &self.file
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn has(&self, name: &str) -> bool {
        gguf_name(name).is_some_and(|name| self.file.shape(&name).is_some())
    }

    /// The tensor of this Hugging Face name as f32, row-major, checked to have `shape`.
    ///
    /// # Errors
    /// If it is missing, has another shape, or the file is cut short.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightError> {
        let path = || self.file.path().to_owned();
        let missing = || WeightError::Missing { path: path(), tensor: name.to_owned() };
        let tensor = gguf_name(name).ok_or_else(missing)?;
        let found = self.file.shape(&tensor).ok_or_else(missing)?;
        if found != shape {
            let (found, expected) = (found.to_vec(), shape.to_vec());
            return Err(WeightError::Shape { path: path(), tensor, found, expected });
        }
        let values = self
            .file
            .dequantised(&tensor)
            .map_err(|e| WeightError::File { path: path(), message: e.to_string() })?;
        // llama.cpp turns neighbouring pairs of a head, checkpoints halves: its converter reorders the
        // rows of queries and keys, and this puts them back.
        Ok(match tensor.split('.').nth(2) {
            Some("attn_q") => halves(&values, self.heads, self.head_dim),
            Some("attn_k") => halves(&values, self.kv_heads, self.head_dim),
            _ => values,
        })
    }

    /// A tensor that is not read would be a part of the model that is silently left out.
    fn check_names(&self, spec: &ModelSpec) -> Result<(), GgufError> {
        for (tensor, _) in self.file.tensors() {
            let mut parts = tensor.split('.');
            let known = match parts.next() {
                Some("token_embd" | "output" | "output_norm") => true,
                Some("rope_freqs") => tensor == ROPE_DIVISORS,
                Some("blk") => {
                    let layer = parts.next().and_then(|l| l.parse::<usize>().ok());
                    let part = parts.next().unwrap_or_default();
                    let known = ["attn_norm", "ffn_norm"].contains(&part)
                        || LINEAR.iter().any(|(_, gguf)| *gguf == part);
                    known && layer.is_some_and(|l| l < spec.layers)
                }
                _ => false,
            };
            if !known {
                return Err(self.file.unsupported(
                    format!("tensor {tensor}"),
                    format!("a llama model of {} layers has no such part", spec.layers),
                ));
            }
        }
        Ok(())
    }
}

/// Linear modules: their path in checkpoints, and their name in GGUF files.
const LINEAR: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// `blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj.weight`.
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        other => LINEAR.iter().find(|(path, _)| *path == other)?.1,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// Rows `(head, pair, half)` in the order `(head, half, pair)`; a bias is a matrix of one column.
fn halves(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let row = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * row) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let at = (2 * pair + half) * row;
                out.extend_from_slice(&head[at..at + row]);
            }
        }
    }
    out
}

fn read_spec(name: &str, file: &Gguf) -> Result<ModelSpec, GgufError> {
    let architecture = file.required("general.architecture", file.text("general.architecture")?)?;
    if architecture != "llama" {
        return Err(file.unsupported(format!("architecture {architecture}"), "llama is read from GGUF files"));
    }
    let size = |key: &str| {
        let key = format!("llama.{key}");
        let value = file.required(&key, file.count(&key)?)?;
        if value == 0 {
            return Err(file.unsupported(format!("{key} 0"), "sizes are at least 1"));
        }
        Ok(value)
    };
    let (hidden, heads, layers) =
        (size("embedding_length")?, size("attention.head_count")?, size("block_count")?);
    let kv_heads = file.count("llama.attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = file.count("llama.attention.key_length")?.unwrap_or(hidden / heads);
    let agree = |key: &str, value: Option<usize>, wanted: usize| match value {
        Some(v) if v != wanted => {
            Err(file.unsupported(format!("llama.{key} {v}"), format!("it must be {wanted} here")))
        }
        _ => Ok(()),
    };
    agree("attention.value_length", file.count("llama.attention.value_length")?, head_dim)?;
    agree("rope.dimension_count", file.count("llama.rope.dimension_count")?, head_dim)?;
    agree("expert_count", file.count("llama.expert_count")?, 0)?;
    if head_dim == 0 || !head_dim.is_multiple_of(2) || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(file.unsupported(
            format!("{heads} heads, {kv_heads} key/value heads of width {head_dim}"),
            "key/value heads must divide the heads, and widths be even",
        ));
    }
    let embeddings = file.shape("token_embd.weight").and_then(|shape| shape.first().copied());
    let biased = |part: &str| file.shape(&format!("blk.0.{part}.bias")).is_some();
    let all_or_none = |parts: &[&str]| match parts.iter().filter(|part| biased(part)).count() {
        0 => Ok(false),
        n if n == parts.len() => Ok(true),
        _ => Err(file.unsupported("biases on some of the linear layers".into(), "all have one, or none")),
    };
    let attention_bias = all_or_none(&["attn_q", "attn_k", "attn_v", "attn_output"])?;
    let mlp_bias = all_or_none(&["ffn_gate", "ffn_up", "ffn_down"])?;
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(file.id(key)?.filter(|id| !eos.contains(id)));
    }
    let epsilon = "llama.attention.layer_norm_rms_epsilon";
    Ok(ModelSpec {
        name: name.to_owned(),
        family: Family::Llama,
        // What dequantising gives.
        dtype: Dtype::F32,
        vocab_size: file.required("token_embd.weight", embeddings)?,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate: size("feed_forward_length")?,
        max_positions: size("context_length")?,
        norm_eps: file.required(epsilon, file.real(epsilon)?)? as f32,
        rope_theta: file.real("llama.rope.freq_base")?.unwrap_or(10_000.0) as f32,
        rope_scaling: rope_scaling(file, head_dim)?,
        tie_embeddings: file.shape("output.weight").is_none(),
        attention_bias,
        mlp_bias,
        bos: file.id("tokenizer.ggml.bos_token_id")?,
        eos,
    })
}

fn rope_scaling(file: &Gguf, head_dim: usize) -> Result<RopeScaling, GgufError> {
    let kind = file.text("llama.rope.scaling.type")?;
    if let Some(shape) = file.shape(ROPE_DIVISORS) {
        if shape != [head_dim / 2] || kind.is_some_and(|k| k != "none") {
            return Err(file.unsupported(
                format!("{ROPE_DIVISORS} of shape {shape:?} with rope scaling {}", kind.unwrap_or("none")),
                format!("alone and of shape [{}] it is", head_dim / 2),
            ));
        }
        return Ok(RopeScaling::Divisors(file.dequantised(ROPE_DIVISORS)?));
    }
    let factor = || {
        let key = "llama.rope.scaling.factor";
        let factor = file.required(key, file.real(key)?)?;
        if factor.is_finite() && factor > 0.0 {
            return Ok(factor);
        }
        Err(file.unsupported(format!("{key} {factor}"), "it must be above 0"))
    };
    match kind {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
        Some(other) => {
            Err(file.unsupported(format!("rope scaling of type {other}"), "types are none and linear"))
        }
    }
}

#[cfg(test)]
mod tests;
