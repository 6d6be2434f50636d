//! What the loop keeps of a request: its tokens, for a recomputation after preemption, and its stop
//! conditions.

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
    /// Prompt, then output.
    pub(in crate::engine) tokens: Vec<TokenId>,
    pub(in crate::engine) prompt_len: usize,
    pub(in crate::engine) adapter: Option<AdapterId>,
    pub(in crate::engine) received: Nanos,
    pub(in crate::engine) max_tokens: u32,
    /// Without `generated`, which `tokens` knows.
    pub(in crate::engine) sampling: Sampling,
    /// None: that of the request's number, mixed with the engine's.
    pub(in crate::engine) seed: Option<u64>,
    pub(in crate::engine) engine_seed: u64,
    pub(in crate::engine) ignore_eos: bool,
    pub(in crate::engine) stop_token_ids: Vec<TokenId>,
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
            prompt_tokens: self.prompt_len as u32,
            max_tokens: self.max_tokens,
        }
    }

    /// Takes an output token; `true` if it ends the request.
    pub(super) fn push(&mut self, token: TokenId, eos: &[TokenId]) -> bool {
        self.tokens.push(token);
        let generated = self.tokens.len() - self.prompt_len;
        if generated < self.sampling.min_tokens as usize {
            return false;
        }
        (!self.ignore_eos && eos.contains(&token)) || self.stop_token_ids.contains(&token)
    }

    /// Adds what the executor needs of this sequence for its share of a step.
    pub(super) fn feed(&self, seq: &SeqStep, feed: &mut StepFeed) {
        if seq.start == 0 {
            let generated = self.tokens[self.prompt_len..].to_vec();
            let seed = self.seed.unwrap_or_else(|| mix(self.engine_seed, seq.id.0));
            feed.begins.push((seq.place, Sampling { generated, seed, ..self.sampling.clone() }));
        }
        if !seq.decode {
            let start = seq.start as usize;
            feed.tokens.extend_from_slice(&self.tokens[start..start + seq.len as usize]);
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
