//! Times steps of chosen compositions on an executor.

#[cfg(test)]
mod checked;
mod mixtures;
mod survey;

use lora_sched::{AdapterId, Config, PlaceId, RequestId, SeqStep, SlotId, StepPlan};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::engine::executor::{Completion, Executor, ExecutorError, Sampling, StepFeed};
use crate::profile::{History, StepShape};
pub use survey::Survey;

/// One timed step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepSample {
    /// Its composition.
    pub shape: StepShape,
    /// From submission to result, as the host sees it.
    pub ns: u64,
}

/// What the executor was made with, as far as steps are concerned.
#[derive(Clone, Debug)]
pub struct StepLimits {
    /// Places.
    pub max_num_seqs: usize,
    /// Tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Tokens in a sequence.
    pub max_model_len: usize,
    /// Tokens in a KV block.
    pub block_size: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Vocabulary.
    pub vocab_size: usize,
    /// Rank of the adapter in each slot; adapter `i` is in slot `i`.
    pub ranks: Vec<u32>,
}

impl StepLimits {
    /// Those of an executor for `config` whose first `adapters` slots are used.
    pub fn new(config: &Config, vocab_size: usize, adapters: usize) -> Self {
        Self {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: config.max_model_len,
            block_size: config.block_size,
            kv_blocks: config.kv_blocks,
            vocab_size,
            ranks: config.adapters[..adapters].iter().map(|a| a.rank).collect(),
        }
    }
}

/// One sequence's part in a step to be timed.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// The first `n` tokens, or the next.
    Prefill { place: u32, tokens: u32, fresh: bool },
    /// The next token.
    Decode { place: u32 },
}

#[derive(Clone, Debug, Default)]
struct Place {
    tokens: u32,
    /// Tokens whose keys and values it has had since it began: `tokens` may be set back under it.
    filled: u32,
    blocks: Vec<u32>,
    slot: Option<u32>,
}

/// Runs steps on an executor and keeps their books as a scheduler would.
pub struct StepBench<'a> {
    executor: &'a mut dyn Executor,
    limits: StepLimits,
    places: Vec<Place>,
    free: Vec<u32>,
    plan: StepPlan,
    feed: StepFeed,
    history: History,
    steps: u64,
    rng: ChaCha8Rng,
}

impl<'a> StepBench<'a> {
    /// A bench on an executor with nothing in flight and adapter `i` in slot `i`.
    pub fn new(executor: &'a mut dyn Executor, limits: StepLimits, rng: ChaCha8Rng) -> Self {
        Self {
            executor,
            places: vec![Place::default(); limits.max_num_seqs],
            free: (0..limits.kv_blocks as u32).rev().collect(),
            limits,
            plan: StepPlan::default(),
            feed: StepFeed::default(),
            history: History::default(),
            steps: 0,
            rng,
        }
    }

    /// The executor, for what is timed beside steps.
    pub fn executor(&mut self) -> &mut dyn Executor {
        self.executor
    }

    fn forget(&mut self, place: u32) {
        let p = &mut self.places[place as usize];
        self.free.append(&mut p.blocks);
        (p.tokens, p.filled) = (0, 0);
    }

    /// Puts a step together; false if blocks or lengths do not allow it: then its places begin anew.
    fn form(&mut self, parts: &[Part]) -> bool {
        let formed = self.try_form(parts);
        if !formed {
            for part in parts {
                let (Part::Decode { place } | Part::Prefill { place, .. }) = *part;
                self.forget(place);
            }
        }
        formed
    }

    fn try_form(&mut self, parts: &[Part]) -> bool {
        self.plan.clear();
        self.plan.step = self.steps;
        // Decodes stand first, as in the scheduler's plans.
        for wanted_decode in [true, false] {
            for part in parts {
                let (place, tokens, decode) = match *part {
                    Part::Decode { place } => (place, 1, true),
                    Part::Prefill { place, tokens, fresh } => {
                        if fresh {
                            self.forget(place);
                        }
                        (place, tokens, false)
                    }
                };
                if decode != wanted_decode {
                    continue;
                }
                let limits = &self.limits;
                let p = &mut self.places[place as usize];
                let start = p.tokens;
                let end = (start + tokens) as usize;
                if (decode && start == 0) || end > limits.max_model_len {
                    return false;
                }
                let missing = end.div_ceil(limits.block_size).saturating_sub(p.blocks.len());
                if missing > self.free.len() {
                    return false;
                }
                let from = self.plan.blocks.len() as u32;
                for _ in 0..missing {
                    if let Some(block) = self.free.pop() {
                        p.blocks.push(block);
                        self.plan.blocks.push(block);
                    }
                }
                p.tokens = start + tokens;
                p.filled = p.filled.max(p.tokens);
                self.plan.seqs.push(SeqStep {
                    id: RequestId(u64::from(place)),
                    place: PlaceId(place),
                    adapter: p.slot.map(|s| (AdapterId(s), SlotId(s))),
                    start,
                    len: tokens,
                    decode,
                    samples: true,
                    new_blocks: from..self.plan.blocks.len() as u32,
                });
            }
        }
        self.fill_feed();
        !self.plan.seqs.is_empty()
    }

