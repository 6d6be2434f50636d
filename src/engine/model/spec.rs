//! A model's shape, and the sizes that follow from it.

use std::fmt;

use super::rope::RopeScaling;

/// A model family that the engine implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// RMSNorm, rotary positions, grouped-query attention, SwiGLU.
    Llama,
    /// Learned positions, LayerNorm before each part, ReLU, biases.
    Opt,
}

/// The number format of a checkpoint or of a device's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit IEEE.
    F32,
    /// 16-bit IEEE.
    F16,
    /// 16-bit brain float.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name in a `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The shape of a decoder-only model, as its `config.json` gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// What the user called it: a preset's name or the folder's.
    pub name: String,
    /// Which forward pass it takes.
    pub family: Family,
    /// The checkpoint's own number format.
    pub dtype: Dtype,
    /// Token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width between the two halves of the MLP.
    pub intermediate: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
    /// Added to the variance in every norm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies (Llama).
    pub rope_theta: f32,
    /// What becomes of those frequencies (Llama).
    pub rope_scaling: RopeScaling,
    /// Whether the output matrix is the embedding table.
    pub tie_embeddings: bool,
    /// Whether the attention's linear layers have biases.
    pub attention_bias: bool,
    /// Whether the MLP's linear layers have biases.
    pub mlp_bias: bool,
    /// The id that begins a sequence.
    pub bos: Option<u32>,
    /// The ids that end one.
    pub eos: Vec<u32>,
}

/// A linear layer that an adapter may adapt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name in checkpoints and in PEFT's `target_modules`.
    pub name: &'static str,
    /// Its path inside a layer in checkpoints.
    pub path: &'static str,
    /// Input width.
    pub inputs: usize,
    /// Output width.
    pub outputs: usize,
}

impl ModelSpec {
    /// Width of all query heads.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of the fused query, key and value projection.
    pub fn qkv_dim(&self) -> usize {
        self.q_dim() + 2 * self.kv_dim()
    }

    /// The linear modules of one layer, in the order in which adapters are packed.
    pub fn modules(&self) -> Vec<Module> {
        let (h, q, kv, i) = (self.hidden, self.q_dim(), self.kv_dim(), self.intermediate);
        let module = |name, path, inputs, outputs| Module { name, path, inputs, outputs };
        let attention = |out_name, out_path| {
            [
                module("q_proj", "self_attn.q_proj", h, q),
                module("k_proj", "self_attn.k_proj", h, kv),
                module("v_proj", "self_attn.v_proj", h, kv),
                module(out_name, out_path, q, h),
            ]
        };
        match self.family {
            Family::Llama => attention("o_proj", "self_attn.o_proj")
                .into_iter()
                .chain([
                    module("gate_proj", "mlp.gate_proj", h, i),
                    module("up_proj", "mlp.up_proj", h, i),
                    module("down_proj", "mlp.down_proj", i, h),
                ])
                .collect(),
            Family::Opt => attention("out_proj", "self_attn.out_proj")
                .into_iter()
                .chain([module("fc1", "fc1", h, i), module("fc2", "fc2", i, h)])
                .collect(),
        }
    }

    /// Parameters, a tied output matrix counted once.
    pub fn parameters(&self) -> u64 {
        let (h, v) = (self.hidden as u64, self.vocab_size as u64);
        let linear: u64 = self.modules().iter().map(|m| (m.inputs * m.outputs) as u64).sum();
        let mut biases = 0u64;
        if self.attention_bias {
            biases += (self.qkv_dim() + self.hidden) as u64;
        }
        if self.mlp_bias {
            let ups = if self.family == Family::Llama { 2 } else { 1 };
            biases += (ups * self.intermediate + self.hidden) as u64;
        }
        let (norm, positions) = match self.family {
            Family::Llama => (h, 0),
            Family::Opt => (2 * h, (self.max_positions + OPT_POSITION_OFFSET) as u64 * h),
        };
        let embeddings = v * h * if self.tie_embeddings { 1 } else { 2 };
        embeddings + positions + self.layers as u64 * (linear + biases + 2 * norm) + norm
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self, dtype: Dtype) -> u64 {
        self.parameters() * dtype.bytes()
    }

    /// Bytes that one token takes in the KV cache.
    pub fn kv_bytes_per_token(&self, dtype: Dtype) -> u64 {
        2 * (self.layers * self.kv_dim()) as u64 * dtype.bytes()
    }

    /// Parameters of an adapter of `rank` on every linear module.
    pub fn adapter_parameters(&self, rank: usize) -> u64 {
        let widths: usize = self.modules().iter().map(|m| m.inputs + m.outputs).sum();
        (self.layers * rank * widths) as u64
    }

    /// Bytes of an adapter of `rank` on every linear module: a slot's size if `rank` is the largest.
    pub fn adapter_bytes(&self, rank: usize, dtype: Dtype) -> u64 {
        self.adapter_parameters(rank) * dtype.bytes()
    }
}

/// OPT's table of positions begins with two rows that no position uses.
pub const OPT_POSITION_OFFSET: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;

    #[test]
    fn llama_2_7b_has_its_published_sizes() {
        let spec = preset("meta-llama/Llama-2-7b-hf").unwrap();
        assert_eq!(spec.parameters(), 6_738_415_616);
        assert_eq!(spec.weight_bytes(Dtype::Bf16), 13_476_831_232);
        assert_eq!(spec.kv_bytes_per_token(Dtype::Bf16), 524_288);
        assert_eq!(spec.adapter_parameters(16), 39_976_960);
        assert_eq!(spec.adapter_bytes(16, Dtype::Bf16), 79_953_920);
        assert_eq!(preset("NousResearch/Llama-2-7b-hf").unwrap().parameters(), spec.parameters());
    }

    #[test]
    fn opt_125m_has_its_published_sizes() {
        let spec = preset("facebook/opt-125m").unwrap();
        assert_eq!(spec.parameters(), 125_239_296);
        assert_eq!(spec.kv_bytes_per_token(Dtype::F16), 36_864);
        assert_eq!(spec.adapter_parameters(8), 12 * 8 * (4 * 1536 + 2 * 3840));
    }

    #[test]
    fn tiny_groups_its_queries() {
        let spec = preset("tiny").unwrap();
        assert_eq!((spec.heads, spec.kv_heads, spec.q_dim(), spec.kv_dim()), (4, 1, 128, 32));
        let names: Vec<_> = spec.modules().iter().map(|m| m.name).collect();
        assert_eq!(names, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    }
}
