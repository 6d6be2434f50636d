//! Steps of common shapes, run on an executor before it serves.

use std::time::{Duration, Instant};

use lora_sched::{AdapterId, Config, PlaceId, RequestId, SeqStep, SlotId, StepPlan};

use super::executor::{Executor, ExecutorError, Sampling, StepFeed, TokenId};

/// Prompt lengths to try, as far as the configuration allows.
const PROMPTS: &[usize] = &[8, 64, 256, 1024];
/// Larger shapes are left out once this much has been spent: a slow machine starts too.
const ENOUGH: Duration = Duration::from_secs(2);

/// Prompts of rising length at place 0, then all places at once: their prompts, and a few decodes.
/// Adapters `0..gpu_loras` must be in their slots. What the executor holds of the sequences afterwards is
/// forgotten when real ones begin.
pub(super) fn run(executor: &mut dyn Executor, config: &Config, vocab: usize) -> Result<(), ExecutorError> {
    let begun = Instant::now();
    let mut steps = Steps { executor, config, vocab, plan: StepPlan::default(), feed: StepFeed::default() };
    let longest = config.max_num_batched_tokens.min(config.max_model_len);
    for &len in PROMPTS.iter().filter(|&&len| len <= longest) {
        steps.prompts(1, len)?;
        if begun.elapsed() > ENOUGH {
            return Ok(());
        }
    }
    let len = 4.min(config.max_model_len - 1).min(config.max_num_batched_tokens / config.max_num_seqs);
    if len == 0 || config.kv_blocks < config.max_num_seqs {
        return Ok(());
    }
    steps.prompts(config.max_num_seqs, len)?;
    for decoded in 0..(config.block_size - len % config.block_size).min(3) {
        steps.decodes(len + decoded)?;
    }
    Ok(())
}

struct Steps<'a> {
    executor: &'a mut dyn Executor,
    config: &'a Config,
    vocab: usize,
    plan: StepPlan,
    feed: StepFeed,
}

impl Steps<'_> {
    fn seq(&self, place: usize, start: usize, len: usize, new_blocks: std::ops::Range<u32>) -> SeqStep {
        let slots = self.config.gpu_loras;
        let adapter = (slots > 0).then(|| {
            let slot = (place % slots) as u32;
            (AdapterId(slot), SlotId(slot))
        });
        SeqStep {
            id: RequestId(place as u64),
            place: PlaceId(place as u32),
            adapter,
            start: start as u32,
            len: len as u32,
            decode: start > 0,
            samples: true,
            new_blocks,
        }
    }

    /// `count` prompts of `len` tokens in one step.
    fn prompts(&mut self, count: usize, len: usize) -> Result<(), ExecutorError> {
        self.plan.clear();
        self.feed.clear();
        let blocks = self.config.blocks_for(len) as u32;
        for place in 0..count {
            let first = place as u32 * blocks;
            self.plan.blocks.extend(first..first + blocks);
            let seq = self.seq(place, 0, len, first..first + blocks);
            self.plan.seqs.push(seq);
            self.feed.begins.push((PlaceId(place as u32), Sampling::default()));
            self.feed.tokens.extend((0..len).map(|i| (i % self.vocab) as TokenId));
        }
        self.step()
    }

    /// One more token of every place, at position `at`.
    fn decodes(&mut self, at: usize) -> Result<(), ExecutorError> {
        self.plan.clear();
        self.feed.clear();
        for place in 0..self.config.max_num_seqs {
            let seq = self.seq(place, at, 1, 0..0);
            self.plan.seqs.push(seq);
        }
        self.step()
    }

    fn step(&mut self) -> Result<(), ExecutorError> {
        self.executor.submit_step(&self.plan, &self.feed)?;
        self.executor.wait().map(drop)
    }
}
