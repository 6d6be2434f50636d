//! Which cost misses: a profile's costs against what a run's decision log says that things took.
//!
//! Every step, copy, host gap and way through the front end of a log is one [`Sample`], of what the simulator would have
//! charged for it and what it took. What decided when things began plays no part: a step is charged by what it
//! computed, however the run came to it. Two things do come from the run itself: how long copies and steps were under
//! way side by side, and how long a step waited for an adapter, which is no cost of the step.

mod report;
mod spans;

use std::collections::HashMap;

use lora_sched::{AdapterId, Nanos, PlaceId, RequestId, SeqStep, SlotId, StepPlan};

pub use report::{KindResidual, RangeResidual, Residual, ResidualKind, ResidualReport};
use spans::Spans;

use super::recorded::gaps;
use crate::profile::{CostModel, History, Profile, ProfileError, StepShape};
use crate::report::decision_log::{LogHeader, LogLine, LoggedSeq};

/// A log that costs cannot be held against.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: this log is not whole; name one that `serve --decision-log` wrote")]
pub struct ResidualError(String);

/// One thing that took time, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    /// What the simulator would have charged.
    predicted: f64,
    measured: Nanos,
}

/// A step, with what its cost may hang on besides its composition.
#[derive(Clone, Copy, Debug)]
struct StepSample {
    kind: ResidualKind,
    /// [`StepShape::recent`].
    recent: u64,
    /// Sequences in it.
    running: u64,
    sample: Sample,
}

/// Takes logs of one profile's machine, one after another, and reports over all of them.
#[derive(Clone, Debug)]
pub struct Residuals {
    cost: CostModel,
    /// The profile's model.
    model: String,
    other_models: Vec<String>,
    steps: Vec<StepSample>,
    /// All but steps.
    rest: Vec<(ResidualKind, Sample)>,
    waited: Nanos,
}

/// Copies that shared the copy engine, or one alone: none of the others can be told from the outside.
#[derive(Clone, Copy, Debug)]
struct Copies {
    submitted: Nanos,
    started: Nanos,
    ended: Nanos,
    done: Nanos,
    /// What the whole of them would be charged with nothing beside them …
    whole: Nanos,
    /// … and their bytes alone.
    bytes: Nanos,
}

impl Residuals {
    /// Nothing yet.
    ///
    /// # Errors
    /// If the profile's costs cannot be.
    pub fn new(profile: &Profile) -> Result<Self, ProfileError> {
        Ok(Self {
            cost: CostModel::new(profile)?,
            model: profile.model.clone(),
            other_models: Vec::new(),
            steps: Vec::new(),
            rest: Vec::new(),
            waited: 0,
        })
    }

    /// Adds a run's log. What was under way when the log ended is left out.
    ///
    /// # Errors
    /// If a line's times do not follow one another, or a step names what no line tells of.
    pub fn add(&mut self, header: &LogHeader, lines: &[LogLine]) -> Result<(), ResidualError> {
        if header.model != self.model && !self.other_models.contains(&header.model) {
            self.other_models.push(header.model.clone());
        }
        let copies = self.copies(lines)?;
        let copying = Spans::of(copies.iter().map(|c| (c.started, c.ended)));
        self.add_steps(header, lines, &copying)?;
        let stepping = Spans::of(lines.iter().filter_map(|line| match *line {
            LogLine::Step { submitted, done, .. } => Some((submitted, done)),
            _ => None,
        }));
        self.add_copies(&copies, &stepping);
        self.add_gaps(lines);
        self.add_front_end(lines)
    }

    /// What all logs so far come to.
    pub fn report(&self) -> ResidualReport {
        ResidualReport::of(&self.other_models, &self.steps, &self.rest, self.waited)
    }

