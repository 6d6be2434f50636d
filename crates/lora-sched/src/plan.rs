//! What the scheduler asks an executor to do.

use std::ops::Range;

use crate::types::{AdapterId, Nanos, PlaceId, RequestId, SlotId};

/// One forward pass over a batch. The driver owns it and hands the same one in each time, so that
/// planning allocates nothing once the buffers have grown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Steps are numbered from 0.
    pub step: u64,
    /// When it was formed.
    pub formed: Nanos,
    /// The sequences, decodes first, each part in admission order; in an outline without the decodes.
    pub seqs: Vec<SeqStep>,
    /// KV blocks given to sequences by this plan; each [`SeqStep::new_blocks`] is a range of it. In an outline
    /// there are none.
    pub blocks: Vec<u32>,
    /// Slots that the step reads and that are still loading when it is formed. `blocking`: the
    /// driver submits the step when all of them are done. `layered`: layer `k` of the step waits
    /// for layer `k` of each. `overlap`: always empty.
    pub loading: Vec<SlotId>,
    /// Whether `loading` must be done before the step may be submitted.
    pub wait_for_swaps: bool,
    /// In an outline: the decodes, and the adapters of all sequences, in sums.
    pub outline: Option<Outline>,
}

/// What a plan says of sequences that it does not name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// Sequences whose input is their last sampled token; each samples another.
    pub decodes: u64,
    /// Σ over decodes of the positions that each attends to.
    pub decode_context: u64,
    /// Decodes with an adapter.
    pub lora_decodes: u64,
    /// Σ over those of their adapter's rank.
    pub lora_decode_ranks: u64,
    /// Distinct adapters in the step, those of prompts included.
    pub adapters: u64,
    /// Σ over those of their rank.
    pub adapter_ranks: u64,
}

impl StepPlan {
    /// An empty plan in outline: for drivers that only want to know what a step costs. Nobody looks at the decoding
    /// sequences one by one then, so that a step costs next to nothing to plan.
    pub fn outlined() -> Self {
        Self { outline: Some(Outline::default()), ..Self::default() }
    }

    /// Empties it and keeps its memory, and whether it is an outline.
    pub fn clear(&mut self) {
        self.seqs.clear();
        self.blocks.clear();
        self.loading.clear();
        self.wait_for_swaps = false;
        self.outline = self.outline.map(|_| Outline::default());
    }

    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        let unnamed = self.outline.map_or(0, |outline| outline.decodes as usize);
        unnamed + self.seqs.iter().map(|s| s.len as usize).sum::<usize>()
    }

    /// The blocks that `seq` is given by this plan.
    pub fn new_blocks(&self, seq: &SeqStep) -> &[u32] {
        &self.blocks[seq.new_blocks.start as usize..seq.new_blocks.end as usize]
    }
}

/// One sequence's share of a step: tokens `start..start + len` of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqStep {
    /// The request.
    pub id: RequestId,
    /// Where the executor keeps the sequence. A place with `start == 0` begins anew: the executor
    /// forgets what it held there.
    pub place: PlaceId,
    /// The adapter and its slot; none for the base model.
    pub adapter: Option<(AdapterId, SlotId)>,
    /// Tokens of the sequence that are in the KV cache already.
    pub start: u32,
    /// Tokens to compute, at least 1.
    pub len: u32,
    /// Whether the input is the sequence's last sampled token (then `len` is 1), which the executor
    /// has, rather than tokens that the driver feeds.
    pub decode: bool,
    /// Whether the step samples a token after the last of these tokens.
    pub samples: bool,
    /// Range in [`StepPlan::blocks`] of blocks appended to the sequence's block table.
    pub new_blocks: Range<u32>,
}

/// Why an adapter is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SwapKind {
    /// A request that could start waits for it.
    Demand,
    /// A request further back may want it.
    Prefetch,
}

/// One adapter to copy from host memory into one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapPlan {
    /// The adapter.
    pub adapter: AdapterId,
    /// Where to. No submitted step reads it.
    pub slot: SlotId,
    /// The adapter that the slot held.
    pub evicted: Option<AdapterId>,
    /// Bytes to copy.
    pub bytes: u64,
    /// Demand goes before prefetch.
    pub kind: SwapKind,
}

/// One adapter to read from disk into host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchPlan {
    /// The adapter.
    pub adapter: AdapterId,
    /// The adapter whose place in host memory it takes: nothing is copied from there.
    pub evicted: Option<AdapterId>,
    /// Bytes to read.
    pub bytes: u64,
}
