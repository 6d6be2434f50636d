//! The OPT family: learned positions, LayerNorm before each part, ReLU, biases.

use super::decoder::{Destination, Linear, Loader, Rest, Span, Stack, Workspace};
use super::spec::OPT_POSITION_OFFSET;
use super::weights::WeightError;
use crate::engine::backend::{Backend, Norm};

/// Weights of an OPT model.
pub(super) struct Opt<B: Backend> {
    hidden: usize,
    intermediate: usize,
    embed: B::Buffer,
    positions: B::Buffer,
    layers: Vec<Layer<B>>,
    norm: Norm<B::Buffer>,
    head: B::Matrix,
}

struct Layer<B: Backend> {
    attention_norm: Norm<B::Buffer>,
    qkv: Linear<B>,
    out: Linear<B>,
    final_norm: Norm<B::Buffer>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Opt<B> {
    pub fn load(loader: &mut Loader<'_, B>) -> Result<Self, WeightError> {
        let spec = loader.spec;
        // Checkpoints saved from the bare decoder lack the outer prefix.
        let with_prefix = loader.weights.has("model.decoder.embed_tokens.weight");
        let root = if with_prefix { "model.decoder" } else { "decoder" };
        let layers = (0..spec.layers)
            .map(|i| {
                let prefix = format!("{root}.layers.{i}");
                Ok(Layer {
                    attention_norm: loader.layer_norm(&format!("{prefix}.self_attn_layer_norm"))?,
                    qkv: loader.linear(&prefix, &[0, 1, 2], spec.attention_bias)?,
                    out: loader.linear(&prefix, &[3], spec.attention_bias)?,
                    final_norm: loader.layer_norm(&format!("{prefix}.final_layer_norm"))?,
                    up: loader.linear(&prefix, &[4], spec.mlp_bias)?,
                    down: loader.linear(&prefix, &[5], spec.mlp_bias)?,
                })
            })
            .collect::<Result<_, _>>()?;
        let embed = format!("{root}.embed_tokens.weight");
        Ok(Self {
            hidden: spec.hidden,
            intermediate: spec.intermediate,
            embed: loader.table(&embed, spec.vocab_size)?,
            positions: loader
                .table(&format!("{root}.embed_positions.weight"), spec.max_positions + OPT_POSITION_OFFSET)?,
            layers,
            norm: loader.layer_norm(&format!("{root}.final_layer_norm"))?,
            head: loader.head("lm_head.weight", &embed)?,
        })
    }

    /// The linear layers by shape and use.
    pub fn products(&self) -> Vec<(Destination, Vec<&B::Matrix>)> {
        let each = |of: fn(&Layer<B>) -> &Linear<B>| self.layers.iter().map(|l| of(l).matrix()).collect();
        vec![
            (Destination::Buffer, each(|l| &l.qkv)),
            (Destination::Residual, each(|l| &l.out)),
            (Destination::Buffer, each(|l| &l.up)),
            (Destination::Residual, each(|l| &l.down)),
            (Destination::Wide, vec![&self.head]),
        ]
    }
}

impl<B: Backend> Stack<B> for Opt<B> {
    fn embed(&self, b: &mut B, w: &mut Workspace<B>, n: usize) -> Result<(), B::Error> {
        b.embed(n, self.hidden, &self.embed, &mut w.residual)?;
        b.add_positions(n, self.hidden, OPT_POSITION_OFFSET, &self.positions, &mut w.residual)
    }

    fn project(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error> {
        let layer = &self.layers[at.layer];
        b.layer_norm(at.n, &layer.attention_norm, &w.residual, &mut w.normed)?;
        layer.qkv.forward(b, at, &w.normed, &mut w.qkv)?;
        b.write_kv(at.layer, at.n, &mut w.qkv)
    }

    fn rest(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error> {
        let layer = &self.layers[at.layer];
        let Rest { attended, residual, normed, up, .. } = w.rest(at.rows);
        layer.out.forward_add(b, at, attended, residual)?;
        b.layer_norm(at.n, &layer.final_norm, residual, normed)?;
        layer.up.forward(b, at, normed, up)?;
        b.relu(at.n, self.intermediate, up)?;
        layer.down.forward_add(b, at, up, residual)
    }

    fn head(&self, b: &mut B, w: &mut Workspace<B>, samples: usize) -> Result<(), B::Error> {
        b.layer_norm(samples, &self.norm, &w.last, &mut w.last_normed)?;
        b.linear_wide(samples, &self.head, &w.last_normed, &mut w.logits)
    }
}
