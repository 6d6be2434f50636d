//! Steps as an engine makes them that serves: prompts arrive at random, are computed beside the decodes of those before
//! them, and go.
//!
//! What a step takes depends on more than its composition: on the clock that a device has come down to by its load, on
//! whether its graph was the last one that ran, on what the caches hold. Chosen compositions, each run again and again,
//! show none of that as serving does. Here the scheduler itself forms the steps, from arrivals and lengths of the
//! calibration's own, at loads from light to all that the device can do, and every step is a sample.

use std::time::Duration;

use lora_sched::{AdapterId, Arrival, Config, Event, Nanos, Outbox, RequestId, Scheduler};
use rand::RngExt as _;
use rand_distr::{Distribution as _, Exp1};

use super::{StepBench, StepSample};
use crate::engine::executor::ExecutorError;

/// Loads, as shares of what the device can do; none keeps a request waiting at all times, by which it is found what
/// that is. Each pass goes through them in turn.
const LOADS: [Option<f64>; 4] = [None, Some(0.2), Some(0.5), Some(0.8)];
/// Passes through the loads: what drifts, as a card does that grows warm, drifts through all of them alike.
const PASSES: u32 = 4;
/// Short prompts and outputs, in tokens; lengths of prompts are even in their logarithms.
const SHORT: (u32, u32) = (16, 1024);
const OUTPUTS: u32 = 32;
/// The share of the time for prompts from the longest short one to the longest of all.
const LONG_SHARE: f64 = 0.2;
/// The shares of requests with an adapter, of which a pass takes one: most serve nobody without.
const WITH_ADAPTER: [f64; PASSES as usize] = [1.0, 1.0, 0.7, 0.0];

/// What one stretch of traffic is made of.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    time: Duration,
    /// Requests a nanosecond; none keeps one waiting.
    rate: Option<f64>,
    /// Prompt lengths.
    lengths: (u32, u32),
    /// The longest output.
    outputs: u32,
    /// The share of requests with an adapter.
    with_adapter: f64,
}