    fn add_steps(
        &mut self,
        header: &LogHeader,
        lines: &[LogLine],
        copying: &Spans,
    ) -> Result<(), ResidualError> {
        let stalls = stalls(lines);
        let mut ranks: HashMap<u32, u32> = (0..).zip(header.config.adapters.iter().map(|a| a.0)).collect();
        // Kept for costs that do not look back as well: how busy the device was is shown either way.
        let mut history = History::default();
        let mut plan = StepPlan::default();
        for line in lines {
            if let LogLine::AddAdapter { adapter, rank, .. } = *line {
                ranks.insert(adapter, rank);
            }
            let LogLine::Step { step, formed, submitted, done, seqs, waited, .. } = line else { continue };
            in_order(&[*formed, *submitted, *done], || format!("step {step}"))?;
            plan.seqs.clear();
            for seq in seqs {
                let seq = planned(seq).filter(|s| s.adapter.is_none_or(|(a, _)| ranks.contains_key(&a.0)));
                plan.seqs.push(seq.ok_or_else(|| unheard_of(*step))?);
            }
            let rank = |adapter: u32| ranks.get(&adapter).copied().unwrap_or(0);
            let shape = StepShape::of(&plan, *submitted, rank, &mut history);

            let took = done - submitted;
            let stalled = stalls.get(step).copied().unwrap_or(0).min(took);
            let measured = took - stalled;
            // As long as a step waits for a copy, one is under way.
            let beside = copying.within(*submitted, *done).saturating_sub(stalled);
            let alone = self.cost.step_ns(&shape);
            let predicted = side_by_side(alone, beside, measured, 1.0 + self.cost.step_slowdown);
            self.waited += stalled + if *waited { submitted - formed } else { 0 };
            let kind = match (shape.prefills > 0, shape.decodes > 0, beside > 0) {
                _ if *waited || stalled > 0 => ResidualKind::Waited,
                (false, false, _) => return Err(ResidualError(format!("step {step} computes nothing"))),
                (false, true, false) => ResidualKind::Decodes,
                (false, true, true) => ResidualKind::DecodesBesideCopies,
                (true, false, false) => ResidualKind::Prompts,
                (true, false, true) => ResidualKind::PromptsBesideCopies,
                (true, true, false) => ResidualKind::Mixed,
                (true, true, true) => ResidualKind::MixedBesideCopies,
            };
            let running = seqs.len() as u64;
            let sample = Sample { predicted, measured };
            self.steps.push(StepSample { kind, recent: shape.recent, running, sample });
        }
        Ok(())
    }

    /// Copies in order of their first bytes; those whose bytes moved at the same time are one.
    fn copies(&self, lines: &[LogLine]) -> Result<Vec<Copies>, ResidualError> {
        let mut copies = Vec::new();
        for line in lines {
            if let LogLine::Swap { adapter, bytes, submitted, started, ended, done, .. } = *line {
                in_order(&[submitted, started, ended, done], || format!("a swap of adapter {adapter}"))?;
                let (whole, bytes) = (self.cost.swap_ns(bytes), self.cost.bytes_ns(bytes));
                copies.push(Copies { submitted, started, ended, done, whole, bytes });
            }
        }
        copies.sort_by_key(|c| (c.started, c.ended));
        let mut runs: Vec<Copies> = Vec::new();
        for copy in copies {
            match runs.last_mut() {
                Some(run) if copy.started < run.ended => {
                    run.submitted = run.submitted.min(copy.submitted);
                    run.ended = run.ended.max(copy.ended);
                    run.done = run.done.max(copy.done);
                    run.whole += copy.whole;
                    run.bytes += copy.bytes;
                }
                _ => runs.push(copy),
            }
        }
        Ok(runs)
    }

    fn add_copies(&mut self, copies: &[Copies], stepping: &Spans) {
        let factor = self.cost.busy_swap_factor();
        let mut before = 0;
        for copy in copies {
            let sample = |alone, from: Nanos, to: Nanos| {
                let measured = to - from;
                let predicted = side_by_side(alone, stepping.within(from, to), measured, factor);
                Sample { predicted, measured }
            };
            // Copies go one after another: what came before is no cost of this one.
            let turn = copy.submitted.max(before).min(copy.done);
            let kinds = if stepping.within(turn, copy.done) > 0 {
                [ResidualKind::CopiesBesideSteps, ResidualKind::BytesBesideSteps]
            } else {
                [ResidualKind::Copies, ResidualKind::Bytes]
            };
            let (whole, bytes) =
                (sample(copy.whole, turn, copy.done), sample(copy.bytes, copy.started, copy.ended));
            self.rest.extend(kinds.into_iter().zip([whole, bytes]));
            before = before.max(copy.done);
        }
    }

    /// From one step to the next where that was planned as soon as the first had ended. A step that waited for a copy
    /// before it was submitted says nothing of the host.
    fn add_gaps(&mut self, lines: &[LogLine]) {
        let (_, gap_of) = gaps(lines);
        let mut before = None;
        for line in lines {
            let LogLine::Step { formed, submitted, done, waited, .. } = *line else { continue };
            if let Some(ended) = before.replace(done)
                && !waited
                && formed.checked_sub(ended).is_some_and(|gap| gap_of.get(&formed) == Some(&gap))
            {
                let sample = Sample { predicted: self.cost.loop_ns as f64, measured: submitted - ended };
                self.rest.push((ResidualKind::Gaps, sample));
            }
        }
    }

    fn add_front_end(&mut self, lines: &[LogLine]) -> Result<(), ResidualError> {
        for line in lines {
            if let LogLine::Arrive { t, id, received, prompt_tokens, refused: None, .. } = *line {
                in_order(&[received, t], || format!("request {id}"))?;
                let predicted = self.cost.front_ns(prompt_tokens) as f64;
                self.rest.push((ResidualKind::FrontEnd, Sample { predicted, measured: t - received }));
            }
        }
        Ok(())
    }
}

