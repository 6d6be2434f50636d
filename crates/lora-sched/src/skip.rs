//! Runs of equal steps, taken at once.
//!
//! While every running sequence decodes and nobody can be admitted, each plan is the one before it with
//! every sequence a token further: until a sequence ends, blocks run out, an age bound passes or an
//! event comes. A driver whose clock is its own can skip such steps; the scheduler is then as if each
//! of them had been done and planned. Costs O(running sequences) for any number of steps.

use crate::meter::Readiness;
use crate::requests::Phase;
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
            || self.step.seqs.len() != self.running.len()
            || !self.step.loading.is_empty()
            || !self.fresh.is_empty()
            // Whether a whole prompt is kept out by tokens or by blocks may change on the way.
            || (!self.config.chunked_prefill && self.queue.len() > 0)
        {
            return None;
        }
        let mut steps = u64::MAX;
        // The latest first: if any is not past its prompt, it is among them.
        for &index in self.running.iter().rev() {
            let request = &self.requests[index];
            let Phase::Running { cancelled: false, .. } = request.phase else { return None };
            if request.computed < request.fed {
                return None;
            }
            steps = steps.min(u64::from(request.max_tokens - request.generated) - 1);
        }
        if steps > 0 && self.blocks_within(steps) > self.kv.free() as u64 {
            steps = steps.min(self.running.iter().map(|&r| self.next_block(r)).min()? - 1);
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

    /// Plans from now on until a decoding request needs a block: the first is 1.
    fn next_block(&self, index: u32) -> u64 {
        let request = &self.requests[index];
        u64::from(request.capacity - request.computed)
    }

    /// Blocks that the next `plans` plans would take.
    fn blocks_within(&self, plans: u64) -> u64 {
        let size = self.config.block_size as u64;
        let of = |&index: &u32| match self.next_block(index) {
            first if first <= plans => 1 + (plans - first) / size,
            _ => 0,
        };
        self.running.iter().map(of).sum()
    }

    /// Ends the step in flight and `steps - 1` more, of which the next one is then in flight, formed at
    /// `formed`. `steps` and `formed` keep to what [`Self::steady`] has just said, and no event has
    /// come since.
    pub fn skip(&mut self, steps: u64, formed: Nanos) {
        self.take_blocks(steps);
        for i in 0..self.running.len() {
            let request = &mut self.requests[self.running[i]];
            request.computed += steps as u32;
            request.generated += steps as u32;
        }
        self.next_step += steps;
        self.clock.advance(formed);
        self.step.formed = formed;
        self.step.swaps_done = formed;
    }

    /// Hands blocks out as the skipped plans would have: plan by plan, in order of admission.
    fn take_blocks(&mut self, plans: u64) {
        loop {
            let Some(next) = self.running.iter().map(|&r| self.next_block(r)).min() else { return };
            if next > plans {
                return;
            }
            for i in 0..self.running.len() {
                let index = self.running[i];
                if self.next_block(index) == next
                    && let Phase::Running { place, .. } = self.requests[index].phase
                {
                    self.kv.grow(place);
                    self.requests[index].add_blocks(1, self.config.block_size);
                }
            }
        }
    }
}
