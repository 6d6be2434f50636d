//! What the CPU executor's memory goes to.

use gemm::Parallelism;

use super::attention;
use super::backend::widest_input;
use super::kv::KvShape;
use super::slots::Slots;
use crate::engine::batch::BatchLimits;
use crate::engine::memory::MemoryPlan;
use crate::engine::model::{Dtype, ModelSpec, WorkspaceElements};

/// `elements` zeros whose pages the operating system has really given: a page fault in the middle of
/// a step would be measured as part of it.
pub(super) fn committed(elements: usize) -> Vec<f32> {
    const PAGE: usize = 4096 / size_of::<f32>();
    let mut memory = vec![0.0f32; elements];
    for value in memory.iter_mut().step_by(PAGE) {
        // Opaque to the optimiser, which could else drop the write of a zero over a zero.
        *value = std::hint::black_box(0.0);
    }
    memory
}

/// The memory of a CPU executor; `max_rank` is the largest adapter's. Weights are kept in f32, and a tied
/// embedding table twice, once as the table and once as the output matrix.
pub(in crate::engine) fn plan(
    spec: &ModelSpec,
    limits: &BatchLimits,
    max_rank: usize,
    gpu_loras: usize,
) -> MemoryPlan {
    const F32: u64 = size_of::<f32>() as u64;
    let shape = KvShape {
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        block_size: limits.block_size,
        blocks: limits.kv_blocks,
    };
    let tied = if spec.tie_embeddings { (spec.vocab_size * spec.hidden) as u64 } else { 0 };
    let buffers = WorkspaceElements::new(spec, limits);
    let workspace = buffers.narrow()
        + buffers.wide()
        + limits.max_num_batched_tokens * spec.hidden
        + attention::Scratch::elements(&shape, limits.max_model_len)
        + limits.max_num_batched_tokens * (max_rank + widest_input(spec))
        + limits.max_model_len * spec.head_dim;
    MemoryPlan {
        weights: (spec.parameters() + tied) * F32,
        workspace: workspace as u64 * F32,
        slot: Slots::slot_elements(spec, max_rank) as u64 * F32,
        slots: gpu_loras as u64,
        kv_block: spec.kv_bytes_per_token(Dtype::F32) * limits.block_size as u64,
        kv_blocks: limits.kv_blocks as u64,
    }
}

/// How many threads the products of a step use.
pub(super) fn parallelism(threads: usize) -> Parallelism {
    if threads <= 1 { Parallelism::None } else { Parallelism::Rayon(threads) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;

    #[test]
    fn llama_2_7b_needs_what_its_shape_says() {
        let limits = BatchLimits {
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            max_model_len: 4096,
            block_size: 16,
            kv_blocks: 64,
        };
        let plan = super::plan(&preset("meta-llama/Llama-2-7b-hf").unwrap(), &limits, 16, 8);
        assert_eq!(plan.weights, 4 * 6_738_415_616);
        assert_eq!(plan.slot, 4 * 39_976_960);
        assert_eq!(plan.kv_block, 16 * 2 * 524_288);
        assert_eq!(plan.kv_blocks_in(1 << 30), 64);
        let parts = plan.weights + plan.workspace + 8 * plan.slot + 64 * plan.kv_block;
        assert_eq!(plan.total(), parts);
        let rows = 4096 * (3 * 4096 + 3 * 4096 + 4096 + 3 * 11_008);
        let last = 16 * (3 * 4096 + 32_000);
        let scratch = 4096 * (2 * 128 + 64) + 4096 * (16 + 11_008) + 4096 * 128;
        assert_eq!(plan.workspace, 4 * (rows + last + scratch));
    }
}
