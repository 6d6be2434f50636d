//! Adapters drawn from a seed.

use std::sync::Arc;

use super::layout::AdapterLayout;
use super::pool::HostAdapter;
use crate::engine::model::ModelSpec;
use crate::engine::model::random::{fill_uniform, substream};

/// How much a generated adapter changes a module's output, as a share of the output itself.
const STRENGTH: f32 = 0.25;

/// Adapter `index` of a run, on every linear module, both matrices non-zero.
pub(super) fn generate(spec: &ModelSpec, seed: u64, index: usize, rank: usize) -> HostAdapter {
    // alpha = 2 · rank, the usual choice.
    let scale = 2.0;
    let layout = AdapterLayout::new(spec, rank, scale, |_, _| true);
    let mut rng = substream(seed, &format!("adapters/{index}"));
    let mut slab = vec![0.0f32; layout.elements()];
    for layer in 0..layout.layers() {
        for module in 0..spec.modules().len() {
            let Some(part) = layout.part(layer, module) else { continue };
            let (a, b) = slab[part.offset..part.offset + rank * (part.inputs + part.outputs)]
                .split_at_mut(rank * part.inputs);
            // Uniform in ±bound has variance bound² / 3.
            fill_uniform(&mut rng, (3.0 / part.inputs as f32).sqrt(), a);
            fill_uniform(&mut rng, STRENGTH / scale * (3.0 / rank as f32).sqrt(), b);
        }
    }
    HostAdapter { name: format!("lora-{index}"), layout: Arc::new(layout), slab }
}
