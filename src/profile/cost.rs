//! The cost model: integer nanoseconds from a step's shape or a swap's bytes.

use lora_sched::Nanos;

use super::feature::{Term, within};
use super::{Profile, ProfileError, StepShape};

/// Fractions of a nanosecond in fixed point: 2⁻²⁰ ns.
const FRACTION_BITS: u32 = 20;
/// Nanoseconds that a unit of a feature may cost, at most: under three hours, and whole in fixed point.
pub(super) const MOST_NS: f64 = 1e13;

/// A feature and its cost, to be evaluated without a branch.
#[derive(Clone, Copy, Debug)]
struct Weighted {
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
    /// Of steps without prefills, and of those with some.
    terms: [Vec<Weighted>; 2],
    /// Of steps with some: what is multiplied by their rows.
    of_rows: Vec<Weighted>,
    swap_fixed: Nanos,
    ns_per_byte: f64,
    busy_ns_per_byte: f64,
    /// How much longer a step takes while a swap runs, as a fraction.
    pub step_slowdown: f64,
    /// What a step takes more that reads an adapter whose copy is under way when it is submitted, besides waiting for it.
    pub reading_ns: Nanos,
    /// Host time between a step's result and the next submission.
    pub loop_ns: Nanos,
    front_ns: Nanos,
    front_ns_per_token: f64,
    handover_ns: Nanos,
    /// Prompts of as many tokens and more are handed over.
    handover_tokens: f64,
    /// From a first token to its first byte.
    pub deliver_ns: Nanos,
    /// Transformer layers, for `layered` swaps.
    pub layers: u64,
}

impl CostModel {
    /// The costs of a checked profile.
    pub fn new(profile: &Profile) -> Result<Self, ProfileError> {
        profile.check()?;
        let (mut terms, mut of_rows) = ([Vec::new(), Vec::new()], Vec::new());
        for (name, &coef) in profile.step.features.iter().zip(&profile.step.coef_ns) {
            let term = name.parse::<Term>()?;
            let (count, from, to) = term.feature.range();
            let coef = (coef * f64::from(1u32 << FRACTION_BITS)).round() as u64;
            let weighted = Weighted { count, from, to, coef };
            // What costs nothing need not be added up.
            if coef == 0 {
                continue;
            }
            if term.feature.times() == StepShape::ROWS {
                of_rows.push(weighted);
                continue;
            }
            for (mixed, terms) in [false, true].into_iter().zip(&mut terms) {
                if term.counts_in(mixed) {
                    terms.push(weighted);
                }
            }
        }
        let ns = |seconds: f64| (seconds * 1e9).round() as Nanos;
        Ok(Self {
            terms,
            of_rows,
            swap_fixed: ns(profile.swap.fixed_s),
            ns_per_byte: 1e9 / profile.swap.bytes_per_s,
            busy_ns_per_byte: 1e9 / profile.swap.busy_bytes_per_s,
            step_slowdown: profile.swap.step_slowdown,
            reading_ns: ns(profile.swap.reading_s),
            loop_ns: ns(profile.host.loop_s),
            front_ns: ns(profile.host.front_s),
            front_ns_per_token: profile.host.tokenize_s_per_byte * profile.host.bytes_per_token * 1e9,
            handover_ns: ns(profile.host.handover_s),
            handover_tokens: profile.host.handover_bytes
                / profile.host.bytes_per_token.max(f64::MIN_POSITIVE),
            deliver_ns: ns(profile.host.deliver_s),
            layers: u64::from(profile.engine.layers),
        })
    }

    /// A step's duration with nothing beside it.
    pub fn step_ns(&self, shape: &StepShape) -> Nanos {
        whole_ns(self.step_sum(shape))
    }

    /// Whether a step's cost depends on those before it.
    pub(super) fn looks_back(&self) -> bool {
        !self.of_rows.is_empty()
    }

    /// A step's duration in fixed point.
    pub(crate) fn step_sum(&self, shape: &StepShape) -> u128 {
        let counts = shape.counts();
        let cost = |t: &Weighted| u128::from(within(counts[t.count], t.from, t.to)) * u128::from(t.coef);
        let sum = self.terms[usize::from(shape.prefills > 0)].iter().map(cost).sum();
        if shape.prefills == 0 || self.of_rows.is_empty() {
            return sum;
        }
        sum + self.of_rows.iter().map(cost).sum::<u128>() * u128::from(counts[StepShape::ROWS])
    }

    /// Durations of the steps after a decode step of this shape, which costs `sum`, as long as the same
    /// sequences run: each has read one position more. The shape has no prefills.
    pub(crate) fn decode_run(&self, shape: StepShape, sum: u128) -> DecodeRun<'_> {
        let (context, decodes) = (shape.decode_context, shape.decodes);
        DecodeRun { cost: self, context, decodes, sum, slope: 0, bend: context }
    }

    /// A swap's duration with no step running.
    pub fn swap_ns(&self, bytes: u64) -> Nanos {
        self.swap_fixed + self.bytes_ns(bytes)
    }

    /// The part of a swap's duration that its bytes take, from the first to the last, with no step running.
    pub fn bytes_ns(&self, bytes: u64) -> Nanos {
        nearest(bytes as f64 * self.ns_per_byte)
    }

    /// How much longer copying takes while a step runs, as a factor.
    pub fn busy_swap_factor(&self) -> f64 {
        self.busy_ns_per_byte / self.ns_per_byte
    }

    /// From a request's receipt to the queue.
    pub fn front_ns(&self, prompt_tokens: u32) -> Nanos {
        let tokens = f64::from(prompt_tokens);
        let handover = if tokens >= self.handover_tokens { self.handover_ns } else { 0 };
        self.front_ns + handover + nearest(tokens * self.front_ns_per_token)
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
        for term in self.cost.terms[0].iter().filter(|t| t.count == StepShape::DECODE_CONTEXT) {
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
