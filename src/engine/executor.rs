//! The boundary between the step loop and a device.
//!
//! An executor takes plans and gives completions; it never blocks the caller in `submit_*`. The
//! CPU executor, the CUDA executor and the emulated one stand behind this trait, and nothing above it
//! knows which is there.

use std::sync::Arc;

use lora_sched::{AdapterId, Nanos, PlaceId, SlotId, StepPlan, SwapPlan};

/// A token id of the model's vocabulary.
pub type TokenId = u32;

/// What a step needs besides its plan. The driver owns it and reuses it.
#[derive(Clone, Debug, Default)]
pub struct StepFeed {
    /// Input ids of the plan's sequences that are not decodes, concatenated in plan order:
    /// `seq.len` ids for each.
    pub tokens: Vec<TokenId>,
    /// Sequences that begin in this step (`start == 0`) with how to sample them.
    pub begins: Vec<(PlaceId, Sampling)>,
}

impl StepFeed {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.begins.clear();
    }
}

/// How one sequence's tokens are chosen, with vLLM's names and meanings.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of likeliest tokens with at least this probability. 1 keeps all.
    pub top_p: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Seed of the sequence's own random stream.
    pub seed: u64,
    /// Taken from the logit of every token that the output has already.
    pub presence_penalty: f32,
    /// Taken from a token's logit once for each time that the output has it.
    pub frequency_penalty: f32,
    /// Tokens already in the output when the sequence begins (it was preempted): they count for
    /// the penalties, and the random stream goes on after them.
    pub generated: Vec<TokenId>,
    /// Ids not to be sampled while the output is shorter than `min_tokens` (the end of sequence).
    pub banned_before_min: Vec<TokenId>,
    /// See `banned_before_min`.
    pub min_tokens: u32,
    /// With each token its log-probability and those of so many of the likeliest; none tells nothing.
    pub logprobs: Option<u32>,
}

/// What the model thought of a token, and of others in its place: the natural logarithms of the softmax over the
/// logits as they came from the model, before temperature, penalties and bans.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The token's own.
    pub chosen: f32,
    /// The likeliest tokens, the likeliest first; of equals the lower id.
    pub top: Vec<(TokenId, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            generated: Vec::new(),
            banned_before_min: Vec::new(),
            min_tokens: 0,
            logprobs: None,
        }
    }
}

/// A step or a swap that has ended. Times are on the executor's clock ([`Executor::clock`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The submitted step. Its tokens are read with [`Executor::step_result`].
    Step {
        /// The plan's number.
        step: u64,
        /// When its work began on the device.
        started: Nanos,
        /// When its tokens were there.
        ended: Nanos,
    },
    /// One swap.
    Swap {
        /// Where it went.
        slot: SlotId,
        /// What was copied.
        adapter: AdapterId,
        /// When its first byte moved.
        started: Nanos,
        /// When its last byte had.
        ended: Nanos,
    },
}

/// What a step made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// One for each sequence of the plan: the sampled token, or none where the step does not sample.
    pub tokens: Vec<Option<TokenId>>,
    /// Of sequences that ask for them, by their number in the plan, in no order.
    pub logprobs: Vec<(u32, Box<TokenLogprobs>)>,
    /// How long the step waited for layers of the adapter in each slot.
    pub stalled: Vec<(SlotId, Nanos)>,
}

/// A device failure. The engine stops: nothing that is on the device can be trusted after it.
#[derive(Debug, thiserror::Error)]
#[error("{device} executor: {message}")]
pub struct ExecutorError {
    /// Which executor.
    pub device: &'static str,
    /// What it could not do.
    pub message: String,
}

/// Called from any thread when a completion is there to be polled.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A device that runs steps and swaps.
///
/// One step at a time may be in flight, and any number of swaps beside it. A swap's bytes are
/// written only after every step submitted earlier that reads the slot has ended; the scheduler's
/// plans guarantee that and the executor may assert it. In a step whose plan lists `loading` slots
/// (and does not wait for swaps), layer `k` waits for layer `k` of each of them.
pub trait Executor: Send {
    /// Starts a step.
    fn submit_step(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), ExecutorError>;

    /// Says that the swaps to be submitted next were decided at once, and apart from earlier ones.
    fn plan_swaps(&mut self) {}

    /// Starts a swap.
    fn submit_swap(&mut self, swap: &SwapPlan) -> Result<(), ExecutorError>;

    /// The next completion, if there is one.
    fn poll(&mut self) -> Result<Option<Completion>, ExecutorError>;

    /// The next completion; blocks until there is one. An error if nothing is in flight.
    fn wait(&mut self) -> Result<Completion, ExecutorError>;

    /// The last completed step's tokens, valid until the next `submit_step`.
    fn step_result(&self) -> &StepResult;

    /// Whether a completion is worth looking for without sleeping until it is there.
    fn is_watched(&self) -> bool {
        false
    }

    /// Registers who is told of completions.
    fn set_waker(&mut self, waker: Waker);

    /// Nanoseconds on the executor's clock now; every completion is on it.
    fn clock(&self) -> Nanos;

    /// Whether its tokens come from logits, so that it can tell [`TokenLogprobs`].
    fn has_logits(&self) -> bool {
        true
    }

    /// Copies `adapters[i]` into slot `i` before serving starts, and waits for it.
    fn preload(&mut self, adapters: &[AdapterId]) -> Result<(), ExecutorError>;
}
