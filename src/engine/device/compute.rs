//! The compute thread: steps, one at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;

use super::reports::Reports;
use crate::engine::backend::StepBackend;
use crate::engine::batch::Batch;
use crate::engine::executor::{Sampling, StepResult};
use crate::engine::model::Decoder;
use crate::engine::watch::Watch;

/// A step on its way to the compute thread and back.
pub(in crate::engine) struct Job {
    pub step: u64,
    pub batch: Batch,
    pub begins: Vec<(u32, Sampling)>,
    pub result: StepResult,
    /// `[sampling seqs, vocab]` in batch order, if they are kept.
    pub logits: Vec<f32>,
    pub failure: Option<String>,
}

/// What the compute thread owns.
pub(in crate::engine) struct Compute<B: StepBackend> {
    pub backend: B,
    pub decoder: Decoder<B>,
    pub vocab: usize,
    pub keep_logits: bool,
    pub watch: Watch,
}

impl<B: StepBackend> Compute<B> {
    /// The thread's life.
    pub fn run(mut self, inbox: Receiver<Box<Job>>, reports: &Reports) {
        let watch = self.watch;
        while let Some(mut job) = watch.soon(|| inbox.try_recv().ok()).or_else(|| inbox.recv().ok()) {
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

    fn step(&mut self, job: &mut Job) -> Result<(), B::Error> {
        let Self { backend, decoder, .. } = self;
        for (place, sampling) in job.begins.drain(..) {
            backend.begin_sequence(place, sampling);
        }
        backend.run(&job.batch, |backend, n, samples| {
            decoder.forward(backend, n, samples)?;
            if samples > 0 { decoder.sample(backend, samples) } else { Ok(()) }
        })?;
        let tokens = backend.sampled()?;
        for (index, token) in job.batch.sample_plan.iter().zip(tokens) {
            job.result.tokens[*index as usize] = Some(*token);
        }
        for (&index, &place) in job.batch.sample_plan.iter().zip(&job.batch.sample_places) {
            job.result.logprobs.extend(backend.logprobs(place).map(|logprobs| (index, logprobs)));
        }
        backend.stalled(&mut job.result.stalled)?;
        if self.keep_logits {
            job.logits.resize(job.batch.sample_rows.len() * self.vocab, 0.0);
            backend.download(decoder.logits(), &mut job.logits)?;
        }
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
