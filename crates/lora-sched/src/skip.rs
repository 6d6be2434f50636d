//! Runs of equal steps, taken at once.
//!
//! While every running sequence decodes and nobody can be admitted, each plan is the one before it with
//! every sequence a token further: until a sequence ends, blocks run out, an age bound passes or an
//! event comes. A driver whose clock is its own can skip such steps; the scheduler is then as if each
//! of them had been done and planned.

use crate::meter::Readiness;
use crate::scheduler::Scheduler;
use crate::types::Nanos;

/// Steps like the one in flight that will follow it if no event comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SteadyRun {
    /// How many of them may be skipped, at least 1. The last of a run is left: it ends a sequence, or
    /// must be planned.
    pub steps: u64,
    /// None may be formed after this.
    pub until: Nanos,
}

impl Scheduler {
    /// Whether the step in flight, just formed, begins a run of equal ones.
    pub fn steady(&self) -> Option<SteadyRun> {
        if !self.step.active
            || self.step.preempted
            || self.decodes.len() != self.running.len()
            || self.decodes.cancelled
            || !self.step.loading.is_empty()
            || !self.fresh.is_empty()
            // Whether a whole prompt is kept out by tokens or by blocks may change on the way.
            || (!self.config.chunked_prefill && self.queue.len() > 0)
        {
            return None;
        }
        let mut steps = self.decodes.until_end() - 1;
        if steps > 0 && self.blocks_within(steps) > self.kv.free() as u64 {
            steps = steps.min(self.decodes.until_full() - 1);
        }
        if steps == 0 {
            return None;
        }
        let oldest = self.queue.oldest(Readiness::NeedsSlot).and_then(|(id, _)| self.requests.find(id));
        let until = match oldest.map(|o| self.requests[o].arrived.saturating_add(self.config.max_skip_age)) {
            Some(bound) if self.now() <= bound => bound,
            _ => Nanos::MAX,
        };
        Some(SteadyRun { steps, until })
    }

    /// Blocks that the next `plans` plans would take.
    fn blocks_within(&self, plans: u64) -> u64 {
        let size = self.config.block_size as u64;
        let of = |i| match self.decodes.until_full_of(i) {
            first if first <= plans => 1 + (plans - first) / size,
            _ => 0,
        };
        (0..self.decodes.len()).map(of).sum()
    }

    /// Ends the step in flight and `steps - 1` more, of which the next one is then in flight, formed at
    /// `formed`. `steps` and `formed` keep to what [`Self::steady`] has just said, and no event has
    /// come since.
    pub fn skip(&mut self, steps: u64, formed: Nanos) {
        self.take_blocks(steps);
        self.decodes.pass(steps);
        self.next_step += steps;
        self.clock.advance(formed);
        self.step.formed = formed;
        self.step.swaps_done = formed;
    }

    /// Hands blocks out as the skipped plans would have: plan by plan, in order of admission.
    fn take_blocks(&mut self, plans: u64) {
        loop {
            let next = self.decodes.until_full();
            if next > plans {
                return;
            }
            for i in 0..self.decodes.len() {
                if self.decodes.until_full_of(i) == next {
                    self.give_block(i);
                }
            }
            self.decodes.find_full();
        }
    }
}