/// What `alone` comes to if something that slows it by `factor` was there for `beside` of the `measured` time. The share
/// of the time is taken from the run, not the time itself: a step that is predicted longer had more of it beside a copy.
fn side_by_side(alone: Nanos, beside: Nanos, measured: Nanos, factor: f64) -> f64 {
    let share = if measured == 0 { 0.0 } else { beside.min(measured) as f64 / measured as f64 };
    alone as f64 / (1.0 - share + share / factor)
}

/// How long each step waited for layers. Several slots are waited for at the same time: the longest wait is what the
/// step lost.
fn stalls(lines: &[LogLine]) -> HashMap<u64, Nanos> {
    let longest = |line: &LogLine| match line {
        LogLine::StepDone { step, stalled, .. } => {
            stalled.iter().map(|s| s.1).max().map(|longest| (*step, longest))
        }
        _ => None,
    };
    lines.iter().filter_map(longest).collect()
}

/// A sequence as the plan had it; none where an adapter has no slot.
fn planned(
    &LoggedSeq(id, adapter, slot, start, len, decode, samples, blocks): &LoggedSeq,
) -> Option<SeqStep> {
    if adapter.is_some() != slot.is_some() {
        return None;
    }
    Some(SeqStep {
        id: RequestId(id),
        place: PlaceId(0),
        adapter: adapter.map(AdapterId).zip(slot.map(SlotId)),
        start,
        len,
        decode,
        samples,
        new_blocks: 0..blocks,
    })
}

fn unheard_of(step: u64) -> ResidualError {
    ResidualError(format!("step {step} names an adapter that neither the header nor a line tells of"))
}

fn in_order(times: &[Nanos], what: impl FnOnce() -> String) -> Result<(), ResidualError> {
    if times.is_sorted() {
        return Ok(());
    }
    Err(ResidualError(format!("{} has times that do not follow one another", what())))
}

#[cfg(test)]
mod tests {
    use lora_sched::Config;

    use super::*;
    use crate::profile::tests::round;

    const US: Nanos = 1_000;

    fn header() -> LogHeader {
        LogHeader::new("tiny", 1, &Config::with_adapters(2, 2, 8, 1_000_000))
    }

    /// A step from 0 of one prompt of ten tokens: 1.2 ms in the round profile.
    fn step(step: u64, submitted: Nanos, done: Nanos, adapter: Option<u32>) -> LogLine {
        let (formed, started, ended) = (submitted - 5 * US.min(submitted / 5), submitted, done);
        let seqs = vec![LoggedSeq(step, adapter, adapter, 0, 10, false, true, 1)];
        let (loading, waited) = (Vec::new(), false);
        LogLine::Step { step, formed, submitted, started, ended, done, seqs, loading, waited }
    }

    fn arrive(t: Nanos, id: u64) -> LogLine {
        let (adapter, received, refused) = (None, t, None);
        LogLine::Arrive { t, id, adapter, received, prompt_tokens: 10, max_tokens: 1, refused }
    }

    fn step_done(t: Nanos, step: u64, stalled: &[(u32, Nanos)]) -> LogLine {
        LogLine::StepDone { t, step, stopped: Vec::new(), stalled: stalled.to_vec() }
    }

    fn swap(submitted: Nanos, started: Nanos, ended: Nanos, done: Nanos) -> LogLine {
        let (adapter, slot, evicted, bytes, prefetch, decided) = (0, 0, None, 1_000_000, false, submitted);
        LogLine::Swap { adapter, slot, evicted, bytes, prefetch, decided, submitted, started, ended, done }
    }

    fn report(profile: &Profile, lines: &[LogLine]) -> ResidualReport {
        let mut residuals = Residuals::new(profile).unwrap();
        residuals.add(&header(), lines).unwrap();
        residuals.report()
    }

    fn sums(report: &ResidualReport, kind: ResidualKind) -> (usize, Nanos, Nanos) {
        let residual = report.of_kind(kind);
        let ns = |seconds: f64| (seconds * 1e9).round() as Nanos;
        (residual.count, ns(residual.predicted_s), ns(residual.measured_s))
    }

