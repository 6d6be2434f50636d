//! What callers ask an engine for, and what comes back.

use std::sync::Arc;

use lora_sched::{AdapterId, EventError, Nanos, Parts};

use super::executor::{TokenId, TokenLogprobs};
use crate::report::record::PartsS;

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The prompt's token ids. Sequences of one prompt share them.
    pub prompt: Arc<[TokenId]>,
    /// The adapter; none is the base model.
    pub adapter: Option<AdapterId>,
    /// How to go on from the prompt.
    pub params: GenerateParams,
    /// When the request reached the server, on the engine's clock; none is now.
    pub received: Option<Nanos>,
}

/// How output is chosen and when it ends, with vLLM's names, meanings and defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// Output tokens, at most.
    pub max_tokens: u32,
    /// Output tokens before which no stop condition holds.
    pub min_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus; 1 keeps all.
    pub top_p: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Seed of the sequence's random stream; none takes one from the engine's seed and the request's number.
    pub seed: Option<u64>,
    /// See [`Sampling`](super::executor::Sampling).
    pub presence_penalty: f32,
    /// See [`Sampling`](super::executor::Sampling).
    pub frequency_penalty: f32,
    /// Whether generation goes on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Texts that end the output, which is cut before them.
    pub stop: Arc<[String]>,
    /// Token ids that end the output.
    pub stop_token_ids: Arc<[TokenId]>,
    /// See [`Sampling`](super::executor::Sampling).
    pub logprobs: Option<u32>,
}

impl Default for GenerateParams {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            ignore_eos: false,
            stop: Arc::default(),
            stop_token_ids: Arc::default(),
            logprobs: None,
        }
    }
}

/// A piece of output: what one step added to a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Text that has become certain; empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// The token; none in a piece that only tells of the end.
    pub token: Option<TokenId>,
    /// With the token, where the request asks for it.
    pub logprobs: Option<Box<TokenLogprobs>>,
    /// With the first token: where the time to it went.
    pub first: Option<FirstToken>,
    /// With the last piece: why it is the last.
    pub finish: Option<Finish>,
    /// With [`Finish::Abort`]: what was wrong, if it was the request's adapter rather than the engine.
    pub failure: Option<String>,
    /// When it was handed to the caller's stream, on the engine's clock.
    pub handed: Nanos,
}

/// When the first token was there, and what came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstToken {
    /// Receipt to the end of the step that made the token, by cause.
    pub parts: Parts,
    /// When the step loop had it, on the engine's clock.
    pub at: Nanos,
    /// When its text was handed to the caller's stream.
    pub handed: Nanos,
}

impl FirstToken {
    /// The whole TTFT in parts, in seconds, for a first token delivered at `delivered`.
    pub fn parts_until(&self, delivered: Nanos) -> PartsS {
        let s = |ns: Nanos| ns as f64 * 1e-9;
        let Parts { front, queue, kv, slot, swap, prefill } = self.parts;
        PartsS {
            front: s(front),
            queue: s(queue),
            kv: s(kv),
            slot: s(slot),
            swap: s(swap),
            prefill: s(prefill),
            deliver: s(delivered.saturating_sub(self.at)),
        }
    }
}

/// Why a sequence is at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// End of sequence, a stop token or a stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// It ended before its end: the engine stopped, or its adapter could not be read
    /// ([`Delta::failure`]).
    Abort,
}

impl Finish {
    /// The name that clients see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// It is impossible, or the queue is full.
    #[error("{0}")]
    Refused(EventError),
    /// A token id outside the model's vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab} ids")]
    NoSuchToken {
        /// The id.
        id: TokenId,
        /// Ids that there are.
        vocab: usize,
    },
    /// Log-probabilities of an engine that computes none.
    #[error("this engine emulates a device and computes no logits, so it has no logprobs: leave them out")]
    NoLogits,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Draining,
    /// The engine has stopped.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

impl SubmitError {
    /// Whether a later attempt may succeed: overload rather than a wrong request.
    pub fn is_overload(&self) -> bool {
        matches!(self, Self::Refused(EventError::QueueFull { .. }) | Self::Draining)
    }
}

/// A whole generated sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, without the prompt.
    pub text: String,
    /// Its token ids; a stop token is among them.
    pub tokens: Vec<TokenId>,
    /// When each token was handed to the caller's stream, on the engine's clock.
    pub handed: Vec<Nanos>,
    /// Why it ended.
    pub finish: Finish,
    /// See [`Delta::failure`].
    pub failure: Option<String>,
    /// When the first token was there; none if it ended before.
    pub first: Option<FirstToken>,
    /// When the request was received, on the engine's clock.
    pub received: Nanos,
    /// When the last piece was taken by the caller.
    pub ended: Nanos,
}
