//! Which cost misses: a profile's costs against what a run's decision log says that things took.
//!
//! Every step, copy, host gap and way through the front end of a log is one [`Sample`], of what the simulator would have
//! charged for it and what it took. What decided when things began plays no part: a step is charged by what it
//! computed, however the run came to it. Three things do come from the run itself ([`LogTimes`]): how long copies and
//! steps were under way side by side, how long a step waited for an adapter, which is no cost of the step, and whether
//! it read one that was under way, which is.

mod report;

use lora_sched::Nanos;

pub use report::{KindResidual, RangeResidual, Residual, ResidualKind, ResidualReport};

use super::log_times::{CopyTime, LogTimes, LogTimesError, StepTime, in_order, rate_beside};
use super::recorded::gaps;
use crate::profile::{CostModel, Profile, ProfileError};
use crate::report::decision_log::{LogHeader, LogLine};

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
    pub fn add(&mut self, header: &LogHeader, lines: &[LogLine]) -> Result<(), LogTimesError> {
        if header.model != self.model && !self.other_models.contains(&header.model) {
            self.other_models.push(header.model.clone());
        }
        let times = LogTimes::new(header, lines)?;
        times.steps.iter().for_each(|step| self.add_step(step));
        times.copies.iter().for_each(|copy| self.add_copy(copy));
        self.add_gaps(lines);
        self.add_front_end(lines)
    }

    /// What all logs so far come to.
    pub fn report(&self) -> ResidualReport {
        ResidualReport::of(&self.other_models, &self.steps, &self.rest, self.waited)
    }

    fn add_step(&mut self, step: &StepTime) {
        let StepTime { shape, running, took: measured, stalled, beside, held, reading } = *step;
        let work = self.cost.step_ns(&shape) + if reading { self.cost.reading_ns } else { 0 };
        let predicted = work as f64 / rate_beside(beside, measured, 1.0 + self.cost.step_slowdown);
        self.waited += stalled + held.unwrap_or(0);
        let kind = match (shape.prefills > 0, shape.decodes > 0, beside > 0) {
            _ if held.is_some() || stalled > 0 => ResidualKind::Waited,
            (false, _, false) => ResidualKind::Decodes,
            (false, _, true) => ResidualKind::DecodesBesideCopies,
            (true, false, false) => ResidualKind::Prompts,
            (true, false, true) => ResidualKind::PromptsBesideCopies,
            (true, true, false) => ResidualKind::Mixed,
            (true, true, true) => ResidualKind::MixedBesideCopies,
        };
        let sample = Sample { predicted, measured };
        self.steps.push(StepSample { kind, recent: shape.recent, running, sample });
    }

    fn add_copy(&mut self, copy: &CopyTime) {
        let factor = self.cost.busy_swap_factor();
        let sample = |alone: Nanos, beside, measured| {
            let predicted = alone as f64 / rate_beside(beside, measured, factor);
            Sample { predicted, measured }
        };
        let kinds = if copy.beside > 0 {
            [ResidualKind::CopiesBesideSteps, ResidualKind::BytesBesideSteps]
        } else {
            [ResidualKind::Copies, ResidualKind::Bytes]
        };
        let whole = copy.bytes.iter().map(|&bytes| self.cost.swap_ns(bytes)).sum();
        let bytes = copy.bytes.iter().map(|&bytes| self.cost.bytes_ns(bytes)).sum();
        // What came before it is no cost of a copy.
        let whole = sample(whole, copy.beside, copy.done - copy.turn);
        let bytes = sample(bytes, copy.beside_bytes, copy.ended - copy.started);
        self.rest.extend(kinds.into_iter().zip([whole, bytes]));
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

    fn add_front_end(&mut self, lines: &[LogLine]) -> Result<(), LogTimesError> {
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

#[cfg(test)]
mod tests {
    use lora_sched::Config;

    use super::*;
    use crate::profile::tests::round;
    use crate::report::decision_log::LoggedSeq;

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
    fn a_step_that_reads_an_adapter_under_way_is_charged_for_it() {
        let mut profile = round();
        profile.swap.reading_s = 300e-6;
        profile.swap.step_slowdown = 0.5;
        let profile = profile.signed();
        let with = |line: LogLine, slots: &[u32], held: bool| match line {
            LogLine::Step { step, formed, submitted, started, ended, done, seqs, .. } => {
                let (loading, waited) = (slots.to_vec(), held);
                LogLine::Step { step, formed, submitted, started, ended, done, seqs, loading, waited }
            }
            other => other,
        };
        // 1.2 ms and 0.3 ms of work, a third of 0.6 ms beside the copy lost, of which 0.2 ms more were waited.
        let lines = [
            swap(0, 0, 800 * US, 800 * US),
            step_done(1_900 * US, 0, &[(0, 200 * US)]),
            with(step(0, 0, 1_900 * US, Some(0)), &[0], false),
            // The copy was waited for before this one was submitted, and that one reads nothing that is under way.
            with(step(1, 2_000 * US, 3_200 * US, Some(0)), &[0], true),
            step(2, 4_000 * US, 5_200 * US, Some(0)),
        ];
        let report = report(&profile, &lines);
        assert_eq!(sums(&report, ResidualKind::Waited), (2, 2_900 * US, 2_900 * US));
        assert_eq!(sums(&report, ResidualKind::Prompts), (1, 1_200 * US, 1_200 * US));
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
