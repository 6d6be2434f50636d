//! How fast steps and swaps could be if they did nothing but their arithmetic, or their reading.

use crate::engine::device::Ceilings;
use crate::engine::model::{Dtype, ModelSpec};
use crate::engine::setup::Loaded;

/// Floors of one model on one device, milliseconds; none where the device's ceilings are not known.
#[derive(Clone, Debug)]
pub struct Floors {
    ceilings: Option<Ceilings>,
    spec: ModelSpec,
}

impl Floors {
    /// For what is loaded.
    pub fn new(loaded: &Loaded, ceilings: Option<Ceilings>) -> Self {
        Self { ceilings, spec: loaded.spec().clone() }
    }

    /// A prompt of `tokens`: the arithmetic of every linear layer, of causal attention, and of one row of
    /// logits, at the rate of large products. Adapters (0.6 % at rank 16) are left out; what the engine does not
    /// compute of the last layer is counted, as it is everywhere.
    pub fn prefill_ms(&self, tokens: u32) -> Option<f64> {
        Some(self.prefill_flops(tokens) / self.ceilings?.gemm_flops * 1e3)
    }

    /// The same in the time that large products take for as many operations from idle.
    pub fn prefill_from_idle_ms(&self, tokens: u32) -> Option<f64> {
        Some(self.ceilings?.from_idle_s(self.prefill_flops(tokens))? * 1e3)
    }

    /// The same at the rate that large products keep up: a device that is always busy runs at a lower clock.
    pub fn prefill_sustained_ms(&self, tokens: u32) -> Option<f64> {
        Some(self.prefill_flops(tokens) / self.ceilings?.gemm_sustained_flops? * 1e3)
    }

    fn prefill_flops(&self, tokens: u32) -> f64 {
        let n = f64::from(tokens);
        let s = &self.spec;
        let linear: usize = s.modules().iter().map(|m| m.inputs * m.outputs).sum();
        2.0 * (s.layers * linear) as f64 * n
            + 2.0 * n * n * (s.q_dim() * s.layers) as f64
            + 2.0 * (s.hidden * s.vocab_size) as f64
    }

    /// A decode of `seqs` sequences at `context` tokens: weights, KV cache and each adapter read once.
    pub fn decode_ms(&self, seqs: u32, context: u32, adapter_bytes: u64) -> Option<f64> {
        let s = &self.spec;
        // The embedding table is not read but for a row a sequence.
        let table = (s.vocab_size * s.hidden) as u64 * Dtype::Bf16.bytes();
        let weights = s.weight_bytes(Dtype::Bf16) - if s.tie_embeddings { 0 } else { table };
        let kv = u64::from(seqs) * u64::from(context) * s.kv_bytes_per_token(Dtype::Bf16);
        Some((weights + kv + adapter_bytes) as f64 / self.ceilings?.read_bytes_s * 1e3)
    }

    /// A copy of `bytes` from page-locked memory.
    pub fn swap_ms(&self, bytes: u64) -> Option<f64> {
        Some(bytes as f64 / self.ceilings?.pinned_bytes_s * 1e3)
    }
}
