//! What the loop keeps of a request: its tokens, for a recomputation after preemption, and its stop
//! conditions.

use std::sync::Arc;

use lora_sched::{AdapterId, Arrival, Nanos, RequestId, SeqStep};

use crate::engine::executor::{Sampling, StepFeed, TokenId};
use crate::engine::output::OutState;

/// A request on its way into the loop.
pub(in crate::engine) struct Submission {
    pub(in crate::engine) active: Active,
    pub(in crate::engine) out: Box<OutState>,
}

/// A waiting or running request.
pub(in crate::engine) struct Active {
    /// Shared by the sequences that go on from it.
    pub(in crate::engine) prompt: Arc<[TokenId]>,
    pub(in crate::engine) output: Vec<TokenId>,
    pub(in crate::engine) adapter: Option<AdapterId>,
    pub(in crate::engine) received: Nanos,
    pub(in crate::engine) max_tokens: u32,
    /// Without `generated`, which is `output`.
    pub(in crate::engine) sampling: Sampling,
    /// None: that of the request's number, mixed with the engine's.
    pub(in crate::engine) seed: Option<u64>,
    pub(in crate::engine) engine_seed: u64,
    pub(in crate::engine) ignore_eos: bool,
    pub(in crate::engine) stop_token_ids: Arc<[TokenId]>,
    pub(in crate::engine) cancelled: bool,
    /// Whether that was for a stop string, which was the answer's end.
    pub(in crate::engine) stop_found: bool,
}

impl Active {
    /// The request as the scheduler takes it at `t`.
    pub(super) fn arrival(&self, id: RequestId, t: Nanos) -> Arrival {
        Arrival {
            id,
            adapter: self.adapter,
            received: self.received.min(t),
            prompt_tokens: self.prompt.len() as u32,
            max_tokens: self.max_tokens,
        }
    }

    /// Takes an output token; `true` if it ends the request.
    pub(super) fn push(&mut self, token: TokenId, eos: &[TokenId]) -> bool {
        self.output.push(token);
        if self.output.len() < self.sampling.min_tokens as usize {
            return false;
        }
        (!self.ignore_eos && eos.contains(&token)) || self.stop_token_ids.contains(&token)
    }

    /// Adds what the executor needs of this sequence for its share of a step.
    pub(super) fn feed(&self, seq: &SeqStep, feed: &mut StepFeed) {
        if seq.start == 0 {
            let generated = self.output.clone();
            let seed = self.seed.unwrap_or_else(|| mix(self.engine_seed, seq.id.0));
            feed.begins.push((seq.place, Sampling { generated, seed, ..self.sampling.clone() }));
        }
        if !seq.decode {
            // After a preemption its own output is prefilled behind the prompt.
            let (start, prompt) = (seq.start as usize, self.prompt.len());
            let end = start + seq.len as usize;
            feed.tokens.extend_from_slice(&self.prompt[start.min(prompt)..end.min(prompt)]);
            let of_output = start.saturating_sub(prompt)..end.saturating_sub(prompt);
            feed.tokens.extend_from_slice(&self.output[of_output]);
        }
    }
}

/// One stream a request from the engine's seed (SplitMix64's finaliser over both).
fn mix(seed: u64, id: u64) -> u64 {
    let mut z = seed ^ id.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use lora_sched::PlaceId;

    use super::*;

    #[test]
    fn a_prefill_takes_its_tokens_from_the_prompt_and_then_from_the_output() {
        let active = Active {
            prompt: [1, 2, 3].into(),
            output: vec![4, 5],
            adapter: None,
            received: 0,
            max_tokens: 9,
            sampling: Sampling::default(),
            seed: None,
            engine_seed: 1,
            ignore_eos: true,
            stop_token_ids: Arc::default(),
            cancelled: false,
            stop_found: false,
        };
        for (start, len) in [(0, 5), (0, 2), (2, 1), (1, 3), (3, 2), (4, 1), (5, 0)] {
            let mut feed = StepFeed::default();
            let seq = SeqStep {
                id: RequestId(0),
                place: PlaceId(0),
                adapter: None,
                start,
                len,
                decode: false,
                samples: false,
                new_blocks: 0..0,
            };
            active.feed(&seq, &mut feed);
            let expected: Vec<_> = (start + 1..=start + len).collect();
            assert_eq!(feed.tokens, expected, "{start} {len}");
            assert!(feed.begins.iter().all(|(_, how)| how.generated == [4, 5]));
        }
    }
}
