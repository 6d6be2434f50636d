//! The cost model: integer nanoseconds from a step's shape or a swap's bytes.

use std::fmt;
use std::str::FromStr;

use lora_sched::Nanos;

use super::{Profile, ProfileError, StepShape};

/// One term of a step's cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// One a step.
    Step,
    /// The tokens of the step that lie between `from` and `to`: `tokens:64-512` is how far the
    /// count reaches into that range. A set of adjoining ranges makes a piecewise-linear function,
    /// monotone when no coefficient is negative.
    Tokens {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// The tokens of a step with prefills, rounded up to a multiple of 64 rows, likewise in a range: what a
    /// device computes that runs such steps in a finite set of shapes.
    PaddedTokens {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// One a step with prefills: it is launched kernel by kernel where decodes are replayed as one graph.
    Mixed,
    /// One a step in which some sequence has an adapter.
    Lora,
    /// One a step with prefills in which some sequence has an adapter.
    MixedLora,
    /// [`StepShape::prefill_span`].
    PrefillSpan,
    /// [`StepShape::prefills`].
    Prefills,
    /// [`StepShape::prefill_pairs`].
    PrefillPairs,
    /// [`StepShape::decodes`].
    Decodes,
    /// [`StepShape::decode_context`] between `from` and `to`, likewise: keys and values of a large
    /// batch do not fit where those of a small one do.
    DecodeContext {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::samples`].
    Samples,
    /// [`StepShape::adapters`].
    Adapters,
    /// [`StepShape::lora_tokens`].
    LoraTokens,
    /// [`StepShape::lora_token_ranks`].
    LoraTokenRanks,
}

/// A name that is no feature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown step feature '{0}' in the profile: it is from another version of this program")]
pub struct FeatureError(String);

impl Feature {
    /// Its value for a step.
    pub fn of(self, shape: &StepShape) -> u64 {
        let (count, from, to) = self.range();
        within(shape.counts()[count], from, to)
    }

    /// Which of the shape's counts it looks at, and between which values.
    fn range(self) -> (usize, u64, u64) {
        let (count, from, to) = match self {
            Self::Step => (StepShape::ONE, 0, None),
            Self::Tokens { from, to } => (StepShape::TOKENS, from, to),
            Self::PaddedTokens { from, to } => (StepShape::PADDED_TOKENS, from, to),
            Self::Mixed => (StepShape::MIXED, 0, None),
            Self::Lora => (StepShape::LORA, 0, None),
            Self::MixedLora => (StepShape::MIXED_LORA, 0, None),
            Self::PrefillSpan => (StepShape::PREFILL_SPAN, 0, None),
            Self::Prefills => (StepShape::PREFILLS, 0, None),
            Self::PrefillPairs => (StepShape::PREFILL_PAIRS, 0, None),
            Self::Decodes => (StepShape::DECODES, 0, None),
            Self::DecodeContext { from, to } => (StepShape::DECODE_CONTEXT, from, to),
            Self::Samples => (StepShape::SAMPLES, 0, None),
            Self::Adapters => (StepShape::ADAPTERS, 0, None),
            Self::LoraTokens => (StepShape::LORA_TOKENS, 0, None),
            Self::LoraTokenRanks => (StepShape::LORA_TOKEN_RANKS, 0, None),
        };
        (count, from, to.unwrap_or(u64::MAX))
    }
}

/// Rows that [`Feature::PaddedTokens`] rounds up to a multiple of.
pub const PADDED_TO: u64 = 64;

/// How far `count` reaches into a range.
fn within(count: u64, from: u64, to: u64) -> u64 {
    count.min(to).saturating_sub(from)
}

const NAMES: [(Feature, &str); 12] = [
    (Feature::Step, "step"),
    (Feature::Mixed, "mixed"),
    (Feature::Lora, "lora"),
    (Feature::MixedLora, "mixed_lora"),
    (Feature::PrefillSpan, "prefill_span"),
    (Feature::Prefills, "prefills"),
    (Feature::PrefillPairs, "prefill_pairs"),
    (Feature::Decodes, "decodes"),
    (Feature::Samples, "samples"),
    (Feature::Adapters, "adapters"),
    (Feature::LoraTokens, "lora_tokens"),
    (Feature::LoraTokenRanks, "lora_token_ranks"),
];

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = match self {
            Self::Tokens { from, to } => Some(("tokens", from, to)),
            Self::PaddedTokens { from, to } => Some(("padded_tokens", from, to)),
            Self::DecodeContext { from, to } => Some(("decode_context", from, to)),
            _ => None,
        };
        if let Some((name, from, to)) = range {
            write!(f, "{name}:{from}-")?;
            return to.map_or(Ok(()), |to| write!(f, "{to}"));
        }
        NAMES.iter().find(|n| n.0 == *self).map_or(Ok(()), |n| f.write_str(n.1))
    }
}

impl FromStr for Feature {
    type Err = FeatureError;

    fn from_str(s: &str) -> Result<Self, FeatureError> {
        let unknown = || FeatureError(s.to_owned());
        if let Some((name, range)) = s.split_once(':') {
            let (from, to) = range.split_once('-').ok_or_else(unknown)?;
            let from = from.parse().map_err(|_| unknown())?;
            let to = if to.is_empty() { None } else { Some(to.parse().map_err(|_| unknown())?) };
            return match name {
                "tokens" => Ok(Self::Tokens { from, to }),
                "padded_tokens" => Ok(Self::PaddedTokens { from, to }),
                "decode_context" => Ok(Self::DecodeContext { from, to }),
                _ => Err(unknown()),
            };
        }
        NAMES.iter().find(|n| n.1 == s).map(|n| n.0).ok_or_else(unknown)
    }
}

/// Fractions of a nanosecond in fixed point: 2⁻²⁰ ns.
const FRACTION_BITS: u32 = 20;
/// Nanoseconds that a unit of a feature may cost, at most: under three hours, and whole in fixed point.
pub(super) const MOST_NS: f64 = 1e13;

/// A feature and its cost, to be evaluated without a branch.
#[derive(Clone, Copy, Debug)]
struct Term {
    /// Index in [`StepShape::counts`].
    count: usize,
    from: u64,
    to: u64,
    /// Cost of a unit in fixed point.
    coef: u64,
}

/// A profile made ready for evaluation. Every cost is an integer sum, so that it does not depend on
/// the order of evaluation, nor on the machine.
#[derive(Clone, Debug)]
pub struct CostModel {
    terms: Vec<Term>,
    swap_fixed: Nanos,
    ns_per_byte: f64,
    busy_ns_per_byte: f64,
    /// How much longer a step takes while a swap runs, as a fraction.
    pub step_slowdown: f64,
    /// Host time between a step's result and the next submission.
    pub loop_ns: Nanos,
    front_ns: Nanos,
    front_ns_per_token: f64,
    /// From a first token to its first byte.
    pub deliver_ns: Nanos,
    /// Transformer layers, for `layered` swaps.
    pub layers: u64,
}

impl CostModel {
    /// The costs of a checked profile.
    pub fn new(profile: &Profile) -> Result<Self, ProfileError> {
        profile.check()?;
        let terms = profile.step.features.iter().zip(&profile.step.coef_ns);
        let terms = terms
            .map(|(name, &coef)| {
                let coef = (coef * f64::from(1u32 << FRACTION_BITS)).round() as u64;
                let (count, from, to) = name.parse::<Feature>()?.range();
                Ok(Term { count, from, to, coef })
            })
            .collect::<Result<_, FeatureError>>()?;
        let ns = |seconds: f64| (seconds * 1e9).round() as Nanos;
        Ok(Self {
            terms,
            swap_fixed: ns(profile.swap.fixed_s),
            ns_per_byte: 1e9 / profile.swap.bytes_per_s,
            busy_ns_per_byte: 1e9 / profile.swap.busy_bytes_per_s,
            step_slowdown: profile.swap.step_slowdown,
            loop_ns: ns(profile.host.loop_s),
            front_ns: ns(profile.host.front_s),
            front_ns_per_token: profile.host.tokenize_s_per_byte * profile.host.bytes_per_token * 1e9,
            deliver_ns: ns(profile.host.deliver_s),
            layers: u64::from(profile.engine.layers),
        })
    }

    /// A step's duration with nothing beside it.
    pub fn step_ns(&self, shape: &StepShape) -> Nanos {
        whole_ns(self.step_sum(shape))
    }

    /// A step's duration in fixed point.
    pub(crate) fn step_sum(&self, shape: &StepShape) -> u128 {
        let counts = shape.counts();
        let cost = |t: &Term| u128::from(within(counts[t.count], t.from, t.to)) * u128::from(t.coef);
        self.terms.iter().map(cost).sum()
    }

    /// Durations of the steps after a decode step of this shape, which costs `sum`, as long as the same
    /// sequences run: each has read one position more. The shape has no prefills.
    pub(crate) fn decode_run(&self, shape: StepShape, sum: u128) -> DecodeRun<'_> {
        let (context, decodes) = (shape.decode_context, shape.decodes);
        DecodeRun { cost: self, context, decodes, sum, slope: 0, bend: context }
    }

    /// A swap's duration with no step running.
    pub fn swap_ns(&self, bytes: u64) -> Nanos {
        self.swap_fixed + nearest(bytes as f64 * self.ns_per_byte)
    }

    /// How much longer copying takes while a step runs, as a factor.
    pub fn busy_swap_factor(&self) -> f64 {
        self.busy_ns_per_byte / self.ns_per_byte
    }

    /// From a request's receipt to the queue.
    pub fn front_ns(&self, prompt_tokens: u32) -> Nanos {
        self.front_ns + nearest(f64::from(prompt_tokens) * self.front_ns_per_token)
    }
}

/// What [`f64::round`] gives, of a number that is not negative. On plain x86-64 that is a call of the C
/// library, twice or three times a request.
#[inline]
pub(crate) fn nearest(x: f64) -> u64 {
    let whole = x as u64;
    whole + u64::from(x - whole as f64 >= 0.5)
}

/// Fixed point to nanoseconds.
pub(crate) fn whole_ns(sum: u128) -> Nanos {
    // Nothing happens in no time: a clock that stands still could loop.
    ((sum >> FRACTION_BITS) as Nanos).max(1)
}

/// See [`CostModel::decode_run`]. Integer sums: to the nanosecond what each step alone would cost.
#[derive(Clone, Debug)]
pub(crate) struct DecodeRun<'a> {
    cost: &'a CostModel,
    context: u64,
    decodes: u64,
    sum: u128,
    /// What a step adds to the sum while the context stays under `bend`.
    slope: u128,
    bend: u64,
}

impl DecodeRun<'_> {
    /// The present step's context and its cost in fixed point.
    pub(crate) fn reached(&self) -> (u64, u128) {
        (self.context, self.sum)
    }

    /// Goes on to the next step and gives its duration.
    #[inline]
    pub(crate) fn next(&mut self) -> Nanos {
        let context = self.context + self.decodes;
        if context > self.bend {
            self.straighten(context);
        }
        self.context = context;
        self.sum += self.slope;
        whole_ns(self.sum)
    }

    /// Finds the slope from the present context to `context` and how far it holds.
    fn straighten(&mut self, context: u64) {
        let before = self.context;
        self.slope = 0;
        let mut bend = u64::MAX;
        for term in self.cost.terms.iter().filter(|t| t.count == StepShape::DECODE_CONTEXT) {
            let further = within(context, term.from, term.to) - within(before, term.from, term.to);
            self.slope += u128::from(further) * u128::from(term.coef);
            bend = [term.from, term.to].into_iter().filter(|&end| end > before).fold(bend, u64::min);
        }
        // An end between the two contexts: the step across it has a slope of its own.
        self.bend = bend.max(context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::round;

    #[test]
    fn features_have_names_that_read_back() {
        for feature in NAMES
            .map(|n| n.0)
            .into_iter()
            .chain([Feature::Tokens { from: 0, to: Some(64) }, Feature::DecodeContext { from: 64, to: None }])
            .chain([Feature::PaddedTokens { from: 64, to: Some(128) }])
        {
            assert_eq!(feature.to_string().parse(), Ok(feature));
        }
        assert!("tokens:a-b".parse::<Feature>().is_err());
        assert!("luck:1-2".parse::<Feature>().is_err());
    }

    #[test]
    fn token_ranges_make_a_piecewise_linear_function() {
        let ranges = [Feature::Tokens { from: 0, to: Some(64) }, Feature::Tokens { from: 64, to: None }];
        let at = |tokens| ranges.map(|r| r.of(&StepShape { tokens, ..StepShape::default() }));
        assert_eq!(at(10), [10, 0]);
        assert_eq!(at(64), [64, 0]);
        assert_eq!(at(100), [64, 36]);
    }

    #[test]
    fn steps_with_prefills_are_padded() {
        let feature = Feature::PaddedTokens { from: 64, to: Some(512) };
        let at = |tokens, prefills| feature.of(&StepShape { tokens, prefills, ..StepShape::default() });
        assert_eq!([at(64, 1), at(65, 1), at(500, 2), at(900, 1)], [0, 64, 448, 448]);
        assert_eq!(at(500, 0), 0);
    }

    #[test]
    fn the_nearest_whole_number_is_that_of_the_library() {
        for base in [0.0, 1.0, 2.0, 1e6, 4503599627370495.0, 9007199254740992.0] {
            for part in [0.0, 0.25, 0.49999999999999994, 0.5, 0.75, 1.0 - f64::EPSILON] {
                assert_eq!(nearest(base + part), (base + part).round() as u64, "{base} + {part}");
            }
        }
    }

    #[test]
    fn a_step_costs_the_sum_of_its_terms() {
        let cost = CostModel::new(&round()).unwrap();
        let shape = StepShape { tokens: 500, ..StepShape::default() };
        assert_eq!(cost.step_ns(&shape), 11_000_000);
        assert_eq!(cost.swap_ns(1_000_000), 1_000_000);
    }

    #[test]
    fn a_run_of_decodes_costs_what_its_steps_cost() {
        let mut profile = round();
        for (name, coef) in
            [("decode_context:0-700", 1.37), ("decode_context:700-1000", 0.0), ("decode_context:1000-", 5.01)]
        {
            profile.step.features.push(name.to_owned());
            profile.step.coef_ns.push(coef);
        }
        let cost = CostModel::new(&profile.signed()).unwrap();
        for decodes in [1, 3, 64, 400] {
            let mut shape =
                StepShape { tokens: decodes, decodes, decode_context: 17, ..StepShape::default() };
            let mut run = cost.decode_run(shape, cost.step_sum(&shape));
            for _ in 0..1_200 {
                shape.decode_context += decodes;
                assert_eq!(run.next(), cost.step_ns(&shape));
                assert_eq!(run.reached(), (shape.decode_context, cost.step_sum(&shape)));
            }
        }
    }
}
