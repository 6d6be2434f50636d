//! The compute thread: steps, one at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;

use super::backend::CpuBackend;
use super::reports::Reports;
use crate::engine::backend::Backend;
use crate::engine::batch::Batch;
use crate::engine::executor::{Sampling, StepResult};
use crate::engine::model::Decoder;

/// A step on its way to the compute thread and back.
pub(super) struct Job {
    pub step: u64,
    pub batch: Batch,
    pub begins: Vec<(u32, Sampling)>,
    pub result: StepResult,
    /// `[sampling seqs, vocab]` in batch order, if they are kept.
    pub logits: Vec<f32>,
    pub failure: Option<String>,
}

/// What the compute thread owns.
pub(super) struct Compute {
    pub backend: CpuBackend,
    pub decoder: Decoder<CpuBackend>,
    pub vocab: usize,
    pub keep_logits: bool,
}

impl Compute {
    /// The thread's life.
    pub fn run(mut self, inbox: &Receiver<Box<Job>>, reports: &Reports) {
        while let Ok(mut job) = inbox.recv() {
            let started = reports.now();
            let outcome = catch_unwind(AssertUnwindSafe(|| self.step(&mut job)));
            let ended = reports.now();
            job.failure = match outcome {
                Ok(Ok(())) => None,
                Ok(Err(e)) => Some(format!("step {}: {e}", job.step)),
                Err(panic) => Some(format!("step {} panicked: {}", job.step, said(&*panic))),
            };
            reports.step(job, started, ended);
        }
    }

    fn step(&mut self, job: &mut Job) -> Result<(), super::CpuError> {
        for (place, sampling) in job.begins.drain(..) {
            self.backend.begin_sequence(place, sampling);
        }
        self.decoder.forward(&mut self.backend, &job.batch)?;
        let samples = job.batch.sample_rows.len();
        if self.keep_logits {
            job.logits.resize(samples * self.vocab, 0.0);
            self.backend.download(self.decoder.logits(), &mut job.logits)?;
        }
        if samples > 0 {
            self.decoder.sample(&mut self.backend)?;
            let tokens = self.backend.sampled()?;
            for (index, token) in job.batch.sample_plan.iter().zip(tokens) {
                job.result.tokens[*index as usize] = Some(*token);
            }
        }
        job.result.stalled.extend(self.backend.stalled());
        Ok(())
    }
}

/// The text of a panic.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}
