//! Which steps of a GPU are timed: prefills of every length class, then random compositions over sequences whose
//! cache has been filled once.
//!
//! A sequence that has been filled can stand at any shorter context, with any adapter, without being computed
//! anew: so a decode of 128 sequences at chosen contexts costs its own time alone. Each composition is timed a
//! few times at the very same place, and its sample is the median.
//!
//! Steps with prefills are timed after rests of different lengths and after none, since their time depends on how
//! busy the device was ([`History`](crate::profile::History)). Decodes come in runs when an engine serves, and are timed
//! in runs.

use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::{Part, Place, StepBench, StepSample, median_sample};
use crate::engine::executor::ExecutorError;

/// Runs of a composition that count.
const REPEATS: usize = 3;
const DECODE_REPEATS: usize = 5;
/// Runs before those: of decodes, and of prefills without rests between them, until the device is as busy as it will be.
const DECODES_AHEAD: usize = 1;
const PREFILLS_AHEAD: usize = 2;
/// Decodes of each number of sequences, and their contexts, short as most are: what few of the random ones are.
const DECODES: [usize; 14] = [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128];
const SHORT_ROUNDS: usize = 2;
const SHORT_CONTEXTS: std::ops::RangeInclusive<u32> = 60..=1000;
/// Places that prefills are timed at; the others' caches stay filled.
const PREFILL_PLACES: usize = 4;
/// Steps of many prefills, after each filling, which they spoil; and how many prefills at most.
const CROWDS: usize = 12;
const MOST_PREFILLS: u32 = 8;
/// Compositions of each filling, however little time there is: both kinds of steps are there to be fitted.
const LEAST: usize = 40;
/// Before anything is timed: a GPU that was idle runs slower at first.
const WARM_UP: Duration = Duration::from_millis(500);
/// Lengths of prefills, besides the longest: near where products change their shapes, then about the short
/// regime, where times to the first token are decided.
const LENGTHS: [u32; 27] = [
    1, 4, 8, 16, 17, 24, 32, 48, 64, 65, 96, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536,
    2048, 2560, 3072, 3584,
];

/// How much of a survey there is time for.
#[derive(Clone, Copy, Debug)]
pub struct Survey {
    /// About how long it takes.
    pub time: Duration,
    /// Longest prefill, and the longest context that is filled, tokens.
    pub longest: u32,
    /// The share of the time in which the device is busy at least: steps are timed with rests between them that
    /// leave it so busy, half as long, or none. 1 never rests.
    pub duty: f64,
    /// Whether single prefills are among it.
    pub grid: bool,
}

/// Sequences to be filled, and with how many tokens each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filling {
    seqs: usize,
    tokens: u32,
}

