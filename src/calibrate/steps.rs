//! Times steps of chosen compositions on an executor.

use std::time::{Duration, Instant};

use lora_sched::{AdapterId, Config, PlaceId, RequestId, SeqStep, SlotId, StepPlan};
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::engine::executor::{Completion, Executor, ExecutorError, Sampling, StepFeed};
use crate::profile::{SeenSlots, StepShape};

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
    seen: SeenSlots,
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
            seen: SeenSlots::default(),
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
        p.tokens = 0;
    }

    fn random_slot(&mut self) -> Option<u32> {
        let slots = self.limits.ranks.len() as u32;
        (slots > 0 && self.rng.random_bool(0.8)).then(|| self.rng.random_range(0..slots))
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
        self.feed.clear();
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
                if start == 0 {
                    self.feed.begins.push((PlaceId(place), Sampling::default()));
                }
                if !decode {
                    let vocab = limits.vocab_size as u32;
                    self.feed.tokens.extend((0..tokens).map(|i| (start + i * 7 + place) % vocab));
                }
                p.tokens = start + tokens;
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
        !self.plan.seqs.is_empty()
    }

    /// Runs the step that is formed. `beside` is called for every other completion meanwhile.
    fn run(
        &mut self,
        mut beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<StepSample, ExecutorError> {
        self.steps += 1;
        let ranks = &self.limits.ranks;
        let rank = |adapter: u32| ranks.get(adapter as usize).copied().unwrap_or(0);
        let shape = StepShape::of(&self.plan, rank, &mut self.seen);
        let start = self.executor.clock();
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

    /// Times steps for about `time`: first a grid of plain prefills and decodes, then random
    /// mixtures, which are what serving is made of. `progress` is told the share that is done.
    pub fn sample(
        &mut self,
        time: Duration,
        longest: u32,
        mut progress: impl FnMut(f64),
    ) -> Result<Vec<StepSample>, ExecutorError> {
        let begin = Instant::now();
        let mut samples = Vec::new();
        let longest =
            longest.min(self.limits.max_num_batched_tokens as u32).min(self.limits.max_model_len as u32 - 1);
        self.warm_up(longest.min(256))?;
        let mut grid: Vec<u32> = (0..).map(|i| 8u32 << i).take_while(|&n| n < longest).collect();
        grid.extend([1, 2, 4, longest * 3 / 4, longest * 3 / 8, longest]);
        grid.retain(|&n| n > 0);
        for (i, &tokens) in grid.iter().enumerate() {
            for slot in [None, Some(0)] {
                if slot.is_some() && self.limits.ranks.is_empty() {
                    continue;
                }
                let mut times = Vec::new();
                for _ in 0..3 {
                    times.extend(self.prefill(tokens, slot, |_, _| Ok(()))?);
                }
                samples.extend(median_sample(times));
            }
            progress(0.3 * (i + 1) as f64 / grid.len() as f64);
            // A slow machine spends its time on mixtures too.
            if begin.elapsed() > time.mul_f64(0.5) && tokens >= longest / 2 {
                break;
            }
        }
        while begin.elapsed() < time || samples.len() < 40 {
            let parts = self.mixture(longest);
            if parts.iter().all(|p| matches!(p, Part::Decode { .. })) {
                samples.extend(self.decode_run(&parts)?);
            } else {
                samples.extend(self.time(&parts)?);
            }
            let share = begin.elapsed().as_secs_f64() / time.as_secs_f64();
            progress(share.clamp(0.3, 1.0));
        }
        Ok(samples)
    }

    /// Decodes come in runs when an engine serves: all but the first ones find their weights and
    /// their part of the KV cache where the steps before have left them. Gives two samples of the
    /// run's settled part, each the median of four steps.
    fn decode_run(&mut self, parts: &[Part]) -> Result<Vec<StepSample>, ExecutorError> {
        let mut run = Vec::with_capacity(DECODE_RUN);
        for _ in 0..DECODE_RUN {
            run.extend(self.time(parts)?);
        }
        let settled = run.split_off(run.len().min(DECODE_RUN - SETTLED));
        Ok(settled.chunks(SETTLED / 2).filter_map(|c| median_sample(c.to_vec())).collect())
    }

    fn warm_up(&mut self, tokens: u32) -> Result<(), ExecutorError> {
        for place in 0..self.places.len() as u32 {
            self.places[place as usize].slot = self.random_slot();
            self.time(&[Part::Prefill { place, tokens: (tokens / (place + 1)).max(1), fresh: true }])?;
        }
        Ok(())
    }

    /// A random step: some sequences decode, some prompts begin, one goes on where another chunk ended.
    fn mixture(&mut self, longest: u32) -> Vec<Part> {
        let places = self.places.len() as u32;
        let mut order: Vec<u32> = (0..places).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, self.rng.random_range(0..=i));
        }
        // Decodes alone, prefills alone, or both: all three are common.
        let kind = self.rng.random_range(0..4u32);
        let decodes = match kind {
            0 => 0,
            // Small batches are the most common in serving, and the least alike.
            1 if self.rng.random_bool(0.5) => self.rng.random_range(1..=places.min(4)),
            _ => self.rng.random_range(1..=places),
        };
        let prefills = if kind == 1 { 0 } else { self.rng.random_range(1..=4u32) };
        let (mut parts, mut budget) = (Vec::new(), self.limits.max_num_batched_tokens as u32);
        for &place in &order {
            let p = &self.places[place as usize];
            let can_decode = p.tokens > 0 && (p.tokens as usize) < self.limits.max_model_len - 1;
            if (parts.len() as u32) < decodes && can_decode {
                parts.push(Part::Decode { place });
                budget = budget.saturating_sub(1);
            }
        }
        let decoding = parts.len();
        for &place in &order {
            if parts.len() - decoding >= prefills as usize || budget == 0 {
                break;
            }
            if parts.iter().any(|p| matches!(p, Part::Decode { place: d } if *d == place)) {
                continue;
            }
            let top = f64::from(longest.min(budget).max(1)).ln();
            let tokens = self.rng.random_range(0.0..=top.max(0.01)).exp().round() as u32;
            let tokens = tokens.clamp(1, budget);
            let goes_on = self.rng.random_bool(0.15);
            let fits = (self.places[place as usize].tokens + tokens) < self.limits.max_model_len as u32;
            let fresh = !(goes_on && fits && self.places[place as usize].tokens > 0);
            if fresh {
                self.places[place as usize].slot = self.random_slot();
            }
            parts.push(Part::Prefill { place, tokens, fresh });
            budget -= tokens;
        }
        parts
    }
}

/// Steps in a run of decodes, and how many at its end are kept.
const DECODE_RUN: usize = 24;
const SETTLED: usize = 8;

fn median_sample(mut samples: Vec<StepSample>) -> Option<StepSample> {
    samples.sort_by_key(|s| s.ns);
    samples.get(samples.len() / 2).copied()
}
