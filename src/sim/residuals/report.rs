//! What samples come to.

use serde::{Deserialize, Serialize};

use lora_sched::Nanos;

use super::{Sample, StepSample};
use crate::report::stats::{median, percentile, sorted};

/// What took time. "Beside" is during part of it at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResidualKind {
    /// Steps of decodes alone, from submission to their end's being known.
    Decodes,
    /// The same while a copy was under way; predicted with [`step_slowdown`](crate::profile::CostModel::step_slowdown)
    /// for the share of the time that it was.
    DecodesBesideCopies,
    /// Steps of prompts alone.
    Prompts,
    /// The same while a copy was under way.
    PromptsBesideCopies,
    /// Steps with prompts and decodes.
    Mixed,
    /// The same while a copy was under way.
    MixedBesideCopies,
    /// Steps that waited for an adapter, for its layers or before they were submitted; less the wait.
    Waited,
    /// Copies with no step beside them, from submission (or the end of the copy before) to their end's being known,
    /// against a whole swap. Copies whose bytes moved at the same time are one.
    Copies,
    /// The same copies from their first byte to their last, against the bytes at the rate of copying: what a swap takes
    /// besides is left out on both sides.
    Bytes,
    /// Copies while a step ran, predicted with the slower rate for the share of the time that it did.
    CopiesBesideSteps,
    /// The same copies from their first byte to their last.
    BytesBesideSteps,
    /// Host time from a step's end to the next submission, where the next was planned straight after.
    Gaps,
    /// Host time from a request's receipt to the queue.
    FrontEnd,
}

impl ResidualKind {
    /// All, in the order in which they are reported.
    pub const ALL: [Self; 13] = [
        Self::Decodes,
        Self::DecodesBesideCopies,
        Self::Prompts,
        Self::PromptsBesideCopies,
        Self::Mixed,
        Self::MixedBesideCopies,
        Self::Waited,
        Self::Copies,
        Self::Bytes,
        Self::CopiesBesideSteps,
        Self::BytesBesideSteps,
        Self::Gaps,
        Self::FrontEnd,
    ];

    /// In words.
    pub fn said(self) -> &'static str {
        match self {
            Self::Decodes => "decodes alone",
            Self::DecodesBesideCopies => "decodes alone, beside copies",
            Self::Prompts => "prompts alone",
            Self::PromptsBesideCopies => "prompts alone, beside copies",
            Self::Mixed => "prompts beside decodes",
            Self::MixedBesideCopies => "prompts beside decodes, beside copies",
            Self::Waited => "steps that waited for an adapter",
            Self::Copies => "copies",
            Self::CopiesBesideSteps => "copies beside steps",
            Self::Bytes | Self::BytesBesideSteps => "  first byte to last",
            Self::Gaps => "host: step to step",
            Self::FrontEnd => "host: front end",
        }
    }

    /// Whether it is another view of what the kind before it counts already.
    pub fn counted_before(self) -> bool {
        matches!(self, Self::Bytes | Self::BytesBesideSteps)
    }

    fn has_prompts(self) -> bool {
        matches!(self, Self::Prompts | Self::PromptsBesideCopies | Self::Mixed | Self::MixedBesideCopies)
    }

    fn has_decodes_alone(self) -> bool {
        matches!(self, Self::Decodes | Self::DecodesBesideCopies)
    }
}

/// What is predicted of some things against what they took. Errors are predicted over measured less one: 0.05 is 5 %
/// too much. None where nothing was measured to be relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    /// How many.
    pub count: usize,
    /// What they took, in sum, seconds.
    pub measured_s: f64,
    /// What is predicted, in sum, seconds.
    pub predicted_s: f64,
    /// Predicted less measured, in sum, seconds: what the error does to a simulated run.
    pub effect_s: f64,
    /// Error of the sum.
    pub error: Option<f64>,
    /// Median of each one's error.
    pub median_error: Option<f64>,
    /// 10 % have a lower error.
    pub p10_error: Option<f64>,
    /// 10 % have a higher error.
    pub p90_error: Option<f64>,
}

impl Residual {
    fn of(samples: impl IntoIterator<Item = Sample>) -> Self {
        let (mut count, mut measured, mut predicted, mut errors) = (0, 0, 0.0, Vec::new());
        for sample in samples {
            count += 1;
            measured += sample.measured;
            predicted += sample.predicted;
            if sample.measured > 0 {
                errors.push(sample.predicted / sample.measured as f64 - 1.0);
            }
        }
        let errors = sorted(&errors);
        let (measured_s, predicted_s) = (measured as f64 * 1e-9, predicted * 1e-9);
        Self {
            count,
            measured_s,
            predicted_s,
            effect_s: predicted_s - measured_s,
            error: (measured > 0).then(|| predicted / measured as f64 - 1.0),
            median_error: median(&errors),
            p10_error: percentile(&errors, 10.0),
            p90_error: percentile(&errors, 90.0),
        }
    }
}

/// A kind's errors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KindResidual {
    /// The kind.
    pub kind: ResidualKind,
    /// Its share of all measured time, of copies beside steps too; none of what is counted before.
    pub share: Option<f64>,
    /// Its errors.
    #[serde(flatten)]
    pub residual: Residual,
}

/// The errors of steps with something in a range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RangeResidual {
    /// The least that there is.
    pub from: u64,
    /// The most that there is.
    pub to: u64,
    /// Their errors.
    #[serde(flatten)]
    pub residual: Residual,
}