    /// What the planned sequences are fed: any tokens will do, since they cost alike.
    fn fill_feed(&mut self) {
        self.feed.clear();
        let vocab = self.limits.vocab_size as u32;
        for seq in &self.plan.seqs {
            if seq.start == 0 {
                self.feed.begins.push((seq.place, Sampling::default()));
            }
            if !seq.decode {
                let token = |i: u32| (seq.start + i * 7 + seq.place.0) % vocab;
                self.feed.tokens.extend((0..seq.len).map(token));
            }
        }
    }

    /// Runs the step that is formed. `beside` is called for every other completion meanwhile.
    fn run(
        &mut self,
        mut beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<StepSample, ExecutorError> {
        self.steps += 1;
        let ranks = &self.limits.ranks;
        let rank = |adapter: u32| ranks.get(adapter as usize).copied().unwrap_or(0);
        let start = self.executor.clock();
        let shape = StepShape::of(&self.plan, start, rank, &mut self.history);
        self.executor.submit_step(&self.plan, &self.feed)?;
        loop {
            let completion = self.executor.wait()?;
            let now = self.executor.clock();
            if matches!(completion, Completion::Step { .. }) {
                return Ok(StepSample { shape, ns: now - start });
            }
            beside(self.executor, completion)?;
        }
    }

    fn time(&mut self, parts: &[Part]) -> Result<Option<StepSample>, ExecutorError> {
        self.time_beside(parts, |_, _| Ok(()))
    }

    /// None if the step does not fit.
    fn time_beside(
        &mut self,
        parts: &[Part],
        beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<Option<StepSample>, ExecutorError> {
        if !self.form(parts) {
            return Ok(None);
        }
        self.run(beside).map(Some)
    }

    /// A prefill of `tokens` at a free place with the adapter in `slot`, timed; with `beside` told of
    /// completions of other work meanwhile.
    pub fn prefill(
        &mut self,
        tokens: u32,
        slot: Option<u32>,
        beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<Option<StepSample>, ExecutorError> {
        self.places[0].slot = slot;
        self.time_beside(&[Part::Prefill { place: 0, tokens, fresh: true }], beside)
    }

    /// Begins the sequence at `place` anew and brings it to `context` tokens, with the adapter in `slot`;
    /// false if that does not fit.
    pub fn bring_to(&mut self, place: u32, context: u32, slot: Option<u32>) -> Result<bool, ExecutorError> {
        self.places[place as usize].slot = slot;
        let (mut at, most) = (0, self.limits.max_num_batched_tokens as u32);
        while at < context {
            let tokens = most.min(context - at);
            if self.time(&[Part::Prefill { place, tokens, fresh: at == 0 }])?.is_none() {
                return Ok(false);
            }
            at += tokens;
        }
        Ok(true)
    }

    /// One token more of each of the first `seqs` places, timed, with `beside` told of completions of other
    /// work meanwhile; none if that does not fit.
    pub fn decode(
        &mut self,
        seqs: u32,
        beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<Option<StepSample>, ExecutorError> {
        let parts: Vec<Part> = (0..seqs).map(|place| Part::Decode { place }).collect();
        self.time_beside(&parts, beside)
    }

    /// First chunks of `tokens` tokens at the first places, one a slot of `slots`, in one step.
    pub fn prefills(
        &mut self,
        tokens: u32,
        slots: &[Option<u32>],
    ) -> Result<Option<StepSample>, ExecutorError> {
        let mut parts = Vec::with_capacity(slots.len());
        for (place, slot) in (0..).zip(slots) {
            self.places[place as usize].slot = *slot;
            parts.push(Part::Prefill { place, tokens, fresh: true });
        }
        self.time(&parts)
    }
}

fn median_sample(mut samples: Vec<StepSample>) -> Option<StepSample> {
    samples.sort_by_key(|s| s.ns);
    samples.get(samples.len() / 2).copied()
}
