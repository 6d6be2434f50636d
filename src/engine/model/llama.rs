//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use super::decoder::{Linear, Loader, Workspace};
use super::weights::WeightError;
use crate::engine::backend::{Backend, Norm};

/// Weights of a Llama model.
pub(super) struct Llama<B: Backend> {
    hidden: usize,
    intermediate: usize,
    embed: B::Buffer,
    layers: Vec<Layer<B>>,
    norm: Norm<B::Buffer>,
    head: B::Matrix,
}

struct Layer<B: Backend> {
    input_norm: Norm<B::Buffer>,
    qkv: Linear<B>,
    out: Linear<B>,
    post_norm: Norm<B::Buffer>,
    gate_up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Llama<B> {
    pub fn load(loader: &mut Loader<'_, B>) -> Result<Self, WeightError> {
        let spec = loader.spec;
        let layers = (0..spec.layers)
            .map(|i| {
                let prefix = format!("model.layers.{i}");
                Ok(Layer {
                    input_norm: loader.rms_norm(&format!("{prefix}.input_layernorm"))?,
                    qkv: loader.linear(&prefix, &[0, 1, 2], spec.attention_bias)?,
                    out: loader.linear(&prefix, &[3], spec.attention_bias)?,
                    post_norm: loader.rms_norm(&format!("{prefix}.post_attention_layernorm"))?,
                    gate_up: loader.linear(&prefix, &[4, 5], spec.mlp_bias)?,
                    down: loader.linear(&prefix, &[6], spec.mlp_bias)?,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            hidden: spec.hidden,
            intermediate: spec.intermediate,
            embed: loader.table("model.embed_tokens.weight", spec.vocab_size)?,
            layers,
            norm: loader.rms_norm("model.norm")?,
            head: loader.head("lm_head.weight", "model.embed_tokens.weight")?,
        })
    }

    /// One step over `n` rows, `samples` of which get logits.
    pub fn forward(&self, b: &mut B, w: &mut Workspace<B>, n: usize, samples: usize) -> Result<(), B::Error> {
        let h = self.hidden;
        b.embed(n, h, &self.embed, &mut w.residual)?;
        for (i, layer) in self.layers.iter().enumerate() {
            b.await_adapters(i)?;
            if i == 0 {
                b.rms_norm(n, &layer.input_norm, &w.residual, &mut w.normed)?;
            } else {
                b.add_rms_norm(n, &layer.input_norm, &w.delta, &mut w.residual, &mut w.normed)?;
            }
            layer.qkv.forward(b, i, n, &w.normed, &mut w.qkv)?;
            b.rope(n, &mut w.qkv)?;
            b.write_kv(i, n, &w.qkv)?;
            b.attention(i, n, &w.qkv, &mut w.attended)?;
            layer.out.forward(b, i, n, &w.attended, &mut w.delta)?;
            b.add_rms_norm(n, &layer.post_norm, &w.delta, &mut w.residual, &mut w.normed)?;
            layer.gate_up.forward(b, i, n, &w.normed, &mut w.up)?;
            b.silu_mul(n, self.intermediate, &w.up, &mut w.act)?;
            layer.down.forward(b, i, n, &w.act, &mut w.delta)?;
        }
        if samples > 0 {
            b.add(n, h, &w.delta, &mut w.residual)?;
            b.gather_samples(h, &w.residual, &mut w.last)?;
            b.rms_norm(samples, &self.norm, &w.last, &mut w.last_normed)?;
            b.linear(samples, &self.head, &w.last_normed, &mut w.logits)?;
        }
        Ok(())
    }
}
