//! What a GPU executor's memory goes to.

use lora_kernels::Gemm;

use super::graphs::GraphKeys;
use super::meta::MetaLayout;
use super::shape::padded;
use super::slots::CudaSlots;
use crate::engine::batch::BatchLimits;
use crate::engine::memory::MemoryPlan;
use crate::engine::model::{Dtype, ModelSpec, WorkspaceElements};

const BF16: u64 = 2;
const F32: u64 = 4;
/// What the driver takes for loaded library kernels and the like; measured below this.
const DRIVER: u64 = 512 << 20;
/// What it takes for each kernel of a recorded graph.
const GRAPH_KERNEL: u64 = 4 << 10;

/// The memory of a GPU executor. Weights are kept in bf16, and a tied embedding table twice, once as the
/// table and once as the output matrix.
pub(in crate::engine) fn plan(
    spec: &ModelSpec,
    limits: &BatchLimits,
    max_rank: usize,
    gpu_loras: usize,
) -> MemoryPlan {
    let limits = padded(limits);
    let buffers = WorkspaceElements::new(spec, &limits);
    let tied = if spec.tie_embeddings { (spec.vocab_size * spec.hidden) as u64 } else { 0 };
    let rope = (limits.max_model_len * spec.head_dim) as u64;
    let workspace = buffers.narrow() as u64 * BF16
        + buffers.wide() as u64 * F32
        + rope * F32
        + MetaLayout::new(&limits, true).words() as u64 * 4
        + super::backend::scratch_bytes(spec, &limits, max_rank)
        + Gemm::WORKSPACE_BYTES as u64
        + DRIVER
        + GraphKeys::new(&limits).kernels(spec.layers) as u64 * GRAPH_KERNEL;
    let tables = (spec.layers * spec.modules().len()) as u64 * 4;
    MemoryPlan {
        weights: (spec.parameters() + tied) * BF16,
        workspace,
        slot: CudaSlots::slot_elements(spec, max_rank) as u64 * BF16 + tables,
        slots: gpu_loras as u64,
        kv_block: spec.kv_bytes_per_token(Dtype::Bf16) * limits.block_size as u64,
        kv_blocks: limits.kv_blocks as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;

    #[test]
    fn llama_2_7b_with_128_slots_leaves_room_for_the_peers_cache() {
        let limits = BatchLimits {
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            max_model_len: 4352,
            block_size: 16,
            kv_blocks: 0,
        };
        let spec = preset("meta-llama/Llama-2-7b-hf").unwrap();
        let plan = plan(&spec, &limits, 16, 128);
        assert_eq!(plan.weights, 13_476_831_232);
        assert_eq!(plan.slot, 79_953_920 + 32 * 7 * 4);
        assert_eq!(plan.kv_block, 16 * 524_288);
        // vLLM keeps 98,560 tokens beside 128 adapters under 0.9 of an 80 GB card.
        let left = 0.9 * 85.0e9 - plan.total() as f64;
        assert!(left > 90_000.0 * 524_288.0, "{left}");
    }

    #[test]
    fn the_simulator_has_the_blocks_that_the_engine_has() {
        let mut profile = crate::profile::Profile::named("h100-llama2-7b").unwrap();
        let memory = profile.engine.memory_bytes.unwrap();
        let spec = preset("meta-llama/Llama-2-7b-hf").unwrap();
        let plan = |max_num_seqs, slots| {
            let limits = BatchLimits {
                max_num_seqs,
                max_num_batched_tokens: 4096,
                max_model_len: 4352,
                block_size: 16,
                kv_blocks: 0,
            };
            plan(&spec, &limits, 16, slots)
        };
        let blocks = |plan: MemoryPlan| plan.kv_blocks_in(memory - plan.total());
        // As calibrated with 128 sequences.
        (profile.engine.weights_bytes, profile.engine.workspace_bytes) =
            (plan(128, 1).weights, plan(128, 1).workspace);
        for slots in [2, 16, 128] {
            let simulated = profile.kv_blocks(slots, 16, 16, 4352, None).unwrap() as u64;
            assert!(blocks(plan(128, slots)).abs_diff(simulated) <= 1, "{slots} slots");
        }
        // Fewer sequences have fewer graphs: the same profile gives them a little less than the engine has.
        let (few, many) = (blocks(plan(16, 32)), blocks(plan(128, 32)));
        assert!(many <= few && few - many < 100, "{few} and {many}");
    }
}