impl StepBench<'_> {
    /// Times steps as the survey says. `progress` is told the share that is done.
    pub fn survey(
        &mut self,
        survey: Survey,
        mut progress: impl FnMut(f64),
    ) -> Result<Vec<StepSample>, ExecutorError> {
        let begin = Instant::now();
        let limits = &self.limits;
        let longest =
            survey.longest.min(limits.max_num_batched_tokens as u32).min(limits.max_model_len as u32 - 1);
        let mut samples = Vec::new();
        while begin.elapsed() < WARM_UP.min(survey.time / 10) {
            self.prefill(longest.min(512), None, |_, _| Ok(()))?;
        }
        if survey.grid {
            self.single_prefills(longest, survey.duty, &mut samples)?;
        }
        let fillings = self.fillings(longest);
        let (rest, mut ends) = (survey.time.saturating_sub(begin.elapsed()), begin.elapsed());
        for &filling in &fillings {
            ends += rest / fillings.len() as u32;
            self.fill(filling)?;
            if survey.grid && filling == fillings[0] {
                for _ in 0..SHORT_ROUNDS {
                    self.short_decodes(survey.duty, &mut samples)?;
                }
            }
            let mut left = LEAST;
            while begin.elapsed() < ends || left > 0 {
                left = left.saturating_sub(1);
                let mixed = self.rng.random_bool(0.6);
                let parts = if mixed { self.mixed(longest) } else { self.decodes() };
                samples.extend(self.repeated(&parts, survey.duty)?);
                progress((begin.elapsed().as_secs_f64() / survey.time.as_secs_f64()).min(1.0));
            }
            for _ in 0..if self.places.len() > PREFILL_PLACES { CROWDS } else { 0 } {
                let parts = self.crowd(longest);
                samples.extend(self.repeated(&parts, survey.duty)?);
            }
        }
        Ok(samples)
    }

    /// The share of the time in which the device is to be busy, for the next composition with prefills, and its runs
    /// that do not count.
    fn pace(&mut self, duty: f64) -> (f64, usize) {
        let duty = [duty, duty / (0.5 + 0.5 * duty), 1.0, 1.0][self.rng.random_range(0..4usize)];
        (duty, if duty < 1.0 { 0 } else { PREFILLS_AHEAD })
    }

    /// Decodes of few and of many sequences at short contexts, without adapters and with one of each's own.
    fn short_decodes(&mut self, duty: f64, samples: &mut Vec<StepSample>) -> Result<(), ExecutorError> {
        let filled = self.places.iter().take_while(|p| p.filled > 1).count();
        let ranks = self.limits.ranks.len();
        for seqs in DECODES.into_iter().filter(|&n| n <= filled) {
            for distinct in [0, seqs.min(ranks)] {
                for place in 0..seqs {
                    let context = self.rng.random_range(SHORT_CONTEXTS);
                    let Place { tokens, filled, slot, .. } = &mut self.places[place];
                    *tokens = context.min(*filled - 1);
                    *slot = (distinct > 0).then(|| (place % distinct) as u32);
                }
                let parts: Vec<Part> = (0..seqs as u32).map(|place| Part::Decode { place }).collect();
                samples.extend(self.repeated(&parts, duty)?);
            }
        }
        Ok(())
    }

    /// Each length without an adapter, and with one of each rank.
    fn single_prefills(
        &mut self,
        longest: u32,
        duty: f64,
        samples: &mut Vec<StepSample>,
    ) -> Result<(), ExecutorError> {
        let mut slots = vec![None];
        for (slot, rank) in (0..).zip(&self.limits.ranks) {
            if self.limits.ranks[..slot].iter().all(|other| other != rank) {
                slots.push(Some(slot as u32));
            }
        }
        for tokens in LENGTHS.into_iter().filter(|&n| n < longest).chain([longest]) {
            for &slot in &slots {
                let (duty, ahead) = self.pace(duty);
                let mut times = Vec::with_capacity(REPEATS);
                for run in 0..ahead + REPEATS {
                    let sample = self.prefill(tokens, slot, |_, _| Ok(()))?;
                    rest(sample, duty);
                    times.extend(sample.filter(|_| run >= ahead));
                }
                samples.extend(median_sample(times));
            }
        }
        Ok(())
    }

    /// Places that prefills are timed at: the last ones.
    fn prefill_places(&self) -> usize {
        PREFILL_PLACES.min(self.places.len() / 2).max(1)
    }

    /// Many sequences as long as memory lets all of them be, then as many of the longest as it holds.
    fn fillings(&self, longest: u32) -> Vec<Filling> {
        let limits = &self.limits;
        let block = limits.block_size as u32;
        // What the prefills take that are timed beside: a step's tokens, behind a sequence that goes on.
        let beside = (limits.max_num_batched_tokens + limits.max_model_len).div_ceil(limits.block_size);
        let beside = (beside + PREFILL_PLACES).min(limits.kv_blocks / 2);
        let blocks = (limits.kv_blocks - beside) as u32;
        let seqs = (self.places.len() - self.prefill_places()).max(1);
        let each = (blocks / seqs as u32 * block).clamp(block, longest);
        let fitting = |tokens: u32| (blocks / tokens.div_ceil(block)) as usize;
        let all = Filling { seqs: seqs.min(fitting(each)), tokens: each };
        let long = Filling { seqs: seqs.min(fitting(longest)).max(1), tokens: longest };
        if all == long { vec![all] } else { vec![all, long] }
    }

    fn fill(&mut self, filling: Filling) -> Result<(), ExecutorError> {
        (0..self.places.len() as u32).for_each(|place| self.forget(place));
        for place in 0..filling.seqs as u32 {
            self.bring_to(place, filling.tokens, None)?;
        }
        Ok(())
    }

    /// The same step several times, from the same contexts; none if it does not fit.
    fn repeated(&mut self, parts: &[Part], duty: f64) -> Result<Option<StepSample>, ExecutorError> {
        let decodes = parts.iter().all(|part| matches!(part, Part::Decode { .. }));
        let (repeats, (duty, ahead)) =
            if decodes { (DECODE_REPEATS, (1.0, DECODES_AHEAD)) } else { (REPEATS, self.pace(duty)) };
        let places = parts.iter().map(|part| match *part {
            Part::Decode { place } | Part::Prefill { place, .. } => place,
        });
        let starts: Vec<(u32, u32)> =
            places.map(|place| (place, self.places[place as usize].tokens)).collect();
        let mut times = Vec::with_capacity(repeats);
        for run in 0..ahead + repeats {
            for &(place, tokens) in &starts {
                self.places[place as usize].tokens = tokens;
            }
            let sample = self.time(parts)?;
            rest(sample, duty);
            times.extend(sample.filter(|_| run >= ahead));
        }
        Ok(median_sample(times))
    }

    /// Between 1 and `most`: small numbers as often as large ones, and all as often as any.
    fn count(&mut self, most: u32) -> u32 {
        match self.rng.random_range(0..5u32) {
            0 => most,
            1 | 2 => self.rng.random_range(1..=most),
            _ => self.rng.random_range(0.0..=f64::from(most).ln().max(0.01)).exp().round() as u32,
        }
        .clamp(1, most)
    }

    /// Some of the filled sequences among the first `places`, at contexts up to what they have.
    fn decodes_among(&mut self, places: usize) -> Vec<u32> {
        let filled = |p: &Place| p.filled > 1;
        let mut able: Vec<u32> = (0..places as u32).filter(|p| filled(&self.places[*p as usize])).collect();
        if able.is_empty() {
            return able;
        }
        self.shuffle(&mut able);
        let count = self.count(able.len() as u32);
        able.truncate(count as usize);
        // As long as they can be, about as long as each other, or all different.
        let share = [1.0, self.rng.random_range(0.05..1.0), 0.0][self.rng.random_range(0..3usize)];
        for &place in &able {
            let most = self.places[place as usize].filled - 1;
            let share = if share == 0.0 { self.rng.random_range(0.01..1.0) } else { share };
            self.places[place as usize].tokens = ((f64::from(most) * share) as u32).clamp(1, most);
        }
        able
    }

    fn decodes(&mut self) -> Vec<Part> {
        let places = self.decodes_among(self.places.len());
        self.assign_slots(&places);
        places.into_iter().map(|place| Part::Decode { place }).collect()
    }

    /// One to four prefills, most of them of the short regime's lengths, alone or beside decodes.
    fn mixed(&mut self, longest: u32) -> Vec<Part> {
        let last = self.places.len() - self.prefill_places();
        let decodes = if self.rng.random_bool(0.25) { Vec::new() } else { self.decodes_among(last) };
        let mut budget = (self.limits.max_num_batched_tokens - decodes.len()) as u32;
        let prefills = [1, 1, 1, 2, 2, 3, 4][self.rng.random_range(0..7usize)];
        let mut places: Vec<u32> = (last as u32..self.places.len() as u32).collect();
        self.shuffle(&mut places);
        places.truncate(prefills);
        let goes_on = self.rng.random_bool(0.15).then(|| places[0]);
        let mut parts: Vec<Part> = decodes.iter().map(|&place| Part::Decode { place }).collect();
        for place in last as u32..self.places.len() as u32 {
            if goes_on != Some(place) {
                self.forget(place);
            }
        }
        let mut used = decodes;
        let (block, mut room) = (self.limits.block_size, self.free.len());
        for place in places {
            let (low, high) =
                [(64, 1024), (64, 1024), (1, longest), (256, longest)][self.rng.random_range(0..4usize)];
            let (low, high) = (f64::from(low.min(longest)).ln(), f64::from(high.min(longest)).ln());
            let tokens = self.rng.random_range(low..=high.max(low)).exp().round() as u32;
            let Place { filled: at, ref blocks, .. } = self.places[place as usize];
            let held = blocks.len();
            let most = ((room + held) * block).min(self.limits.max_model_len) as u32;
            let tokens = tokens.clamp(1, longest).min(budget).min(most.saturating_sub(at));
            if tokens == 0 {
                continue;
            }
            self.places[place as usize].tokens = at;
            budget -= tokens;
            room -= ((at + tokens) as usize).div_ceil(block).saturating_sub(held);
            let fresh = at == 0;
            parts.push(Part::Prefill { place, tokens, fresh });
            used.push(place);
        }
        self.assign_slots(&used);
        parts
    }

    /// More prefills than an engine may have a graph for, at any places.
    fn crowd(&mut self, longest: u32) -> Vec<Part> {
        let mut places: Vec<u32> = (0..self.places.len() as u32).collect();
        self.shuffle(&mut places);
        let most = MOST_PREFILLS.min(places.len() as u32);
        places.truncate(self.rng.random_range(PREFILL_PLACES as u32 + 1..=most) as usize);
        places.iter().for_each(|place| self.forget(*place));
        let share = (self.limits.max_num_batched_tokens / places.len()) as u32;
        let high = f64::from(longest.min(1024).min(share)).ln();
        let parts = places.iter().map(|&place| {
            let tokens = self.rng.random_range(2.0..=high.max(2.0)).exp().round() as u32;
            Part::Prefill { place, tokens: tokens.min(share).max(1), fresh: true }
        });
        let parts = parts.collect();
        self.assign_slots(&places);
        parts
    }

    /// Gives each sequence no adapter, all the same one, or one of so many; of every rank or of one.
    fn assign_slots(&mut self, places: &[u32]) {
        let ranks = &self.limits.ranks;
        let mut slots: Vec<u32> = (0..ranks.len() as u32).collect();
        if self.rng.random_bool(0.5) && !slots.is_empty() {
            let one = ranks[self.rng.random_range(0..ranks.len())];
            slots.retain(|slot| self.limits.ranks[*slot as usize] == one);
        }
        self.shuffle(&mut slots);
        let most = slots.len().min(places.len()) as u32;
        let distinct = match self.rng.random_range(0..6u32) {
            _ if most == 0 => 0,
            0 => 0,
            1 => 1,
            2 | 3 => most,
            _ => self.count(most),
        };
        let without = if self.rng.random_bool(0.2) { self.rng.random_range(0.0..1.0) } else { 0.0 };
        for (i, &place) in places.iter().enumerate() {
            let base = distinct == 0 || self.rng.random_bool(without);
            self.places[place as usize].slot = (!base).then(|| slots[i % distinct as usize]);
        }
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.rng.random_range(0..=i));
        }
    }
}

