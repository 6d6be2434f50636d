//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use super::decoder::{Destination, Linear, Loader, Rest, Span, Stack, Workspace};
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

    /// The linear layers by shape and use.
    pub fn products(&self) -> Vec<(Destination, Vec<&B::Matrix>)> {
        let each = |of: fn(&Layer<B>) -> &Linear<B>| self.layers.iter().map(|l| of(l).matrix()).collect();
        vec![
            (Destination::Buffer, each(|l| &l.qkv)),
            (Destination::Residual, each(|l| &l.out)),
            (Destination::Buffer, each(|l| &l.gate_up)),
            (Destination::Residual, each(|l| &l.down)),
            (Destination::Wide, vec![&self.head]),
        ]
    }
}

impl<B: Backend> Stack<B> for Llama<B> {
    fn embed(&self, b: &mut B, w: &mut Workspace<B>, n: usize) -> Result<(), B::Error> {
        b.embed(n, self.hidden, &self.embed, &mut w.residual)
    }

    fn project(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error> {
        let layer = &self.layers[at.layer];
        b.rms_norm(at.n, &layer.input_norm, &w.residual, &mut w.normed)?;
        layer.qkv.forward_rope_kv(b, at, &w.normed, &mut w.qkv)
    }

    fn rest(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error> {
        let layer = &self.layers[at.layer];
        let Rest { attended, residual, normed, up, act } = w.rest(at.rows);
        layer.out.forward_add(b, at, attended, residual)?;
        b.rms_norm(at.n, &layer.post_norm, residual, normed)?;
        layer.gate_up.forward_silu_mul(b, at, self.intermediate, normed, up, act)?;
        layer.down.forward_add(b, at, act, residual)
    }

    fn head(&self, b: &mut B, w: &mut Workspace<B>, samples: usize) -> Result<(), B::Error> {
        b.rms_norm(samples, &self.norm, &w.last, &mut w.last_normed)?;
        b.linear_wide(samples, &self.head, &w.last_normed, &mut w.logits)
    }
}
