//! Which steps of a CPU are timed: a grid, then random mixtures.

use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::{Part, StepBench, StepSample, median_sample};
use crate::engine::executor::ExecutorError;

impl StepBench<'_> {
    fn random_slot(&mut self) -> Option<u32> {
        let slots = self.limits.ranks.len() as u32;
        (slots > 0 && self.rng.random_bool(0.8)).then(|| self.rng.random_range(0..slots))
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