/// Waits after a step until it was `duty` of the time.
fn rest(step: Option<StepSample>, duty: f64) {
    let busy = step.map_or(0.0, |s| s.ns as f64 * 1e-9);
    std::thread::sleep(Duration::from_secs_f64(busy * (1.0 / duty - 1.0)));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::StepLimits;
    use super::super::checked::Checked;
    use super::*;
    use crate::engine::batch::BatchLimits;
    use crate::workload::streams::stream;

    fn surveyed(seqs: usize, kv_blocks: usize, ranks: &[u32]) -> Vec<StepSample> {
        let limits = BatchLimits {
            max_num_seqs: seqs,
            max_num_batched_tokens: 4096,
            max_model_len: 4352,
            block_size: 16,
            kv_blocks,
        };
        let mut executor = Checked::new(limits);
        let limits = StepLimits {
            max_num_seqs: seqs,
            max_num_batched_tokens: 4096,
            max_model_len: 4352,
            block_size: 16,
            kv_blocks,
            vocab_size: 1000,
            ranks: ranks.to_vec(),
        };
        let mut bench = StepBench::new(&mut executor, limits, stream(1, "survey"));
        let survey = Survey { time: Duration::from_secs(1), longest: 4096, duty: 1.0, grid: true };
        bench.survey(survey, |_| {}).unwrap()
    }

    #[test]
    fn every_kind_of_step_is_among_them() {
        let ranks: Vec<u32> = (0..128).map(|i| [8, 16, 64][i % 3]).collect();
        // As beside 128 slots of rank 64 on an 80 GB card.
        let samples = surveyed(128, 2420, &ranks);
        let any = |holds: &dyn Fn(&StepSample) -> bool| samples.iter().any(holds);
        let decodes = |s: &&StepSample| s.shape.prefills == 0;
        let most =
            samples.iter().filter(decodes).max_by_key(|s| (s.shape.decodes, s.shape.adapters)).unwrap();
        assert!(most.shape.decodes >= 124 && most.shape.adapters >= 120, "{most:?}");
        assert!(any(&|s| s.shape.decodes >= 100 && s.shape.decode_context >= 100 * 200), "full contexts");
        assert!(
            any(&|s| s.shape.decodes > 0 && s.shape.decode_context > s.shape.decodes * 3_500),
            "long ones"
        );
        assert!(any(&|s| s.shape.tokens == 4096 && s.shape.prefills == 1 && s.shape.adapters == 0));
        assert!(any(&|s| s.shape.prefills > 1 && s.shape.decodes > 64), "mixed");
        assert!(any(&|s| s.shape.prefills > 4), "crowds");
        let rank_sums: BTreeSet<u64> = samples
            .iter()
            .filter(|s| s.shape.adapters > 4)
            .map(|s| s.shape.adapter_ranks / s.shape.adapters)
            .collect();
        assert!(rank_sums.contains(&8) && rank_sums.contains(&64) && rank_sums.len() > 3, "{rank_sums:?}");
        let of_the_short_regime = |s: &&StepSample| s.shape.prefills > 0 && s.shape.tokens <= 1200;
        assert!(samples.iter().filter(of_the_short_regime).count() * 3 > samples.len());
    }

    #[test]
    fn little_memory_and_few_sequences_will_do() {
        for (seqs, kv_blocks) in [(1, 272), (2, 300), (16, 600)] {
            let samples = surveyed(seqs, kv_blocks, &[16; 2]);
            assert!(samples.iter().any(|s| s.shape.prefills == 0) && samples.len() > 60, "{seqs} sequences");
        }
    }
}