impl StepBench<'_> {
    /// Times the steps of random traffic for about `time`, on an executor that `config`'s scheduler could drive.
    /// Prompts have up to `longest` tokens. `progress` is told the share that is done. What the places held is lost.
    pub fn traffic(
        &mut self,
        config: &Config,
        time: Duration,
        longest: u32,
        mut progress: impl FnMut(f64),
    ) -> Result<Vec<StepSample>, ExecutorError> {
        (0..self.places.len() as u32).for_each(|place| self.forget(place));
        let most = self.limits.max_model_len as u32;
        let outputs = OUTPUTS.min(most / 2).max(1);
        let longest = longest.min(most - outputs).max(1);
        let short = (SHORT.0.min(longest), SHORT.1.min(longest));
        let mut kinds = vec![(short, 1.0)];
        if longest > SHORT.1 {
            kinds = vec![(short, 1.0 - LONG_SHARE), ((SHORT.1, longest), LONG_SHARE)];
        }
        let mut samples = Vec::new();
        // Requests a nanosecond that the device can do, of each kind.
        let mut most = vec![0.0; kinds.len()];
        for pass in 0..PASSES {
            for (i, load) in LOADS.into_iter().enumerate() {
                for (&(lengths, share), most) in kinds.iter().zip(&mut most) {
                    let stretch = Stretch {
                        time: time.mul_f64(share / f64::from(PASSES) / LOADS.len() as f64),
                        rate: load.map(|load| load * *most),
                        lengths,
                        outputs,
                        with_adapter: WITH_ADAPTER[pass as usize],
                    };
                    let served = self.stretch(config, &stretch, &mut samples)?;
                    if load.is_none() {
                        *most = served;
                    }
                }
                progress((pass as f64 + (i + 1) as f64 / LOADS.len() as f64) / f64::from(PASSES));
            }
        }
        Ok(samples)
    }

    /// Gives the requests that were served, a nanosecond.
    fn stretch(
        &mut self,
        config: &Config,
        stretch: &Stretch,
        samples: &mut Vec<StepSample>,
    ) -> Result<f64, ExecutorError> {
        let broken = |message: String| ExecutorError { device: "the calibration's scheduler", message };
        let mut scheduler = Scheduler::new(config.clone()).map_err(|e| broken(e.to_string()))?;
        let mut out = Outbox::default();
        let begun = self.executor.clock();
        let ends = begun + stretch.time.as_nanos() as Nanos;
        let (mut arrives, mut asked) = (begun, 0);
        loop {
            let now = self.executor.clock();
            if now >= ends {
                break;
            }
            while stretch.rate.map_or(scheduler.waiting() == 0, |_| arrives <= now) {
                let arrival = self.arrival(asked, now, stretch);
                scheduler.handle(now, Event::Arrive(arrival), &mut out).map_err(|e| broken(e.to_string()))?;
                asked += 1;
                let gap: f64 = Exp1.sample(&mut self.rng);
                arrives += stretch.rate.map_or(0.0, |rate| gap / rate) as Nanos;
            }
            if !scheduler.plan(now, &mut self.plan, &mut out) {
                // Nothing is there to be computed.
                let wait = arrives.min(ends).saturating_sub(self.executor.clock());
                std::thread::sleep(Duration::from_nanos(wait));
                continue;
            }
            if !out.swaps.is_empty() {
                return Err(broken("an adapter had no slot".to_owned()));
            }
            samples.push(self.run_planned()?);
            let done = self.executor.clock().max(now + 1);
            let event = Event::StepDone { stopped: &[], stalled: &[] };
            scheduler.handle(done, event, &mut out).map_err(|e| broken(e.to_string()))?;
            out.clear();
        }
        let served = asked - scheduler.waiting() as u64 - scheduler.running() as u64;
        Ok(served.max(1) as f64 / (self.executor.clock() - begun).max(1) as f64)
    }

    fn arrival(&mut self, id: u64, now: Nanos, stretch: &Stretch) -> Arrival {
        let (least, most) = stretch.lengths;
        let length = self.rng.random_range(f64::from(least).ln()..=f64::from(most).ln()).exp();
        let slots = self.limits.ranks.len() as u32;
        let adapter = (slots > 0 && self.rng.random_bool(stretch.with_adapter))
            .then(|| AdapterId(self.rng.random_range(0..slots)));
        Arrival {
            id: RequestId(id),
            adapter,
            received: now,
            prompt_tokens: (length.round() as u32).clamp(least, most),
            max_tokens: self.rng.random_range(1..=stretch.outputs),
        }
    }

    /// Runs what a scheduler has planned.
    fn run_planned(&mut self) -> Result<StepSample, ExecutorError> {
        self.plan.step = self.steps;
        self.fill_feed();
        self.run(|_, _| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use lora_sched::AdapterSpec;

    use super::super::StepLimits;
    use super::super::checked::Checked;
    use super::*;
    use crate::engine::batch::BatchLimits;
    use crate::profile::StepShape;
    use crate::workload::streams::stream;

    fn samples(seqs: usize, kv_blocks: usize, max_model_len: usize, time: Duration) -> Vec<StepSample> {
        let config = Config {
            adapters: vec![AdapterSpec::new(16, 1 << 20); seqs + 8],
            gpu_loras: seqs + 1,
            max_num_seqs: seqs,
            max_num_batched_tokens: 4096,
            max_model_len,
            block_size: 16,
            kv_blocks,
            ..Config::with_adapters(seqs + 8, seqs + 1, 16, 1 << 20)
        };
        let mut executor = Checked::new(BatchLimits {
            max_num_seqs: seqs,
            max_num_batched_tokens: 4096,
            max_model_len,
            block_size: 16,
            kv_blocks,
        });
        let limits = StepLimits::new(&config, 1000, seqs);
        let mut bench = StepBench::new(&mut executor, limits, stream(1, "traffic"));
        bench.traffic(&config, time, 4096, |_| {}).unwrap()
    }

    #[test]
    fn steps_are_those_of_an_engine_that_serves() {
        let samples = samples(16, 4000, 4352, Duration::from_secs(2));
        let share = |holds: &dyn Fn(&StepShape) -> bool| {
            samples.iter().filter(|s| holds(&s.shape)).count() as f64 / samples.len() as f64
        };
        assert!(share(&|s| s.prefills == 0 && s.decodes > 1) > 0.1, "decodes alone");
        assert!(share(&|s| s.prefills == 1 && s.decodes > 0) > 0.04, "a prompt beside decodes");
        assert!(share(&|s| s.prefills > 0 && s.decodes == 0) > 0.005, "prompts alone");
        assert!(share(&|s| s.decodes + s.prefills == 16) > 0.01, "as many as there may be");
        assert!(share(&|s| s.adapters > 6) > 0.02 && share(&|s| s.adapters == 0) > 0.05, "adapters");
        assert!(share(&|s| s.tokens > 1500) > 0.001, "long prompts");
        // A device that had rests, and one that had none.
        assert!(share(&|s| s.prefills > 0 && s.recent < 2000) > 0.001 && share(&|s| s.recent > 6000) > 0.03);
        assert!(samples.iter().all(|s| s.shape.tokens <= 4096 && s.shape.decodes + s.shape.prefills <= 16));
    }

    #[test]
    fn little_memory_and_short_contexts_will_do() {
        for (seqs, kv_blocks, max_model_len) in [(1, 272, 4352), (2, 8, 64), (4, 300, 2048)] {
            let samples = samples(seqs, kv_blocks, max_model_len, Duration::from_millis(200));
            assert!(samples.iter().any(|s| s.shape.prefills == 0) && samples.len() > 50, "{seqs} sequences");
        }
    }
}
