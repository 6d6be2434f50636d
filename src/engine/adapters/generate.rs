//! Adapters drawn from a seed.

use std::sync::Arc;

use super::kept::HostAdapter;
use super::layout::AdapterLayout;
use super::slab::{SlabMaker, drawn_parts};
use crate::engine::model::{ModelSpec, Uniform};

/// How much a generated adapter changes a module's output, as a share of the output itself.
const STRENGTH: f32 = 0.25;

/// Adapter `index` of a run, on every linear module, both matrices non-zero.
pub(super) fn generate(
    spec: &ModelSpec,
    seed: u64,
    index: usize,
    rank: usize,
    slabs: &dyn SlabMaker,
) -> Result<HostAdapter, String> {
    // alpha = 2 · rank, the usual choice.
    let scale = 2.0;
    let layout = AdapterLayout::new(spec, rank, scale, |_, _| true);
    let stream = Uniform::new(seed, &format!("adapters/{index}"), 0.0, 0.0);
    // Uniform in ±bound has variance bound² / 3.
    let bounds = |inputs: usize, rank: usize| {
        ((3.0 / inputs as f32).sqrt(), STRENGTH / scale * (3.0 / rank as f32).sqrt())
    };
    let parts = drawn_parts(&layout, stream, bounds);
    let slab = slabs.draw(layout.elements(), &parts)?;
    Ok(HostAdapter { name: format!("lora-{index}"), layout: Arc::new(layout), slab })
}