    #[test]
    fn a_swap_is_held_against_all_of_its_time_and_its_bytes_against_theirs() {
        let mut profile = round();
        profile.swap.fixed_s = 200e-6;
        // One alone, and two that were asked for at once and go one after another.
        let lines = [
            swap(0, 100 * US, 1_100 * US, 1_300 * US),
            swap(2_000 * US, 2_100 * US, 3_100 * US, 3_200 * US),
            swap(2_000 * US, 3_100 * US, 4_100 * US, 4_250 * US),
        ];
        let report = report(&profile.signed(), &lines);
        assert_eq!(sums(&report, ResidualKind::Copies), (3, 3_600 * US, (1_300 + 1_200 + 1_050) * US));
        assert_eq!(sums(&report, ResidualKind::Bytes), (3, 3_000 * US, 3_000 * US));
        let share = |kind| report.kinds.iter().find(|k| k.kind == kind).unwrap().share;
        assert_eq!((share(ResidualKind::Copies), share(ResidualKind::Bytes)), (Some(1.0), None));
    }

    #[test]
    fn copies_that_shared_the_engine_are_one() {
        let lines = [swap(0, 0, 1_990 * US, 1_990 * US), swap(0, 10 * US, 2_000 * US, 2_000 * US)];
        assert_eq!(sums(&report(&round(), &lines), ResidualKind::Copies), (1, 2_000 * US, 2_000 * US));
    }

    #[test]
    fn a_step_is_slowed_for_the_share_of_its_time_that_a_copy_was_under_way() {
        let mut profile = round();
        profile.swap.step_slowdown = 0.5;
        profile.swap.busy_bytes_per_s = 0.5e9;
        // 1.2 ms of work, a third of 0.6 ms lost.
        let lines = [swap(0, 0, 600 * US, 600 * US), step(0, 0, 1_400 * US, None)];
        let report = report(&profile.signed(), &lines);
        assert_eq!(sums(&report, ResidualKind::PromptsBesideCopies), (1, 1_400 * US, 1_400 * US));
        assert_eq!(sums(&report, ResidualKind::CopiesBesideSteps), (1, 2_000 * US, 600 * US));
    }

    #[test]
    fn the_longest_wait_of_several_slots_is_what_a_step_lost() {
        let lines = [
            swap(0, 0, 800 * US, 800 * US),
            step_done(2_000 * US, 0, &[(0, 700 * US), (1, 800 * US)]),
            step(0, 0, 2_000 * US, None),
        ];
        let report = report(&round(), &lines);
        assert_eq!(sums(&report, ResidualKind::Waited), (1, 1_200 * US, 1_200 * US));
        assert!((report.waited_s - 800e-6).abs() < 1e-12);
    }

    #[test]
    fn a_gap_is_one_only_where_the_next_step_was_planned_straight_after() {
        let at = |us: Nanos| us * US;
        let formed = |line: LogLine, formed: Nanos| match line {
            LogLine::Step { step, submitted, started, ended, done, seqs, loading, waited, .. } => {
                LogLine::Step { step, formed, submitted, started, ended, done, seqs, loading, waited }
            }
            other => other,
        };
        let ended =
            |us, id| LogLine::Ended { t: at(us), id, why: crate::report::decision_log::LoggedEnd::Length };
        let lines = [
            arrive(0, 0),
            arrive(1, 1),
            formed(step(0, at(10), at(1_000), None), at(8)),
            step_done(at(1_000), 0, &[]),
            // Planned at once: 30 µs to its submission.
            formed(step(1, at(1_030), at(2_000), None), at(1_020)),
            step_done(at(2_000), 1, &[]),
            // A plan of nothing between.
            LogLine::Idle { t: at(2_010) },
            LogLine::SwapDone { t: at(2_500), slot: 0 },
            formed(step(2, at(2_530), at(3_000), None), at(2_520)),
            step_done(at(3_000), 2, &[]),
            // Nobody there.
            ended(3_000, 0),
            ended(3_000, 1),
            arrive(at(3_005), 2),
            formed(step(3, at(3_030), at(4_000), None), at(3_020)),
        ];
        assert_eq!(sums(&report(&round(), &lines), ResidualKind::Gaps), (1, 0, at(30)));
    }

    #[test]
    fn an_adapter_that_came_later_has_its_rank_and_one_that_never_came_is_refused() {
        let mut profile = round();
        profile.step.features.push("adapter_ranks".to_owned());
        profile.step.coef_ns.push(1_000.0);
        let profile = profile.signed();
        let added = LogLine::AddAdapter { t: 1, adapter: 2, rank: 64, bytes: 8 };
        let lines = [step(0, 0, 10, Some(1)), added, step(1, 20, 30, Some(2))];
        let report = report(&profile, &lines);
        assert_eq!(sums(&report, ResidualKind::Prompts).1, 2 * 1_200 * US + (8 + 64) * US);
        let mut residuals = Residuals::new(&profile).unwrap();
        let refused = residuals.add(&header(), &[step(7, 0, 10, Some(2))]).unwrap_err();
        assert!(refused.to_string().contains("step 7 names an adapter"), "{refused}");
    }
}
