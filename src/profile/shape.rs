//! What a step's cost depends on.

use lora_sched::{Nanos, StepPlan};
use serde::{Deserialize, Serialize};

use super::CostModel;
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
    /// In a step with prefills: tokens a second of such steps, of late ([`History`]), in hundreds.
    #[serde(default)]
    pub recent: u64,
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
    pub(super) const LORA_ROWS: usize = 17;
    pub(super) const LORA_BOTH: usize = 18;
    pub(super) const RECENT: usize = 19;

    /// One, the counts, and what follows from them, in the order of the constants above.
    pub(super) fn counts(&self) -> [u64; 20] {
        let (mixed, lora) = (u64::from(self.prefills > 0), u64::from(self.adapters > 0));
        let rows = rounded_rows(self.tokens as usize) as u64;
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
            rows,
            rows * lora,
            mixed * lora * u64::from(self.decodes > 0),
            self.recent,
        ]
    }

    /// The shape of a plan that is begun at `now`, after those that `history` was told of. `rank` gives an adapter's
    /// rank.
    pub fn of(plan: &StepPlan, now: Nanos, rank: impl Fn(u32) -> u32, history: &mut History) -> Self {
        let mut shape = Self::default();
        history.plan += 1;
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
                let rank = u64::from(rank(adapter.0));
                if plan.outline.is_none() && history.first(slot.0 as usize) {
                    shape.adapters += 1;
                    shape.adapter_ranks += rank;
                }
                shape.lora_tokens += len;
                shape.lora_token_ranks += len * rank;
            }
        }
        if let Some(outline) = &plan.outline {
            shape.tokens += outline.decodes;
            shape.samples += outline.decodes;
            shape.decodes = outline.decodes;
            shape.decode_context = outline.decode_context;
            shape.adapters = outline.adapters;
            shape.adapter_ranks = outline.adapter_ranks;
            shape.lora_tokens += outline.lora_decodes;
            shape.lora_token_ranks += outline.lora_decode_ranks;
        }
        if shape.prefills > 0 && !history.unasked {
            shape.recent = history.rate(now, shape.tokens);
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

/// What a step's cost depends on that is not in its plan.
///
/// A device that computes much draws more power than it may for long, and lowers its clock within tens of
/// milliseconds: a prefill takes some percent longer right after others. What is kept is the rate of tokens in steps
/// with prefills, averaged with a memory that fades with 40 ms (a filter of first order, solved backwards at the
/// beginning of each such step: with only sums, products and quotients, so that it is the same on every machine).
#[derive(Clone, Debug, Default)]
pub struct History {
    plan: u64,
    /// In which plan each slot was last met.
    met: Vec<u64>,
    /// Tokens a nanosecond.
    rate: f64,
    /// When the last step with prefills began, and its tokens.
    last: Option<(Nanos, u64)>,
    /// Whether nobody asks for the rate.
    unasked: bool,
}

/// How fast [`History`] forgets. Of 20 to 1000 ms, what explains an H100's steps best.
const FADES: f64 = 40e6;

impl History {
    /// For the steps of one cost model: what it does not look at is not kept.
    pub fn of(cost: &CostModel) -> Self {
        Self { unasked: !cost.looks_back(), ..Self::default() }
    }

    /// The rate before a step of `tokens` tokens with prefills that begins at `now`, in hundreds a second.
    fn rate(&mut self, now: Nanos, tokens: u64) -> u64 {
        if let Some((begun, of_last)) = self.last.replace((now, tokens)) {
            let passed = now.saturating_sub(begun) as f64;
            self.rate = (self.rate * FADES + of_last as f64) / (FADES + passed);
        }
        (self.rate * 1e7) as u64
    }

    /// Whether the slot is met for the first time in this plan.
    fn first(&mut self, slot: usize) -> bool {
        if self.met.len() <= slot {
            self.met.resize(slot + 1, 0);
        }
        std::mem::replace(&mut self.met[slot], self.plan) != self.plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recent_rate_nears_a_steady_one_and_fades() {
        let mut history = History::default();
        // 1000 tokens every 25 ms are 40,000 a second.
        let rates: Vec<u64> = (0..20).map(|i| history.rate(i * 25_000_000, 1000)).collect();
        assert_eq!(rates[0], 0);
        assert!(rates.is_sorted() && rates[1] > 100 && (395..=400).contains(&rates[19]), "{rates:?}");
        let after = |pause: Nanos| history.clone().rate(19 * 25_000_000 + pause, 1000);
        assert!(after(100_000_000) < rates[19] / 2 && after(10_000_000_000) < 5);
    }
}
