//! An executor for tests of what is timed.

use std::time::Instant;

use lora_sched::{AdapterId, Nanos, StepPlan, SwapPlan};

use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::executor::{Completion, Executor, ExecutorError, StepFeed, StepResult, Waker};

/// Takes every plan that a device would take, and a microsecond a row, which nobody waits for.
pub(super) struct Checked {
    batch: Batch,
    result: StepResult,
    step: Option<u64>,
    begun: Instant,
    computed: Nanos,
}

impl Checked {
    pub(super) fn new(limits: BatchLimits) -> Self {
        Self {
            batch: Batch::new(limits),
            result: StepResult::default(),
            step: None,
            begun: Instant::now(),
            computed: 0,
        }
    }
}

impl Executor for Checked {
    fn submit_step(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), ExecutorError> {
        self.batch
            .build(plan, feed)
            .map_err(|e| ExecutorError { device: "checked", message: e.to_string() })?;
        self.computed += 1_000 * self.batch.rows() as u64;
        self.step = Some(plan.step);
        Ok(())
    }

    fn submit_swap(&mut self, _: &SwapPlan) -> Result<(), ExecutorError> {
        unreachable!("steps alone are timed")
    }

    fn poll(&mut self) -> Result<Option<Completion>, ExecutorError> {
        Ok(self.step.take().map(|step| Completion::Step { step, started: 0, ended: self.clock() }))
    }

    fn wait(&mut self) -> Result<Completion, ExecutorError> {
        self.poll()?
            .ok_or_else(|| ExecutorError { device: "checked", message: "nothing is in flight".into() })
    }

    fn step_result(&self) -> &StepResult {
        &self.result
    }

    fn set_waker(&mut self, _: Waker) {}

    fn clock(&self) -> Nanos {
        self.begun.elapsed().as_nanos() as Nanos + self.computed
    }

    fn preload(&mut self, _: &[AdapterId]) -> Result<(), ExecutorError> {
        Ok(())
    }
}
