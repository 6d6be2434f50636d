//! What a step's cost depends on.

use lora_sched::StepPlan;
use serde::{Deserialize, Serialize};

use super::feature::PADDED_TO;

/// A step's composition in integers, so that sums come out the same in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepShape {
    /// Tokens in the step: rows of its matrix products.
    pub tokens: u64,
    /// Sequences with more than their last sampled token to compute.
    pub prefills: u64,
    /// Σ over prefill tokens of the positions that each attends to.
    pub prefill_pairs: u64,
    /// The most positions that a prefill attends to: few long prompts are bound by the longest, not by
    /// the sum.
    #[serde(default)]
    pub prefill_span: u64,
    /// Sequences whose input is their last sampled token.
    pub decodes: u64,
    /// Σ over decodes of the positions that each attends to.
    pub decode_context: u64,
    /// Rows of the vocabulary projection.
    pub samples: u64,
    /// Distinct adapters.
    pub adapters: u64,
    /// Σ over those of their rank.
    #[serde(default)]
    pub adapter_ranks: u64,
    /// Tokens of sequences that have an adapter.
    pub lora_tokens: u64,
    /// Σ over those tokens of their adapter's rank.
    pub lora_token_ranks: u64,
}

impl StepShape {
    pub(super) const ONE: usize = 0;
    pub(super) const TOKENS: usize = 1;
    pub(super) const PREFILLS: usize = 2;
    pub(super) const PREFILL_PAIRS: usize = 3;
    pub(super) const DECODES: usize = 4;
    pub(super) const DECODE_CONTEXT: usize = 5;
    pub(super) const SAMPLES: usize = 6;
    pub(super) const ADAPTERS: usize = 7;
    pub(super) const LORA_TOKENS: usize = 8;
    pub(super) const LORA_TOKEN_RANKS: usize = 9;
    pub(super) const PADDED_TOKENS: usize = 10;
    pub(super) const MIXED: usize = 11;
    pub(super) const LORA: usize = 12;
    pub(super) const MIXED_LORA: usize = 13;
    pub(super) const PREFILL_SPAN: usize = 14;
    pub(super) const ADAPTER_RANKS: usize = 15;
    pub(super) const ROWS: usize = 16;

    /// One, the counts, and what follows from them, in the order of the constants above.
    pub(super) fn counts(&self) -> [u64; 17] {
        let (mixed, lora) = (u64::from(self.prefills > 0), u64::from(self.adapters > 0));
        [
            1,
            self.tokens,
            self.prefills,
            self.prefill_pairs,
            self.decodes,
            self.decode_context,
            self.samples,
            self.adapters,
            self.lora_tokens,
            self.lora_token_ranks,
            self.tokens.next_multiple_of(PADDED_TO) * mixed,
            mixed,
            lora,
            mixed * lora,
            self.prefill_span,
            self.adapter_ranks,
            rounded_rows(self.tokens as usize) as u64,
        ]
    }

    /// The shape of a plan. `rank` gives an adapter's rank.
    pub fn of(plan: &StepPlan, rank: impl Fn(u32) -> u32, seen: &mut SeenSlots) -> Self {
        let mut shape = Self::default();
        seen.plan += 1;
        for seq in &plan.seqs {
            let (start, len) = (u64::from(seq.start), u64::from(seq.len));
            shape.tokens += len;
            shape.samples += u64::from(seq.samples);
            if seq.decode {
                shape.decodes += 1;
                shape.decode_context += start + 1;
            } else {
                shape.prefills += 1;
                shape.prefill_pairs += len * start + len * (len + 1) / 2;
                shape.prefill_span = shape.prefill_span.max(start + len);
            }
            if let Some((adapter, slot)) = seq.adapter {
                let (first, rank) = (u64::from(seen.first(slot.0 as usize)), u64::from(rank(adapter.0)));
                shape.adapters += first;
                shape.adapter_ranks += first * rank;
                shape.lora_tokens += len;
                shape.lora_token_ranks += len * rank;
            }
        }
        shape
    }
}

/// Rows that the GPU engine computes for a step of `rows`, so that shapes are a finite set.
#[inline]
pub fn rounded_rows(rows: usize) -> usize {
    match rows {
        0..=1 => 1,
        2 => 2,
        3..=4 => 4,
        5..=64 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(64),
    }
}

/// Scratch: in which plan each slot was last met.
#[derive(Clone, Debug, Default)]
pub struct SeenSlots {
    plan: u64,
    met: Vec<u64>,
}

impl SeenSlots {
    /// Whether the slot is met for the first time in this plan.
    fn first(&mut self, slot: usize) -> bool {
        if self.met.len() <= slot {
            self.met.resize(slot + 1, 0);
        }
        std::mem::replace(&mut self.met[slot], self.plan) != self.plan
    }
}