/// A profile's costs against what logs say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualReport {
    /// Models of logs that are not the profile's: its costs are of another thing then.
    pub other_models: Vec<String>,
    /// What steps waited for adapters, seconds; in no kind.
    pub waited_s: f64,
    /// Each kind, those that there were none of included.
    pub kinds: Vec<KindResidual>,
    /// Steps with prompts in thirds by tokens a second in such steps of late ([`StepShape::recent`], but in ones); those
    /// that waited are left out.
    ///
    /// [`StepShape::recent`]: crate::profile::StepShape::recent
    pub prompts_by_recent: Vec<RangeResidual>,
    /// The same in thirds by sequences in the step.
    pub prompts_by_load: Vec<RangeResidual>,
    /// Steps of decodes alone in thirds by sequences in the step; those that waited are left out.
    pub decodes_by_load: Vec<RangeResidual>,
}

impl ResidualReport {
    pub(super) fn of(
        other_models: &[String],
        steps: &[StepSample],
        rest: &[(ResidualKind, Sample)],
        waited: Nanos,
    ) -> Self {
        let all = || steps.iter().map(|s| (s.kind, s.sample)).chain(rest.iter().copied());
        let of_kind = |kind| Residual::of(all().filter(|s| s.0 == kind).map(|s| s.1));
        let mut kinds: Vec<KindResidual> = ResidualKind::ALL
            .into_iter()
            .map(|kind| KindResidual { kind, share: None, residual: of_kind(kind) })
            .collect();
        let counted = |k: &&mut KindResidual| !k.kind.counted_before();
        let measured: f64 = kinds.iter_mut().filter(counted).map(|k| k.residual.measured_s).sum();
        for kind in kinds.iter_mut().filter(counted) {
            kind.share = (measured > 0.0).then(|| kind.residual.measured_s / measured);
        }
        let with_prompts = || steps.iter().filter(|s| s.kind.has_prompts());
        let decodes = steps.iter().filter(|s| s.kind.has_decodes_alone());
        Self {
            other_models: other_models.to_vec(),
            waited_s: waited as f64 * 1e-9,
            kinds,
            prompts_by_recent: thirds(with_prompts().map(|s| (s.recent * 100, s.sample))),
            prompts_by_load: thirds(with_prompts().map(|s| (s.running, s.sample))),
            decodes_by_load: thirds(decodes.map(|s| (s.running, s.sample))),
        }
    }

    /// A kind's errors.
    pub fn of_kind(&self, kind: ResidualKind) -> Residual {
        self.kinds.iter().find(|k| k.kind == kind).map_or_else(Residual::default, |k| k.residual)
    }

    /// Whether there was nothing to hold the profile against.
    pub fn is_empty(&self) -> bool {
        self.kinds.iter().all(|k| k.residual.count == 0)
    }

    /// The kind whose error does most to a simulated run's time; none where every one is exact.
    pub fn largest(&self) -> Option<&KindResidual> {
        let counted = self.kinds.iter().filter(|k| !k.kind.counted_before());
        let largest = counted.max_by(|a, b| a.residual.effect_s.abs().total_cmp(&b.residual.effect_s.abs()));
        largest.filter(|k| k.residual.effect_s != 0.0)
    }
}

/// Samples by a value, in thirds of what there is. Equal values stay together, so there are fewer ranges where values
/// are few.
fn thirds(samples: impl Iterator<Item = (u64, Sample)>) -> Vec<RangeResidual> {
    let mut samples: Vec<(u64, Sample)> = samples.collect();
    samples.sort_by_key(|s| s.0);
    let n = samples.len();
    let mut ranges = Vec::new();
    let mut begun = 0;
    for third in 1..=3 {
        // The last of this third, and all that are like it.
        let Some(&(to, _)) = (n * third / 3).checked_sub(1).and_then(|last| samples.get(last)) else {
            continue;
        };
        let end = samples.partition_point(|s| s.0 <= to);
        if end > begun {
            let range = &samples[begun..end];
            let residual = Residual::of(range.iter().map(|s| s.1));
            ranges.push(RangeResidual { from: range[0].0, to, residual });
            begun = end;
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(predicted: f64, measured: Nanos) -> Sample {
        Sample { predicted, measured }
    }

    #[test]
    fn the_error_of_the_sum_is_not_that_of_the_median() {
        let long = sample(2_000_000_000.0, 1_000_000_000);
        let residual = Residual::of([sample(90.0, 100), sample(100.0, 100), sample(110.0, 100), long]);
        assert_eq!(residual.count, 4);
        assert!((residual.error.unwrap() - 1.0).abs() < 1e-6, "{residual:?}");
        assert!((residual.median_error.unwrap() - 0.05).abs() < 1e-12, "{residual:?}");
        assert!((residual.effect_s - 1.0).abs() < 1e-12, "{residual:?}");
        assert!((residual.p10_error.unwrap() + 0.1).abs() < 1e-12, "{residual:?}");
        assert_eq!(residual.p90_error, Some(1.0));
    }

    #[test]
    fn nothing_measured_has_no_error() {
        let residual = Residual::of([sample(5.0, 0)]);
        assert_eq!((residual.count, residual.error, residual.median_error), (1, None, None));
    }

    #[test]
    fn thirds_hold_all_and_keep_equal_values_together() {
        let of = |values: &[u64]| {
            let ranges = thirds(values.iter().map(|&v| (v, sample(1.0, 1))));
            ranges.iter().map(|r| (r.from, r.to, r.residual.count)).collect::<Vec<_>>()
        };
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[7]), [(7, 7, 1)]);
        assert_eq!(of(&[9, 1, 8, 2, 5, 4]), [(1, 2, 2), (4, 5, 2), (8, 9, 2)]);
        assert_eq!(of(&[0, 0, 0, 0, 0, 3]), [(0, 0, 5), (3, 3, 1)]);
    }
}
